"""The executor of compiled PTX against published facts: Random123's known answers, the special
values and the error that NVIDIA's manual of PTX states for ex2.approx, the fragments of its figures
for stmatrix, ldmatrix and wgmma, and the layouts and swizzles of CUTLASS's CuTe (Swizzle<B, 4, 3>
of byte addresses).

The instructions stand here as text, so that nothing of ours or of Triton's is between them and the
executor.
"""

import struct

import numpy as np
import pytest
from closeness import APPROXIMATE, assert_arrays_close

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from ptx import build  # noqa: E402  after the module that it needs is known to be there

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 smem[];\n"
# in and out are words of this lane: "[%rd3]" and "[%rd4]", 64 bytes apart
ENTRY = """.visible .entry {name}(
  .param .u64 {name}_in, .param .u64 {name}_out, .param .align 64 .b8 {name}_map[128])
{{
  .reg .b32 %r<40>; .reg .f32 %f<48>; .reg .b64 %rd<8>; .reg .pred %p<4>;
  ld.param.u64 %rd1, [{name}_in];
  ld.param.u64 %rd2, [{name}_out];
  mov.u32 %r0, %tid.x;
  mul.wide.u32 %rd5, %r0, 64;
  add.s64 %rd3, %rd1, %rd5;
  add.s64 %rd4, %rd2, %rd5;
{body}
  ret;
}}
"""
EX2 = """
  ld.global.f32 %f1, [%rd3];
  ex2.approx.ftz.f32 %f2, %f1;
  st.global.f32 [%rd4], %f2;
  ex2.approx.f32 %f3, %f1;
  st.global.f32 [%rd4+4], %f3;
"""
# 64 bits, a place and a length; two bit fields of each width
BFE = """
  ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3];
  mov.b64 %rd6, {%r1, %r2};
  bfe.u32 %r5, %r1, %r3, %r4;
  bfe.s32 %r6, %r1, %r3, %r4;
  st.global.v2.u32 [%rd4], {%r5, %r6};
  bfe.u64 %rd7, %rd6, %r3, %r4;
  st.global.u64 [%rd4+8], %rd7;
  bfe.s64 %rd7, %rd6, %r3, %r4;
  st.global.u64 [%rd4+16], %rd7;
"""
# The same input; the bits of one number in another, of each width
BFI = """
  ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3];
  mov.b64 %rd6, {%r1, %r2};
  mov.b64 %rd7, {%r2, %r1};
  bfi.b32 %r5, %r1, %r2, %r3, %r4;
  st.global.v2.u32 [%rd4], {%r5, %r5};
  bfi.b64 %rd7, %rd6, %rd7, %r3, %r4;
  st.global.u64 [%rd4+8], %rd7;
"""
# Two words and 64 bits: the whole of a * b + c, by the carry that its halves hand on
CARRY = """
  ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3];
  mad.lo.cc.u32 %r5, %r1, %r2, %r3;
  madc.hi.u32 %r6, %r1, %r2, %r4;
  st.global.v2.u32 [%rd4], {%r5, %r6};
"""
PHILOX = """
  ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3];
  ld.global.v2.u32 {%r5, %r6}, [%rd3+16];
  mov.u32 %r7, 0;
again:
  mul.hi.u32 %r8, %r1, 0xD2511F53;
  mul.lo.u32 %r9, %r1, 0xD2511F53;
  mul.hi.u32 %r10, %r3, 0xCD9E8D57;
  mul.lo.u32 %r11, %r3, 0xCD9E8D57;
  xor.b32 %r12, %r10, %r2;
  xor.b32 %r1, %r12, %r5;
  mov.b32 %r2, %r11;
  lop3.b32 %r3, %r8, %r4, %r6, 0x96;
  mov.b32 %r4, %r9;
  add.u32 %r5, %r5, 0x9E3779B9;
  add.u32 %r6, %r6, 0xBB67AE85;
  add.u32 %r7, %r7, 1;
  setp.lt.u32 %p1, %r7, 10;
  @%p1 bra again;
  st.global.v4.u32 [%rd4], {%r1, %r2, %r3, %r4};
"""
# The lane's number and the register's in each half: store tiles, read them as plain rows, and by
# ldmatrix, all four and those that were stored.  The row of lane l: address 16 l, and nowhere where
# the lane's address must not count.
TILES = """
  shl.b32 %r1, %r0, 4;
  mov.u32 %r20, smem;
  add.u32 %r1, %r1, %r20;
  ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%rd3];
  stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {{{registers}}};
  bar.sync 0;
  ld.shared.v4.u32 {{%r6, %r7, %r8, %r9}}, [%r1];
  st.global.v4.u32 [%rd4], {{%r6, %r7, %r8, %r9}};
  ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r6, %r7, %r8, %r9}}, [%r1];
  st.global.v4.u32 [%rd4+16], {{%r6, %r7, %r8, %r9}};
  mov.u32 %r2, 0;
  mov.u32 %r3, 0;
  mov.u32 %r4, 0;
  mov.u32 %r5, 0;
  setp.ge.u32 %p1, %r0, {rows};
  @%p1 add.u32 %r1, %r1, 1048576;
  ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r1];
  st.global.v4.u32 [%rd4+32], {{%r2, %r3, %r4, %r5}};
"""
# One tile, all of whose rows go to one place
FOLDED = """
  mov.u32 %r1, smem;
  ld.global.u32 %r2, [%rd3];
  stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r2};
"""
BOX = """
  mov.b64 %rd6, box{span}_map;
  cvta.param.u64 %rd7, %rd6;
  setp.eq.u32 %p1, %r0, 0;
  mov.u32 %r3, smem;
  add.u32 %r3, %r3, 4096;
  @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
  fence.proxy.async.shared::cta;
  fence.mbarrier_init.release.cluster;
  bar.sync 0;
  @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {bytes};
  mov.u32 %r1, 0;
  mov.u32 %r2, smem;
  @%p1 cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2],
    [%rd7, {{%r1, %r1, %r1, %r1}}], [%r3];
wait:
  mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], %r1;
  @!%p2 bra wait;
  shl.b32 %r4, %r0, 6;
  add.u32 %r4, %r4, %r2;
{reads}
"""
# 64 x 96 += A [64, 16] B [16, 96]: a thread stores 64 bytes of the image of both, and has 48 sums.
SUMS = ", ".join(f"%f{i}" for i in range(48))
PRODUCT = (
    """
  shl.b32 %r1, %r0, 6;
  mov.u32 %r2, smem;
  add.u32 %r1, %r1, %r2;
"""
    + "".join(
        f"  ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd3+{at}];\n"
        f"  st.shared.v4.u32 [%r1+{at}], {{%r3, %r4, %r5, %r6}};\n"
        for at in range(0, 64, 16)
    )
    + "".join(f"  mov.f32 %f{i}, 0f3F800000;\n" for i in range(48))
    + f"""
  fence.proxy.async.shared::cta;
  bar.sync 0;
  setp.eq.u32 %p1, %r2, %r2;
  ld.global.u64 %rd6, [%rd1+8176];
  ld.global.u64 %rd7, [%rd1+8184];
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {{{SUMS}}}, %rd6, %rd7, %p1, 1, 1, ORDER, 1;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  mul.wide.u32 %rd5, %r0, 192;
  add.s64 %rd4, %rd2, %rd5;
"""
    + "".join(f"  st.global.f32 [%rd4+{4 * i}], %f{i};\n" for i in range(48))
)
# 32 floats of shared memory added to global memory, twice; what a thread then finds there
ADD = """
  ld.global.f32 %f1, [%rd3];
  shl.b32 %r1, %r0, 2;
  mov.u32 %r2, smem;
  add.u32 %r1, %r1, %r2;
  st.shared.f32 [%r1], %f1;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  setp.ne.u32 %p1, %r0, 0;
  @%p1 bra done;
  cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd2+1024], [%r2], 128;
  cp.async.bulk.commit_group;
  cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd2+1024], [%r2], 128;
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group{read} 0;
  ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd2+1024];
  st.global.v4.u32 [%rd2], {{%r3, %r4, %r5, %r6}};
  cp.async.bulk.wait_group 0;
done:
"""
# Message passing: block 0 stores data, then a flag; block 1 waits for the flag and loads the data
MESSAGE = """
  mov.u32 %r1, %ctaid.x;
  setp.ne.u32 %p1, %r0, 0;
  @%p1 bra done;
  setp.ne.u32 %p2, %r1, 0;
  mov.u32 %r2, 77;
  mov.u32 %r3, 1;
  @%p2 bra take;
  st.global.u32 [%rd2+64], %r2;
  st.release.gpu.global.u32 [%rd2+128], %r3;
  bra done;
take:
  ld.acquire.gpu.global.u32 %r4, [%rd2+128];
  setp.ne.u32 %p3, %r4, 1;
  @%p3 bra take;
  ld.global.u32 %r5, [%rd2+64];
  st.global.u32 [%rd2+192], %r5;
done:
"""
SPANS = {128: 3, 64: 2, 32: 1}  # bytes that are swizzled -> bits of CuTe's Swizzle
REGISTERS = {1: "%r2", 2: "%r2, %r3", 4: "%r2, %r3, %r4, %r5"}
READS = "".join(
    f"  ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4+{at}];\n"
    f"  st.global.v4.u32 [%rd4+{at}], {{%r5, %r6, %r7, %r8}};\n"
    for at in range(0, 64, 16)
)
BODIES = {"ex2": EX2, "bfe": BFE, "bfi": BFI, "carry": CARRY, "philox": PHILOX, "folded": FOLDED,
          "product": PRODUCT.replace("ORDER", "0"),
          "product_mn": PRODUCT.replace("ORDER", "1"), "message": MESSAGE,
          "add": ADD.format(read=""), "add_read": ADD.format(read=".read")}  # fmt: skip
