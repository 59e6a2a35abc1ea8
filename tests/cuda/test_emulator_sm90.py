"""The wrappers of csrc/cuda/ptx_sm90.cuh on the emulated device, against layouts written out here
from the PTX manual; and the same program on a Hopper GPU, bit by bit.
"""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulator_build import FLAGS, compiler, emulator

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "csrc/emulation/tests"
OPS = re.findall(
    r"(\w+),\s+//",
    re.search(r"enum Op : int \{(.*?)\}", (TESTS / "hopper.cuh").read_text(), re.S)[1],
)
GOLDEN = OPS[: OPS.index("UNFENCED")]  # what golden_sm90.cu runs; then faults
MODES = ["plain", "random", "poison", "race", "all"]


@pytest.fixture(autouse=True)
def plain_mode():
    yield
    emulated.set_mode("plain")


def integers(n, seed):
    return (7919 * np.arange(n, dtype=np.int64) + seed) % 9 - 4


def half_bits(x, bf16):
    if bf16:
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(np.float16).view(np.uint16)


def expected_product(op):
    """[128 threads, 16 tiles, 4]: acc + A B of the fragments, which hold n + i before."""
    A = integers(64 * 64, 1).reshape(64, 64)
    B = integers(128 * 64, 2)
    product = A @ (B.reshape(64, 128) if op.endswith("MN") else B.reshape(128, 64).T)
    n, i = np.ogrid[:16, :4]
    return fragments(product, 16) + (n + i).astype(np.float32)


def fragments(product, tiles):
    """[128 threads, tiles, 4] of the columns of [64, N]; behind the last comes the first again."""
    thread, n, i = np.ogrid[:128, :tiles, :4]
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2)
    column = 8 * n + 2 * (thread % 4) + i % 2
    return product[row, column % product.shape[1]].astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("op", ["SS_K", "SS_MN", "RS_MN", "STORED", "READERS_FENCE"])
def test_wgmma(op, bf16, mode):
    """A wrong fragment, descriptor field, swizzle, slab or step; copies that land elsewhere; an
    alarm where those that read have the proxy fence."""
    emulated.set_mode(mode, seed=3)
    got = emulated.hopper(OPS.index(op), bf16)[: 128 * 64].view(np.float32).reshape(128, 16, 4)
    np.testing.assert_array_equal(got, expected_product(op))


