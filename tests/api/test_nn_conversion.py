"""attn_ext.nn.convert and revert: which modules change their class, which are named and left, and
that nothing else of a model changes.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from attn_ext.nn import MultiheadAttention, convert, converted, revert

E, H = 8, 2
X = torch.randn(2, 5, E, generator=torch.Generator().manual_seed(0))


def made(kind=nn.MultiheadAttention, **options):
    torch.manual_seed(0)
    return kind(E, H, batch_first=True, **options)


class Named(nn.MultiheadAttention):
    """A subclass that leaves the computation to torch."""

    def __init__(self, *arguments, note="note", **options):
        super().__init__(*arguments, **options)
        self.note = note

    def describe(self):
        return f"{self.note} {self.num_heads}"


class Doubling(nn.MultiheadAttention):
    """A subclass that computes something else."""

    def forward(self, *arguments, **options):
        out, weights = super().forward(*arguments, **options)
        return 2 * out, weights


class Adapted(nn.Linear):
    """An out_proj that torch's attention never calls: only its weight is read."""

    def forward(self, x):
        return super().forward(x) + 1


class Twice(nn.Module):
    def forward(self, w):
        return 2 * w


def parametrized(name):
    module = made()
    parametrize.register_parametrization(module, name, Twice())
    return module


def replaced():
    module = made()
    module.forward = lambda *arguments, **options: (X, None)
    return module


def adapted():
    module = made()
    module.out_proj = Adapted(E, E)
    return module


def old_weight_norm():
    module = made()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, "in_proj_weight")


def orthogonal_output():
    module = made()
    parametrizations.orthogonal(module.out_proj)
    return module


SAFE = {
    "subclass": lambda: made(Named),
    "subclass_of_subclass": lambda: made(type("Further", (Named,), {})),
    "parametrized": lambda: parametrized("in_proj_weight"),
    "parametrized_bias": lambda: parametrized("in_proj_bias"),
    "weight_norm": lambda: parametrizations.weight_norm(made(), "in_proj_weight"),
    "spectral_norm": lambda: parametrizations.spectral_norm(made(), "in_proj_weight"),
    "old_weight_norm": old_weight_norm,
    "parametrized_output": orthogonal_output,
    "parametrized_keys": lambda: parametrizations.weight_norm(made(kdim=E, vdim=4), "v_proj_weight")
}  # fmt: skip


def gradients(module):
    """The output of a call and the gradients of all parameters."""
    value = X if module.vdim == E else X[..., : module.vdim]
    out = module(X, X, value, need_weights=False)[0]
    wanted = [p for p in module.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("case", SAFE)
def test_converted_and_back(case):
    """A module left in silence, other results, a parameter or a key of state_dict changed; a class
    that revert cannot undo.
    """
    module, frozen = SAFE[case](), SAFE[case]()
    module.out_proj.bias.requires_grad_(False)
    frozen.out_proj.bias.requires_grad_(False)
    if case == "spectral_norm":  # in training it iterates at each look: torch takes several
        module.eval(), frozen.eval()
    kind, keys = type(module), list(module.state_dict())
    parameters = dict(module.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(module) is module
    assert isinstance(module, MultiheadAttention) and isinstance(module, kind.__mro__[1])
    assert list(module.state_dict()) == keys and converted(module) == (("",), {})
    assert all(p is parameters[name] for name, p in module.named_parameters())
    for mine, theirs in zip(gradients(module), gradients(frozen), strict=True):
        if mine is not None or theirs is not None:
            torch.testing.assert_close(mine, theirs)
    assert type(module).__name__ == kind.__name__
    revert(module)
    assert not isinstance(module, MultiheadAttention)
    assert type(module).__name__ == kind.__name__ and type(module).__mro__[1:] == kind.__mro__[1:]
    torch.testing.assert_close(gradients(module.eval())[0], gradients(frozen.eval())[0])


def test_a_parametrization_can_be_removed_after_convert():
    """The class below a parametrization, to which its removal goes back, still torch's."""
    module = parametrized("in_proj_weight")
    expected = module.in_proj_weight.detach().clone()
    parametrize.remove_parametrizations(convert(module), "in_proj_weight")
    assert type(module) is MultiheadAttention
    torch.testing.assert_close(module.in_proj_weight.detach(), expected)
    parametrize.register_parametrization(module, "in_proj_weight", Twice())
    assert type(revert(module)).__mro__[1] is nn.MultiheadAttention


def test_a_converted_subclass_is_still_one():
    """Its own methods, isinstance, deepcopy and pickle lost with the class."""
    module = convert(made(Named))
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(other, Named) and isinstance(other, MultiheadAttention)
        assert other.describe() == "note 2"
        torch.testing.assert_close(other(X, X, X)[0], module(X, X, X)[0])
    assert type(revert(pickle.loads(pickle.dumps(module)))) is Named


LEFT = {
    "forward": (lambda: made(Doubling), "Doubling has code of its own: forward"),
    "quantizable": (lambda: made(torch.ao.nn.quantizable.MultiheadAttention), "of its own"),
    "replaced": (replaced, "its forward was replaced"),
    "out_proj": (adapted, "its out_proj, a Adapted, has a forward"),
    "scripted": (lambda: torch.jit.script(made()), "torch.jit.script"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_and_named(case):
    """What computes by code of its own converted, or left without a word."""
    make, why = LEFT[case]
    module = make()
    model = nn.ModuleDict({"a": made(), "b": module})
    kind = type(module)
    with pytest.warns(UserWarning, match=f"convert leaves 1 .*: b .*{why}") as caught:
        convert(model)
    assert len(caught) == 1 and type(model["b"]) is kind
    found = converted(model)
    assert found.converted == ("a",) and why in found.left["b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        revert(model)


def test_revert_names_what_was_never_torchs():
    """A subclass of attn_ext's own class, which has no other class to go back to."""

    class Own(MultiheadAttention):
        pass

    model = nn.Sequential(Own(E, H), convert(made()))
    with pytest.warns(UserWarning, match=r"revert leaves 1 .*: 0 \(Own is a subclass"):
        revert(model)
    assert type(model[0]) is Own and type(model[1]) is nn.MultiheadAttention


def test_shared_modules_hooks_and_modes_stay():
    """One module at two places made two; hooks, modes, dtypes or an optimizer's hold lost."""
    shared = made(dropout=0.5).double().eval()
    seen = []
    shared.register_forward_hook(lambda module, inputs, out: seen.append(type(module)))
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    optimizer = torch.optim.SGD(shared.parameters(), lr=0.1)
    convert(model)
    assert model["a"] is model["b"][0] is shared and not shared.training
    assert converted(model).converted == ("a",)
    before = shared.in_proj_weight.detach().clone()
    x = X.double()
    shared(x, x, x)[0].square().sum().backward()
    optimizer.step()
    assert seen == [MultiheadAttention] and not torch.equal(before, shared.in_proj_weight)