BODIES |= {
    f"tiles{count}{'t' * trans}": TILES.format(
        count=count, trans=".trans" * trans, registers=registers, rows=8 * count
    )
    for count, registers in REGISTERS.items()
    for trans in (False, True)
}
BODIES |= {f"box{span}": BOX.format(span=span, bytes=16 * span, reads=READS) for span in SPANS}
TEXT = HEAD + "".join(ENTRY.format(name=name, body=body) for name, body in BODIES.items())


def run(
    name: str, words: np.ndarray, tensor_map: bytes = bytes(128), sums: int = 16, blocks: int = 1,
    seed: int = 3, mode: str = "random+poison",
) -> np.ndarray:  # fmt: skip
    """[threads, sums] words of the threads from [threads, 16] words, with poison: bytes that
    nothing wrote are read here, which "race" would report."""
    given, got = np.ascontiguousarray(words, np.uint32), np.zeros((len(words), sums), np.uint32)
    assert given.shape[1:] == (16,)
    parameters = struct.pack("<QQ", given.ctypes.data, got.ctypes.data).ljust(64, b"\0")
    body = build.address(TEXT, name, "golden.ptx")
    emulated.set_mode(mode, seed=seed, smem_limit=227 * 1024)
    try:
        emulated.launch_compiled(body, (blocks, 1, 1), len(words), 8192, parameters + tensor_map)
    finally:
        emulated.set_mode("plain")
    return got


