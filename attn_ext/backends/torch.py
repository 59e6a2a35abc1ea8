"""torch's own flash attention, forward and backward, as a backend.

Only by name, or for backend="fastest" where `attn-ext tune` measured it to be the fastest: "auto"
never takes it.  It serves what torch has a fast kernel for, which is a plain dense call, causal or
not.  As everywhere in torch, a NaN or an infinity of a key that no query may see can reach the
result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_ext.core.problem import Problem
from attn_ext.core.schema import TOP_LEFT, Call, Grads, statistics_dtype

aten = torch.ops.aten
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}
ABSENT = (
    "window", "mask", "bias", "softcap", "alibi", "sink", "dropout", "paged", "stats",
    "deterministic",
)  # fmt: skip
PAD = 8  # elements that a gradient of LSE adds to a row
MAX_HEAD_DIM = 256 - PAD  # of the kernels on a GPU


def available() -> str:
    """ "": torch is always here."""
    return ""


def unsupported(problem: Problem) -> list[str]:
    """Every reason why torch's flash attention cannot serve `problem`."""
    p, why = problem, []
    if p.kind != "dense":
        why.append(f"has no {p.kind} kernel")
    if p.dtype not in DTYPES.get(p.device, ()):
        why.append(f"has no flash kernel for {p.dtype} on {p.device}")
    absent = [name for name in ABSENT if getattr(p, name)]
    if absent:
        why.append(f"has no flash kernel with {', '.join(absent)}")
    on_cpu = p.align == TOP_LEFT  # what causal means to its kernels where Sq != Sk
    on_gpu = p.align != TOP_LEFT and p.seqlen_q < p.seqlen_k
    aligned = p.seqlen_q == p.seqlen_k or (on_cpu if p.device == "cpu" else on_gpu)
    if p.causal and not aligned:
        why.append("has no flash kernel for this alignment of causal with Sq != Sk")
    if p.head_dim != p.head_dim_v:
        why.append(f"head_dim_v must be head_dim {p.head_dim}, got {p.head_dim_v}")
    if p.device == "cuda" and (p.head_dim % 8 or p.head_dim > MAX_HEAD_DIM):
        why.append(f"head_dim must be a multiple of 8, at most {MAX_HEAD_DIM}, got {p.head_dim}")
    if p.device == "cpu" and p.heads_q != p.heads_k:
        why.append(f"heads_k must be heads_q {p.heads_q}, got {p.heads_k}")
    if 0 in (p.batch, p.heads_q, p.seqlen_q, p.seqlen_k):
        why.append("has no flash kernel for empty tensors")
    return why


def _causal(call: Call) -> bool:
    return call.window_right == 0


def forward(call: Call):
    """O and LSE, [B, Hq, Sq] in the statistics' dtype."""
    q, k, v = call.q, call.k, call.v
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, _causal(call), scale=call.scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, _causal(call), scale=call.scale
        )
    return out, lse.to(statistics_dtype(q.dtype)), None, None


def backward(call: Call, dout, out, lse, dlse, needs) -> Grads:
    """The gradients of q, k and v."""
    q, k, v, dout = call.q, call.k, call.v, dout.to(call.q.dtype)
    dim = q.shape[-1]
    if dlse is not None:
        # The kernel computes dS = P (dO V^T - rowsum(dO O)).  A column where V is 0, dO is 1 and O
        # is -dLSE adds dLSE to the bracket and nothing else.
        q, k, v, dout, out = (F.pad(x, (0, PAD)) for x in (q, k, v, dout, out))
        dout[..., dim], out[..., dim] = 1, -dlse.to(out.dtype)
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, _causal(call), scale=call.scale
        )
    else:
        none = torch.empty(0, dtype=torch.int32, device=q.device)
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, none, none, q.shape[2], k.shape[2], 0.0, _causal(call),
            rng, torch.zeros((), dtype=torch.uint64, device=q.device), scale=call.scale,
        )  # fmt: skip
    return Grads(dq[..., :dim], dk[..., :dim], dv[..., :dim])
