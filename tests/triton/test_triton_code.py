"""The hot loops of the Triton kernels hold no more instructions than bench/results/triton_code.json
says, beside those of plain Triton; nothing runs on a GPU.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import seen
import triton_seen
from repository import ROOT

from attn_ext.triton_kernels import configs

pytest.importorskip("triton")
triton_code = importlib.import_module("triton_code")
triton_tables = importlib.import_module("triton_tables")
PATH = Path(triton_code.__file__)
TABLE = json.loads(triton_tables.TABLE.read_text())


LOOPS = ("sm_90 dkdv 128", "sm_80 forward 64", "sm_80 dq 64")


def test_loops_have_no_more_instructions_than_the_table_says(tmp_path, monkeypatch):
    """An option, a check or address arithmetic that a change puts into the loop of plain calls; a
    tile that was changed without its row.  Compiled when these change, and every eighth commit,
    with one option of the backward, which the commit chooses."""
    if metadata.version("triton") != TABLE["triton"]:
        pytest.skip(f"the table is of Triton {TABLE['triton']}; counts differ by version")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    expected = {name: TABLE["rows"][name] for name in LOOPS}
    option = seen.sample((*triton_code.BACKWARD, *triton_code.BIAS_GRADIENT), 1)
    kinds = [f"ours {case}" for case in (*triton_code.CASES, *sorted(option))]
    tools = ("triton_code", "triton_tables", "plain_triton", "cuda_resources")
    files = [*(PATH.with_name(f"{name}.py") for name in tools), ROOT / "attn_ext" / "testing.py"]
    tools = map(seen.code, [*files, *sorted(ROOT.glob("attn_ext/core/*.py"))])
    today, due = triton_seen.digest(__file__, *tools, expected), seen.turn("hot loops", 8)
    if seen.known(triton_seen.TABLE, "hot loops", today, ["hot loops"] if due else []):
        return
    rows = triton_tables.measure_all(LOOPS, (*kinds, "plain", "plain, our tile"))
    assert rows.keys() == expected.keys()
    assert triton_tables.differences(TABLE, rows) == []
    for name, each in rows.items():
        for kind, found in each.items():
            assert found["tile"] == expected[name][kind]["tile"], (name, kind)
    seen.passed(triton_seen.TABLE, "hot loops", today)


def test_the_tables_hold_every_row():
    """A pass, a width, an architecture or a version of Triton that nobody looks at."""
    names = {
        f"{architecture} {name} {head_dim}"
        for architecture in triton_tables.TABLED
        for name in triton_code.PASSES
        for head_dim in triton_code.HEAD_DIMS
    }
    newest, oldest = triton_tables.tables().values()
    assert newest.keys() == oldest.keys() == names
    always = {"ours full", "ours causal", "plain", "plain, our tile"}
    for label in names:
        assert newest[label].keys() == set(triton_code.kinds_of(label.split()[1]))
        assert oldest[label].keys() == always


# (loop, row, Triton) -> goals that it misses; docs/design/triton.md says what stands in the way
MISSED = {
    ("sm_80 forward 64", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_80 dkdv 64", "ours causal", "3.9.0"): ("slots over plain",),
    ("sm_80 dkdv 64", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_80 dkdv 64", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_80 dq 64", "ours causal", "3.9.0"): ("slots over plain",),
    ("sm_80 dq 64", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_80 dq 64", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_80 dq 128", "ours full", "3.9.0"): ("slots over plain",),
    ("sm_80 dq 128", "ours causal", "3.9.0"): ("slots over plain",),
    ("sm_80 fused 64", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_90 forward 64", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_90 forward 128", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_90 dkdv 64", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_90 dkdv 64", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_90 dkdv 128", "ours full", "3.9.0"): ("share",),
    ("sm_90 dkdv 128", "ours causal", "3.9.0"): ("share",),
    ("sm_90 dkdv 128", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_90 dkdv 128", "ours bias", "3.9.0"): ("slots over plain",),
    ("sm_90 dkdv 128", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_90 dq 64", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_90 dq 64", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_90 dq 64", "ours bias gradient", "3.9.0"): ("slots over plain",),
    ("sm_90 dq 128", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_90 dq 128", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_90 fused 64", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_90 fused 64", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_90 fused 128", "ours full", "3.9.0"): ("slots over plain",),
    ("sm_90 fused 128", "ours causal", "3.9.0"): ("slots over plain",),
    ("sm_90 fused 128", "ours softcap", "3.9.0"): ("slots over plain",),
    ("sm_90 fused 128", "ours dropout", "3.9.0"): ("slots over plain",),
    ("sm_80 dkdv 128", "ours full", "3.6.0"): ("share",),
    ("sm_80 dkdv 128", "ours causal", "3.6.0"): ("share",),
    ("sm_80 dq 128", "ours full", "3.6.0"): ("slots over plain",),
    ("sm_80 dq 128", "ours causal", "3.6.0"): ("slots over plain",),
    ("sm_80 fused 64", "ours causal", "3.6.0"): ("slots over plain",),
    ("sm_80 fused 128", "ours full", "3.6.0"): ("slots over plain",),
    ("sm_80 fused 128", "ours causal", "3.6.0"): ("slots over plain",),
    ("sm_90 dkdv 64", "ours full", "3.6.0"): ("share",),
    ("sm_90 dkdv 128", "ours full", "3.6.0"): ("share",),
    ("sm_90 dkdv 128", "ours causal", "3.6.0"): ("share",),
    ("sm_90 dq 128", "ours full", "3.6.0"): ("slots over plain",),
    ("sm_90 dq 128", "ours causal", "3.6.0"): ("slots over plain",),
}  # fmt: skip


def test_which_goals_are_missed():
    """A row that is written anew with a slower loop; a goal that is met, but still excused."""
    missed = {}
    for version, rows in triton_tables.tables().items():
        for label, each in rows.items():
            for kind in filter(lambda x: x.startswith("ours"), each):
                found = triton_tables.goals(label, kind, each)
                if not all(met for *_, met in found):
                    names = tuple(what for what, _, _, met in found if not met)
                    missed[label, kind, version] = names
    assert missed == MISSED


def test_a_missed_goal_is_seen():
    """Goals that any row meets."""
    rows = triton_tables.tables()[TABLE["triton"]]
    each = dict(rows["sm_90 forward 128"])
    slow = each["ours full"] | {"slots_a_product": 9.0, "share_2_norm": 0.3}
    found = triton_tables.goals("sm_90 forward 128", "ours full", each | {"ours full": slow})
    assert [(what, met) for what, _, _, met in found] == [
        ("slots over plain", False), ("share", False),
    ]  # fmt: skip


def test_no_loop_of_ours_waits_for_each_wgmma():
    """What ptxas does to a kernel whose accumulators it cannot place: no count of instructions
    shows it.  Plain Triton's best tile of the forward at 64 is such a kernel."""
    waiting = {
        (label, kind)
        for rows in triton_tables.tables().values()
        for label, each in rows.items()
        for kind, row in each.items()
        if "each waited for" in triton_tables.cells_of(row)
    }
    assert waiting == {("sm_90 forward 64", "plain")}


