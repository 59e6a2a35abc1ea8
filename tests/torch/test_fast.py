"""The short way of small eager calls (attn_ext/ops/fast.py): what it keeps apart, its length."""

import inspect
import itertools
import subprocess
import sys

import closeness
import pytest
import torch
from torch.func import grad

import attn_ext
from attn_ext.backends import cpu
from attn_ext.backends import looks as ways
from attn_ext.ops import autograd, fast

attention = attn_ext.attention


def leaves(**changes) -> dict:
    """A small call with mask and bias; the same numbers each time."""
    generator = torch.Generator().manual_seed(1)
    shapes = dict(q=(2, 4, 5, 8), k=(2, 2, 5, 8), v=(2, 2, 5, 8), bias=(4, 5, 5))
    call = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}
    return {**call, "mask": torch.ones(5, 5, dtype=torch.bool).tril(1), **changes}


def outcome(call: dict, **more):
    """Output and gradients, or the error."""
    try:
        out = attention(**call, **more)
    except (TypeError, ValueError, NotImplementedError) as error:
        return repr(error)
    if not isinstance(out, torch.Tensor):
        return out[0].detach(), *(x for x in out[1:] if isinstance(x, torch.Tensor))
    wanted = [x for x in call.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    if not (wanted and out.requires_grad):
        return (out,)
    return out.detach(), *torch.autograd.grad(out.square().sum(), wanted)


def assert_same(got, want):
    if isinstance(want, str):
        assert got == want
    else:
        closeness.assert_same(got, want)


def padded(x):
    """The same values with other strides."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wide[..., : x.shape[-1]] = x.detach()
    return wide[..., : x.shape[-1]].requires_grad_(x.requires_grad)


A = leaves()
CHANGES = {
    "q": [A["q"].detach(), A["q"][:, :2], A["q"].double(), padded(A["q"]), A["q"].transpose(1, 2),
          A["q"].numpy(force=True), A["q"].to_sparse(), A["q"].to("meta")],
    "k": [A["k"].detach(), A["k"][:, :1], A["k"].half(), padded(A["k"]), A["k"][:, :, :4], None],
    "v": [A["v"].detach(), A["v"][:1], A["v"].bfloat16(), padded(A["v"]), A["v"][..., :4], 1.0],
    "causal": [True, 1, "top_left", "bottom_right", "right", None, ["top_left"]],
    "window": [(1, None), (None, 1), (1.0, None), (True, None), [1, None], None, (1,), (0, 0)],
    "mask": [None, A["mask"][:4], A["mask"].float(), A["mask"].T, A["mask"][:1], A["mask"].tolist(),
             A["mask"].expand(2, 4, 5, 5)],
    "bias": [None, A["bias"].detach(), A["bias"][:1], A["bias"].double(), A["bias"][0, :, :1],
             A["bias"].transpose(1, 2), A["bias"].long(), padded(A["bias"]), 0.5],
    "softcap": [1.0, 1, True, -1.0, "1", float("nan")],
    "alibi_slopes": [torch.ones(4), torch.ones(2, 4), torch.ones(3), 1.0],
    "sink": [torch.ones(4), torch.ones(3), 1.0],
    "dropout_p": [0, False, 1.0, 2.0, None],
    "scale": [1.0, 1, True, 2.0, "1", float("nan")],
    "return_lse": [True, 1],
    "return_stats": [True, 1],
    "deterministic": [True, 1, None],
    "normalizer": ["sigmoid", "soft", None],
    "sigmoid_bias": [1.0],
    "backend": ["cpu", "reference", "none", None],
}  # fmt: skip


def test_the_table_has_every_argument():
    """An argument that is added to `attention` and not to this test."""
    assert set(CHANGES) == set(inspect.signature(attention).parameters)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_argument_is_another_call(name):
    """A call served by what is remembered of another one, which differs in a single argument."""
    for change in CHANGES[name]:
        fast._known.clear()
        alone = outcome(leaves(**{name: change}))
        for _ in range(3):  # the third is a remembered one
            outcome(leaves())
        assert fast._known
        for _ in range(2):
            assert_same(outcome(leaves(**{name: change})), alone)


@pytest.mark.parametrize("shape", [(5, 5), (4, 1, 5), (2, 4, 5, 5), (1, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_remembered_gradients_of_a_bias(shape, dtype):
    """A bias whose gradient is summed over a broadcast, or rounded, in the first call only."""
    generator = torch.Generator().manual_seed(2)
    call = leaves(bias=torch.randn(shape, generator=generator).to(dtype).requires_grad_())
    fast._known.clear()
    first = outcome(call)
    before = len(fast._known)
    assert before == 1
    assert_same(outcome(call), first)
    assert first[-1].shape == shape and first[-1].dtype == dtype
    with torch.no_grad():
        for _ in range(2):
            assert_same(attention(**call), first[0])


class Subclass(torch.Tensor):
    pass


def escaped() -> torch.Tensor:
    """A tensor that outlived the transform that wrapped it."""
    kept = []
    grad(lambda x: kept.append(x) or x.sum())(torch.ones(2, 3))
    return kept[0]


SEEN = {
    "absent": lambda: None,
    "plain": lambda: torch.zeros(2, 3),
    "other values": lambda: torch.ones(2, 3),
    "with a gradient": lambda: torch.ones(2, 3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2, 3)),
    "size": lambda: torch.ones(3, 2),
    "strides": lambda: torch.ones(3, 2).T,
    "dimensions": lambda: torch.ones(1, 2, 3),
    "one number": lambda: torch.ones(()),
    "empty": lambda: torch.ones(0, 3),
    "expanded": lambda: torch.ones(1).expand(2, 3),
    **{str(d): lambda d=d: torch.ones(2, 3).to(d) for d in (
        torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8,
        torch.int64, torch.complex64)},
    "negative bit": lambda: torch.ones(2, 3, dtype=torch.complex64).conj().imag,
    "meta": lambda: torch.ones(2, 3, device="meta"),
    "sparse": lambda: torch.ones(2, 3).to_sparse(),
    "subclass": lambda: torch.ones(2, 3).as_subclass(Subclass),
    "escaped": escaped,
    "list": lambda: [1.0],
    "number": lambda: 1.0,
}  # fmt: skip
UNSEEN = {"negative bit", "meta", "sparse", "subclass", "escaped", "list", "number"}


@pytest.mark.parametrize("looks", [ways.looks, ways._by_attributes], ids=["best", "attributes"])
def test_what_two_tensors_must_share_to_look_the_same(looks):
    """A plan that serves a tensor of other strides, or of another dtype of the same width; memory
    read that is not the CPU's, or does not hold the values."""
    tensors = {name: make() for name, make in SEEN.items()}
    found = {name: looks(x) for name, x in tensors.items()}
    assert {name for name, look in found.items() if look is None} == UNSEEN
    alike = ["plain", "other values", "with a gradient", "parameter"]
    assert len({found[name] for name in alike}) == 1
    apart = [found[name] for name in SEEN if name not in UNSEEN | set(alike[1:])]
    assert len(set(apart)) == len(apart)
    plain = tensors["plain"]
    assert looks(plain, None) != looks(None, plain) != looks(plain)
    assert looks(plain, tensors["list"]) is None


@pytest.mark.parametrize("name", CHANGES)
def test_without_the_table_of_dlpack(name, monkeypatch):
    """An older torch, where tensors are read by their attributes."""
    for module in (fast, autograd, cpu):
        monkeypatch.setattr(module, "looks", ways._by_attributes)
    cpu.forget()
    test_a_changed_argument_is_another_call(name)
    cpu.forget()


HOOKS = {
    "contiguous": lambda x: x.contiguous(),
    "padded": lambda x: padded(x) if x.is_floating_point() else x,
    "shorter": lambda x: x[..., :-1],
    "other dtype": lambda x: x.half(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_saved_tensors(hook, remembered):
    """A saved tensor that a hook has replaced by one of another layout, read as the old one."""
    q = torch.randn(2, 5, 4, 8).transpose(1, 2).requires_grad_()
    call = dict(q=q, k=q, v=q, causal=True)
    if not remembered:
        call["sink"] = torch.zeros(4)
    for _ in range(2):
        want = outcome(call)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, HOOKS[hook]):
        out = attention(**call)
    if hook in ("contiguous", "padded"):
        assert_same(torch.autograd.grad(out.square().sum(), q), want[1:2])
    else:
        with pytest.raises((ValueError, TypeError), match="must"):
            torch.autograd.grad(out.square().sum(), q)


@pytest.mark.parametrize("kind", ["view", "expanded", "shorter"])
def test_hooks_of_the_output(kind):
    """A gradient of other strides or another shape than the output, read as if it were alike."""
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    weights = torch.randn(1, 2, 8, 4).transpose(2, 3)
    weights = torch.ones(()).expand(1, 2, 4, 8) if kind == "expanded" else weights
    want = torch.autograd.grad(attention(q, q, q), q, weights.contiguous())
    for _ in range(3):
        out = attention(q, q, q)
        if kind == "shorter":
            out.register_hook(lambda g: g[:, :, :2])
            with pytest.raises((ValueError, RuntimeError)):
                torch.autograd.grad(out, q, weights)
        else:
            assert_same(torch.autograd.grad(out, q, weights), want)


def test_a_tensor_that_outlives_its_transform():
    """A tensor leaked out of torch.func.grad, which torch's own operators unwrap, has no memory."""
    leaked = []
    q = torch.randn(1, 2, 5, 4)

    def f(q):
        leaked.append(q)
        return attention(q, q, q).sum()

    grad(f)(q)
    for leaf, _ in itertools.product((q, q.clone().requires_grad_()), range(2)):
        want = attention(leaf, leaf, leaf)
        torch.testing.assert_close(attention(*leaked * 3), want)
    with torch.no_grad():
        torch.testing.assert_close(attention(*leaked * 3), want.detach())


def test_sdpa_keeps_its_own_rules():
    """What `attention` allows and torch does not, served because `attention` has seen it."""
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool)
    sdpa = attn_ext.scaled_dot_product_attention
    for _ in range(2):
        attention(q, k, k, causal="top_left", mask=mask)
        attention(q, k, k)
        with pytest.raises(ValueError):
            sdpa(q, k, k)
        assert_same(sdpa(q, k, k, enable_gqa=True), attention(q, k, k))
        assert_same(sdpa(q, k, k, mask, enable_gqa=True), attention(q, k, k, mask=mask))


@pytest.mark.parametrize("what", ["plain", "mask", "bias", "sdpa"])
def test_a_remembered_call_is_short(what):
    """Work that creeps into a small call: these are all Python functions that a remembered forward
    and backward enter, 19 of torch's own included (37 to 39 when this was written).
    """
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    seed = torch.ones(1, 1, 4, 8)
    options = {"mask": dict(mask=torch.ones(4, 4, dtype=torch.bool)),
               "bias": dict(bias=torch.zeros(4, 4))}.get(what, {})  # fmt: skip
    function = attn_ext.scaled_dot_product_attention if what == "sdpa" else attention
    entered = []
    for _ in range(3):
        entered.clear()
        sys.setprofile(lambda frame, event, arg: entered.append(frame) if event == "call" else None)
        try:
            function(q, k, v, **options).backward(seed)
        finally:
            sys.setprofile(None)
    names = [frame.f_code.co_name for frame in entered]
    assert len(names) <= 45, names


def test_import_leaves_the_flop_counter_alone():
    """torch.utils.flop_counter, which loads Triton, imported by `import attn_ext`; or formulas
    that do not come when it is imported later.
    """
    code = (
        "import sys, torch; before = set(sys.modules); import attn_ext; "
        "loaded = set(sys.modules) - before; "
        "assert 'torch.utils.flop_counter' not in loaded and 'triton' not in loaded; "
        "from torch.utils.flop_counter import flop_registry; "
        "assert torch.ops.attn_ext.forward in flop_registry; "
        "assert torch.ops.attn_ext.backward in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
