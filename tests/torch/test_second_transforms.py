"""Every way that torch has to ask for a second derivative or a tangent, against torch operations;
and what is refused.
"""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwad
from closeness import FLOAT32, assert_close
from torch.autograd import functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import attn_ext

EVERY = (0, 1, 2, 3)


@pytest.fixture(autouse=True)
def without_fallback():
    """No graph of another test, and no loop over examples where a vmap rule is missing."""
    torch._dynamo.reset()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def ours(q, k, v, bias):
    return attn_ext.attention(q, k, v, bias=bias, causal=True, softcap=2.0, return_lse=True)


def with_sink(q, k, v, bias):
    return attn_ext.attention(q, k, v, sink=bias[:, 0, 0], causal=True, return_lse=True)


def written_out(q, k, v, bias):
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = 2.0 * torch.tanh(s / 2.0) + bias
    s = torch.where(torch.ones_like(s).tril().bool(), s, -1e30)
    total = torch.exp(s).sum(-1, keepdim=True)
    return torch.exp(s) / total @ v, total.log().squeeze(-1)


def sink_written_out(q, k, v, bias):
    s = q @ k.mT * q.shape[-1] ** -0.5
    s = torch.where(torch.ones_like(s).tril().bool(), s, -1e30)
    total = torch.exp(s).sum(-1, keepdim=True) + torch.exp(bias[:, 0, 0])[:, None, None]
    return torch.exp(s) / total @ v, total.log().squeeze(-1)


def inputs():
    torch.manual_seed(0)
    shapes = ((1, 2, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2), (2, 3, 3))
    return tuple(torch.randn(s, dtype=torch.float64) for s in shapes)


X = inputs()
T = tuple(x.cos() for x in X)
MANY = tuple(torch.stack([x, x.sin(), 2 * x]) for x in X)


def loss_of(f):
    return lambda *x: f(*x)[0].cos().sum() + f(*x)[1].sin().sum()


def leaves():
    return [x.clone().requires_grad_() for x in X]


def first_by_create_graph(f, x):
    return torch.autograd.grad(loss_of(f)(*x), x, create_graph=True)


def twice_by_create_graph(f):
    x = leaves()
    first = first_by_create_graph(f, x)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(first, T, strict=True)), x)


def twice_by_checkpoint(f):
    x = leaves()
    out = checkpoint(loss_of(f), *x, use_reentrant=False)
    first = torch.autograd.grad(out, x, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), x)


def duals(x=X):
    return [fwad.make_dual(a, t) for a, t in zip(x, T, strict=True)]


def dual_level(f):
    with fwad.dual_level():
        return [fwad.unpack_dual(y).tangent for y in f(*duals())]


def backward_of_a_dual_level(f):
    """Gradients of tangents, in the inputs and in their tangents."""
    x, t = leaves(), [y.clone().requires_grad_() for y in T]
    with fwad.dual_level():
        out = [fwad.unpack_dual(y) for y in f(*map(fwad.make_dual, x, t))]
    return torch.autograd.grad(sum((y.tangent.sin() * y.primal).sum() for y in out), x + t)


def backward_within_a_dual_level(f):
    x = leaves()
    with fwad.dual_level():
        first = torch.autograd.grad(loss_of(f)(*duals(x)), x)
        return [fwad.unpack_dual(y).tangent for y in first]


def dual_gradient_of_a_graph(f):
    """The graph is older than the dual level: its function is the one of plain calls."""
    x = leaves()
    out = f(*x)[0]
    with fwad.dual_level():
        dout = fwad.make_dual(out.detach().sin(), out.detach())
        first = torch.autograd.grad(out, x, dout)
        return [fwad.unpack_dual(y).tangent for y in first]


def backward_of_func_jvp(f):
    """How MeanFlow trains: leaves of autograd within torch.func.jvp."""
    x = leaves()
    out, tangents = jvp(f, tuple(x), T)
    return torch.autograd.grad(sum(y.sin().sum() for y in (*out, *tangents)), x)


