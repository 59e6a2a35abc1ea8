"""KVCache: the keys and values of a batch of growing sequences, and attention to them.

k_pages [pages, Hk, page_size, D] and v_pages [pages, Hk, page_size, Dv] have a block table, the
layout of vLLM (arXiv 2309.06180); contiguous is one page of `max_length` a sequence.  Which page
belongs to whom is the matter of `attn_ext.core.pages`, how one is filled of `attn_ext.ops.cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_ext.core import validate
from attn_ext.core.pages import CacheFullError, Pages
from attn_ext.functional import common, explain, quantised, tree
from attn_ext.functional.decode import attention_decode, refuse_grad
from attn_ext.ops import cache as operator
from attn_ext.ops import fast, route

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from typing_extensions import Unpack

    from attn_ext.functional.dense import DotOptions
    from attn_ext.functional.explain import Explanation

    class AttendOptions(DotOptions, total=False):
        """The keywords of `KVCache.attend` that `attention_decode` has, too."""

        causal: bool
        num_splits: int


class KVCache:
    """Keys and values of `batch` sequences of one layer, each of its own length.

        cache = attn_ext.KVCache(batch=4, heads=8, head_dim=64, max_length=4096)
        cache.append(k, v)           # k, v [B, Hk, S, D], behind what each sequence has
        out = cache.attend(q)        # q [B, Hq, S, D]: the last S positions of each sequence

    heads: key heads (Hk).  head_dim_v: head_dim if None.
    max_length: the most positions that one sequence may hold, rounded up to whole pages.
    page_size: positions a page; None: contiguous, one page of max_length for each sequence.
    pages: how many there are, shared by all sequences; None: enough for each sequence to be full.
    window: None, or how many positions before its own a query sees (`attention`'s window[0]);
    pages that no later query sees are freed, and max_length counts what is held.
    dtype: of keys, values and queries, or torch.int8: about a quarter of float32's memory, at an
    error of at most 0.4 % of the largest number of a row; k, v and q are float16, bfloat16 or
    float32 then.
    Memory is taken at once, and by most systems only where it is written.

    A sequence that is full, or a pool without a free page, raises CacheFullError and changes
    nothing.  One thread at a time may use a cache.  Not differentiable.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        max_length: int,
        head_dim_v: int | None = None,
        page_size: int | None = 64,
        pages: int | None = None,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        sizes = dict(batch=batch, heads=heads, head_dim=head_dim, max_length=max_length)
        sizes["head_dim_v"] = head_dim if head_dim_v is None else head_dim_v
        sizes["page_size"] = max_length if page_size is None else page_size
        for name, value in sizes.items():
            sizes[name] = validate.integer(name, value, 1)
        if not isinstance(dtype, torch.dtype) or dtype not in (*validate.FLOATING, torch.int8):
            raise TypeError(
                f"dtype must be float16, bfloat16, float32, float64 or int8, got {dtype!r}"
            )
        device = tree.device(device)
        if window is not None:
            window = validate.integer("window", window)
            if page_size is None:
                raise ValueError(
                    "page_size must be given with window, which frees page by page, got None"
                )
        width = -(-sizes["max_length"] // sizes["page_size"])
        pages = sizes["batch"] * width if pages is None else validate.integer("pages", pages, 1)
        if page_size is None and pages < sizes["batch"]:
            raise ValueError(f"pages must be at least batch, {batch}, if contiguous, got {pages}")
        self.window, self._contiguous = window, page_size is None
        shape = (pages, sizes["heads"], sizes["page_size"])
        tree.countable(sizes["batch"], width, *shape, max(sizes["head_dim"], sizes["head_dim_v"]))
        self.k_pages = torch.empty((*shape, sizes["head_dim"]), dtype=dtype, device=device)
        self.v_pages = torch.empty((*shape, sizes["head_dim_v"]), dtype=dtype, device=device)
        self.k_factors = self.v_factors = None  # float32 [pages, Hk, page_size, 1], of int8
        if dtype == torch.int8:
            self.k_factors, self.v_factors = (
                torch.empty((*shape, 1), dtype=torch.float32, device=device) for _ in range(2)
            )
        self._table = torch.zeros((sizes["batch"], width), dtype=torch.int32, device=device)
        self._lengths = torch.zeros((2, sizes["batch"]), dtype=torch.int32, device=device)
        # behind the tensors: what no memory holds ends there, before lists of that length are made
        self._book = Pages(sizes["batch"], pages, sizes["page_size"], width, window)
        self._handle = operator.handle(self._book)
        self._accepted = None  # how the rows look that were appended last to all sequences
        self._views = None  # of table and lengths, as attend hands them on

    @property
    def lengths(self) -> Tensor:
        """int32 [B]: how many positions each sequence has, those out of the window included."""
        return self._lengths[0].clone()

    @property
    def held(self) -> Tensor:
        """int32 [B]: how many positions of each sequence are there; without window, `lengths`."""
        return self._lengths[1].clone()

    @property
    def block_table(self) -> Tensor:
        """int32 [B, max_pages]: the pages of the positions that are held, in their order."""
        return self._table.clone()

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self._lengths.shape[1]

    @property
    def page_size(self) -> int:
        """Positions a page."""
        return self.k_pages.shape[2]

    @property
    def max_length(self) -> int:
        """The most positions that one sequence may hold."""
        return self._table.shape[1] * self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, of int8 with their factors."""
        return sum(x.nbytes for x in (self.k_pages, self.v_pages, *self._factors()))

    def _factors(self) -> tuple:
        return () if self.k_factors is None else (self.k_factors, self.v_factors)

    def _read(self) -> tuple:
        """Tensors of k and v in the dtype in which a call is computed: the factors of int8."""
        return self._factors() or (self.k_pages, self.v_pages)

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Copies of what is held, k [B, Hk, S, D] and v [B, Hk, S, Dv], S positions being those of
        the longest sequence; what shorter ones lack is 0.
        """
        longest = max(map(self._book.held, range(self.batch)))
        at = torch.arange(longest, device=self._table.device).expand(self.batch, -1)
        there = (at < self._lengths[1][:, None])[:, None, :, None]
        pages = (self.k_pages, self.v_pages, *self._factors())
        k, v, *factors = (tree.positions(x, self._table, at) for x in pages)
        if factors:
            k, v = map(quantised.dequantise, (k, v), factors)
        return torch.where(there, k, 0), torch.where(there, v, 0)

    @property
    def free_pages(self) -> int:
        """How many pages belong to no sequence."""
        return len(self._book.free)

    def append(
        self, k: Tensor, v: Tensor, *, counts: Sequence[int] | Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> KVCache:  # fmt: skip
        """Put new keys and values behind those of each sequence; returns the cache.

        k [B, Hk, S, D], v [B, Hk, S, Dv], in the cache's dtype (int8: any of float16, bfloat16 and
        float32; under autocast in any of these).  rows: only these sequences, in
        this order; B is then their number.  counts [B]: only the last counts[i] of the S positions
        (shorter prompts are padded on the left), all if None; on the host.
        CacheFullError where there is no room: nothing is written then.
        """
        look = None
        if counts is None and rows is None and not torch.compiler.is_compiling():
            tensors = (k, v, self.k_pages, self.v_pages, self._table, self._lengths)
            look = operator.look_of(*tensors)
            if (
                look is not None and look == self._accepted
                and operator.append_again(*tensors, self._book)
            ):  # fmt: skip
                return self
        self._append(k, v, counts, rows)
        if look is not None and k.dtype == v.dtype == self.k_pages.dtype:
            self._accepted = look
        return self

    def _append(self, k, v, counts, rows) -> None:
        """`append` with all of its checks."""
        rows = None if rows is None else self._checked_rows("rows", rows)
        batch = self.batch if rows is None else len(rows)
        k, v = common.stored("k", k, self.k_pages), common.stored("v", v, self.v_pages)
        tree.new_rows("k", k, self.k_pages, batch)
        tree.new_rows("v", v, self.v_pages, batch)
        if k.shape[2] != v.shape[2]:
            raise ValueError(f"v must have k's {k.shape[2]} positions, got {v.shape[2]}")
        refuse_grad("KVCache.append", k=k, v=v)
        if self.k_factors is not None:
            self._append_int8(k, v, counts, rows)
            return
        tree.refuse_transformed(k=k, v=v)
        tensors = (self.k_pages, self.v_pages, self._table, self._lengths)
        if torch.compiler.is_compiling() or not route.is_plain(k, v, self.k_pages):
            if counts is not None and not isinstance(counts, torch.Tensor):
                counts = torch.tensor(
                    tree.integers("counts", counts), dtype=torch.int64, device="cpu"
                )
            torch.ops.attn_ext.cache_append(*tensors, self._handle, k, v, counts, rows)
            return
        counts = None if counts is None else tree.integers("counts", counts)
        self._write((k, v), counts, rows)

    def _append_int8(self, k, v, counts, rows) -> None:
        quantised.refuse_recorded("append")
        tree.refuse_transformed(k=k, v=v)
        (k, k_factors), (v, v_factors) = quantised.quantise(k), quantised.quantise(v)
        counts = None if counts is None else tree.integers("counts", counts)
        self._write((k, v, k_factors, v_factors), counts, rows)

    def _write(self, new, counts, rows) -> None:
        """Append rows that are as pages hold them."""
        pages = (self.k_pages, self.v_pages, *self._factors())
        stores = tuple(zip(pages, new, strict=True))
        operator.append(stores, self._table, self._lengths, self._book, counts, rows)

    def attend(
        self,
        q: Tensor,
        *,
        rows: Sequence[int] | None = None,
        tree_mask: Tensor | None = None,
        return_lse: bool = False,
        **options: Unpack[AttendOptions],
    ):
        """Attention of the last Sq positions of each sequence to all that it holds.

        q [B, Hq, Sq, D] -> out [B, Hq, Sq, Dv]; with return_lse also lse [B, Hq, Sq].
        rows: only these sequences, in this order; B is then their number.
        tree_mask: bool [Sq, Sq] (or what broadcasts to [B, Hq, Sq, Sq]), True = attend: which of
        the last Sq positions each of the last Sq queries sees, in place of causal; all positions
        before are seen.  Made for the trees of speculative decoding; window and ALiBi count
        positions as they stand in the cache.
        Other keywords: as `attention_decode`.  The last dimension of mask and bias covers the
        positions held, any number up to max_length of it; keys beyond a mask's end are not seen.
        A cache with a window gives it to each call, and takes neither mask nor bias; there only the
        positions that were appended last, by one call, still have their whole windows.
        """
        plain = not options and rows is None and tree_mask is None and self.k_factors is None
        if plain and not torch.compiler.is_compiling():
            found = self._attend_again(q, return_lse)
            if found is not None:
                return found
        validate.boolean("return_lse", return_lse)
        call, options, dtype = self._call(q, rows, options)
        with common.autocast_off(q):  # what it asks for is done
            if self.k_factors is not None:
                found = self._attend_int8(*call, dtype, tree_mask, return_lse, options)
            elif tree_mask is not None:
                found = tree.attend(*call, tree_mask, return_lse, options)
            else:
                told = dict(block_table=call[4], return_lse=return_lse, **options)
                found = attention_decode(*call[:4], **told)
        return common.in_dtype(found, dtype)

    def explain(
        self, q: Tensor, *, rows: Sequence[int] | None = None, **options: Unpack[AttendOptions]
    ) -> Explanation:
        """Which backend `attend` takes for such a call, and why the others are not taken; of int8
        also how keys and values are read."""
        (q, k, v, held, table), options, dtype = self._call(q, rows, options)
        if self.k_factors is None:
            return explain.explain(q, k, v, cache_seqlens=held, block_table=table, **options)
        quantised.check_dtype("q", q)
        told = dict(block_table=table, dtype=dtype, backend="auto") | options
        return quantised.explained(q.float(), k, v, held, *self._factors(), **told)

    def _call(self, q, rows, options) -> tuple:
        """((q, pages of k, of v, lengths, block table), keywords, dtype of the result) of a call,
        checked."""
        validate.tensor("q", q)
        for name in ("mask", "bias"):  # before their shapes are read
            if options.get(name) is not None:
                validate.tensor(name, options[name])
        rows = None if rows is None else self._checked_rows("rows", rows)
        tree.queries(q, self.k_pages, self.batch if rows is None else len(rows))
        options = self._with_window(options)
        dtype = common.autocast_of_cache(q, *self._read()) or q.dtype
        q, bias = common.asked_of_cache(q, options.get("bias"), *self._read())
        if bias is not None:
            options = options | {"bias": bias}
        table, held = self._table, self._lengths[1]
        if not torch.compiler.is_compiling():
            table = table[:, : self._table_width(options)]
        if rows is not None:
            index = torch.tensor(rows, dtype=torch.int64, device=table.device)
            table, held = table[index], held[index]
        options = self._of_width(options, table.shape[1] * self.page_size)
        return (q, self.k_pages, self.v_pages, held, table), options, dtype

    def _attend_again(self, q, return_lse):
        """`attend` of all sequences without options, of what looks like a call before; None where
        there was none, and for what such a call refuses."""
        if not isinstance(return_lse, bool):
            return None
        width, views = self._table_width(), self._views
        if views is None or views[0] is not self._table or views[1] != width:
            views = (self._table, width, self._table[:, :width], self._lengths[1])
            self._views = views
        window = (None, None) if self.window is None else (self.window, None)
        sides = (None, None, None, None, views[3], views[2], None, None)
        tensors = (q, self.k_pages, self.v_pages, *sides)
        _, found = fast.decode_attempt(tensors, True, window, 0.0, None, 0, "auto", return_lse)
        return found if found is None or return_lse else found[0]

    def _attend_int8(self, q, k, v, held, table, dtype, tree_mask, return_lse, options):
        quantised.refuse_recorded("attend")
        quantised.check_dtype("q", q)
        call, factors = (q.float(), k, v, held), self._factors()
        if tree_mask is not None:
            return tree.attend(*call, table, tree_mask, return_lse, options, factors, dtype)
        told = dict(block_table=table, return_lse=return_lse, dtype=dtype, **options)
        return quantised.decode(*call, *factors, **told)

    def reorder(self, indices: Sequence[int] | Tensor) -> KVCache:
        """Sequence b becomes what sequence indices[b] was, for all b; as beam search needs it.
        Pages are shared, and copied when they are written.  Another number of indices makes another
        batch size.
        """
        sources = self._checked_rows("indices", indices, distinct=False)
        if not sources:
            raise ValueError("indices must have at least one entry, got none")
        if len(sources) != self.batch:
            if self._contiguous:
                self.resize(pages=max(len(self._book.owners), len(sources)))
            self._table = self._table.new_zeros((len(sources), self._table.shape[1]))
            self._lengths = self._lengths.new_zeros((2, len(sources)))
        self._book.replace(sources)
        operator.publish(self._book, self._table, self._lengths)
        return self

    def fork(self, source: int, targets: Sequence[int]) -> KVCache:
        """The sequences `targets` become what `source` is, and what they had is freed.  Pages are
        shared, and copied when they are written.
        """
        (source,) = self._checked_rows("source", [source])
        targets = self._checked_rows("targets", targets)
        self._book.assign(targets, [source] * len(targets))
        operator.publish(self._book, self._table, self._lengths)
        return self

    def truncate(
        self, lengths: Sequence[int] | Tensor, *, rows: Sequence[int] | None = None
    ) -> KVCache:
        """Sequence b keeps its first lengths[b] positions (rows: sequence rows[i], lengths[i]), as
        after rejected drafts; 0 frees it.  Pages that nobody needs any more are free.
        """
        rows = list(range(self.batch)) if rows is None else self._checked_rows("rows", rows)
        lengths = tree.integers("lengths", lengths)
        if len(lengths) != len(rows):
            raise ValueError(f"lengths must have {len(rows)} entries, got {len(lengths)}")
        self._book.truncate(rows, lengths)
        operator.publish(self._book, self._table, self._lengths)
        return self

    def keep(
        self, last: int, kept: Sequence[Sequence[int]], *, rows: Sequence[int] | None = None
    ) -> KVCache:
        """Of the last `last` positions of sequence b only those numbered kept[b] stay, in that
        order, 0 being the first of them; as after the verification of a tree of drafts.
        """
        rows = list(range(self.batch)) if rows is None else self._checked_rows("rows", rows)
        last = validate.integer("last", last)
        kept = tree.lists("kept", kept)
        if len(kept) != len(rows):
            raise ValueError(f"kept must have {len(rows)} entries, got {len(kept)}")
        for b, numbers in zip(rows, kept, strict=True):
            if last > self._book.held(b):
                raise ValueError(
                    f"last must be at most the {self._book.held(b)} positions that sequence {b} "
                    f"holds, got {last}"
                )
            if not all(0 <= number < last for number in numbers):
                raise ValueError(f"kept must hold numbers between 0 and {last - 1}, got {numbers}")
        most = max(map(len, kept), default=0)
        if not most:
            return self.truncate([self._book.lengths[b] - last for b in rows], rows=rows)
        index = [[0] * (most - len(numbers)) + numbers for numbers in kept]
        index = torch.tensor(index, dtype=torch.int64, device=self._table.device)
        rows_index = torch.tensor(rows, dtype=torch.int64, device=self._table.device)
        held, table = self._lengths[1][rows_index], self._table[rows_index]
        at = held[:, None] - last + index
        pages = (self.k_pages, self.v_pages, *self._factors())
        new = [tree.positions(x, table, at) for x in pages]
        before = self._book.copy()
        self._book.truncate(rows, [self._book.lengths[b] - last for b in rows])
        try:
            self._write(new, [len(numbers) for numbers in kept], rows)
            return self
        except CacheFullError:
            self._book.restore(before)
            raise

    def resize(self, *, pages: int | None = None, max_length: int | None = None) -> KVCache:
        """Room for more pages, or for longer sequences; what is there stays.  Takes the memory of
        the old and the new pages for a moment.
        """
        count, width = len(self._book.owners), self._table.shape[1]
        if max_length is not None:
            max_length = validate.integer("max_length", max_length, self.max_length)
            width = 1 if self._contiguous else -(-max_length // self.page_size)
        page_size = max_length if self._contiguous and max_length else self.page_size
        count = count if pages is None else validate.integer("pages", pages, count)
        head_dim = max(x.shape[3] for x in (self.k_pages, self.v_pages))
        tree.countable(self.batch, width, count, self.k_pages.shape[1], page_size, head_dim)
        if (count, page_size) != (len(self._book.owners), self.page_size):
            self.k_pages, self.v_pages = (
                tree.larger(x, count, page_size) for x in (self.k_pages, self.v_pages)
            )
            if self.k_factors is not None:
                self.k_factors, self.v_factors = (
                    tree.larger(x, count, page_size) for x in self._factors()
                )
        if width > self._table.shape[1]:
            more = (self.batch, width - self._table.shape[1])
            self._table = torch.cat([self._table, self._table.new_zeros(more)], dim=1)
        self._book.grow(count, width, page_size)
        return self

    def _checked_rows(self, name: str, rows, distinct: bool = True) -> list[int]:
        return tree.sequences(name, rows, self.batch, distinct)

    def _with_window(self, options: dict) -> dict:
        """The keywords of a call with the window of this cache."""
        if self.window is None:
            return options
        for name in ("mask", "bias"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} must be None in a cache with a window, whose first positions are "
                    "gone, got one"
                )
        left, right = validate.window_pair(options.get("window"))
        left = self.window if left is None else validate.integer("window left", left)
        if left > self.window:
            raise ValueError(f"window left must be at most the cache's {self.window}, got {left}")
        return options | {"window": (left, right)}

    def _table_width(self, options: dict | None = None) -> int:
        """How many pages a sequence the kernels are told of: a power of two, so that calls look
        alike for long and are remembered, and no fewer than mask and bias speak of.
        """
        most = max(1, *map(len, self._book.lists))
        for name in ("mask", "bias") if options else ():
            if isinstance(options.get(name), torch.Tensor) and options[name].dim():
                most = max(most, -(-options[name].shape[-1] // self.page_size))
        return 1 << (most - 1).bit_length()

    def _of_width(self, options: dict, capacity: int) -> dict:
        """The keywords with mask and bias of `capacity` columns."""
        for name in ("mask", "bias"):
            x = options.get(name)
            if not isinstance(x, torch.Tensor) or x.dim() == 0 or x.shape[-1] in (1, capacity):
                continue
            if not torch.compiler.is_compiling():
                longest = max(map(self._book.held, range(self.batch)))
                if x.shape[-1] < longest:
                    raise ValueError(
                        f"{name} must cover the {longest} positions that are held, got "
                        f"{x.shape[-1]}"
                    )
            if x.shape[-1] < capacity:
                padding = (0, capacity - x.shape[-1])
                options = options | {name: torch.nn.functional.pad(x, padding)}
        return options

    def __getstate__(self) -> dict:
        """Without views, which would not be those of a copy's tensors."""
        return self.__dict__ | {"_views": None}

    def __setstate__(self, state: dict) -> None:
        """Of a copy: compiled code finds its own page lists, not those of the original."""
        self.__dict__.update(state)
        self._handle = operator.handle(self._book)

    def __repr__(self) -> str:
        _, heads, page_size, head_dim = self.k_pages.shape
        return (
            f"KVCache(batch={self.batch}, heads={heads}, head_dim={head_dim}, "
            f"lengths={self._book.lengths}, {len(self._book.owners)} pages of {page_size}, "
            f"{self.free_pages} free, {self.k_pages.dtype}, {self.k_pages.device})"
        )
