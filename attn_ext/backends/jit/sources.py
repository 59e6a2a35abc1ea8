"""What a CUDA kernel is made of for NVRTC: the header that defines it, the few names of the C++
standard library that our headers use, and the compiler's options.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADERS = {  # namespace in attn::cuda -> kernel -> header in csrc/cuda
    "sm80": {
        "forward_plain": "sm80/forward_plain.cuh",
        "forward_features": "sm80/forward_features.cuh",
        "forward_general": "sm80/forward.cuh",
        "forward_decode": "sm80/forward.cuh",
        "combine": "sm80/combine.cuh",
        "backward_delta": "sm80/backward_preprocess.cuh",
        "backward_sink": "sm80/backward_preprocess.cuh",
        "backward_far_queries": "sm80/backward_far.cuh",
        "backward_far_keys": "sm80/backward_far.cuh",
        "backward_far_bias": "sm80/backward_far.cuh",
        "backward_dq": "sm80/backward.cuh",
        "backward_dkdv": "sm80/backward.cuh",
        "backward_dq_plain": "sm80/backward_plain.cuh",
        "backward_dkdv_plain": "sm80/backward_plain.cuh",
        "backward_bias": "sm80/backward_bias.cuh",
        "backward_fused": "sm80/backward_fused.cuh",
        "backward_fused_half": "sm80/backward_fused.cuh",
        "backward_features": "sm80/backward_fused.cuh",
        "backward_features_half": "sm80/backward_fused.cuh",
        "clear_dq": "sm80/backward_fused.cuh",
        "convert_dq": "sm80/backward_fused.cuh",
        "convert_dq_features": "sm80/backward_fused.cuh",
    },
    "sm90": {
        "forward": "sm90/forward.cuh",
        "forward_features": "sm90/forward_features.cuh",
        "backward_dq": "sm90/backward_dq.cuh",
        "backward_dq_features": "sm90/backward_dq_features.cuh",
        "backward_dkdv": "sm90/backward_dkdv.cuh",
        "backward_dkdv_features": "sm90/backward_features.cuh",
        "backward_fused": "sm90/backward_fused.cuh",
        "backward_features": "sm90/backward_features.cuh",
        "clear_dq": "sm90/backward_fused.cuh",
        "convert_dq": "sm90/backward_fused.cuh",
        "convert_dq_features": "sm90/backward_features.cuh",
    },
}
# A kernel whose last argument is a set of features (csrc/cuda/features.h), by its name.
FEATURED = re.compile(r"int BITS>\s*ATTN_KERNEL.*\s*void (\w+)\(")
EXPRESSION = re.compile(r"attn::cuda::(sm80|sm90)::(\w+)<")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)

# Line numbers in the machine code, and ATTN_CHECK of ptx.cuh.  A barrier that is asked a million
# times, a second or more, is stuck.
DEBUG = ("-lineinfo", "-DATTN_CUDA_DEBUG=1000000")

# NVRTC has no standard library.  These are all the names of it that the kernels' headers use.
STUBS = {
    "cstdint": """#pragma once
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
""",
    "cmath": """#pragma once
#define INFINITY __builtin_bit_cast(float, 0x7f800000)
#define NAN __builtin_bit_cast(float, 0x7fffffff)
""",
    "type_traits": """#pragma once
namespace std {
template <bool B> struct bool_constant {
  static constexpr bool value = B;
  constexpr operator bool() const { return B; }
};
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class A, class B> inline constexpr bool is_same_v = false;
template <class A> inline constexpr bool is_same_v<A, A> = true;
}
""",
}


def root() -> Path:
    """The folder of the C++ sources (csrc): in the package where it is installed, beside it in the
    tree of an editable installation."""
    package = Path(__file__).resolve().parents[2]
    return next((x for x in (package / "csrc", package.parent / "csrc") if (x / "cuda").is_dir()),
                package / "csrc")  # fmt: skip


class Kernel(NamedTuple):
    """expression: the kernel as C++ names it, attn::cuda::sm80::combine<float>; architecture: what
    it is compiled for, "80" or "90a"; header: what defines it, relative to csrc."""

    expression: str
    architecture: str
    header: str


def kernel(expression: str, architecture: str) -> Kernel:
    """A kernel of csrc/cuda."""
    found = EXPRESSION.match(expression)
    header = HEADERS[found[1]].get(found[2]) if found else None
    if header is None:
        raise ValueError(f"{expression} is no kernel of csrc/cuda")
    return Kernel(expression, architecture, f"cuda/{header}")


@functools.cache
def features(root: Path) -> dict[str, int]:
    """The bit of each feature by its name, as csrc/cuda/features.h has them."""
    text = (root / "cuda" / "features.h").read_text(encoding="utf-8")
    bits = dict(re.findall(r"(k\w+) = 1 << (\d+)", text))
    return {name: 1 << int(bits[bit]) for bit, name in re.findall(r'\{(k\w+), "(\w+)"\}', text)}


@functools.cache
def featured(root: Path, space: str) -> frozenset[str]:
    """The kernels of a namespace that are compiled for a set of features, as their headers say."""
    texts = [(root / "cuda" / each).read_text(encoding="utf-8") for each in HEADERS[space].values()]
    return frozenset(name for text in texts for name in FEATURED.findall(text))


def flags_of(expression: str, root: Path) -> str:
    """The arguments of a kernel for people: "attn::ptx::bf16, 64, mask dropout"."""
    found, arguments = EXPRESSION.match(expression), expression.rstrip(">").split("<")[1]
    if found is None or found[2] not in featured(root, found[1]):
        return arguments
    rest, bits = arguments.rsplit(", ", 1)
    names = [name for name, bit in features(root).items() if int(bits) & bit]
    return f"{rest}, {' '.join(names) or 'plain'}"


def text_of(kernel: Kernel) -> str:
    """The translation unit.  The standard headers come first: who includes them is not asked."""
    return f'#include <cstdint>\n#include <type_traits>\n#include "{kernel.header}"\n'


def options_of(kernel: Kernel, root: Path) -> list[str]:
    """-default-device: constexpr functions without an annotation are called in kernels."""
    shipped = ["-std=c++17", "-default-device", f"-arch=sm_{kernel.architecture}", f"-I{root}"]
    return [*shipped, *DEBUG] if debugging() else shipped


def debugging() -> bool:
    """Whether kernels are compiled with checks: ATTN_EXT_CUDA_DEBUG=1 before the first call."""
    return os.environ.get("ATTN_EXT_CUDA_DEBUG", "0") not in ("", "0")


def contents(kernel: Kernel, root: Path) -> Iterator[str]:
    """Names and texts of all that the kernel's translation unit includes of csrc."""
    folder = os.path.normpath(root)
    for path, text in sorted(_included(os.path.join(folder, kernel.header)).items()):
        yield os.path.relpath(path, folder)
        yield text


def _included(start: str) -> dict[str, str]:
    """Path and text of a header and of all that it includes, directly or not."""
    found: dict[str, str] = {}
    work = [start]
    while work:
        path = os.path.normpath(work.pop())
        if path in found:
            continue
        try:
            now = os.stat(path)
        except OSError:  # "../emulation/..." is not for this compiler, and may not be there
            continue
        found[path], names = _read(path, now.st_mtime_ns, now.st_size)
        work += [os.path.join(os.path.dirname(path), name) for name in names]
    return found


@functools.lru_cache(1024)
def _read(path: str, changed: int, size: int) -> tuple[str, tuple[str, ...]]:
    """The text of a file as it is since `changed`, and what it includes."""
    text = Path(path).read_text(encoding="utf-8")
    return text, tuple(INCLUDE.findall(text))
