"""Calls of few queries on the CUDA kernels of sm_80 (csrc/cuda/sm80/forward.cuh): how they find
their keys, in pages or not, and how the warps of a CTA share them.
"""

import subprocess

import pytest
import torch
from emulator_build import compiler
from repository import ROOT

from attn_ext.backends import native_gpu, registry
from attn_ext.cli import compile as command
from attn_ext.cli.compile import SHARED_KIB
from attn_ext.testing import check_call, random_call

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def check(place):
    """check(**options of random_call) or check(call) on a backend with these kernels."""
    name, device, _ = place

    def run(call=None, **options):
        call = random_call(device=device, **options) if call is None else call
        check_call(call, registry.get(name), grads=False)

    run.device = device
    return run


CACHE = {"heads_q": 4, "heads_k": 2, "seqlen_q": 2, "seqlen_k": 330, "head_dim": 64,
         "cache_seqlens": [330, 17], "causal": True, "dtype": BF16}  # fmt: skip


@pytest.mark.parametrize("page_size", [16, 32, 48, 112, 320])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_pages_of_whole_runs(check, page_size, num_splits):
    """A page that begins or ends inside a tile, one that a share of the keys begins inside of, a
    last page that is not full."""
    check(page_size=page_size, num_splits=num_splits, stats=True, sink=True, **CACHE)


@pytest.mark.parametrize("head_dim", [32, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_head_dims(check, head_dim, dtype):
    """A swizzle that the rows of a thread do not share, tiles of 16 or 32 keys, values that are
    narrower than keys."""
    sizes = CACHE | {"head_dim": head_dim, "dtype": dtype, "seqlen_k": 150,
                     "cache_seqlens": [150, 64]}  # fmt: skip
    check(page_size=16, **sizes)
    check(**sizes | {"head_dim_v": head_dim - 24})


@pytest.mark.parametrize(
    ("heads_q", "seqlen_q"), [(1, 1), (16, 1), (4, 4), (3, 5), (17, 1), (6, 3), (8, 4), (5, 13)]
)
@pytest.mark.parametrize("page_size", [0, 16])
def test_rows_of_a_tile(check, heads_q, seqlen_q, page_size):
    """Rows at 16, where the warps begin to have their own, and rows that are not there."""
    check(**CACHE | {"heads_q": heads_q, "heads_k": 1, "seqlen_q": seqlen_q}, page_size=page_size,
          stats=True)  # fmt: skip


@pytest.mark.parametrize("options", [
    {"mask": "bhqk"}, {"bias": "hqk"}, {"alibi": True}, {"softcap": 3.0}, {"sink": True},
    {"window": (40, 0)}, {"window": (3, 2), "align": 0}, {"scale": -0.3},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_features(check, options, dtype):
    """Positions of a warp's keys, and a warp none of whose keys is seen: its maximum is -inf."""
    sizes = CACHE | {"causal": False, "dtype": dtype}
    check(page_size=16, stats=True, **sizes | options)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}, {"causal": True, "stats": True}])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_few_queries_without_a_cache(check, options, dtype):
    """The warps' shares of calls that are not decode; dropout by the number of the tile's key."""
    check(seqlen_q=7, seqlen_k=300, head_dim=64, dtype=dtype, **options)
    if "stats" not in options:
        check(seqlens_q=[3, 16, 0, 1], seqlens_k=[300, 70, 5, 1], head_dim=64, dtype=dtype,
              **options)  # fmt: skip


@pytest.mark.parametrize("options", [
    CACHE, CACHE | {"page_size": 16}, {"seqlens_q": [7, 3], "seqlens_k": [300, 64]},
    {"seqlen_q": 7, "seqlen_k": 300},
], ids=["contiguous", "pages", "packed", "dense"])  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_logits_beyond_what_an_exponent_keeps(check, dtype, options):
    """Logits that a factor and a maximum are taken off by one FMA: exp2 of the largest minus itself
    is the rounding of that, far from 0."""
    call = random_call(4, device=check.device, **options | {"dtype": dtype, "head_dim": 64})
    factor = 2000.0 if dtype == FP16 else 1e6
    check(call._replace(q=call.q * factor, k=call.k * factor))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [0, 16, 47, 63, 100])
