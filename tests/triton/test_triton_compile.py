"""The Triton kernels compile for every architecture, without a GPU, and take what the committed
tables say: a tile that spills, does not fit shared memory or loses its tensor cores shows here.

tests/triton/resources/ holds a row for each tile of the configuration; `make triton-table` compiles
all of them again and its difference is what a review reads.  Here the tables are held against the
configuration and the kernels, and a selection is compiled afresh: for the architectures for which
that was not yet seen with these sources (tests/helpers/seen.py), and for one more in turn; or with
ATTN_EXT_TRITON_ALL=1 every row.
"""

import itertools
import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import seen
import torch
import triton_offline as offline
import triton_seen

from attn_ext.testing import random_call
from attn_ext.triton_kernels import configs, tune
from attn_ext.triton_kernels.kernels import primitives
from attn_ext.triton_kernels.launch import attention

SCRIPT = offline.__file__

# "sm_90", and "sm_90-triton-3.6" for the oldest Triton
TABLES = {path.stem: json.loads(path.read_text()) for path in sorted(offline.TABLES.iterdir())}
PRODUCT = {
    "sm_80": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync", "gfx942": "v_mfma",
}  # fmt: skip
# What another version of Triton than the tables' may take beyond them, before a tile must change
SLACK_REGISTERS, SLACK_SHARED = 64, 1.5
SLACK_SPILLED = 32  # accesses in the hot loop, more than the table's
# (table, row): accesses to spilled registers in a hot loop that is the best even so: by the model
# .70 of the peak where the best tiles without have .67 and .61 (docs/design/triton.md)
SPILLS_IN_LOOPS = {
    ("sm_80", "dq 64 bf16 causal"): 6,
    ("sm_80", "dq 128 bf16 causal"): 6,
    ("sm_80", "forward 64 fp32 causal"): 2,  # .62, without .55
    ("sm_80", "forward 128 fp32 causal"): 3,  # .54, and dq .51; without .32
    ("sm_80", "dq 128 fp32 causal"): 3,
    # Tiles of sm_80, the best here too: .87 of the peak, where one without spills has .79; .89 for
    # .81, .90 for .80
    ("sm_89", "forward 128 bf16 causal"): 12,
    ("sm_89", "dkdv 64 bf16 causal"): 1,
    ("sm_89", "dq 128 bf16 causal"): 16,
    ("sm_120", "forward 64 bf16 causal"): 1,  # .87, without .83
    ("sm_120", "forward 128 bf16 causal"): 17,
    ("sm_120", "dkdv 64 bf16 causal"): 8,
    ("sm_120", "dkdv 128 bf16 causal"): 3,
    ("sm_120", "dq 128 bf16 causal"): 12,
}
# 256 columns, float32 and five products in one kernel: faster than the best tiles without, too
for _table, _spills in {
    "sm_80": {"forward 256 bf16": 6, "fused 64 bf16": 4, "fused 128 bf16": 5},
    "sm_89": {"fused 64 bf16": 6, "fused 128 bf16": 2},
    "sm_90": {
        "forward 256 bf16": 11,
        "dkdv 256 bf16": 113,
        "dq 192 bf16": 16,  # .67 of the peak, without .56
        "dkdv 128 fp32": 210,  # .45, where 16 rows have .22 without; .29
        "dq 128 fp32": 18,
        "fused 128 bf16": 39,
    },
    "sm_120": {"fused 64 bf16": 18, "fused 128 bf16": 16},
    "sm_90-triton-3.6": {
        "dkdv 256 bf16": 168,
        "forward 128 fp32": 14,
        "dkdv 128 fp32": 121,
        "dq 128 fp32": 12,
        "fused 128 bf16": 15,
    },
}.items():
    SPILLS_IN_LOOPS |= {(_table, f"{_row} causal"): most for _row, most in _spills.items()}
