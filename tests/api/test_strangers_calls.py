"""What random calls of the public functions by an outsider broke: arguments of the wrong kind that
were accepted or named nothing, tensor subclasses in side inputs, sums too long for float32.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_map

import attn_ext
from attn_ext import inspect

CU = torch.tensor([0, 2, 5], dtype=torch.int32)
BIG_WINDOW = (2**31, 2**63 - 1)


def x(*shape):
    return torch.randn(shape or (1, 2, 5, 8))


def nested():
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])


def quantized():
    return torch.quantize_per_tensor(x(), 0.1, 0, torch.quint8)


def dense(q=None, **options):
    return attn_ext.attention(x() if q is None else q, x(), x(), **options)


def packed(**options):
    return attn_ext.attention_varlen(x(5, 2, 8), x(5, 2, 8), x(5, 2, 8), CU, CU, **options)


def additive(q=None, **options):
    q = x() if q is None else q
    return attn_ext.additive_attention(q, x(), x(), x(8), b=x(8), **options)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: dense(nested()), "q"),
        (lambda: dense(quantized()), "q"),
        (lambda: dense(bias=nested()), "bias"),
        (lambda: dense(return_lse=1), "return_lse"),
        (lambda: dense(return_stats=torch.tensor([1, 2])), "return_stats"),
        (lambda: dense(dropout_p=torch.tensor([0.0, 0.0])), "dropout_p"),
        (lambda: packed(return_lse="yes"), "return_lse"),
        (lambda: attn_ext.attention_decode(x(), x(), x(), return_lse=None), "return_lse"),
        (lambda: additive(return_lse=1), "return_lse"),
        (lambda: dense(causal=[True]), "causal"),
        (lambda: dense(scale={}), "scale"),
        (lambda: dense(backend=[]), "backend"),
        (lambda: inspect.top_k(x(), x(), 2, backend=[]), "backend"),
        (lambda: inspect.pooled_map(x(), x(), 2.5), "size"),
        (lambda: inspect.weights(x(), x(), rows="abc"), "rows"),
        (lambda: additive(x().to(torch.float8_e4m3fn)), "q"),
    ],
)
def test_kinds_of_arguments(call, name):
    """Accepted, told as an error of torch's, or "unhashable type" without the argument's name."""
    for _ in range(2):  # a remembered call must be as strict as the first
        with pytest.raises(TypeError, match=rf"^{name} must be "):
            call()


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: additive(torch.tensor(1.0)), "q"),
        (lambda: inspect.row_stats(x(), torch.tensor(1.0)), "k"),
        (lambda: additive(lengths=torch.tensor([9], dtype=torch.int32)), "lengths"),
    ],
)
def test_values_of_arguments(call, name):
    """An IndexError of torch's, or the name of an argument that the function does not have."""
    with pytest.raises(ValueError, match=rf"^{name} must "):
        call()


def test_no_flag_is_checked_after_the_cache_is_written():
    """A call that fails has appended its keys."""
    cache, new = torch.zeros(1, 2, 5, 8), x(1, 2, 1, 8)
    length = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(TypeError):
        attn_ext.attention_decode(new, cache, cache, length, k_new=new, v_new=new, return_lse=1)
    assert not cache.any()


def test_nothing_is_appended_for_a_call_that_no_backend_serves():
    """Keys of a call that fails, in the cache twice after the caller tries again."""
    cache, new = torch.zeros(1, 2, 5, 8), x(1, 2, 1, 8)
    length = torch.tensor([2], dtype=torch.int32)
    for backend, error in (("nowhere", ValueError), ("cuda", NotImplementedError)):
        with pytest.raises(error):
            attn_ext.attention_decode(
                new, cache, cache, length, k_new=new, v_new=new, backend=backend
            )
        assert not cache.any()


