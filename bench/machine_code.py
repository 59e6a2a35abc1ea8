"""Counts the machine code of the CUDA kernels' hot loops and bounds their speed, without a GPU.

    python bench/machine_code.py            compile; compare with bench/results/machine_code.json
    python bench/machine_code.py --write    compile, and write that table
    python bench/machine_code.py --dump sm90_forward 128    the instructions of one loop
    python bench/machine_code.py --triton [--write]         the same of the Triton kernels

NVRTC compiles the bf16 kernels of head_dim 64 and 128 (192 with values of 128, and 256 of Hopper's
backward in two kernels), as `attn-ext compile` does; nvdisasm, of the toolkit or of Triton's wheel,
prints their machine code. Of each kernel the loop with the most tensor work is taken, and through
it the path that has all products and copies, but no mask and no slow way: what a tile runs whose
every query sees every key. Counts are by `GROUPS`, one instruction an issue slot.

The bounds are a model; nothing is timed.  Cycles are those of one multiprocessor while each
resident warp runs one iteration: 4 schedulers of one slot a cycle, 128 bytes of shared memory a
cycle without bank conflicts, 16 lanes of special functions.  `share` is tensor cycles over those
of the unit that is busy longest; `share_2_norm` over the root of the sum of squares, since units do
not overlap fully.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from attn_ext.backends.jit import first_use
from attn_ext.cli import compile as command

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "machine_code.json"
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor has (CUDA C++ programming guide; the white papers of A100,
    L40S, H100 and RTX PRO 6000)."""

    name: str  # of NVRTC
    shared_memory: int  # bytes
    multiply_adds: int  # of 16 bits, a cycle and tensor core
    fp32_cycles: int  # a scheduler's warp instruction of fp32
    warps: int = 64


ARCHITECTURES = {
    "sm80": Architecture("80", 164 << 10, 256, 2),
    "sm89": Architecture("89", 100 << 10, 128, 1, 48),  # L40S; of GeForce half the multiply-adds
    "sm90": Architecture("90a", 228 << 10, 512, 1),
    "sm100": Architecture("100a", 228 << 10, 1024, 1),  # B200, for Triton's kernels alone
    "sm120": Architecture("120", 100 << 10, 128, 1, 48),  # RTX PRO 6000; GeForce as above
}
FAMILIES = ("sm80", "sm90")  # of the CUDA kernels


@dataclass(frozen=True)
class Kernel:
    """A kernel to look at: the function that a call with `features` launches.  mma_threads: those
    that run the loop, 0 for all of a CTA.  through: a group of which the path takes what it can."""

    family: str  # "sm80" or "sm90"
    function: str
    mma_threads: int = 0
    features: str = "none"  # of the calls that `attn-ext compile` knows
    through: str = ""
    head_dims: tuple[int, ...] = HEAD_DIMS


