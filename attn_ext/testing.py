"""What it takes to test attention: seeded calls, NaN-poisoned memory, and the one tolerance rule.

Shipped, so that a user can check a backend on his own machine:

    from attn_ext.testing import check_call, random_call
    check_call(random_call(seqlen_q=77, seqlen_k=130, causal=True, bias=True), "cpu")

The rule (docs/guide/semantics.md):  max|x - ref64| <= factor * max|naive - ref64| + eps,  where
ref64 is the reference on float64 copies of the same (already rounded) inputs, naive the reference
in the inputs' own dtype, factor 2 for outputs and 3 for gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch

from attn_ext.backends import reference as reference_backend
from attn_ext.backends import registry
from attn_ext.core.layout import empty_like_layout
from attn_ext.core.problem import Problem
from attn_ext.core.schema import (
    BOTTOM_RIGHT,
    GRADIENTS,
    UNBOUNDED,
    Call,
    Grads,
    Needs,
    given,
    is_decode,
)

FACTOR = {"out": 2.0, "grad": 3.0}

# eps = RELATIVE[dtype] * (max|ref64| + 1/16).  Halves: one rounding of the largest element, which
# the naive reference may be spared by luck.  float32: 80 roundings, since sums run in another
# order.  The 1/16 is for results that cancel to 0.
RELATIVE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}

LAYOUTS = ("bhsd", "bshd", "padded")


def poisoned_empty(shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """A tensor full of NaN (True for bool, the largest value for integers): what a kernel must
    overwrite or not read.
    """
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    value = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(shape, value, dtype=dtype, device=device)


@contextlib.contextmanager
def poisoned_memory():
    """Within it torch.empty and its kin give NaN, so that an element that a kernel forgets to
    write is seen.
    """
    before = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # use_deterministic_algorithms would import torch's compiler, which takes seconds
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(before)


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a view into larger storage that is NaN elsewhere: reading past any end
    is seen.
    """
    storage = poisoned_empty([n + 3 for n in tensor.shape], tensor.dtype, tensor.device)
    view = storage[tuple(slice(1, 1 + n) for n in tensor.shape)]
    return view.copy_(tensor)