@pytest.mark.parametrize("mode", ["race", "all"])
def test_wgmma_of_plain_stores_needs_a_fence(mode):
    """On hardware the tensor cores may read what was there before."""
    emulated.set_mode(mode, seed=3)
    with pytest.raises(RuntimeError, match=r"hopper.cuh:\d+.* stored: no fence_proxy_async"):
        emulated.hopper(OPS.index("UNFENCED"), True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("columns", [32, 64, 96, 192, 256])
def test_widths_of_wgmma(columns, bf16, mode):
    """Rows of B beyond the last column, accumulators of another shape."""
    emulated.set_mode(mode, seed=3)
    got = emulated.hopper(OPS.index(f"N{columns}"), bf16).view(np.float32)
    A, B = integers(64 * 64, 1).reshape(64, 64), integers(128 * 64, 2).reshape(128, 64)
    want = fragments(A @ B.T, columns // 8)
    np.testing.assert_array_equal(got[: want.size].reshape(want.shape), want)


@pytest.mark.parametrize("mode", MODES)
def test_words_that_change_hands_by_an_mbarrier(mode):
    """A barrier that does not count every thread, or orders nothing."""
    emulated.set_mode(mode, seed=3)
    got = emulated.hopper(OPS.index("PASSED"), True)[:128]
    np.testing.assert_array_equal(got, 5 * np.arange(128)[::-1] + 1)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_additions_in_turn(mode, ordered):
    """A block that adds before its turn, does not see what it has added, or has added twice; an
    alarm about the order that the blocks keep."""
    for seed in range(4):  # random: how many blocks are under way, and which goes on
        emulated.set_mode(mode, seed=seed)
        emulated.set_ordered(ordered)
        got = emulated.hopper(OPS.index("IN_TURN"), True)
        np.testing.assert_array_equal(got[:512].view(np.float32), np.ones(512, np.float32))
        turns = got[1024 : 1024 + 12].reshape(3, 4)
        np.testing.assert_array_equal(turns[:, 0], [0, 1, 2])
        sums = np.float32([[1e8, 1e8], [0, 0], [1, 1]])
        np.testing.assert_array_equal(turns[:, 1:3].copy().view(np.float32), sums)


OUT_OF_TURN = {
    "TURN_UNFENCED": "no fence_proxy_async_global",
    "TURN_UNWAITED": "no bulk_wait, store_release and load_acquire",
    "TURN_UNRELEASED": "no bulk_wait, store_release and load_acquire",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OUT_OF_TURN)
def test_additions_that_nothing_orders(op, mode):
    """On hardware the sums are those of another order, or a term is lost."""
    emulated.set_mode(mode, seed=3)
    emulated.set_ordered(True)
    with pytest.raises(RuntimeError, match=rf"hopper.cuh:\d+: adds .*: {OUT_OF_TURN[op]}"):
        emulated.hopper(OPS.index(op), True)


@pytest.mark.parametrize("mode", MODES)
def test_registers_change_hands(mode):
    """An alarm about what every Hopper kernel does; test_ptx_mutations.py has what is wrong."""
    emulated.set_mode(mode, seed=3)
    got = emulated.hopper(OPS.index("REGISTERS"), True)[:384]
    np.testing.assert_array_equal(got, np.arange(384) + 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["STRAIGHT", "TURNED"])
def test_stmatrix(op, mode):
    """Tiles stored as they are, or each turned over: rows and columns, tiles or halves of a word
    exchanged."""
    emulated.set_mode(mode, seed=3)
    words = emulated.hopper(OPS.index(op), True)[: 128 * 4].reshape(128, 4)[::-1]
    rows = np.ascontiguousarray(words).view(np.uint16).reshape(4, 4, 8, 8)  # warp, tile, row
    warp, tile, row, column = np.ogrid[:4, :4, :8, :8]
    if op == "TURNED":
        row, column = column, row
    lane = 4 * row + column // 2  # holds (row, column), (row, column + 1) of the tile
    np.testing.assert_array_equal(rows, (32 * warp + lane) * 8 + 2 * tile + column % 2)


@pytest.mark.parametrize("mode", MODES)
def test_a_box_is_stored_within_its_tensor(mode):
    """Another swizzle, a wrong corner, elements beyond the tensor that are written."""
    emulated.set_mode(mode, seed=3)
    words = emulated.hopper(OPS.index("BOX_STORED"), True)
    got = np.ascontiguousarray(words).view(np.uint16)[: 256 * 64].reshape(256, 64)
    want = np.zeros((256, 64), np.uint16)
    A = half_bits(integers(64 * 64, 1), True).reshape(64, 64)
    want[50 + 10 : 50 + 50, 16:56] = A[:40, :40]
    np.testing.assert_array_equal(got, want)


def test_a_box_is_read_at_one_time_and_there_at_another():
    """A box that is there as soon as it is read, or not behind the wait for it; one that is read
    again when it lands, by when its place in shared memory is another's."""
    at = {}
    for mode in MODES:
        for seed in range(24 if mode == "random" else 1):
            emulated.set_mode(mode, seed=seed)
            words = emulated.hopper(OPS.index("BOX_LANDS"), True)
            got = np.ascontiguousarray(words).view(np.uint16)[: 256 * 64].reshape(256, 64)
            A = half_bits(integers(64 * 64, 1), True).reshape(64, 64)
            np.testing.assert_array_equal(got[50 + 10 : 50 + 50, 16:56], A[:40, :40])
            before, after = words[-4:-2]
            assert after == np.ascontiguousarray(A[0, :2]).view(np.uint32)[0] != 0
            at.setdefault(mode, set()).add(before == after)
    assert at["plain"] == at["race"] == {True} and at["poison"] == at["all"] == {False}
    assert at["random"] == {False, True}


@pytest.mark.parametrize("mode", MODES)
def test_a_thread_that_stores_a_box_waits_for_its_reading(mode):
    """Shared memory that the next block has while the engine still reads it."""
    emulated.set_mode(mode, seed=3)
    with pytest.raises(RuntimeError, match=r"hopper.cuh:\d+.* still being read: no bulk_commit"):
        emulated.hopper(OPS.index("BOX_LEFT"), True)


@pytest.mark.parametrize("mode", MODES)
def test_bulk_add(mode):
    """Bytes beyond the size, a group lost, additions that replace."""
    emulated.set_mode(mode, seed=3)
    got = emulated.hopper(OPS.index("ADDED"), True).view(np.float32)[:520]
    want = np.arange(1, 521, dtype=np.float32)
    want[:256] *= 2
    want[512:] = 0
    np.testing.assert_array_equal(got, want)


FAULTS = {
    "ADD_UNFENCED": r"stored: no fence_proxy_async",
    "ADD_REUSED": r"overwrites what",
    "ADD_FENCED_LATE": r"stored: no fence_proxy_async",
    "COPY_FENCED_EARLY": r"stored: no fence_proxy_async",
    "READ_UNFENCED": r"overwrites by the copy engine what .* read: no fence_proxy_async",
    "STORE_UNFENCED": r"overwrites by the copy engine what .* stored: no fence_proxy_async",
}


@pytest.mark.parametrize("mode", ["race", "all"])
@pytest.mark.parametrize("op", FAULTS)
def test_accesses_of_two_proxies_need_a_fence_and_a_wait(op, mode):
    """On hardware the engine may read what was there before, or what comes after; and a load may
    come before what threads still read or store.  A fence counts only on the way between the two:
    one after the barrier, by a thread that does not read, or before a copy has landed does not."""
    for seed in range(4):  # a fence off the way is met or not by the order of the warps
        emulated.set_mode(mode, seed=seed)
        with pytest.raises(RuntimeError, match=rf"hopper.cuh:\d+.* {FAULTS[op]}"):
            emulated.hopper(OPS.index(op), True)


@pytest.mark.parametrize("mode", MODES)
def test_loads_over_what_threads_used(mode):
    """A load that is held back, or bytes of the threads that come after it."""
    emulated.set_mode(mode, seed=3)
    got = emulated.hopper(OPS.index("LOADED_AGAIN"), True)[: 64 * 32]
    chunks = np.ascontiguousarray(got).view(np.uint16).reshape(64, 8, 8)
    A = half_bits(integers(64 * 64, 1), True).reshape(64, 8, 8)
    row, chunk = np.ogrid[:64, :8]
    np.testing.assert_array_equal(chunks[row, chunk ^ (row % 8)], A)


@pytest.mark.parametrize("mode", MODES)
def test_box(mode):
    """Rows and columns beyond the tensor that are not zero, wrong strides, another swizzle."""
    emulated.set_mode(mode, seed=3)
    words = emulated.hopper(OPS.index("BOX"), False)[: 64 * 32]
    chunks = words.view(np.uint16).reshape(64, 8, 8)
    tensor = half_bits(integers(72 * 50 * 5 * 3, 1), False).reshape(3, 5, 50, 72)
    box = np.zeros((64, 64), np.uint16)
    box[:20, :32] = tensor[1, 2, 30:50, 40:72]
    for row in range(64):
        for chunk in range(8):
            np.testing.assert_array_equal(
                chunks[row, chunk ^ (row % 8)], box[row, 8 * chunk : 8 * chunk + 8]
            )


def test_votes():
    """Two lanes elected in a warp, a vote that some warp does not hear or that outlives its
    round."""
    for mode in MODES:
        emulated.set_mode(mode, seed=3)
        out = emulated.hopper(OPS.index("VOTES"), True)[: 128 * 4].reshape(128, 4)
        assert (out[:, 0].reshape(4, 32).sum(1) == 1).all()
        assert (out[:, 1] == 1).all() and (out[:, 2] == 0).all()


def nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = Path(home) / "bin" / "nvcc"
    return str(path) if path.exists() else None


def has_hopper():
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return "9.0" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run(binary, folder):
    subprocess.run([str(binary), str(folder / "out")], check=True)
    return np.fromfile(folder / "out", np.uint32).reshape(2, len(GOLDEN), -1)


@pytest.fixture(scope="module")
def expected():
    """What the emulator answers."""
    emulated.set_mode("plain")
    return np.stack([[emulated.hopper(op, b) for op in range(len(GOLDEN))] for b in (False, True)])


def test_program_agrees_with_the_module(expected, tmp_path, tmp_path_factory):
    """The program that a GPU runs, run as C++."""
    binary = tmp_path / "golden"
    objects = emulator(tmp_path_factory)
    compiler(*FLAGS, "-x", "c++", TESTS / "golden_sm90.cu", "-x", "none", *objects, "-o", binary)
    np.testing.assert_array_equal(run(binary, tmp_path), expected)


@pytest.fixture(scope="module")
def gpu_program(tmp_path_factory):
    if nvcc() is None:
        pytest.skip("nvcc is not installed")
    binary = tmp_path_factory.mktemp("golden") / "golden_sm90"
    command = [nvcc(), "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cudart", "static"]
    subprocess.run([*command, str(TESTS / "golden_sm90.cu"), "-o", str(binary)], check=True)
    return binary


def test_program_compiles_with_nvcc(gpu_program):
    """The test below must not turn out broken on the day a GPU is at hand."""
    assert gpu_program.stat().st_size > 0


@pytest.mark.skipif(not has_hopper(), reason="needs an NVIDIA GPU of compute capability 9.0")
def test_gpu_gives_the_emulators_bits(gpu_program, expected, tmp_path):
    found = run(gpu_program, tmp_path)
    names = [f"{t} {op}" for t in ("fp16", "bf16") for op in GOLDEN]
    same = (found == expected).reshape(2 * len(GOLDEN), -1).all(1)
    # any lane may be the elected one
    for t in range(2):
        votes = found[t, OPS.index("VOTES"), : 128 * 4].reshape(128, 4)
        assert (votes[:, 0].reshape(4, 32).sum(1) == 1).all()
        assert (votes[:, 1:3] == [1, 0]).all()
        same[t * len(GOLDEN) + OPS.index("VOTES")] = True
    assert [n for n, ok in zip(names, same, strict=True) if not ok] == []
