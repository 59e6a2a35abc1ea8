"""The CUDA backend: csrc/cuda's kernels on NVIDIA GPUs from sm_80 on, compiled by NVRTC when they
are used for the first time (backends/jit) and launched by NVIDIA's driver (attn_ext._C.cuda)."""

from __future__ import annotations

import functools

import torch

from attn_ext.backends import native_gpu
from attn_ext.backends.jit import first_use
from attn_ext.backends.jit.nvrtc import CompileError, find
from attn_ext.core.problem import Problem

FRAMES = native_gpu.FRAMES


def image(kernel: str, capability: int) -> tuple[str, bytes]:
    """(symbol, machine code) of a kernel that is launched for the first time."""
    return first_use.image(kernel, capability, _cuda.driver_version() // 1000)


try:
    from attn_ext._C import cuda as _cuda
except ImportError as error:  # not built, or built for another Python
    _cuda, _import_error = None, error
else:
    _cuda.set_compile(image)


@functools.cache
def kernels() -> native_gpu.Kernels:
    """The kernels on this machine's GPUs."""
    return native_gpu.Kernels(_cuda, "cuda")


@functools.cache
def _driver() -> int:
    """The CUDA version of the driver: 12040 for 12.4."""
    return _cuda.driver_version()


@functools.cache
def _device_problem(index: int) -> str:
    """Why the kernels do not run on this device."""
    why = _cuda.device_problem(index) or first_use.problem(_driver(), find(_driver() // 1000))
    if why:
        return why
    try:
        known = first_use.default(_driver() // 1000).architectures
        first_use.architecture(_cuda.capability(index), known)
    except CompileError as error:
        return str(error)
    return ""


def is_hopper(index: int) -> bool:
    """Whether the kernels written for Hopper run on a device."""
    return _cuda is not None and not _cuda.driver_problem() and _cuda.sm90_problem(index) == ""


@functools.cache
def stands_back(index: int) -> str:
    """Why Triton's kernels come first on a device; "" where they do not.  GPUs of compute
    capability 10 and 11 have their full speed in tcgen05, to which Triton compiles, and the kernels
    here are those of sm_80 there; 12 (consumer Blackwell) has no tcgen05."""
    if _cuda is None or _cuda.driver_problem():
        return ""
    capability = _cuda.capability(index)
    if not 100 <= capability < 120:
        return ""
    return (
        f"compute capability {capability // 10}.{capability % 10} multiplies by tcgen05, for which "
        "Triton compiles; the cuda backend has kernels of sm_80 for it"
    )


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
        return f"attn_ext._C does not load here ({_import_error}): reinstall attn_ext"
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else "; this torch was built without CUDA"
        return f"torch sees no CUDA device{built}"
    problems = [_device_problem(i) for i in range(torch.cuda.device_count())]
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


def forward_partial(call):
    """(O, sums) of these keys alone, in float32 (`attn_ext.ops.parts`).  The call has no sink."""
    return kernels().forward_partial(call)


def backward_partial(call, dout, delta, sums, needs):
    """What these keys add to the gradients, in float32; delta and sums are those of whole rows."""
    return kernels().backward_partial(call, dout, delta, sums, needs)
