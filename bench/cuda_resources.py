"""Compiles every CUDA kernel without a GPU, by `attn-ext compile`, and tells what it takes.

    python bench/cuda_resources.py            compare with bench/results/cuda_resources.json
    python bench/cuda_resources.py --write    compile and write that table, and the occupancy of
                                              docs/design/cuda.md
    python bench/cuda_resources.py --occupancy    from the table: warps that a multiprocessor holds

For each kernel and architecture: registers a thread, bytes spilled (stores + loads), instructions;
threads and dynamic shared memory a CTA.  A unit is a dtype and a head dimension, and one run of the
command compiles the kernels that its kinds of calls launch.  What is in the command's cache
(ATTN_EXT_CACHE_DIR) is not compiled again, so that an interrupted run goes on where it was.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from attn_ext.backends.jit import find, sources
from attn_ext.cli import compile as command

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "cuda_resources.json"
PAGE = ROOT / "docs" / "design" / "cuda.md"
ARCHS = ("80", "90a", "120")
DTYPES = ("bf16", "fp16", "fp32")


@functools.cache
def head_dims(arch: str) -> tuple[int, ...]:
    """What csrc/cuda/head_dims.h lists for sm80 or sm90."""
    text = (ROOT / "csrc" / "cuda" / "head_dims.h").read_text()
    found = re.search(rf"#define ATTN_{arch.upper()}_HEAD_DIMS\(X\)(.*)", text)
    return tuple(int(d) for d in re.findall(r"X\((\d+)\)", found[1]))


HEAD_DIMS = head_dims("sm80")


class Unit(NamedTuple):
    """What one run of the command compiles."""

    dtype: str
    head_dim: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """Each a feature of calls by the command's name: all, one by one, where FEATURED says so;
        else those that decide which kernels serve a plain call."""
        plain = ("none", "deterministic", "decode", "chunk", "frozen_keys", "frozen_queries")
        plain += ("values_128",) if self.head_dim == 192 else ()
        plain += ("dropout",) if self == WIDEST else ()  # Hopper's two kernels with features
        return tuple(command.FEATURES) if self in FEATURED else plain

    @property
    def shape(self) -> str:
        return f"1,4/2,128,{self.head_dim}"

    def __str__(self) -> str:
        return f"{self.dtype} {self.head_dim}"


UNITS = tuple(Unit(dtype, dim) for dtype in DTYPES for dim in HEAD_DIMS)
WIDEST = Unit("bf16", 256)
FEATURED = {*(Unit(dtype, 64) for dtype in DTYPES), Unit("bf16", 128)}


def find_cuda_tool(name: str) -> str | None:
    """A tool of the toolkit, such as nvdisasm, or the one that Triton's wheel carries."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    folders += [
        Path(folder) / "backends/nvidia/bin"
        for folder in (triton.submodule_search_locations if triton else [])
    ]
    return shutil.which(name) or next(
        (str(folder / name) for folder in folders if (folder / name).exists()), None
    )


def compiler() -> str:
    """The version of NVRTC, "13.0"; "" where there is none."""
    nvrtc = find()
    return ".".join(map(str, nvrtc.version)) if nvrtc else ""