TRANSFORMS = {
    "jvp": lambda f: jvp(f, X, T),
    "jacfwd": lambda f: jacfwd(f, EVERY)(*X),
    "jacrev": lambda f: jacrev(f, EVERY)(*X),
    "hessian": lambda f: hessian(loss_of(f), EVERY)(*X),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(loss_of(f)), EVERY)(*X),
    "jvp(grad)": lambda f: jvp(grad(loss_of(f), EVERY), X, T),
    "jvp(vjp)": lambda f: jvp(lambda *x: vjp(f, *x)[1](f(*X)), X, T),
    "grad(grad)": lambda f: grad(
        lambda *x: sum(g.cos().sum() for g in grad(loss_of(f), EVERY)(*x)), EVERY
    )(*X),
    "grad(jvp)": lambda f: grad(lambda *x: jvp(loss_of(f), x, T)[1], EVERY)(*X),
    "grad(jvp) in tangents": lambda f: grad(lambda *t: jvp(loss_of(f), X, t)[1].cos(), EVERY)(*T),
    "vmap(jvp)": lambda f: vmap(lambda *x: jvp(f, x, T))(*MANY),
    "vmap(jvp), tangents alone": lambda f: vmap(lambda *t: jvp(f, X, t))(*MANY),
    "vmap(jvp(grad))": lambda f: vmap(lambda *x: jvp(grad(loss_of(f), EVERY), x, T))(*MANY),
    "vmap(grad(grad))": lambda f: vmap(
        grad(lambda *x: sum(g.cos().sum() for g in grad(loss_of(f), EVERY)(*x)), EVERY)
    )(*MANY),
    "vmap(grad(jvp))": lambda f: vmap(grad(lambda *x: jvp(loss_of(f), x, T)[1], EVERY))(*MANY),
    "jvp(vmap)": lambda f: jvp(vmap(f), MANY, tuple(x.cos() for x in MANY)),
    "linearize": lambda f: torch.func.linearize(f, *X)[1](*T),
    "functional.vhp": lambda f: functional.vhp(loss_of(f), X, T),
    "functional.jvp": lambda f: functional.jvp(f, X, T),
    "functional.hessian": lambda f: functional.hessian(loss_of(f), X),
    "functional.hessian, vectorized": lambda f: functional.hessian(loss_of(f), X, vectorize=True),
    "functional.hessian, forward": lambda f: functional.hessian(
        loss_of(f), X, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.jacobian, forward": lambda f: functional.jacobian(
        f, X, vectorize=True, strategy="forward-mode"
    ),
    **{
        f.__name__: f
        for f in (
            twice_by_create_graph, twice_by_checkpoint, dual_level, backward_of_a_dual_level,
            backward_within_a_dual_level, dual_gradient_of_a_graph, backward_of_func_jvp,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name):
    """A way that loses the graph or a tangent, or folds a mapped dimension into a wrong place."""
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(ours), transform(written_out))


@pytest.mark.parametrize("name", ["jacfwd", "hessian", "vmap(jvp(grad))", "vmap(grad(jvp))"])
def test_transform_with_a_sink(name):
    """A sink for each example, which does not fold into the batch."""
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(with_sink), transform(sink_written_out))


@pytest.mark.parametrize("name", ["jvp", "jacfwd", "grad(jvp)", "functional.jvp"])
def test_transform_by_the_reference(name):
    """torch's refusal of a Function within the reference, to which calls of wide heads come."""

    def by_reference(*x):
        return attn_ext.attention(*x[:3], bias=x[3], causal=True, softcap=2.0, return_lse=True,
                                  backend="reference")  # fmt: skip

    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(by_reference), transform(written_out))
    q = torch.randn(1, 1, 2, 513)
    tangent = jvp(lambda q: attn_ext.attention(q, q, q), (q,), (q,))[1]
    assert tangent.isfinite().all()


BY_KERNELS = (
    "jvp", "jvp(grad)", "grad(grad)", "grad(jvp)", "vmap(jvp(grad))", "twice_by_create_graph",
    "twice_by_checkpoint", "backward_of_a_dual_level", "backward_of_func_jvp",
    "functional.hessian, vectorized",
)  # fmt: skip


