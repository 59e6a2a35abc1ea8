"""Triton's compiled kernels, executed without a GPU: their PTX on the emulated machine, launched
with the arguments of Triton's own launcher (tests/helpers/ptx/triton_driver.py).

The tiles are small ones, quick to compile, but for "as shipped".  Compiled at each commit is a
sample, and what a change can affect; `make test-ptx` runs all of them.
"""

import pytest
import seen
import torch

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)
pytest.importorskip("triton", minversion="3.9", reason="its launcher is Python from 3.9 on")

import triton_seen  # noqa: E402  after the modules that they need are known to be there
from ptx import sums, triton_driver  # noqa: E402

from attn_ext.testing import check_call, random_call  # noqa: E402

MODES = ["plain", "random", "poison", "race", "all"]
CAUSAL = {"seqlen_q": 70, "seqlen_k": 201, "causal": True}
FEATURES = {"seqlen_q": 70, "seqlen_k": 130, "mask": "bk", "bias": "hqk", "softcap": 5.0,
            "alibi": True, "sink": True, "dropout_p": 0.2, "window": (60, -1)}  # fmt: skip
AT_ONCE = FEATURES | {"bias": False, "heads_q": 4, "heads_k": 2}
APART = {"deterministic": True}  # dQ by a kernel of its own
PAGED = {"seqlen_q": 1, "cache_seqlens": [300, 41], "seqlen_k": 320, "page_size": 16,
         "heads_q": 4, "heads_k": 2}  # fmt: skip
VARLEN = {"seqlens_q": [30, 0, 75], "seqlens_k": [30, 40, 75], "causal": True}
FIXED = {"seqlen_q": 70, "seqlen_k": 130, "bias": "hqk", "deterministic": True}
# tanh to 2^-11; two keys of the mask are a word
WORDS = {"seqlen_q": 70, "seqlen_k": 130, "mask": "bqk", "softcap": 5.0, "dtype": torch.bfloat16}
# four keys of the mask are a word of the backward, and clear dS in pairs
CLEARED = {"seqlen_q": 70, "seqlen_k": 132, "mask": "bqk", "batch": 1} | APART
# dbias by atomics, of pairs; all queries have a bias of -inf at a key of NaN
ADDED = {"seqlen_q": 70, "seqlen_k": 130, "bias": "qk", "heads_q": 1, "excluded": 20}
PLACED = {"frame": [3, 1, 91, 62, 300, 280]}  # a shard's; no first key is a multiple of 4
HALF, SINGLE = {"dtype": torch.float16}, {"dtype": torch.float32}
# a sum over 24 columns, one a lane
ONE_A_LANE = {"seqlens_q": [1], "seqlens_k": [1], "head_dim": 1, "head_dim_v": 24} | SINGLE
# what each would catch beside the instructions of its kernels
CALLS = {
    "sm_90, TMA and wgmma": ("sm_90", CAUSAL),
    "sm_90, rows of 64 bytes, swizzled as such": ("sm_90", CAUSAL | HALF | {"head_dim": 32}),
    "sm_90, two boxes a row": ("sm_90", CAUSAL | {"head_dim": 128} | APART),
    "sm_90, dQ by atomics with every feature": ("sm_90", AT_ONCE),
    "sm_90, tf32": ("sm_90", CAUSAL | SINGLE),
    "sm_90, one column: queries MN-major": ("sm_90", CAUSAL | {"head_dim": 1}),
    "sm_90, every feature: bytes shared by warps": ("sm_90", FEATURES),
    "sm_90, softcap of bfloat16, words of a mask": ("sm_90", WORDS),
    "sm_90, a bias that queries share: a tile of one element": ("sm_90", CAUSAL | {"bias": "h"}),
    "sm_90, ALiBi from a tile's first key": ("sm_90", CAUSAL | {"alibi": True, "mask": "bqk"}),
    "sm_90, soft cap without a maximum, split": ("sm_90", PAGED | {"softcap": 30.0, "sink": True}),
    "sm_90, varlen": ("sm_90", VARLEN),
    "sm_90, paged decode, split": ("sm_90", PAGED),
    "sm_90, deterministic dbias": ("sm_90", FIXED),
    "sm_90, dS cleared by words of a mask": ("sm_90", CLEARED),
    "sm_90, dbias by atomics, keys as threads hold them": ("sm_90", ADDED | {"seqlen_k": 132}),
    "sm_90, sums that all lanes of a row store": ("sm_90", ONE_A_LANE),
    "sm_90, a shard: its diagonal, distances and counter": ("sm_90", FEATURES | PLACED),
    "sm_80": ("sm_80", CAUSAL),
    "sm_80, every feature": ("sm_80", FEATURES),
    "sm_80, values wider than keys": ("sm_80", CAUSAL | {"head_dim_v": 72} | APART),
    "sm_80, a float32 bias that queries share": ("sm_80", CAUSAL | {"bias": "bk"} | SINGLE),
    "sm_80, dQ by atomics with every feature": ("sm_80", AT_ONCE),
    "sm_80, tf32": ("sm_80", CAUSAL | SINGLE),
    "sm_80, paged decode, split": ("sm_80", PAGED),
    "sm_80, dS of float16 cleared by words of a mask": ("sm_80", CLEARED | HALF),
    "sm_80, dbias by atomics": ("sm_80", ADDED),
}
SHIPPED = {"sm_90, as shipped": ("sm_90", CAUSAL), "sm_80, as shipped": ("sm_80", CAUSAL)}
DUE = seen.sample([*CALLS, *SHIPPED], 1)  # half a minute