# Tiles of calls with features are those of plain calls, though most of them spill: they
# have 1.2 to 8 times the share of the peak of tiles that do not (docs/design/triton.md).  More
# spilled accesses among a loop's instructions than this are of a tile that does not fit.
MOST_SPILLED = 0.3
FEATURED = (*configs.RICH_FEATURES, "terms", "all", *(f"{case} wide" for case in offline.WIDE))
EVERYTHING = os.environ.get("ATTN_EXT_TRITON_ALL") == "1"


@pytest.mark.parametrize("architecture", configs.SHARED_LIMIT)
def test_kernels_compile_and_take_what_the_table_says(architecture, tmp_path):
    """A kernel that Triton refuses; more spills, registers or shared memory than before."""
    table, version = TABLES[offline.table_path(architecture).stem], metadata.version("triton")
    name, today = f"{architecture}, Triton {version}", triton_seen.digest(__file__, table)
    due = [name] if architecture in triton_seen.DUE else []
    if not EVERYTHING and seen.known(triton_seen.TABLE, name, today, due):
        return
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "ATTN_EXT_CACHE_DIR": str(tmp_path),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, SCRIPT, architecture, *(["--all"] if EVERYTHING else [])],
        capture_output=True, text=True, env=environment, timeout=7200 if EVERYTHING else 600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    same = version == table["triton"]
    assert (
        found.keys() == table["rows"].keys()
        if EVERYTHING and same
        else len(found) >= (12 if architecture == "sm_90" else 3)
    )
    for name, row in found.items():
        if name not in table["rows"]:  # everything, with a Triton that has no table
            continue
        expected = table["rows"][name]
        if same:
            assert row == expected, name
        tile, registers, _, shared, instructions, loop = row
        assert tile == expected[0], name
        assert registers <= expected[1] + SLACK_REGISTERS, (name, row, expected)
        known = expected[5][2] if expected[5] else 0
        assert loop[2:] <= [known + SLACK_SPILLED], (name, row, expected)
        assert shared <= expected[3] * SLACK_SHARED + 256, (name, row, expected)
        assert shared <= configs.SHARED_LIMIT[architecture], (name, row)
        assert instructions.split()[:1] == expected[4].split()[:1], (name, row, expected)
    seen.passed(triton_seen.TABLE, f"{architecture}, Triton {version}", today)


def test_there_is_a_table_for_each_architecture_and_the_oldest_triton():
    """A table that was not written, or is left of an architecture that is gone."""
    oldest = {offline.table_path(name, offline.OLDEST + ".0").stem for name in offline.OLDEST_FOR}
    assert TABLES.keys() == configs.SHARED_LIMIT.keys() | oldest
    assert len(oldest) == len(offline.OLDEST_FOR)


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_that_of_these_kernels(name):
    """Kernels that were changed after the table was written: run `make triton-table`."""
    assert TABLES[name]["kernels"] == offline.digest()


