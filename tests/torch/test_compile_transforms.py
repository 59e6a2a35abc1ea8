"""torch.func's transforms inside torch.compile: the values of eager mode, in one graph.

torch.compile traces a transform by running the operator within it, so these also hold the
derivative and the vmap rule that the operators register.
"""

import pytest
import torch
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap

import attn_ext


@pytest.fixture(autouse=True)
def without_fallback():
    """No graph of another test, and no loop over examples where a vmap rule is missing."""
    torch._dynamo.reset()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


CU_SEQLENS = torch.tensor([0, 3, 5], dtype=torch.int32)


def dense(q, k, v, bias):
    return attn_ext.attention(q, k, v, bias=bias, causal="bottom_right", softcap=4.0)


def with_sink(q, k, v, bias):
    return attn_ext.attention(q, k, v, sink=bias[:, 0, 0], causal=True)


def sdpa(q, k, v, bias):
    return attn_ext.scaled_dot_product_attention(q, k, v, bias)


def varlen(q, k, v, bias):
    packed = (x[0].transpose(0, 1) for x in (q, k, v))
    return attn_ext.attention_varlen(*packed, CU_SEQLENS, CU_SEQLENS, 3, 3, bias=bias[:, :3, :3])


def additive(q, k, v, bias):
    return attn_ext.additive_attention(q, k, v, bias[0, 0, :4].exp(), bias=bias, causal=True)


CALLS = {f.__name__: f for f in (dense, with_sink, sdpa, varlen, additive)}


def transformed(call) -> dict:
    """Each transform of `call`, a function of q, k, v [B, H, S, D], bias [H, S, S] and examples, a
    stack of three q."""
    loss = lambda *inputs: call(*inputs).square().sum()  # noqa: E731
    every = (0, 1, 2, 3)
    mapped = (0, None, None, None)

    def pull(examples, *inputs):
        out, pullback = vjp(call, *inputs)
        return out, pullback(out.cos())

    return {
        "grad": lambda examples, *inputs: grad(loss, every)(*inputs),
        "grad_and_value": lambda examples, *inputs: grad_and_value(loss, every)(*inputs),
        "vjp": pull,
        "jacrev": lambda examples, *inputs: jacrev(call, (0, 3))(*inputs),
        "vmap": lambda x, q, k, v, bias: vmap(call, mapped)(x, k, v, bias),
        "vmap_grad": lambda x, q, k, v, bias: vmap(grad(loss, every), mapped)(x, k, v, bias),
        "grad_vmap": lambda x, q, *rest: grad(lambda y: vmap(loss, mapped)(y, *rest).sum())(x),
        "vmap_vmap": lambda x, q, *rest: vmap(lambda y: vmap(call, mapped)(y, *rest))(x[None]),
    }


def inputs():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    return torch.randn(3, 1, 2, 5, 4), q, k, v, torch.randn(2, 5, 5)


def check(function, compiler: str):
    want = function(*inputs())
    got = torch.compile(function, fullgraph=True, backend=compiler)(*inputs())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", transformed(dense))
def test_transforms_of_attention(transform):
    """A transform that torch.compile cannot trace, or traces to other values."""
    check(transformed(dense)[transform], "aot_eager")


@pytest.mark.parametrize("call", [c for c in CALLS if c != "dense"])
def test_transforms_of_the_other_calls(call):
    """A public call, or an input that does not fold into the batch, left out of the rules."""
    names = ("grad", "jacrev", "vmap_grad")
    every = [transformed(CALLS[call])[name] for name in names]
    check(lambda *values: [f(*values) for f in every], "aot_eager")


def test_transforms_in_generated_code():
    """Inductor's own strides or decompositions between the operators."""
    every = [transformed(dense)[name] for name in ("vjp", "vmap_grad", "grad_vmap")]
    check(lambda *values: [f(*values) for f in every], "inductor")


def test_gradients_of_a_compiled_vmap():
    """autograd around the compiled graph: the rule's own derivative is missing in it."""
    examples, _, k, v, bias = inputs()
    leaves = [x.requires_grad_() for x in (examples, k, v, bias)]
    f = lambda *values: vmap(dense, (0, None, None, None))(*values)  # noqa: E731
    want = torch.autograd.grad(f(*leaves).square().sum(), leaves)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), want)


def test_what_is_refused_names_attn_ext():
    """A second derivative or a tangent that is silently wrong in a graph, or an error that does
    not say whose it is."""
    _, *values = inputs()
    f = lambda q: additive(q, *values[1:]).square().sum()  # noqa: E731
    twice = lambda q: grad(lambda q: grad(f)(q).square().sum())(q)  # noqa: E731
    forward = lambda q: jvp(f, (q,), (q,))  # noqa: E731
    for function, what in ((twice, "no double backward"), (forward, "no forward-mode AD")):
        with pytest.raises(NotImplementedError, match=f"attn_ext has {what} of additive"):
            function(values[0])
        with pytest.raises(Exception, match=f"attn_ext has {what}"):  # of torch.compile's own class
            torch.compile(function, fullgraph=True, backend="aot_eager")(values[0])
