"""Compiles every CUDA kernel without a GPU and tells what ptxas gave it.

    python bench/cuda_resources.py            compare with bench/results/cuda_resources.json
    python bench/cuda_resources.py --write    measure and write that table
    python bench/cuda_resources.py --occupancy    from the table: warps that a multiprocessor holds

For each kernel and architecture: registers a thread, bytes spilled (stores + loads); threads and
dynamic shared memory a block.  One nvcc run compiles one (dtype, head_dim) pair for all
architectures; results are kept in build/nvcc by a hash of the sources, so that only what changed is
compiled again.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "cuda_resources.json"
ARCHS = ("80", "90a", "120")


def head_dims(arch: str) -> tuple[int, ...]:
    """What csrc/cuda/head_dims.h lists for sm80 or sm90."""
    text = (ROOT / "csrc" / "cuda" / "head_dims.h").read_text()
    found = re.search(rf"#define ATTN_{arch.upper()}_HEAD_DIMS\(X\)(.*)", text)
    return tuple(int(d) for d in re.findall(r"X\((\d+)\)", found[1]))


HEAD_DIMS = head_dims("sm80")
DTYPES = {"bf16": "bf16", "fp16": "fp16", "float": "f32"}
SM90_HEAD_DIMS = head_dims("sm90")
# Sets of features whose kernels are counted beside those for none and for any
# (csrc/cuda/features.h), by a name.
FEATURES = {"mask": ("kMask", "kMaskVectors"), "bias": ("kBias", "kBiasVectors"),
            "dropout": ("kDropout",)}  # fmt: skip
FEATURE_DIMS = (64, 128)
FEATURED = ("forward_general", "forward_features", "backward_features", "convert_dq_features",
            "backward_dq", "backward_dkdv", "backward_bias", "sm90_backward_features",
            "sm90_convert_dq_features")  # fmt: skip
# ("launch", 0): kernels that serve all head dimensions; "sm90 ...": the Hopper kernels of a pair
UNITS = [("launch", 0)] + [(dtype, dim) for dtype in DTYPES for dim in HEAD_DIMS]
UNITS += [(f"sm90 {dtype}", dim) for dtype in ("bf16", "fp16") for dim in SM90_HEAD_DIMS]
UNITS += [(f"{arch}features bf16", dim) for arch in ("", "sm90 ") for dim in FEATURE_DIMS]


def find_nvcc() -> str | None:
    """nvcc from PATH, CUDA_HOME or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def find_cuda_tool(name: str) -> str | None:
    """A tool of the toolkit, such as cuobjdump, or the one that Triton's wheel carries."""
    nvcc = find_nvcc()
    triton = importlib.util.find_spec("triton")
    folders = [Path(nvcc).parent] if nvcc else []
    folders += [
        Path(folder) / "backends/nvidia/bin"
        for folder in (triton.submodule_search_locations if triton else [])
    ]
    return shutil.which(name) or next(
        (str(folder / name) for folder in folders if (folder / name).exists()), None
    )


# Spills that came with the repair of NaN, where in these kernels they stand was not looked at, and
# those of kernels whose hot loops take all registers; test_nvcc.py counts them in the loops.
SPILLS = {
    ("backward_dkdv<bf16, 128, plain>", "sm_120"): 84,
    ("backward_dkdv<fp16, 128, plain>", "sm_120"): 84,
    ("backward_dkdv<f32, 128, general>", "sm_90a"): 112,
    **{
        (kernel.format(dtype), arch): spilled
        for dtype in ("bf16", "fp16")
        for kernel, arch, spilled in (
            ("forward_plain<{}, 128>", "sm_80", 96),
            ("forward_plain<{}, 96>", "sm_90a", 12),
            ("forward_plain<{}, 128>", "sm_90a", 376),
            ("backward_fused<{}, 64, 128>", "sm_90a", 136),
            ("backward_fused<{}, 96, 64>", "sm_90a", 128),
            ("backward_fused<{}, 128, 64>", "sm_90a", 68),
            ("backward_fused<{}, 128, 64>", "sm_120", 40),
        )
    },
}


def spill_budget(kernel: str, arch: str) -> int:
    """Bytes of spill stores + loads that a kernel may have, by its name as in the table.

    None for 16 bits, none up to head_dim 128, but for SPILLS, far rows, and kernels with features,
    of which bench/machine_code.py counts those in the loops.  A float32 product is three tf32
    ones, whose split operands and an accumulator of 192 or 256 columns do not fit 255 registers.
    """
    if (kernel, arch) in SPILLS:
        return SPILLS[kernel, arch]
    if kernel.startswith("backward_far_"):  # for rows that are rare; at most 34 loads and stores
        return 136
    if "_features<" in kernel:  # for any feature: not what runs on a GPU
        return 4096 if kernel.endswith("general>") else 512
    dtype, dim = re.match(r"\w+<(\w+)(?:, (\d+))?", kernel).groups()
    return 512 if dtype == "f32" and dim and int(dim) > 128 else 0


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