def test_the_document_shows_the_tables():
    """A table that was written anew without the page that reasons with it."""
    page = (triton_code.ROOT / "docs" / "design" / "triton.md").read_text()
    assert triton_tables.markdown(triton_tables.tables()) in page
    assert triton_tables.others_markdown() in page


OTHERS = json.loads(triton_tables.OTHERS_TABLE.read_text())


def test_other_widths_and_types_are_compared_by_their_tiles():
    """A row of another tile than calls take now, or than the search's best; a row that is gone."""
    names = {" ".join(map(str, key)): tile for key, tile in triton_tables.OTHER_TILES.items()}
    assert OTHERS["rows"].keys() == names.keys()
    for label, each in OTHERS["rows"].items():
        architecture, name, head_dim, dtype = label.split()
        mine = triton_code.chosen(architecture, name, head_dim, dtype)
        assert each["ours"]["tile"] == list(mine), label
        assert each["plain"]["tile"] == list(names[label]), label
        assert not each["plain"]["counts"].get("spill"), "a tile that spills is not the best"


def behind(rows: dict) -> set[str]:
    """Loops whose share of the peak is more than a twentieth below that of plain Triton."""
    shares = {
        label: [each[whose]["share_2_norm"] for whose in ("ours", "plain")]
        for label, each in rows.items()
    }
    return {label for label, (mine, plain) in shares.items() if mine < 0.95 * plain}


