"""Kernels compiled with ATTN_EXT_CUDA_DEBUG=1: what they check says what is wrong and ends them, on
the machine that executes compiled PTX.
"""

import ctypes
import re

import numpy as np
import pytest

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from fake_driver import library  # noqa: E402  after the module that it needs is known to be there
from ptx import build  # noqa: E402

from attn_ext.backends import jit  # noqa: E402
from attn_ext.backends.jit import cache, sources  # noqa: E402

pytestmark = pytest.mark.skipif(build.nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed")

SPINS = 50
# One check of each kind, by the code that the kernels have it from.
TEXT = """
#include <cstdint>
#include <type_traits>
#include "cuda/ptx_sm90.cuh"
#include "cuda/smem.cuh"
#include "cuda/traits.cuh"
namespace attn::debugged {
using namespace ptx;
struct Given { const int* table; int* out; int a, b; };
template <int WHICH> ATTN_KERNEL(32) void check(const Given p) {
  if constexpr (WHICH == 0) {  // all wait for one that arrives where a != 0
    if (thread_id() == 0) {
      mbarrier_init(smem_base() + 64, 1);
      fence_mbarrier_init();
    }
    sync_threads();
    if (thread_id() == 31 && p.a) mbarrier_arrive(smem_base() + 64);
    mbarrier_wait(smem_base() + 64, 0);
  }
  if constexpr (WHICH == 1) p.out[thread_id()] = cuda::Sequence::cut(p.a, p.b);
  if constexpr (WHICH == 2) {  // row a of pages of 2 rows, each 8 bytes behind the other
    const cuda::Rows rows{nullptr, 4, cuda::Divisor::of(2), 8, p.table, p.b};
    p.out[thread_id()] = int(reinterpret_cast<int64_t>(rows.at<true>(p.a)));
  }
}
}  // namespace attn::debugged
"""


class Given(ctypes.Structure):
    """As in TEXT."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("a", ctypes.c_int),
        ("b", ctypes.c_int),
    )


def compiled(which: int) -> jit.Binary:
    """One kernel of TEXT, with the options of a debug build."""
    kernel = sources.Kernel(f"attn::debugged::check<{which}>", "90a", "none")
    options = [
        *sources.options_of(kernel, build.SOURCES),
        f"-DATTN_CUDA_DEBUG={SPINS}",
        "-lineinfo",
    ]
    facts = [build.nvrtc().version, TEXT, *options[1:3], SPINS, which]
    headers = [
        kernel._replace(header=f"cuda/{name}.cuh") for name in ("ptx_sm90", "smem", "traits")
    ]
    key = cache.digest([*facts, *(x for h in headers for x in sources.contents(h, build.SOURCES))])
    store = cache.Cache(build.FOLDER / "kernels")
    found = store.get(key)
    if found is None:
        found = build.nvrtc().compile(TEXT, kernel.expression, options, sources.STUBS)
        store.put(key, found)
    return found


def run(which: int, a: int, b: int = 0, table=()) -> list[int]:
    """What a kernel stores, for each thread."""
    found = compiled(which)
    body = build.address(found.ptx.decode(), found.name, f"check{which}.ptx")
    entries, out = np.array([*table, 0], np.int32), np.full(32, -1, np.int32)
    given = Given(entries.ctypes.data, out.ctypes.data, a, b)
    launch = ctypes.CDLL(str(library())).fake_run
    launch.restype = ctypes.c_char_p
    launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    said = launch(body, ctypes.byref(given), 32, 1024)
    if said:
        raise RuntimeError(said.decode())
    return out.tolist()


def test_a_stuck_barrier_traps():
    """A hang: the kernel ends, and says which barrier and phase it was; one that is not stuck is
    waited for."""
    run(0, a=1)
    with pytest.raises(
        RuntimeError, match=r"trap: attn_ext: an mbarrier .* never ends the phase: 1088, 0; block 0"
    ):
        run(0, a=0)


def test_lengths_and_tables_are_checked():
    """A length or an entry of block_table that a kernel cuts in silence."""
    assert run(1, a=7, b=7) == [7] * 32
    for length in (-1, 8):
        with pytest.raises(RuntimeError, match=rf"a length is not from 0 to: {length}, 7; block"):
            run(1, a=length, b=7)
    assert run(2, a=3, b=4, table=(9, 3)) == [3 * 8 + 4] * 32  # the page of row 3 alone is read
    for entry in (-1, 4):
        with pytest.raises(RuntimeError, match=rf"entry of block_table .*: {entry}, 4; block"):
            run(2, a=3, b=4, table=(0, entry))


def test_a_debug_build_is_another_kernel(monkeypatch):
    """Checks that come from the cache of the kernels without; machine code without line numbers."""
    kernel = sources.kernel("attn::cuda::sm80::combine<float>", "80")
    monkeypatch.delenv("ATTN_EXT_CUDA_DEBUG", raising=False)
    shipped = jit.key_of(build.nvrtc(), kernel, build.SOURCES)
    assert not any("DEBUG" in each for each in sources.options_of(kernel, build.SOURCES))
    monkeypatch.setenv("ATTN_EXT_CUDA_DEBUG", "1")
    assert jit.key_of(build.nvrtc(), kernel, build.SOURCES) != shipped
    found = build.compiled(kernel)
    assert re.search(rb"^\t\.loc\t", found.ptx, re.M) and b".debug_line" in found.cubin


def test_the_number_of_a_thread_is_told():
    """A message whose fields are out of step with their values."""
    with pytest.raises(RuntimeError, match=r"-5, 3; block 0 0 0, thread 0\n"):
        run(1, a=-5, b=3)