KERNELS = {
    "sm80_forward": Kernel("sm80", "forward_plain"),
    "sm80_decode": Kernel("sm80", "forward_decode", features="decode"),
    "sm80_paged": Kernel("sm80", "forward_decode", features="paged"),
    "sm80_backward_fused": Kernel("sm80", "backward_fused"),
    "sm80_backward_dq": Kernel("sm80", "backward_dq_plain", features="deterministic"),
    "sm80_backward_dkdv": Kernel("sm80", "backward_dkdv_plain", features="deterministic"),
    **{
        f"sm80_forward_{name}": Kernel("sm80", "forward_features", features=name)
        for name in ("bias", "dropout")
    },
    **{
        f"sm80_backward_{name}": Kernel("sm80", "backward_features", features=name)
        for name in ("mask", "bias", "dropout")
    },
    # a tile of which the mask takes a pair, and one of which it keeps all
    "sm80_forward_mask": Kernel("sm80", "forward_features", features="mask", through="select"),
    "sm80_forward_mask_kept": Kernel("sm80", "forward_features", features="mask"),
    "sm90_forward": Kernel("sm90", "forward", 256),
    "sm90_forward_values_128": Kernel("sm90", "forward", 256, "values_128", head_dims=(192,)),
    **{
        f"sm90_forward_{name}": Kernel("sm90", "forward_features", 256, name)
        for name in ("bias", "softcap", "dropout")
    },
    "sm90_forward_mask": Kernel("sm90", "forward_features", 256, "mask", "select"),
    "sm90_forward_mask_kept": Kernel("sm90", "forward_features", 256, "mask"),
    "sm90_backward_dq": Kernel(
        "sm90", "backward_dq", 256, "frozen_keys", head_dims=(*HEAD_DIMS, 256)
    ),
    "sm90_backward_dkdv": Kernel(
        "sm90", "backward_dkdv", 256, "frozen_queries", head_dims=(*HEAD_DIMS, 256)
    ),
    **{
        f"sm90_backward_dq_{name}": Kernel(
            "sm90", "backward_dq_features", 256, name, head_dims=(256,)
        )
        for name in ("mask", "bias", "softcap", "dropout")
    },
    # of the two warpgroups the one that computes weights; with a soft cap what tells it are the
    # magnitudes that are looked at, since a tile beyond the polynomial has more exponentials
    **{
        f"sm90_backward_dkdv_{name}": Kernel(
            "sm90", "backward_dkdv_features", 256, name, through, head_dims=(256,)
        )
        for name, through in (
            ("mask", "exp2"),
            ("bias", "exp2"),
            ("softcap", "max"),
            ("dropout", "exp2"),
        )
    },
    "sm90_backward_fused": Kernel("sm90", "backward_fused", 256),
    "sm90_backward_ordered": Kernel("sm90", "backward_features", 256, "deterministic"),
    **{
        f"sm90_backward_{name}": Kernel("sm90", "backward_features", 256, name)
        for name in ("mask", "bias", "softcap", "dropout")
    },
}

