"""Planted bugs in what the CUDA kernels do with frames and with parts in float32, in the folder
tests/mutants/cuda/frames: each must make the calls wrong that its first line names.

The kernels of bfloat16 for features are compiled from a copy of the sources and run in place of
those of attn_ext._emulated.  A bug that was caught in these very sources is known
(tests/helpers/seen.py): only a sample of them is compiled.
"""

import pytest
import torch
from closeness import BF16_WEIGHTS
from planted_cpu import Planted
from repository import ROOT
from shard_calls import check_not_rounded

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

import planted_cuda

from attn_ext.backends import registry
from attn_ext.core.schema import Frame
from attn_ext.testing import check_call, random_call

HEADER = "cuda/sm80/kernels.cuh"
KERNELS = [
    f"attn::cuda::sm80::{name}<attn::ptx::bf16, 32, {1 << 20}>"  # kAny
    for name in ("forward_features", "backward_features", "convert_dq_features")
]
SIZES = {"heads_q": 2, "heads_k": 1, "head_dim": 32, "dtype": torch.bfloat16}


def framed(frames, **options):
    """A call whose sequences stand where the frames say."""
    call = random_call(5, **SIZES, **options)
    return call._replace(frame=torch.tensor(frames, dtype=torch.int32))


def wrong() -> tuple[str, ...]:
    """The calls whose results are wrong."""
    place = Frame(3, 1, 11, 6, 40, 60)
    packed = [Frame(4, 2, 5, 1, 50, 60), Frame(0, 2, 0, 0, 1, 9), Frame(1, 2, 30, 3, 70, 70)]
    more = {"causal": True, "alibi": "b", "dropout_p": 0.3}
    calls = {
        "places": framed([place], batch=1, seqlen_q=19, seqlen_k=33, window=(25, 3), alibi=True),
        "dropout": framed([place], batch=1, seqlen_q=19, seqlen_k=33, dropout_p=0.4),
        "packed": framed(packed, seqlens_q=[7, 0, 18], seqlens_k=[20, 3, 33], **more),
    }
    part = random_call(5, batch=1, seqlen_q=20, seqlen_k=33, **SIZES)._replace(backend="emulated")
    registry.get("emulated").set_mode("plain", 1)
    found = []
    for name, check in (
        *((name, lambda call=call: check_call(call, "emulated")) for name, call in calls.items()),
        ("part", lambda: check_not_rounded(part, BF16_WEIGHTS)),
    ):
        try:
            check()
        except AssertionError:
            found.append(name)
    return tuple(sorted(found))


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernels with a bug."""
    return planted_cuda.wrong_with(folder, HEADER, KERNELS, wrong, patch)


PLANTED = Planted("cuda/frames", ROOT / "csrc" / HEADER, __file__, wrong_with)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(10)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a wrong place passes; and without a bug, a check that always complains."""
    PLANTED.check(name, tmp_path)
