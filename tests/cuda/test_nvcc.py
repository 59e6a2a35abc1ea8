"""Every CUDA kernel compiled by nvcc, without a GPU, against bench/results/cuda_resources.json.

The half of ptx.cuh that the emulator never runs is at least compiled for every architecture, and a
change that costs registers or spills shows here.  `python bench/cuda_resources.py --write` renews
the table.  What was compiled of these very sources is known (tests/helpers/seen.py): only a sample
of it is compiled again.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import seen
from repository import ROOT, load

resources, machine_code = load("bench/cuda_resources.py"), load("bench/machine_code.py")
TABLE = json.loads(resources.TABLE.read_text())
NVCC = resources.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


FUSED_DIMS = [n for n in resources.HEAD_DIMS if n <= 128]


def test_table_holds_every_kernel_within_its_budget():
    """A table renewed after a change that spills, or that lost a kernel, does not pass."""
    for kernel, rows in TABLE["kernels"].items():
        for arch, row in rows.items():
            assert row["spill_bytes"] <= resources.spill_budget(kernel, arch), (kernel, arch, row)
            assert 0 < row["registers"] <= 255
    halves = [f"{d}, {n}" for d in ("bf16", "fp16") for n in resources.HEAD_DIMS]
    floats = [f"f32, {n}" for n in resources.HEAD_DIMS]
    names = ("backward_dq", "backward_dkdv")
    expected = {f"{k}<{p}, {v}>" for k in names for p in halves for v in ("plain", "general")}
    expected |= {f"{k}<{p}, general>" for k in names for p in floats}
    expected |= {f"forward_plain<{p}>" for p in halves}
    expected |= {f"forward_general<{p}>" for p in halves + floats}
    expected |= {f"forward_features<{p}, general>" for p in halves}
    expected |= {
        f"{k}_features<bf16, {n}, {word}>"
        for k in ("forward", "backward")
        for n in resources.FEATURE_DIMS
        for word in resources.FEATURES
    }
    for dtype in ("bf16", "fp16"):
        expected |= {f"{k}<{dtype}, {n}>" for k in ("clear_dq", "convert_dq") for n in FUSED_DIMS}
        expected |= {f"backward_fused<{dtype}, {n}, 64>" for n in FUSED_DIMS}
        expected.add(f"backward_fused<{dtype}, 64, 128>")
        expected |= {
            f"{k}<{dtype}, {n}, general>"
            for k in ("backward_features", "convert_dq_features")
            for n in FUSED_DIMS
        }
    expected |= {f"backward_bias<{p}>" for p in halves + floats}
    expected |= {
        f"sm90_{k}<{d}, {n}>"
        for k in ("forward", *names)
        for d in ("bf16", "fp16")
        for n in resources.SM90_HEAD_DIMS
    }
    expected |= {
        f"sm90_{k}<{d}, {n}>"
        for k in ("backward_fused", "clear_dq", "convert_dq")
        for d in ("bf16", "fp16")
        for n in resources.SM90_HEAD_DIMS
        if n <= 128
    }
    assert expected <= TABLE["kernels"].keys()
    for kernel, rows in TABLE["kernels"].items():
        assert set(rows) == resources.kernel_archs(kernel), kernel


def test_shared_memory_fits_every_architecture():
    """More than 99 KiB a block would run on sm_80 and fail on sm_86, sm_89 and sm_120."""
    blocks = resources.blocks()
    assert blocks == TABLE["blocks"]
    for name, block in blocks.items():
        limit = 227 if name.startswith("sm90_") else 99
        if name.startswith(("backward_fused<", "backward_features<")):  # chosen where it fits
            limit = 163
        assert block["shared_memory_bytes"] <= limit * 1024, name


def test_the_occupancy_of_the_document_is_that_of_the_table():
    """docs/design/cuda.md tells the occupancy of kernels that are no more."""
    assert resources.occupancy(TABLE) in (ROOT / "docs" / "design" / "cuda.md").read_text()


def test_two_forward_blocks_for_head_dim_128_fit_sm_80():
    """256 bytes of shared memory too many halve what a multiprocessor of an A100 works on."""
    for dtype in ("bf16", "fp16"):
        assert resources.resident_warps(TABLE, f"forward_plain<{dtype}, 128>", "sm_80") == 8


def test_occupancy_by_hand():
    """Registers not rounded to what a warp is given, or the block's own shared memory forgotten."""
    rows = {"forward_plain<bf16, 64>": {"sm_80": {"registers": 129}}}
    block = {"shared_memory_bytes": 40 * 1024, "threads": 128}
    table = {"kernels": rows, "blocks": {"forward_plain<bf16, 64>": block}}
    # 129 registers are 136: 65536 // (136 * 128) = 3 blocks; 164 // 41 = 4 blocks
    assert resources.resident_warps(table, "forward_plain<bf16, 64>", "sm_80") == 12
    block["shared_memory_bytes"] += 16 * 1024  # 164 // 57 = 2 blocks
    assert resources.resident_warps(table, "forward_plain<bf16, 64>", "sm_80") == 8