@pytest.fixture(autouse=True)
def plain_mode():
    yield
    emulated.set_mode("plain")


@pytest.mark.parametrize("name", [*CALLS, *SHIPPED])
def test_kernels(name):
    """Forward and backward, in every mode, without a false alarm."""
    digest = triton_seen.executed(__file__, repr((CALLS | SHIPPED)[name]))
    if seen.known("triton_ptx", name, digest, DUE):
        return
    architecture, options = (CALLS | SHIPPED)[name]
    tiles = triton_driver.SHIPPED if name in SHIPPED else triton_driver.small
    driver = triton_driver.Driver(architecture, tiles=tiles)
    options = {"head_dim": 64, "dtype": torch.bfloat16} | options
    frame, excluded = options.pop("frame", None), options.pop("excluded", None)
    call = random_call(1, **options)
    if frame:
        call = call._replace(frame=torch.tensor([frame, frame[::-1]], dtype=torch.int32))
    if excluded:
        call.bias[..., excluded], call.k[:, :, excluded] = -torch.inf, torch.nan
    for mode in MODES:
        triton_driver.set_mode(mode, driver)
        check_call(call, triton_driver.backend(driver), grads="cache_seqlens" not in options)
    assert len(driver.launched) >= 2 * len(MODES)
    seen.passed("triton_ptx", name, digest)


def test_sums_that_lanes_round_apart_are_seen():
    """FMA of a lane's product and the addition of another lane's, of one number and of two in a
    register; none where the product is rounded first, or what is shuffled is a sum already."""
    apart = """
        mul.f32 %r3, %r1, %r2;  shfl.sync.bfly.b32 %r4, %r3, 16, 31, -1;
        fma.rn.f32 %r5, %r1, %r2, %r4;"""
    alike = """
        fma.rn.f32 %r3, %r1, %r2, 0f00000000;  shfl.sync.bfly.b32 %r4, %r3, 16, 31, -1;
        add.f32 %r5, %r3, %r4;  shfl.sync.bfly.b32 %r6, %r5, 8, 31, -1;
        fma.rn.f32 %r7, %r1, %r2, %r6;"""
    of_two = """
        mul.rn.f32x2 %rd3, %rd1, %rd2;  mov.b64 {%r3, %r4}, %rd3;
        shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;  shfl.sync.bfly.b32 %r6, %r4, 1, 31, -1;
        mov.b64 %rd4, {%r5, %r6};  fma.rn.f32x2 %rd5, %rd1, %rd2, %rd4;"""
    assert sums.fused_over_lanes(apart) == ["fma.rn.f32 %r5, %r1, %r2, %r4;"]
    assert sums.fused_over_lanes(alike) == []
    assert sums.fused_over_lanes(of_two) == ["fma.rn.f32x2 %rd5, %rd1, %rd2, %rd4;"]


def test_parameters():
    """Values where the kernel looks for them: a tuple's in its place, constants left out, 64 bits
    at multiples of 8."""
    annotations = [(triton_driver.ARGUMENT, None), (triton_driver.CONSTANT, None),
                   (triton_driver.TUPLE, [(triton_driver.ARGUMENT, None)] * 2)]  # fmt: skip
    assert triton_driver.flat(annotations, [1, 2, (3, 4)]) == [1, 3, 4]
    assert triton_driver.packed("i32", -2) == b"\xfe\xff\xff\xff"
    assert triton_driver.packed("*bf16", None) == bytes(8)
    assert triton_driver.packed("fp32", 1.0) == b"\0\0\x80\x3f"


def test_tensor_maps():
    """A map with dimensions in the wrong order, or strides in elements."""
    spec = triton_driver.tensor_map(64, 3, 2, 9, (1, 1, 32, 64), (2, 4, 70, 64),
                                    (17920, 4480, 64, 1), 0)  # fmt: skip
    words = [int.from_bytes(spec[at : at + 8], "little") for at in range(16, 72, 8)]
    assert words == [64, 70, 4, 2, 128, 8960, 35840]
    boxes = [int.from_bytes(spec[at : at + 4], "little") for at in range(72, 96, 4)]
    assert boxes == [64, 32, 1, 1, 2, 128]
