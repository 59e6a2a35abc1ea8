"""Second derivatives and forward mode of a call, against autograd on the reference.

With f(inputs) = (O, LSE), g(inputs, G, lam) the gradients of <G, O> + <lam, LSE>, and tangents t of
the inputs, this is what attention has beyond its gradients:

    the tangents of O and LSE                       d<t, g> / dG, d<t, g> / dlam
    double backward                                 d<t, g> / dinputs
    the tangent of g, with tangents of G and lam    the same, and g(inputs, tG, tlam)
"""

from typing import NamedTuple

import torch
import torch.autograd.forward_ad as fwad
from closeness import SECOND, assert_close

from attn_ext.backends import blocked
from attn_ext.core import reference
from attn_ext.core.schema import GRADIENTS, Call, Needs, Rows, Tangents, given, statistics_dtype
from attn_ext.ops import execute, route
from attn_ext.testing import assert_close_to_reference, needs_of, to_float64


class Seeds(NamedTuple):
    """Tangents of the inputs by name, G and lam, and tangents of these two."""

    tangents: dict
    dout: torch.Tensor
    dlse: torch.Tensor
    tdout: torch.Tensor
    tdlse: torch.Tensor

    def double(self):
        return Seeds(
            {n: t.double() for n, t in self.tangents.items()}, *(x.double() for x in self[1:])
        )


def seeds_of(call: Call, seed: int = 7) -> Seeds:
    """Normal ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    out, lse, _, _ = reference.attend(call._replace(need_stats=False))
    stat = statistics_dtype(call.q.dtype)
    rows = [normal(*pair) for pair in ((out.shape, out.dtype), (lse.shape, stat)) * 2]
    return Seeds({n: normal(x.shape, x.dtype) for n, x in given(call).items()}, *rows)


def _double_backward(call: Call, seeds: Seeds, attend) -> dict:
    """By torch.autograd.grad twice, of a function of a Call."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in given(call).items()}
    again = call._replace(**leaves, grad=True, bias_grad=call.bias is not None)
    out, lse = attend(again)[:2]
    dout, dlse = seeds.dout.clone().requires_grad_(), seeds.dlse.clone().requires_grad_()
    inputs = list(leaves.values())
    first = torch.autograd.grad((out, lse), inputs, (dout, dlse), create_graph=True)
    assert all(g.requires_grad for g in first), "a gradient without a graph"
    tangents = [seeds.tangents[n] for n in leaves]
    twice = torch.autograd.grad(
        first, [*inputs, dout, dlse], tangents, retain_graph=True, materialize_grads=True
    )
    named = {f"second {n}": g for n, g in zip(leaves, twice, strict=False)}
    named |= {f"first {n}": g for n, g in zip(leaves, first, strict=True)}
    return {**named, "tangent out": twice[-2], "tangent lse": twice[-1]}, leaves, (out, lse)


def _with_moved(found: dict, leaves: dict, outputs, seeds: Seeds) -> dict:
    """Adds the tangents of the gradients, which have those of G and lam in them, too."""
    moved = torch.autograd.grad(outputs, list(leaves.values()), (seeds.tdout, seeds.tdlse))
    for name, grad in zip(leaves, moved, strict=True):
        found[f"moved {name}"] = found[f"second {name}"] + grad
    return found


def by_reference(call: Call, seeds: Seeds) -> dict:
    """All of it by autograd on the reference, in the dtype of the call."""
    return _with_moved(*_double_backward(call, seeds, reference.attend), seeds)


def by_double_backward(call: Call, seeds: Seeds) -> dict:
    """Ours, by the functions that users call."""
    found, _, _ = _double_backward(call, seeds, route.run)
    return found


def by_forward_mode(call: Call, seeds: Seeds) -> dict:
    """Ours under a dual level: the tangents of O and LSE, and of the gradients."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in given(call).items()}
    with fwad.dual_level():
        duals = {n: fwad.make_dual(x, seeds.tangents[n]) for n, x in leaves.items()}
        again = call._replace(**duals, grad=True, bias_grad=call.bias is not None)
        outputs = route.run(again)[:2]
        rows = ((seeds.dout, seeds.tdout), (seeds.dlse, seeds.tdlse))
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), [fwad.make_dual(*pair) for pair in rows]
        )
        tangents = [fwad.unpack_dual(x).tangent for x in outputs]
        moved = [fwad.unpack_dual(x).tangent for x in gradients]
    found = {f"moved {n}": g for n, g in zip(leaves, moved, strict=True)}
    return {**found, "tangent out": tangents[0], "tangent lse": tangents[1]}


def by_passes(call: Call, seeds: Seeds, module=blocked) -> dict:
    """By the two passes of a module, and the gradients that the second gives beside.  The module
    must serve the call."""
    tangents, needs = Tangents(**seeds.tangents), needs_of(call)
    out, lse = execute.forward(call._replace(grad=False))[:2]
    rows = Rows(out=out, lse=lse)
    tout, tlse = module.tangent(call, tangents, rows)
    found = {"tangent out": tout, "tangent lse": tlse}
    rows = rows._replace(dout=seeds.dout, dlse=seeds.dlse, tout=tout, tlse=tlse)
    twice, first = module.backward_tangent(call, tangents, rows, needs, needs)
    rows = rows._replace(tdout=seeds.tdout, tdlse=seeds.tdlse)
    moved, _ = module.backward_tangent(call, tangents, rows, needs, Needs())
    for kind, grads in (("second", twice), ("first", first), ("moved", moved)):
        values = zip(GRADIENTS, grads, strict=True)
        found |= {f"{kind} {name}": x for name, x in values if x is not None}
    return found


def by_moved(call: Call, seeds: Seeds, module) -> dict:
    """By one call of each of the two passes: the tangents of O and LSE, and of the gradients."""
    tangents = Tangents(**seeds.tangents)
    rows = Rows(*seeds[1:3], *reference.attend(call._replace(need_stats=False))[:2])
    tout, tlse = module.tangent(call, tangents, rows)
    rows = rows._replace(tout=tout, tlse=tlse, tdout=seeds.tdout, tdlse=seeds.tdlse)
    moved, _ = module.backward_tangent(call, tangents, rows, needs_of(call), Needs())
    values = zip(GRADIENTS, moved, strict=True)
    found = {f"moved {name}": x for name, x in values if x is not None}
    return {**found, "tangent out": tout, "tangent lse": tlse}


def check_float64(call: Call, ways=(by_double_backward, by_forward_mode)) -> None:
    """Each way against the reference, in float64."""
    seeds = seeds_of(call)
    want = by_reference(call, seeds)
    for way in ways:
        found = way(call, seeds)
        for name, got in found.items():
            if name in want:
                assert_close(got, want[name], SECOND)


def check_dtype(call: Call, ways=(by_double_backward, by_forward_mode)) -> None:
    """Each result under the rule of attn_ext.testing, whose factor for outputs holds for all."""
    seeds = seeds_of(call)
    truths, naives = by_reference(to_float64(call), seeds.double()), by_reference(call, seeds)
    for way in ways:
        for name, got in way(call, seeds).items():
            truth, naive = truths[name].detach(), naives[name].detach()
            assert got.dtype == naive.dtype, name
            assert_close_to_reference(got, truth, naive, "out", name, call.q.dtype)