def placed(rows) -> np.ndarray:
    """These rows of words, and zeros to [32, 16]."""
    words = np.zeros((32, 16), np.uint32)
    for lane, row in enumerate(rows):
        words[lane, : len(row)] = row
    return words


def test_ex2():
    """The table of special values and the largest error of the manual's page of ex2."""
    special = [-np.inf, -1e-40, -0.0, 0.0, 1e-40, np.inf, np.nan]
    numbers = np.array([*special, *np.linspace(-30, 30, 25)], np.float32)
    got = run("ex2", placed(numbers.view(np.uint32)[:, None]))[:, :2].copy().view(np.float32)
    for column in got.T:
        np.testing.assert_array_equal(column[:7], np.float32([0, 1, 1, 1, 1, np.inf, np.nan]))
        assert_arrays_close(column[7:], np.exp2(numbers[7:].astype(float)), APPROXIMATE)


# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output
PI = "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0"
KNOWN = {
    "0 0 0 0 0 0": "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    " ".join(["ffffffff"] * 6): "408f276d 41c83b0e a20bc7c6 6d5451fd",
    PI: "d16cfe09 94fdcceb 5001e420 24126ea1",
}


def field(word: int, place: int, length: int, width: int, signed: bool) -> int:
    """The manual's text of bfe, as a loop over bits."""
    highest = min(place + length - 1, width - 1)
    sign = word >> highest & 1 if signed and length else 0
    bits = (word >> place + i & 1 if i < length and place + i < width else sign
            for i in range(width))  # fmt: skip
    return sum(bit << i for i, bit in enumerate(bits))


def test_bit_fields():
    """bfe of 32 and 64 bits, also at and beyond the highest bit."""
    fields = [(2, 30), (0, 0), (0, 64), (31, 1), (31, 5), (33, 8), (60, 9), (63, 1), (7, 200)]
    words = [0xFEDC_BA98_7654_3210, 0x8000_0000_8000_0001, (1 << 64) - 1]
    cases = [(word, *each) for word in words for each in fields]
    rows = [(word & 0xFFFF_FFFF, word >> 32, place, length) for word, place, length in cases]
    got = run("bfe", placed(rows))
    for row, (word, place, length) in zip(got.tolist(), cases, strict=False):
        expected = [field(word & 0xFFFF_FFFF, place, length, 32, signed) for signed in (0, 1)]
        for signed in (0, 1):
            both = field(word, place, length, 64, signed)
            expected += [both & 0xFFFF_FFFF, both >> 32]
        assert row[:6] == expected, (hex(word), place, length)


