"""The emulated CUDA device: each wrapper of csrc/cuda/ptx.cuh against numpy, each planted fault.

The fragment layouts are written out here from the PTX manual, element by element, apart from the
emulator's loops.  On a GPU `wrapper` must give the same bits but for mma sums and approximations.
It is a long file because each wrapper has its own formula, and all of them one program.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import seen
from closeness import TWO_LAST_PLACES, TWO_LAST_PLACES_NEAR_0, assert_arrays_close
from emulator_build import FLAGS, SOURCES, compiler, compiler_version
from repository import ROOT
from words import f32, from_bf16, to_bf16, words_of

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

TESTS = ROOT / "csrc/emulation/tests"


def enum(path, name):
    """The names of a C++ enum, in order: what the kernels' op numbers mean."""
    body = re.search(rf"enum {name} : int \{{(.*?)\}}", path.read_text(), re.S).group(1)
    return re.findall(r"\w+", body)


OPS, FAULTS = enum(TESTS / "wrappers.cuh", "Op"), enum(TESTS / "faults.cuh", "Fault")
MODES = ["plain", "random", "poison", "race", "all"]
LANES = np.arange(32)


@pytest.fixture(autouse=True)
def plain_mode():
    emulated.set_mode("plain")
    emulated.reset_counters()
    yield
    emulated.set_mode("plain")


def wrapper(op, columns=(), smem=None):
    """Runs one wrapper in a warp: columns[i] is word i of each lane; the [32, 16] words out."""
    words = np.zeros((32, 16), np.uint32)
    for i, column in enumerate(columns):
        column = np.asarray(column)
        words[:, i] = column.view(np.uint32) if column.dtype.itemsize == 4 else column
    image = np.zeros(512, np.uint32) if smem is None else np.ascontiguousarray(smem).view(np.uint32)
    return emulated.wrapper(OPS.index(op), words, image)


# ---- matrices -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["BF16", "FP16"])
def test_mma_m16n8k16_fragments(dtype):
    """Catches any wrong row, column or half of the A, B and accumulator fragments."""
    rng = np.random.default_rng(1)
    # small integers: every product and sum is exact, so that the comparison is of bits
    A, B = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    C = rng.integers(-100, 101, (16, 8)).astype(np.float32)
    if dtype == "BF16":
        a, b = to_bf16(A), to_bf16(B)
    else:
        a, b = A.astype(np.float16).view(np.uint16), B.astype(np.float16).view(np.uint16)
    g, c = LANES // 4, 2 * (LANES % 4)
    columns = []
    for row, col in [(g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8)]:
        columns.append(words_of(a[row, col], a[row, col + 1]))
    for k in (c, c + 8):
        columns.append(words_of(b[k, g], b[k + 1, g]))
    for row, col in [(g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)]:
        columns.append(C[row, col])
    out = f32(wrapper(f"MMA_{dtype}", columns))
    expected = C + (A @ B)
    for i, (row, col) in enumerate([(g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)]):
        np.testing.assert_array_equal(out[:, i], expected[row, col])


def test_mma_tf32_fragments_and_truncation():
    """Catches a wrong tf32 fragment, and operands whose low 13 bits are not ignored."""
    rng = np.random.default_rng(2)
    A, B = rng.integers(-8, 9, (16, 8)), rng.integers(-8, 9, (8, 8))
    C = rng.integers(-100, 101, (16, 8)).astype(np.float32)
    noise = np.uint32(0x1FFF)
    a = A.astype(np.float32).view(np.uint32) | noise
    b = B.astype(np.float32).view(np.uint32) | noise
    g, c = LANES // 4, LANES % 4
    columns = [a[r, k] for r, k in [(g, c), (g + 8, c), (g, c + 4), (g + 8, c + 4)]]
    columns += [b[c, g], b[c + 4, g]]
    places = [(g, 2 * c), (g, 2 * c + 1), (g + 8, 2 * c), (g + 8, 2 * c + 1)]
    columns += [C[r, n] for r, n in places]
    out = f32(wrapper("MMA_TF32", columns))
    for i, (r, n) in enumerate(places):
        np.testing.assert_array_equal(out[:, i], (C + A @ B)[r, n])


