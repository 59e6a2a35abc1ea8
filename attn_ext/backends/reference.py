"""The oracle as a backend: serves every problem on every device, in O(Sq * Sk) memory.

Forward is `attn_ext.core.reference.attend`; backward runs it again under autograd.  As on the other
backends, 16-bit inputs are computed with in float32 and results rounded once.  `naive` and
`forward_and_backward` compute in the inputs' dtype: the rule of tolerance is made of their error.
"""

from __future__ import annotations

import torch

from attn_ext.core import reference
from attn_ext.core.layout import empty_like_layout
from attn_ext.core.problem import MAPS, Problem  # noqa: F401
from attn_ext.core.schema import GRADIENTS, Call, Grads, Needs, given

NORMALIZERS = ("softmax", "sigmoid")
SCORES = ("dot", "additive")
FRAMES = True


def available() -> str:
    """Always: it needs nothing but torch."""
    return ""


def unsupported(problem: Problem) -> list[str]:
    """Never a reason."""
    return []


def _in_float32(call: Call) -> Call:
    """The call with q, k and v of 16 bits in float32."""
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return call
    return call._replace(q=call.q.float(), k=call.k.float(), v=call.v.float())


@torch.no_grad()
def forward(call: Call):
    """(out, lse, max_logit | None, entropy | None); out in the memory order of q."""
    result, lse, max_logit, entropy = reference.attend(_in_float32(call))
    out = empty_like_layout(call.q, call.v.shape[-1])
    out.copy_(result)
    return out, lse, max_logit, entropy


@torch.no_grad()
def naive(call: Call):
    """What `forward` gives, computed in the inputs' dtype."""
    return reference.attend(call)


def backward(call: Call, dout, out, lse, dlse, needs: Needs) -> Grads:
    """The gradients; None where `needs` says so."""
    wide = _in_float32(call._replace(need_stats=False))
    grads = forward_and_backward(wide, dout.to(wide.q.dtype), dlse, needs)[1]
    pairs = {name: (getattr(grads, name), getattr(call, name)) for name in GRADIENTS}
    return Grads(**{name: g if g is None else g.to(x.dtype) for name, (g, x) in pairs.items()})


def forward_and_backward(call: Call, dout, dlse, needs: Needs) -> tuple[tuple, Grads]:
    """What `naive` gives, and its gradients."""
    leaves = {
        name: getattr(call, name).detach().requires_grad_()
        for name in GRADIENTS
        if getattr(needs, name) and getattr(call, name) is not None
    }
    # `call` may hold tensors that are part of the caller's graph; autograd must stop at our leaves
    held = {name: x.detach() for name, x in given(call).items()}
    with reference.recording():
        results = reference.attend(call._replace(**{**held, **leaves}))
    outputs, grads = [results[0]], [dout]
    if dlse is not None:
        outputs.append(results[1])
        grads.append(dlse.to(results[1].dtype))
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = dict.fromkeys(leaves)
    if pairs and leaves:
        outs, seeds = zip(*pairs, strict=True)
        values = torch.autograd.grad(outs, list(leaves.values()), seeds, allow_unused=True)
        found = dict(zip(leaves, values, strict=True))
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items() if found[name] is None}
    return tuple(x if x is None else x.detach() for x in results), Grads(**found | zeros)