def inserted(a: int, b: int, place: int, length: int, width: int) -> int:
    """The manual's text of bfi, as a loop over bits."""
    for i in range(min(length, width - place)):
        b = b & ~(1 << place + i) | (a >> i & 1) << place + i
    return b


def test_inserted_bits():
    """bfi of 32 and 64 bits, also at and beyond the highest bit: NVRTC takes it for a multiple of a
    power of two and a sum."""
    fields = [(2, 30), (0, 0), (0, 64), (31, 1), (31, 5), (33, 8), (7, 57), (60, 9), (7, 200)]
    words = [0xFEDC_BA98_7654_3210, 0x8000_0000_8000_0001, (1 << 64) - 1]
    cases = [(word, *each) for word in words for each in fields]
    rows = [(word & 0xFFFF_FFFF, word >> 32, place, length) for word, place, length in cases]
    got = run("bfi", placed(rows))
    for row, (word, place, length) in zip(got.tolist(), cases, strict=False):
        low, high = word & 0xFFFF_FFFF, word >> 32
        both = inserted(word, low << 32 | high, place, length, 64)
        expected = [inserted(low, high, place, length, 32)] * 2
        assert row[:4] == [*expected, both & 0xFFFF_FFFF, both >> 32], (hex(word), place, length)


def test_carries():
    """mad.lo.cc and madc.hi: a product of 64 bits and a sum that carries from word to word."""
    ends = (0, 1, 0x8000_0000, 0xFFFF_FFFF)
    cases = [(a, b, low, 7) for a in ends for b in ends for low in ends][:32]
    cases = [*cases, *((a, 1, low, 0xFFFF_FFFF) for a in ends for low in ends)]
    for at in range(0, len(cases), 16):
        rows = cases[at : at + 16]
        for row, (a, b, low, high) in zip(run("carry", placed(rows)).tolist(), rows, strict=False):
            whole = a * b + (high << 32 | low)
            assert row[:2] == [whole & 0xFFFF_FFFF, whole >> 32 & 0xFFFF_FFFF], (a, b, low, high)