@pytest.mark.parametrize("name", BY_KERNELS)
def test_transform_by_kernels(name, monkeypatch):
    """The same in float32, which the cpu backend's kernels serve: tensors that a transform has
    wrapped, or strides that the kernels do not know."""
    want = TRANSFORMS[name](written_out)
    for values in ("X", "T", "MANY"):
        monkeypatch.setitem(globals(), values, tuple(x.float() for x in globals()[values]))
    got = TRANSFORMS[name](ours)
    flat, truth = (torch.utils._pytree.tree_leaves(x) for x in (got, want))
    assert len(flat) == len(truth)
    for x, y in zip(flat, truth, strict=True):
        assert_close(x.double(), y, FLOAT32)


def test_a_remembered_call():
    """The short way of small calls, whose backward knows nothing of second derivatives."""

    def remembered(q, k, v, bias):
        out = attn_ext.attention(q, k, v)
        return out * bias.sum(), out.sum()

    def wide(q, k, v, bias):
        out = (q @ k.mT * 2**-0.5).softmax(-1) @ v
        return out * bias.sum(), out.sum()

    for name in ("twice_by_create_graph", "dual_level", "dual_gradient_of_a_graph"):
        for _ in range(2):
            got = TRANSFORMS[name](remembered)
        torch.testing.assert_close(got, TRANSFORMS[name](wide))


def test_three_forms_of_a_hessian_vector_product():
    """One of the passes differs from the other by more than rounding."""
    reverse = twice_by_create_graph(ours)
    forward = jvp(grad(loss_of(ours), EVERY), X, T)[1]
    mixed = grad(lambda *x: jvp(loss_of(ours), x, T)[1], EVERY)(*X)
    torch.testing.assert_close(forward, reverse)
    torch.testing.assert_close(mixed, reverse)


COMPILED = {
    "aot_eager": ("jvp(grad)", "grad(grad)", "grad(jvp)", "vmap(jvp)", "dual_level"),
    "inductor": ("backward_of_func_jvp",),
}


@pytest.mark.parametrize("compiler", COMPILED)
def test_compiled(compiler):
    """A tangent that is lost while a graph is traced, or strides that the code does not expect."""
    for name in COMPILED[compiler]:
        if name == "backward_of_func_jvp":
            f = lambda *x: jvp(ours, x, T)  # noqa: E731
            x = leaves()
            out, tangents = torch.compile(f, backend=compiler, fullgraph=True)(*x)
            got = torch.autograd.grad(sum(y.sin().sum() for y in (*out, *tangents)), x)
        else:
            f = lambda way=TRANSFORMS[name]: way(ours)  # noqa: E731
            got = torch.compile(f, backend=compiler)()
        torch.testing.assert_close(got, TRANSFORMS[name](ours))


def decode(q, k, v, bias):
    lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32)
    return attn_ext.attention_decode(q, k, v, lengths, return_lse=True)


def sigmoid(q, k, v, bias):
    return attn_ext.attention(q, k, v, bias=bias, normalizer="sigmoid"), bias.sum()


def additive(q, k, v, bias):
    return attn_ext.additive_attention(q, k, v, bias[0, 0, :2], bias=bias, return_lse=True)


def thrice_by_create_graph(f):
    x = leaves()
    second = torch.autograd.grad(
        sum(g.square().sum() for g in first_by_create_graph(f, x)), x, create_graph=True
    )
    return torch.autograd.grad(sum(g.sum() for g in second), x)