# Bytes of spill stores and loads that kernels may have, by a pattern of the name and architecture:
# where in these kernels they stand was not looked at but in those of test_machine_code.py, which
# counts them in the hot loops.
SPILLS: tuple[tuple[str, int], ...] = (
    (r"sm80::backward_far_.*", 64),  # for rows that are rare
    (r"sm80::(forward_features|backward_features(_half)?)<.*", 448),
    (r"sm80::convert_dq<(bf16|fp16), 96> sm_90a", 124),
    (r"sm90::forward_features<(bf16|fp16), 128, 128, .*", 176),
    (r"sm90::forward_features<(bf16|fp16), 256, 256, .*", 116),
    (r"sm90::backward_(dkdv_)?features<.*", 256),  # most of it in the producer
    (r"sm80::backward_fused_half<(bf16|fp16), 128> .*", 32),
    (r"sm80::backward_dkdv_plain<(bf16|fp16), 32> .*", 128),
    (r"sm80::backward_dkdv_plain<(bf16|fp16), 64> sm_120", 16),
    (r"sm80::backward_dkdv_plain<(bf16|fp16), 128> .*", 176),
    (r"sm80::backward_dq_plain<(bf16|fp16), 64> .*", 196),
    (r"sm80::backward_dq_plain<(bf16|fp16), 96> sm_120", 500),
    (r"sm80::backward_dq_plain<(bf16|fp16), 128> .*", 500),
    (r"sm80::forward_plain<(bf16|fp16), 96> sm_80", 364),
    (r"sm80::forward_plain<(bf16|fp16), 96> sm_90a", 28),
    (r"sm80::forward_plain<(bf16|fp16), 128> sm_80", 120),
    (r"sm80::forward_plain<(bf16|fp16), 128> sm_90a", 400),
    (r"sm80::forward_plain<(bf16|fp16), 192> sm_(80|90a)", 52),
    (r"sm80::forward_plain<(bf16|fp16), 256> sm_90a", 56),
    (r"sm80::backward_fused<(bf16|fp16), .* sm_90a", 200),
    # a float32 product is three of tf32, whose split operands and sums take all registers
    (r"sm80::forward_general<f32, 192, .* sm_(80|90a)", 504),
    (r"sm80::forward_general<f32, 256, .*", 148),
    (r"sm80::backward_dq<f32, 256, .* sm_90a", 40),
)


def spill_budget(kernel: str, arch: str) -> int:
    """Bytes of spill stores + loads that a kernel may have, by its name as in the table."""
    name = f"{kernel} sm_{arch}"
    return next((bytes for pattern, bytes in SPILLS if re.fullmatch(pattern, name)), 0)


def table_name(name: str, flags: str) -> str:
    """What the command calls a kernel, shorter: sm80::forward_features<bf16, 64, mask>."""
    flags = flags.replace("attn::ptx::", "").replace("float", "f32")
    return f"{name.removeprefix('attn::cuda::')}<{flags}>"


def launched(unit: Unit, arch: str) -> dict[str, command.Wanted]:
    """The kernels that the calls of a unit launch, by their names in the table."""
    found = {}
    for kind in unit.kinds:
        for want in command.wanted(unit.shape, unit.dtype, (kind,), True, arch):
            flags = sources.flags_of(want.kernel, sources.root())
            found.setdefault(table_name(want.kernel.split("<")[0], flags), want)
    return found