@pytest.mark.parametrize("tiles", [2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(tiles, trans):
    """Catches a wrong tile, row, half or transposition, with rows at scattered addresses."""
    rng = np.random.default_rng(3)
    smem = rng.integers(0, 2**16, 1024, dtype=np.uint16)
    row_of = rng.permutation(128)[:32]  # 16-byte chunk that each lane points at
    op = f"LDMATRIX_X{tiles}" + ("_TRANS" if trans else "")
    out = wrapper(op, [row_of * 16], smem)
    for tile in range(tiles):
        matrix = np.stack([smem[row_of[tile * 8 + r] * 8 :][:8] for r in range(8)])
        matrix = matrix.T if trans else matrix
        row, col = LANES // 4, 2 * (LANES % 4)
        np.testing.assert_array_equal(
            out[:, tile], words_of(matrix[row, col], matrix[row, col + 1])
        )


def test_ldmatrix_row_must_be_aligned_and_inside():
    with pytest.raises(RuntimeError, match=r"wrappers.cuh:\d+.*row address 0x408"):
        wrapper("LDMATRIX_X4", [LANES * 8])
    with pytest.raises(RuntimeError, match="ldmatrix: row address"):
        wrapper("LDMATRIX_X4", [LANES * 16 + 2048])


# ---- warp ---------------------------------------------------------------------------------------
def test_shuffles():
    """Catches a shuffle that takes from the wrong lane or mixes up its overloads."""
    rng = np.random.default_rng(4)
    a, b, c = rng.integers(0, 2**32, (3, 32), dtype=np.uint32)
    out = wrapper("SHFL_XOR", [a, b, c])
    for i, (v, mask) in enumerate([(a, 5), (b, 16), (c, 1)]):
        np.testing.assert_array_equal(out[:, i], v[LANES ^ mask])
    source = rng.integers(0, 32, 32, dtype=np.uint32)
    out = wrapper("SHFL", [a, source])
    np.testing.assert_array_equal(out[:, 0], a[source])
    np.testing.assert_array_equal(out[:, 1], np.full(32, a[0]))
    np.testing.assert_array_equal(out[:, 2], a[::-1])


def test_ballot():
    flags = np.random.default_rng(5).integers(0, 2, 32, dtype=np.uint32)
    expected = int((flags.astype(np.uint64) << LANES.astype(np.uint64)).sum())
    assert (wrapper("BALLOT", [flags])[:, 0] == expected).all()


def test_ids():
    out = wrapper("IDS")
    np.testing.assert_array_equal(out[:, 0], LANES)
    assert (out[:, 1:5] == [32, 0, 0, 1]).all()


# ---- numbers ------------------------------------------------------------------------------------
def special_floats():
    """Floats at which rounding goes wrong: ties, overflow, subnormals, infinities, signed zeros."""
    near_max = np.array([65503.9, 65504, 65519.9, 65520, 65536, 3.4e38, np.inf], np.float32)
    tiny = np.array([0, 1e-45, 1e-38, 2.98e-8, 2.99e-8, 5.96e-8, 6.1e-5, 6.09e-5], np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-24], np.float32)
    x = np.concatenate([near_max, tiny, ties])
    x = np.concatenate([x, -x])
    bits = np.random.default_rng(6).integers(0, 2**32, 32 * 63 - len(x), dtype=np.uint32)
    x = np.concatenate([x, bits.view(np.float32)])
    return np.concatenate([x[~np.isnan(x)], np.zeros(np.isnan(x).sum(), np.float32)])


def test_pack_rounds_to_nearest_even():
    """Catches swapped halves, truncation instead of rounding, and wrong fp16 subnormals."""
    x = special_floats()
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).view(np.uint16)
    for op, expected in [("PACK_BF16", to_bf16(x)), ("PACK_FP16", half)]:
        for at in range(0, len(x) - 32, 32):
            out = wrapper(op, [x[at : at + 32], x[at + 1 : at + 33]])
            assert (out[:, 0] == words_of(expected[at : at + 32], expected[at + 1 : at + 33])).all()
            np.testing.assert_array_equal(out[:, 1], expected[at : at + 32])


