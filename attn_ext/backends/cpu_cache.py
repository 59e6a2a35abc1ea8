"""The cpu backend's short way of few queries against a cache, and of a cache's changes: one native
call each (csrc/cache_calls.cpp).  For tensors that `attn_ext.backends.looks` has seen alone, where
torch has the table of C functions by which C++ reads them.
"""

from __future__ import annotations

import torch

from attn_ext.backends import cpu
from attn_ext.backends.looks import looks
from attn_ext.core.layout import empty_like_layout, prototype
from attn_ext.core.schema import TENSORS, Call, lse_shape, statistics_dtype

try:
    from attn_ext import _C
except ImportError:  # attn_ext.backends.cpu says why
    _C = None

READS_TENSORS = _C is not None and looks is getattr(_C, "looks", None)
GIVEN = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sink", "seqlens_k", "block_table")


class DecodePlan:
    """All of a decode call but its tensors: for those that look as the call's do, and for the same
    new rows."""

    def __init__(self, call: Call):
        out = empty_like_layout(call.q, call.v.shape[-1])
        lse = torch.empty(lse_shape(call), dtype=statistics_dtype(call.q.dtype), device="cpu")
        self.native = cpu.native_call(call, cpu.canonical_inputs(call), out, lse)
        self.out, self.lse = prototype(out), prototype(lse)

    def forward(
        self, q, k, v, mask, bias, slopes, sink, lengths, table, k_new, v_new, with_lse,
        k_factors=None, v_factors=None,
    ):  # fmt: skip
        """(O, LSE or None), k_new and v_new appended; None, with nothing done, where a length or a
        page is out of range."""
        out = torch.empty_like(self.out)
        lse = torch.empty_like(self.lse) if with_lse else None
        done = _C.decode_forward(
            self.native, torch.get_num_threads(), q, k, v, mask, bias, slopes, sink, lengths, table,
            k_new, v_new, k_factors, v_factors, out, lse,
        )  # fmt: skip
        if not done:
            return None
        if k_new is not None and not k.is_inference():
            torch.autograd.graph.increment_version((k, v))
        return out, lse


def decode_plan(call: Call, tensors) -> DecodePlan | None:
    """The plan of a call that has run with `tensors`, those of `DecodePlan.forward`; None where a
    kernel was given a copy of one, in another layout or dtype, which the next call lacks."""
    if not READS_TENSORS or call.need_stats or call.q.numel() == 0 or call.k.numel() == 0:
        return None
    *given, k_new, v_new = tensors
    if any(n not in GIVEN and getattr(call, n) is not None for n in Call._fields[:TENSORS]):
        return None
    if any(x is not None and x.stride(-1) != 1 for x in (k_new, v_new)):
        return None
    if k_new is not None and (0 in call.k.stride() or 0 in call.v.stride()):
        return None  # rows that share memory
    taken = cpu.canonical_inputs(call)
    for name, x in zip(GIVEN, given, strict=True):
        # lengths are read wherever they lie
        copied = x is not None and x.data_ptr() != taken[name].data_ptr()
        if copied and name != "seqlens_k":
            return None
    return DecodePlan(call)


def write(pages, new, copies, pieces) -> bool:
    """Copy between pages [pages, H, page_size, D], (source, target, count), and then from new rows
    [B, H, S, D], (row, first, page, slot, count); False, with nothing done, where this is not the
    way."""
    if (
        not READS_TENSORS or looks(pages, new) is None
        or pages.stride(-1) != 1 or new.stride(-1) != 1
    ):  # fmt: skip
        return False
    _C.cache_write(pages, new, copies, pieces, torch.get_num_threads())
    if not pages.is_inference():
        torch.autograd.graph.increment_version(pages)
    return True


def extend(k_pages, v_pages, table, lengths, k, v) -> bool:
    """Put k and v [B, H, S, D] behind the rows of each sequence, whose last page has room for them,
    and add S to the lengths [2, B], in one native call; False, with nothing done, where this is not
    the way.  For tensors that have been written so before."""
    if not _C.cache_extend(k_pages, v_pages, table, lengths, k, v):
        return False
    # tensors that inference mode has made have no versions
    written = [x for x in (k_pages, v_pages, lengths) if not x.is_inference()]
    torch.autograd.graph.increment_version(written)
    return True


def publish(lengths, table, numbers, lists) -> bool:
    """Two lists of numbers into lengths [2, B], and the rest of each list into the table's row
    list[0]; False, with nothing done, where this is not the way."""
    if not READS_TENSORS or looks(lengths, table) is None:
        return False
    _C.cache_publish(lengths, table, numbers, lists)
    if not table.is_inference():
        torch.autograd.graph.increment_version((lengths, table))
    return True


def of_int8(call: Call, k_factors, v_factors) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(O, LSE) of a float32 call with pages of int8, which stand for their numbers times the
    factors, float32 [pages, H, page_size, 1]; None where no kernel reads them."""
    if not READS_TENSORS or call.q.numel() == 0 or (call.bias is not None and call.bias.is_neg()):
        return None
    t = cpu.canonical_inputs(call)
    call = call._replace(**{name: t[name] for name in GIVEN})
    if looks(*(t[name] for name in GIVEN)) is None:
        return None
    inputs = [t[name] for name in GIVEN]
    try:
        return DecodePlan(call).forward(*inputs, None, None, True, k_factors, v_factors)
    except NotImplementedError:  # more queries than the kernel takes, few keys, another width
        return None