def test_other_widths_and_types_are_as_fast_as_plain_triton():
    """A tile of 96 or 256 columns, or of float32, that is worse than one that the search found."""
    assert behind(OTHERS["rows"]) == set()
    label, each = next(iter(OTHERS["rows"].items()))
    slow = each | {"ours": each["ours"] | {"share_2_norm": 0.94 * each["plain"]["share_2_norm"]}}
    assert behind({label: slow}) == {label}


@pytest.mark.parametrize("label", ["sm_80 dkdv 256 bf16", "sm_90 dq 64 fp32"])
def test_loops_of_other_widths_and_types_are_those_of_the_table(label, tmp_path):
    """Instructions that a change puts into these loops alone."""
    if metadata.version("triton") != OTHERS["triton"]:
        pytest.skip(f"the table is of Triton {OTHERS['triton']}; counts differ by version")
    files = [PATH, PATH.with_name("plain_triton.py"), ROOT / "attn_ext" / "testing.py"]
    expected = OTHERS["rows"][label]
    tools = map(seen.code, [*files, *sorted(ROOT.glob("attn_ext/core/*.py"))])
    today = triton_seen.digest(__file__, *tools, expected)
    if seen.known(triton_seen.TABLE, f"hot loop, {label}", today, []):
        return
    folders = dict.fromkeys(("TRITON_CACHE_DIR", "ATTN_EXT_CACHE_DIR"), str(tmp_path))
    environment = {**os.environ, **folders}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, PATH, label.split()[0], "--others", label]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)[label]
    table = {"kernels": expected}
    assert triton_code.machine_code.differences(table, found) == []
    seen.passed(triton_seen.TABLE, f"hot loop, {label}", today)


def test_rows_of_another_triton_are_not_replaced(tmp_path, monkeypatch):
    """Some rows of another version in place of all that the table holds; a row that is not kept."""
    path, rows = tmp_path / "table.json", {"sm_90 dq 64": {"ours full": {"slots": 1}}}
    monkeypatch.setattr(triton_tables, "TABLE", path)
    triton_tables.put(rows)
    assert triton_tables.rows_of(path)["sm_90 dq 64"] == rows["sm_90 dq 64"]
    with pytest.raises(ValueError, match="no rows of sm_89 dq 64"):
        triton_tables.put({"sm_89 dq 64": {}})
    triton_tables.save(path, "3.0.0", rows)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"is of Triton 3\.0\.0"):
        triton_tables.put(rows)
    assert path.read_text() == before


def test_a_longer_loop_is_a_difference():
    """A comparison that passes whatever the compiler gives."""
    row = {"slots": 100, "counts": {"spill": 0, "ldmatrix": 10}}
    table = {"rows": {"a": {"ours full": row, "plain": row}}}
    assert triton_tables.differences(table, table["rows"]) == []
    longer = {"a": {"ours full": row | {"slots": 106}}}
    assert triton_tables.differences(table, longer) == [
        "a, ours full: 106 slots, the table says 100"
    ]
    spilled = {"a": {"ours full": row | {"counts": {"spill": 1, "ldmatrix": 10}}}}
    assert len(triton_tables.differences(table, spilled)) == 1


