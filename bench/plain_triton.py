"""Attention in plain Triton, without any option: what the kernels of triton_kernels/ are held to.

Q, K, V, out, dO and the gradients are bf16 [B, H, S, D] with equal strides, S a multiple of the
tiles; LSE (base 2) and delta are float32 [B, H, S].  Nothing here runs: `machine_code.py --triton`
compiles the kernels for absent GPUs and counts the instructions of their loops.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def forward(
    Q, K, V, out, LSE, scale, stride_b, stride_h, stride_s, heads, seqlen,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program = BLOCK_M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    start = head // heads * stride_b + head % heads * stride_h
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j, d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    q = tl.load(Q + start + i[:, None] * stride_s + d[None, :])
    k_pointers = K + start + j[None, :] * stride_s + d[:, None]
    v_pointers = V + start + j[:, None] * stride_s + d[None, :]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for _ in range(0, seqlen, BLOCK_N):
        s = tl.dot(q, tl.load(k_pointers))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.bfloat16), tl.load(v_pointers), acc * alpha[:, None])
        row_max = new_max
        k_pointers += BLOCK_N * stride_s
        v_pointers += BLOCK_N * stride_s
    acc = acc / row_sum[:, None]
    tl.store(out + start + i[:, None] * stride_s + d[None, :], acc.to(tl.bfloat16))
    tl.store(LSE + head * seqlen + i, row_max + tl.log2(row_sum))


@triton.jit
def dkdv(
    Q, K, V, dO, dK, dV, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program = BLOCK_N keys of one head; S and dP are transposed, [BLOCK_N, BLOCK_M]."""
    head = tl.program_id(1).to(tl.int64)
    start = head // heads * stride_b + head % heads * stride_h
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    own = start + j[:, None] * stride_s + d[None, :]
    k, v = tl.load(K + own), tl.load(V + own)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    q_pointers = Q + start + i[:, None] * stride_s + d[None, :]
    do_pointers = dO + start + i[:, None] * stride_s + d[None, :]
    row = head * seqlen + i
    for _ in range(0, seqlen, BLOCK_M):
        q = tl.load(q_pointers)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - tl.load(LSE + row)[None, :])
        do = tl.load(do_pointers)
        dv = tl.dot(p.to(tl.bfloat16), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - tl.load(delta + row)[None, :])
        dk = tl.dot(ds.to(tl.bfloat16), q, dk)
        q_pointers += BLOCK_M * stride_s
        do_pointers += BLOCK_M * stride_s
        row += BLOCK_M
    tl.store(dK + own, dk.to(tl.bfloat16))
    tl.store(dV + own, dv.to(tl.bfloat16))


@triton.jit
def dq(
    Q, K, V, dO, dQ, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program = BLOCK_M queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    start = head // heads * stride_b + head % heads * stride_h
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j, d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    own = start + i[:, None] * stride_s + d[None, :]
    q, do = tl.load(Q + own), tl.load(dO + own)
    row_lse, row_delta = tl.load(LSE + head * seqlen + i), tl.load(delta + head * seqlen + i)
    k_pointers = K + start + j[:, None] * stride_s + d[None, :]
    v_pointers = V + start + j[:, None] * stride_s + d[None, :]
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for _ in range(0, seqlen, BLOCK_N):
        k, v = tl.load(k_pointers), tl.load(v_pointers)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - row_lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v)) - row_delta[:, None])
        acc = tl.dot(ds.to(tl.bfloat16), k, acc)
        k_pointers += BLOCK_N * stride_s
        v_pointers += BLOCK_N * stride_s
    tl.store(dQ + own, acc.to(tl.bfloat16))


@triton.jit
def fused(
    Q, K, V, dO, dK, dV, sums, LSE, delta, scale, stride_b, stride_h, stride_s, heads, seqlen,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`dkdv`, which adds these keys' share of dQ to `sums`, float32 [B, H, S, D], atomically."""
    head = tl.program_id(1).to(tl.int64)
    start = head // heads * stride_b + head % heads * stride_h
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i, d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    own = start + j[:, None] * stride_s + d[None, :]
    k, v = tl.load(K + own), tl.load(V + own)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    q_pointers = Q + start + i[:, None] * stride_s + d[None, :]
    do_pointers = dO + start + i[:, None] * stride_s + d[None, :]
    row = head * seqlen + i
    places = sums + head * seqlen * D
    for _ in range(0, seqlen, BLOCK_M):
        q = tl.load(q_pointers)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - tl.load(LSE + row)[None, :])
        do = tl.load(do_pointers)
        dv = tl.dot(p.to(tl.bfloat16), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - tl.load(delta + row)[None, :])
        ds = ds.to(tl.bfloat16)
        dk = tl.dot(ds, q, dk)
        dq_tile = tl.dot(tl.trans(ds), k)
        tl.atomic_add(places + (i[:, None] * D + d[None, :]), dq_tile, sem="relaxed")
        q_pointers += BLOCK_M * stride_s
        do_pointers += BLOCK_M * stride_s
        row += BLOCK_M
        places += BLOCK_M * D
    tl.store(dK + own, dk.to(tl.bfloat16))
    tl.store(dV + own, dv.to(tl.bfloat16))


KERNELS = {"forward": forward, "dkdv": dkdv, "dq": dq, "fused": fused}
ALIGNED = ("stride_b", "stride_h", "stride_s", "seqlen")  # multiples of 16


def compiled(name: str, architecture: str, head_dim: int, tile):
    """Triton's kernel `name` for "sm_80", ...; tile: (BLOCK_M, BLOCK_N, warps, stages, ...)."""
    kernel = KERNELS[name]
    signature = {argument: "*bf16" for argument in kernel.arg_names}
    signature |= {
        argument: "*fp32" for argument in ("LSE", "delta", "sums") if argument in signature
    }
    signature |= {"scale": "fp32", "heads": "i32"} | dict.fromkeys(ALIGNED, "i32")
    constants = {"D": head_dim, "BLOCK_M": tile[0], "BLOCK_N": tile[1]}
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