def compile_unit(unit: Unit, archs: Iterable[str] = ARCHS) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {"80": row}} by `attn-ext compile --json`; RuntimeError with its words when a kernel
    does not compile, or when ptxas warns that it lets products of wgmma wait for one another."""
    line = [sys.executable, "-m", "attn_ext", "compile", "--json", "--backward"]
    line += ["--arch", ",".join(archs), "--shape", unit.shape, "--dtype", unit.dtype]
    line += [word for kind in unit.kinds for word in ("--features", kind)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    if done.returncode or done.stderr:
        raise RuntimeError(f"{' '.join(line)}:\n{done.stdout[-2000:]}{done.stderr}")
    found: dict[str, dict[str, dict[str, int]]] = {}
    for each in json.loads(done.stdout):
        rows = found.setdefault(table_name(each["name"], each["flags"]), {})
        # one kernel may be launched in more than one way: the table has the first
        rows.setdefault(each["arch"], {name: each[name] for name in MEASURED})
    return found


# What a row says, and how much more of it than the table says passes; the rest must be equal.
MEASURED = ("threads", "registers", "spilled_bytes", "shared_memory", "instructions")
SLACK = {"registers": 1.0, "spilled_bytes": 1.0, "instructions": 1.1}


def measure(archs: Iterable[str] = ARCHS) -> dict:
    """The whole table.  NVRTC compiles one kernel of a process at a time, hence two processes."""
    kernels: dict[str, dict] = {}
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda unit: compile_unit(unit, archs), UNITS):
            for kernel, row in rows.items():
                kernels.setdefault(kernel, {}).update(row)
    ordered = {kernel: dict(sorted(kernels[kernel].items())) for kernel in sorted(kernels)}
    return {"nvrtc": compiler(), "kernels": ordered}


def written(table: dict) -> str:
    """The table as a file, a line for each kernel and architecture."""
    kernels = []
    for kernel, rows in table["kernels"].items():
        lines = [f"   {json.dumps(arch)}: {json.dumps(row)}" for arch, row in rows.items()]
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
    return (
        f'{{\n "nvrtc": {json.dumps(table["nvrtc"])},\n "kernels": {{\n'
        + ",\n".join(kernels) + "\n }\n}\n"
    )  # fmt: skip


def differences(table: dict, found: dict, archs: Iterable[str] = ARCHS) -> list[str]:
    """What kernels, compiled for `archs`, take otherwise than the table says, in words."""
    lines = []
    for kernel, rows in found.items():
        known = table["kernels"].get(kernel, {})
        if set(rows) != set(known) & set(archs):
            lines.append(
                f"{kernel}: compiled for {', '.join(rows)}, in the table {', '.join(known)}"
            )
        for arch in rows.keys() & known.keys():
            lines += [
                f"{kernel} sm_{arch}: {now} {name}, the table says {then}"
                for name in MEASURED
                for now, then in [(rows[arch][name], known[arch][name])]
                if (now > then * SLACK[name] if name in SLACK else now != then)
            ]
    return lines or ([] if found else ["no kernel was compiled"])


# Of one multiprocessor: bytes of shared memory, warps (CUDA C++ programming guide, table of
# compute capabilities).  All have 65,536 registers, given out to a warp in units of 256.
MULTIPROCESSOR = {"80": (164, 64), "90a": (228, 64), "120": (100, 48)}


def resident_warps(table: dict, kernel: str, arch: str) -> int:
    """Warps of a tiled kernel that one multiprocessor holds at a time."""
    row = table["kernels"][kernel][arch]
    kib, most = MULTIPROCESSOR[arch]
    warps = row["threads"] // 32
    registers = -(-row["registers"] // 8) * 8 * 32 * warps
    shared = row["shared_memory"] + 1024  # what the system keeps of each CTA
    return warps * min(65536 // registers, kib * 1024 // shared, most // warps)


def occupancy(table: dict) -> str:
    """Markdown: resident warps on sm_80 / sm_90a / sm_120, a row a kernel, a column a head_dim; a
    dash where a kernel does not serve."""
    lines = ["| kernel | " + " | ".join(map(str, HEAD_DIMS)) + " |", "|---" * 7 + "|"]
    names = ("sm80::forward_plain<bf16, {}>", "sm80::forward_decode<bf16, {}, plain>",
             "sm80::forward_general<bf16, {}, plain>",
             "sm80::forward_general<f32, {}, plain>", "sm80::backward_dq_plain<bf16, {}>",
             "sm80::backward_dkdv_plain<bf16, {}>", "sm80::backward_dq<bf16, {}, plain>",
             "sm80::backward_dq<f32, {}, scale>", "sm80::backward_dkdv<bf16, {}, plain>",
             "sm80::backward_dkdv<f32, {}, scale>", "sm90::forward<bf16, {0}, {0}>",
             "sm90::backward_fused<bf16, {}>")  # fmt: skip
    for name in names:
        cells = []
        for dim in HEAD_DIMS:
            rows = table["kernels"].get(name.format(dim), {})
            cells.append("/".join(
                str(resident_warps(table, name.format(dim), arch)) if arch in rows else "-"
                for arch in MULTIPROCESSOR
            ) if rows else "-")  # fmt: skip
        label = name.replace("{0}", "{}").replace("{}", "D")
        lines.append(f"| `{label}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_occupancy(page: str, table: dict) -> str:
    """The text of the document with the occupancy of this table."""
    lines = occupancy(table)
    begin = page.index(lines.split("\n")[0])
    return page[:begin] + lines + page[page.index("\n\n", begin) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--occupancy", action="store_true", help="print a table of resident warps")
    arguments = parser.parse_args()
    if arguments.occupancy:
        print(occupancy(json.loads(TABLE.read_text())))
        return 0
    if not compiler():
        print("NVRTC not found: pip install nvidia-cuda-nvrtc", file=sys.stderr)
        return 2
    table = measure()
    if arguments.write:
        TABLE.write_text(written(table))
        PAGE.write_text(with_occupancy(PAGE.read_text(), table))
        count = sum(map(len, table["kernels"].values()))
        print(f"wrote {TABLE.relative_to(ROOT)}: {len(table['kernels'])} kernels, {count} rows")
        return 0
    bad = differences(json.loads(TABLE.read_text()), table["kernels"])
    print("\n".join(bad) or "as in the table")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
