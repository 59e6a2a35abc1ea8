"""The oracle as a backend: serves every problem on every device, in O(Sq * Sk) memory.

Forward is `attn_ext.core.reference.attend`; backward runs it again under autograd.
"""

from __future__ import annotations

import torch

from attn_ext.core import reference
from attn_ext.core.layout import empty_like_layout
from attn_ext.core.problem import MAPS, Problem  # noqa: F401
from attn_ext.core.schema import GRADIENTS, Call, Grads, Needs, given

NORMALIZERS = ("softmax", "sigmoid")
SCORES = ("dot", "additive")


def available() -> str:
    """Always: it needs nothing but torch."""
    return ""


def unsupported(problem: Problem) -> list[str]:
    """Never a reason."""
    return []


@torch.no_grad()
def forward(call: Call):
    """(out, lse, max_logit | None, entropy | None); out in the memory order of q."""
    result, lse, max_logit, entropy = reference.attend(call)
    out = empty_like_layout(call.q, call.v.shape[-1])
    out.copy_(result)
    return out, lse, max_logit, entropy


def backward(call: Call, dout, out, lse, dlse, needs: Needs) -> Grads:
    """The gradients; None where `needs` says so."""
    leaves = {
        name: getattr(call, name).detach().requires_grad_()
        for name in GRADIENTS
        if getattr(needs, name) and getattr(call, name) is not None
    }
    # `call` may hold tensors that are part of the caller's graph; autograd must stop at our leaves
    held = {name: x.detach() for name, x in given(call).items()}
    with reference.recording():
        again = call._replace(**{**held, **leaves, "need_stats": False})
        result, result_lse, _, _ = reference.attend(again)
    outputs, grads = [result], [dout]
    if dlse is not None:
        outputs.append(result_lse)
        grads.append(dlse.to(result_lse.dtype))
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = dict.fromkeys(leaves)
    if pairs and leaves:
        outs, seeds = zip(*pairs, strict=True)
        values = torch.autograd.grad(outs, list(leaves.values()), seeds, allow_unused=True)
        found = dict(zip(leaves, values, strict=True))
    return Grads(
        **{
            name: torch.zeros_like(leaf) if found[name] is None else found[name]
            for name, leaf in leaves.items()
        }
    )