def test_rows_computed_again_are_an_extent_that_triton_takes():
    """Keys and values of different widths: a share of their sum that is no power of two, with which
    no backward kernel compiles.  The interpreter does not mind."""
    widths, blocks = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256)
    for block, width, width_v in itertools.product(blocks, widths, widths):
        for most in (4096 // (width + width_v), 8192 // (width + width_v), 8192 // width):
            rows = primitives.careful_rows_at_once(block, most)
            assert rows.bit_count() == 1 and rows <= block, (block, width, width_v)
            assert rows == block or rows == 8 or rows <= most < 2 * rows, (rows, most)


@pytest.mark.parametrize("table", TABLES)
def test_every_tile_of_the_configuration_is_in_the_table_and_spills_nothing(table, monkeypatch):
    """A tile that was changed or added without compiling it, that spills, or that does not fit."""
    rows, version = TABLES[table]["rows"], TABLES[table]["triton"]
    monkeypatch.setattr(configs, "_triton", lambda: tuple(map(int, version.split(".")[:2])))
    architecture = table.split("-")[0]
    compiled = {tuple([*name.split()[::2][:2], *row[0]]) for name, row in rows.items()}
    for direction, dtype, tile, name in offline.configuration(architecture):
        kernel = offline.DIRECTIONS[direction][0]
        expected = (kernel, dtype, *tile)
        if kernel == "decode":  # its tiles hold no more rows than there are
            assert any(row[:2] == expected[:2] and row[3:] == expected[3:] for row in compiled), (
                name
            )
        else:
            assert expected in compiled, name
    assert offline.shipped_rows(architecture).keys() <= rows.keys()
    for (direction, width, feature), tile in configs.with_features(architecture).items():
        name = f"{offline.DIRECTIONS[direction][0]} {width} bf16 {feature}"
        for each in (name, f"{name} wide") if feature in offline.WIDE else (name,):
            assert rows[each][0] == list(tile), each
    for (direction, width), tile in configs.SPECIALIZED.get(architecture, {}).items():
        assert direction == "fwd"
        assert rows[f"forward {width} bf16 specialized"][0] == list(tile)
        repair = configs.shipped(architecture, "fwd", width, 2, "", False)
        if width == 128:  # the narrower one needs less
            assert rows[f"repair {width} bf16 specialized"][0] == list(repair)
    for name, (tile, _, spilled, shared, _, loop) in rows.items():
        assert shared <= configs.SHARED_LIMIT[architecture], name
        # outside of the loops a spill costs nothing that counts; where no loop was read, none is
        in_loop = loop[2] if loop else spilled
        most = SPILLS_IN_LOOPS.get((table, name), 0)
        _, width, dtype, case = name.split(" ", 3)
        if case in FEATURED and int(width) >= 64 and dtype == "bf16" and loop:
            most = MOST_SPILLED * loop[1]
        assert in_loop <= most, (name, tile, loop)


@pytest.mark.parametrize("table", TABLES)
def test_instructions_are_those_that_the_rows_claim(table):
    """Products that leave the tensor cores, loads that fall back from TMA."""
    architecture = table.split("-")[0]
    for name, (tile, _, _, _, instructions, _) in TABLES[table]["rows"].items():
        kernel, width, dtype, case = name.split(" ", 3)
        if kernel in ("delta", "combine", "repair", "dq_from_sums"):
            continue
        assert instructions, name  # float32 too: three products of TF32, or FMA by matrix cores
        if kernel == "forward" and case in ("causal", "specialized") and dtype != "fp32":
            assert ("cp.async.bulk.tensor" in instructions) == (tile[4] > 0), name
            assert ("setmaxnreg" in instructions) == (tile[4] == 2), name
            if int(width) in (64, 128):
                assert PRODUCT[architecture] in instructions, name


def test_triton_3_6_gets_no_tcgen05(monkeypatch):
    """Tiles of 64 queries and more on sm_100, which Triton 3.6 fails to compile."""
    monkeypatch.setattr(configs, "_triton", lambda: (3, 6))
    assert not configs.with_features("sm_100") and not configs.with_features("sm_103")
    for direction, width, rich in itertools.product(("fwd", "dq"), configs.WIDTHS, ("", "all")):
        assert configs.shipped("sm_100", direction, width, 2, rich).block_m <= 32
        assert configs.shipped("sm_100", direction, width, 2, rich).loads == 0
    assert configs.shipped("sm_90", "fwd", 64, 2).block_m == 128
    before = {32: (32, 32, 8, 1, 0), 64: (32, 64, 8, 2, 0), 128: (64, 32, 8, 1, 0)}
    for width, tile in before.items():
        assert configs.shipped("sm_100", "dkdv", width, 2) == tile


NARROW = {"head_dim": 192, "head_dim_v": 128, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "width"),
    [
        (NARROW, 192),
        (NARROW | {"head_dim": 256, "head_dim_v": 64}, 192),
        (NARROW | {"head_dim_v": 192}, 256),
        (NARROW | {"head_dim": 128, "head_dim_v": 192}, 256),
        (NARROW | {"dtype": torch.float32}, 256),
        (NARROW | {"bias": True}, 256),
    ],
    ids=["narrow", "narrower", "equal", "wide values", "float32", "rich"],
)
def test_heads_with_narrow_values_have_tiles_of_their_own(options, width, monkeypatch):
    """The tile of 256 columns where values have 128, a larger one where they have not, and one of
    16 bits or of plain calls for those that hold more."""
    monkeypatch.setattr(attention, "architecture", lambda x: "sm_90")
    plan = attention.Plan(random_call(**options))
    assert plan.row("dq")[2] == width
    assert plan.row("decode")[2] == 256, "which has no such row"
    rows = {192: (128, 64, 8, 2, 0), 256: (128, 32, 8, 2, 0)}
    if options["dtype"] == torch.bfloat16 and not options.get("bias"):
        assert plan.tile("dq") == rows[width]


