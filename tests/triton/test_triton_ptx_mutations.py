"""Faults planted in the PTX that Triton makes, and which mode of the executor notices each.

Triton's code has no text of ours to patch: a fault is a pattern in the PTX of one kernel and what
comes in its place.  Noticed: a result beyond the rule of tolerance, or a launch that ends with an
error.  Compiled at each commit is a sample, and what a change can affect (tests/helpers/seen.py).
"""

import re
from typing import NamedTuple

import pytest
import seen
import torch

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)
pytest.importorskip("triton", minversion="3.9", reason="its launcher is Python from 3.9 on")

import triton_seen  # noqa: E402  after the modules that they need are known to be there
from ptx import triton_driver  # noqa: E402

from attn_ext.testing import check_call, random_call  # noqa: E402


class Fault(NamedTuple):
    """pattern -> instead, once in the PTX of a kernel, at the match of this number; caught: the
    modes that must say so; silent: those that must not."""

    architecture: str
    kernel: str
    pattern: str
    instead: str
    which: int = 0
    caught: tuple[str, ...] = ("plain", "race", "all")
    silent: tuple[str, ...] = ()
    call: dict | None = None  # other options of the call


TMA = r"(cp\.async\.bulk\.tensor[^\[]*)\[%r\d+\]"
TRY_WAIT = r"(mbarrier\.try_wait[^,]*, \[%r\d+\]), %r\d+;"
WAITS, ORDER = ("poison", "race", "all"), ("race", "all")
FAULTS = {
    "a product is read before its wait": Fault(
        "sm_90", "forward", r"wgmma\.wait_group\.sync\.aligned 0;",
        "wgmma.wait_group.sync.aligned 1;", caught=("poison", "all"), silent=("plain",)),
    "a load's barrier is asked for the other parity": Fault(
        "sm_90", "forward", TRY_WAIT, r"\1, 1;", caught=WAITS),
    "half of the bytes announced": Fault(
        "sm_90", "forward", r"(expect_tx[^,]*, \[%r\d+\]), 4096;", r"\1, 2048;"),
    "a tile of keys lands in the place of another": Fault(
        "sm_90", "forward", r"(cp\.async\.bulk\.tensor[^\[]*)\[%r\d+\](?=.*%rd30)", r"\1[%r122]"),
    "no wgmma.fence": Fault("sm_90", "forward", r"wgmma\.fence\.sync\.aligned;", ""),
    "an operand of a product taken as not transposed": Fault(
        "sm_90", "forward", r"(wgmma\.mma_async[^;]*, 1, 1), 1;", r"\1, 0;"),
    "no proxy fence between stores and wgmma": Fault(
        "sm_90", "dq", r"fence\.proxy\.async\.shared::cta;", "", which=0, caught=ORDER,
        silent=("plain", "poison")),
    "a wait for copies leaves one group under way": Fault(
        "sm_90", "dq", r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;", caught=ORDER,
        silent=("plain",)),
    "no barrier before a buffer is filled again": Fault(
        "sm_90", "dq", r"(wgmma\.commit_group\.sync\.aligned;(?:(?!bar\.sync|wait_group)[\s\S])*)"
        r"bar\.sync\s+0;(?=(?:(?!bar\.sync)[\s\S])*?cp\.async\.cg)", r"\1", caught=ORDER),
    "ldmatrix without .trans": Fault("sm_80", "forward", r"\.trans\.shared", ".shared"),
    "two registers of an mma changed places": Fault(
        "sm_80", "forward", r"(mma\.sync[^{]*\{[^}]*\}, \{[^}]*\}, )\{ ?(%r\d+), (%r\d+) ?\}",
        r"\1{\3, \2}"),
    "a sum over another lane": Fault("sm_80", "forward", r"(shfl[^;]*), 2, 31, -1;",
                                     r"\1, 1, 31, -1;"),
}  # fmt: skip
# a sum over 24 columns, one a lane: every lane of a row stores it to the same place
ONE_A_LANE = {"seqlens_q": [3], "seqlens_k": [3], "head_dim": 1, "head_dim_v": 24,
              "dtype": torch.float32}  # fmt: skip
