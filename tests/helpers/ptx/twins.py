"""Each wrapper of ptx.cuh and ptx_sm90.cuh twice on the emulated machine: its host twin, and its
PTX as NVRTC makes it.  The twins are held to numpy elsewhere (test_emulator.py and
test_emulator_sm90.py); where both give the same words, the PTX is right as well.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from closeness import TWO_LAST_PLACES_NEAR_0, assert_arrays_close
from repository import ROOT

from attn_ext import _emulated

TESTS = ROOT / "csrc/emulation/tests"
# kernel -> the header that defines it, and the architecture that it is compiled for
KERNELS = {
    "attn::wrappers::wrappers": ("emulation/tests/wrappers.cuh", "80"),
    "attn::hopper::wrappers<": ("emulation/tests/hopper.cuh", "90a"),
    "attn::hopper::registers<": ("emulation/tests/hopper.cuh", "90a"),
}
LANES = np.arange(32, dtype=np.uint32)
# Numbers of which each operation makes something of its own: of both signs, large, small, halfway
# between two of a narrower type, subnormal.
NUMBERS = np.array([1.5, -2.25, 3e-39, 1e-40, 70000.0, 0.1, -7.3, 1.00390625], np.float32)


def ops(header: str) -> list[str]:
    """The operations of a header of csrc/emulation/tests, in the order of their numbers."""
    text = re.sub(r"//[^\n]*", "", (TESTS / header).read_text())
    return re.findall(r"\w+", re.search(r"enum Op : int \{(.*?)\}", text, re.S)[1])


OPS = ops("wrappers.cuh")
_HOPPER = ops("hopper.cuh")
_RACES, _OUT_OF_TURN, _CHOICES = map(_HOPPER.index, ("UNFENCED", "TURN_UNFENCED", "BOX_LANDS"))
HOPPER_OPS = _HOPPER[:_RACES]
RACES = tuple(_HOPPER[_RACES:_OUT_OF_TURN])  # of which race and all must complain
OUT_OF_TURN = tuple(_HOPPER[_OUT_OF_TURN:_CHOICES])  # and of these whoever asks for an order


@functools.cache
def _input(op: str) -> tuple[np.ndarray, np.ndarray]:
    """[32, 16] words of the lanes, 512 words of shared memory."""
    rng = np.random.default_rng(5)
    words = rng.integers(0, 2**32, (32, 16), dtype=np.uint32)
    image = rng.integers(0, 2**32, 512, dtype=np.uint32)
    if op.startswith(("MMA", "PACK", "TO_TF32", "EXP2", "LOG2", "RCP", "TANH", "ATOMICS")):
        each = (LANES[:, None] + np.arange(16)) % len(NUMBERS)
        numbers = NUMBERS[each] * (1 + LANES[:, None] / 64).astype(np.float32)
        words = np.ascontiguousarray(numbers, np.float32).view(np.uint32).copy()
    if op in ("MMA_BF16", "MMA_FP16"):
        # halves of the size of 1, so that no sum is infinite
        halves = rng.standard_normal((32, 12)).astype(np.float32)
        bits = halves.view(np.uint32) >> 16 if op == "MMA_BF16" else \
            halves.astype(np.float16).view(np.uint16).astype(np.uint32)  # fmt: skip
        words[:, :6] = bits[:, :6] | bits[:, 6:] << 16
    if op == "SHFL":
        words[:, 1] = (7 * LANES + 3) % 32
    if op.startswith("LDMATRIX"):
        words[:, 0] = 16 * ((5 * LANES + 2) % 32)
    if op == "BALLOT":
        words[:, 0] = LANES % 3
    if op.startswith("CP_ASYNC"):
        words[:, 12] = LANES % 2
    return words, image


def run(op: str) -> np.ndarray:
    """What the lanes get from one wrapper of ptx.cuh, by whatever is active."""
    return _emulated.wrapper(OPS.index(op), *_input(op))


def run_hopper(op: str, bf16: bool = True) -> np.ndarray:
    """The same of ptx_sm90.cuh."""
    return _emulated.hopper(_HOPPER.index(op), bf16)


def assert_same(op: str, got: np.ndarray, want: np.ndarray) -> None:
    """The same words; tanh, which both compute by a formula of their own, nearly."""
    if op == "TANH":
        numbers = (np.ascontiguousarray(x[:, 0]).view(np.float32) for x in (got, want))
        return assert_arrays_close(*numbers, TWO_LAST_PLACES_NEAR_0, op)
    return np.testing.assert_array_equal(got, want, err_msg=op)
