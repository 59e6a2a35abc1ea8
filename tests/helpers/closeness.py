"""How near two results must be where the tolerance rule of attn_ext.testing does not decide: it
needs a reference in float64 and one in the inputs' dtype.  No test has a figure of its own
(tests/package/test_house.py); each one here says what it stands for.
"""

from typing import NamedTuple

import numpy as np
import torch


class Tolerance(NamedTuple):
    """|got - want| <= atol + rtol * |want|"""

    rtol: float
    atol: float


FLOAT32 = Tolerance(1e-4, 1e-5)  # the same work in float32, added up in another order
ONE_SUM = Tolerance(1e-5, 1e-5)  # one such sum of weights, which are at most 1
BFLOAT16 = Tolerance(2e-2, 2e-2)  # inputs, weights and a result of 8 bits
BFLOAT16_LAYERS = Tolerance(3e-2, 3e-2)  # the same after one more product, or through backward
HALF = Tolerance(1e-2, 1e-2)  # a result that passed through 11 bits, or a gradient through 8
MEAN_IN_HALF = Tolerance(0.0, 4e-3)  # one rounding to 8 bits of a number below 1
SECOND = Tolerance(1e-12, 1e-12)  # second derivatives in float64, added up in another order
LSE = Tolerance(1e-6, 1e-6)  # a logarithm in float32 against float64
QUOTIENT = Tolerance(1e-6, 1e-6)  # a difference quotient with steps of 1e-6, in float64
TRAINED = Tolerance(1e-6, 1e-7)  # losses of two steps of one model, trained by the same arithmetic
DROPOUT_MEAN = Tolerance(0.1, 0.1)  # the mean of thousands of draws
PAGE_COLOUR = Tolerance(0.0, 4e-3)  # how strong a browser's colour is, of 0.8 * 255 steps
TWO_LAST_PLACES = Tolerance(2.4e-7, 0.0)  # two units of the last place of float32
TWO_LAST_PLACES_NEAR_0 = Tolerance(2.4e-7, 2.4e-7)  # of log2, which is 0 at 1
APPROXIMATE = Tolerance(4e-7, 4e-7)  # the hardware's ex2.approx and its like, by the PTX manual


# |got - want| / |want| of whole tensors, by their norms: a sequence on several ranks against one
SHARDS = {torch.float32: 2e-6, torch.float64: 1e-12}
BF16_WEIGHTS = 4e-3  # results in float32 of sums whose weights have 8 bits, by their norms
BF16_SHARDS = 1.15  # the error of shards in bfloat16 against that of one call, both by their norms


def relative(got, want) -> float:
    """|got - want| / |want| by the norms of what is finite; inf where that is not the same."""
    finite = torch.isfinite(want)
    if got.shape != want.shape or not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    got, want = got[finite].double(), want[finite].double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def of_logits(largest: float) -> Tolerance:
    """Of weights whose logits float32 keeps to largest * 2^-24, products' roundings at least."""
    return Tolerance(0.0, max(3e-3, largest / 2**24))


def assert_close(got, want, tolerance: Tolerance) -> None:
    """Tensors or numbers, within a tolerance that is written above."""
    torch.testing.assert_close(got, want, **tolerance._asdict())


def assert_arrays_close(got, want, tolerance: Tolerance, name: str = "") -> None:
    """Arrays of numpy, whatever their dtypes."""
    np.testing.assert_allclose(got, want, **tolerance._asdict(), err_msg=name)


def assert_same(got, want) -> None:
    """The same numbers, NaN where there is NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def is_close(got, want, tolerance: Tolerance) -> bool:
    """Whether they are: for tests that something does change a result."""
    return torch.allclose(got, want, **tolerance._asdict())