REFUSED = {
    "third derivative": (thrice_by_create_graph, ours, "third derivative.*MATH"),
    "jvp(jvp)": (lambda f: jvp(lambda *x: jvp(f, x, T)[1], X, T), ours, "tangent of a tangent"),
    "jacfwd(jacfwd)": (lambda f: jacfwd(jacfwd(loss_of(f)))(*X), ours, "tangent of a tangent"),
    "jvp(grad(grad))": (lambda f: jvp(grad(lambda *x: grad(loss_of(f))(*x).cos().sum()), X, T),
        ours, "third derivative"),
    "hvp": (lambda f: functional.hvp(loss_of(f), X, T), ours, "its vhp"),
    "decode, forward": (TRANSFORMS["jvp"], decode, "attention_decode: use attention"),
    "decode, dual": (dual_level, decode, "attention_decode: use attention"),
    "sigmoid, forward": (TRANSFORMS["jvp"], sigmoid, "forward-mode AD of sigmoid attention: write"),
    "sigmoid, dual": (dual_level, sigmoid, "forward-mode AD of sigmoid attention: write"),
    "sigmoid, twice": (twice_by_create_graph, sigmoid, "double backward of sigmoid attention"),
    "additive, forward": (TRANSFORMS["jvp"], additive, "forward-mode AD of additive attention"),
    "additive, twice": (twice_by_create_graph, additive, "double backward of additive attention"),
    "additive, hessian": (TRANSFORMS["hessian"], additive, "of additive attention: write"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """A derivative that is silently wrong, or an error that does not say what to use."""
    transform, f, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=message):
        transform(f)


def of_slopes(q, k, v, slopes):
    return attn_ext.attention(q, k, v, alibi_slopes=slopes, return_lse=True)


def appended(q, k, v, slopes):
    cache = attn_ext.KVCache(*k.shape[:2], k.shape[3], max_length=64, dtype=k.dtype)
    cache.append(X[1], X[2]).append(k, v)
    return cache.attend(X[0]), slopes


LOST = [
    *itertools.product(["alibi_slopes", "KVCache.append", "scale", "softcap"], ["jvp", "dual"]),
    ("alibi_slopes", "jvp(grad)"),
]


@pytest.mark.parametrize(("name", "transform"), LOST)
def test_tangent_that_would_be_lost(name, transform):
    """A derivative of silent zeros, of what has no derivative."""
    if name == "alibi_slopes":
        inputs, f = (torch.rand(X[0].shape[1]),), lambda x: of_slopes(*X[:3], x)[0].sum()
    elif name == "KVCache.append":
        inputs, f = X[1:2], lambda k: appended(X[0], k, k, X[3])[0].sum()
    else:
        inputs = (torch.tensor(0.5),)
        f = lambda x: attn_ext.attention(*X[:3], **{name: x}).sum()  # noqa: E731
    message = f"AD of {name}|{name}.* has a tangent|{name} .*without a tangent"
    with pytest.raises((NotImplementedError, TypeError), match=message):
        if transform == "jvp":
            jvp(f, inputs, inputs)
        elif transform == "dual":
            with fwad.dual_level():
                f(*map(fwad.make_dual, inputs, inputs))
        else:
            both = lambda x: grad(lambda q: of_slopes(q, *X[1:3], x)[0].sum())(X[0])  # noqa: E731
            jvp(both, inputs, inputs)


def test_append_cannot_be_mapped():
    """torch's own error about a batching rule."""
    cache = attn_ext.KVCache(1, 1, 4, max_length=8)
    rows = torch.randn(3, 1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match=r"KVCache\.append cannot be mapped"):
        vmap(lambda k: cache.append(k, k).gathered()[0])(rows)
    with pytest.raises(ValueError, match="scale must be one number"):
        vmap(lambda s: attn_ext.attention(*X[:3], scale=s))(torch.rand(3))


def test_operators_check_their_tangents():
    """Memory read past the end of a tangent that is not like its input."""
    call = attn_ext.functional.dense.dense_call(*X[:3])
    out, lse, _, _ = torch.ops.attn_ext.forward(*call)
    tangents = [None] * 6
    for wrong, error, message in (
        (torch.zeros(1), ValueError, "tq must have q's shape"),
        (X[0].float(), TypeError, "tq must have q's dtype"),
    ):
        with pytest.raises(error, match=message):
            torch.ops.attn_ext.tangent(out, lse, *call, wrong, *tangents[1:])
    with pytest.raises(ValueError, match="tbias must have bias's shape None"):
        torch.ops.attn_ext.tangent(out, lse, *call, *tangents[:3], X[3], *tangents[4:])


def test_operators_agree_with_their_fakes():
    """Shapes, strides or dtypes that a traced program does not expect."""
    call = attn_ext.functional.dense.dense_call(*X[:3], bias=X[3], causal=True)
    out, lse, _, _ = torch.ops.attn_ext.forward(*call)
    tangents = [*T[:3], T[3][None], None, None]
    rows = (out, lse, out, lse, out, lse, None, lse)
    needs = [[True, True, True, True, False, False], [False, True, False, True, False, False]]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops = torch.ops.attn_ext
    torch.library.opcheck(ops.tangent.default, (out, lse, *call, *tangents), test_utils=tests)
    arguments = (*rows, *call, *tangents, *needs)
    torch.library.opcheck(ops.backward_tangent.default, arguments, test_utils=tests)