@functools.cache
def feature_words() -> dict[int, str]:
    """What the last argument of a kernel stands for, a set of features."""
    text = (ROOT / "csrc" / "cuda" / "features.h").read_text()
    bits = {name: 1 << int(n) for name, n in re.findall(r"(k\w+) = 1 << (\d+)", text)}
    words = {sum(map(bits.get, names)): word for word, names in FEATURES.items()}
    return {0: "plain", bits["kAny"]: "general", **words}


def source_text(dtype: str, head_dim: int) -> str:
    """The translation unit of one pair."""
    arch = "sm90" if dtype.startswith("sm90") else "sm80"
    element = dtype.split()[-1]
    lists = {f"each_{way}<{element}, {head_dim}>" for way in ("forward", "backward")}
    if dtype == "launch":
        lists = {f"each_other<{element}>" for element in DTYPES}
    # to take a kernel's address is to instantiate it
    calls = "".join(f"  {each}(take);\n" for each in sorted(lists))
    if "features" in dtype:
        kernels = ("forward_features", "backward_features")[arch == "sm90" :]
        calls = "".join(
            f'  take("", {kernel}<{element}, {head_dim}, {" | ".join(bits)}>);\n'
            for bits in FEATURES.values() for kernel in kernels
        )  # fmt: skip
    return (
        f'#include "cuda/{arch}/kernels.cuh"\n'
        f"using namespace attn::cuda;\nusing namespace {arch};\n"
        "template <class P>\nconst void* take_one(void (*kernel)(P)) {\n"
        "  return reinterpret_cast<const void*>(kernel);\n}\n"
        "const void* taken;\n"
        "void all() {\n"
        "  const auto take = [](const std::string&, auto kernel) { taken = take_one(kernel); };\n"
        f"{calls}}}\n"
    )


def sources_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc/cuda").rglob("*"), *(ROOT / "csrc").glob("*.h")]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def kernel_name(mangled: str) -> str:
    """_ZN4attn4cuda4sm807forwardINS_3ptx4bf16ELi64ELi0EEEv... -> forward<bf16, 64, plain>; those of
    sm90 are called sm90_forward<bf16, 64>"""
    found = re.match(r"_ZN4attn4cuda4(sm[89]0)(\d+)(.*)", mangled)
    if not found:
        raise ValueError(f"kernel outside of attn::cuda::sm80 and sm90: {mangled}")
    length = int(found[2])
    name, rest = found[3][:length], found[3][length:]
    name = f"sm90_{name}" if found[1] == "sm90" else name
    words = [re.search(r"bf16|fp16", rest)[0] if re.match(r"INS_3ptx", rest) else "f32"]
    numbers = re.findall(r"Li(\d+)E", rest.split("Ev")[0] + "E")
    if name in FEATURED:
        numbers[-1] = feature_words().get(int(numbers[-1]), numbers[-1])
    words += numbers[:-1] if name in ("forward_general", "backward_bias") else numbers
    return f"{name}<{', '.join(words)}>"


def parse(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {"sm_80": {registers, spill_bytes}}} from the output of -Xptxas -v."""
    if re.search(r"\bC75\d\d\b", log):
        raise ValueError(f"ptxas warns:\n{log}")
    out = {}
    for block in log.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        kernel, _, arch, _ = block.split("'", 3)
        out.setdefault(kernel_name(kernel), {})[arch] = {
            "registers": int(re.search(r"Used (\d+) registers", block)[1]),
            "spill_bytes": int(spills[1]) + int(spills[2]),
        }
    return out


def kernel_archs(kernel: str) -> set[str]:
    """The architectures that a kernel is compiled for, as in the table."""
    return {"sm_90a"} if kernel.startswith("sm90_") else {f"sm_{arch}" for arch in ARCHS}


def unit_archs(dtype: str) -> tuple[str, ...]:
    """The architectures of a unit."""
    return ("90a",) if dtype.startswith("sm90") else ARCHS


def kept_unit(nvcc: str, dtype: str, head_dim: int, arch: str) -> Path:
    """Where `compile_unit` keeps what it found for an architecture; its fatbin is beside it."""
    keep = ROOT / "build" / "nvcc"
    keep.mkdir(parents=True, exist_ok=True)
    return keep / f"{sources_hash()}-{nvcc_version(nvcc)}-{dtype}-{head_dim}-{arch}.json"


def compile_unit(
    nvcc: str, dtype: str, head_dim: int, archs: tuple[str, ...] = ()
) -> dict[str, dict[str, dict[str, int]]]:
    """What `parse` finds in one unit, for these of its architectures or for all; RuntimeError with
    nvcc's text when it does not compile."""
    found = {}
    for arch in archs or unit_archs(dtype):
        for kernel, rows in _compile(nvcc, dtype, head_dim, arch).items():
            found.setdefault(kernel, {}).update(rows)
    return found