def test_gpus_of_one_kind_have_its_tiles():
    """An architecture without rows of its own that gets those of a lesser one, which spill nothing
    and have a fraction of the speed, or one that fails to compile."""
    cases = itertools.product(
        configs.DIRECTIONS, (64, 128, 256), ("", *configs.RICH_FEATURES, "terms", "all")
    )
    for direction, width, rich in cases:
        for like, name in (("sm_100", "sm_103"), ("sm_89", "sm_86"), ("sm_120", "sm_121")):
            expected = configs.shipped(like, direction, width, 2, rich)
            assert configs.shipped(name, direction, width, 2, rich) == expected, (name, direction)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_several_features_have_tiles_of_their_own(architecture):
    """Calls with two features or more on tiles of few rows that spill nothing: on sm_90 half of the
    speed by the model, on sm_100 a seventh."""
    own = {"fwd": 0, "dkdv": 1, "dq": 0}
    for (direction, side), width, rich in itertools.product(
        own.items(), (64, 128), ("terms", "all")
    ):
        assert configs.shipped(architecture, direction, width, 2, rich)[side] == 128


def test_names_of_features():
    """Calls that dropout orders by keys among those that it does not; a name for each row."""
    expected = {
        (): "", ("mask",): "mask", ("mask", "bias"): "terms", ("mask", "dropout"): "all",
        ("softcap", "alibi", "bias"): "terms", configs.RICH_FEATURES: "all",
    }  # fmt: skip
    assert {names: configs.several(names) for names in expected} == expected


def test_tune_measures_specialized_warps():
    """A candidate that is never measured, or is given to a GPU or dtype that cannot take it."""
    for (direction, width), tile in configs.SPECIALIZED["sm_90"].items():
        assert tile in tune.candidates(direction, width, "sm_90", 2)
        assert tile not in tune.candidates(direction, width, "sm_90", 4)
        assert tile not in tune.candidates(direction, width, "sm_80", 2)
        assert tile not in tune.candidates("dq", width, "sm_90", 2)


def test_tune_measures_few_tiles_near_the_best_of_the_search():
    """A search on the user's GPU that starts afresh; a candidate that no kernel can take."""
    assert ("sm_80", "dq", 256, 2) in configs.RANKED and ("sm_90", "dq", 64, 4) in configs.RANKED
    for architecture, direction, width, size in configs.RANKED:
        best = configs.shipped(architecture, direction, width, size)
        found = tune.candidates(direction, width, architecture, size)
        if direction == "fused":
            assert found.pop(0) == configs.PAIR, "dK and dV apart from dQ, which may be faster"
        assert 4 <= len(found) <= 9
        assert best not in found, "it is measured first anyway"
        for tile in found:
            assert configs._is_tile(configs.key(direction, width, size), list(tile))
            changed = sum(a != b for a, b in zip(tile, best, strict=True))
            assert changed == 1 or tile.loads == 2
    assert len(tune.candidates("fwd", 64, "gfx942", 2)) > 20, "of these nothing was ranked"
    assert tune.candidates("fwd", 64, "sm_90", 4) != tune.candidates("fwd", 64, "sm_90", 2)


def test_tuned_tiles_are_stored_and_win(tmp_path, monkeypatch):
    """A measurement that is lost, or holds for another device or version; a damaged file."""
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(tmp_path))
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
