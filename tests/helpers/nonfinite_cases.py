"""NaN and inf in one place of K, V or Q, rows of NaN under dropout, logits that overflow: what the
kernels of every backend are tried on.
"""

import torch

from attn_ext.backends import registry
from attn_ext.core.schema import GRADIENTS
from attn_ext.testing import (
    assert_close_to_reference,
    check_call,
    needs_of,
    random_call,
    referred,
)

INF = torch.inf


def masked_key(call, value):
    """Key 4 is masked everywhere: dQ needs 0 * K = 0, with softcap also through the derivative
    of tanh.
    """
    call.mask[..., 4] = False
    call.k[:, :, 4] = call.v[:, :, 4] = value


def value_seen_causally(call, value):
    """V of key 9 is bad: queries before 9 are clean, the others are not."""
    call.v[:, :, 9] = value


def key_seen_causally(call, value):
    """K of key 9 is bad: the rows from 9 on are NaN in O and LSE."""
    call.k[:, :, 9] = value


def query(call, value):
    """Query 9 is bad: dK and dV of the keys after it are clean."""
    call.q[:, :, 9] = value


def behind_infinite_bias(call, value):
    """A bias of -inf excludes key 3 as a mask would."""
    call.bias[..., 3] = -INF
    call.k[:, :, 3] = call.v[:, :, 3] = value


CASES = {
    "masked key": (masked_key, {"mask": "bk", "bias": "hk", "sink": True, "causal": True}),
    "masked key under softcap": (masked_key, {"mask": "bk", "softcap": 2.0}),
    "value seen causally": (value_seen_causally, {"causal": True}),
    "key seen causally": (key_seen_causally, {"causal": True}),
    "query": (query, {"causal": True}),
    "behind infinite bias": (behind_infinite_bias, {"bias": "k"}),
}


def infinite_bias(call):
    """Of one pair, with an excluded one beside it."""
    call.bias[:, :, 2, 3], call.bias[:, :, 2, 5] = INF, -INF


def row_of_nan_bias(call):
    call.bias[:, :, 2] = torch.nan


def infinite_sink(call):
    call.sink[0] = INF


def infinite_slope(call):
    """0 * inf on the diagonal; the other pairs are excluded."""
    call.alibi_slopes[0] = INF


ROWS_OF_NAN = {
    "infinite bias": (infinite_bias, {"bias": "qk", "stats": True}),
    "bias of NaN and softcap": (row_of_nan_bias, {"bias": "qk", "softcap": 2.0}),
    "infinite bias and mask": (infinite_bias, {"bias": "bhqk", "mask": "qk", "heads_k": 1}),
    "infinite sink": (infinite_sink, {"sink": True, "causal": True}),
    "infinite slope": (infinite_slope, {"alibi": True}),
}


def check_dropped_of_nan(name: str, dtype: torch.dtype, backend: str, **options) -> None:
    """Rows of NaN whose pairs dropout takes in part (0.5) and all (1), and without it (0); of all
    also where O alone has a gradient."""
    spoil, own = ROWS_OF_NAN[name]
    for dropout_p in (0.0, 0.5, 1.0):
        sizes = {"batch": 1, "seqlen_q": 20, "dropout_p": dropout_p, "dtype": dtype}
        call = random_call(7, **{**sizes, **own, **options})
        spoil(call)
        check_call(call, backend)
    check_call(call, backend, dlse=False)


def check_in_float32(call, backend: str) -> None:
    """Against the reference in float32: of logits that overflow there, float64 has numbers."""
    module, needs = registry.get(backend), needs_of(call)
    out, lse = module.forward(call)[:2]
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    truths, true_grads = referred(call, dout, dlse, needs)
    grads = module.backward(call, dout, out, lse, dlse, needs)
    found = dict(zip(("out", "lse", *GRADIENTS), (out, lse, *grads), strict=True))
    for (name, got), truth in zip(found.items(), (*truths[:2], *true_grads), strict=True):
        if truth is not None:
            assert_close_to_reference(got, truth.double(), truth, "grad", name)


def check_overflow(backend: str, **options) -> None:
    """Logits that are finite as products and infinite times the scale, of either sign, and products
    that are infinite themselves.
    """
    for size, scale in ((1e18, 1e3), (1e20, 1e-3)):
        sizes = {"batch": 1, "seqlen_q": 20, "seqlen_k": 30, "scale": scale}
        call = random_call(7, **{**sizes, **options})
        call.q[:, :, 2] = call.k[:, :, 3] = size
        call.k[:, :, 5] = -size
        check_in_float32(call, backend)


# of `check_additive_weight`: what hides keys, and a length around the tiles
ADDITIVE_OPTIONS = ({}, {"causal": True, "seqlen_k": 70}, {"bias": "qk"})
ADDITIVE_WEIGHTS = (INF, -INF, torch.nan, 1e37, -3e38)


def check_additive_weight(backend: str, weight: float, **options) -> None:
    """Additive scores with a weight that is not small: inf - inf where w sum tanh is sum w -
    2 sum w r; 0 * inf in dK, dQ and dw of a pair whose logit is -inf; products with w that
    overflow.
    """
    sizes = {"batch": 1, "heads_q": 2, "seqlen_q": 70}
    call = random_call(7, additive=True, **{**sizes, **options})
    call.w[0, 2] = weight
    if 0 < abs(weight) < INF:  # logits are 0, what a division is shared by is infinite, and so 4 w
        call.w[0] = 0
        call.w[0, 2], call.w[0, 3] = weight, -weight
        call.q[:, 0] = call.k[:, 0] = 9
        check_call(call, backend)  # tanh' is 9e-16, and 0 in float32
    else:  # keys of every row that are hidden, or all of a row's
        call.q[:, 0, :, 2], call.q[:, 0, 5, 2] = 0, -20
        check_in_float32(call, backend)


def check_emptied_additive_rows(backend: str, seqlen: int, head_dim: int = 16) -> None:
    """Rows that an infinite weight of additive scores empties; Q = 0 in the padding of a tile makes
    other logits than -inf.
    """
    sizes = {"batch": 1, "heads_q": 2, "seqlen_q": seqlen, "head_dim": head_dim}
    call = random_call(7, additive=True, **sizes)
    call.w[0, 2], call.q[:, 0, :, 2] = INF, -20
    check_in_float32(call, backend)
