"""Attention in plain Triton, without any option: what the kernels of triton_kernels/ are held to.

Q, K, V, out, dO and the gradients are [B, H, S, DIM] of one type with equal strides, of V, out, dO
and dV DIM_V columns; S a multiple of the tiles, D and DV the powers of two that hold DIM and DIM_V;
LSE (base 2) and delta are float32 [B, H, S].
float32 is multiplied as ours is, as three products of TF32.  Nothing here runs:
`machine_code.py --triton` compiles the kernels for absent GPUs and counts their loops.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def rows(pointers, DIM: tl.constexpr, D: tl.constexpr, AXIS: tl.constexpr = 1):
    """A tile whose columns (AXIS 0: rows) are those of a head, 0 past DIM."""
    if DIM == D:
        return tl.load(pointers)
    inside = tl.expand_dims(tl.arange(0, D) < DIM, 1 - AXIS)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b, a in b's type."""
    return tl.dot(a.to(b.dtype), b, acc, input_precision="tf32x3")


@triton.jit
def store(pointers, tile, DIM: tl.constexpr, D: tl.constexpr):
    """Write a tile in the tensor's type."""
    inside = (tl.arange(0, D) < DIM)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def forward(
    Q, K, V, out, LSE, scale, stride_b, stride_h, stride_s, heads, seqlen,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program = BLOCK_M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    start = head // heads * stride_b + head % heads * stride_h
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j, d, e = tl.arange(0, BLOCK_N), tl.arange(0, D), tl.arange(0, DV)
    q = rows(Q + start + i[:, None] * stride_s + d[None, :], DIM, D)
    k_pointers = K + start + j[None, :] * stride_s + d[:, None]
    v_pointers = V + start + j[:, None] * stride_s + e[None, :]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    for _ in range(0, seqlen, BLOCK_N):
        s = dot(q, rows(k_pointers, DIM, D, 0))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = dot(p, rows(v_pointers, DIM_V, DV), acc * alpha[:, None])
        row_max = new_max
        k_pointers += BLOCK_N * stride_s
        v_pointers += BLOCK_N * stride_s
    acc = acc / row_sum[:, None]
    store(out + start + i[:, None] * stride_s + e[None, :], acc, DIM_V, DV)
    tl.store(LSE + head * seqlen + i, row_max + tl.log2(row_sum))


@triton.jit
def key_block(
    Q, K, V, dO, dK, dV, sums, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one head; S and dP are transposed, [BLOCK_N, BLOCK_M].  sums: None, or those
    to which the keys' share of dQ is added."""
    head = tl.program_id(1).to(tl.int64)
    start = head // heads * stride_b + head % heads * stride_h
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, d, e = tl.arange(0, BLOCK_M), tl.arange(0, D), tl.arange(0, DV)
    own = start + j[:, None] * stride_s + d[None, :]
    own_v = start + j[:, None] * stride_s + e[None, :]
    k, v = rows(K + own, DIM, D), rows(V + own_v, DIM_V, DV)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    q_pointers = Q + start + i[:, None] * stride_s + d[None, :]
    do_pointers = dO + start + i[:, None] * stride_s + e[None, :]
    row = head * seqlen + i
    if sums is not None:
        places = sums + head * seqlen * D
    for _ in range(0, seqlen, BLOCK_M):
        q = rows(q_pointers, DIM, D)
        p = tl.exp2(dot(k, tl.trans(q)) * scale - tl.load(LSE + row)[None, :])
        do = rows(do_pointers, DIM_V, DV)
        dv = dot(p, do, dv)
        ds = p * (dot(v, tl.trans(do)) - tl.load(delta + row)[None, :])
        ds = ds.to(q.dtype)
        dk = dot(ds, q, dk)
        if sums is not None:
            dq_tile = dot(tl.trans(ds), k)
            tl.atomic_add(places + (i[:, None] * D + d[None, :]), dq_tile, sem="relaxed")
            places += BLOCK_M * D
        q_pointers += BLOCK_M * stride_s
        do_pointers += BLOCK_M * stride_s
        row += BLOCK_M
    store(dK + own, dk, DIM, D)
    store(dV + own_v, dv, DIM_V, DV)


@triton.jit
def dkdv(
    Q, K, V, dO, dK, dV, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program = `key_block`."""
    key_block(
        Q, K, V, dO, dK, dV, None, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
        DIM, D, DIM_V, DV, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def fused(
    Q, K, V, dO, dK, dV, sums, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`dkdv`, which adds these keys' share of dQ to `sums`, float32 [B, H, S, D], atomically."""
    key_block(
        Q, K, V, dO, dK, dV, sums, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
        DIM, D, DIM_V, DV, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def dq(
    Q, K, V, dO, dQ, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
    DIM: tl.constexpr, D: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program = BLOCK_M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    start = head // heads * stride_b + head % heads * stride_h
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j, d, e = tl.arange(0, BLOCK_N), tl.arange(0, D), tl.arange(0, DV)
    own = start + i[:, None] * stride_s + d[None, :]
    own_do = start + i[:, None] * stride_s + e[None, :]
    q, do = rows(Q + own, DIM, D), rows(dO + own_do, DIM_V, DV)
    row_lse, row_delta = tl.load(LSE + head * seqlen + i), tl.load(delta + head * seqlen + i)
    k_pointers = K + start + j[:, None] * stride_s + d[None, :]
    v_pointers = V + start + j[:, None] * stride_s + e[None, :]
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for _ in range(0, seqlen, BLOCK_N):
        k, v = rows(k_pointers, DIM, D), rows(v_pointers, DIM_V, DV)
        p = tl.exp2(dot(q, tl.trans(k)) * scale - row_lse[:, None])
        ds = p * (dot(do, tl.trans(v)) - row_delta[:, None])
        acc = dot(ds, k, acc)
        k_pointers += BLOCK_N * stride_s
        v_pointers += BLOCK_N * stride_s
    store(dQ + own, acc, DIM, D)


KERNELS = {"forward": forward, "dkdv": dkdv, "dq": dq, "fused": fused}
ALIGNED = ("stride_b", "stride_h", "stride_s", "seqlen")  # multiples of 16


def dims(head_dim: int | str) -> tuple[int, int]:
    """(columns of Q and K, columns of V): 96 is (96, 96), "192/128" (192, 128)."""
    dim, _, dim_v = str(head_dim).partition("/")
    return int(dim), int(dim_v or dim)


def compiled(name: str, architecture: str, head_dim: int | str, tile, dtype: str = "bf16"):
    """Triton's kernel `name` for "sm_80", ...; head_dim: as `dims` takes it; tile: (BLOCK_M,
    BLOCK_N, warps, stages, ...)."""
    kernel = KERNELS[name]
    signature = {argument: f"*{dtype}" for argument in kernel.arg_names}
    signature |= {
        argument: "*fp32" for argument in ("LSE", "delta", "sums") if argument in signature
    }
    signature |= {"scale": "fp32", "heads": "i32"} | dict.fromkeys(ALIGNED, "i32")
    constants = {"BLOCK_M": tile[0], "BLOCK_N": tile[1]}
    for dim, (own, width) in zip(dims(head_dim), (("DIM", "D"), ("DIM_V", "DV")), strict=True):
        constants |= {own: dim, width: triton.next_power_of_2(dim)}
    signature |= dict.fromkeys(constants, "constexpr")
    places = {argument: (place,) for place, argument in enumerate(kernel.arg_names)}
    attributes = {
        places[argument]: [["tt.divisibility", 16]]
        for argument, kind in signature.items()
        if kind.startswith("*") or argument in ALIGNED
    }
    source = ASTSource(
        kernel, signature, {places[name]: value for name, value in constants.items()}, attributes
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    options = {"num_warps": tile[2], "num_stages": tile[3], "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)
