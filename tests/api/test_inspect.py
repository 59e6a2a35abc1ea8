"""attn_ext.inspect against the whole N x N matrix in float64, on every feature; memory; gradients.

The matrix comes from the reference: with V = identity the output is P itself.
"""

import high_water
import pytest
import torch
import torch.nn.functional as F
from closeness import HALF, assert_close, assert_same, of_logits

import attn_ext
from attn_ext import inspect
from attn_ext.core import reference
from attn_ext.inspect import blocked, logits
from attn_ext.testing import assert_close_to_reference

# name -> (Hq, Hk, Sq, Sk, options): each would miss a feature of the tiles
CASES = {
    "plain": (2, 2, 17, 23, {}),
    "causal_gqa": (4, 2, 33, 33, {"causal": True}),
    "window_bottom_right": (2, 1, 19, 31, {"causal": "bottom_right", "window": (7, None)}),
    "top_left_cut": (2, 2, 40, 25, {"causal": "top_left"}),
    "mask": (2, 2, 21, 29, {"mask": "bhqk"}),
    "mask_bias_broadcast": (4, 4, 21, 29, {"mask": "bk", "bias": "hq"}),
    "softcap_sink": (4, 2, 18, 27, {"softcap": 3.0, "sink": True}),
    "alibi_scale": (2, 2, 16, 20, {"alibi": True, "scale": 0.9}),
    "everything": (4, 2, 26, 38, {
        "causal": "bottom_right", "window": (20, None), "mask": "bqk", "bias": "bhqk",
        "softcap": 4.0, "sink": True, "alibi": True, "scale": 0.4,
    }),
}  # fmt: skip


def problem(name: str, dtype=torch.float32):
    """q, k and the options of a case; row 3 of a masked case sees no key."""
    hq, hk, sq, sk, spec = CASES[name]
    spec = dict(spec)
    q, k = (
        torch.randn(2, h, n, 12, dtype=torch.float64).to(dtype) for h, n in ((hq, sq), (hk, sk))
    )
    full = dict(zip("bhqk", (2, hq, sq, sk), strict=True))
    if "mask" in spec:
        spec["mask"] = torch.rand([full[d] if d in spec["mask"] else 1 for d in "bhqk"]) < 0.7
        if spec["mask"].shape[2] > 3:
            spec["mask"][:, :, 3] = False
    if "bias" in spec:
        spec["bias"] = torch.randn([full[d] if d in spec["bias"] else 1 for d in "bhqk"]).to(dtype)
        spec["bias"].view(-1)[5] = -torch.inf
    if spec.pop("alibi", False):
        spec["alibi_slopes"] = torch.rand(hq) * 0.3
    if spec.pop("sink", False):
        spec["sink"] = torch.randn(hq)
    return q, k, spec


def matrix(q, k, options):
    """P [B, Hq, Sq, Sk], logits' largest and LSE in float64 by the reference."""
    call = logits.call_of(q.double(), k.double(), **{
        n: o.double() if isinstance(o, torch.Tensor) and n in ("bias", "sink") else o
        for n, o in options.items()
    })  # fmt: skip
    eye = torch.eye(k.shape[2], dtype=torch.float64)
    call = call._replace(v=eye.expand(*k.shape[:2], *eye.shape))
    call = call._replace(need_stats=True)
    return reference.attend(call)


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """A case with tiles so small that there are several in every direction."""
    monkeypatch.setattr(logits, "BUDGET", 200)
    return problem(request.param)


def close(got, want, name):
    """The tolerance rule, with the float64 truth itself as the naive result."""
    assert_close_to_reference(got, want, want.to(got.dtype), name=name, dtype=torch.float32)


def test_row_stats(case):
    """A wrong tile, a sink that leaks into the largest logit, a row without keys."""
    q, k, options = case
    p, lse, top, _ = matrix(q, k, options)
    stats = inspect.row_stats(q, k, **options)
    close(stats.lse, lse, "lse")
    close(stats.max_logit, top, "max_logit")
    close(stats.entropy, -torch.xlogy(p, p).sum(-1), "entropy")


def test_top_k(case):
    """Keys outside the window, wrong order, weights that are not the keys'."""
    q, k, options = case
    p, *_ = matrix(q, k, options)
    best = inspect.top_k(q, k, 5, **options)
    want = p.topk(5, dim=-1).values
    close(best.weights, want, "weights")
    at = best.keys.clamp_min(0)
    close(torch.where(best.keys >= 0, p.gather(-1, at), 0.0).float(), want, "keys")
    assert ((best.keys == -1) == (best.weights == 0)).all()


