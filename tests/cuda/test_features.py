"""CUDA kernels that are compiled for exactly the features of a call (csrc/cuda/features.h), by
NVRTC, on the driver without a GPU that runs what was compiled (tests/helpers/fake_driver).

The emulator's own tests run the same texts compiled for any feature, which ask at run time; here a
bit that the host forgets, or that a kernel takes for another, leaves a feature out.
"""

import os
import random
import re

import pytest
import seen
import torch
from closeness import BF16_WEIGHTS, relative
from repository import ROOT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from fake_driver import Kernels, driver

from attn_ext import _emulated
from attn_ext.backends import jit, shards
from attn_ext.backends.jit import sources
from attn_ext.cli import compile as command
from attn_ext.testing import check_call, needs_of, random_call

CSRC = ROOT / "csrc"
BITS = sources.features(CSRC)
needs_nvrtc = pytest.mark.skipif(jit.find() is None, reason="nvidia-cuda-nvrtc is not installed")
SIZES = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 130, "seqlen_k": 200, "head_dim": 32,
         "dtype": torch.bfloat16}  # fmt: skip
# name -> (options of random_call, features that its forward is compiled for)
SINGLE = {
    "mask": ({"mask": "bhqk"}, "mask mask_vectors"),
    "mask of odd rows": ({"mask": "qk", "seqlen_k": 199}, "mask"),
    "mask broadcast over keys": ({"mask": "bhq"}, "mask"),
    "bias": ({"bias": "hqk"}, "bias bias_vectors"),
    "bias of odd rows": ({"bias": "hqk", "seqlen_k": 199}, "bias"),
    "alibi": ({"alibi": "b"}, "alibi"),
    "softcap": ({"softcap": 2.0}, "softcap"),
    "sink": ({"sink": True}, "sink"),
    "dropout": ({"dropout_p": 0.3}, "dropout"),
    "stats": ({"stats": True}, "stats"),
    "scale": ({"scale": -0.3}, "scale"),
}
EVERY = {key: value for options, _ in SINGLE.values() for key, value in options.items()}


def features_in(fake, kernel="forward"):
    """Names of the features that the kernels of a name were compiled for."""
    found = [name for name, _ in fake.compiled if f"::{kernel}" in name]
    return [sources.flags_of(name, CSRC).rsplit(", ", 1)[1] for name in found]


@pytest.fixture(autouse=True)
def machine():
    _emulated.set_mode("plain", seed=1, smem_limit=227 * 1024)


def test_names_and_bits():
    """Two features of one bit; a bit without a name; a kernel that is told without its features."""
    text = (CSRC / "cuda/features.h").read_text()
    assert len(set(BITS.values())) == len(BITS) == len(re.findall(r"k\w+ = 1 << ", text))
    for space, headers in sources.HEADERS.items():
        texts = [(CSRC / "cuda" / header).read_text() for header in set(headers.values())]
        found = sources.featured(CSRC, space)
        assert len(found) == sum(len(re.findall(r"int BITS>\s*ATTN_KERNEL", x)) for x in texts)
        assert found <= headers.keys(), space
    assert {"forward_features", "backward_dq"} <= sources.featured(CSRC, "sm80")


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("more", [{}, {"dtype": torch.float32}, {"deterministic": True}], ids=str)
def test_a_call_asks_for_exactly_its_features(name, more):
    """A feature that the host forgets, or finds where there is none; odd rows read as vectors."""
    options, expected = SINGLE[name]
    call = random_call(1, **{**SIZES, **options, **more})
    with driver(80, runs=False) as fake:
        kernels = Kernels()
        kernels._devices[0] = (1, False)  # one multiprocessor: the keys are not shared out
        kernels.forward(call)
        assert features_in(fake) == [expected]


def test_a_bias_of_another_dtype():
    """A float32 bias read as bfloat16."""
    for dtype, expected in ((torch.float32, "bias bias_vectors bias_f32"),
                            (torch.float16, "bias bias_vectors bias_cast")):  # fmt: skip
        call = random_call(1, **SIZES, bias="hqk")
        call = call._replace(bias=call.bias.to(dtype))
        with driver(80, runs=False) as fake:
            Kernels().forward(call)
            assert features_in(fake) == [expected]


def test_flags_of_the_command_are_names():
    """A number where `attn-ext compile` should say what a kernel knows."""
    wants = list(command.wanted("1,2,64,32", "bf16", ("mask", "dropout"), True, "80"))
    told = [sources.flags_of(want.kernel, CSRC) for want in wants]
    assert "attn::ptx::bf16, 32, mask mask_vectors dropout" in told
    assert "attn::ptx::bf16, 32" in told  # clear_dq


