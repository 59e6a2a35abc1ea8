"""flash-attn's entry points of one pass, forward or backward, which other libraries import although
they are private (diffusers' context parallelism): layouts and meanings as in
`attn_ext.integrations.flash_attn`.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate
from attn_ext.core.schema import GRADIENTS, Call
from attn_ext.functional import dense
from attn_ext.integrations import checks


def _call(
    q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    deterministic=False, **options,
) -> Call:  # fmt: skip
    checks.heads_last(q, k, v, ("q", "k", "v"))
    named = (("window_size_left", window_size_left), ("window_size_right", window_size_right))
    left, right = (validate.integer(name, x, low=-(1 << 31)) for name, x in named)
    causal = validate.switch("causal", causal)
    return dense.dense_call(
        *(x.detach().transpose(1, 2) for x in (q, k, v)),
        scale=None if softmax_scale is None else validate.number("softmax_scale", softmax_scale),
        causal="bottom_right" if causal else False,
        window=(None if left < 0 else left, None if right < 0 or causal else right),
        softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=validate.switch("deterministic", deterministic), **options,
    )  # fmt: skip


def _like(name: str, x, shape, dtypes, device) -> None:
    """TypeError or ValueError unless x is a tensor of that shape, device and one of the dtypes."""
    validate.tensor(name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {x.device}")


@torch.no_grad()
def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1,
    softcap=0.0, alibi_slopes=None, return_softmax=False,
) -> tuple:  # fmt: skip
    """(out [B, Sq, H, D], softmax_lse [B, H, Sq], S_dmask, rng_state int64 [2]) of q [B, Sq, H, D],
    k, v [B, Sk, Hk, D], without a graph.  S_dmask is empty: `flash_attn_func` gives it.
    """
    if validate.switch("return_softmax", return_softmax):
        raise NotImplementedError(
            "return_softmax must be False here: use flash_attn_func(return_attn_probs=True)"
        )
    call = _call(
        q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, dropout_p=dropout_p,
    )  # fmt: skip
    out, lse, _, _ = torch.ops.attn_ext.forward(*call)
    state = call.rng_state
    if state is None:
        state = torch.zeros(2, dtype=torch.int64, device=q.device)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    empty = torch.empty(0, dtype=q.dtype, device=q.device)
    return out.transpose(1, 2), lse, empty, state


@torch.no_grad()
def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    deterministic=False, rng_state=None,
) -> torch.Tensor:  # fmt: skip
    """Write the gradients of a call of `_flash_attn_forward` into dq, dk and dv, each of which may
    be None; returns softmax_d [B, H, Sq], the row sums of dout * out in float32.
    """
    call = _call(
        q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, deterministic,
    )  # fmt: skip
    call = call._replace(dropout_p=validate.number("dropout_p", dropout_p, 0.0, 1.0))
    if call.dropout_p > 0:
        _like("rng_state", rng_state, (2,), (torch.int64,), q.device)
        call = call._replace(rng_state=rng_state)
    of_out, rows = (*q.shape[:3], v.shape[3]), (q.shape[0], q.shape[2], q.shape[1])
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    _like("softmax_lse", softmax_lse, rows, (statistics,), q.device)
    for name, x, shape in (
        ("dout", dout, of_out), ("out", out, of_out), ("dq", dq, q.shape), ("dk", dk, k.shape),
        ("dv", dv, v.shape),
    ):  # fmt: skip
        if x is not None or name in ("dout", "out"):
            _like(name, x, shape, (q.dtype,) if "out" in name else validate.FLOATING, q.device)
    lse = softmax_lse.masked_fill(softmax_lse == torch.inf, -torch.inf)
    wanted = {"q": dq, "k": dk, "v": dv}
    needs = [wanted.get(name) is not None for name in GRADIENTS]
    results = torch.ops.attn_ext.backward(
        dout.transpose(1, 2), None, out.transpose(1, 2), lse, *call, needs
    )
    for grad, target in zip(results[:3], wanted.values(), strict=True):
        if target is not None:
            target.copy_(grad.transpose(1, 2))
    return (dout.float() * out.float()).sum(-1).transpose(1, 2)


# the names of flash-attn 2.8's torch.library wrappers, which are the same functions
NAMES = {
    "_flash_attn_backward": _flash_attn_backward,
    "_flash_attn_forward": _flash_attn_forward,
    "_wrapped_flash_attn_backward": _flash_attn_backward,
    "_wrapped_flash_attn_forward": _flash_attn_forward,
}