def test_values_that_nobody_may_see(check, key, value):
    """0 * NaN of a masked key, in the keys of one warp alone; and NaN of a key that is seen."""
    call = random_call(seqlen_q=3, heads_q=4, heads_k=2, seqlen_k=300, head_dim=64, dtype=BF16,
                       mask="bqk", device=check.device)  # fmt: skip
    call.v[:, :, key, 5:9] = value
    call.mask[:, :, :2, key] = False
    call.mask[:, :, 2, key] = True
    check(call)


def test_the_largest_logit_in_each_warp(check):
    """A share of a warp with the weights of another's maximum: logits so far apart that a wrong
    one is infinite or nothing."""
    call = random_call(seqlen_q=1, heads_q=4, heads_k=2, seqlen_k=300, head_dim=64, dtype=BF16,
                       bias="hqk", stats=True, device=check.device)  # fmt: skip
    for head in range(4):  # of the last tile but one, keys of warp `head`
        call.bias[..., head, :, 192 + 16 * head] = 150.0
    check(call)


@pytest.mark.parametrize("later", [17, 64, 299])  # of another warp, of another tile
@pytest.mark.parametrize("options", [
    {"seqlen_q": 1}, {"seqlen_q": 1, "cache_seqlens": [300], "num_splits": 3}, {"seqlen_q": 33},
], ids=["few", "splits", "many"])  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_an_infinite_sum_of_which_nothing_is_left(check, dtype, options, later):
    """0 * inf: a sum of V that is infinite, by what V holds or since it is more than a float, and
    then a logit so far above that nothing of it is left."""
    call = random_call(heads_q=4, heads_k=2, seqlen_k=300, head_dim=64, dtype=dtype, bias="qk",
                       stats=True, device=check.device, **options)  # fmt: skip
    call.bias[..., later] = 1000.0
    call.v[:, :, 3, 5:9] = torch.inf
    call.v[:, :, 3, 9] = -torch.inf
    call.v[:, :, :16, 20:24] = 3e38
    check(call)


def kernels_of(call) -> list[str]:
    """The kernels of sm_80 that the forward of a call launches."""
    from attn_ext._C import cuda as _cuda

    device = (108, False, SHARED_KIB["80"] * 1024)
    launches = native_gpu.Kernels(_cuda, "cpu").launches(call, False, device, False, None)
    return [name.split("::")[3].split("<")[0] for name, *_ in launches]


@pytest.mark.parametrize(("options", "kernel"), [
    ({"heads_q": 8, "heads_k": 2, "seqlen_q": 4}, "forward_decode"),  # 16 rows
    ({"heads_q": 8, "heads_k": 2, "seqlen_q": 5}, "forward_general"),
    ({"heads_q": 2, "seqlen_q": 16, "batch": 60}, "forward_decode"),  # one share
    ({"heads_q": 2, "seqlen_q": 17, "batch": 60}, "forward_plain"),
    ({"heads_q": 2, "seqlen_q": 1, "batch": 60, "mask": True}, "forward_decode"),
    ({"heads_q": 2, "seqlen_q": 1, "batch": 60, "head_dim": 200}, "forward_decode"),
    ({"heads_q": 2, "seqlen_q": 1, "batch": 60, "dtype": FP32, "head_dim": 200}, "forward_general"),
])  # fmt: skip
def test_which_kernel_has_few_rows(options, kernel):
    """Warps that rest, or compute rows that are padding, where all could share the keys."""
    call = random_call(**{"seqlen_k": 600, "dtype": BF16, "head_dim": 64, **options})
    assert kernels_of(call)[0] == kernel


def test_divisors_divide(tmp_path):
    """A page that is found by a quotient which is one too large or too small."""
    compiler("-O1", "-std=c++17", ROOT / "csrc/tests/divisors.cpp", "-o", tmp_path / "program")
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_compile_knows_few_queries_and_a_batch():
    """A call whose kernels depend on how many keys it has, or on whether it has a batch."""
    for features in ((), ("mask",)):
        wants = command.wanted("8,16,4/1024,64", "bf16", features, False, "80")
        assert any("::forward_decode<" in want.kernel for want in wants), features
    shared = [f"{batch},4,256,64" for batch in (1, 4)]
    one, more = (
        {
            want.kernel
            for want in command.wanted(shape, "bf16", ("bias", "deterministic"), True, "90a")
        }
        for shape in shared
    )
    assert not any("backward_bias<" in kernel for kernel in one - more)
    assert {kernel for kernel in more if "backward_bias<" in kernel}
