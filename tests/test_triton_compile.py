"""The Triton kernels compile for every architecture, without a GPU, and take what the committed
table says: a tile that spills, does not fit shared memory or loses its tensor cores shows here.

`python tests/triton_offline.py --write` compiles every row of the configuration and writes the
table again; its diff is what a review reads.  Here a selection is compiled afresh.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from attn_ext.triton_kernels import configs

SCRIPT = Path(__file__).with_name("triton_offline.py")
TABLE = json.loads(SCRIPT.with_name("triton_resources.json").read_text())
PRODUCT = {
    "sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync", "gfx942": "v_mfma",
}  # fmt: skip
# What another version of Triton than the table's may take beyond it, before a tile must change
SLACK_REGISTERS, SLACK_SPILLED, SLACK_SHARED = 48, 64, 1.25
FULL = (64, "bf16")  # of which the table holds every case


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_kernels_compile_and_take_what_the_table_says(architecture, tmp_path):
    """A kernel that Triton refuses; more spills, registers or shared memory than before."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "ATTN_EXT_CACHE": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), architecture],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 19
    for name, row in found.items():
        expected = TABLE[architecture][name]
        registers, spilled, shared, instructions = row
        if metadata.version("triton") == TABLE["triton"]:
            assert row == expected, name
        assert registers <= expected[0] + SLACK_REGISTERS, (name, row, expected)
        assert spilled <= expected[1] + SLACK_SPILLED, (name, row, expected)
        assert shared <= expected[2] * SLACK_SHARED, (name, row, expected)
        assert shared <= configs.SHARED_LIMIT[architecture], (name, row)
        assert instructions.split()[:1] == expected[3].split()[:1], (name, row, expected)


def rows(architecture):
    """(kernel, width, dtype, case, resources) of the table."""
    for name, row in TABLE[architecture].items():
        kernel, width, dtype, case = name.split(" ", 3)
        yield kernel, int(width), dtype, case, row


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_the_table_has_no_spill(architecture):
    """A table written again with a tile that spills or does not fit, or without a case."""
    cases = {case for _, width, dtype, case, _ in rows(architecture) if (width, dtype) == FULL}
    assert cases >= {"causal", "varlen", "paged", "all", "cache all", "deterministic"}
    for kernel, width, dtype, case, (_, spilled, shared, _) in rows(architecture):
        name = f"{kernel} {width} {dtype} {case}"
        assert shared <= configs.SHARED_LIMIT[architecture], name
        assert spilled == 0, (name, spilled)


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_instructions_are_those_that_the_rows_claim(architecture):
    """Products that leave the tensor cores, loads that fall back from TMA."""
    for kernel, width, dtype, case, (*_, instructions) in rows(architecture):
        if kernel != "forward" or dtype == "fp32":
            continue
        assert instructions, (width, dtype, case)
        if case == "causal":
            tile = configs.shipped(architecture, "fwd", width, 2)
            assert PRODUCT[architecture] in instructions, (width, dtype)
            assert ("cp.async.bulk.tensor" in instructions) == (tile.loads > 0), (width, dtype)
            assert ("setmaxnreg" in instructions) == (tile.loads == 2), (width, dtype)


def test_tuned_tiles_are_stored_and_win(tmp_path, monkeypatch):
    """A measurement that is lost, or holds for another device or version; a damaged file."""
    monkeypatch.setenv("ATTN_EXT_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "_device_name", lambda: "GPU A")
    configs._tuned.cache_clear()
    try:
        before = configs.tile("sm_90", "fwd", 128, 2)
        assert before == configs.shipped("sm_90", "fwd", 128, 2)
        mine = configs.Tile(32, 64, 4, 1, 0)
        configs.store("GPU B", {"fwd/128/2": mine})
        assert configs.tile("sm_90", "fwd", 128, 2) == before
        configs.store("GPU A", {"fwd/128/2": mine})
        assert configs.tile("sm_90", "fwd", 128, 2) == mine
        with configs.using("fwd/128/2", before):
            assert configs.tile("sm_90", "fwd", 128, 2) == before
        content = json.loads(configs.cache_file().read_text())
        content[configs.identity("GPU A")] = {"fwd/128/2": [33, 64, 4, 1, 0]}
        for damaged in (json.dumps(content), "{", "[]"):
            configs.cache_file().write_text(damaged)
            configs._tuned.cache_clear()
            assert configs.tile("sm_90", "fwd", 128, 2) == before
    finally:
        configs._tuned.cache_clear()