def with_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """`tensor` as it is ("bhsd"), with its dimensions 1 and 2 swapped in memory ("bshd"), or
    `padded`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "padded":
        return padded(tensor)
    if layout == "bshd" and tensor.dim() == 4:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor


def random_call(
    seed: int = 0,
    *,
    batch: int = 2,
    heads_q: int = 2,
    heads_k: int | None = None,
    seqlen_q: int = 17,
    seqlen_k: int | None = None,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    causal: bool = False,
    window: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    align: int = BOTTOM_RIGHT,
    mask: bool | str = False,
    bias: bool | str = False,
    softcap: float = 0.0,
    alibi: bool | str = False,
    sink: bool = False,
    additive: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    stats: bool = False,
    layout: str = "bhsd",
    seqlens_q: Sequence[int] | None = None,
    seqlens_k: Sequence[int] | None = None,
    cache_seqlens: Sequence[int] | None = None,
    page_size: int = 0,
    num_splits: int = 0,
    deterministic: bool = False,
) -> Call:
    """A `Call` on normally distributed inputs, the same for the same arguments on every device.

    mask, bias: the dimensions of [B, Hq, Sq, Sk] that are not broadcast, as a string out of "bhqk";
    True is "bhqk". alibi: True for slopes [Hq], "b" for [B, Hq].  additive: scores w . tanh(q + k).
    Varlen: `seqlens_q` and
    `seqlens_k`, one length a sequence.  Decode: `cache_seqlens`, with `seqlen_k` positions of
    cache, in pages in random order where `page_size` > 0; the unused part of the cache is NaN.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    heads_k = heads_k or heads_q
    head_dim_v = head_dim_v or head_dim
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    uniform = {"generator": generator, "dtype": torch.float32, "device": "cpu"}

    def normal(*shape, dtype=dtype):
        wide = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return wide.to(dtype)

    fields = {}
    if seqlens_q is not None:
        batch = len(seqlens_q)
        seqlens_k = seqlens_q if seqlens_k is None else seqlens_k
        seqlen_q, seqlen_k = max(seqlens_q, default=0), max(seqlens_k, default=0)
        q = normal(sum(seqlens_q), heads_q, head_dim)
        k = normal(sum(seqlens_k), heads_k, head_dim)
        v = normal(sum(seqlens_k), heads_k, head_dim_v)
        fields["cu_seqlens_q"] = _cumulative(seqlens_q)
        fields["cu_seqlens_k"] = _cumulative(seqlens_k)
    else:
        batch = batch if cache_seqlens is None else len(cache_seqlens)
        q = normal(batch, heads_q, seqlen_q, head_dim)
        k = normal(batch, heads_k, seqlen_k, head_dim)
        v = normal(batch, heads_k, seqlen_k, head_dim_v)
    if cache_seqlens is not None:
        fields["seqlens_k"] = torch.tensor(cache_seqlens, dtype=torch.int32, device="cpu")
        for b, length in enumerate(cache_seqlens):
            k[b, :, length:] = torch.nan
            v[b, :, length:] = torch.nan
        if page_size:
            pages = (seqlen_k + page_size - 1) // page_size
            # a generator of its own: paged and contiguous calls of one seed hold the same values
            own = torch.Generator("cpu").manual_seed(seed)
            order = torch.randperm(batch * pages + 1, generator=own, device="cpu")[: batch * pages]
            fields["block_table"] = order.view(batch, pages).to(torch.int32)
            k, v = (_to_pages(x, fields["block_table"], page_size) for x in (k, v))

    def score_shape(dims):
        dims = "bhqk" if dims is True else dims
        full = zip("bhqk", (batch, heads_q, seqlen_q, seqlen_k), strict=True)
        return [size if name in dims else 1 for name, size in full]

    if mask:
        fields["mask"] = torch.rand(score_shape(mask), **uniform) < 0.7
    if bias:
        fields["bias"] = normal(*score_shape(bias))
    if alibi:
        slopes = torch.rand((batch, heads_q) if alibi == "b" else heads_q, **uniform)
        fields["alibi_slopes"] = slopes * 0.5
    if sink:
        fields["sink"] = normal(heads_q, dtype=stat)
    if additive:
        fields["w"] = normal(heads_q, head_dim, dtype=stat)
        scale = 1.0
    if dropout_p > 0:
        fields["rng_state"] = torch.tensor([seed + 1234, 5], dtype=torch.int64, device="cpu")
    fields.update(q=q, k=k, v=v)
    strided = ("q", "k", "v", "mask", "bias")
    for name, tensor in fields.items():
        tensor = tensor.to(device)
        fields[name] = with_layout(tensor, layout) if name in strided else tensor
    return Call(
        **fields,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
        dropout_p=dropout_p,
        align=align,
        window_left=window[0],
        window_right=0 if causal else window[1],
        need_stats=stats,
        deterministic=deterministic,
        num_splits=num_splits,
    )


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """cu_seqlens int32 [B + 1]"""
    starts = torch.tensor([0, *lengths], dtype=torch.int64, device="cpu")
    return starts.cumsum(0).to(torch.int32)


