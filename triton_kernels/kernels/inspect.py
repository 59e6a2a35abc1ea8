"""What attention did, from Q, K and LSE in O(N) memory: P = exp(S - LSE) is computed tile by tile.

Q [B, Hq, Sq, D], K [B, Hk, Sk, D], LSE [B, Hq, Sq], dense.
    column_mass_kernel  sum_i P_ij, float32 [B, Hq, Sk]; one program = BLOCK_N keys of one head
    top_k_kernel        the BEST largest logits of each query; one program = BLOCK_M queries
    mean_top_k_kernel   the BEST largest means of P over the heads; one program = BLOCK_M queries
    pooled_map_kernel   P averaged down to [B, Hq, rows, cols]; one program = CELLS x CELLS cells
Each element of a result belongs to one program, so sums have a fixed order.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dbias import tile_is_visible
from attn_ext.triton_kernels.kernels.logits import logits
from attn_ext.triton_kernels.kernels.primitives import (
    INTERPRETED,
    diagonal,
    dot,
    key_range,
    load_tile,
    program,
    query_range,
)
from attn_ext.triton_kernels.kernels.scores import base2_lse, probabilities

RUNTIME = ("heads_q", "group", "seqlen_q", "seqlen_k", "blocks", "left", "right")
NOTHING = tl.constexpr(-9223372036854775807)  # of packed logits: less than any


@triton.jit(do_not_specialize=RUNTIME)
def column_mass_kernel(
    q, k, lse, mass,
    terms, q_b, q_h, q_s, k_b, k_h, k_s, lse_b, lse_h,
    heads_q, group, seqlen_q, seqlen_k, blocks, scale, left, right,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys * Hq * B)."""
    block, h, b = program(blocks, heads_q)
    h, b = h.to(tl.int64), b.to(tl.int64)
    j_first = block * BLOCK_N
    k_rows = k + b * k_b + h // group * k_h
    k_tile = load_tile(k_rows, k_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
    j = j_first + tl.arange(0, BLOCK_N)
    off = diagonal(b, seqlen_q, seqlen_k, terms, FLAGS)
    j_last = tl.minimum(j_first + BLOCK_N, seqlen_k) - 1
    first, _inner, _inner_end, end = query_range(
        j_first, j_last, seqlen_q, off, left, right, BLOCK_M, FLAGS
    )
    total = tl.zeros([BLOCK_N], tl.float32)
    for m_block in tl.range(first, end, num_stages=1):
        i_first = m_block * BLOCK_M
        i = i_first + tl.arange(0, BLOCK_M)
        # S^T = K @ Q^T   [BLOCK_N, BLOCK_M]
        q_tile = load_tile(
            q + b * q_b + h * q_h, q_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS
        )
        kq = dot(k_tile, tl.trans(q_tile), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        s, _cap = logits(
            kq, i[None, :], j[:, None], b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
            True, FLAGS,
        )  # fmt: skip
        row_lse = base2_lse(lse, b * lse_b + h * lse_h + i, i < seqlen_q)
        total += tl.sum(probabilities(s, row_lse[None, :], True, FLAGS), 1)
    tl.store(mass + (b * heads_q + h) * seqlen_k + j, total, mask=j < seqlen_k)


@triton.jit
def packed(s, j):
    """int64 whose order is that of (s, -j): the bits of s as an ordered integer above 31 bits of j;
    NaN is the largest, an excluded pair NOTHING."""
    s = tl.where(s != s, float("nan"), s)  # of positive sign
    bits = s.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    value = (order.to(tl.int64) << 32) | (0x7FFFFFFF - j).to(tl.int64)
    return tl.where(s == float("-inf"), NOTHING, value)


@triton.jit
def nothing_yet(BLOCK_M: tl.constexpr, BEST: tl.constexpr):
    """int64 [BLOCK_M, BEST] less than any packed number; every place of a row is different, so that
    exactly one holds its least."""
    return tl.zeros([BLOCK_M, BEST], tl.int64) + NOTHING + 1 + tl.arange(0, BEST)[None, :]


@triton.jit
def keep_largest(best, left_over):
    """`best` [BLOCK_M, BEST] with what is larger in left_over [BLOCK_M, BLOCK_N], both packed."""
    largest, least = tl.max(left_over, 1), tl.min(best, 1)
    # the largest of the tile takes the place of the least, until no row gains by it
    while tl.max(tl.where(largest > least, 1, 0), 0) > 0:
        gains = (largest > least)[:, None]
        best = tl.where((best == least[:, None]) & gains, largest[:, None], best)
        left_over = tl.where(left_over == largest[:, None], NOTHING, left_over)
        largest, least = tl.max(left_over, 1), tl.min(best, 1)
    return best


@triton.jit(do_not_specialize=RUNTIME)
def top_k_kernel(
    q, k, best_out,
    terms, q_b, q_h, q_s, k_b, k_h, k_s,
    heads_q, group, seqlen_q, seqlen_k, blocks, scale, left, right,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BEST: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  best_out int64 [B, Hq, Sq, BEST], not sorted: packed
    base-2 logits and keys, below NOTHING + BEST + 1 where a row sees fewer keys."""
    block, h, b = program(blocks, heads_q)
    h, b = h.to(tl.int64), b.to(tl.int64)
    i_first = block * BLOCK_M
    q_tile = load_tile(
        q + b * q_b + h * q_h, q_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS
    )
    k_rows = k + b * k_b + h // group * k_h
    i = i_first + tl.arange(0, BLOCK_M)
    off = diagonal(b, seqlen_q, seqlen_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, seqlen_q) - 1
    first, _inner, _inner_end, end = key_range(
        i_first, i_last, seqlen_k, off, left, right, BLOCK_N, FLAGS
    )
    best = nothing_yet(BLOCK_M, BEST)
    for n_block in tl.range(first, end, num_stages=1):
        j_first = n_block * BLOCK_N
        j = (j_first + tl.arange(0, BLOCK_N))[None, :]
        # S = Q @ K^T   [BLOCK_M, BLOCK_N]
        k_tile = load_tile(k_rows, k_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
        qk = dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        s, _cap = logits(
            qk, i[:, None], j, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right, True, FLAGS
        )
        best = keep_largest(best, packed(s, j))
    rows = ((b * heads_q + h) * seqlen_q + i)[:, None] * BEST
    tl.store(best_out + rows + tl.arange(0, BEST)[None, :], best, mask=(i < seqlen_q)[:, None])


@triton.jit(do_not_specialize=RUNTIME)
def mean_top_k_kernel(
    q, k, lse, best_out, total, seen, seen_by_any,
    terms, q_b, q_h, q_s, k_b, k_h, k_s, lse_b, lse_h,
    heads_q, group, seqlen_q, seqlen_k, blocks, scale, left, right,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BEST: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * B).  best_out int64 [B, Sq, BEST], as of top_k_kernel, but of
    means of P.  total float32 and seen int32 [B, Hq, Sq], 0 before: sum_j P_ij, and how many keys
    the row sees; seen_by_any int32 [B, Sq]: how many of them some head sees."""
    block, _h, b = program(blocks, 1)
    b = b.to(tl.int64)
    i_first = block * BLOCK_M
    i = i_first + tl.arange(0, BLOCK_M)
    there = i < seqlen_q
    off = diagonal(b, seqlen_q, seqlen_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, seqlen_q) - 1
    first, _inner, _inner_end, end = key_range(
        i_first, i_last, seqlen_k, off, left, right, BLOCK_N, FLAGS
    )
    best = nothing_yet(BLOCK_M, BEST)
    count = tl.zeros([BLOCK_M], tl.int32)
    for n_block in tl.range(first, end, num_stages=1):
        j_first = n_block * BLOCK_N
        j = (j_first + tl.arange(0, BLOCK_N))[None, :]
        summed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        by_any = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for head in tl.range(0, heads_q, num_stages=1):
            h = b * 0 + head
            # S = Q @ K^T   [BLOCK_M, BLOCK_N]
            q_tile = load_tile(
                q + b * q_b + h * q_h, q_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS
            )
            k_tile = load_tile(
                k + b * k_b + h // group * k_h, k_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D, True,
                FLAGS,
            )  # fmt: skip
            qk = dot(q_tile, tl.trans(k_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            s, _cap = logits(
                qk, i[:, None], j, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right, True,
                FLAGS,
            )  # fmt: skip
            row = b * lse_b + h * lse_h + i
            p = probabilities(s, base2_lse(lse, row, there)[:, None], True, FLAGS)
            visible = tl.where(s != float("-inf"), 1, 0)
            # Each place belongs to one thread of one program: the sums have a fixed order
            tl.atomic_add(total + row, tl.sum(p, 1), mask=there, sem="relaxed")
            tl.atomic_add(seen + row, tl.sum(visible, 1), mask=there, sem="relaxed")
            summed += p
            by_any = tl.maximum(by_any, visible)
        count += tl.sum(by_any, 1)
        mean = tl.where(by_any > 0, summed / heads_q.to(tl.float32), float("-inf"))
        best = keep_largest(best, packed(mean, j))
    rows = b * seqlen_q + i
    tl.store(seen_by_any + rows, count, mask=there)
    places = rows[:, None] * BEST + tl.arange(0, BEST)[None, :]
    tl.store(best_out + places, best, mask=there[:, None])


@triton.jit
def cell_low(c, cells, length):
    """First position of cell c of `cells` over `length` positions (int64)."""
    return c * length // cells


@triton.jit
def cell_high(c, cells, length):
    """One past the last position of cell c: neighbours share one where length % cells != 0."""
    return ((c + 1) * length + cells - 1) // cells


@triton.jit
def membership(c, at, cells, length):
    """[len(c), len(at)]: 1 where position `at` belongs to cell c, else 0."""
    low, high = cell_low(c, cells, length), cell_high(c, cells, length)
    low, high = low.to(tl.int32)[:, None], tl.where(c < cells, high, 0).to(tl.int32)[:, None]
    return tl.where((at[None, :] >= low) & (at[None, :] < high), 1.0, 0.0)


@triton.jit
def add_cells(acc, bad, belongs, x, x_bad):
    """(acc + belongs @ x, bad + belongs @ x_bad): x without its NaN, which x_bad counts."""
    small = tl.float32 if INTERPRETED else tl.bfloat16
    zero = tl.zeros_like(bad)
    met = dot(belongs.to(small), tl.where(x_bad, 1.0, 0.0).to(small), zero)
    return dot(belongs, x, acc), bad + met


@triton.jit(do_not_specialize=(*RUNTIME, "rows", "cols", "row_blocks"))
def pooled_map_kernel(
    q, k, lse, out,
    terms, q_b, q_h, q_s, k_b, k_h, k_s, lse_b, lse_h,
    heads_q, group, seqlen_q, seqlen_k, blocks, scale, left, right,
    rows, cols, row_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CELLS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks * Hq * B), blocks = row_blocks * blocks of columns."""
    block, h, b = program(blocks, heads_q)
    h, b = h.to(tl.int64), b.to(tl.int64)
    block = block.to(tl.int64)
    r_first, c_first = block % row_blocks * CELLS, block // row_blocks * CELLS
    r, c = r_first + tl.arange(0, CELLS), c_first + tl.arange(0, CELLS)
    off = diagonal(b, seqlen_q, seqlen_k, terms, FLAGS)
    q_low = cell_low(r_first, rows, seqlen_q).to(tl.int32)
    q_end = cell_high(tl.minimum(r_first + CELLS, rows) - 1, rows, seqlen_q).to(tl.int32)
    k_low = cell_low(c_first, cols, seqlen_k).to(tl.int32)
    k_end = cell_high(tl.minimum(c_first + CELLS, cols) - 1, cols, seqlen_k).to(tl.int32)
    acc = tl.zeros([CELLS, CELLS], tl.float32)
    bad = tl.zeros([CELLS, CELLS], tl.float32)
    for step in tl.range(0, (q_end - q_low + BLOCK_M - 1) // BLOCK_M, num_stages=1):
        i_first = q_low + step * BLOCK_M
        i = i_first + tl.arange(0, BLOCK_M)
        q_tile = load_tile(
            q + b * q_b + h * q_h, q_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS
        )
        row_lse = base2_lse(lse, b * lse_b + h * lse_h + i, i < seqlen_q)
        # sums over keys, transposed   [CELLS of columns, BLOCK_M]
        across = tl.zeros([CELLS, BLOCK_M], tl.float32)
        across_bad = tl.zeros([CELLS, BLOCK_M], tl.float32)
        for key_step in tl.range(0, (k_end - k_low + BLOCK_N - 1) // BLOCK_N, num_stages=1):
            j_first = k_low + key_step * BLOCK_N
            if tile_is_visible(
                i_first, j_first, seqlen_q, seqlen_k, off, left, right, BLOCK_M, BLOCK_N, FLAGS
            ):
                j = j_first + tl.arange(0, BLOCK_N)
                k_tile = load_tile(
                    k + b * k_b + h // group * k_h, k_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D,
                    True, FLAGS,
                )  # fmt: skip
                kq = dot(k_tile, tl.trans(q_tile), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
                s, _cap = logits(
                    kq, i[None, :], j[:, None], b, h, seqlen_q, seqlen_k, off, terms, scale, left,
                    right, True, FLAGS,
                )  # fmt: skip
                p = probabilities(s, row_lse[None, :], True, FLAGS)
                across, across_bad = add_cells(
                    across, across_bad, membership(c, j, cols, seqlen_k),
                    tl.where(p == p, p, 0.0), p != p,
                )  # fmt: skip
        acc, bad = add_cells(
            acc, bad, membership(r, i, rows, seqlen_q), tl.trans(across), tl.trans(across_bad) > 0
        )
    tall = cell_high(r, rows, seqlen_q) - cell_low(r, rows, seqlen_q)
    wide = cell_high(c, cols, seqlen_k) - cell_low(c, cols, seqlen_k)
    acc = tl.where(bad > 0, float("nan"), acc)
    acc = acc / (tall[:, None] * wide[None, :]).to(tl.float32)
    place = ((b * heads_q + h) * rows + r[:, None]) * cols + c[None, :]
    tl.store(out + place, acc, mask=(r < rows)[:, None] & (c < cols)[None, :])
