"""What the CUDA kernels take, and the machine code of their hot loops, without a GPU.

`attn-ext compile` compiles what calls launch; a change that costs registers or spills, instructions
or shared memory shows against bench/results/cuda_resources.json, one that lengthens a hot loop
against bench/results/machine_code.json.  `python bench/cuda_resources.py --write` and
`python bench/machine_code.py --write` renew them.  What was compiled of these very sources is known
(tests/helpers/seen.py): only a sample of it is compiled again.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import seen
from repository import ROOT, load

from attn_ext.backends.jit import first_use, nvrtc, sources
from attn_ext.cli import compile as command

resources, machine_code = load("bench/cuda_resources.py"), load("bench/machine_code.py")
TABLE = json.loads(resources.TABLE.read_text())
needs_nvrtc = pytest.mark.skipif(
    not resources.compiler(), reason="nvidia-cuda-nvrtc is not installed"
)


@pytest.fixture(scope="module")
def launched():
    """{kernel: {architecture: how it is launched}} of all kernels that calls launch."""
    found = {}
    for unit in resources.UNITS:
        for arch in resources.ARCHS:
            for kernel, want in resources.launched(unit, arch).items():
                found.setdefault(kernel, {}).setdefault(arch, want)
    return found


def test_the_table_has_what_calls_launch(launched):
    """A kernel that is in no row, or a row of a kernel that nobody runs; another block."""
    assert {k: set(rows) for k, rows in launched.items()} == {
        kernel: set(rows) for kernel, rows in TABLE["kernels"].items()
    }
    for kernel, rows in launched.items():
        for arch, want in rows.items():
            row = TABLE["kernels"][kernel][arch]
            assert (row["threads"], row["shared_memory"]) == (want.threads, want.shared_memory)


def test_calls_launch_every_kernel_and_feature(launched):
    """A kernel, a head dimension, a dtype or a feature that no call of the table comes to."""
    stems = {kernel.split("<")[0] for kernel in launched}
    names = {f"{space}::{name}" for space, kernels in sources.HEADERS.items() for name in kernels}
    assert stems == names
    for space, dims in (("sm80", resources.HEAD_DIMS), ("sm90", resources.head_dims("sm90"))):
        sizes = {kernel.strip(">").split(", ")[1] for kernel in launched
                 if kernel.startswith(space) and ", " in kernel}  # fmt: skip
        assert sizes == set(map(str, dims))
    words = {word for kernel in launched for word in kernel.strip(">").split(", ")[-1].split()}
    cases = {"bias_f32", "bias_cast", "any"}  # a bias in another dtype; the emulator's
    assert sources.features(ROOT / "csrc").keys() - words == cases
    assert {kernel.split("<")[1].split(",")[0].strip(">") for kernel in launched} == {
        "bf16", "fp16", "f32",
    }  # fmt: skip


def test_every_row_is_within_its_budget():
    """A table renewed after a change that spills or takes more shared memory than there is."""
    for kernel, rows in TABLE["kernels"].items():
        for arch, row in rows.items():
            assert row["spilled_bytes"] <= resources.spill_budget(kernel, arch), (kernel, arch, row)
            assert 0 < row["registers"] <= 255
            assert row["shared_memory"] <= command.SHARED_KIB[arch] * 1024, (kernel, arch)


def test_every_exception_is_needed():
    """A pattern of SPILLS that outlived the kernel that it was for, or excuses more than it has."""
    names = {
        f"{kernel} sm_{arch}": row["spilled_bytes"]
        for kernel, rows in TABLE["kernels"].items()
        for arch, row in rows.items()
    }
    for pattern, most in resources.SPILLS:
        found = [spilled for name, spilled in names.items() if re.fullmatch(pattern, name)]
        assert found and 0 < most <= 1.5 * max(found), (pattern, max(found, default=None))


def test_the_occupancy_of_the_document_is_that_of_the_table():
    """docs/design/cuda.md tells the occupancy of kernels that are no more."""
    page = resources.PAGE.read_text()
    assert resources.with_occupancy(page, TABLE) == page


def test_two_forward_ctas_for_head_dim_128_fit_sm_80():
    """256 bytes of shared memory too many halve what a multiprocessor of an A100 works on."""
    for dtype in ("bf16", "fp16"):
        assert resources.resident_warps(TABLE, f"sm80::forward_plain<{dtype}, 128>", "80") == 8


def test_occupancy_by_hand():
    """Registers not rounded to what a warp is given, or the CTA's own shared memory forgotten."""
    row = {"registers": 129, "shared_memory": 40 * 1024, "threads": 128}
    table = {"kernels": {"sm80::forward_plain<bf16, 64>": {"80": row}}}
    # 129 registers are 136: 65536 // (136 * 128) = 3 CTAs; 164 // 41 = 4 CTAs
    assert resources.resident_warps(table, "sm80::forward_plain<bf16, 64>", "80") == 12
    row["shared_memory"] += 16 * 1024  # 164 // 57 = 2 CTAs
    assert resources.resident_warps(table, "sm80::forward_plain<bf16, 64>", "80") == 8