# ---- compiled and run ---------------------------------------------------------------------------
def mix(seed):
    """Features and sizes of a call drawn at random."""
    draw = random.Random(seed)
    options = dict(SIZES, seqlen_q=draw.choice((70, 130)), seqlen_k=draw.choice((130, 199, 200)))
    for each, _ in draw.sample(list(SINGLE.values()), draw.randint(2, 5)):
        options |= {key: value for key, value in each.items() if key != "seqlen_k"}
    if draw.random() < 0.5:
        options["causal"] = True
    return options


FRAME = {"frame": (3, 1, 40, 21, 190, 230), "window": (60, 9), "alibi": True, "dropout_p": 0.3}
CASES = {
    **{name: options for name, (options, _) in SINGLE.items()},
    "bias in float32": {"bias": "hqk", "cast": torch.float32},
    "everything": EVERY,
    # alone: on one multiprocessor, so that the keys are not shared out to `forward_general`
    "head_dim 128: tiles of 32 keys": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2,
                                       "head_dim": 128, "seqlen_q": 70, "alone": True},
    "head_dim 128: rows of a mask in shared memory": {"mask": "bhqk", "head_dim": 128,
                                                      "seqlen_q": 70, "alone": True},
    "head_dim 128: rows of a bias in shared memory": {"bias": "hqk", "head_dim": 128,
                                                      "seqlen_q": 70, "alone": True},
    "head_dim 64, fp16, causal": {"mask": "bhqk", "softcap": 3.0, "dropout_p": 0.2, "head_dim": 64,
                                  "dtype": torch.float16, "causal": True},
    "float32": {"mask": "bhqk", "bias": "hqk", "dtype": torch.float32, "seqlen_q": 40},
    "deterministic": {"bias": "hqk", "dropout_p": 0.2, "deterministic": True},
    "decode of pages": {"cache_seqlens": [200], "seqlen_q": 2, "page_size": 16, "softcap": 3.0},
    "decode without features": {"cache_seqlens": [200], "seqlen_q": 2},
    "packed sequences": {"mask": "bk", "seqlens_q": [5, 71, 1], "seqlens_k": [7, 133, 0],
                         "dropout_p": 0.2, "stats": True},
    "frame": FRAME,
    **{f"mix {seed}": mix(seed) for seed in range(6)},
}  # fmt: skip
# On the kernels for Hopper: whole tiles and an edge.
WHOLE = {"seqlen_q": 130, "seqlen_k": 300, "head_dim": 64}
CASES |= {
    "hopper: causal": {"head_dim": 64, "causal": True},
    "hopper: mask": WHOLE | {"mask": "bhqk"},
    "hopper: mask of odd rows, head_dim 128": WHOLE | {"mask": "qk", "seqlen_k": 299,
                                                       "head_dim": 128},
    "hopper: bias": WHOLE | {"bias": "hqk"},
    "hopper: bias in float32, head_dim 128": WHOLE | {"bias": "hqk", "cast": torch.float32,
                                                      "head_dim": 128},
    "hopper: dropout": WHOLE | {"dropout_p": 0.3, "dtype": torch.float16},
    "hopper: soft cap": WHOLE | {"softcap": 2.0},
    # the cap as the unit of the logits, of the statistics and of a sink
    "hopper: soft cap that no logit comes near": WHOLE | {"softcap": 8.0, "mask": "qk",
                                                          "sink": True, "stats": True,
                                                          "scale": -0.125, "head_dim": 128},
    "hopper: stats, causal": WHOLE | {"stats": True, "causal": True},
    "hopper: everything, head_dim 128": WHOLE | EVERY | {"head_dim": 128},
    "hopper: head_dim 192": WHOLE | {"mask": "qk", "bias": "qk", "dropout_p": 0.2,
                                     "head_dim": 192},
    "hopper: packed sequences": {"mask": "bk", "seqlens_q": [5, 71, 1], "seqlens_k": [7, 133, 0],
                                 "dropout_p": 0.2, "alibi": "b", "head_dim": 64},
    "hopper: frame": FRAME | {"head_dim": 64},
    # The keys of 70 queries would be shared out, by a kernel of sm_80
    **{f"hopper: mix {seed}": mix(seed) | {"head_dim": 64, "seqlen_q": 130}
       for seed in range(10, 14)},
}  # fmt: skip
# at each commit one of them; `make test-ptx` takes all
CHOSEN = CASES if os.environ.get("ATTN_EXT_PTX_ALL") else seen.sample(CASES, 1)


