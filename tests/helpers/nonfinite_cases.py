"""NaN and inf in one place of K, V or Q: what the kernels of every backend are tried on."""

import torch

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
