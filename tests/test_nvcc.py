"""Every CUDA kernel compiled by nvcc, without a GPU, against bench/results/cuda_resources.json.

The half of ptx.cuh that the emulator never runs is at least compiled for every architecture, and a
change that costs registers or spills shows here.  `python bench/cuda_resources.py --write` renews
the table.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_resources():
    spec = importlib.util.spec_from_file_location(
        "cuda_resources", ROOT / "bench" / "cuda_resources.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


resources = load_resources()
TABLE = json.loads(resources.TABLE.read_text())
NVCC = resources.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def test_table_holds_every_kernel_within_its_budget():
    """A table renewed after a change that spills, or that lost a kernel, does not pass."""
    for kernel, rows in TABLE["kernels"].items():
        for arch, row in rows.items():
            assert row["spill_bytes"] <= resources.spill_budget(kernel), (kernel, arch, row)
            assert 0 < row["registers"] <= 255
    halves = [f"{d}, {n}" for d in ("bf16", "fp16") for n in resources.HEAD_DIMS]
    floats = [f"f32, {n}" for n in resources.HEAD_DIMS]
    names = ("forward", "backward_dq", "backward_dkdv")
    expected = {f"{k}<{p}, {v}>" for k in names for p in halves for v in ("plain", "general")}
    expected |= {f"{k}<{p}, general>" for k in names for p in floats}
    expected |= {f"backward_bias<{p}>" for p in halves + floats}
    assert expected <= TABLE["kernels"].keys()
    for kernel, rows in TABLE["kernels"].items():
        assert set(rows) == {f"sm_{a}" for a in resources.ARCHS}, kernel


def test_shared_memory_fits_every_architecture():
    """More than 99 KiB a block would run on sm_80 and fail on sm_86, sm_89 and sm_120."""
    blocks = resources.blocks()
    assert blocks == TABLE["blocks"]
    assert max(block["shared_memory_bytes"] for block in blocks.values()) <= 99 * 1024


def test_the_occupancy_of_the_document_is_that_of_the_table():
    """docs/cuda.md tells the occupancy of kernels that are no more."""
    assert resources.occupancy(TABLE) in (ROOT / "docs" / "cuda.md").read_text()


def test_two_forward_blocks_for_head_dim_128_fit_sm_80():
    """256 bytes of shared memory too many halve what a multiprocessor of an A100 works on."""
    for dtype in ("bf16", "fp16"):
        assert resources.resident_warps(TABLE, f"forward<{dtype}, 128, plain>", "sm_80") == 8


def test_occupancy_by_hand():
    """Registers not rounded to what a warp is given, or the block's own shared memory forgotten."""
    rows = {"forward<bf16, 64, plain>": {"sm_80": {"registers": 129}}}
    block = {"shared_memory_bytes": 40 * 1024, "threads": 128}
    table = {"kernels": rows, "blocks": {"forward<bf16, 64>": block}}
    # 129 registers are 136: 65536 // (136 * 128) = 3 blocks; 164 // 41 = 4 blocks
    assert resources.resident_warps(table, "forward<bf16, 64, plain>", "sm_80") == 12
    block["shared_memory_bytes"] += 16 * 1024  # 164 // 57 = 2 blocks
    assert resources.resident_warps(table, "forward<bf16, 64, plain>", "sm_80") == 8


def test_log_parser_reads_names_spills_and_warnings():
    log = (
        "ptxas info    : Compiling entry function "
        "'_ZN4attn4cuda4sm807forwardINS_3ptx4bf16ELi64ELb1EEEvNS0_6ParamsE' for 'sm_80'\n"
        "    16 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function "
        "'_ZN4attn4cuda4sm8013backward_biasIfLi128EEEvNS0_6ParamsE' for 'sm_80'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 90 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function "
        "'_ZN4attn4cuda4sm8013backward_biasIfLi128EEEvNS0_6ParamsE' for 'sm_90a'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 91 registers, used 1 barriers\n"
    )
    assert resources.parse(log) == {
        "forward<bf16, 64, general>": {"sm_80": {"registers": 255, "spill_bytes": 40}},
        "backward_bias<f32, 128>": {
            "sm_80": {"registers": 90, "spill_bytes": 0},
            "sm_90a": {"registers": 91, "spill_bytes": 0},
        },
    }
    with pytest.raises(ValueError, match="ptxas warns"):
        resources.parse("ptxas info : (C7510) Potential Performance Loss: wgmma serialized")


@needs_nvcc
@pytest.mark.parametrize(("dtype", "head_dim"), resources.UNITS)
def test_kernels_compile_and_use_no_more_than_the_table_says(dtype, head_dim):
    found = resources.compile_unit(NVCC, dtype, head_dim)
    bad = resources.differences(TABLE, found)
    if resources.nvcc_version(NVCC) != TABLE["nvcc"]:
        # another compiler allocates otherwise: only the budget holds
        bad = [
            f"{kernel} {arch} spills {row['spill_bytes']} bytes"
            for kernel, rows in found.items()
            for arch, row in rows.items()
            if row["spill_bytes"] > resources.spill_budget(kernel)
        ]
    assert bad == []
