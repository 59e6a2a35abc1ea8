"""Whatever is passed to attn_ext.inspect, it answers, or says argument, rule and value; it never
ends the process nor lets an error of torch through.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_ext import inspect

FUNCTIONS = {
    "row_stats": lambda q, k, **o: inspect.row_stats(q, k, **o),
    "top_k": lambda q, k, n=2, **o: inspect.top_k(q, k, n, **o),
    "mean_top_k": lambda q, k, n=2, **o: inspect.top_k(q, k, n, per_head=False, **o),
    "column_mass": inspect.column_mass,
    "weights": inspect.weights,
    "pooled_map": inspect.pooled_map,
    "rollout": lambda q, k, rows=None, **o: inspect.rollout([(q, k)], rows, **o),
}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: inspect.top_k(q, q, 0), "n must be at least 1, got 0"),
        (lambda q: inspect.top_k(q, q, True), "n must be an int, got bool True"),
        (lambda q: inspect.top_k(q, q, 2, per_head=1), "per_head must be a bool, got int 1"),
        (lambda q: inspect.top_k(q, q, 2, dropout_p=0.5), "unknown option 'dropout_p'"),
        (lambda q: inspect.weights(q, q, rows=[9]), "rows must be between -5 and 4, got 9"),
        (lambda q: inspect.weights(q, q, cols=[0.5]), "cols must be a slice or a list"),
        (lambda q: inspect.weights(q, q, rows=slice(0, 3, -1)), "rows must be a slice .*-1"),
        (lambda q: inspect.weights(q, q, rows=slice("a")), "rows must be a slice or a list"),
        (
            lambda q: inspect.weights(q, q[:, :, :0], cols=[0]),
            r"cols must be empty, .* got \[0\]",
        ),
        (lambda q: inspect.pooled_map(q, q, (1, 2, 3)), "size must be an int or"),
        (lambda q: inspect.rollout([]), "layers must hold at least one"),
        (lambda q: inspect.rollout(q), "layers must be a list of .* got Tensor"),
        (lambda q: inspect.rollout("ab"), "layers must be a list of .* got str"),
        (lambda q: inspect.rollout(np.array(1)), "layers must be a list of .* got ndarray"),
        (lambda q: inspect.rollout(None), "layers must be a list of .* got NoneType"),
        (lambda q: inspect.rollout([q]), "a layer must be .* got a Tensor"),
        (lambda q: inspect.rollout((q, q)), "a layer must be .* got a Tensor"),
        (lambda q: inspect.rollout([(q, q, 3)]), "the options of a layer must be a dict, got 3"),
        (lambda q: inspect.rollout([(q, q)], residual=2.0), "residual must be between 0 and 1"),
        (lambda q: inspect.column_mass(q, q, lse=q), "lse must have shape"),
        (lambda q: inspect.column_mass(q, q, lse=q[..., 0].int()), "lse must be floating, got"),
        (lambda q: inspect.column_mass(q, q, lse=q[..., 0].to("meta")), "lse must hold values"),
        (lambda q: inspect.row_stats(q[0], q), "q must have 4 dimensions"),
        (
            lambda q: inspect.row_stats(q, q, mask=torch.ones(5, device="meta") > 0),
            "mask must hold",
        ),
    ],
)
def test_bad_input(make, message):
    """A traceback from the depth of torch instead of argument, rule and value."""
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        make(torch.randn(1, 1, 5, 4))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_tensors_without_values(function):
    """The address of a tensor that has no memory, given to a kernel: the process ends."""
    q = torch.randn(1, 2, 5, 8)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        with pytest.raises(ValueError, match=r"q must hold values, .* got a FakeTensor"):
            function(fake, fake)
    with pytest.raises(ValueError, match=r"k must hold values, .* got a meta tensor"):
        function(q, q.to("meta"))
    with pytest.raises(ValueError, match=r"q must hold values, .* of a transform or a trace"):
        torch.vmap(function)(q[None], q[None])


SIZES = st.sampled_from([(0, 2, 5, 4), (1, 2, 0, 4), (1, 4, 3, 4), (1, 0, 3, 4), (1, 2, 3, 0),
                         (2, 3, 4), (), (1, 2, 1, 4), (2, 2, 5, 4), (1, 2, 5, 6)])  # fmt: skip
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool])
ODD = st.sampled_from([None, True, -1, 0, 1, 2, 7, 2**31, 2**70, 0.5, float("nan"), "a", (), [],
                       [0], [-9], [[1]], (2, 3), (None, 1), {}, slice(1, 9), torch.tensor(1),
                       torch.ones(5), torch.ones(5) > 0, torch.zeros(1, 2, 3), b"x"])  # fmt: skip
NAMES = ("n", "lse", "backend", "rows", "cols", "size", "causal", "window", "mask", "bias",
         "softcap", "alibi_slopes", "sink", "scale", "residual", "per_head")  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@given(data=st.data())
def test_any_input(name, data):
    """An error of torch, an assertion, or a crash, for whatever a user passes."""
    shapes, dtypes = data.draw(st.tuples(SIZES, SIZES)), data.draw(st.tuples(DTYPES, DTYPES))
    if data.draw(st.booleans()):
        shapes, dtypes = (shapes[0], shapes[0]), (dtypes[0], dtypes[0])
    if data.draw(st.booleans()):
        shapes, dtypes = ((1, 2, 5, 4),) * 2, (torch.float32,) * 2
    q, k = (torch.ones(s).to(d) for s, d in zip(shapes, dtypes, strict=True))
    options = data.draw(st.dictionaries(st.sampled_from(NAMES), ODD, max_size=2))
    try:
        FUNCTIONS[name](q, k, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        text = str(error)
        assert any(
            word in text
            for word in (
                "must",
                "unknown option",
                "unexpected keyword",
                "needs",
                "cannot serve",
                "multiple values",
                "multiple",
            )
        ), text


def test_rollout_takes_what_torch_takes_for_a_number():
    """A residual that is checked as a number and then used as it came."""
    q = torch.randn(1, 2, 5, 8)
    for one in (True, np.float32(1), torch.tensor(1.0), torch.tensor(True)):
        assert torch.equal(
            inspect.rollout([(q, q)], residual=one), inspect.rollout([(q, q)], residual=1.0)
        )
