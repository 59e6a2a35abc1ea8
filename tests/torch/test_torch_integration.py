"""What torch does to a call: opcheck, export, autocast, checkpoint, functorch, fakes, pickling.

torch.compile is in test_compile.py.
"""

import ast
import copy
import io
import pathlib
import pickle

import pytest
import torch
from inputs import leaves
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import attn_ext
from attn_ext.testing import differentiated, needs_of, random_call

OPTIONS = {
    "plain": {},
    "causal_gqa": dict(causal=True, heads_q=4, heads_k=2),
    "heads_inner": dict(layout="bshd"),
    "everything": dict(mask=True, bias="hqk", softcap=2.0, alibi=True, sink=True, stats=True,
        heads_q=4, heads_k=2),
    "dropout": dict(dropout_p=0.3),
    "varlen": dict(seqlens_q=(3, 6, 0), seqlens_k=(5, 4, 2)),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def op_args(call, backend: str, grad: bool = True) -> tuple:
    """The flat arguments of torch.ops.attn_ext.forward for `call`."""
    return tuple(differentiated(call, grad)._replace(backend=backend))


@pytest.mark.parametrize("case", OPTIONS)
def test_opcheck(case, backend, device):
    """A fake, schema or autograd registration that disagrees with the kernel."""
    call = random_call(seqlen_q=5, seqlen_k=7, head_dim=8, device=device, **OPTIONS[case])
    for name in ("q", "k", "v", "bias", "sink"):
        if getattr(call, name) is not None:
            getattr(call, name).requires_grad_()
    torch.library.opcheck(torch.ops.attn_ext.forward.default, op_args(call, backend))
    with torch.no_grad():
        args = op_args(call, backend)
        out, lse, _, _ = torch.ops.attn_ext.forward(*args)
        needs = list(needs_of(call))
        given = (torch.randn_like(out), torch.randn_like(lse), out, lse, *args, needs)
        torch.library.opcheck(
            torch.ops.attn_ext.backward.default,
            given,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


class Block(torch.nn.Module):
    """A module that calls attention, for export, pickling and functional_call."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return attn_ext.attention(q, k, v, causal=True).transpose(1, 2).flatten(2)


def test_export_save_load():
    """An exported program that cannot be saved, loaded or run at another batch size."""
    block, x = Block().eval(), torch.randn(2, 5, 16)
    dims = {
        "x": {
            0: torch.export.Dim("batch", min=1, max=64),
            1: torch.export.Dim("seq", min=2, max=512),
        }
    }
    program = torch.export.export(block, (x,), dynamic_shapes=dims)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    y = torch.randn(3, 7, 16)
    torch.testing.assert_close(loaded(y), block(y))


def test_modules_copy_and_pickle():
    """State that cannot leave the process."""
    block, x = Block(), torch.randn(2, 5, 16)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))


def test_autocast_follows_sdpa():
    """Other dtypes under autocast than torch's own attention, or a kernel whose own arithmetic is
    autocast.
    """
    q, k, v = (torch.randn(2, 2, 9, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(9, 9, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            ours = attn_ext.attention(q, k, v, bias=bias)
            theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        assert ours.dtype == theirs.dtype == dtype
        grads = torch.autograd.grad(ours.float().sum(), (q, k, v, bias))
        assert all(g.dtype == torch.float32 for g in grads)
        plain = attn_ext.attention(*(x.to(dtype) for x in (q, k, v)), bias=bias.to(dtype))
        assert torch.equal(ours, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = attn_ext.attention(q.bfloat16(), k, v)  # unequal dtypes meet in autocast's
        wide = attn_ext.attention(q.double(), k.double(), v.double())
    assert half.dtype == torch.bfloat16
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_of_decode(compiled):
    """A decode that autocast does not reach, or whose cache it rounds; new rows that it keeps out
    of a cache of another dtype or rounds in there, and a result without them.
    """
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    new = [torch.randn(2, 2, 2, 16) for _ in range(2)]
    used, bias = torch.tensor([4, 7], dtype=torch.int32), torch.randn(1, 9)

    def step(k, v):
        rows = dict(k_new=new[0].bfloat16(), v_new=new[1], bias=bias, return_lse=True)
        return attn_ext.attention_decode(q, k, v, used, **rows)

    caches = [k.clone(), v.clone()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        out, lse = run(*caches)
        wide = attn_ext.attention_decode(q.double(), k.double(), v.double(), used)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    for cache, rows in zip((k, v), (new[0].bfloat16().float(), new[1]), strict=True):
        for b, first in enumerate(used):
            cache[b, :, first : first + 2] = rows[b]
    assert torch.equal(caches[0], k) and torch.equal(caches[1], v)
    told = dict(bias=bias.bfloat16(), return_lse=True)
    plain = attn_ext.attention_decode(q.bfloat16().float(), k, v, used + 2, **told)
    assert torch.equal(out, plain[0].bfloat16()) and torch.equal(lse, plain[1])
    given = pytest.raises(TypeError, match=r"v_cache must have q's dtype torch\.float32, got torc")
    with torch.autocast("cpu", dtype=torch.bfloat16), given:
        attn_ext.attention_decode(q, k, v.bfloat16(), used)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    """Recomputation draws another dropout mask, or loses a gradient."""
    q = torch.randn(1, 2, 33, 8, requires_grad=True)

    def block(q):
        return attn_ext.attention(q.sin(), q, q, dropout_p=0.4, causal=True).square()

    torch.manual_seed(2)
    want = torch.autograd.grad(block(q).sum(), q)[0]
    torch.manual_seed(2)
    got = (
        torch.autograd.grad(checkpoint(block, q, use_reentrant=reentrant).sum(), q)[0]
        if not reentrant
        else None
    )
    if reentrant:  # the reentrant way supports .backward() only
        checkpoint(block, q, use_reentrant=True).sum().backward()
        got = q.grad
    torch.testing.assert_close(got, want)


def test_selective_checkpoint():
    """A policy cannot name the op, so that attention is always recomputed."""
    seen = []

    def policy(ctx, op, *args, **kwargs):
        if op is torch.ops.attn_ext.forward.default:
            seen.append(ctx.is_recompute)
            return torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    block = lambda q: attn_ext.attention(q.sin(), q, q, causal=True).square()  # noqa: E731
    want = torch.autograd.grad(block(q).sum(), q)[0]
    out = checkpoint(
        block,
        q,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q)[0], want)
    assert seen[0] is False


def test_gradcheck(backend, device):
    """A gradient, the one through LSE included, that finite differences do not confirm."""
    inputs = leaves(3, 4, device, torch.float64)

    def f(q, k, v, bias, sink):
        return attn_ext.attention(
            q,
            k,
            v,
            bias=bias,
            sink=sink,
            softcap=3.0,
            causal="top_left",
            return_lse=True,
            backend=backend,
        )

    explained = attn_ext.explain(*inputs[:3], bias=inputs[3], sink=inputs[4])
    if explained.reasons[backend]:
        pytest.skip("; ".join(explained.reasons[backend]))
    assert torch.autograd.gradcheck(f, inputs)


def loss(q, k, v, bias):
    return attn_ext.attention(q, k, v, bias=bias, causal="bottom_right").square().sum()


@pytest.mark.parametrize(
    "mapped", [(0, 0, 0, 0), (0, None, None, None), (1, None, 2, None), (None, 0, 0, 1)]
)
@pytest.mark.parametrize("bias_shape", [(2, 3, 5, 7), (1, 3, 1, 7), (5, 7)], ids=str)
def test_vmap_and_per_example_gradients(mapped, bias_shape):
    """A mapped dimension folded into the wrong place, or a shared bias whose gradient is summed
    over examples.
    """
    n, shapes = 4, ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), bias_shape)
    inputs = [
        torch.randn(s if d is None else (*s[:d], n, *s[d:]))
        for s, d in zip(shapes, mapped, strict=True)
    ]
    examples = [
        [x if d is None else x.select(d, i) for x, d in zip(inputs, mapped, strict=True)]
        for i in range(n)
    ]
    per_example = grad(loss, argnums=(0, 1, 2, 3))
    got, want = vmap(loss, in_dims=mapped)(*inputs), torch.stack([loss(*e) for e in examples])
    torch.testing.assert_close(got, want)
    got, want = vmap(per_example, in_dims=mapped)(*inputs), [per_example(*e) for e in examples]
    for a, b in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    total = grad(lambda *xs: vmap(loss, in_dims=mapped)(*xs).sum(), argnums=(0, 1, 2, 3))(*inputs)
    for a, b, dim in zip(total, zip(*want, strict=True), mapped, strict=True):
        torch.testing.assert_close(a, torch.stack(b).sum(0) if dim is None else torch.stack(b, dim))


def test_vmap_of_what_does_not_fold():
    """A sink per example, varlen or nested maps, which run example by example."""
    q, sinks = torch.randn(3, 1, 2, 4, 8), torch.randn(3, 2)
    f = lambda q, s: attn_ext.attention(q, q, q, sink=s).square().sum()  # noqa: E731
    want = [grad(f, argnums=(0, 1))(a, b) for a, b in zip(q, sinks, strict=True)]
    got = vmap(grad(f, argnums=(0, 1)))(q, sinks)
    for a, b in zip(got, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    cu = torch.tensor([0, 1, 4], dtype=torch.int32)
    packed = torch.randn(3, 4, 2, 8)
    g = lambda x: attn_ext.attention_varlen(x, x, x, cu, cu, 3, 3, causal=True)  # noqa: E731
    torch.testing.assert_close(vmap(g)(packed), torch.stack([g(x) for x in packed]))
    nested = torch.randn(2, 3, 1, 2, 4, 8)
    h = lambda x: attn_ext.attention(x, x, x)  # noqa: E731
    torch.testing.assert_close(vmap(vmap(h))(nested), h(nested.flatten(0, 2)).view_as(nested))


def test_vmap_randomness():
    """randomness='different' giving one mask to every example, or 'same' giving several."""
    q = torch.randn(1, 2, 32, 8).expand(3, 1, 2, 32, 8)
    f = lambda q: attn_ext.attention(q, q, q, dropout_p=0.5)  # noqa: E731
    different = vmap(f, randomness="different")(q)
    assert not torch.equal(different[0], different[1])
    same = vmap(f, randomness="same")(q)
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(f)(q)


def test_func_over_a_module():
    """torch.func.grad through functional_call, vjp and jacrev."""
    block, x = Block(), torch.randn(2, 5, 16)
    params = dict(block.named_parameters())
    got = grad(lambda p: functional_call(block, p, (x,)).square().sum())(params)
    want = torch.autograd.grad(block(x).square().sum(), list(params.values()))
    torch.testing.assert_close(list(got.values()), list(want))
    q = torch.randn(1, 1, 3, 4)
    f = lambda q: attn_ext.attention(q, q, q)  # noqa: E731
    out, pull = vjp(f, q)
    torch.testing.assert_close(jacrev(f)(q).flatten(4).sum(-1).shape, q.shape)
    torch.testing.assert_close(pull(torch.ones_like(out))[0], jacrev(f)(q).sum((0, 1, 2, 3)))


def test_double_backward_of_the_op():
    """The dispatcher's way to the second derivative is silently wrong."""
    call = random_call(seqlen_q=4, head_dim=8, dtype=torch.float64)
    call.q.requires_grad_()

    def second(out):
        first = torch.autograd.grad(out.square().sum(), call.q, create_graph=True)[0]
        return torch.autograd.grad(first.sin().sum(), call.q)[0]

    got = second(torch.ops.attn_ext.forward(*op_args(call, "auto"))[0])
    torch.testing.assert_close(got, second(attn_ext.reference.attend(call)[0]))


def test_fake_and_meta_tensors():
    """Shapes, strides or dtypes that differ without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = random_call(
        seqlen_q=5, seqlen_k=7, head_dim=8, head_dim_v=6, layout="bshd", dtype=torch.bfloat16
    )
    real = attn_ext.attention(call.q, call.k, call.v, return_lse=True, return_stats=True)
    real = (real[0], real[1], *real[2][1:])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (call.q, call.k, call.v)]
        fake = attn_ext.attention(*fakes, return_lse=True, return_stats=True)
    metas = [x.to("meta") for x in (call.q, call.k, call.v)]
    meta = attn_ext.attention(*metas, return_lse=True, return_stats=True)
    for other in (fake, meta):
        for a, b in zip(real, (other[0], other[1], *other[2][1:]), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_saved_tensors_are_guarded():
    """A gradient computed from a q that was changed in place after the forward."""
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    x = q * 1.0
    out = attn_ext.attention(x, x, x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_only_needed_gradients():
    """A frozen input gets a gradient, or an unused LSE spoils the backward."""
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    k.requires_grad_()
    out, lse = attn_ext.attention(q, k, v, return_lse=True)
    lse.sum().backward(retain_graph=True)  # out is unused
    from_lse = k.grad.clone()
    k.grad = None
    out.sum().backward()
    assert q.grad is None and v.grad is None
    assert not torch.equal(from_lse, k.grad)
    scores = q @ k.detach().transpose(-1, -2).requires_grad_() * 8**-0.5
    want = (
        torch.autograd.grad(scores.logsumexp(-1).sum(), scores)[0].transpose(-1, -2) @ q * 8**-0.5
    )
    torch.testing.assert_close(from_lse, want)


def test_inference_mode():
    """Tensors made under inference_mode refused."""
    with torch.inference_mode():
        q = torch.randn(1, 2, 5, 8)
        assert attn_ext.attention(q, q, q).is_inference()


def test_flop_counter():
    """Attention counted as free in a model's FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(2, 4, 32, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attn_ext.attention(q, q, q)
    forward = counter.get_total_flops()
    assert forward == 4 * 2 * 4 * 32 * 32 * 16
    with FlopCounterMode(display=False) as counter:
        attn_ext.attention(q, q, q).sum().backward()
    assert counter.get_total_flops() == forward * 7 // 2  # forward 2 matmuls, backward 5


def test_traced_code_zips_what_is_equally_long():
    """torch 2.6's torch.compile takes every zip as strict: a mask of two dimensions, zipped with
    the four that it broadcasts to, could not be compiled.  (CI has one torch only.)
    """
    package = pathlib.Path(attn_ext.__file__).parent
    files = [package / "core" / "validate.py", package / "ops" / "autograd.py"]
    for folder in ("functional", "integrations", "nn"):
        files += package.glob(f"{folder}/**/*.py")
    loose = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip":
                strict = [k.value.value for k in node.keywords if k.arg == "strict"]
                if strict != [True] and "tolist" not in ast.unparse(node):  # tolist is eager only
                    loose.append(f"{file.name}:{node.lineno}")
    assert len(files) > 15 and loose == []


@pytest.mark.parametrize("case", ["everything", "dropout", "varlen", "additive"])
def test_batched_gradients(case, device):
    """Many gradients at once outside of torch.func (jacobian(vectorize=True), gradcheck's
    check_batched_grad), which come without memory of their own.
    """
    options = OPTIONS.get(case, dict(causal=True))
    call = random_call(seqlen_q=4, seqlen_k=4, head_dim=3, device=device, **options)
    leaves = [x for x in (call.q, call.k, call.v, call.bias, call.sink) if x is not None]
    leaves = [x.requires_grad_() for x in leaves]
    if case == "additive":
        leaves.append(torch.randn(call.q.shape[1], 3, device=device, requires_grad=True))
        outs = attn_ext.additive_attention(call.q, call.k, call.v, leaves[-1], return_lse=True)
    else:
        outs = attn_ext.ops.route.run(differentiated(call))[:2]
    seeds = [torch.randn(3, *x.shape, device=device) for x in outs]
    together = torch.autograd.grad(outs, leaves, seeds, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        one = torch.autograd.grad(outs, leaves, [s[n] for s in seeds], retain_graph=True)
        for got, want in zip(together, one, strict=True):
            torch.testing.assert_close(got[n], want)
