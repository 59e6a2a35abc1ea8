"""Emulated CUDA kernels with a bug: compiled from a copy of the sources, they run in place of those
of attn_ext._emulated.
"""

import contextlib
import ctypes
import os
import pickle
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import patches
import torch
from emulator_build import compiler
from ptx import build
from repository import ROOT

from attn_ext import _emulated
from attn_ext.backends import registry
from attn_ext.testing import check_call

# attn_ext._emulated shows these by other names only.
PRODUCTS = """namespace attn::ptx {
template <>
void mma_m16n8k16<bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        emulation::Where at) {
  const uint32_t b[2] = {b0, b1};
  compiled::mma_bf16(acc, a, b, at);
}
}  // namespace attn::ptx
"""


def library(
    folder: Path, header: str, kernels, patch=None, params: str | dict[str, str] = "Params"
) -> dict[str, int]:
    """Where each kernel of a header of csrc is, by its name in C++; params: what they take, all the
    same or each by its name."""
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree, ignore=shutil.ignore_patterns("cpu", "tests"))
    for file, text in (patches.apply(patch, ROOT) if patch else {}).items():
        (folder / file).write_text(text)
    takes = dict.fromkeys(kernels, params) if isinstance(params, str) else params
    unit = folder / "unit.cpp"
    unit.write_text(
        f'#include "{header}"\n#include "{build.HEADER}"\n{PRODUCTS}'
        + "".join(
            f'extern "C" __attribute__((visibility("default"))) void planted_{at}(void* p) {{\n'
            f"  {name}(*static_cast<attn::cuda::{takes[name]}*>(p));\n}}\n"
            for at, name in enumerate(kernels)
        )
    )
    made = folder / "planted.so"
    compiler(*build.FLAGS, f"-I{tree}", unit, _emulated.__file__, "-o", made)
    loaded = ctypes.CDLL(str(made))
    return {
        name: ctypes.cast(getattr(loaded, f"planted_{at}"), ctypes.c_void_p).value
        for at, name in enumerate(kernels)
    }


def wrong_with(
    folder: Path, header: str, kernels, wrong: Callable[[], tuple], patch=None, params="Params"
) -> tuple[str, ...]:
    """What `wrong` says while the kernels with a bug, or without one, run."""
    planted = library(folder, header, kernels, patch, params)
    found, used = _in_child(lambda: _run(planted, wrong))
    assert set(planted) <= used
    return found


def _run(planted: dict[str, int], wrong: Callable[[], tuple]) -> tuple[tuple, set[str]]:
    """What `wrong` says, and which kernels ran."""
    used = set()

    def resolve(offset: int) -> int:
        name = build.expression(build.symbols()[offset])
        used.add(name)
        return planted.get(name, 0)

    _emulated.replace_kernels(resolve)
    return wrong(), used


def _in_child(compute: Callable[[], tuple]) -> tuple:
    """What it returns in a copy of this process: a bug may write over what another test needs."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reading)
            torch.set_num_threads(1)  # OpenMP's other threads are not copied
            with os.fdopen(writing, "wb") as stream:
                pickle.dump(compute(), stream)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        given = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the process with the planted bug ended with {status}"
    return pickle.loads(given)


@contextlib.contextmanager
def ampere():
    """The emulated backend, which takes the kernels of sm_80."""
    emulated = registry.get("emulated")
    kernels = emulated._kernels()
    before, kernels.sm90 = kernels.sm90, False
    try:
        yield emulated
    finally:
        kernels.sm90 = before


@contextlib.contextmanager
def hopper(multiprocessors: int = 1):
    """The emulated backend, which takes the kernels of Hopper wherever they serve a call."""
    emulated = registry.get("emulated")
    kernels = emulated._kernels()
    before = kernels.sm90, dict(kernels._devices)
    kernels.sm90, kernels._devices = True, {0: (multiprocessors, True)}
    try:
        yield emulated
    finally:
        kernels.sm90, kernels._devices = before


def _wrong(calls: dict[str, tuple], grads: bool) -> tuple[str, ...]:
    """The names of the calls that are wrong; name -> (whose kernels, mode, call)."""
    found = []
    for name, (kernels, mode, call) in calls.items():
        with kernels as emulated:
            emulated.set_mode(mode, 1)
            try:
                check_call(call, emulated, grads=grads)
            except (AssertionError, RuntimeError):
                found.append(name)
    return tuple(sorted(found))


def wrong_on_hopper(calls: dict[str, tuple], grads: bool = False) -> tuple[str, ...]:
    """Those that are wrong on Hopper's kernels; name -> (mode, multiprocessors, call)."""
    return _wrong({name: (hopper(many), mode, x) for name, (mode, many, x) in calls.items()}, grads)


def wrong_calls(calls: dict[str, tuple], grads: bool = True) -> tuple[str, ...]:
    """Those that are wrong on the kernels of sm_80; name -> (mode, call)."""
    return _wrong({name: (ampere(), mode, x) for name, (mode, x) in calls.items()}, grads)
