"""The Triton kernels compile for every architecture, without a GPU, and take what the committed
tables say: a tile that spills, does not fit shared memory or loses its tensor cores shows here.

tests/triton_resources/ holds every row of the configuration; `make triton-table` compiles all of
them again and its difference is what a review reads.  Here a selection is compiled afresh, or with
ATTN_EXT_TRITON_ALL=1 everything, and the tables are held against the configuration and the kernels.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from attn_ext.triton_kernels import configs

SCRIPT = Path(__file__).with_name("triton_offline.py")
_spec = importlib.util.spec_from_file_location("triton_offline", SCRIPT)
offline = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(offline)

TABLES = {
    architecture: json.loads((offline.TABLES / f"{architecture}.json").read_text())
    for architecture in configs.SHARED_LIMIT
}
PRODUCT = {
    "sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync", "gfx942": "v_mfma",
}  # fmt: skip
# What another version of Triton than the tables' may take beyond them, before a tile must change
SLACK_REGISTERS, SLACK_SPILLED, SLACK_SHARED = 64, 64, 1.5
# Bytes a thread that float32 calls with every feature at once spill in backward, and nothing else
SPILLS = {"dkdv 128 fp32 all": 64, "dkdv 256 fp32 all": 200, "dq 256 fp32 all": 8,
          "decode 256 fp32 cache all": 8}  # fmt: skip
WHOLE = ("sm_80", "sm_90", "sm_100")  # whose tables hold every row; the others bfloat16, 64 and 128
EVERYTHING = os.environ.get("ATTN_EXT_TRITON_ALL") == "1"


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_kernels_compile_and_take_what_the_table_says(architecture, tmp_path):
    """A kernel that Triton refuses; more spills, registers or shared memory than before."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "ATTN_EXT_CACHE": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), architecture, *(["--all"] if EVERYTHING else [])],
        capture_output=True, text=True, env=environment, timeout=7200 if EVERYTHING else 600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    table = TABLES[architecture]
    assert len(found) >= (len(table["rows"]) if EVERYTHING else 12)
    for name, row in found.items():
        if EVERYTHING and name not in table["rows"]:
            assert row[2] <= SPILLS.get(name, SLACK_SPILLED), (name, row)
            continue
        expected = table["rows"][name]
        if metadata.version("triton") == table["triton"]:
            assert row == expected, name
        tile, registers, spilled, shared, instructions = row
        assert tile == expected[0], name
        assert registers <= expected[1] + SLACK_REGISTERS, (name, row, expected)
        assert spilled <= expected[2] + SLACK_SPILLED, (name, row, expected)
        assert shared <= expected[3] * SLACK_SHARED + 256, (name, row, expected)
        assert shared <= configs.SHARED_LIMIT[architecture], (name, row)
        assert instructions.split()[:1] == expected[4].split()[:1], (name, row, expected)


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_the_table_is_that_of_these_kernels(architecture):
    """Kernels that were changed after the table was written: run `make triton-table`."""
    assert TABLES[architecture]["kernels"] == offline.digest()


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_every_row_of_the_configuration_is_in_the_table_and_spills_nothing(architecture):
    """A tile that was changed or added without compiling it, that spills, or that does not fit."""
    rows = TABLES[architecture]["rows"]
    directions = {
        "fwd": ("forward", "causal", "all"), "dkdv": ("dkdv", "causal", "all"),
        "dq": ("dq", "causal", "all"), "dbias": ("dbias", None, "deterministic"),
        "decode": ("decode", "paged", "cache all"),
    }  # fmt: skip
    dtypes = ("bf16", "fp32") if architecture in WHOLE else ("bf16",)
    widths = configs.WIDTHS if architecture in WHOLE else (64, 128)
    for width, dtype, direction in itertools.product(widths, dtypes, directions):
        kernel, plain, rich = directions[direction]
        for case in filter(None, (plain, rich)):
            size = 4 if dtype == "fp32" else 2
            expected = configs.shipped(architecture, direction, width, size, case == rich)
            tile = rows[f"{kernel} {width} {dtype} {case}"][0]
            short = kernel == "decode"  # its tiles hold no more rows than there are
            assert tile[short:] == list(expected)[short:], (kernel, width, dtype, case)
    for name, (_, _, spilled, shared, _) in rows.items():
        assert shared <= configs.SHARED_LIMIT[architecture], name
        assert spilled <= SPILLS.get(name, 0), (name, spilled)


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_instructions_are_those_that_the_rows_claim(architecture):
    """Products that leave the tensor cores, loads that fall back from TMA."""
    for name, (tile, _, _, _, instructions) in TABLES[architecture]["rows"].items():
        kernel, width, dtype, case = name.split(" ", 3)
        if kernel in ("delta", "combine"):
            continue
        assert instructions, name  # float32 too: three products of TF32, or FMA by matrix cores
        if kernel == "forward" and case == "causal" and dtype != "fp32":
            assert ("cp.async.bulk.tensor" in instructions) == (tile[4] > 0), name
            assert ("setmaxnreg" in instructions) == (tile[4] == 2), name
            if int(width) in (64, 128):
                assert PRODUCT[architecture] in instructions, name


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