AMD = """
.LBB0_1:
\tv_add_f32 v0, v0, v1
\ts_cbranch_scc1 .LBB0_1
.LBB0_2:
\tds_read_b128 v[0:3], v4
\tds_read2st64_b64 v[0:3], v4
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[0:1], v[2:3], v[0:15]
\ts_nop 0
\tv_exp_f32_e32 v0, v1
\tv_mov_b32 v0, v1
\tscratch_load_dword v0, off
.LBB0_3:
\tv_mfma_f32_16x16x4_f32 v[0:3], v0, v1, v[0:3]
\ts_cbranch_scc0 .LBB0_3
\ts_cbranch_scc1 .LBB0_2
\t.vgpr_count: 129
\t.vgpr_spill_count: 2
"""


def test_the_loops_of_amd_are_counted_by_their_assembly():
    """The wrong loop, float32 products at the speed of bfloat16, bytes of LDS by lane instead of by
    wave, a spill that is no spill."""
    amdgcn = triton_code.amdgcn
    found = amdgcn.report(AMD)
    # 32 * 32 * 8 / 256 + 8 * 16 * 16 * 4 / 256
    assert found["tensor_cycles"] == 32 + 32
    assert found["slots"] == 9
    assert found["counts"] == {
        "lds": 2, "move": 1, "product": 2, "scalar": 2, "special": 1, "spill": 1
    }  # fmt: skip
    assert (found["registers"], found["spilled"], found["waves_a_simd"]) == (129, 2, 3)
    # 4 SIMDs, two loads of 64 lanes of 16 bytes, 128 bytes a cycle
    assert (found["bound"], found["share"]) == ("tensor", 1.0)
    assert found["share_2_norm"] == pytest.approx(64 / (64**2 + 64**2 + 20**2) ** 0.5, abs=1e-3)
    with pytest.raises(ValueError, match="no loop with matrix products"):
        amdgcn.report(AMD.replace("v_mfma", "v_dot"))


def test_the_loop_of_amd_can_be_printed():
    """A listing that looks for machine code of NVIDIA GPUs, or that lost the operands."""
    listing = triton_code.listing(SimpleNamespace(asm={"amdgcn": AMD}), "gfx942")
    assert listing[0].startswith("ds_read_b128 v[0:3]")
    assert listing[-1] == "s_cbranch_scc1 .LBB0_2"
    assert "v_exp_f32_e32 v0, v1" in listing


def test_tiles_are_given_by_the_table_or_by_number():
    """A comparison with another tile than the one that calls take: of float32, of heads of 96."""
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        expected = configs.shipped("sm_80", "dq", 128, size)[:4]
        assert triton_code.table_tile("sm_80", "dq", 96, dtype) == expected


def test_a_search_knows_what_float32_takes():
    """Candidates of float32 with the sums of bfloat16's tiles; heads of 96 with those of 96."""
    for name, head_dim in itertools.product(triton_code.PASSES, (64, 96, 128)):
        wide = set(triton_code.space(name, head_dim, False, "bf16"))
        small = set(triton_code.space(name, head_dim, False, "fp32"))
        assert wide and min(tile[3] for tile in wide) == 2
        if name != "fused":
            assert small and min(tile[3] for tile in small) == 1
    same = [set(triton_code.space("dkdv", head_dim, False, "bf16")) for head_dim in (96, 128)]
    assert same[0] == same[1]


def test_a_search_knows_how_wide_values_are():
    """Tiles of 192 columns with values of 128 that are left out as if values had 256, or whose
    products are counted as if they had."""
    assert triton_code.widths_of("192/128") == (256, 128)
    assert triton_code.widths_of(96) == triton_code.widths_of("96") == (128, 128)
    wide, narrow = (set(triton_code.space("forward", x, False, "bf16")) for x in (192, "192/128"))
    assert wide < narrow, "whose sums are narrower"
    # of three products two are over the columns of Q and K: 128 x 128 x (2 x 256 + 128) / 8 / 1024
    tile = (128, 128, 8, 2)
    cycles = [triton_code.tensor_cycles("dq", x, "sm_100", tile) for x in (128, "192/128", 256)]
    assert cycles == [768, 1280, 1536]
