"""From a `Call` to kernel launches: checks what a pointer means, picks flags and tiles, and
allocates the outputs of forward (backward: backward.py).  The interpreter takes the same
way, on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton

from attn_ext.core.layout import empty_like_layout, rows, score_strides, strides
from attn_ext.core.schema import BOTTOM_RIGHT, FIELDS, TENSORS, Call, lse_shape
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import primitives
from attn_ext.triton_kernels.kernels.decode import combine_kernel, decode_kernel
from attn_ext.triton_kernels.kernels.fwd import REPAIR, SPECIALIZED, forward_kernel
from attn_ext.triton_kernels.launch import replay
from attn_ext.triton_kernels.launch.descriptors import describable, describe

INTERPRETED = primitives.INTERPRETED.value
LOG2E, LEAST = primitives.LOG2E.value, primitives.LEAST.value
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLAG = {name: getattr(primitives, name).value for name in (
    "MASK", "BIAS", "ALIBI", "SOFTCAP", "SINK", "DROPOUT", "STATS", "LEFT", "RIGHT",
    "BOTTOM_RIGHT", "VARLEN", "SEQLENS", "PAGED", "WIDE", "STREAM", "GROUPED", "SIGMOID",
    "SIGMOID_LENGTH", "FRAME", "QUICK_TANH", "BACKWARD", "MASK_ONE_QUERY", "BIAS_ONE_QUERY",
    "MASK_PAIRS", "APPROX_TANH",
)}  # fmt: skip

FARTHEST = 1 << 30  # a window of a shard reaches less far, or past every key of the whole
_RICH = {name: _FLAG[name.upper()] for name in configs.RICH_FEATURES}


# As triton.cdiv and triton.next_power_of_2, which take microseconds
def ceil_div(n: int, size: int) -> int:
    """How many blocks of `size` hold n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n >= 1."""
    return 1 << (n - 1).bit_length()


def width(dim: int) -> int:
    """The width of a tile that holds rows of `dim` elements: a power of two, at least 32."""
    return max(configs.WIDTHS[0], power_of_2(dim))


def on_device(x: torch.Tensor):
    """Makes x's device current, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class Plan:
    """What every kernel of one call shares: canonical tensors, sizes, strides, scalars, flags.
    partial: a part of a larger call, whose results are float32."""

    def __init__(self, call: Call, partial: bool = False):
        self.call, self.partial = call, partial
        self.varlen = varlen = call.cu_seqlens_q is not None
        self.sigmoid = call.normalizer == "sigmoid"
        self.q, self.k, self.v = rows(call.q), rows(call.k), rows(call.v)
        self.heads_q, self.heads_k = call.q.shape[1], call.k.shape[1]
        self.batch = call.cu_seqlens_q.shape[0] - 1 if varlen else call.q.shape[0]
        self.seqlen_q, self.seqlen_k = call.max_seqlen_q, call.max_seqlen_k
        self.dim, self.dim_v = call.q.shape[-1], call.v.shape[-1]
        self.block_d, self.block_dv = width(self.dim), width(self.dim_v)
        self.sizes = (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)
        self.mask = None if call.mask is None else call.mask.view(torch.uint8)
        self.bias = None if call.bias is None else call.bias.detach().resolve_neg()
        if self.bias is not None and self.bias.dtype not in _FLOATS:
            self.bias = self.bias.float()
        self.alibi = self.alibi_slopes = self._side(call.alibi_slopes, torch.float32)
        self.sink = self._side(call.sink, torch.float32)
        self.w = self._side(call.w, torch.float32)
        self.rng_state = self._side(call.rng_state, torch.int64)
        self.cu_seqlens_q = self._side(call.cu_seqlens_q, torch.int32)
        self.cu_seqlens_k = self._side(call.cu_seqlens_k, torch.int32)
        self.seqlens_k = self._side(call.seqlens_k, torch.int32)
        self.block_table = self._side(call.block_table, torch.int32)
        self.frame = self._side(call.frame, torch.int32)
        self.owned: list[tuple] = []  # (tensor, fill or None) that this call allocates
        self.launched: list[tuple] = []  # (compiled kernel, programs, args)
        self._check_devices()
        self._scalars()
        self.terms = self._terms()
        self.flags = self._flags()

    @staticmethod
    def _side(x, dtype):
        return None if x is None else x.detach().to(dtype).resolve_neg().contiguous()

    def _check_devices(self) -> None:
        for name, x in vars(self).items():
            if isinstance(x, torch.Tensor) and x.device != self.call.q.device:
                raise ValueError(f"{name} must be on {self.call.q.device}, got {x.device}")

    def _scalars(self) -> None:
        call = self.call
        # A window that reaches past every key is none; what is left is small enough for int32.
        reach = self.seqlen_q + self.seqlen_k if self.frame is None else FARTHEST
        self.left = call.window_left if 0 <= call.window_left < reach else -1
        self.right = call.window_right if 0 <= call.window_right < reach else -1
        self.scale = call.scale * LOG2E
        capped = call.softcap > 0
        self.cap_in = call.scale / call.softcap if capped else 0.0
        self.cap_out = call.softcap * LOG2E if capped else 0.0
        threshold = int(call.dropout_p * 4294967296.0)
        self.dropout = threshold > 0
        self.threshold = threshold - 1 - (1 << 32 if threshold - 1 >= 1 << 31 else 0)
        self.inverse_keep = 0.0 if call.dropout_p >= 1 else 1.0 / (1.0 - call.dropout_p)

    def _flags(self) -> int:
        call = self.call
        longest = max(
            *(strides(x, self.varlen)[2] for x in (self.q, self.k, self.v)),
            *(s for x in (self.mask, self.bias) for s in score_strides(x, self.sizes)[2:]),
        )
        present = {
            "MASK": self.mask is not None,
            "BIAS": self.bias is not None,
            "ALIBI": self.alibi is not None,
            "SOFTCAP": call.softcap > 0,
            "SINK": self.sink is not None,
            "DROPOUT": self.dropout,
            "STATS": call.need_stats,
            "LEFT": self.left >= 0,
            "RIGHT": self.right >= 0,
            "BOTTOM_RIGHT": call.align == BOTTOM_RIGHT,
            "VARLEN": self.varlen,
            "SEQLENS": self.seqlens_k is not None,
            "PAGED": self.block_table is not None,
            "WIDE": self.wide([longest]),
            "STREAM": self.q.element_size() == 4 and max(self.block_d, self.block_dv) > 64,
            "GROUPED": self.heads_q != self.heads_k,
            "SIGMOID": self.sigmoid,
            "SIGMOID_LENGTH": self.sigmoid and call.sigmoid_bias is None,
            "FRAME": self.frame is not None,
            # tanh to 2^-23 of 1: a logit to 2^-15, less than the rounding of q . k's factors
            "QUICK_TANH": 0 < call.softcap <= 256 and self.q.element_size() == 2,
            # tanh to 2^-11: a logit to 1/4 of what it has lost where q . k is bfloat16
            "APPROX_TANH": call.softcap > 0 and self.q.dtype == torch.bfloat16,
            "BACKWARD": self.alibi is not None and self.right == 0 and call.align == BOTTOM_RIGHT,
            "MASK_ONE_QUERY": self._has_one_query(self.mask),
            "BIAS_ONE_QUERY": self._has_one_query(self.bias),
            "MASK_PAIRS": self._mask_has_pairs(),
        }
        return sum(_FLAG[name] for name, on in present.items() if on)

    @staticmethod
    def wide(apart) -> int:
        """WIDE where rows or keys so many elements apart need offsets of 64 bits within a tile."""
        return _FLAG["WIDE"] if max(apart) * 256 >= 1 << 31 else 0

    def _has_one_query(self, x) -> bool:
        return x is not None and score_strides(x, self.sizes)[2] == 0

    def _mask_has_pairs(self) -> bool:
        """Whether words of two keys of the mask are aligned; dropout orders keys otherwise."""
        return self.mask is not None and not self.dropout and self._has_words(self.mask, 2)

    def _has_words(self, x, size: int) -> bool:
        """Whether the keys of a mask or bias are aligned words of `size` bytes, several in each."""
        *rest, along = score_strides(x, self.sizes)
        one = x.element_size()
        apart = functools.reduce(int.__or__, (x.data_ptr() // one, self.seqlen_k, *rest))
        return along == 1 and one < size and apart % (size // one) == 0

    def forward_flags(self) -> int:
        """The flags, and in which units softmax takes the logits: NATURAL with a bias; UNSCALED
        where they are one term times a positive number, or that of q . k is not tiny beside
        ALiBi's, which is divided by it.  BOUNDED and RELATIVE where they serve."""
        if self.sigmoid:
            return self.flags
        if self.bias is not None:
            return self.flags + primitives.NATURAL.value
        capped = self.call.softcap > 0
        if capped:
            quick = _FLAG["QUICK_TANH"] | _FLAG["APPROX_TANH"]
            unscaled = self.flags & quick and self.alibi is None
        else:
            unscaled = self.scale > (0 if self.alibi is None else 2.0**-20)
        found = self.flags + (primitives.UNSCALED.value if unscaled else 0)
        if self.flags & _FLAG["BACKWARD"] and self.q.element_size() == 2:
            found += primitives.RELATIVE.value
        bounded = self.cap_out <= primitives.LARGEST_CAP.value and not self.call.need_stats
        if unscaled and self.flags & _FLAG["APPROX_TANH"] and bounded:
            found += primitives.BOUNDED.value
        return found

    def backward_flags(self) -> int:
        """The flags of dK and dV and of dQ: P is 2 to a multiply-add of the logits in the forward's
        units.  KEY_WORDS where mask and bias serve."""
        units = primitives.UNSCALED.value | primitives.NATURAL.value | primitives.RELATIVE.value
        found = self.flags | (self.forward_flags() & units)
        return found | self._key_words(self._each_query())

    def _each_query(self) -> list[torch.Tensor]:
        """The mask and bias, those that have a row for each query."""
        given = (self.mask, self.bias)
        return [x for x in given if x is not None and not self._has_one_query(x)]

    def _key_words(self, terms: list[torch.Tensor]) -> int:
        """KEY_WORDS where these masks and biases lie in words of four bytes, on NVIDIA GPUs."""
        words = bool(terms) and all(self._has_words(x, 4) for x in terms)
        nvidia = not architecture(self.q).startswith("gfx")
        return primitives.KEY_WORDS.value if words and nvidia else 0

    def query_flags(self, tile: configs.Tile) -> int:
        """Those of the forward.  KEY_WORDS with dropout, which orders the keys as words want them:
        a float32 bias is loaded in that order, too; a descriptor has the keys' own."""
        found = self.forward_flags()
        if self.dropout and not tile.loads:
            found |= self._key_words([x for x in self._each_query() if x.element_size() < 4])
        return found

    def key_flags(self, tile: configs.Tile) -> int:
        """Those of dK and dV.  KEY_QUADS where the warps hold 16 rows each of both halves of S^T,
        with dropout or words of a bias: of a mask alone each thread has one word either way."""
        found, nvidia = self.backward_flags(), not architecture(self.q).startswith("gfx")
        words = found & primitives.KEY_WORDS.value and self.bias is not None
        words = words and not self._has_one_query(self.bias)
        if nvidia and (found & _FLAG["DROPOUT"] or words) and tile.block_n == 32 * tile.warps:
            found |= primitives.KEY_QUADS.value
        if tile.block_n == 16 * tile.warps and architecture(self.q).startswith(("sm_8", "sm_12")):
            # 16 rows a warp of mma.sync: what is once a query is half of what is once an element
            found &= ~primitives.RELATIVE.value
        return found

    @staticmethod
    def flags_by(tile: configs.Tile, flags: int) -> int:
        """flags of forward, dK and dV or dQ: a tile of several stages holds whole rows of K and V
        (dK and dV: of Q and dO) in shared memory, however wide they are."""
        return flags & ~_FLAG["STREAM"] if tile.stages > 1 else flags

    def own(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """x, which the call has allocated, filled where no kernel may write it."""
        self.owned.append((x, fill))
        return x if fill is None else x.fill_(fill)

    def run(self, kernel, programs: int, tile: configs.Tile, *args) -> None:
        """`run`, noted."""
        self.launched.append((run(kernel, programs, tile, *args), programs, args))

    def taken(self) -> tuple:
        """What the kernels get in place of the call's tensors, in their order."""
        return tuple(getattr(self, name) for name in FIELDS[:TENSORS])

    def side(self) -> tuple:
        """The terms of a logit, sink and dropout's state, as every kernel takes them."""
        return (self.terms, self.sink, self.rng_state)

    def _terms(self) -> primitives.Terms:
        call, alibi = self.call, self.alibi
        alibi_b = self.heads_q if alibi is not None and alibi.numel() > self.heads_q else 0
        return primitives.Terms(
            self.mask, *score_strides(self.mask, self.sizes),
            self.bias, *score_strides(self.bias, self.sizes),
            alibi, alibi_b, self.cap_in, self.cap_out, (call.sigmoid_bias or 0.0) * LOG2E,
            self.frame,
        )  # fmt: skip

    def scalars(self) -> tuple:
        """scale ... right, in the order of the kernels' arguments."""
        return (self.scale, self.threshold, self.inverse_keep, self.left, self.right)

    def totals(self) -> tuple:
        """Rows of q and of k in memory, which bound what cu_seqlens may say."""
        return (self.q.shape[0], self.k.shape[0]) if self.varlen else (0, 0)

    def lse_strides(self) -> tuple:
        """(batch, head) strides of an LSE [B, Hq, Sq], or [Hq, total_q]."""
        if self.varlen:
            return (0, self.q.shape[0])
        return (self.heads_q * self.seqlen_q, self.seqlen_q)

    def tile(self, direction: str) -> configs.Tile:
        """The tile of this call's kernels."""
        found = configs.tile(*self.row(direction))
        if found.loads and not all(map(describable, (self.q, self.k, self.v))):
            found = self.pointer_tile(direction)
        return found

    def pointer_tile(self, direction: str) -> configs.Tile:
        """The table's tile of kernels that load by pointers."""
        return configs.shipped(*self.row(direction), False)

    def row(self, direction: str) -> tuple:
        """What `configs.tile` asks for: the GPU, the direction, the width of the rows, bytes of an
        element, the features."""
        name, size, rich = architecture(self.q), self.q.element_size(), self.rich()
        widths = (self.block_d, self.block_dv)
        return (name, direction, configs.columns(name, direction, widths, size, rich), size, rich)

    def rich(self) -> str:
        """As `configs.tile` takes it."""
        return configs.several(name for name, flag in _RICH.items() if self.flags & flag)


def architecture(x: torch.Tensor) -> str:
    """ "sm_90", "gfx942", ... of x's device; "interpreter" for a tensor on the CPU."""
    if not x.is_cuda:
        return "interpreter"
    return architecture_of(x.device.index)


@functools.cache
def architecture_of(index: int) -> str:
    """ "sm_90", "gfx942", ... of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def options(tile: configs.Tile) -> dict:
    """How Triton compiles a kernel for a tile."""
    found = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": tile.fused}
    if INTERPRETED or tile.loads:  # descriptors take fewer registers; specialized warps share
        return found
    if triton.runtime.driver.active.get_current_target().backend == "cuda":
        # else ptxas spills a little where that lets one more block onto a multiprocessor
        found["maxnreg"] = min(255, 65536 // (32 * tile.warps))
    return found


def run(kernel, programs: int, tile: configs.Tile, *args):
    """Launch programs, all in grid x, whose limit is 2^31 - 1; returns the compiled kernel."""
    return kernel[(programs,)](*args, **options(tile))


def outputs(plan: Plan):
    """O, LSE and the statistics or None; what no program writes holds the values of empty rows."""
    q = plan.call.q
    gaps = plan.varlen  # rows of no sequence
    shape = lse_shape(plan.call)
    dtype = torch.float32 if plan.partial else q.dtype
    out = plan.own(empty_like_layout(q, plan.dim_v, dtype), 0.0 if gaps else None)

    def row_values(fill, always=False):
        x = torch.empty(shape, dtype=torch.float32, device=q.device)
        return plan.own(x, fill if gaps or always else None)

    lse = row_values(0.0, True) if plan.sigmoid else row_values(-math.inf)
    if not plan.call.need_stats:
        return out, lse, None, None
    return out, lse, row_values(-math.inf), row_values(0.0)


def multiprocessors(x: torch.Tensor) -> int:
    """How many programs of one kernel run at a time, at least."""
    if not x.is_cuda:
        return 16  # the interpreter: enough that its tests split
    return _multiprocessors(x.device.index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def split_count(programs: int, tiles: int, processors: int) -> int:
    """Into how many parts the keys of a decode call are cut: 1 when the programs fill the GPU by
    themselves, else as many as give two programs a processor, of two tiles or more each."""
    if programs >= processors or tiles < 4:
        return 1
    return max(1, min(2 * processors // programs, tiles // 2, 128))


def splits_keys(plan: Plan) -> bool:
    """Whether the decode kernels serve the call: a cache, or few queries against many keys."""
    if plan.seqlens_k is not None or plan.block_table is not None:
        return True
    if plan.sigmoid:  # the parts are joined by their LSE
        return False
    queries = plan.seqlen_q * (plan.heads_q // plan.heads_k)
    return queries <= 64 and plan.seqlen_k >= 512 and not plan.varlen


def decode(plan: Plan, out, lse, max_logit, entropy) -> None:
    """Split-KV forward into `out`, `lse` and the statistics; dense or decode calls."""
    tile = plan.tile("decode")
    group = plan.heads_q // plan.heads_k
    rows_of_group = group * plan.seqlen_q
    block_m = min(tile.block_m, max(16, power_of_2(rows_of_group)))
    m_blocks = ceil_div(rows_of_group, block_m)
    programs = m_blocks * plan.heads_k * plan.batch
    tiles = ceil_div(plan.seqlen_k, tile.block_n)
    asked = min(plan.call.num_splits, tiles, 128)
    splits = asked or split_count(programs, tiles, multiprocessors(plan.q))
    part = sums = None
    if splits > 1:
        count = splits * lse.numel()
        options = {"dtype": torch.float32, "device": plan.q.device}
        part = plan.own(torch.empty(count, plan.dim_v, **options))
        sums = plan.own(torch.empty(4, count, **options))
    table, page_size = plan.block_table, 1 if plan.block_table is None else plan.k.shape[2]
    split_flag = 0 if splits == 1 else primitives.SPLIT.value
    plan.run(
        decode_kernel, programs * splits, tile,
        plan.q, plan.k, plan.v, out, lse, max_logit, entropy, part, sums,
        *plan.side(), plan.seqlens_k, table,
        *strides(plan.q, False), *strides(plan.k, False), *strides(plan.v, False),
        *strides(out, False), *plan.lse_strides(),
        0 if table is None else table.stride(0), plan.k.shape[0],
        plan.heads_q, group, plan.seqlen_q, plan.seqlen_k, m_blocks, splits, *plan.scalars(),
        plan.dim, plan.dim_v, block_m, tile.block_n, plan.block_d, plan.block_dv, page_size,
        (plan.forward_flags() & ~primitives.RELATIVE.value) + split_flag,
    )  # fmt: skip
    if splits > 1:
        block = configs.Tile(16, 0, 4, 1)
        plan.run(
            combine_kernel, ceil_div(lse.numel(), block.block_m), block,
            part, sums, out, lse, max_logit, entropy, plan.sink,
            *strides(out, False), plan.heads_q, plan.seqlen_q, lse.numel(), splits,
            plan.inverse_keep, plan.dim_v, block.block_m, plan.block_dv, plan.flags,
        )  # fmt: skip


def forward(call: Call, partial: bool = False):
    """(out, lse, max_logit | None, entropy | None) of `call`; partial: out in float32."""
    known = key = None
    if not INTERPRETED and replay.usable(call.q):
        tensors = call[:TENSORS]
        key = (partial, *replay.key_of(call, tensors))
        known = replay.find(key)
    if known:
        owned = replay.replay(known, tensors)
        if owned:
            return (*owned[:4],) if call.need_stats else (*owned[:2], None, None)
    plan = Plan(call, partial)
    results = outputs(plan)
    if results[1].numel() == 0:
        return results
    with on_device(plan.q):
        if splits_keys(plan):
            decode(plan, *results)
        else:
            attend(plan, *results)
    if key and not known:
        replay.remember(key, tensors, plan.taken(), plan.owned, plan.launched)
    return results


def attend(plan: Plan, *results) -> None:
    """Forward of dense and varlen calls."""
    tile = plan.tile("fwd")
    attend_by(plan, results, tile, tile.loads, describe(tile, plan))
    if tile.loads == SPECIALIZED.value:
        attend_by(plan, results, plan.pointer_tile("fwd"), REPAIR.value, (None, None, None))


def attend_by(plan: Plan, results: tuple, tile: configs.Tile, loads: int, described) -> None:
    """One launch of the forward kernel."""
    out, lse, max_logit, entropy = results
    m_blocks = ceil_div(plan.seqlen_q, tile.block_m)
    varlen = plan.varlen
    plan.run(
        forward_kernel, m_blocks * plan.heads_q * plan.batch, tile,
        plan.q, plan.k, plan.v, *described, out, lse, max_logit, entropy,
        *plan.side(), plan.cu_seqlens_q, plan.cu_seqlens_k,
        *strides(plan.q, varlen), *strides(plan.k, varlen), *strides(plan.v, varlen),
        *strides(out, varlen), *plan.lse_strides(),
        plan.heads_q, plan.heads_q // plan.heads_k, *plan.totals(), plan.seqlen_q,
        plan.seqlen_k, m_blocks, *plan.scalars(),
        plan.dim, plan.dim_v, tile.block_m, tile.block_n, plan.block_d, plan.block_dv,
        loads,
        plan.flags_by(
            tile, plan.flags if loads >= SPECIALIZED.value else plan.query_flags(tile)
        ),
    )  # fmt: skip