def test_philox():
    """mul.hi, mul.lo, lop3, a branch: Random123's known answers."""
    got = run("philox", placed([[int(w, 16) for w in key.split()] for key in KNOWN]))
    for row, answer in zip(got, KNOWN.values(), strict=False):
        assert " ".join(f"{word:08x}" for word in row[:4]) == answer


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", REGISTERS)
def test_stmatrix_and_ldmatrix(count, trans):
    """The figure of the manual: thread T has elements 2 (T % 4) and the next of row T / 4 of each
    tile, of its transpose with .trans; the row of tile i that lane 8 i + r names is row r."""
    lane, register, half = np.ogrid[:32, :4, :2]
    values = (1 + 8 * lane + 2 * register + half).astype(np.uint16)
    words = placed(np.ascontiguousarray(values).view(np.uint32)[..., 0])
    tiles = np.zeros((4, 8, 8), np.uint16)
    rows, columns = np.broadcast_arrays(lane // 4, 2 * (lane % 4) + half)
    for i in range(count):
        tiles[i][rows[:, 0], columns[:, 0]] = values[:, i]
    stored = tiles.swapaxes(1, 2) if trans else tiles
    # what no stmatrix wrote is what poison left, 0xffff
    stored[count:] = 0xFFFF
    got = run(f"tiles{count}{'t' * trans}", words)
    np.testing.assert_array_equal(got[:, :4].copy().view(np.uint16), stored.reshape(32, 8))
    np.testing.assert_array_equal(got[:, 4 : 4 + count], words[:, :count])
    np.testing.assert_array_equal(got[:, 8 : 8 + count], words[:, :count])


def test_rows_of_stmatrix_that_share_an_address():
    """Triton stores so what several rows of a tile hold alike.  Equal bytes need no order; of
    others the manual leaves open which stay."""
    row = np.arange(4)
    run("folded", placed(np.tile(row, 8)[:, None]), mode="race")
    apart = np.tile(row, 8) + (np.arange(32) >= 28)
    with pytest.raises(RuntimeError, match=r"golden\.ptx:\d+: race"):
        run("folded", placed(apart[:, None]), mode="race")


@pytest.mark.parametrize("span", SPANS)
def test_swizzles_of_boxes(span):
    """16 rows of a box in shared memory: byte x of the box lies at x ^ ((x >> 3) & bits 4.. of
    CuTe's Swizzle<B, 4, 3>)."""
    from ptx.triton_driver import SWIZZLED, tensor_map

    columns = span // 2
    storage = np.zeros(16 * columns + 8, np.uint16)
    start = -storage.ctypes.data % 16 // 2
    tensor = storage[start : start + 16 * columns]
    tensor[:] = 1 + np.arange(16 * columns)
    spec = tensor_map(tensor.ctypes.data, SWIZZLED.index(span), 2, 9, (1, 1, 16, columns),
                      (1, 1, 16, columns), (16 * columns, 16 * columns, columns, 1), 0)  # fmt: skip
    got = run(f"box{span}", placed([]), spec).view(np.uint16).ravel()
    x = 2 * np.arange(16 * columns)
    mask = ((1 << SPANS[span]) - 1) << 4
    np.testing.assert_array_equal(got[(x ^ ((x >> 3) & mask)) // 2], tensor)


@pytest.mark.parametrize("order_of_a", ["K-major", "MN-major"])
def test_product_over_one_and_a_half_atoms(order_of_a):
    """wgmma of 96 columns of B, row after row (MN-major), in 128-byte swizzle: the atoms of 64
    columns that CuTe's canonical layout has, Swizzle<3, 4, 3> o ((8, 8, m), (8, k)) :
    ((1, 8, LBO), (64, SBO)), the second of them half used; A K-major in 32-byte swizzle, or
    MN-major in an atom of 128 bytes.  NaN where no operand lies.  The sums lie as in the manual's
    figure of the fragment."""
    lbo, sbo, at_a = 2048, 1024, 4096  # bytes
    rng = np.random.default_rng(9)
    A, B = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((64, 16), (16, 96)))
    image = np.full(4096, 0x7FFF, np.uint16)
    k, n = np.ogrid[:16, :96]
    x = 2 * (n % 64) + n // 64 * lbo + k % 8 * 128 + k // 8 * sbo
    image[(x ^ ((x >> 3) & 0x70)) // 2] = B.view(np.uint32) >> 16
    m, k = np.ogrid[:64, :16]
    if order_of_a == "K-major":
        x = at_a + m // 8 * 256 + m % 8 * 32 + 2 * k
        x ^= (x >> 3) & 0x10
    else:
        x = at_a + 2 * m + k % 8 * 128 + k // 8 * sbo
        x ^= (x >> 3) & 0x70
    image[x // 2] = A.view(np.uint32) >> 16
    words = image.view(np.uint32)
    smem = 0x400  # where the emulator's shared memory begins

    def descriptor(start, leading, stride, swizzle):
        return (smem + start) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62

    a = descriptor(at_a, 16, 256, 3) if order_of_a == "K-major" else descriptor(at_a, lbo, sbo, 1)
    words[-4:] = np.array([a, descriptor(0, lbo, sbo, 1)], np.uint64).view(np.uint32)
    got = run(
        "product_mn" if order_of_a == "MN-major" else "product", words.reshape(128, 16), sums=48
    ).view(np.float32)
    thread, i = np.ogrid[:128, :48]
    row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    np.testing.assert_array_equal(got, 1 + (A @ B)[row, i // 4 * 8 + thread % 4 * 2 + i % 2])


def test_an_addition_is_seen_behind_its_wait():
    """The pages of cp.reduce.async.bulk and cp.async.bulk.wait_group: behind a wait without .read
    the writes are visible to the thread that waits; .read waits for the sources alone, and the
    executor shows that what is added need not be there."""
    numbers = np.arange(1, 33, dtype=np.float32)
    words = placed(numbers.view(np.uint32)[:, None])
    for name, factor in (("add", 2), ("add_read", 0)):
        got = run(name, words).view(np.float32)
        np.testing.assert_array_equal(got[0, :4], factor * numbers[:4], err_msg=name)
        np.testing.assert_array_equal(got[16:18].ravel(), 2 * numbers)


def test_a_message_between_blocks():
    """The litmus test MP of the manual's memory model: whoever acquires what was released sees what
    was stored before, whichever block runs first."""
    for seed in range(8):
        assert run("message", placed([]), blocks=2, seed=seed)[3, 0] == 77
