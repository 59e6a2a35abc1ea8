"""CUDA kernels compiled by NVRTC, without nvcc, a GPU or CUDA's headers.

nvrtc.py finds the library and calls it; sources.py says what a kernel is made of; cache.py keeps
what was compiled.  `compile_kernel` puts the three together, and first_use.py serves calls by it.
"""

from __future__ import annotations

from pathlib import Path

from attn_ext.backends.jit import cache, sources
from attn_ext.backends.jit.nvrtc import Binary, CompileError, Nvrtc, find

__all__ = ["Binary", "CompileError", "Nvrtc", "compile_kernel", "find", "key_of"]


def key_of(nvrtc: Nvrtc, kernel: sources.Kernel, root: Path) -> str:
    """A digest of all that the kernel's machine code depends on: sources, architecture, options,
    version of the compiler.  root: the folder of the C++ sources (csrc)."""
    text = sources.text_of(kernel)
    facts = (nvrtc.version, kernel.expression, *sources.options_of(kernel, Path()), text)
    return cache.digest([*facts, *sources.contents(kernel, root), *sources.STUBS.values()])


def compile_kernel(
    nvrtc: Nvrtc, kernel: sources.Kernel, root: Path, store: cache.Cache | None = None
) -> Binary:
    """The kernel in machine code and PTX for its architecture, from the cache where it is there."""
    key = key_of(nvrtc, kernel, root) if store else ""
    found = store.get(key) if store else None
    if found is None:
        options = sources.options_of(kernel, root)
        text = sources.text_of(kernel)
        found = nvrtc.compile(text, kernel.expression, options, sources.STUBS)
        if store and key == key_of(nvrtc, kernel, root):  # no file was edited meanwhile
            store.put(key, found)
    return found
