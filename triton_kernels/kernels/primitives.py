"""What the Triton kernels share: flags, tile loads, matrix products, and which tiles a program has.

Logits, m and l are in base 2 inside the kernels: s2 = s * log2(e), P = 2^(s2 - m2).

`FLAGS` is one compile-time integer, the sum of the features of the call.  Tests of it are written
`FEATURE & FLAGS`: the interpreter hands FLAGS over as an int, which has no `& constexpr`.

It is a long file because flags decide the order of keys, the loads and the ranges of tiles alike.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda

from attn_ext.triton_kernels.kernels.functions import INTERPRETED

OLD_TRITON = tl.constexpr(triton.__version__.startswith("3.6."))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A bias below LEAST counts as LEAST, and a finite one above -LEAST as -LEAST (`hold`): times
# log2(e), finfo.min, of which additive masks are made, would be the -inf that excludes, and
# finfo.max the inf of which only NaN comes.  Base-2 logits beyond LEAST2 come of that alone.
LEAST = tl.constexpr(-2.3e38)
LEAST2 = tl.constexpr(-3.3e38)
FINFO_MIN = tl.constexpr(-3.4028234663852886e38)
FAR_LSE = tl.constexpr(256.0)  # beyond it LSE has lost digits of a weight exp(S - LSE): far.py
FAR = tl.constexpr(200.0)  # 2^-FAR is 0; beyond it a distance may overflow where it meets such a 0
SUM_ROWS = tl.constexpr(64)  # of the sums of dQ: the most queries of a tile of fused.py

MASK = tl.constexpr(1)  # bool mask
BIAS = tl.constexpr(2)
ALIBI = tl.constexpr(4)
SOFTCAP = tl.constexpr(8)
SINK = tl.constexpr(16)
DROPOUT = tl.constexpr(32)
STATS = tl.constexpr(64)  # largest logit and entropy
LEFT = tl.constexpr(128)  # the window has a left bound
RIGHT = tl.constexpr(256)  # the window has a right bound (causal: 0)
BOTTOM_RIGHT = tl.constexpr(512)  # the aligned diagonal ends in the last key
VARLEN = tl.constexpr(1024)
SEQLENS = tl.constexpr(2048)  # decode: used lengths of the cache rows
PAGED = tl.constexpr(4096)  # decode: K and V by a block table
SPLIT = tl.constexpr(262144)  # decode: several programs share the keys of a query
WIDE = tl.constexpr(8192)  # a row stride times a tile's rows does not fit into 31 bits
DBIAS_STORE = tl.constexpr(16384)  # dQ writes dbias, of which each element belongs to one program
DBIAS_ADD = tl.constexpr(32768)  # dQ adds to dbias, which is broadcast over batch or heads
DBIAS_ONE_QUERY = tl.constexpr(65536)  # dbias has one query row
DBIAS_ONE_KEY = tl.constexpr(131072)  # dbias has one key column
STREAM = tl.constexpr(1 << 19)  # rows too wide to be held: products over D read them in parts
SIGMOID = tl.constexpr(1 << 24)  # P = sigmoid(s + shift) in place of softmax; LSE is 0
SIGMOID_LENGTH = tl.constexpr(1 << 25)  # shift = -ln(seqlen_k) of each sequence
GROUPED = tl.constexpr(1 << 21)  # query heads share K and V
FRAME = tl.constexpr(1 << 26)  # the call is a shard of a larger one, whose positions count
# The units of the logits in the forward's softmax (softmax.py): a term times a positive number, and
# -inf; or base e, since a bias may be the least number, of which base 2 makes -inf
UNSCALED = tl.constexpr(1 << 20)
NATURAL = tl.constexpr(1 << 27)
QUICK_TANH = tl.constexpr(1 << 28)  # softcap: digits of small logits count less than their factors'
BACKWARD = tl.constexpr(1 << 29)  # ALiBi: no query sees a key behind its own position
MASK_ONE_QUERY = tl.constexpr(1 << 30)  # the mask is the same for all queries
BIAS_ONE_QUERY = tl.constexpr(1 << 31)
MASK_PAIRS = tl.constexpr(1 << 32)  # of the mask two keys at a time are an aligned word
APPROX_TANH = tl.constexpr(1 << 33)  # softcap: tanh to 2^-11, as the factors of a bfloat16 product
BOUNDED = tl.constexpr(1 << 34)  # softcap: base-2 logits between -LARGEST_CAP and it, no maximum
LARGEST_CAP = tl.constexpr(80.0)
RELATIVE = tl.constexpr(1 << 35)  # ALiBi with BACKWARD: whole tiles count from their first key
KEY_WORDS = tl.constexpr(1 << 36)  # mask and bias are loaded as words of 32 bits
KEY_QUADS = tl.constexpr(1 << 37)  # of S^T a thread holds four rows: `own_key_order`
STEEP = tl.constexpr(2.0)  # a slope beyond which that would lose digits of a logit


# Arguments of the backward kernels that none is compiled for
RUNTIME = (
    "heads_q", "group", "total_q", "total_k", "seqlen_q", "seqlen_k", "blocks", "threshold",
    "left", "right",
)  # fmt: skip


class Terms(NamedTuple):
    """What a logit is made of besides q . k: one argument of every kernel, so that another term
    changes this class, `tile_logits` and the launcher's `Plan`."""

    mask: object  # uint8, [B, Hq, Sq, Sk] by its strides
    mask_b: int
    mask_h: int
    mask_q: int
    mask_k: int
    bias: object
    bias_b: int
    bias_h: int
    bias_q: int
    bias_k: int
    alibi: object  # slopes float32, [B, Hq] or [Hq]
    alibi_b: int
    cap_in: float  # softmax_scale / softcap
    cap_out: float  # softcap in base 2
    shift: float  # of sigmoid weights, in base 2
    frame: object  # int32 [B, 6], as attn_ext.core.schema.Frame