@needs_nvrtc
@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_exactly_these_features_compute_what_they_should(name):
    """A feature that a kernel leaves out because its bit is another one's, or that is compiled in
    two ways of which one is wrong."""
    options = dict(SIZES, **{}) | CASES[name]
    cast, frame = options.pop("cast", None), options.pop("frame", None)
    alone = options.pop("alone", False)
    if "seqlens_q" in options:
        options = {k: v for k, v in options.items() if k not in ("batch", "seqlen_q", "seqlen_k")}
    call = random_call(3, **options)
    if cast is not None:
        call = call._replace(bias=call.bias.to(cast))
    if frame is not None:
        call = call._replace(frame=torch.tensor([frame], dtype=torch.int32))
    hopper = name.startswith("hopper")
    with driver(90 if hopper else 80) as fake:
        kernels = Kernels()
        kernels.sm90 = hopper
        if alone:
            kernels._devices[0] = (1, False)
        check_call(call, kernels, grads=call.seqlens_k is None)
        assert not alone or any("::forward_features" in kernel for kernel, _ in fake.compiled)
        assert any("::sm90::forward" in kernel for kernel, _ in fake.compiled) == hopper
        asked = features_in(fake)
        assert asked and "any" not in " ".join(asked)


HOPPER = {
    "mask": {"mask": "bhqk"},
    "bias": {"bias": "hqk", "head_dim": 128},
    "bias in float32": {"bias": "hqk", "cast": torch.float32},
    "dropout": {"dropout_p": 0.3, "seqlen_k": 131},
    "alibi, softcap": {"alibi": "b", "softcap": 2.0},
    "mask, bias, dropout": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2, "head_dim": 128},
    "all but a bias": {"mask": "k", "alibi": "b", "softcap": 3.0, "dropout_p": 0.2, "sink": True,
                       "causal": True, "dtype": torch.float16},
    "soft cap, head_dim 256": {"softcap": 2.0, "causal": True, "head_dim": 256},
    "soft cap that no logit comes near": {"softcap": 8.0, "dropout_p": 0.3},
    "soft cap that no logit comes near, head_dim 256": {"softcap": 8.0, "mask": "bhqk",
                                                        "head_dim": 256},
    "mask, bias, dropout, head_dim 192": {"mask": "bhqk", "bias": "hqk", "dropout_p": 0.2,
                                          "head_dim": 192},
    "all with a bias in float32, head_dim 256": {
        "mask": "bhqk", "bias": "hqk", "cast": torch.float32, "alibi": "b", "dropout_p": 0.2,
        "seqlen_k": 132, "head_dim": 256},
}  # fmt: skip
HOPPER_CHOSEN = HOPPER if os.environ.get("ATTN_EXT_PTX_ALL") else seen.sample(HOPPER, 1)


@needs_nvrtc
@pytest.mark.parametrize("name", sorted(HOPPER_CHOSEN))
def test_the_backward_of_hopper_computes_what_it_should(name):
    """The same of the backward's kernels: a stage too small for its bits, a bias read as other
    words than those that were copied."""
    options = dict(SIZES, head_dim=64) | HOPPER[name]
    cast = options.pop("cast", None)
    call = random_call(3, **options)
    if cast is not None:
        call = call._replace(bias=call.bias.to(cast))
    with driver(90) as fake:
        kernels = Kernels()
        kernels.sm90 = True
        check_call(call, kernels, grads=True)
        kinds = ("backward_features", "backward_dq_features", "backward_dkdv_features")
        asked = [n for n, _ in fake.compiled if any(f"::sm90::{kind}<" in n for kind in kinds)]
        assert len(asked) == (2 if call.q.shape[-1] > 128 else 1)
        assert not any("any" in sources.flags_of(each, CSRC) for each in asked)


@needs_nvrtc
@pytest.mark.parametrize(("capability", "head_dim"), [(80, 32), (90, 64)])
def test_parts_as_they_are_compiled(capability, head_dim):
    """O or a gradient that the kernels of a part store in 16 bits, which the emulator's, compiled
    for any feature, do not show; a frame that counts for those alone."""
    call = random_call(3, **{**SIZES, "seqlen_q": 70, "seqlen_k": 90, "head_dim": head_dim},
                       window=(60, 9))  # fmt: skip
    frame = torch.tensor([[3, 1, 40, 21, 190, 230]], dtype=torch.int32)
    call = call._replace(frame=frame)
    shape = call.q.shape[:3]
    dout, delta = torch.randn(*shape, call.v.shape[-1]).bfloat16(), torch.randn(shape)
    with driver(capability) as fake:
        kernels = Kernels()
        kernels.sm90 = capability == 90
        kernels._devices[0] = (1, kernels.sm90)  # one multiprocessor: the keys are not shared out
        out, sums = kernels.forward_partial(call)
        grads = kernels.backward_partial(call, dout, delta, sums, needs_of(call))
        assert (
            set(features_in(fake)) == set(features_in(fake, "backward_features")) == {"frame part"}
        )
    wide = call._replace(**{name: getattr(call, name).float() for name in ("q", "k", "v")})
    want, want_sums = shards.forward_partial(wide)
    exact = shards.backward_partial(wide, dout.float(), delta, want_sums, needs_of(call))
    for got, x in zip((out, *grads[:3]), (want, *exact[:3]), strict=True):
        assert got.dtype == torch.float32 and relative(got, x) <= BF16_WEIGHTS
        assert not torch.equal(got, got.bfloat16().float())
