"""What a KVCache should be: a list of tensors a sequence, and attention written out over them."""

import copy
import math

import torch
from closeness import FLOAT32, assert_close

import attn_ext

# What each of four drafts sees of the others: two branches
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()


def features(positions: int) -> dict:
    """name -> keywords of KVCache.attend with four query heads, for up to `positions` held."""
    return {
        "softcap, sink": {"softcap": 2.0, "sink": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
        "window": {"window": (3, None)},
        "bias of the positions held": {"bias": torch.arange(float(positions)) % 3},
    }


def attend(q, k, v, *, seen=None, window=None, softcap=0.0, slopes=None, bias=None, sink=None):
    """out [Hq, Sq, Dv] and lse of the last Sq positions, in float64.  q [Hq, Sq, D], k [n, Hk, D],
    v [n, Hk, Dv]; seen: bool [Hq or 1, Sq, Sq] over the last Sq positions, in place of causal.
    """
    q, k, v = q.double(), k.double(), v.double()
    (heads, seqlen, _), count = q.shape, len(k)
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    at = torch.arange(count - seqlen, count)[:, None] - torch.arange(count)  # i - j
    s = torch.einsum("hid,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * at.abs()
    if bias is not None:
        s = s + bias.double()[..., :count]
    visible = (at >= 0).expand(heads, -1, -1).clone()
    if seen is not None:
        first = max(0, count - seqlen)
        visible[:, :, :first] = True
        visible[:, :, first:] = seen[..., seen.shape[-1] - (count - first) :]
    if window is not None:
        visible &= at <= window
    s = s.masked_fill(~visible, -torch.inf)
    if sink is not None:
        s = torch.cat([s, sink.double()[:, None, None].expand(-1, seqlen, 1)], dim=-1)
    empty = ~visible.any(-1)
    lse = torch.logsumexp(s, dim=-1).masked_fill(empty, -torch.inf)
    p = torch.exp(s - torch.where(lse == -torch.inf, 0.0, lse)[..., None])[..., :count]
    return torch.einsum("hij,jhd->hid", p, v), lse


class Model:
    """A KVCache beside its naive twin.  Whatever the cache does not hold is NaN before each look,
    so that a kernel which reads it, or a page that is shared by mistake, is seen.
    """

    def __init__(self, batch, page_size, *, heads=2, queries=4, dim=8, dim_v=5, device="cpu",
                 backend="auto", dtype=torch.float32, **options):  # fmt: skip
        self.cache = attn_ext.KVCache(
            batch, heads, dim, head_dim_v=dim_v, page_size=page_size, device=device, dtype=dtype,
            **options,
        )  # fmt: skip
        self.sizes = heads, queries, dim, dim_v
        self.backend = backend
        self.random = torch.Generator().manual_seed(0)
        dtype = torch.float32 if dtype == torch.int8 else dtype
        self.k = [torch.zeros(0, heads, dim, dtype=dtype) for _ in range(batch)]
        self.v = [torch.zeros(0, heads, dim_v, dtype=dtype) for _ in range(batch)]
        # Where a window rolls: the first position whose whole window is still there
        self.whole = [0] * batch

    def draw(self, *shape):
        """Normal random numbers in the cache's dtype, on the CPU."""
        dtype = self.cache.k_pages.dtype
        x = torch.randn(shape, generator=self.random)
        return x if dtype == torch.int8 else x.to(dtype)

    def kept(self, x):
        """What the cache holds of new rows: of int8, what they were rounded to."""
        if self.cache.k_factors is None:
            return x
        factors = x.abs().amax(-1, keepdim=True) / 127
        return (x / factors).round().clamp(-127, 127) * factors

    def poison(self) -> None:
        """NaN in each place that no sequence holds."""
        book, size = self.cache._book, self.cache.page_size
        used = [0] * len(book.owners)
        for b, pages in enumerate(book.lists):
            for index, page in enumerate(pages):
                used[page] = max(used[page], min(size, book.held(b) - index * size))
        int8 = self.cache.k_factors is not None
        pages = (self.cache.k_factors, self.cache.v_factors) if int8 else ()
        pages = pages or (self.cache.k_pages, self.cache.v_pages)
        for page, count in enumerate(used):
            for x in pages:
                x[page, :, count:] = torch.nan

    def append(self, seqlen, counts=None, rows=None) -> bool:
        """Whether it fitted; where it did not, the cache must be what it was."""
        heads, _, dim, dim_v = self.sizes
        every = range(len(self.k)) if rows is None else rows
        k, v = (self.draw(len(every), heads, seqlen, d) for d in (dim, dim_v))
        before = copy.deepcopy(vars(self.cache._book))
        device = self.cache.k_pages.device
        try:
            self.cache.append(k.to(device), v.to(device), counts=counts, rows=rows)
        except attn_ext.CacheFullError as error:
            assert "nothing was written" in str(error)
            assert vars(self.cache._book) == before
            return False
        counts = [seqlen] * len(every) if counts is None else counts
        k, v = self.kept(k), self.kept(v)
        for i, (b, count) in enumerate(zip(every, counts, strict=True)):
            if count and self.cache.window is not None:
                self.whole[b] = len(self.k[b])
            self.k[b] = torch.cat([self.k[b], k[i, :, seqlen - count :].transpose(0, 1)])
            self.v[b] = torch.cat([self.v[b], v[i, :, seqlen - count :].transpose(0, 1)])
        return True

    def reorder(self, indices) -> None:
        """Both become what `indices` says."""
        self.cache.reorder(indices)
        self.k, self.v, self.whole = ([x[b] for b in indices] for x in (self.k, self.v, self.whole))

    def fork(self, source, targets) -> None:
        """The same of both."""
        self.cache.fork(source, targets)
        for b in targets:
            self.k[b], self.v[b] = self.k[source], self.v[source]
            self.whole[b] = self.whole[source]

    def truncate(self, lengths) -> None:
        """The same of both."""
        self.cache.truncate(lengths)
        for b, length in enumerate(lengths):
            self.k[b], self.v[b] = self.k[b][:length], self.v[b][:length]
            window = self.cache.window or 0
            self.whole[b] = min(self.whole[b], self.cache._book.starts[b] + window)
            self.whole[b] = self.whole[b] if self.cache._book.starts[b] else 0

    def keep(self, last, kept) -> bool:
        """The same of both, where it fits."""
        before = copy.deepcopy(vars(self.cache._book))
        try:
            self.cache.keep(last, kept)
        except attn_ext.CacheFullError:
            assert vars(self.cache._book) == before
            return False
        for b, numbers in enumerate(kept):
            index = torch.tensor(numbers, dtype=torch.long)
            for x in (self.k, self.v):
                first = len(x[b]) - last
                x[b] = torch.cat([x[b][:first], x[b][first:][index]])
        return True

    def check(self, seqlen, rows=None, tree_mask=None, **options) -> None:
        """out and lse of a call, against attention written out."""
        self.poison()
        every = list(range(len(self.k)) if rows is None else rows)
        _, queries, dim, _ = self.sizes
        q = self.draw(len(every), queries, seqlen, dim)
        device = self.cache.k_pages.device
        told = {n: x.to(device) if hasattr(x, "to") else x for n, x in options.items()}
        tree = None if tree_mask is None else tree_mask.to(device)
        out, lse = self.cache.attend(
            q.to(device), rows=rows, tree_mask=tree, return_lse=True, backend=self.backend, **told
        )
        names = {"softcap": "softcap", "alibi_slopes": "slopes", "bias": "bias", "sink": "sink"}
        naive = {names[n]: x for n, x in options.items() if n in names}
        window = options.get("window", (self.cache.window, None))[0]
        for i, b in enumerate(every):
            seen = None
            if tree_mask is not None:
                seen = tree_mask[i] if tree_mask.dim() == 4 else tree_mask[None]
            old = max(0, self.whole[b] - (len(self.k[b]) - seqlen))  # queries before that position
            want = attend(q[i], self.k[b], self.v[b], seen=seen, window=window, **naive)
            assert_close(out[i].double().cpu()[:, old:], want[0][:, old:], FLOAT32)
            assert_close(lse[i].double().cpu()[:, old:], want[1][:, old:], FLOAT32)

    def check_book(self) -> None:
        """Lengths, and each page's owners, counted anew."""
        cache, book = self.cache, self.cache._book
        assert cache.lengths.tolist() == [len(k) for k in self.k] == book.lengths
        assert cache.held.tolist() == [book.held(b) for b in range(len(self.k))]
        owners = [0] * len(book.owners)
        for b, pages in enumerate(book.lists):
            assert len(pages) == -(-book.held(b) // cache.page_size) <= book.width
            assert cache.block_table[b, : len(pages)].tolist() == pages
            for page in pages:
                owners[page] += 1
        assert owners == book.owners
        assert sorted(book.free) == [page for page, n in enumerate(owners) if not n]
