"""The CUDA backend: csrc/cuda's kernels (attn_ext._cuda) on NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import functools
import importlib.util

import torch

from attn_ext.backends import native_gpu
from attn_ext.core.problem import Problem

try:
    from attn_ext import _cuda
except ImportError as error:  # not built, or built for another Python
    _cuda, _import_error = None, error


@functools.cache
def kernels() -> native_gpu.Kernels:
    """The kernels on this machine's GPUs."""
    return native_gpu.Kernels(_cuda, "cuda")


@functools.cache
def _device_problem(index: int) -> str:
    """Why the kernels do not run on this device; asked only for tensors that lie on it, since
    loading a kernel makes a CUDA context."""
    return _cuda.device_problem(index) or _cuda.kernel_problem(index)


def is_hopper(index: int) -> bool:
    """Whether the kernels written for Hopper run on a device."""
    return _cuda is not None and _cuda.sm90_problem(index) == ""


class Hopper:
    """This backend with the kernels written for Hopper in force, whatever was verified before."""

    available = staticmethod(lambda: available())
    unsupported = staticmethod(lambda problem: unsupported(problem))

    def __init__(self):
        self._kernels = native_gpu.Kernels(_cuda, "cuda")
        self._kernels.sm90 = True
        self.forward, self.backward = self._kernels.forward, self._kernels.backward


@functools.cache
def available() -> str:
    """ "" when a CUDA device of this machine can run the kernels, else reason and remedy."""
    if _cuda is None:
        built = importlib.util.find_spec("attn_ext._cuda") is not None
        why = f"attn_ext._cuda does not load here ({_import_error})" if built else \
            "attn_ext was built without its CUDA kernels"  # fmt: skip
        return f"{why}: install nvcc and reinstall with ATTN_EXT_CUDA=1"
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this torch was built without CUDA"
        return f"torch sees no CUDA device{built}"
    problems = [_cuda.device_problem(i) for i in range(torch.cuda.device_count())]
    return "" if "" in problems else problems[0]


def unsupported(problem: Problem) -> list[str]:
    """Every reason why this backend cannot serve `problem`."""
    why = native_gpu.unsupported(problem)
    if problem.device != "cuda":
        return [f"tensors must be on cuda, got {problem.device}", *why]
    missing = _device_problem(problem.device_index)
    return [f"cuda:{problem.device_index}: {missing}", *why] if missing else why


def forward(call):
    """O, LSE and, when `call.need_stats`, the largest logit and the entropy of each row."""
    return kernels().forward(call)


def backward(call, dout, out, lse, dlse, needs):
    """The gradients; None where `needs` says so."""
    return kernels().backward(call, dout, out, lse, dlse, needs)
