"""CUDA kernels compiled by NVRTC, without nvcc, a GPU or CUDA's headers.

nvrtc.py finds the library and calls it; sources.py says what a kernel is made of; cache.py keeps
what was compiled.  `compile_kernel` puts the three together.
"""

from __future__ import annotations

from pathlib import Path

from attn_ext.backends.jit import cache, sources
from attn_ext.backends.jit.nvrtc import Binary, CompileError, Nvrtc, find

__all__ = ["Binary", "CompileError", "Nvrtc", "compile_kernel", "find"]


def compile_kernel(
    nvrtc: Nvrtc, kernel: sources.Kernel, root: Path, store: cache.Cache | None = None
) -> Binary:
    """The kernel in machine code and PTX for its architecture, from the cache where it is there.
    root: the folder of the C++ sources (csrc)."""
    text, options = sources.text_of(kernel), sources.options_of(kernel, root)
    facts = (nvrtc.version, kernel.expression, *sources.options_of(kernel, Path()), text)
    key = cache.digest([*facts, *sources.contents(kernel, root), *sources.STUBS.values()])
    found = store.get(key) if store else None
    if found is None:
        found = nvrtc.compile(text, kernel.expression, options, sources.STUBS)
        if store:
            store.put(key, found)
    return found