@triton.jit
def hold(x):
    """x between LEAST and -LEAST; infinities and NaN stay."""
    return tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(x, LEAST), -LEAST), x)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; `a` is rounded to b's dtype, as tensor cores want it.  (Tiles are
    float32 in the interpreter, which multiplies bfloat16 matrices by their raw bits.)

    float32 on NVIDIA GPUs: each factor as the sum of two TF32 numbers, three products on tensor
    cores, with an error of 2^-22 a product.  As FMA instructions these products would need
    registers for whole rows of both factors, and spill."""
    if INTERPRETED:
        return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")
    if is_cuda():
        return tl.dot(a.to(b.dtype), b, acc, input_precision="tf32x3")
    return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")


@triton.constexpr_function
def several(flags: int) -> bool:
    """Whether a call has more than one of the options that take registers in a loop."""
    options = MASK.value | BIAS.value | ALIBI.value | SOFTCAP.value | DROPOUT.value
    return (int(flags) & options).bit_count() > 1


@triton.constexpr_function
def has_wgmma() -> bool:
    """Whether products are those of warpgroups, as on sm_90."""
    return not INTERPRETED.value and cuda_capability_geq(9) and not cuda_capability_geq(10)


@triton.jit
def register_factor(tile, FLAGS: tl.constexpr):
    """tile, which stays in registers as the left factor of products by wgmma; loaded ones are read
    from shared memory each time.  So it is made the result of a product itself, with the unit
    matrix: exact, but for NaN and infinities, which make NaN of all rows, so that these are
    computed again (`nan_count`).  Of more than 64 columns it would be spilled, and so beside the
    options of a call, whose loops wait for other units than shared memory."""
    FITS: tl.constexpr = tile.shape[0] >= 64 and tile.shape[1] <= 64
    RICH: tl.constexpr = (MASK | BIAS | ALIBI | SOFTCAP | DROPOUT) & FLAGS
    if has_wgmma() and FITS and not RICH and tile.dtype.primitive_bitwidth == 16:
        row = tl.arange(0, tile.shape[0])
        unit = (row[:, None] == row[None, :]).to(tile.dtype)
        tile = tl.dot(unit, tile).to(tile.dtype)
    return tile


@triton.jit
def sum_of_products(a, b):
    """sum_d a_id b_id, [BLOCK] of [BLOCK, D], in float32, alike in all threads that hold the sum.

    The FMA with 0 rounds every product before it is added.  Else the compiler makes one FMA of a
    product and the addition of what a shuffle brings: of x y + x' y' one thread rounds x' y' first
    and the other x y.  They then hold different sums of one row, and where both store theirs to one
    place of shared memory, PTX leaves open which stays: results may change from run to run."""
    return tl.sum(tl.fma(a.to(tl.float32), b.to(tl.float32), 0.0), 1)


@triton.constexpr_function
def careful_rows_at_once(block: int, most: int) -> int:
    """Rows of a tile that are computed again at a time: as many as leave the registers to the fast
    loops, 8 at least; a power of two, as all that is an extent for Triton, also where `most` is a
    share of the sum of two widths."""
    return min(block, max(8, 1 << most.bit_length() >> 1))


@triton.jit
def load_each(
    base, stride, row, pages, page_stride, DIM: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_DIM: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Row `row` COUNT times over, [COUNT, BLOCK_DIM], pages as in `load_keys`.  A tile of one row
    would be spread over all threads, and what is computed from it held by each of them."""
    start = row.to(tl.int64) * stride
    if PAGED & FLAGS:
        table, page_size, page_count = pages
        page = tl.load(table + row // page_size)
        page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
        start = page * page_stride + (row % page_size).to(tl.int64) * stride
    d = tl.arange(0, BLOCK_DIM)[None, :]
    offsets = tl.zeros([COUNT, 1], tl.int32) + d
    tile = tl.load(base + start + offsets, mask=(offsets < DIM), other=0.0)
    return tile.to(tl.float32)


@triton.jit
def nan_count(x):
    """How many NaN a tile holds: the sign to compute it again with `outer_present`.

    0 * NaN and 0 * inf are the only ways in which an excluded pair reaches a sum, and both leave
    NaN; so the fast loops need not look at their operands.
    """
    return tl.sum(tl.sum(tl.where(x != x, 1, 0), 1), 0)


@triton.jit
def unknown_zero(count):
    """0, of which the compiler knows nothing: what is computed from it by the rare careful way is
    not computed before the fast loops and held in registers through them."""
    return count & (1 << 30)


@triton.constexpr_function
def orders_keys(flags: int) -> bool:
    """Whether `key_order` is another than the keys' own."""
    if int(flags) & KEY_WORDS.value:
        return True
    return bool(int(flags) & DROPOUT.value) and (INTERPRETED.value or is_cuda())


@triton.jit
def key_order(BLOCK_N: tl.constexpr, FLAGS: tl.constexpr):
    """Which key of a tile each column of S is: the order of keys is free in a sum.

    With DROPOUT the keys that share a Philox evaluation, four in a row, are those of one thread,
    and so with KEY_WORDS those that share words of mask and bias: on NVIDIA GPUs, of 16 columns it
    holds 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, which are keys 4 q to 4 q + 3; on AMD four in a row."""
    n = tl.arange(0, BLOCK_N)
    if orders_keys(FLAGS):
        n = (n & ~15) | ((n & 6) << 1) | ((n & 8) >> 2) | (n & 1)
    return n


@triton.jit
def own_key_order(BLOCK_N: tl.constexpr, FLAGS: tl.constexpr):
    """Which key of a tile each row of S^T is, where the keys are those of the program.

    On NVIDIA GPUs, of 16 rows a thread holds g and g + 8: with DROPOUT and with KEY_WORDS keys 2 g
    and 2 g + 1, which share a Philox evaluation, and a word of the mask or bias.  With KEY_QUADS
    the warps hold 16 rows of each half of the tile, BLOCK_N == 32 * warps: a thread of warp w has
    16 w + g and 16 w + g + 8 of both, which are keys 4 (8 w + g) to 4 (8 w + g) + 3."""
    n = tl.arange(0, BLOCK_N)
    if orders_keys(FLAGS):
        if KEY_QUADS & FLAGS:  # rows (BLOCK_N / 2) e + 16 w + 8 p + g
            e = n // (BLOCK_N // 2)
            n = ((n & (BLOCK_N // 2 - 16)) << 1) | ((n & 7) << 2) | (e << 1) | ((n & 8) >> 3)
        else:
            n = (n & ~15) | ((n & 7) << 1) | ((n & 8) >> 3)
    return n


@triton.constexpr_function
def careful_flags(flags: int) -> int:
    """The flags of a careful way, which takes keys one by one and logits in base 2."""
    units = UNSCALED.value | NATURAL.value | RELATIVE.value | BOUNDED.value
    return int(flags) & ~(units | MASK_PAIRS.value | KEY_WORDS.value)


@triton.constexpr_function
def without_mask(flags: int) -> int:
    """The flags of a call's other terms."""
    return int(flags) & ~MASK.value


@triton.jit
def tile_offsets(
    stride, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, FLAGS: tl.constexpr, order=None
):
    """[BLOCK_ROWS, BLOCK_DIM] element offsets within a tile of rows `stride` apart; order: of the
    rows, [BLOCK_ROWS]."""
    rows = (tl.arange(0, BLOCK_ROWS) if order is None else order)[:, None]
    if WIDE & FLAGS:
        rows = rows.to(tl.int64)
    return rows * stride + tl.arange(0, BLOCK_DIM)[None, :]


@triton.jit
def tile_pointers(
    base, stride, row, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, FLAGS: tl.constexpr,
    order=None,
):  # fmt: skip
    """Pointers to rows row, row + 1, ... of base, [BLOCK_ROWS, BLOCK_DIM], or in that order."""
    offsets = tile_offsets(stride, BLOCK_ROWS, BLOCK_DIM, FLAGS, order)
    return base + row.to(tl.int64) * stride + offsets


@triton.jit
def tile_step(stride, BLOCK_ROWS: tl.constexpr, FLAGS: tl.constexpr):
    """How far `tile_pointers` move to the next tile."""
    if WIDE & FLAGS:
        return tl.full([], BLOCK_ROWS, tl.int64) * stride
    return BLOCK_ROWS * stride


@triton.jit
def load_whole(pointers, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The tile at `tile_pointers`, of which every row exists."""
    if DIM != BLOCK_DIM:
        tile = tl.load(pointers, mask=(tl.arange(0, BLOCK_DIM) < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def load_tile(
    base, stride, row, rows, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    EDGE: tl.constexpr, FLAGS: tl.constexpr, order=None,
):  # fmt: skip
    """Rows row, row + 1, ... of base [rows, DIM] as [BLOCK_ROWS, BLOCK_DIM], 0 outside.

    EDGE: the tile may reach past the last row; order: of the rows, if another."""
    pointers = tile_pointers(base, stride, row, BLOCK_ROWS, BLOCK_DIM, FLAGS, order)
    if not EDGE:
        return load_whole(pointers, DIM, BLOCK_DIM)
    inside = (row + (tl.arange(0, BLOCK_ROWS) if order is None else order) < rows)[:, None]
    if DIM != BLOCK_DIM:
        inside = inside & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    tile = tl.load(pointers, mask=inside, other=0.0)
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def load_keys(
    base, stride, j_first, seqlen_k, pages, page_stride, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr, EDGE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Keys (or values) j_first, ... as [BLOCK_N, BLOCK_DIM], in `key_order`: rows of base
    [seqlen_k, DIM], or with PAGED of the pages, `page_stride` apart, that pages = (table row, page
    size, number of pages) names.  Page numbers are clamped: a wrong one cannot make the kernel
    leave the cache.  The page size is a constant, and a tile that it divides lies in one page."""
    order = key_order(BLOCK_N, FLAGS)
    if PAGED & FLAGS:
        table, PAGE_SIZE, page_count = pages
        if PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(table + j_first // PAGE_SIZE)
            page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
            start = base + page * page_stride + (j_first % PAGE_SIZE).to(tl.int64) * stride
            found = load_tile(
                start, stride, j_first * 0, seqlen_k - j_first, DIM, BLOCK_N, BLOCK_DIM, EDGE,
                FLAGS, order,
            )  # fmt: skip
        else:  # one `return`: several keep Triton from seeing the loads of a loop
            keys, inside = key_pointers(
                base, stride, j_first, seqlen_k, pages, page_stride, BLOCK_N, EDGE, FLAGS
            )
            d = tl.arange(0, BLOCK_DIM)[None, :]
            inside = inside[:, None] & (d < DIM) if EDGE else d < DIM
            found = tl.load(keys[:, None] + d, mask=inside, other=0.0)
            found = found.to(tl.float32) if INTERPRETED else found
        return found
    return load_tile(base, stride, j_first, seqlen_k, DIM, BLOCK_N, BLOCK_DIM, EDGE, FLAGS, order)


@triton.jit
def head_rows(base, b, h, first, b_s, h_s, s):
    """Pointer to row `first` of head h of batch element b, all int64."""
    return base + b * b_s + h * h_s + first * s


@triton.jit
def row_pointers(base, stride, row, rows, BLOCK_ROWS: tl.constexpr, order=None):
    """(pointers to rows row, row + 1, ... [BLOCK_ROWS], or in that order, whether they exist)"""
    r = row + (tl.arange(0, BLOCK_ROWS) if order is None else order)
    return base + r.to(tl.int64) * stride, r < rows


@triton.jit
def key_pointers(
    base, stride, j_first, seqlen_k, pages, page_stride, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """`row_pointers` of the keys that `load_keys` loads."""
    if PAGED & FLAGS:
        table, PAGE_SIZE, page_count = pages
        j = j_first + key_order(BLOCK_N, FLAGS)
        if EDGE:
            page = tl.load(table + j // PAGE_SIZE, mask=j < seqlen_k, other=0)
        else:
            page = tl.load(table + j // PAGE_SIZE)
        page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
        return base + page * page_stride + (j % PAGE_SIZE).to(tl.int64) * stride, j < seqlen_k
    return row_pointers(base, stride, j_first, seqlen_k, BLOCK_N, key_order(BLOCK_N, FLAGS))


@triton.jit
def load_rows(rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The whole rows that `row_pointers` or `key_pointers` gives, [BLOCK_ROWS, BLOCK_DIM].  In a
    loop its addresses are computed each time, where those of `load_tile` would hold registers."""
    pointers, inside = rows
    d = tl.arange(0, BLOCK_DIM)[None, :]
    tile = tl.load(pointers[:, None] + d, mask=inside[:, None] & (d < DIM), other=0.0)
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def streamed_dot(a, b, acc, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """acc + A B^T of rows that `row_pointers` gives, read PART columns at a time: as few as leave
    the registers to what else is wide."""
    PART: tl.constexpr = 32 if BLOCK_DIM <= 128 else 16
    a_rows, a_inside = a
    b_rows, b_inside = b
    for part in tl.range(0, BLOCK_DIM // PART, num_stages=1):
        d = part * PART + tl.arange(0, PART)[None, :]
        a_part = tl.load(a_rows[:, None] + d, mask=a_inside[:, None] & (d < DIM), other=0.0)
        b_part = tl.load(b_rows[:, None] + d, mask=b_inside[:, None] & (d < DIM), other=0.0)
        acc = dot(a_part, tl.trans(b_part), acc)
    return acc


@triton.jit
def load_described(descriptor, b, h, row, ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows row, ... of head h as [ROWS, BLOCK_DIM] through a tensor descriptor, which on sm_90 and
    newer is one TMA instruction; 0 outside the tensor, in both dimensions."""
    tile = descriptor.load([b, h, row, 0]).reshape([ROWS, BLOCK_DIM])
    return tile.to(tl.float32) if INTERPRETED else tile


@triton.jit
def store_tile(
    base, stride, row, rows, tile, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, FLAGS: tl.constexpr, order=None,
):  # fmt: skip
    """Write `tile` to rows row, row + 1, ... of base [rows, DIM], or in that order, rounded to its
    dtype."""
    offsets = tile_offsets(stride, BLOCK_ROWS, BLOCK_DIM, FLAGS, order)
    inside = (row + (tl.arange(0, BLOCK_ROWS) if order is None else order) < rows)[:, None]
    inside = inside & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    pointers = base + row.to(tl.int64) * stride + offsets
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def sequence(cu_seqlens, b, total, longest, FLAGS: tl.constexpr):
    """(first row, length) of sequence b.  Clamped, so that wrong values of cu_seqlens, which live
    on the device, cannot make a kernel leave the tensors."""
    if VARLEN & FLAGS:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total)
        return first.to(tl.int64), tl.minimum(end - first, longest)
    return (b * 0).to(tl.int64), longest


@triton.jit
def program(blocks, heads):
    """(tile, head, batch element) of this program, in int32: grid x holds all, tiles innermost."""
    pid = tl.program_id(0)
    return pid % blocks, pid // blocks % heads, pid // blocks // heads


@triton.jit
def sequences(cu_q, cu_k, seqlens_k, b, total_q, total_k, seqlen_q, seqlen_k, FLAGS: tl.constexpr):
    """(first query, queries, first key, keys) of batch element b, clamped to what there is."""
    q_first, length_q = sequence(cu_q, b, total_q, seqlen_q, FLAGS)
    k_first, length_k = sequence(cu_k, b, total_k, seqlen_k, FLAGS)
    if SEQLENS & FLAGS:
        length_k = tl.minimum(tl.maximum(tl.load(seqlens_k + b), 0), seqlen_k)
    return q_first, length_q, k_first, length_k


@triton.jit
def block_of(cu_seqlens_q, cu_seqlens_k, seqlens_k, sizes, heads, FLAGS: tl.constexpr):
    """(tile, head of `heads`, batch element, and of `sequences` all) of this program; sizes as the
    backward kernels have them.  Head and batch element in 32 bits: widened before the early return
    of an idle program they cost the loop of dK and dV up to 15 instructions on sm_90."""
    _heads_q, _group, total_q, total_k, seqlen_q, seqlen_k, blocks = sizes
    block, h, b = program(blocks, heads)
    q_first, length_q, k_first, length_k = sequences(
        cu_seqlens_q, cu_seqlens_k, seqlens_k, b, total_q, total_k, seqlen_q, seqlen_k, FLAGS
    )
    return block, h, b, q_first, length_q, k_first, length_k


@triton.jit
def part_of(first, end, split, splits):
    """(first, end) of part `split` of `splits` of the tiles first..end - 1."""
    share = (end - first + splits - 1) // splits
    first = tl.minimum(first + split * share, end)
    return first, tl.minimum(first + share, end)


@triton.jit
def in_frame(terms, b, FIELD: tl.constexpr):
    """A number of sequence b's frame, by its place in attn_ext.core.schema.Frame."""
    return tl.load(terms.frame + b.to(tl.int64) * 6 + FIELD)


@triton.jit
def last_distance(b, seqlen_q, seqlen_k, terms, FLAGS: tl.constexpr):
    """Key position aligned with query 0 where the last query of all is with the last key."""
    if FRAME & FLAGS:
        seqlen_q, seqlen_k = in_frame(terms, b, 4) - in_frame(terms, b, 2), in_frame(terms, b, 5)
        seqlen_k -= in_frame(terms, b, 3)
    return seqlen_k - seqlen_q


@triton.jit
def diagonal(b, seqlen_q, seqlen_k, terms, FLAGS: tl.constexpr):
    """Key position aligned with query 0."""
    if BOTTOM_RIGHT & FLAGS:
        return last_distance(b, seqlen_q, seqlen_k, terms, FLAGS)
    return in_frame(terms, b, 2) - in_frame(terms, b, 3) if (FRAME & FLAGS) else seqlen_k * 0


@triton.jit
def key_range(
    i_first, i_last, seqlen_k, off, left, right, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr
):
    """(first, full_first, full_end, end) of the key tiles that queries i_first..i_last see; in
    tiles full_first..full_end - 1 each of them sees each key."""
    low = tl.maximum(i_first + off - left, 0) if (LEFT & FLAGS) else seqlen_k * 0
    high = tl.minimum(i_last + off + right + 1, seqlen_k) if (RIGHT & FLAGS) else seqlen_k
    low_all = tl.maximum(i_last + off - left, 0) if (LEFT & FLAGS) else seqlen_k * 0
    high_all = tl.minimum(i_first + off + right + 1, seqlen_k) if (RIGHT & FLAGS) else seqlen_k
    high = tl.maximum(high, 0)
    first = low // BLOCK_N
    end = tl.maximum((high + BLOCK_N - 1) // BLOCK_N, first)
    full_first = tl.minimum((low_all + BLOCK_N - 1) // BLOCK_N, end)
    full_end = tl.minimum(tl.maximum(tl.maximum(high_all, 0) // BLOCK_N, full_first), end)
    return first, full_first, full_end, end


@triton.jit
def query_range(
    j_first, j_last, seqlen_q, off, left, right, BLOCK_M: tl.constexpr, FLAGS: tl.constexpr
):
    """(first, full_first, full_end, end) of the query tiles that see keys j_first..j_last; tiles
    full_first..full_end - 1 are whole, and each of their queries sees each of the keys."""
    low = tl.maximum(j_first - off - right, 0) if (RIGHT & FLAGS) else seqlen_q * 0
    high = tl.minimum(j_last - off + left + 1, seqlen_q) if (LEFT & FLAGS) else seqlen_q
    low_all = tl.maximum(j_last - off - right, 0) if (RIGHT & FLAGS) else seqlen_q * 0
    high = tl.maximum(high, 0)
    first = low // BLOCK_M
    end = tl.maximum((high + BLOCK_M - 1) // BLOCK_M, first)
    full_first = tl.minimum((low_all + BLOCK_M - 1) // BLOCK_M, end)
    high_all = tl.minimum(j_first - off + left + 1, seqlen_q) if (LEFT & FLAGS) else seqlen_q
    full_end = tl.minimum(tl.maximum(tl.maximum(high_all, 0) // BLOCK_M, full_first), end)
    return first, full_first, full_end, end