# The first pattern that an opcode begins with names its group.
GROUPS = {
    "product": "HMMA|HGMMA|UTC[A-Z]*MMA", "ldmatrix": "LDSM", "copy": "LDGSTS",
    "store_shared": "STS",
    "load_shared": "LDS", "spill": "LDL|STL", "reduction": "RED|ATOM", "global": "LDG|STG",
    "exp2": r"MUFU\.EX2", "special": "MUFU", "fma": "FFMA", "multiply": "FMUL", "add": "FADD",
    "max": "FMNMX", "select": "FSEL", "compare": "FSETP", "convert": "F2F|I2F|F2I",
    "shuffle": "SHFL", "barrier": "BAR", "mad_move": r"IMAD\.(MOV|U32)", "mad": "IMAD",
    "to_uniform": "R2UR", "mbarrier": "SYNCS", "warpgroup": "WARPGROUP", "branch": "BRA|BSYNC|BSSY",
    "uniform": "U[A-Z]", "move": "MOV|CS2R|PRMT|SEL",
    "integer": "IADD|LEA|LOP|SHF|ISETP|IMNMX|VI|IABS|PLOP|POPC|SGXT|BMSK", "other": "",
}  # fmt: skip
INSTRUCTION = re.compile(r"\s+/\*(\w+)\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"(\.L_x_\d+):")
LEAVES = re.compile(r"(BRA|BRA\.U.*|EXIT|RET.*|BRX.*)$")


@functools.cache
def group_of(opcode: str) -> str:
    """The name among GROUPS."""
    return next(name for name, pattern in GROUPS.items() if re.match(pattern, opcode))


@dataclass(frozen=True)
class Instruction:
    address: str
    predicate: str  # "" where it always runs
    opcode: str
    operands: str

    @property
    def group(self) -> str:
        return group_of(self.opcode)

    def tensor_cycles(self, architecture: Architecture) -> float:
        """Of one scheduler's tensor core: HMMA.16816, or HGMMA.64xNx16, which takes all four; TF32
        has half the depth (1688, x8) at half the speed."""
        if self.group != "product":
            return 0.0
        columns = re.search(r"64x(\d+)x", self.opcode)
        return 16 * (int(columns[1]) if columns else 8) * 16 / architecture.multiply_adds

    def wavefronts(self) -> float:
        """Of shared memory, 128 bytes each, a warp; of what wgmma reads, a warp's quarter."""
        if self.opcode.startswith("HGMMA"):  # B, and A where it is no register
            from_registers = re.match(r"R\d+, R\d+,", self.operands)
            rows = int(self.opcode.split("x")[1]) + (0 if from_registers else 64)
            return rows * 32 / 128 / 4
        if not self.opcode.startswith(("LDGSTS", "LDSM", "LDS", "STS")):
            return 0.0
        return {"64": 2, "128": 4, "4": 4, "2": 2}.get(self.opcode.split(".")[-1], 1)


@dataclass
class Code:
    """The basic blocks of a kernel by the index of their first instruction, and where they lead."""

    instructions: list[Instruction]
    blocks: dict[int, range] = field(default_factory=dict)
    successors: dict[int, list[int]] = field(default_factory=dict)
    predecessors: dict[int, list[int]] = field(default_factory=dict)
    rank: dict[int, int] = field(default_factory=dict)  # in reverse postorder

    @classmethod
    def of(cls, text: str) -> Code:
        """From nvdisasm's text of one section."""
        code, labels, targets = cls([]), {}, {}
        for line in text.splitlines():
            if found := LABEL.match(line):
                labels[found[1]] = len(code.instructions)
            elif found := INSTRUCTION.match(line):
                code.instructions.append(Instruction(*(x or "" for x in found.groups())))
        for index, each in enumerate(code.instructions):
            if LEAVES.match(each.opcode):  # None: the kernel ends
                target = re.findall(r"\.L_x_\d+", each.operands)
                targets[index] = labels.get(target[0]) if target else None
        ends = {index + 1 for index in targets}
        cuts = sorted({0, len(code.instructions)} | set(labels.values()) | ends)
        code.blocks = {a: range(a, b) for a, b in itertools.pairwise(cuts)}
        for start, block in code.blocks.items():
            last = code.instructions[block[-1]]
            jumps = block[-1] in targets
            conditional = last.predicate or re.match(r"!?U?P\d", last.operands)
            ways = [block[-1] + 1] if not jumps or conditional else []
            ways += [targets[block[-1]]] if jumps else []
            code.successors[start] = [way for way in ways if way in code.blocks]
        code._order()
        return code

    def _order(self) -> None:
        """Ranks the reachable blocks, without recursion: kernels have thousands."""
        order, seen, stack = [], {0}, [(0, iter(self.successors[0]))]
        while stack:
            block, ways = stack[-1]
            following = next((way for way in ways if way not in seen), None)
            if following is None:
                order.append(stack.pop()[0])
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        self.rank = {block: place for place, block in enumerate(reversed(order))}
        self.predecessors = {block: [] for block in self.rank}
        for block in self.rank:
            for way in self.successors[block]:
                self.predecessors[way].append(block)

    def loops(self) -> dict[int, set[int]]:
        """{header: blocks} of the natural loops."""
        found: dict[int, set[int]] = {}
        for latch in self.rank:
            for header in self.successors[latch]:
                if self.rank[header] > self.rank[latch]:
                    continue
                body, work = {header}, [latch]
                while work:
                    block = work.pop()
                    if block not in body:
                        body.add(block)
                        work += self.predecessors[block]
                if 0 not in body or header == 0:  # else the header does not dominate the latch
                    found.setdefault(header, set()).update(body)
        return found


def hot_path(
    code: Code, architecture: Architecture, through: str = ""
) -> tuple[list[Instruction], list[str]]:
    """The hot loop's path, and the addresses of inner loops on it, which are counted once.

    A path is worth 3 for a tensor cycle (1 in an inner loop), 40 for a copy or what is of the group
    `through`, -1 for any other instruction: all products and copies, and the least else.
    """
    loops = code.loops()

    def worth(block: int, body: set[int]) -> float:
        inner = any(block in other and other < body for other in loops.values())
        total = 0.0
        for each in map(code.instructions.__getitem__, code.blocks[block]):
            cycles = each.tensor_cycles(architecture)
            other = 40 if each.group in ("copy", through) else -1
            total += cycles * (1 if inner else 3) if cycles else other
        return total

    def best_path(header: int) -> list[int]:
        body = loops[header]
        best = {header: (worth(header, body), [header])}
        for block in sorted(body - {header}, key=code.rank.get):
            ways = [best[p] for p in code.predecessors[block]
                    if p in best and code.rank[p] < code.rank[block]]  # fmt: skip
            if ways:
                value, path = max(ways)
                best[block] = (value + worth(block, body), [*path, block])
        return max(best[b] for b in body if b in best and header in code.successors[b])[1]

    paths = {header: best_path(header) for header in loops}
    work = {
        header: [code.instructions[i] for block in path for i in code.blocks[block]]
        for header, path in paths.items()
    }
    tensor = {h: sum(i.tensor_cycles(architecture) for i in path) for h, path in work.items()}
    inner = {h: [x for x in loops if x in paths[h] and loops[x] < loops[h]] for h in loops}
    outermost = [h for h in loops if tensor[h] and not any(tensor[x] for x in inner[h])]
    if not outermost:
        raise ValueError("no loop with products was found")
    header = max(outermost, key=lambda h: (tensor[h], -len(work[h])))
    return work[header], [code.instructions[x].address for x in inner[header]]


def report(
    kernel: Kernel, path: list[Instruction], registers: int, block: dict, tensor: float = 0.0
) -> dict:
    """A row of the table: counts of the path, and the model's cycles and shares.  block: threads
    and shared_memory (bytes) of a CTA; tensor: cycles, where the opcodes do not say them."""
    architecture = ARCHITECTURES[kernel.family]
    counts = Counter(each.group for each in path)
    warps = block["threads"] // 32
    ctas = min(
        65536 // (-(-registers // 8) * 8 * 32 * warps),
        architecture.shared_memory // (block["shared_memory"] + 1024),
        architecture.warps // warps,
    )
    each_scheduler = ctas * (kernel.mma_threads or block["threads"]) / 128
    tensor = tensor or sum(i.tensor_cycles(architecture) for i in path)
    fp32 = architecture.fp32_cycles * (counts["fma"] + counts["multiply"] + counts["add"])
    names = ("max", "select", "compare", "convert", "integer", "move")
    cycles = {
        "tensor": tensor,
        "shared_memory": 4 * sum(each.wavefronts() for each in path),
        "special": 8 * (counts["exp2"] + counts["special"]),
        "fma_pipe": fp32 + 2 * (counts["mad"] + counts["mad_move"]),
        "alu_pipe": 2 * sum(counts[name] for name in names),
        "issue": len(path),
    }
    return {
        "registers": registers,
        "ctas": ctas,
        "mma_warps_a_scheduler": each_scheduler,
        "tensor_cycles": tensor,
        "slots": len(path),
        "slots_a_product": round(8 * len(path) / tensor, 2),  # 8 tensor cycles: an HMMA on sm_80
        "counts": dict(sorted(counts.items())),
        "predicated_branches": sum(i.opcode == "BRA" and bool(i.predicate) for i in path),
        "bound": max(cycles, key=cycles.get),
        "share": round(tensor / max(cycles.values()), 3),
        "share_2_norm": round(tensor / math.hypot(*cycles.values()), 3),
    }


def load_beside(name: str):
    """The file of this name in this folder, as a module."""
    if name not in sys.modules:
        path = Path(__file__).with_name(f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def load_resources():
    """bench/cuda_resources.py, which knows the kernels' translation units."""
    return load_beside("cuda_resources")


@functools.cache
def launch_of(name: str, head_dim: int) -> command.Wanted:
    """How a call in bf16 launches the kernel that KERNELS has by this name."""
    kernel = KERNELS[name]
    stem = f"attn::cuda::{kernel.family}::{kernel.function}<"
    wants = list(command.wanted(
        f"1,4/2,128,{head_dim}", "bf16", (kernel.features,), True,
        ARCHITECTURES[kernel.family].name,
    ))  # fmt: skip
    found = [want for want in wants if want.kernel.startswith(stem)]
    if not found:
        raise ValueError(f"a call with features {kernel.features} launches no {stem[:-1]}, but "
                         f"{', '.join(want.kernel for want in wants)}")  # fmt: skip
    return found[0]


@functools.cache
def disassemble(name: str, head_dim: int) -> str:
    """nvdisasm's text of a kernel of KERNELS."""
    want = launch_of(name, head_dim)
    found = first_use.default().get(want.kernel, want.arch).binary
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.cubin)
        line = [load_resources().find_cuda_tool("nvdisasm"), file.name]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def sections(text: str):
    """(mangled name, text, registers a thread) of each kernel in nvdisasm's text."""
    found = re.findall(
        r"EIATTR_REGCOUNT\n(?:.*\n){1,6}?.*index@\((\S+)\)\n.*\.word\s+(0x\w+)", text
    )
    registers = dict(found)
    for section in re.split(r"^\t\.section\t\.text\.", text, flags=re.M)[1:]:
        mangled = section.split(",")[0].strip('"')
        yield mangled, section, int(registers[mangled], 16)


def path_of(name: str, head_dim: int) -> tuple[list[Instruction], int]:
    """(hot path, registers a thread) of a kernel of KERNELS."""
    ((_, section, registers),) = sections(disassemble(name, head_dim))
    kernel = KERNELS[name]
    path, _ = hot_path(Code.of(section), ARCHITECTURES[kernel.family], kernel.through)
    return path, registers


def measure(families=FAMILIES, head_dims=(*HEAD_DIMS, 192, 256)) -> dict:
    """{"sm90_forward 128": row} of all kernels."""
    rows = {}
    for head_dim, (name, kernel) in itertools.product(head_dims, KERNELS.items()):
        if kernel.family in families and head_dim in kernel.head_dims:
            path, registers = path_of(name, head_dim)
            block = launch_of(name, head_dim)._asdict()
            rows[f"{name} {head_dim}"] = report(kernel, path, registers, block)
    return rows


def differences(table: dict, rows: dict, slack: float = 0.05) -> list[str]:
    """What a fresh compile has more of than the table says, by more than `slack`."""
    lines = []
    for name, row in rows.items():
        known = table["kernels"].get(name)
        if known is None:
            lines.append(f"{name}: not in the table")
            continue
        groups = ("spill", "to_uniform", "ldmatrix", "copy", "select", "compare")
        pairs = [("slots", row["slots"], known["slots"])]
        pairs += [(g, row["counts"].get(g, 0), known["counts"].get(g, 0)) for g in groups]
        lines += [
            f"{name}: {now} {what}, the table says {then}"
            for what, now, then in pairs
            if now > then * (1 + slack)
        ]
    return lines


def markdown(rows: dict) -> str:
    """The table that docs/design/cuda.md shows."""
    names = ("hot loop", "registers", "CTAs", "slots", "slots a product", "ldmatrix", "R2UR",
             "selects", "spills", "share_2_norm")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, row in sorted(rows.items()):
        counts = row["counts"]
        cells = [
            name, row["registers"], row["ctas"], row["slots"], row["slots_a_product"],
            counts.get("ldmatrix", 0), counts.get("to_uniform", 0), counts.get("select", 0),
            counts.get("spill", 0), row["share_2_norm"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--triton", action="store_true", help="of the Triton kernels")
    parser.add_argument("--dump", nargs=2, metavar=("KERNEL", "HEAD_DIM"), help="print one loop")
    arguments = parser.parse_args()
    if arguments.triton:
        return load_beside("triton_tables").report(arguments.write)
    if not load_resources().compiler() or load_resources().find_cuda_tool("nvdisasm") is None:
        print(
            "NVRTC and nvdisasm are needed: pip install nvidia-cuda-nvrtc triton", file=sys.stderr
        )
        return 2
    if arguments.dump:
        name, head_dim = arguments.dump
        if name not in KERNELS or not head_dim.isdigit():
            print(f"KERNEL must be one of {', '.join(KERNELS)}", file=sys.stderr)
            return 2
        path, _ = path_of(name, int(head_dim))
        for each in path:
            print(f"{each.address:6}{each.predicate:7}{each.opcode} {each.operands}")
        return 0
    rows = measure()
    print(markdown(rows))
    if arguments.write:
        table = {"nvrtc": load_resources().compiler(), "kernels": dict(sorted(rows.items()))}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        return 0
    lines = differences(json.loads(TABLE.read_text()), rows)
    print("\n".join(lines) or "as in the table")
    return bool(lines)


if __name__ == "__main__":
    raise SystemExit(main())
