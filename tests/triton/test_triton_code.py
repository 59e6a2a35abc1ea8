"""The hot loops of the Triton kernels hold no more instructions than bench/results/triton_code.json
says, beside those of plain Triton; nothing runs on a GPU.
"""

import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("triton")
PATH = Path(__file__).parents[2] / "bench" / "triton_code.py"
SPEC = importlib.util.spec_from_file_location("triton_code", PATH)
triton_code = sys.modules.setdefault("triton_code", importlib.util.module_from_spec(SPEC))
SPEC.loader.exec_module(triton_code)
TABLE = json.loads(triton_code.TABLE.read_text())


def test_loops_have_no_more_instructions_than_the_table_says(tmp_path, monkeypatch):
    """An option, a check or address arithmetic that a change puts into the loop of plain calls; a
    tile that was changed without its row."""
    if metadata.version("triton") != TABLE["triton"]:
        pytest.skip(f"the table is of Triton {TABLE['triton']}; counts differ by version")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = triton_code.measure_all(only=("sm_90 dkdv 128", "sm_80 forward 64"))
    assert rows.keys() == {"sm_90 dkdv 128", "sm_80 forward 64"}
    assert triton_code.differences(TABLE, rows) == []
    for name, each in rows.items():
        for kind, found in each.items():
            assert found["tile"] == TABLE["rows"][name][kind]["tile"], (name, kind)


def test_the_table_holds_every_row():
    """A pass, a width or an architecture that nobody looks at."""
    names = {
        f"{architecture} {name} {head_dim}"
        for architecture in triton_code.TABLED
        for name in triton_code.PASSES
        for head_dim in triton_code.HEAD_DIMS
    }
    assert TABLE["rows"].keys() == names
    for label, each in TABLE["rows"].items():
        options = triton_code.OPTIONS if " forward " in label else ()
        assert each.keys() == {f"ours {case}" for case in (*triton_code.CASES, *options)} | {
            "plain"
        }


# Option of the forward -> at most so many times the plain kernel's instructions a product, at width
# 64 and 128 of sm_80, then of sm_90; docs/design/triton.md says what is left
MOST = {
    "varlen": ((1.05, 1.05), (1.05, 1.05)), "alibi": ((1.3, 1.3), (1.35, 1.3)),
    "softcap": ((1.45, 1.3), (1.6, 1.45)), "key mask": ((1.5, 1.5), (1.5, 1.5)),
    "mask": ((2.0, 1.6), (1.75, 1.55)), "bias": ((1.6, 1.5), (1.7, 1.5)),
    "dropout": ((1.9, 1.55), (2.25, 2.05)),
}  # fmt: skip


@pytest.mark.parametrize("option", triton_code.OPTIONS)
def test_an_option_costs_no_more_than_this(option):
    """A row that is written anew with a slower loop."""
    for architecture, limits in zip(triton_code.TABLED, MOST[option], strict=True):
        for head_dim, most in zip(triton_code.HEAD_DIMS, limits, strict=True):
            each = TABLE["rows"][f"{architecture} forward {head_dim}"]
            plain = each["plain"]["slots_a_product"]
            assert each[f"ours {option}"]["slots_a_product"] <= most * plain, (
                architecture,
                head_dim,
            )


def test_a_longer_loop_is_a_difference():
    """A comparison that passes whatever the compiler gives."""
    row = {"slots": 100, "counts": {"spill": 0, "ldmatrix": 10}}
    table = {"rows": {"a": {"ours full": row, "plain": row}}}
    assert triton_code.differences(table, table["rows"]) == []
    longer = {"a": {"ours full": row | {"slots": 106}}}
    assert triton_code.differences(table, longer) == ["a, ours full: 106 slots, the table says 100"]
    spilled = {"a": {"ours full": row | {"counts": {"spill": 1, "ldmatrix": 10}}}}
    assert len(triton_code.differences(table, spilled)) == 1