FAULTS["a product fused with what a shuffle brings"] = Fault(
    "sm_90", "delta",
    r"(fma\.rn\.f32\s+(%r\d+), (%r\d+), (%r\d+), 0f00000000;[\s\S]*?"
    r"shfl\.sync\.bfly\.b32\s+(%r\d+), \2, [\s\S]*?)add\.f32\s+(%r\d+), \2, \5;",
    r"\1fma.rn.f32 \6, \3, \4, \5;", caught=ORDER, silent=("plain", "random", "poison"),
    call=ONE_A_LANE,
)  # fmt: skip
CLEARED = {"seqlen_q": 70, "seqlen_k": 132, "mask": "bqk", "batch": 1, "head_dim": 64,
           "dtype": torch.bfloat16, "deterministic": True}  # fmt: skip
FAULTS |= {
    f"a mask clears dS by {what}, {architecture}": Fault(
        architecture, "dq", pattern, instead, caught=("plain",), call=CLEARED)
    for architecture in ("sm_80", "sm_90")
    for what, pattern, instead in (
        ("a whole byte, not its sign", "0x1100, 0xcc00", "0x1100, 0x4400"),
        ("the neighbour's byte", r"(mad\.lo\.u32 s, )(%r\d+)(, 0x1100, 0xcc00; mad\.lo\.u32 s, )"
         r"(%r\d+)", r"\1\4\3\2"),
    )
}  # fmt: skip
DUE = seen.sample(FAULTS, 2)


@pytest.fixture(autouse=True)
def plain_mode():
    yield
    emulated.set_mode("plain")


def planted(fault: Fault):
    """The change of a kernel's PTX, for triton_driver.Driver."""

    def change(name: str, text: str) -> str:
        if name != f"{fault.kernel}_kernel":
            return text
        matches = list(re.finditer(fault.pattern, text))
        assert len(matches) > fault.which, f"{fault.pattern} is not in {name}"
        match = matches[fault.which]
        return text[: match.start()] + match.expand(fault.instead) + text[match.end() :]

    return change


def notice(mode: str, driver, call, grads: bool) -> str:
    """What is noticed in this mode, or "ok"."""
    for seed in range(2 if mode in ("random", "all") else 1):
        triton_driver.set_mode(mode, driver, seed)
        try:
            check_call(call, triton_driver.backend(driver), grads=grads)
        except RuntimeError as error:
            return f"raised {error}"
        except AssertionError as error:
            if "is not in" in str(error):
                raise
            return f"wrong: {error}"
    return "ok"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_noticed(name):
    fault = FAULTS[name]
    digest = triton_seen.executed(__file__, repr(fault))
    if seen.known("triton_ptx_faults", name, digest, DUE):
        return
    driver = triton_driver.Driver(fault.architecture, planted(fault))
    # dQ has a kernel of its own in deterministic calls
    options = {"seqlen_q": 70, "seqlen_k": 201, "causal": True, "head_dim": 64, "batch": 1,
               "dtype": torch.bfloat16, "deterministic": fault.kernel == "dq"}  # fmt: skip
    call = random_call(1, **(fault.call or options))
    grads = fault.kernel != "forward"
    modes = (*fault.caught, *fault.silent)
    found = {mode: notice(mode, driver, call, grads) for mode in modes}
    assert f"{fault.kernel}_kernel" in driver.launched
    missed = [mode for mode in fault.caught if found[mode] == "ok"]
    assert missed == [], f"not noticed by {missed}: {found}"
    noticed = [mode for mode in fault.silent if found[mode] != "ok"]
    assert noticed == [], f"noticed by more modes than stated, {noticed}: {found}"
    seen.passed("triton_ptx_faults", name, digest)


def test_the_tables_name_no_fault_that_is_gone():
    """A fault that was taken out, and still looks as if it was noticed."""
    assert not seen.strangers("triton_ptx_faults", FAULTS)
