"""One program, every wrapper: csrc/emulation/tests/golden.cu on the emulator and on a GPU.

Without a GPU the program is run as C++ (it must agree with the module) and compiled by nvcc; with
one, the hardware's bits are compared with the emulator's, which decides whether what the emulator
proves is true of the machine.
"""

import os
import re
import subprocess
from pathlib import Path

import closeness
import numpy as np
import pytest
from closeness import assert_arrays_close
from emulator_build import FLAGS, compiler, emulator

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "csrc/emulation/tests"
OPS = re.findall(
    r"\w+", re.search(r"enum Op : int \{(.*?)\}", (TESTS / "wrappers.cuh").read_text(), re.S)[1]
)
RECORD = np.dtype([("op", "<i4"), ("in", "<u4", (32, 16)), ("smem", "<u4", 512)])
APPROXIMATE = ("EXP2", "LOG2", "RCP", "TANH")  # within 2 units of the last place, not to the bit


def nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = Path(home) / "bin" / "nvcc"
    return str(path) if path.exists() else None


def has_gpu():
    return any(Path("/dev").glob("nvidia[0-9]*"))


def inputs(op, rng):
    """Words that the wrapper accepts, covering its ordinary values."""
    words = rng.integers(0, 2**32, (32, 16), dtype=np.uint32)
    small = rng.integers(-4, 5, (32, 16, 2))
    if op.startswith("MMA"):  # small integers: the sums are exact in any order
        floats = small[..., 0].astype(np.float32)
        half = floats.astype(np.float16).view(np.uint16).astype(np.uint32)
        bf16 = floats.view(np.uint32) >> 16
        words = {"MMA_BF16": bf16 | bf16 << 16, "MMA_FP16": half | half << 16}.get(op)
        words = floats.view(np.uint32).copy() if words is None else words
        words[:, 6:10] = floats.view(np.uint32)[:, 6:10]
    elif op.startswith("LDMATRIX"):
        words[:, 0] = rng.permutation(128)[:32] * 16
    elif op == "SHFL":
        words[:, 1] %= 32
    elif op.startswith("CP_ASYNC"):
        words[:, 12] %= 2
    elif op == "BALLOT":
        words[:, 0] %= 2
    elif op == "ATOMICS":
        words = small[..., 0].astype(np.float32).view(np.uint32)
    elif op in APPROXIMATE:
        words = rng.uniform(0.01, 20, (32, 16)).astype(np.float32).view(np.uint32)
    elif op.startswith(("PACK_", "UNPACK_", "TO_TF32")):
        words = (rng.standard_normal((32, 16)) * 3).astype(np.float32).view(np.uint32)
        words &= np.uint32(0xFFFFBFFF)  # the low half is no fp16 NaN or infinity either
    return words


@pytest.fixture(scope="module")
def records():
    """Four records a wrapper."""
    rng = np.random.default_rng(2024)
    out = np.zeros(4 * len(OPS), RECORD)
    for i in range(len(out)):
        out[i]["op"] = i % len(OPS)
        out[i]["in"] = inputs(OPS[i % len(OPS)], rng)
        out[i]["smem"] = rng.integers(0, 2**32, 512)
        if OPS[i % len(OPS)] == "ATOMICS":
            out[i]["smem"] = 0
    return out


@pytest.fixture(scope="module")
def expected(records):
    """What the emulator answers."""
    emulated.set_mode("plain")
    return np.stack([emulated.wrapper(int(r["op"]), r["in"], r["smem"]) for r in records])


def run(binary, records, folder):
    (folder / "in").write_bytes(records.tobytes())
    subprocess.run([str(binary), str(folder / "in"), str(folder / "out")], check=True)
    return np.fromfile(folder / "out", np.uint32).reshape(len(records), 32, 16)


def test_program_agrees_with_the_module(records, expected, tmp_path, tmp_path_factory):
    """The program that a GPU runs, run as C++: it must read and write what the module does."""
    binary = tmp_path / "golden"
    objects = emulator(tmp_path_factory)
    compiler(*FLAGS, "-x", "c++", TESTS / "golden.cu", "-x", "none", *objects, "-o", binary)
    np.testing.assert_array_equal(run(binary, records, tmp_path), expected)
    answered = [op for i, op in enumerate(OPS) if expected[i :: len(OPS)].any()]
    assert answered == OPS  # every wrapper writes something


@pytest.fixture(scope="module")
def gpu_program(tmp_path_factory):
    if nvcc() is None:
        pytest.skip("nvcc is not installed")
    binary = tmp_path_factory.mktemp("golden") / "golden"
    arch = "native" if has_gpu() else "sm_80"
    command = [nvcc(), "-std=c++17", f"-arch={arch}", "-cudart", "static", str(TESTS / "golden.cu")]
    subprocess.run([*command, "-o", str(binary)], check=True)
    return binary


def test_program_compiles_with_nvcc(gpu_program):
    """The test below must not turn out broken on the day a GPU is at hand."""
    assert gpu_program.stat().st_size > 0


@pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU")
def test_gpu_gives_the_emulators_bits(gpu_program, records, expected, tmp_path):
    found = run(gpu_program, records, tmp_path)
    for i, record in enumerate(records):
        op = OPS[record["op"]]
        if op in APPROXIMATE:
            got, want = found[i, :, 0].view(np.float32), expected[i, :, 0].view(np.float32)
            assert_arrays_close(got, want, closeness.APPROXIMATE, op)
        else:
            np.testing.assert_array_equal(found[i], expected[i], err_msg=op)
