"""The backend `emulated`: the CUDA kernels on CPU tensors, through the Python code of the cuda
backend.  It exists in tests only.
"""

from __future__ import annotations

import functools
import os

import tiers
import torch

from attn_ext.backends import native_gpu

FRAMES = native_gpu.FRAMES
# What the tests run in, of plain, random, poison, race and all (docs/design/emulation.md).  "all"
# notices whatever another mode notices of the bugs of tests/mutants (a test holds it), so that the
# others would repeat it; "plain", which is faster and depends on no seed, serves `make check`.
# ATTN_EXT_EMULATOR_MODE=race (or plain,random, ...) asks for others.
MODES = ("plain",) if tiers.CHECK else ("all",)
MODES = tuple(os.environ.get("ATTN_EXT_EMULATOR_MODE", ",".join(MODES)).split(","))


def set_mode(mode: str, seed: int, smem_kib: int = 99, **limits: int) -> None:
    """One of MODES, with the shared memory of a GPU: 99 KiB, the least from sm_80 on, or 163, what
    sm_80 itself has; with the Hopper kernels that of sm_90.  limits: grid_limit, of blocks along y
    and z."""
    from attn_ext import _emulated

    limits["smem_limit"] = (227 if _kernels().sm90 else smem_kib) * 1024
    _emulated.set_mode(mode, seed=seed, **limits)
    _emulated.set_rules(init_fences=True, shadow_unit=4)


@functools.cache
def _kernels() -> native_gpu.Kernels:
    from attn_ext import _emulated

    return native_gpu.Kernels(_emulated, "cpu")


def available() -> str:
    """ "" when attn_ext._emulated is built, else the remedy."""
    try:
        _kernels()
    except ImportError as error:
        return f"attn_ext._emulated is not built: reinstall with ATTN_EXT_EMULATED=1 ({error})"
    return ""


def unsupported(problem) -> list[str]:
    why = native_gpu.unsupported(problem)
    if problem.device != "cpu":
        why.append(f"tensors must be on the cpu, got {problem.device}")
    return why


def _repair_only_for(call, dout=None) -> None:
    """Let the kernels compute results with NaN once more only where a tensor has NaN, infinities or
    numbers that make huge logits: else it is a fault that a poisoned buffer shows, and must not be
    mended."""
    from attn_ext import _emulated

    factors = (x for x in (call.q, call.k, call.v, dout) if x is not None)
    terms = (x for x in (call.bias, call.sink, call.alibi_slopes) if x is not None)
    finite = all(bool((x.abs() < 1e4).all()) for x in factors)
    finite = finite and all(bool((x < torch.inf).all()) for x in terms)
    _emulated.set_repairs(not finite)


def forward(call):
    _repair_only_for(call)
    return _kernels().forward(call)


def backward(call, dout, out, lse, dlse, needs):
    _repair_only_for(call, dout)
    return _kernels().backward(call, dout, out, lse, dlse, needs)


def forward_partial(call):
    _repair_only_for(call)
    return _kernels().forward_partial(call)


def backward_partial(call, dout, delta, sums, needs):
    _repair_only_for(call, dout)
    return _kernels().backward_partial(call, dout, delta, sums, needs)