def _compile(nvcc: str, dtype: str, head_dim: int, arch: str) -> dict[str, dict]:
    kept = kept_unit(nvcc, dtype, head_dim, arch)
    if kept.exists() and kept.with_suffix(".fatbin").exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory() as folder:
        source, fatbin = Path(folder) / "unit.cu", Path(folder) / "unit.fatbin"
        source.write_text(source_text(dtype, head_dim))
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "--fatbin", f"-I{ROOT / 'csrc'}"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += [str(source), "-o", str(fatbin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc {dtype} {head_dim} sm_{arch}:\n{done.stdout}{done.stderr}")
        shutil.copy(fatbin, kept.with_suffix(".fatbin"))
    result = parse(done.stdout + done.stderr)
    kept.write_text(json.dumps(result))
    return result


def cubin(nvcc: str, dtype: str, head_dim: int, arch: str, folder: Path) -> Path:
    """The machine code of one unit for one architecture, such as "90a", extracted into `folder`."""
    compile_unit(nvcc, dtype, head_dim, (arch,))
    fatbin = kept_unit(nvcc, dtype, head_dim, arch).with_suffix(".fatbin")
    command = [find_cuda_tool("cuobjdump"), "--extract-elf", f"sm_{arch}", str(fatbin)]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    return next(Path(folder).glob(f"*sm_{arch}*.cubin"))


# The tile table printed by itself, so that no size is repeated here.
SHARED = """
#include <cstdio>
#include <initializer_list>
#include "cuda/sm90/tiles.h"
using namespace attn::cuda;
template <class T, int D>
void print(const char* dtype) {
  constexpr int SM80 = 163 * 1024;
  using F = ForwardTile<T, D>;
  using B = BackwardTile<T, D>;
  printf("forward_general %s %d %d %d\\n", dtype, D, F::forward_smem(Row<T, D>::BYTES), F::THREADS);
  if constexpr (kIsHalf<T>) {
    using P = PlainForwardTile<D>;
    printf("forward_plain %s %d %d %d\\n", dtype, D, P::smem(Row<T, D>::BYTES), P::THREADS);
    using Q = FeatureForwardTile<D, false>;
    printf("forward_features %s %d %d %d\\n", dtype, D, Q::smem(Row<T, D>::BYTES), Q::THREADS);
    if constexpr (D <= 128) {
      using G = FusedBackwardTile<D, fused_block_m(D, SM80)>;
      printf("backward_fused %s %d %d %d\\n", dtype, D, G::SMEM, G::THREADS);
      using H = FusedBackwardTile<D, 64>;
      printf("backward_features %s %d %d %d\\n", dtype, D, H::SMEM, H::THREADS);
    }
    if constexpr (D == 64) {
      using G = FusedBackwardTile<D, fused_block_m(D, 99 * 1024)>;
      printf("backward_fused_99 %s %d %d %d\\n", dtype, D, G::SMEM, G::THREADS);
    }
  }
  printf("backward %s %d %d %d\\n", dtype, D, B::backward_smem(Row<T, D>::BYTES), B::THREADS);
}
template <class T>
void all(const char* dtype) {
  print<T, 32>(dtype), print<T, 64>(dtype), print<T, 96>(dtype), print<T, 128>(dtype);
  print<T, 192>(dtype), print<T, 256>(dtype);
}
template <int D>
void print_sm90() {
  for (const char* dtype : {"bf16", "fp16"}) {
    const auto row = [&](const char* kernel, int bytes) {
      printf("sm90_%s %s %d %d %d\\n", kernel, dtype, D, bytes, sm90::THREADS);
    };
    row("forward", sm90::ForwardTile90<D>::SMEM);
    row("backward_dq", sm90::QueryGradientTile<D>::SMEM);
    row("backward_dkdv", sm90::KeyGradientTile<D>::SMEM);
    if constexpr (D <= 128) row("backward_fused", sm90::FusedTile<D>::SMEM);
    if constexpr (D <= 128) row("backward_features", sm90::SideRoom<D>::SMEM);
  }
}
int main() {
  all<bf16>("bf16"), all<fp16>("fp16"), all<float>("f32");
  print_sm90<64>(), print_sm90<96>(), print_sm90<128>(), print_sm90<192>(), print_sm90<256>();
}
"""


@functools.cache
def blocks() -> dict[str, dict[str, int]]:
    """{"forward<bf16, 64>": {shared_memory_bytes, threads}}, from the tile table itself."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "smem.cpp", Path(folder) / "smem"
        source.write_text(SHARED)
        cxx = os.environ.get("CXX", "c++")
        flags = ["-std=c++17", "-w", f"-I{ROOT / 'csrc'}"]
        subprocess.run([cxx, *flags, str(source), "-o", str(binary)], check=True)
        lines = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in lines.splitlines())
    return {
        f"{kind}<{dtype}, {dim}>": {"shared_memory_bytes": int(size), "threads": int(threads)}
        for kind, dtype, dim, size, threads in rows
    }


# Of one multiprocessor: bytes of shared memory, warps (CUDA C++ programming guide, table of
# compute capabilities).  All have 65,536 registers, given out to a warp in units of 256.
MULTIPROCESSOR = {"sm_80": (164, 64), "sm_90a": (228, 64), "sm_120": (100, 48)}


def resident_warps(table: dict, kernel: str, arch: str) -> int:
    """Warps of a tiled kernel that one multiprocessor holds at a time."""
    name, dtype, dim = re.match(r"(\w+)<(\w+), (\d+)", kernel).groups()
    block = "backward" if name in ("backward_dq", "backward_dkdv") else name  # one tile for both
    block = table["blocks"][f"{block}<{dtype}, {dim}>"]
    kib, most = MULTIPROCESSOR[arch]
    warps = block["threads"] // 32
    registers = -(-table["kernels"][kernel][arch]["registers"] // 8) * 8 * 32 * warps
    shared = block["shared_memory_bytes"] + 1024  # what the system keeps of each block
    return warps * min(65536 // registers, kib * 1024 // shared, most // warps)


def occupancy(table: dict) -> str:
    """Markdown: resident warps on sm_80 / sm_90a / sm_120, a row a kernel, a column a head_dim."""
    lines = ["| kernel | " + " | ".join(map(str, HEAD_DIMS)) + " |", "|---" * 7 + "|"]
    rows = [("forward_plain", "bf16", ""), ("forward_general", "bf16", "")]
    rows += [("forward_general", "f32", "")]
    for name in ("backward_dq", "backward_dkdv"):
        rows += [(name, "bf16", ", plain"), (name, "bf16", ", general"), (name, "f32", ", general")]
    for name, dtype, kind in rows:
        cells = [
            "/".join(
                str(resident_warps(table, f"{name}<{dtype}, {dim}{kind}>", arch))
                for arch in MULTIPROCESSOR
            )
            for dim in HEAD_DIMS
        ]
        lines.append(f"| {name}, {dtype}{kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(nvcc: str) -> dict:
    """The whole table."""
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda unit: compile_unit(nvcc, *unit), UNITS))
    kernels = {kernel: rows for result in results for kernel, rows in result.items()}
    return {
        "nvcc": nvcc_version(nvcc),
        "blocks": blocks(),
        "kernels": dict(sorted(kernels.items())),
    }


def differences(table: dict, found: dict, archs: tuple[str, ...] = ARCHS) -> list[str]:
    """What kernels, compiled for `archs`, use more of, in words, against the table; kernels that it
    lacks."""
    lines = []
    for kernel, rows in found.items():
        if set(rows) != kernel_archs(kernel) & {f"sm_{arch}" for arch in archs}:
            lines.append(f"{kernel}: compiled for {', '.join(rows)} only")
        for arch, row in rows.items():
            known = table["kernels"].get(kernel, {}).get(arch)
            if known is None:
                lines.append(f"{kernel} {arch}: not in the table")
                continue
            lines += [
                f"{kernel} {arch}: {row[key]} {key}, the table says {known[key]}"
                for key in ("registers", "spill_bytes")
                if row[key] > known[key]
            ]
    return lines or ([] if found else ["no kernel was compiled"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--occupancy", action="store_true", help="print a table of resident warps")
    arguments = parser.parse_args()
    if arguments.occupancy:
        print(occupancy(json.loads(TABLE.read_text())))
        return 0
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc not found: put it on PATH or set CUDA_HOME", file=sys.stderr)
        return 2
    table = measure(nvcc)
    if arguments.write:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        print(f"wrote {TABLE.relative_to(ROOT)}: {len(table['kernels'])} kernels")
        return 0
    bad = differences(json.loads(TABLE.read_text()), table["kernels"])
    print("\n".join(bad) or "as in the table")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