def test_top_k_of_a_mean_over_heads(case):
    """A mean of lists that are cut, instead of the top of whole rows."""
    q, k, options = case
    p = matrix(q, k, options)[0].mean(1)
    best = inspect.top_k(q, k, 5, per_head=False, **options)
    want = p.topk(5, dim=-1).values
    close(best.weights, want, "weights")
    at = torch.where(best.keys >= 0, p.gather(-1, best.keys.clamp_min(0)), 0.0)
    close(at.float(), want, "keys")
    assert ((best.keys == -1) == (best.weights == 0)).all()


def test_top_k_more_than_there_are():
    """An index out of range, or all of the memory, where n exceeds the keys."""
    q = torch.randn(1, 1, 3, 4)
    for n in (5, 2**31):
        best = inspect.top_k(q, torch.randn(1, 1, 3, 4), n, causal=True)
        assert best.keys.shape == (1, 1, 3, 3)
        assert (best.keys[0, 0] >= 0).sum(-1).tolist() == [1, 2, 3]
        torch.testing.assert_close(best.weights.sum(-1), torch.ones(1, 1, 3))
    assert inspect.top_k(q, q[:, :, :0], 5).keys.shape == (1, 1, 3, 0)
    assert inspect.top_k(q[:, :, :0], q, 5, per_head=False).keys.shape == (1, 0, 3)


@pytest.mark.parametrize("value", [-3e4, -1e9, 2e5])
def test_rows_of_large_logits(value):
    """exp(S - LSE) where LSE has no digits left for the sum: weights of 1 for every key."""
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    bias = torch.zeros(6, 9)
    bias[2] = value
    s = (q @ k.transpose(-1, -2) / 8**0.5 + bias).double()  # with what float32 keeps of the logits
    p = s.softmax(-1)
    lse = inspect.row_stats(q, k, bias=bias).lse
    for given in ({}, {"lse": lse}):
        best = inspect.top_k(q, k, 4, bias=bias, **given)
        mass = inspect.column_mass(q, k, bias=bias, **given)
        image = inspect.pooled_map(q, k, (6, 3), bias=bias, **given)
        tolerance = of_logits(value)
        assert_close(best.weights, p.topk(4).values.float(), tolerance)
        assert_close(mass, p.sum(2).float(), tolerance)
        assert_close(image, F.adaptive_avg_pool2d(p, (6, 3)).float(), tolerance)
        torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 6.0))
    with pytest.raises(
        NotImplementedError, match="lse must be within 256 of 0 in its kernels, got"
    ):
        inspect.top_k(q, k, 4, bias=bias, backend="cpu")


def test_autocast():
    """Products in bfloat16 where float32 is promised, or a result of the wrong dtype."""
    q, k = torch.randn(1, 2, 30, 8).bfloat16(), torch.randn(1, 2, 30, 8).bfloat16()
    truth = matrix(q, k, {})[0]
    leaf = q.float().requires_grad_()
    (want,) = torch.autograd.grad(inspect.row_stats(leaf, k.float()).entropy.sum(), leaf)
    with torch.autocast("cpu", torch.bfloat16):
        close(inspect.weights(q.float(), k.float()), truth, "weights")
        best = inspect.top_k(q.float(), k.float(), 3, backend="reference")
        close(best.weights, truth.topk(3).values, "top k")
        entropy = inspect.row_stats(leaf, k.float()).entropy
        (got,) = torch.autograd.grad(entropy.sum(), leaf)
    assert_close(got, want, HALF)  # halves go back through autocast


def test_column_mass(case):
    """Groups summed where heads were asked for; a mass that loses rows."""
    q, k, options = case
    p, lse, *_ = matrix(q, k, options)
    close(inspect.column_mass(q, k, **options), p.sum(2), "by head")
    close(inspect.column_mass(q, k, per_head=False, **options), p.sum((1, 2)), "summed")
    close(inspect.column_mass(q, k, lse=lse.float(), **options), p.sum(2), "with lse")


def test_weights(case):
    """Rows and columns mixed up, repeated ones, negative ones, an order that is not kept."""
    q, k, options = case
    p, *_ = matrix(q, k, options)
    rows, cols = [9, 3, -1, 9], torch.tensor([0, -2, 11])
    close(inspect.weights(q, k, rows=rows, cols=cols, **options), p[:, :, rows][..., cols], "block")
    close(inspect.weights(q, k, rows=slice(2, 15, 3), **options), p[:, :, 2:15:3], "rows")
    close(inspect.weights(q, k, **options), p, "all")


@pytest.mark.parametrize("size", [7, (16, 5)])
def test_pooled_map(case, size):
    """Cells that overlap wrongly where the size does not divide the length."""
    q, k, options = case
    p, *_ = matrix(q, k, options)
    close(inspect.pooled_map(q, k, size, **options), F.adaptive_avg_pool2d(p, size), "map")


