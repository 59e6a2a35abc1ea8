"""The backward in one kernel, which adds dQ up in float32 sums: that it serves which calls, and that
its gradients obey the tolerance rule; and planted bugs, in the folder tests/mutants/triton/fused,
each of which must make the calls wrong that its first line names.
"""

import sys
from unittest import mock

import nonfinite_cases
import patches
import planted_triton
import pytest
import torch
from repository import ROOT

from attn_ext.backends import triton
from attn_ext.core.schema import TOP_LEFT, Needs
from attn_ext.ops import execute
from attn_ext.testing import check_call, needs_of, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.launch import attention, backward

HALVES = [torch.bfloat16, torch.float16]
PAIR = ["delta_kernel", "dkdv_kernel", "dq_kernel"]
FUSED = ["delta_kernel", "fused_kernel", "dq_from_sums_kernel"]
ONLY_BIAS = Needs(False, False, False, True)


def launched(call, needs, run=backward.backward) -> list[str]:
    """The kernels of a backward, those of far rows aside, without running them."""
    names = []
    with mock.patch.object(attention, "run", lambda kernel, *_: names.append(kernel.__name__)):
        out, lse = torch.zeros_like(call.q), torch.zeros(call.q.shape[:3])
        run(call, out, out, lse, None, needs)
    return [name for name in names if not name.startswith("far_")]


class AllAtOnce:
    """The Triton backend with the gradient of the bias apart, so that the others come of one
    kernel; memory: what each buffer from torch is filled with, if not with NaN, which a kernel
    computes again."""

    __name__ = "the fused kernel"

    def __init__(self, memory=None, run=backward.backward):
        self.memory, self.run = memory, run
        self.available, self.unsupported = triton.available, triton.unsupported
        self.forward = triton.forward

    def backward(self, call, dout, out, lse, dlse, needs):
        empty = torch.empty

        def dirty(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(self.memory) if x.is_floating_point() else x

        with mock.patch.object(torch, "empty", dirty if self.memory else empty):
            found = self.run(call, dout, out, lse, dlse, needs._replace(bias=False))
        if needs.bias:
            found = found._replace(bias=self.run(call, dout, out, lse, dlse, ONLY_BIAS).bias)
        return found


LONG = {"seqlen_q": 70, "seqlen_k": 101}  # three tiles each way, the last of them cut
CASES = {
    "plain": {}, "causal": {"causal": True}, "batch": {"batch": 2, "heads_q": 2},
    "window": {"window": (30, 5)}, "group": {"heads_q": 4, "heads_k": 2, "causal": True},
    "mask": {"mask": "bqk"}, "bias": {"bias": "hqk"}, "alibi": {"alibi": True, "causal": True},
    "softcap": {"softcap": 5.0}, "dropout": {"dropout_p": 0.3}, "sink": {"sink": True},
    "wide values": {"head_dim": 24, "head_dim_v": 72}, "128 columns": {"head_dim": 128},
    "packed": {"seqlens_q": [30, 0, 75, 1], "seqlens_k": [30, 40, 90, 7], "causal": True},
    "one query": {"seqlen_q": 1}, "keys past the last query": {"seqlen_q": 3, "causal": "top_left"},
    "all": {"mask": "bk", "bias": "hqk", "softcap": 5.0, "alibi": True, "sink": True,
            "dropout_p": 0.2, "window": (60, -1), "heads_q": 4, "heads_k": 2},
}  # fmt: skip


def case(name: str, dtype=torch.bfloat16):
    """The call of that name."""
    options = dict(CASES[name])
    if options.get("causal") == "top_left":
        options |= {"causal": True, "align": TOP_LEFT}
    length = {} if "seqlens_q" in options else LONG
    return random_call(5, **{"batch": 1, "dtype": dtype, "head_dim": 40} | length | options)


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
            torch.testing.assert_close(x, y, atol=2**-7 * float(y.abs().max()), rtol=0)


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
        torch.testing.assert_close(x, y.float(), atol=2**-7 * float(x.abs().max()), rtol=0)


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
    with configs.using(configs.key("fused", 64, 2), configs.PAIR):
        with mock.patch.object(attention, "architecture", lambda x: "sm_90"):
            assert launched(call, needs) == PAIR


def test_deterministic_algorithms_of_torch_take_two_kernels():
    """torch.use_deterministic_algorithms that nobody asks about."""
    torch.use_deterministic_algorithms(True)
    try:
        call = execute.as_torch_asks(case("plain"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched(call, Needs(True, True, True)) == PAIR


MUTANTS = {
    p.name.split("/")[1]: p
    for p in map(patches.read, sorted(ROOT.glob("tests/mutants/triton/fused/*.patch")))
}


def wrong(run=backward.backward) -> set[str]:
    """The calls whose gradients are wrong, or come of the wrong kernel."""
    found = set()
    checks = {name: case(name) for name in ("plain", "causal", "batch", "group", "packed")}
    checks["excluded"] = random_call(7, batch=1, seqlen_q=34, mask="bk", dtype=torch.float16)
    nonfinite_cases.masked_key(checks["excluded"], torch.nan)
    for name, call in checks.items():
        try:
            check_call(call, AllAtOnce(None if name == "excluded" else 3.0, run))
        except AssertionError:
            found.add(name)
    fixed = case("plain")._replace(deterministic=True)
    if launched(fixed, Needs(True, True, True), run) != PAIR:
        found.add("deterministic")
    return found


def plant(patch, monkeypatch, folder):
    """`backward` with a bug in its kernels or in what launches them."""
    ((file, text),) = patches.apply(patch, ROOT).items()
    (folder / "first").mkdir()
    (folder / "second").mkdir()
    module = planted_triton.loaded(text, folder / "first")
    if file.endswith("launch/backward.py"):
        return module.backward
    modules = [module]
    if file.endswith("/bwd.py"):  # whose functions fused.py takes
        monkeypatch.setitem(sys.modules, "planted_bwd", module)
        fused = (ROOT / "triton_kernels/kernels/fused.py").read_text()
        fused = fused.replace("attn_ext.triton_kernels.kernels.bwd", "planted_bwd")
        modules.append(planted_triton.loaded(fused, folder / "second"))
    for each in modules:
        for name in ("delta_kernel", *FUSED[1:]):
            if hasattr(each, name):
                monkeypatch.setattr(backward, name, getattr(each, name))
    return backward.backward


def test_the_kernels_as_they_are():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == set()
    assert len(MUTANTS) >= 7


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, monkeypatch, tmp_path):
    """A check that a lost term passes."""
    assert wrong(plant(MUTANTS[name], monkeypatch, tmp_path)) == set(MUTANTS[name].caught)
