"""Compiled PTX as C++ on the emulated machine: parse.py reads it, emit.py and the handlers in
numbers.py, memory.py and warps.py write C++, build.py compiles and loads that.
docs/design/emulation.md says what this proves.
"""

from ptx import memory, numbers, warps  # noqa: F401  the handlers
from ptx.emit import HEAD, translate
from ptx.parse import Kernel, Unsupported, kernels

__all__ = ["HEAD", "Kernel", "Unsupported", "kernels", "translate"]