def test_rollout():
    """Layers in the wrong order, heads not averaged, a transposed product."""
    layers = [(torch.randn(2, 4, 14, 8) * 2, torch.randn(2, 2, 14, 8)) for _ in range(3)]
    total = torch.eye(14, dtype=torch.float64)
    for q, k in layers:
        p, *_ = matrix(q, k, {"causal": True})
        total = (0.5 * torch.eye(14) + 0.5 * p.mean(1)) @ total
    close(inspect.rollout(layers, rows=slice(None), causal=True), total, "all rows")
    close(inspect.rollout(layers, rows=[3, -1], causal=True), total[:, [3, -1]], "rows")
    close(inspect.rollout(layers, causal=True), total.mean(1), "mean")
    with_options = [(q, k, {"causal": True}) for q, k in layers]
    close(inspect.rollout(with_options), total.mean(1), "options of a layer")
    assert inspect.rollout(layers, rows=[]).shape == (2, 0, 14)
    empty = torch.zeros(2, 4, 0, 8)
    assert inspect.rollout([(empty, empty)], rows=[]).shape == (2, 0, 0)


def test_a_row_of_the_smallest_number_weighs_its_keys_alike():
    """exp(S - LSE) where LSE has lost ln(number of keys): weights of 1, their gradients too."""
    q, k = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(1, 2, 9, 8)
    bias = torch.zeros(1, 1, 5, 9)
    bias[:, :, 2] = torch.finfo(torch.float32).min
    bias.requires_grad_()
    ninth = torch.full((1, 2, 9), 1 / 9)
    torch.testing.assert_close(inspect.weights(q, k, bias=bias)[:, :, 2], ninth)
    stats = inspect.row_stats(q, k, bias=bias)
    torch.testing.assert_close(stats.entropy[:, :, 2], torch.full((1, 2), 9.0).log())
    (dbias,) = torch.autograd.grad(stats.lse.sum(), bias)
    torch.testing.assert_close(dbias[0, 0, 2], 2 * ninth[0, 0])


def test_sigmoid_weights_that_are_all_0_have_no_entropy():
    """0 / 0: NaN in the statistics of a layer whose logits fell below float32's exp."""
    q, k = torch.full((1, 1, 3, 4), 8.0), torch.full((1, 1, 5, 4), -8.0)
    with inspect.record() as seen:
        attn_ext.attention(q, k, k, normalizer="sigmoid")
        attn_ext.attention(q, k, k, normalizer="sigmoid", scale=86 / 256)  # denormal ones
    assert seen.calls[0].entropy.eq(0).all() and seen.calls[0].lse.eq(-torch.inf).all()
    assert seen.calls[1].top_weights.gt(0).all() and seen.calls[1].entropy.ge(0).all()
    call = logits.call_of(q, k, normalizer="sigmoid")
    lse, _, entropy = blocked.row_stats(call)
    assert entropy.eq(0).all() and lse.eq(-torch.inf).all()


@pytest.mark.parametrize("name", CASES)
def test_row_stats_gradients(name, monkeypatch):
    """A missing term of d entropy, ties of the largest logit, a sink or bias without gradient."""
    monkeypatch.setattr(logits, "BUDGET", 200)
    q, k, options = problem(name, torch.float64)
    inputs = [q, k] + [options[n].double() for n in ("bias", "sink") if n in options]
    names = [n for n in ("bias", "sink") if n in options]
    seeds = [torch.randn(q.shape[:3], dtype=torch.float64) for _ in range(3)]

    def ours(q, k, *rest):
        return inspect.row_stats(q, k, **{**options, **dict(zip(names, rest, strict=True))})

    def theirs(q, k, *rest):
        call = logits.call_of(q, k, **{**options, **dict(zip(names, rest, strict=True))})
        rows = torch.arange(q.shape[2])
        tile = logits.Tile(slice(None), slice(0, q.shape[1]), rows, 0, k.shape[2])
        s = logits.scores(call, tile)
        empty = (s == -torch.inf).all(-1)
        s = torch.where(empty[..., None], 0.0, s)
        lse = logits.row_lse(call, tile, s)
        p = logits.probabilities(s, lse)
        entropy = -torch.xlogy(p, p.clamp_min(1e-300)).sum(-1)
        return tuple(torch.where(empty, 0.0, x) for x in (lse, s.amax(-1), entropy))

    grads = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = 0.0
        for x, seed in zip(function(*leaves), seeds, strict=True):
            loss = loss + (torch.where(x == -torch.inf, 0.0, x) * seed).sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*grads, strict=True):
        assert_close_to_reference(got, want.nan_to_num(), want.nan_to_num(), kind="grad")