def test_what_counts_as_a_difference():
    """More of something that passes, or less of it that does not."""
    row = {
        "threads": 128,
        "registers": 90,
        "spilled_bytes": 0,
        "shared_memory": 9,
        "instructions": 50,
    }
    table = {"kernels": {"sm80::combine<f32>": {"80": row, "120": row}}}
    for name, worse in (("threads", 64), ("registers", 91), ("spilled_bytes", 4),
                        ("shared_memory", 8), ("instructions", 56)):  # fmt: skip
        (line,) = resources.differences(
            table, {"sm80::combine<f32>": {"80": row | {name: worse}}}, ("80",)
        )
        assert name in line
    fewer = row | {"registers": 80, "instructions": 54}
    assert not resources.differences(table, {"sm80::combine<f32>": {"80": fewer}}, ("80",))
    assert resources.differences(table, {"sm80::combine<f32>": {"80": row}})  # not for sm_120
    assert resources.differences(table, {"sm80::other<f32>": {"80": row}}, ("80",))
    assert resources.differences(table, {}) == ["no kernel was compiled"]


def test_the_assemblers_log_is_read():
    """Spills or registers of another line; products of wgmma that wait for one another, unseen."""
    log = (
        "ptxas info    : Compiling entry function '_Zname' for 'sm_80'\n"
        "    16 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    found = nvrtc.Binary("_Zname", b"", b"", log)
    assert found.resources == (255, 40) and not found.serialized
    warned = log + "ptxas info : (C7510) Potential Performance Loss: wgmma serialized\n"
    assert "wgmma serialized" in nvrtc.Binary("_Zname", b"", b"", warned).serialized


# Each unit for one architecture, all three in turn.
CHOSEN = {
    unit: resources.ARCHS[(index + index // len(resources.HEAD_DIMS)) % 3]
    for index, unit in enumerate(resources.UNITS)
}
SEEN = "machine_code"
DUE = seen.sample(map(str, CHOSEN), 1)  # a unit at each commit
ALL = os.environ.get("ATTN_EXT_NVRTC_ALL") == "1"  # every row of the table


class Known(NamedTuple):
    """A test by its name in the table, and the digest of all that decides what it finds."""

    name: str
    digest: str

    @classmethod
    def of(cls, what, unit, kernels, *facts):
        """kernels: as C++ names them; facts: the rows of a table that they are held against."""
        headers = {sources.kernel(each, "80").header for each in kernels}
        files = set().union(*(seen.included(ROOT / "csrc" / each, "emulation") for each in headers))
        files |= {ROOT / f"bench/{name}.py" for name in ("cuda_resources", "machine_code")}
        files |= {ROOT / f"attn_ext/backends/jit/{name}.py" for name in ("nvrtc", "sources")}
        files.add(Path(__file__).resolve())
        facts = (resources.compiler(), sorted(kernels), *facts)
        return cls(f"{unit}: {what}", seen.digest(files, *facts))

    def __bool__(self):
        due = [self.name] if self.name.split(":")[0] in DUE else []
        return seen.known(SEEN, self.name, self.digest, due)

    def passed(self):
        seen.passed(SEEN, self.name, self.digest)


@pytest.fixture
def kept_kernels(monkeypatch):
    """What was compiled stays in build/, by its contents."""
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(ROOT / "build" / "kernels"))
    first_use.default.cache_clear()
    yield
    first_use.default.cache_clear()


@needs_nvrtc
@pytest.mark.parametrize("unit", CHOSEN, ids=str)
def test_kernels_take_no_more_than_the_table_says(unit, kept_kernels):
    """Registers, spills, instructions, threads and shared memory by `attn-ext compile --json`."""
    archs = resources.ARCHS if ALL else (CHOSEN[unit],)
    wants = {
        kernel: want for arch in archs for kernel, want in resources.launched(unit, arch).items()
    }
    expected = {kernel: TABLE["kernels"].get(kernel) for kernel in sorted(wants)}
    kernels = [want.kernel for want in wants.values()]
    known = Known.of(f"takes for {', '.join(archs)}", unit, kernels, TABLE["nvrtc"], expected)
    if known:
        return
    found = resources.compile_unit(unit, archs)
    bad = resources.differences(TABLE, found, archs)
    if resources.compiler() != TABLE["nvrtc"]:
        # another compiler allocates otherwise: only the budget holds
        bad = [
            f"{kernel} sm_{arch} spills {row['spilled_bytes']} bytes"
            for kernel, rows in found.items()
            for arch, row in rows.items()
            if row["spilled_bytes"] > resources.spill_budget(kernel, arch)
        ]
    assert bad == []
    known.passed()


def test_every_architecture_is_compiled_for_each_dtype():
    """A dtype or an architecture that was added and is never compiled."""
    assert tuple(CHOSEN) == resources.UNITS
    for dtype in resources.DTYPES:
        archs = {arch for unit, arch in CHOSEN.items() if unit.dtype == dtype}
        assert archs == set(resources.ARCHS)


TOOLS = resources.compiler() and resources.find_cuda_tool("nvdisasm")
needs_tools = pytest.mark.skipif(not TOOLS, reason="NVRTC or nvdisasm is missing")


def known_code(what, names, head_dim, *facts):
    """`Known` of kernels of machine_code.KERNELS."""
    kernels = [machine_code.launch_of(name, head_dim).kernel for name in names]
    return Known.of(what, resources.Unit("bf16", head_dim), kernels, *facts)


INSTRUCTIONS = ("HGMMA.64x128x16.F32.BF16", "UTMALDG.4D", "USETMAXREG.DEALLOC")


@needs_tools
@pytest.mark.parametrize(
    ("kernel", "more"),
    [
        ("sm90_forward", ()),
        ("sm90_backward_dq", ()),
        ("sm90_backward_dkdv", ()),
        ("sm90_backward_fused", ("STSM.16.MT88.4", "UBLKRED.G.S.ADD.F32")),
    ],
)
def test_hopper_kernels_use_hoppers_instructions(kept_kernels, kernel, more):
    """wgmma that the compiler waits for one by one, loads that are no copies of the engine, arrays
    that went to local memory, registers that were not handed over."""
    known = known_code(f"instructions of {kernel}", [kernel], 128)
    if known:
        return
    sass = machine_code.disassemble(kernel, 128)
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


@needs_tools
def test_hopper_kernels_compute_while_the_tensor_cores_do(kept_kernels):
    """ptxas moves arithmetic behind a wait that it need not wait for."""
    names = [
        name
        for name in machine_code.KERNELS
        if re.fullmatch("sm90_(forward|backward_(dq|dkdv|fused))", name)
    ]
    known = known_code("what overlaps", names, 128)
    if known:
        return
    hopper_sass = {name: machine_code.disassemble(name, 128) for name in names}
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


@needs_tools
@pytest.mark.parametrize(
    ("family", "head_dim"),
    sorted({(k.family, dim) for k in machine_code.KERNELS.values() for dim in k.head_dims}),
)
def test_hot_loops_have_no_more_instructions_than_the_table_says(kept_kernels, family, head_dim):
    """A change that puts instructions, spills or moves between register files into a hot loop."""
    table = json.loads(machine_code.TABLE.read_text())
    if resources.compiler() != table["nvrtc"]:
        pytest.skip(f"the table is of NVRTC {table['nvrtc']}")
    names = [
        name
        for name, k in machine_code.KERNELS.items()
        if k.family == family and head_dim in k.head_dims
    ]
    expected = {f"{name} {head_dim}": table["kernels"].get(f"{name} {head_dim}") for name in names}
    known = known_code(f"hot loops of {family}", names, head_dim, expected)
    if known:
        return
    rows = machine_code.measure((family,), (head_dim,))
    assert rows.keys() == expected.keys()
    assert machine_code.differences(table, rows) == []
    known.passed()


def test_the_table_of_what_was_seen_names_no_test_that_is_gone():
    """A unit that is compiled no more, and still looks as if it was."""
    units = set(map(str, resources.UNITS))
    assert not seen.strangers(SEEN, [n for n in seen.read(SEEN) if n.split(":")[0] in units])


def test_sm80_loops_reach_their_goals():
    """A table renewed after a loop lost what makes it fast: at 128 FlashAttention-2 has 3.7
    and 2.8 slots a product."""
    goals = {  # slots and ldmatrix a product
        "sm80_forward 128": (3.6, 0.32),
        "sm80_forward 64": (4.6, 0.32),
        "sm80_backward_fused 128": (3.0, 0.45),
        "sm80_backward_fused 64": (3.6, 0.45),
        "sm80_backward_dq 128": (2.5, 0.42),
        "sm80_backward_dq 64": (3.0, 0.34),
        "sm80_backward_dkdv 128": (3.2, 0.57),
        "sm80_backward_dkdv 64": (4.1, 0.38),
    }
    table = json.loads(machine_code.TABLE.read_text())["kernels"]
    for name, (slots, ldmatrix) in goals.items():
        counts = table[name]["counts"]
        assert table[name]["slots"] <= slots * counts["product"], name
        assert counts["ldmatrix"] <= ldmatrix * counts["product"], name
        assert counts.get("spill", 0) <= SPILLS_IN_LOOPS.get(name, 0), name
        assert "select" not in counts, name
        assert table[name]["ctas"] == (1 if "fused" in name else 2), name


def test_hopper_loops_reach_their_goals():
    """A table renewed after a loop lost what makes it fast.  FlashAttention-3 has 3.3 slots a
    product in the forward at 128 and 6.4 at 64, and 2.5 to 3.0 in the backward at 128."""
    goals = {  # slots a product, moves to uniform registers a tile, tiles an iteration
        "sm90_forward 128": (2.7, 4, 2),
        "sm90_forward 64": (5.0, 4, 2),
        "sm90_backward_fused 128": (2.8, 4, 1),
        "sm90_backward_fused 64": (4.1, 5, 1),  # an iteration is 128 queries
        "sm90_backward_ordered 128": (2.8, 4, 1),
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
def test_sm80_exponentials_run_under_products(kept_kernels):
    """A branch, or an order of the source, that puts the softmax before all of P V."""
    path, _ = machine_code.path_of("sm80_forward", 128)
    exponentials = [at for at, each in enumerate(path) if each.group == "exp2"]
    under = path[exponentials[0] : exponentials[-1]]
    assert sum(each.group == "product" for each in under) >= 48


# Accesses of a hot loop: a mask or a bias is on its way while O, S and Q take the registers.
SPILLS_IN_LOOPS = {
    "sm80_forward_dropout 128": 1, "sm80_backward_bias 128": 3, "sm80_backward_mask 128": 1,
    "sm90_forward_bias 128": 11,
    "sm90_forward_softcap 128": 4, "sm90_backward_bias 128": 4,
}  # fmt: skip


def test_hopper_loops_take_descriptors_from_uniform_registers():
    """A table renewed after descriptors went back to ordinary registers: 48 to 112 moves a loop;
    or after a hot loop began to spill, or spills more."""
    for name, row in json.loads(machine_code.TABLE.read_text())["kernels"].items():
        if name.startswith("sm90"):
            # wider than 128 columns Q's descriptor is made uniform again for each tile
            assert row["counts"].get("to_uniform", 0) <= (9 if name.endswith(" 192") else 8), name
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
    block = {"threads": 128, "shared_memory": 40 * 1024}
    row = machine_code.report(machine_code.KERNELS["sm80_forward"], path, 130, block)
    # 65536 // (136 * 128) = 3 CTAs of 4 warps; one product of 8 tensor cycles
    assert (row["ctas"], row["tensor_cycles"], row["slots_a_product"]) == (3, 8.0, 4.0)
    assert row["counts"] == {"branch": 2, "exp2": 1, "product": 1}
