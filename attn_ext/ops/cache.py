"""The operator that appends to a `KVCache`, so that compiled code can: `attn_ext::cache_append`.

Which pages are written is decided on the host when it runs (`attn_ext.core.pages`); a graph has the
operator as one node that changes the cache's tensors and knows the cache by its handle.
"""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

import torch

from attn_ext.backends import cpu_cache
from attn_ext.backends.looks import looks
from attn_ext.core.pages import Pages
from attn_ext.ops import route
from attn_ext.ops.dispatch import lib

_known: WeakValueDictionary[int, Pages] = WeakValueDictionary()
_numbers = itertools.count()
FEW_PIECES = 8  # a copy each; more are written by one indexed store of all rows


def handle(pages: Pages) -> torch.Tensor:
    """int64 [1] on the CPU, by which the operator finds `pages` while they exist."""
    number = next(_numbers)
    _known[number] = pages
    return torch.tensor([number], device="cpu", dtype=torch.int64)


def append(stores, table, lengths, pages: Pages, counts=None, rows=None) -> None:
    """Append the last counts[i] (None: all) of new rows to sequence rows[i] (None: i); with block
    table and lengths.  stores: of each kind of rows (pages [pages, Hk, page_size, D], new
    [B, Hk, S, D]).
    """
    batch, _, seqlen, _ = stores[0][1].shape
    rows = list(range(batch)) if rows is None else rows
    counts = [seqlen] * batch if counts is None else counts
    if len(counts) != batch or not all(0 <= count <= seqlen for count in counts):
        raise ValueError(
            f"counts must have {batch} entries between 0 and the {seqlen} positions given, got "
            f"{counts}"
        )
    copies, pieces = pages.append(rows, counts)
    firsts = [seqlen - count for count in counts]
    placed = [(n, firsts[n] + first, *rest) for n, first, *rest in pieces]
    for kept, new in stores:
        if not cpu_cache.write(kept, new, copies, placed):
            _write_rows(kept, new, copies, placed)
    publish(pages, table, lengths)


def look_of(k, v, k_pages, v_pages, table, lengths):
    """What an append of k and v to all sequences looks like, for `append_again`; None where these
    tensors cannot take that way."""
    if not cpu_cache.READS_TENSORS or not route.is_plain(k, v, k_pages):
        return None
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        return None
    if torch.autograd.forward_ad._current_level >= 0:  # a tangent would be lost
        return None
    return looks(k, v, k_pages, v_pages, table, lengths)


def append_again(k, v, k_pages, v_pages, table, lengths, pages: Pages) -> bool:
    """`append` to all sequences of what looks like rows that were appended before; False, with
    nothing done, where a page is to be taken, copied or let go."""
    count = k.shape[2]
    if not 0 < count <= pages.room:
        return False
    if not cpu_cache.extend(k_pages, v_pages, table, lengths, k, v):
        return False
    pages.extend(count)
    return True


def _write_rows(pages, new, copies, pieces) -> None:
    for source, target, count in copies:
        pages[target, :, :count] = pages[source, :, :count]
    tokens = sum(count for *_, count in pieces)
    if new.device.type == "cpu" and len(pieces) <= max(FEW_PIECES, tokens // 16):
        for row, first, page, slot, count in pieces:
            pages[page, :, slot : slot + count] = new[row, :, first : first + count]
        return
    index = [
        (row, first + i, page, slot + i)
        for row, first, page, slot, count in pieces
        for i in range(count)
    ]
    row, column, page, slot = (
        torch.tensor(index, dtype=torch.int64, device="cpu").T.to(new.device).unbind()
    )
    pages[page, :, slot] = new[row, :, column]


def publish(pages: Pages, table, lengths) -> None:
    """Write the lengths [2, B] of all sequences, and the page lists that have changed, to the
    tensors that kernels read.  lengths[0]: positions, lengths[1]: those that are held.
    """
    pages.measure()
    held = [pages.held(b) for b in range(len(pages.lists))]
    lists = [[b, *pages.lists[b]] for b in sorted(pages.changed)]
    if cpu_cache.publish(lengths, table, [pages.lengths, held], lists):
        pages.changed.clear()
        return
    lengths.copy_(torch.tensor([pages.lengths, held], device="cpu", dtype=torch.int32))
    rows = sorted(pages.changed)
    pages.changed.clear()
    if not rows:
        return
    most = max(len(pages.lists[b]) for b in rows)
    lists = [pages.lists[b] + [0] * (most - len(pages.lists[b])) for b in rows]
    fresh = torch.tensor(lists, device="cpu", dtype=torch.int32)
    numbers = torch.tensor(rows, dtype=torch.int64, device="cpu")
    table[numbers.to(table.device), :most] = fresh.to(table.device)


lib.define(
    "cache_append(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) table, Tensor(d!) lengths, "
    "Tensor handle, Tensor k, Tensor v, Tensor? counts, int[]? rows) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _append_kernel(k_pages, v_pages, table, lengths, handle, k, v, counts, rows) -> None:
    pages = _known.get(handle.item())
    if pages is None:
        raise RuntimeError("the KVCache of this compiled call has gone: compile with one that is")
    counts = None if counts is None else counts.tolist()
    append(((k_pages, k), (v_pages, v)), table, lengths, pages, counts, rows)


for _device in ("CPU", "CUDA"):
    lib.impl("cache_append", _append_kernel, _device)


@torch.library.register_fake("attn_ext::cache_append", lib=lib)
def _append_fake(k_pages, v_pages, table, lengths, handle, k, v, counts, rows) -> None:
    return None