@pytest.mark.parametrize("op", ["PACK_BF16", "PACK_FP16", "PACK_RELU_BF16", "PACK_RELU_FP16"])
def test_pack_nan_is_canonical(op):
    nan = np.array([0x7F800001, 0xFFC00000] * 16, np.uint32)
    assert (wrapper(op, [nan, nan])[:, 0] == 0x7FFF7FFF).all()


@pytest.mark.parametrize("kind", ["BF16", "FP16"])
def test_pack_relu_is_pack_of_what_is_not_below_0(kind):
    """A negative number or -infinity that is kept, in one half or the other."""
    x = special_floats()[:64]
    x, y = np.concatenate([x[:32], x[32:]]), np.concatenate([x[16:], x[:16]])
    for at in (0, 32):
        pair = [x[at : at + 32], y[at : at + 32]]
        positive = [np.where(each > 0, each, np.float32(0)) for each in pair]
        got = wrapper(f"PACK_RELU_{kind}", pair)[:, 0]
        np.testing.assert_array_equal(got, wrapper(f"PACK_{kind}", positive)[:, 0])
        assert (got != wrapper(f"PACK_{kind}", pair)[:, 0]).any()


def test_unpack_is_exact_for_every_fp16_and_bf16():
    """All 65536 patterns of both halves."""
    for at in range(0, 65536, 32):
        bits = np.arange(at, at + 32, dtype=np.uint32)
        word = words_of(bits, 65535 - bits)
        low, high = (word & 0xFFFF).astype(np.uint16), (word >> 16).astype(np.uint16)
        out = f32(wrapper("UNPACK_BF16", [word]))
        np.testing.assert_array_equal(out[:, 0], from_bf16(low))
        np.testing.assert_array_equal(out[:, 1], from_bf16(high))
        out = f32(wrapper("UNPACK_FP16", [word]))
        np.testing.assert_array_equal(out[:, 0], low.view(np.float16).astype(np.float32))
        np.testing.assert_array_equal(out[:, 1], high.view(np.float16).astype(np.float32))


def test_to_tf32_rounds_ties_away():
    x = special_floats()[:32].copy()
    x[~np.isfinite(x)] = 1.5
    x[np.abs(x) > 1e38] = 1.0
    x[0] = np.array(0x3F801000, np.uint32).view(np.float32)  # a tie: goes up
    expected = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    np.testing.assert_array_equal(wrapper("TO_TF32", [x])[:, 0], expected)


@pytest.mark.parametrize(
    ("op", "function"),
    [("EXP2", np.exp2), ("LOG2", np.log2), ("RCP", np.reciprocal), ("TANH", np.tanh)],
)
def test_functions(op, function):
    """Within 2 units of the last place of float64, and exact at the ends that softmax meets."""
    x = np.random.default_rng(7).uniform(-20, 20, 32).astype(np.float32)
    x = np.abs(x) if op == "LOG2" else x
    expected = function(x.astype(np.float64))
    out = f32(wrapper(op, [x]))[:, 0]
    tolerance = TWO_LAST_PLACES_NEAR_0 if op == "LOG2" else TWO_LAST_PLACES
    assert_arrays_close(out, expected, tolerance)
    ends = {
        "EXP2": {-np.inf: 0, 0: 1, -150: 0, -127: 0, np.inf: np.inf},
        "TANH": {100: 1, -100: -1},
    }
    ends |= {"LOG2": {0: -np.inf, 1: 0, 1e-40: -np.inf}, "RCP": {np.inf: 0, 1e-40: np.inf}}
    for value, want in ends[op].items():
        assert f32(wrapper(op, [np.full(32, value, np.float32)]))[0, 0] == want


def test_integers():
    """A carry lost or added twice, halves of the other word, the word beside."""
    ends = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    a, low = np.tile(ends, 8), np.repeat(ends, 8)
    high = np.arange(32, dtype=np.uint32) - np.uint32(1)
    words = list(np.random.default_rng(9).integers(0, 2**32, (9, 32), dtype=np.uint32))
    out = wrapper("INTEGERS", [a, low, high, *words])
    carry = (a.astype(np.uint64) + low.astype(np.uint64)) >> np.uint64(32)
    np.testing.assert_array_equal(out[:, 0], high + carry.astype(np.uint32))
    np.testing.assert_array_equal(out[:, 1], (a & 0xFFFF) | (low & 0xFFFF0000))
    read = [words[at] for at in (4, 1, 2, 5, 6, 7, 8)]
    np.testing.assert_array_equal(out[:, 2:9].T, read)