def test_log_parser_reads_names_spills_and_warnings():
    log = (
        "ptxas info    : Compiling entry function "
        "'_ZN4attn4cuda4sm8011backward_dqINS_3ptx4bf16ELi64ELi1048576EEEvNS0_6ParamsE' "
        "for 'sm_80'\n"
        "    16 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function "
        "'_ZN4attn4cuda4sm8013backward_biasIfLi128ELi1048576EEEvNS0_6ParamsE' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 90 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function "
        "'_ZN4attn4cuda4sm8013backward_biasIfLi128ELi1048576EEEvNS0_6ParamsE' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 91 registers, used 1 barriers\n"
    )
    assert resources.parse(log) == {
        "backward_dq<bf16, 64, general>": {"sm_80": {"registers": 255, "spill_bytes": 40}},
        "backward_bias<f32, 128>": {
            "sm_80": {"registers": 90, "spill_bytes": 0},
            "sm_90a": {"registers": 91, "spill_bytes": 0},
        },
    }
    with pytest.raises(ValueError, match="ptxas warns"):
        resources.parse("ptxas info : (C7510) Potential Performance Loss: wgmma serialized")


# Each kernel for one architecture, and each architecture for some widths of each dtype.  The hot
# loops are counted in the machine code for sm_80 at 64 and 128.  fp16 is the text of bf16 with
# another type: two widths of it.
CHOSEN = {
    ("launch", 0): "80",
    ("bf16", 32): "90a", ("bf16", 64): "80", ("bf16", 96): "120", ("bf16", 128): "80",
    ("bf16", 192): "90a", ("bf16", 256): "120",
    ("fp16", 64): "90a", ("fp16", 128): "120",
    ("float", 32): "120", ("float", 64): "90a", ("float", 96): "80", ("float", 128): "90a",
    ("float", 192): "120", ("float", 256): "80",
    ("features bf16", 64): "90a", ("features bf16", 128): "80",
    ("sm90 features bf16", 64): "90a", ("sm90 features bf16", 128): "90a",
    **{("sm90 bf16", dim): "90a" for dim in resources.SM90_HEAD_DIMS},
    **{("sm90 fp16", dim): "90a" for dim in (64, 128)},
}  # fmt: skip
COMPILED = [(dtype, dim, (arch,)) for (dtype, dim), arch in CHOSEN.items()]
if os.environ.get("ATTN_EXT_NVCC_ALL") == "1":  # every row of the table
    COMPILED = [(dtype, dim, resources.unit_archs(dtype)) for dtype, dim in resources.UNITS]


SEEN = "nvcc"
DUE = seen.sample([f"{dtype} {dim}" for dtype, dim in CHOSEN], 1)  # a unit at each commit