def test_entropy_regulariser_raises_entropy():
    """A gradient of the wrong sign: steps along it must make attention flatter."""
    q = (torch.randn(1, 2, 12, 8) * 3).requires_grad_()
    k = torch.randn(1, 2, 12, 8)
    before = inspect.row_stats(q, k).entropy.mean()
    (grad,) = torch.autograd.grad(before, q)
    after = inspect.row_stats(q.detach() + 20 * grad, k).entropy.mean()
    assert after > before + 0.05


def test_row_stats_is_differentiated_once():
    """A second derivative or a tangent that is silently missing, as torch's once_differentiable
    leaves it, and torch's own errors within its transforms."""
    q, k = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in "qk")
    entropy = inspect.row_stats(q, k).entropy
    (grad,) = torch.autograd.grad(entropy.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="row_stats has no second derivatives: use"):
        torch.autograd.grad(grad.square().sum(), q)
    with pytest.raises(NotImplementedError, match="row_stats has no batched gradients"):
        seeds = torch.eye(10).view(10, 1, 2, 5)
        torch.autograd.grad(inspect.row_stats(q, k).entropy, q, seeds, is_grads_batched=True)
    for leaf in (q, q.detach()):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(leaf))
            with pytest.raises(NotImplementedError, match="row_stats has no forward mode: use"):
                inspect.row_stats(dual, k)
            inspect.row_stats(q.detach(), k.detach())
    times = torch.vmap(lambda x: inspect.row_stats(q, k).entropy * x)(torch.ones(2))
    (got,) = torch.autograd.grad(times[1].sum(), q)
    assert_same(got, grad.detach())


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_plain_tensors_within_a_transform(transform):
    """A raw error about storage where a transform wraps what is computed of plain tensors: the
    function says so, and `record` leaves the call alone, as its model ran without it."""
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    x = torch.tensor(2.0)

    def of(f):
        if transform == "grad":
            return torch.func.grad(lambda x: f() * x)(x)
        return torch.func.jvp(lambda x: f() * x, (x,), (torch.ones(()),))[1]

    for function in (
        lambda: inspect.row_stats(q, k).entropy.sum(),
        lambda: inspect.top_k(q, k, 2).weights.sum(),
        lambda: inspect.rollout([(q, k)]).sum(),
    ):
        with pytest.raises(ValueError, match="q must hold values"):
            of(function)
    want = of(lambda: attn_ext.attention(q, k, k).sum())
    with inspect.record(None):
        assert_same(of(lambda: attn_ext.attention(q, k, k).sum()), want)


def test_excluded_nan_stays_out():
    """NaN in a masked key reaching any statistic or gradient."""
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    k = torch.randn(1, 2, 9, 8)
    k[:, :, 4] = torch.nan
    mask = torch.ones(9, dtype=torch.bool)
    mask[4] = False
    stats = inspect.row_stats(q, k, mask=mask)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in stats), q)
    assert torch.isfinite(grad).all()
    for result in (
        inspect.top_k(q, k, 3, mask=mask).weights,
        inspect.column_mass(q, k, mask=mask),
        inspect.weights(q, k, mask=mask),
        inspect.pooled_map(q, k, 4, mask=mask),
    ):
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype):
    """Weights rounded to halves: a column's mass would be off in the third digit."""
    q, k = torch.randn(1, 2, 64, 16).to(dtype), torch.randn(1, 2, 64, 16).to(dtype)
    p, *_ = matrix(q, k, {})
    mass = inspect.column_mass(q, k)
    assert mass.dtype == torch.float32
    close(mass, p.sum(2), "mass")


MEMORY = """
import torch
from attn_ext import inspect
torch.set_num_threads(1)
n = 16384
q, k = torch.randn(1, 1, n, 16), torch.randn(1, 1, n, 16)
inspect.row_stats(q[:, :, :64], k[:, :, :64])
before = high_water()
q.requires_grad_()
sum(x.mean() for x in inspect.row_stats(q, k)).backward()
inspect.top_k(q, k, 4, window=(256, 256))
inspect.top_k(q, k, 4, per_head=False, window=(256, 256))
inspect.top_k(q, k, 4, per_head=False, window=(256, 256), backend="reference")
inspect.column_mass(q, k, causal=True)
inspect.pooled_map(q, k, 64, causal=True)
inspect.rollout([(q, k)] * 2, causal=True)
inspect.weights(q, k, rows=[0, -1])
"""


def test_memory():
    """Anything of size N x N: at N = 16384 one such matrix is 1024 MiB."""
    assert high_water.grown_mib(MEMORY) < 120