def _to_pages(x: torch.Tensor, block_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """x [B, Hk, Smax, D] as pages [B * max_pages + 1, Hk, page_size, D]; what no sequence uses
    is NaN.
    """
    batch, heads, length, dim = x.shape
    max_pages = block_table.shape[1]
    whole = poisoned_empty((batch, heads, max_pages * page_size, dim), x.dtype)
    whole[:, :, :length] = x
    pages = poisoned_empty((batch * max_pages + 1, heads, page_size, dim), x.dtype)
    cut = whole.view(batch, heads, max_pages, page_size, dim).transpose(1, 2)
    pages[block_table.long().flatten()] = cut.flatten(0, 1)
    return pages


def needs_of(call: Call) -> Needs:
    """All gradients that the call has."""
    return Needs(*[getattr(call, name) is not None for name in GRADIENTS])


def differentiated(call: Call, grad: bool = True) -> Call:
    """The call as one of whose inputs autograd wants gradients, or none."""
    return call._replace(grad=grad, bias_grad=grad and call.bias is not None)


def to_float64(call: Call) -> Call:
    """`call` with float64 copies of what has a gradient: what the truth is computed from."""
    return call._replace(**{name: x.detach().double() for name, x in given(call).items()})


def allowed_error(ref64, naive, kind="out", dtype=None, cancelled: float = 0.0) -> float:
    """factor * max|naive - ref64| + eps over the elements where both are finite.

    `cancelled` is added to eps: the rounding of terms whose difference the result is, see
    `cancellation`.
    """
    if kind not in FACTOR:
        raise ValueError(f"kind must be 'out' or 'grad', got {kind!r}")
    finite = torch.isfinite(ref64) & torch.isfinite(naive)
    error = (naive.double() - ref64).abs()[finite]
    worst, largest = _largest(error), _largest(ref64)
    dtype = dtype or naive.dtype
    eps = RELATIVE[dtype] * (largest + 1 / 16) + cancelled
    return FACTOR[kind] * worst + eps


def assert_close_to_reference(
    actual, ref64, naive, kind="out", name="result", dtype=None, cancelled=0.0
) -> None:
    """AssertionError unless `actual` obeys the tolerance rule; all three have one shape.

    kind is "out" or "grad".  NaN, inf and -inf must stand exactly where `ref64` has them.  `dtype`
    is the precision that was computed in, where `naive` is kept in a wider one (the float32 LSE of
    bfloat16 inputs).
    """
    if not actual.shape == ref64.shape == naive.shape:
        shapes = f"{tuple(actual.shape)}, {tuple(ref64.shape)} and {tuple(naive.shape)}"
        raise AssertionError(f"{name}: actual, ref64 and naive must have one shape, got {shapes}")
    actual, ref64 = actual.detach().double().cpu(), ref64.detach().double().cpu()
    naive = naive.detach().cpu()
    if actual.numel() == 0:
        return
    allowed = allowed_error(ref64, naive, kind, dtype, cancelled)
    # equal covers equal infinities; two NaN differ by 0; a NaN or an infinity on one side only
    # differs by inf
    same = (actual == ref64) | (actual.isnan() & ref64.isnan())
    error = torch.where(same, 0.0, (actual - ref64).abs()).nan_to_num(nan=torch.inf)
    worst = error.max().item()
    if worst <= allowed:
        return
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    wrong = int((error > allowed).sum())
    raise AssertionError(
        f"{name}: max error {worst:.3g} at {at}, allowed {allowed:.3g}: "
        f"got {actual[at].item():.6g}, reference {ref64[at].item():.6g}, "
        f"naive {naive[at].item():.6g}; {wrong} of {error.numel()} elements are out of tolerance"
    )


def check_call(call: Call, backend="cpu", grads: bool = True, dlse: bool = True, seed=0) -> None:
    """Run `call` on `backend` (a name or a module), forward and backward, and hold each result to
    the tolerance rule.

    Every buffer that the backend takes from torch is poisoned.  `grads=False` leaves out backward,
    `dlse=False` the gradient through LSE.  Decode calls have no backward.
    """
    module = registry.get(backend) if isinstance(backend, str) else backend
    grads = grads and (call.w is not None or not is_decode(call))
    problem = Problem.of(differentiated(call, grads))
    missing = module.available()
    why = [missing] if missing else module.unsupported(problem)
    if why:
        raise AssertionError(f"{module.__name__} cannot serve this call: {'; '.join(why)}")
    exact = to_float64(call)
    with poisoned_memory():
        results = module.forward(call)
    out, lse = results[:2]
    expected = empty_like_layout(call.q, call.v.shape[-1])
    if (out.dtype, out.stride()) != (expected.dtype, expected.stride()):
        raise AssertionError(
            f"out: must be {expected.dtype} with strides {expected.stride()}, "
            f"got {out.dtype} with {out.stride()}"
        )
    seeds, needs = _seeds(out, lse, grads, dlse, seed), needs_of(call)
    doubles = [None if x is None else x.double() for x in seeds]
    truths, true_grads = referred(exact, *doubles, needs)
    naives, naive_grads = referred(call, *seeds, needs)
    dtype = call.q.dtype
    for name, got, truth, naive in zip(_OUTPUTS, results, truths, naives, strict=True):
        _compare(name, got, truth, naive, "out", dtype)
    if not grads:
        return

    dout, d_lse = seeds
    with poisoned_memory():
        results = module.backward(call, dout, out, lse, d_lse, needs)
    for name, got, truth, naive in zip(GRADIENTS, results, true_grads, naive_grads, strict=True):
        cancelled = 0.0 if truth is None else cancellation(call, dout, out, name)
        _compare(f"d{name}", got, truth, naive, "grad", dtype, cancelled)


def _seeds(out, lse, grads: bool, dlse: bool, seed: int) -> list:
    """[dO, dLSE], random; None where there is none."""
    if not grads:
        return [None, None]
    generator = torch.Generator("cpu").manual_seed(seed)
    normal = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    dout = torch.empty_like(out)
    dout.copy_(torch.randn(out.shape, **normal))
    return [dout, torch.randn(lse.shape, **normal).to(lse) if dlse else None]


def referred(call: Call, dout, dlse, needs) -> tuple[tuple, Grads | None]:
    """The reference's results for a call and, where dout is given, its gradients."""
    if dout is None:
        return reference_backend.naive(call), None
    return reference_backend.forward_and_backward(call, dout, dlse, needs)


_OUTPUTS = ("out", "lse", "max_logit", "entropy")


def cancellation(call: Call, dout: torch.Tensor, out: torch.Tensor, name: str) -> float:
    """What rounding leaves in the gradient of `name` where dS = P (dP - delta) cancels.

    dP = dO V^T / (1 - p) is rounded in the accumulator; delta = rowsum(dO * O) takes O as it was
    rounded to the inputs' dtype, which no backward that recomputes P can undo.  Both are 0 in the
    naive reference when a row has one key, or a bias that shifts whole rows (true gradient 0).
    """
    if call.dropout_p >= 1 or name == "v" or dout.numel() == 0:
        return 0.0
    dtype = call.q.dtype
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    dp = call.v.shape[-1] ** 0.5 * _largest(dout) * _largest(call.v) / (1 - call.dropout_p)
    # the roundings of the elements of a row of O are independent: their squares add up
    delta = _largest((dout.double() * out.double()).norm(dim=-1))
    error = accumulator * dp + torch.finfo(dtype).eps / 2 * delta
    if name in "qk" and call.w is not None:  # d s / d q = w (1 - tanh^2)
        return error * _largest(call.w)
    if name in "qk":
        return error * abs(call.scale) * _largest(call.k if name == "q" else call.q)
    # errors of the rows that one element sums over, 3 standard deviations
    into = call.bias.shape[:3] if name == "bias" else getattr(call, name).shape[:1]  # heads
    summed = dout[..., 0].numel() / max(1, math.prod(into))
    return 3 * error * max(1.0, summed) ** 0.5


def _largest(x: torch.Tensor) -> float:
    """max|x| over the finite elements, 0 if there are none."""
    x = x[torch.isfinite(x)]
    return x.abs().max().item() if x.numel() else 0.0


def _compare(name, got, truth, naive, kind, dtype, cancelled=0.0) -> None:
    """One result against the rule; None must meet None."""
    if (got is None) != (truth is None):
        raise AssertionError(f"{name}: must {'not ' if truth is None else ''}be given, got {got}")
    if got is None:
        return
    if got.dtype != naive.dtype:
        raise AssertionError(f"{name}: must be {naive.dtype}, got {got.dtype}")
    assert_close_to_reference(got, truth, naive, kind, name, dtype, cancelled)