# ---- shared memory ------------------------------------------------------------------------------
def test_lds_reads_every_width():
    smem = np.random.default_rng(8).integers(0, 2**32, 512, dtype=np.uint32)
    out, rows = wrapper("LDS", smem=smem), smem.reshape(32, 16)
    np.testing.assert_array_equal(out[:, :8], rows[:, :8])
    np.testing.assert_array_equal(out[:, 8], rows[:, 8] >> 16)
    np.testing.assert_array_equal(out[:, 9], rows[:, 9] >> 24)


def test_sts_writes_every_width_and_nothing_else():
    rng = np.random.default_rng(9)
    smem = rng.integers(0, 2**32, 512, dtype=np.uint32)
    columns = rng.integers(0, 2**32, (10, 32), dtype=np.uint32)
    out, rows = wrapper("STS", columns, smem), smem.reshape(32, 16).copy()
    rows[:, :8] = columns[:8].T
    rows[:, 8] = (rows[:, 8] & 0xFFFF) | (columns[8] << 16)
    rows[:, 9] = (rows[:, 9] & 0xFFFFFF) | (columns[9] << 24)
    np.testing.assert_array_equal(out[:, :12], rows[::-1, :12])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["CP_ASYNC_16", "CP_ASYNC_4"])
def test_cp_async_copies_or_zero_fills(op, mode):
    """Catches a copy that never lands, lands elsewhere, or reads where it should fill zeros."""
    emulated.set_mode(mode, seed=11)
    columns = np.random.default_rng(10).integers(1, 2**32, (12, 32), dtype=np.uint32)
    smem = np.full(512, 77, np.uint32)
    valid = LANES % 3 != 0
    out = wrapper(op, [*columns, valid.astype(np.uint32)], smem)
    expected = np.where(valid[:, None], columns.T, 0)
    np.testing.assert_array_equal(out[:, :12], expected[::-1])


def test_atomics_add():
    x = np.arange(32, dtype=np.float32)
    emulated.set_mode("all", seed=1)
    assert f32(wrapper("ATOMICS", [x]))[5, 0] == x.sum()