def test_windows_and_scales_near_64_bits():
    """OverflowError, or a window that wraps round to a narrow one."""
    q, k = x(), x()
    assert torch.equal(attn_ext.attention(q, k, k, window=BIG_WINDOW), attn_ext.attention(q, k, k))
    w = x(8)
    assert torch.equal(
        attn_ext.additive_attention(q, k, k, w, window=BIG_WINDOW),
        attn_ext.additive_attention(q, k, k, w),
    )
    p = inspect.weights(q, k, window=BIG_WINDOW, scale=0, softcap=2**70)
    torch.testing.assert_close(p, torch.full_like(p, 0.2))


def test_weights_of_no_rows():
    """An empty list of positions refused, since torch makes floats of it."""
    assert inspect.weights(x(), x(), rows=[], cols=[1]).shape == (1, 2, 0, 1)


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as DTensor and FakeTensor are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = tree_map(lambda t: t.inner if isinstance(t, Wrapped) else t, (args, kwargs or {}))
        out = function(*inner[0], **inner[1])
        return tree_map(lambda t: Wrapped(t) if isinstance(t, torch.Tensor) else t, out)


@pytest.mark.parametrize("name", ["mask", "bias", "sink", "alibi_slopes"])
def test_a_subclass_in_a_side_input(name):
    """Its address, which is null, taken for an absent mask: a wrong result without a word."""
    q, k = x(), x()
    value = {"mask": torch.eye(5) > 0, "bias": 3 * x(5, 5)}.get(name, x(2))
    want = attn_ext.attention(q, k, k, **{name: value})
    got = attn_ext.attention(q, k, k, **{name: Wrapped(value)})
    assert torch.equal(got.inner, want)


def test_export_with_unbounded_lengths():
    """A check of the length that bounds the exported program's dimensions."""

    class Attend(torch.nn.Module):
        def forward(self, q, k):
            return attn_ext.attention(q, k, k, causal="top_left")

    sizes = [torch.export.Dim(name) for name in ("batch", "queries", "keys")]
    shapes = ({0: sizes[0], 2: sizes[1]}, {0: sizes[0], 2: sizes[2]})
    exported = torch.export.export(Attend(), (x(2, 2, 5, 8), x(2, 2, 7, 8)), dynamic_shapes=shapes)
    q, k = x(3, 2, 9, 8), x(3, 2, 6, 8)
    torch.testing.assert_close(exported.module()(q, k), Attend()(q, k))


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 600, 1)], ids=["a head", "a query"])
def test_gradient_of_a_bias_that_many_pairs_share(shape, normalizer):
    """Hundreds of thousands of terms added to one float32, one after the other: 50 times the
    error."""
    q, k, v = x(1, 2, 600, 16), x(1, 1, 600, 16), x(1, 1, 600, 16)
    dout = x(1, 2, 600, 16)

    def gradient(dtype, backend):
        bias = torch.zeros(shape, dtype=dtype, requires_grad=True)
        inputs = (t.to(dtype) for t in (q, k, v))
        out = attn_ext.attention(*inputs, bias=bias, normalizer=normalizer, backend=backend)
        # all rows' gradients of one sign: what is lost in one does not return in another
        return torch.autograd.grad((out * dout.to(dtype)).square().sum(), bias)[0]

    exact = gradient(torch.float64, "reference")
    error = (gradient(torch.float32, "auto") - exact).abs().max()
    naive = (gradient(torch.float32, "reference") - exact).abs().max()
    assert error <= 8 * naive + 1e-6 * exact.abs().max(), (error, naive)


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "0"}])
def test_command_line_on_a_terminal_of_little_help(environment):
    """A UnicodeEncodeError of a table's borders; nothing at all printed in a width of 0."""
    command = [sys.executable, "-m", "attn_ext.cli", "doctor"]
    ran = subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120)
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"reference" in ran.stdout


def test_the_decorator_without_its_parentheses():
    """A function that is taken for `strict`, and an error that does not say what to write."""
    with pytest.raises(TypeError, match=r"@replace_sdpa\(\)"):
        attn_ext.replace_sdpa(x)