class Known(NamedTuple):
    """A test by its name in the table, and the digest of all that decides what it finds."""

    name: str
    digest: str

    @classmethod
    def of(cls, what, dtype, head_dim, *facts):
        """facts: the rows of a table that nvcc's result is held against."""
        unit = re.findall(r'#include "(.*)"', resources.source_text(dtype, head_dim))
        files = set().union(*(seen.included(ROOT / "csrc" / name, "emulation") for name in unit))
        files |= {ROOT / "bench/cuda_resources.py", ROOT / "bench/machine_code.py"}
        files.add(Path(__file__).resolve())
        facts = (resources.nvcc_version(NVCC), dtype, head_dim, *facts)
        return cls(f"{dtype} {head_dim}: {what}", seen.digest(files, *facts))

    def __bool__(self):
        due = [self.name] if self.name.split(":")[0] in DUE else []
        return seen.known(SEEN, self.name, self.digest, due)

    def passed(self):
        seen.passed(SEEN, self.name, self.digest)


TOOLS = NVCC and all(map(resources.find_cuda_tool, ("cuobjdump", "nvdisasm")))
needs_tools = pytest.mark.skipif(not TOOLS, reason="nvcc, cuobjdump or nvdisasm is missing")


@pytest.fixture(scope="module")
def hopper_sass(tmp_path_factory):
    """{kernel: machine code} of the Hopper kernels for bf16 and head_dim 128."""
    if not TOOLS:
        pytest.skip("nvcc, cuobjdump or nvdisasm is missing")
    cubin = resources.cubin(NVCC, "sm90 bf16", 128, "90a", tmp_path_factory.mktemp("sass"))
    sass = subprocess.run(
        [resources.find_cuda_tool("cuobjdump"), "-sass", cubin],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    parts = sass.split("Function : ")[1:]
    return {resources.kernel_name(part.split()[0]).split("<")[0]: part for part in parts}


INSTRUCTIONS = ("HGMMA.64x128x16.F32.BF16", "UTMALDG.4D", "USETMAXREG.DEALLOC")


@pytest.mark.parametrize(
    ("kernel", "more"),
    [
        ("sm90_forward", ()),
        ("sm90_backward_dq", ()),
        ("sm90_backward_dkdv", ()),
        ("sm90_backward_fused", ("STSM.16.MT88.4", "UBLKRED.G.S.ADD.F32")),
    ],
)
def test_hopper_kernels_use_hoppers_instructions(request, kernel, more):
    """wgmma that the compiler waits for one by one, loads that are no copies of the engine, arrays
    that went to local memory, registers that were not handed over."""
    known = TOOLS and Known.of(f"instructions of {kernel}", "sm90 bf16", 128)
    if known:
        return
    sass = request.getfixturevalue("hopper_sass")[kernel]
    for name in (*INSTRUCTIONS, *more):
        assert name in sass, name
    assert not re.search(r"\b(STL|LDL)\b", sass)
    # a wait behind each product instead of each group: 4 or 8 products a group
    assert len(re.findall(r"WARPGROUP\.DEPBAR", sass)) * 4 <= len(re.findall(r"\bHGMMA", sass))
    known.passed()


def until_the_next_wait(sass, before):
    """The code behind the first wait for all but one group that follows `before`."""
    begin = sass.index("WARPGROUP.DEPBAR.LE gsb0, 0x1", sass.index(before))
    return sass[begin : sass.index("WARPGROUP.DEPBAR", begin + 16)]


def test_hopper_kernels_compute_while_the_tensor_cores_do(request):
    """ptxas moves arithmetic behind a wait that it need not wait for."""
    known = TOOLS and Known.of("what overlaps", "sm90 bf16", 128)
    if known:
        return
    hopper_sass = request.getfixturevalue("hopper_sass")
    # softmax of a tile (32 values a row and thread, 2 rows) while P V is under way
    overlapped = until_the_next_wait(hopper_sass["sm90_forward"], "HGMMA")
    assert overlapped.count("MUFU.EX2") >= 64
    # P (16 values, 2 rows) while dP is
    overlapped = until_the_next_wait(hopper_sass["sm90_backward_dq"], "HGMMA")
    assert overlapped.count("MUFU.EX2") >= 32
    for name in ("sm90_backward_dkdv", "sm90_backward_fused"):
        sass = hopper_sass[name]
        overlapped = until_the_next_wait(sass, "HGMMA")
        assert overlapped.count("MUFU.EX2") >= 32
        # dS packed, 16 words, while dV is
        sass = sass[sass.index(overlapped) + len(overlapped) :]
        assert sass[: sass.index("WARPGROUP.DEPBAR", 16)].count("F2FP.BF16") >= 16
    known.passed()


def test_every_unit_but_those_of_fp16_is_compiled():
    """A width, a dtype or an architecture that was added and is never compiled."""
    assert CHOSEN.keys() == {u for u in resources.UNITS if "fp16" not in u[0] or u[1] in (64, 128)}
    for dtype in ("bf16", "float"):
        assert {arch for (d, _), arch in CHOSEN.items() if d == dtype} == set(resources.ARCHS)


@needs_nvcc
@pytest.mark.parametrize(
    ("dtype", "head_dim", "archs"),
    COMPILED,
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else None,
)
def test_kernels_compile_and_use_no_more_than_the_table_says(dtype, head_dim, archs):
    kind = f"<{resources.DTYPES.get(dtype.split()[-1])}, {head_dim}"
    rows = {
        kernel: [row.get(f"sm_{arch}") for arch in archs]
        for kernel, row in TABLE["kernels"].items()
        if kernel.startswith("sm90_") == dtype.startswith("sm90")
        and (kind in kernel or not head_dim)
    }
    known = Known.of(f"compiles for {', '.join(archs)}", dtype, head_dim, TABLE["nvcc"], rows)
    if known:
        return
    found = resources.compile_unit(NVCC, dtype, head_dim, archs)
    bad = resources.differences(TABLE, found, archs)
    if resources.nvcc_version(NVCC) != TABLE["nvcc"]:
        # another compiler allocates otherwise: only the budget holds
        bad = [
            f"{kernel} {arch} spills {row['spill_bytes']} bytes"
            for kernel, rows in found.items()
            for arch, row in rows.items()
            if row["spill_bytes"] > resources.spill_budget(kernel, arch)
        ]
    assert bad == []
    known.passed()


@needs_tools
@pytest.mark.parametrize("family", machine_code.FAMILIES)
@pytest.mark.parametrize("head_dim", machine_code.HEAD_DIMS)
def test_hot_loops_have_no_more_instructions_than_the_table_says(family, head_dim):
    """A change that puts instructions, spills or moves between register files into a hot loop."""
    table = json.loads(machine_code.TABLE.read_text())
    if resources.nvcc_version(NVCC) != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    names = [f"{name} {head_dim}" for name, k in machine_code.KERNELS.items() if k.family == family]
    expected = {name: table["kernels"].get(name) for name in names}
    known = Known.of("hot loops", "bf16" if family == "sm80" else "sm90 bf16", head_dim, expected)
    if known:
        return
    rows = machine_code.measure(NVCC, (family,), (head_dim,))
    assert len(rows) == sum(k.family == family for k in machine_code.KERNELS.values())
    assert machine_code.differences(table, rows) == []
    known.passed()


def test_the_table_of_what_was_seen_names_no_test_that_is_gone():
    """A unit that is compiled no more, and still looks as if it was."""
    units = {f"{dtype} {dim}" for dtype, dim in resources.UNITS}
    assert not {name for name in seen.read(SEEN) if name.split(":")[0] not in units}


def test_sm80_loops_reach_their_goals():
    """A table renewed after a loop lost what makes it fast: at 128 FlashAttention-2 has 3.7
    and 2.8 slots a product."""
    goals = {  # slots and ldmatrix a product
        "sm80_forward 128": (3.6, 0.32),
        "sm80_forward 64": (4.6, 0.32),
        "sm80_backward_fused 128": (3.0, 0.45),
        "sm80_backward_fused 64": (3.6, 0.45),
    }
    table = json.loads(machine_code.TABLE.read_text())["kernels"]
    for name, (slots, ldmatrix) in goals.items():
        counts = table[name]["counts"]
        assert table[name]["slots"] <= slots * counts["product"], name
        assert counts["ldmatrix"] <= ldmatrix * counts["product"], name
        assert counts.get("spill", 0) == 0, name
    for name in ("sm80_forward 128", "sm80_forward 64"):
        assert table[name]["ctas"] == 2


def test_hopper_loops_reach_their_goals():
    """A table renewed after a loop lost what makes it fast.  FlashAttention-3 has 3.3 slots a
    product in the forward at 128 and 6.4 at 64, and 2.5 to 3.0 in the backward at 128."""
    goals = {  # slots a product, moves to uniform registers a tile, tiles an iteration
        "sm90_forward 128": (2.7, 4, 2),
        "sm90_forward 64": (5.0, 4, 2),
        "sm90_backward_fused 128": (2.8, 4, 1),
        "sm90_backward_fused 64": (4.2, 4, 1),
    }
    table = json.loads(machine_code.TABLE.read_text())["kernels"]
    for name, (slots, moves, tiles) in goals.items():
        counts = table[name]["counts"]
        assert table[name]["slots_a_product"] <= slots, name
        assert counts.get("to_uniform", 0) <= moves * tiles, name
    for name in ("sm90_forward 128", "sm90_forward 64"):
        counts = table[name]["counts"]
        assert "max" not in counts, name  # the base is moved outside of the hot path
        assert counts["barrier"] == 4, name  # a wait for the turn and its passing on, twice


@needs_tools
def test_sm80_exponentials_run_under_products():
    """A branch, or an order of the source, that puts the softmax before all of P V."""
    text = machine_code.disassemble(NVCC, "sm80", 128)
    path, _ = machine_code.paths_of(text, "sm80")["sm80_forward"]
    exponentials = [at for at, each in enumerate(path) if each.group == "exp2"]
    under = path[exponentials[0] : exponentials[-1]]
    assert sum(each.group == "product" for each in under) >= 48


# Accesses of a hot loop: a mask or a bias is on its way while O, S and Q take the registers.
SPILLS_IN_LOOPS = {
    "sm80_forward_bias 128": 14, "sm80_forward_mask 64": 2,
    "sm80_backward_bias 128": 4, "sm80_backward_mask 128": 4, "sm90_backward_mask 128": 1,
    "sm90_backward_bias 128": 2, "sm90_backward_dropout 128": 2,
}  # fmt: skip


def test_hopper_loops_take_descriptors_from_uniform_registers():
    """A table renewed after descriptors went back to ordinary registers: 48 to 112 moves a loop;
    or after a hot loop began to spill, or spills more."""
    for name, row in json.loads(machine_code.TABLE.read_text())["kernels"].items():
        if name.startswith("sm90"):
            assert row["counts"].get("to_uniform", 0) <= 8, name
        assert row["counts"].get("spill", 0) <= SPILLS_IN_LOOPS.get(name, 0), name


LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, RZ ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/              @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   FSEL R4, R4, RZ, P1 ;
        /*0040*/                   FSEL R5, R5, RZ, P1 ;
.L_x_3:
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_the_hot_path_leaves_the_slow_way_out():
    """A count of all of a loop's blocks, those of masks too, or of what is no loop."""
    code = machine_code.Code.of(LISTING)
    assert code.loops() == {1: {1, 3, 5}}
    path, inner = machine_code.hot_path(code, machine_code.ARCHITECTURES["sm80"])
    assert [each.group for each in path] == ["product", "branch", "exp2", "branch"]
    assert inner == []
    block = {"threads": 128, "shared_memory_bytes": 40 * 1024}
    row = machine_code.report(machine_code.KERNELS["sm80_forward"], path, 130, block)
    # 65536 // (136 * 128) = 3 CTAs of 4 warps; one product of 8 tensor cycles
    assert (row["ctas"], row["tensor_cycles"], row["slots_a_product"]) == (3, 8.0, 4.0)
    assert row["counts"] == {"branch": 2, "exp2": 1, "product": 1}