def test_global_memory_and_named_barriers():
    """Words in another order, a sum that loses a lane, a barrier that orders nothing."""
    emulated.set_mode("all", seed=1)
    x = np.random.default_rng(13).integers(0, 2**32, (9, 32), dtype=np.uint32)
    out, low = wrapper("GLOBAL", x), x[8] & 0xFF
    np.testing.assert_array_equal(out[:, [0, 1, 4, 5, 6, 7]], x[[1, 0, 7, 6, 5, 4]].T)
    assert out[0, 14] == low.sum() == f32(out)[0, 15]
    words = wrapper("BARRIERS", x[:1])[:, :2]
    np.testing.assert_array_equal(words, np.stack([x[0], x[0] + 1], 1)[::-1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bf16", [False, True])
def test_example_kernel(bf16, mode):
    """cp.async double buffering, swizzle, ldmatrix and mma together, with ragged edges."""
    emulated.set_mode(mode, seed=5)
    rng = np.random.default_rng(12)
    A = rng.integers(-4, 5, (100, 96)).astype(np.float32)
    B = rng.integers(-4, 5, (50, 96)).astype(np.float32)
    bits = to_bf16 if bf16 else (lambda x: x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(emulated.gemm(bf16, bits(A), bits(B)), A @ B.T)


def test_bank_conflicts_are_counted():
    """The example's swizzle is free of conflicts; rows 64 bytes apart without it would not be."""
    emulated.set_mode("plain", banks=True)
    emulated.gemm(True, np.zeros((64, 32), np.uint16), np.zeros((32, 32), np.uint16))
    counts = emulated.bank_conflicts()
    assert len(counts) == 3  # one cp_async_16 and two ldmatrix lines
    assert all(phases > 0 and ideal == waves for phases, ideal, waves in counts.values())
    emulated.reset_counters()
    emulated.set_mode("plain")  # counts ldmatrix only
    wrapper("LDMATRIX_X4", [LANES * 64])  # rows 64 bytes apart: 8 rows meet 2 groups of banks
    assert list(emulated.bank_conflicts().values()) == [(4, 4, 16)]


# ---- faults -------------------------------------------------------------------------------------
def fault(name, mode, seed=0):
    emulated.set_mode(mode, seed=seed)
    return emulated.fault(FAULTS.index(name))


@pytest.mark.parametrize("mode", MODES)
def test_correct_kernels_raise_nothing(mode):
    """A false report would make the race detector useless."""
    expected = fault("CORRECT", "plain")
    for seed in range(20 if mode in ("random", "all") else 1):
        np.testing.assert_array_equal(fault("CORRECT", mode, seed), expected)
        fault("WARP_RETURNED", mode, seed)
        np.testing.assert_array_equal(fault("NAMED_BARRIER", mode, seed)[32:], np.arange(32))


EVERY_MODE = {
    "OUT_OF_BOUNDS": r"faults.cuh:\d+: shared address 0x1400 \(4 bytes\) is outside",
    "MISALIGNED": r"faults.cuh:\d+: shared address 0x404 is not a multiple of 8",
    "DIVERGENT": r"divergent warp: this lane calls \w+, .* wait in \w+ at csrc.*faults.cuh:\d+",
    "BARRIER_SKIPPED": r"deadlock(.|\n)*warp 0: waits at .*32 of 64 threads(.|\n)*1: has returned",
    "LANES_RETURNED": r"deadlock(.|\n)*31 lanes wait in sync_warp at .*, 1 have returned",
    "STACK": r"more than 256 KiB of stack",
    "WILD_POINTER": r"global memory access at 0x\w+ is not mapped",
    "DIVISION": r"integer division by zero",
    "IN_FLIGHT_AT_END": r"faults.cuh:\d+: a thread returns while what it copies here is in flight",
    "BARRIER_COUNT": r"32 of 64 threads have arrived|32 threads here, 64 where others",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERY_MODE)
def test_fault_is_reported_in_every_mode(name, mode):
    with pytest.raises(RuntimeError, match=EVERY_MODE[name]):
        fault(name, mode)
    fault("CORRECT", mode)  # the device goes on after an error


RACES = {
    "NO_WAIT": "is still copying: no wait",
    "NO_WAIT_OTHER_LANE": "is still copying: no wait",
    "UNCOMMITTED": "is still copying: no wait",
    "NO_BARRIER_RAW": "no barrier between them|nothing has written",
    "NO_BARRIER_WAR": "no barrier between them",
    "COPY_INTO_LIVE": "no barrier between them",
    "NO_SYNC_WARP": "no sync_warp between them",
    "NEVER_WRITTEN": "nothing has written",
}


@pytest.mark.parametrize("mode", ["race", "random+race", "all"])
@pytest.mark.parametrize("name", RACES)
def test_race_detector_names_both_lines(name, mode):
    """Whatever the schedule: the verdict must not depend on who happened to run first."""
    for seed in range(1 if mode == "race" else 10):
        with pytest.raises(RuntimeError, match=RACES[name]) as info:
            fault(name, mode, seed)
        assert len(re.findall(r"faults\.cuh:\d+", str(info.value))) >= 2


@pytest.mark.parametrize(
    "name", ["NO_WAIT", "NO_WAIT_OTHER_LANE", "NO_BARRIER_RAW", "NEVER_WRITTEN", "UNCOMMITTED"]
)
def test_poison_changes_the_result(name):
    assert not np.array_equal(fault(name, "poison"), fault("CORRECT", "plain"))


@pytest.mark.parametrize("name", ["NO_BARRIER_RAW", "NO_BARRIER_WAR"])
def test_random_schedules_change_the_result(name):
    """At least half of 20 seeds must show the race; a weak generator once hid one."""
    expected = fault("CORRECT", "plain")
    seen = sum(not np.array_equal(fault(name, "random", s), expected) for s in range(20))
    assert seen >= 10


def test_launch_configuration_is_checked():
    launch = emulated.empty_launch
    launch(3, 2, 2, 1024, 0)
    for arguments, message in [
        ((0, 1, 1, 32, 0), "at least 1"),
        ((1, 65536, 1, 32, 0), "at most 65535"),
        ((1, 1, 1, 33, 0), "multiple of 32"),
        ((1, 1, 1, 2048, 0), "at most 1024"),
        ((1, 1, 1, 32, 163 * 1024 + 1), "at most 166912 bytes"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            launch(*arguments)
    with pytest.raises(ValueError, match="mode must be"):
        emulated.set_mode("fast")


def test_launch_from_threads_and_after_errors_in_them():
    """Two Python threads may launch: one at a time, each with its own result."""
    from concurrent.futures import ThreadPoolExecutor

    expected = fault("CORRECT", "plain")
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: emulated.fault(0), range(16)):
            np.testing.assert_array_equal(out, expected)


# ---- sources ------------------------------------------------------------------------------------
FORBIDDEN = (
    r"\basm\b|__asm|__shared__|__cvta|threadIdx|blockIdx|blockDim|gridDim|__sync|__shfl|__ldg|"
    r"__global__|__device__|__launch_bounds__|atomicAdd|#\s*include\s*<(cuda|mma|cooperative)"
)


def forbidden_words(text):
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    return re.findall(FORBIDDEN, text)


def test_kernels_use_only_the_wrappers():
    """asm, __shared__ or threadIdx in a kernel would escape the emulator's checks."""
    assert forbidden_words("x = 1; // asm is fine here") == []
    assert forbidden_words('asm volatile("");') and forbidden_words("__shared__ float x[3];")
    wrappers = ("ptx.cuh", "ptx_sm90.cuh", "device_launch.cuh")
    found = [*(ROOT / "csrc/cuda").rglob("*.cu*"), *(ROOT / "csrc/emulation/tests").glob("*.cuh")]
    kernels = [path for path in found if path.name not in wrappers]
    assert len(kernels) > 10
    assert {str(p): forbidden_words(p.read_text()) for p in kernels} == {
        str(p): [] for p in kernels
    }


def test_portable_fibers(tmp_path):
    """The ucontext switch, which other CPUs use, runs the example too."""
    files = set().union(*map(seen.included, (*SOURCES, TESTS / "example.cuh")))
    digest = seen.digest({*files, Path(__file__).resolve()}, compiler_version(), FLAGS)
    due = ["portable fibers"] if seen.turn("portable fibers", 8) else []
    if seen.known("programs", "portable fibers", digest, due):
        return
    main = tmp_path / "main.cpp"
    main.write_text(
        """
        #include "emulation/tests/example.cuh"
        #include <cstdio>
        using namespace attn;
        int main() {
          static ptx::bf16 A[64 * 32], B[32 * 32];
          static float C[64 * 32];
          for (int i = 0; i < 64 * 32; ++i) A[i] = ptx::from_float<ptx::bf16>(float(i % 3));
          for (int i = 0; i < 32 * 32; ++i) B[i] = ptx::from_float<ptx::bf16>(float(i % 5));
          ptx::launch(example::gemm<ptx::bf16>, {1, 1, 1}, example::THREADS, example::SMEM_BYTES,
                      nullptr, example::Params{A, B, C, 64, 32, 32});
          for (int i = 0; i < 64 * 32; ++i) {
            float sum = 0;
            for (int k = 0; k < 32; ++k) sum += ((i / 32 * 32 + k) % 3) * ((i % 32 * 32 + k) % 5);
            if (C[i] != sum) return printf("C[%d] = %g, not %g", i, C[i], sum), 1;
          }
        }
        """
    )
    binary = str(tmp_path / "main")
    flags = [*FLAGS, "-DATTN_FIBER_UCONTEXT", f"-I{ROOT / 'csrc'}"]
    compiler(*flags, main, *SOURCES, "-o", binary)
    done = subprocess.run([binary], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen.passed("programs", "portable fibers", digest)


def test_faults_leave_the_process_alive():
    """In a process with faulthandler on, as under pytest: its own handlers come back afterwards."""
    code = (
        "import faulthandler, os; faulthandler.enable()\n"
        "from attn_ext import _emulated as e\n"
        "for i in (14, 15, 16) * 3:\n"
        "    try: e.fault(i)\n"
        "    except RuntimeError: pass\n"
        "    else: raise SystemExit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
