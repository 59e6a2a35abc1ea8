"""The gradient of a bias, which a backward in one kernel adds up as it computes dS
(bias_gradient_of in csrc/cuda/features.h), on the kernels of sm_80 and of Hopper; and planted bugs
in what adds it, tests/mutants/cuda/bias_gradient, in the kernel of sm_80 of bf16 and 64 columns.
"""

import emulated_backend as emulated
import planted_cuda
import pytest
import torch
from planted_cpu import Planted
from repository import ROOT

from attn_ext.testing import check_call, random_call

BF16 = torch.bfloat16
SIZES = {"batch": 2, "heads_q": 4, "heads_k": 2, "seqlen_q": 140, "seqlen_k": 200, "head_dim": 64,
         "dtype": BF16}  # fmt: skip
PACKED = {"seqlens_q": [5, 131, 70], "seqlens_k": [7, 133, 160], "heads_q": 2, "heads_k": 1,
          "head_dim": 64, "dtype": BF16}  # fmt: skip
# name -> (options, whether sm_80 and Hopper add it in the kernel)
CASES = {
    "of each pair": ({**SIZES, "bias": "bhqk"}, (True, True)),
    "of each pair, in one order": ({**SIZES, "bias": "bhqk", "deterministic": True},
                                   (False, True)),
    "heads and batches share": ({**SIZES, "bias": "qk", "causal": True}, (True, True)),
    "they share, in one order": ({**SIZES, "bias": "qk", "deterministic": True}, (False, False)),
    "batches share, with all that goes beside it": (
        {**SIZES, "bias": "hqk", "mask": "bqk", "alibi": True, "dropout_p": 0.3}, (True, True)),
    "128 columns": ({**SIZES, "bias": "hqk", "head_dim": 128}, (True, True)),
    "packed": ({**PACKED, "bias": "hqk"}, (True, True)),
    "queries share": ({**SIZES, "bias": "bhk"}, (False, False)),
    "keys share": ({**SIZES, "bias": "bhq"}, (False, False)),
    "behind a soft cap": ({**SIZES, "bias": "hqk", "softcap": 2.0}, (False, False)),
}  # fmt: skip


def backends(sm90: bool):
    return planted_cuda.hopper() if sm90 else planted_cuda.ampere()


def kernels_of(call, sm90: bool) -> list[str]:
    return [name for name, *_ in emulated._kernels().launches(call, True, (1, sm90, 227 << 10))]


@pytest.mark.parametrize("sm90", [False, True], ids=["sm80", "sm90"])
@pytest.mark.parametrize("name", CASES)
def test_gradient(name, sm90):
    """A pair that is added twice or not, to another element, or by a kernel that computes dS once
    more without need."""
    options, added = CASES[name]
    call = random_call(2, **options)
    alone = any("backward_bias<" in kernel for kernel in kernels_of(call, sm90))
    assert alone != added[sm90]
    with backends(sm90) as module:
        module.set_mode("all", 1)
        check_call(call, module, grads=True)


def hidden(**options):
    """A call with NaN behind what its mask or dropout takes of tiles that are whole otherwise."""
    call = random_call(2, **{**SIZES, "batch": 1, "bias": "hqk", **options})
    if call.mask is not None:
        call.mask[..., 5] = False
        call.k[:, :, 5] = call.v[:, :, 5] = torch.nan
    return call


@pytest.mark.parametrize("sm90", [False, True], ids=["sm80", "sm90"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_pairs_that_do_not_count(sm90, dropout_p):
    """0 * NaN, which no one computes once more here."""
    with backends(sm90) as module:
        module.set_mode("all", 1)
        check_call(hidden(mask="hqk", dropout_p=dropout_p), module, grads=True)


def hidden_by_bias(**options):
    """NaN behind a bias of -inf: of a key, and of a query in what its row does not see."""
    call = random_call(2, **{**SIZES, "batch": 1, "bias": "hqk", **options})
    call.bias[..., 5] = call.bias[:, :, 3, 40:] = -torch.inf
    call.k[:, :, 5] = call.v[:, :, 5] = call.q[:, :, 3] = torch.nan
    return call


@pytest.mark.parametrize("sm90", [False, True], ids=["sm80", "sm90"])
@pytest.mark.parametrize("more", [{}, {"deterministic": True}, {"head_dim": 128}, {"alibi": True}],
                         ids=str)  # fmt: skip
def test_pairs_that_the_bias_hides(sm90, more):
    """NaN of a logit that is -inf by its bias: the other gradients are computed once more where it
    comes out, and this one is not."""
    with backends(sm90) as module:
        module.set_mode("all", 1)
        check_call(hidden_by_bias(**more), module, grads=True)


def wrong() -> tuple[str, ...]:
    """The calls that are wrong on sm_80."""
    calls = {
        "pairs": random_call(2, **SIZES | {"bias": "bhqk"}),
        "shared": random_call(2, **SIZES | {"bias": "qk"}),
        "packed": random_call(2, **PACKED, bias="hqk"),
        "hidden": hidden(mask="hqk"),
        "hidden_by_bias": hidden_by_bias(),
    }
    return planted_cuda.wrong_calls({name: ("all", call) for name, call in calls.items()})


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernel with a bug; 1048576: kAny, which asks for features at run time."""
    kernel = "attn::cuda::sm80::backward_features<attn::ptx::bf16, 64, 1048576>"
    return planted_cuda.wrong_with(folder, "cuda/sm80/backward_fused.cuh", [kernel], wrong, patch)


PLANTED = Planted(
    "cuda/bias_gradient", ROOT / "csrc/cuda/sm80/backward_fused.cuh", __file__, wrong_with
)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(5)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check of the gradient that passes whatever it is; and without a bug, one that complains."""
    PLANTED.check(name, tmp_path)
