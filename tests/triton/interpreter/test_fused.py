"""The backward in one kernel, which adds dQ up in float32 sums: which calls it serves, and that its
gradients obey the tolerance rule.
"""

from dataclasses import replace
from unittest import mock

import nonfinite_cases
import pytest
import torch
from closeness import BF16_WEIGHTS, relative
from fused_calls import CASES, FUSED, PAIR, AllAtOnce, case, launched

import attn_ext
from attn_ext.backends import triton
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Needs
from attn_ext.ops import execute
from attn_ext.testing import check_call, needs_of, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.launch import attention, backward

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    """dQ of a tile that is added to the wrong rows, twice, or not at all."""
    call = case(name, HALVES[len(name) % 2])
    if call.cu_seqlens_q is None:
        assert launched(call, needs_of(call)._replace(bias=False)) == FUSED
    check_call(call, AllAtOnce(memory=3.0 if name != "packed" else None))


@pytest.mark.parametrize("name", nonfinite_cases.CASES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values(name, value):
    """0 * NaN of an excluded pair that stays in the sums; a NaN that is taken out of them."""
    change, options = nonfinite_cases.CASES[name]
    call = random_call(7, batch=1, seqlen_q=34, dtype=torch.float16, **options)
    change(call, value)
    check_call(call, AllAtOnce())


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_those_of_two_kernels(deterministic):
    """A factor that both the rule's tolerance and a small gradient hide."""
    call = case("all")._replace(bias=None, deterministic=deterministic)
    out, lse, *_ = triton.forward(call)
    dout, needs = torch.randn_like(out), needs_of(call)
    found = backward.backward(call, dout, out, lse, None, needs)
    with mock.patch.object(backward, "fused_tile", lambda *_: None):
        expected = backward.backward(call, dout, out, lse, None, needs)
    for name, x, y in zip("qkv", found, expected, strict=False):
        if deterministic or name != "q":
            assert torch.equal(x, y), name
        else:
            assert relative(x, y) <= BF16_WEIGHTS, name


def test_parts_of_a_larger_call():
    """float32 gradients of 16-bit inputs, which a rounding between would spoil."""
    call = case("causal")
    out, lse, *_ = triton.forward(call)
    dout, needs = torch.randn_like(out), Needs(True, True, True)
    delta = (dout.float() * out.float()).sum(-1)
    found = backward.backward(call, dout, None, lse, delta, needs)
    whole = backward.backward(call, dout, out, lse, None, needs)
    for x, y in zip(found[:3], whole[:3], strict=True):
        assert x.dtype == torch.float32
        assert relative(x, y.float()) <= BF16_WEIGHTS


def test_which_calls_take_two_kernels():
    """A result that differs from run to run where it must not; a kernel that makes too much."""
    call, needs = case("plain"), Needs(True, True, True)
    assert launched(call, needs) == FUSED
    for some in (Needs(True, True, False), Needs(True, False, True)):
        assert launched(call, some) == FUSED
    assert launched(call, Needs(True, False, False)) == [PAIR[0], PAIR[2]]
    assert launched(call, Needs(False, True, True)) == PAIR[:2]
    assert launched(call._replace(deterministic=True), needs) == PAIR
    assert launched(case("bias"), needs._replace(bias=True)) == PAIR
    single = call._replace(**{name: getattr(call, name).float() for name in "qkv"})
    assert launched(single, needs) == PAIR
    assert launched(random_call(5, head_dim=160, dtype=torch.bfloat16), needs) == PAIR
    with mock.patch.object(attention, "architecture", lambda x: "sm_90"):
        assert launched(call, needs) == FUSED
        assert launched(case("all")._replace(bias=None), needs) == FUSED
        with configs.using(configs.key("fused", 64, 2), configs.PAIR):
            assert launched(call, needs) == PAIR
    with mock.patch.object(attention, "architecture", lambda x: "sm_100"):
        assert launched(case("all")._replace(bias=None), needs) == PAIR, "of which no row is known"


def test_explain_names_the_kernels(monkeypatch):
    """A rule that explain has for itself."""
    q = case("plain").q.detach().requires_grad_()
    said = attn_ext.explain(q, q, q, backend="triton")
    assert "fused_kernel" in said.backward and f"backward by {said.backward}" in str(said)
    said = attn_ext.explain(q, q, q, deterministic=True, backend="triton")
    assert said.backward == "dkdv_kernel and dq_kernel"
    bias = torch.zeros(70, 70, dtype=q.dtype, requires_grad=True)
    assert "fused" not in attn_ext.explain(q, q, q, bias=bias, backend="triton").backward
    assert "fused" in attn_ext.explain(q, q, q, bias=bias.detach(), backend="triton").backward
    assert attn_ext.explain(q.detach(), q.detach(), q.detach(), backend="triton").backward == ""
    monkeypatch.setattr(attention, "architecture_of", lambda index: "sm_100")
    problem = Problem.of(case("plain"))
    assert "fused" in backward.kernels_of(problem)
    assert "fused" not in backward.kernels_of(replace(problem, device="cuda"))


def test_deterministic_algorithms_of_torch_take_two_kernels():
    """torch.use_deterministic_algorithms that nobody asks about."""
    torch.use_deterministic_algorithms(True)
    try:
        call = execute.as_torch_asks(case("plain"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched(call, Needs(True, True, True)) == PAIR
