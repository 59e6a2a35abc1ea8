"""Shards of larger calls in the CUDA kernels, emulated: their places in the whole, and parts in
float32."""

import pytest
import torch
from closeness import BF16_WEIGHTS, SHARDS, relative
from shard_calls import FEATURES, check_not_rounded, check_shards, shard_of

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from attn_ext import _emulated
from attn_ext.backends import native_gpu, registry
from attn_ext.backends.native import point
from attn_ext.core.schema import Frame
from attn_ext.ops import parts
from attn_ext.testing import check_call, random_call

PLACES = ((11, 3, 40, 60), (5, 10, 100, 90), (0, 70, 99, 300))
HALF = {"dtype": torch.bfloat16, "allowed": BF16_WEIGHTS}


@pytest.fixture(autouse=True)
def machine():
    emulated = registry.get("emulated")
    emulated.set_mode(emulated.MODES[0], 1, smem_kib=163)
    yield
    emulated.set_mode("plain", 1)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("more", [{}, HALF, {**HALF, "deterministic": True}], ids=str)
def test_shards_merge_to_the_whole(name, more):
    """Positions that are those of the shard; a shard's own sums taken for the whole's; dropout's
    blocks of four keys where a shard begins within one."""
    check_shards("emulated", name, 90, slice(53, 80), 29, heads=(2, 1), **more)


@pytest.mark.parametrize("width", (64, 1))
def test_widths_of_shards(width):
    """Tiles behind the last key of a shard; shards of one key."""
    whole, rows = (150, slice(100, 147)) if width > 1 else (50, slice(40, 50))
    check_shards("emulated", "all", whole, rows, width, heads=(2, 1), **HALF)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("head_dim", (32, 160))
def test_frames_of_whole_calls(dtype, head_dim):
    """The kernels' places of a shard against the reference's: another diagonal, another length;
    the two kernels of wide heads, and those without atomic additions."""
    for at, place in enumerate(PLACES if head_dim == 32 else PLACES[1:2]):
        frame = torch.tensor([[3 + b, 1, *place] for b in range(2)], dtype=torch.int32)
        for options in FEATURES.values():
            call = random_call(
                seqlen_q=19, seqlen_k=33, heads_q=2, heads_k=1, dtype=dtype, head_dim=head_dim,
                deterministic=at == 1, **options,
            )  # fmt: skip
            check_call(call._replace(frame=frame), "emulated")


def test_far_rows_have_their_places():
    """Rows whose LSE is far from 0 that the backward looks for where the shard begins."""
    call = random_call(7, batch=1, seqlen_q=20, seqlen_k=40, bias="qk", window=(25, 3), alibi=True,
                       dropout_p=0.3)  # fmt: skip
    call.bias[:, :, 2:5] = -1e4
    frame = torch.tensor([[2, 1, 31, 10, 70, 60]], dtype=torch.int32)
    check_call(call._replace(frame=frame), "emulated")


def test_sequences_have_their_own_frames():
    """Packed sequences that all stand where the first one does."""
    for dtype in (torch.float32, torch.bfloat16):
        call = random_call(
            seqlens_q=[7, 0, 18], seqlens_k=[20, 3, 33], heads_q=2, causal=True, alibi="b",
            dropout_p=0.3, dtype=dtype,
        )  # fmt: skip
        frame = [Frame(4, 2, 5, 1, 50, 60), Frame(0, 2, 0, 0, 1, 9), Frame(1, 2, 30, 3, 70, 70)]
        check_call(call._replace(frame=torch.tensor(frame, dtype=torch.int32)), "emulated")


@pytest.mark.parametrize("paged", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_parts_of_a_cache(paged, dtype):
    """Split keys, whose windows count from the shard's first key; keys of NaN that are unused; O
    that the merge of the splits writes in 16 bits."""
    more = {"page_size": 16} if paged else {}
    call = random_call(
        batch=3, seqlen_q=3, seqlen_k=600, cache_seqlens=[0, 7, 600], heads_q=4, heads_k=2,
        window=(500, 0), alibi=True, dtype=dtype, **more,
    )  # fmt: skip
    frame = [Frame(b, 0, 897 - 10 * b, 300, 900 - 10 * b, 900 - 10 * b) for b in range(3)]
    call = call._replace(frame=torch.tensor(frame, dtype=torch.int32))
    out, sums = parts.forward_partial(call._replace(backend="emulated"))
    want, want_sums = parts.forward_partial(call._replace(backend="reference"))
    allowed = SHARDS[torch.float32] if dtype == torch.float32 else BF16_WEIGHTS
    assert out.dtype == torch.float32 and relative(out, want) <= allowed
    assert relative(sums.sum(-1), want_sums.sum(-1)) <= SHARDS[torch.float32]


@pytest.mark.parametrize("options", ({}, {"deterministic": True}, {"head_dim": 160}), ids=str)
def test_parts_are_not_rounded(options):
    """O, dQ, dK and dV of bfloat16 inputs that are rounded to bfloat16, or written as bfloat16;
    delta that is computed from the part."""
    call = random_call(seqlen_q=20, seqlen_k=70, dtype=torch.bfloat16, **options)
    check_not_rounded(call._replace(backend="emulated"), BF16_WEIGHTS)


def test_nan_of_parts_is_mended_in_float32():
    """Rows that are computed once more and written as bfloat16 between those in float32."""
    call = random_call(3, seqlen_q=70, seqlen_k=70, causal=True, dtype=torch.bfloat16)
    call.v[:, :, 40:] = torch.nan  # which no query before 40 sees
    got, want = (
        parts.forward_partial(call._replace(backend=name))[0][:, :, :40]
        for name in ("emulated", "reference")
    )
    assert relative(got, want) <= BF16_WEIGHTS


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dropout_keeps_the_same_weights(dtype):
    """A shard that drops other weights than the whole call: with V = identity its output says which
    are kept."""
    call = random_call(
        5, batch=2, heads_q=2, heads_k=1, seqlen_q=60, seqlen_k=60, head_dim=64, dropout_p=0.4,
        dtype=dtype,
    )._replace(backend="emulated")  # fmt: skip
    call.v[:] = torch.eye(60, 64).to(dtype)
    whole = torch.ops.attn_ext.forward(*call)[0] != 0
    for rows in (slice(0, 21), slice(21, 60)):
        for keys in (slice(0, 3), slice(3, 33), slice(33, 60)):
            part, _ = parts.forward_partial(shard_of(call, rows, keys))
            assert torch.equal((part != 0)[..., keys], whole[:, :, rows, keys])


def test_parts_need_one_backward_kernel():
    """Work that a part's backward leaves to others: delta, and rows far from 0."""
    call = random_call(batch=1, heads_q=2, heads_k=1, dtype=torch.bfloat16, head_dim=64)
    kernels = native_gpu.Kernels(_emulated, "cpu")
    names = [name for name, *_ in kernels.launches(call, True, (1, False, 163 << 10), part=True)]
    stems = [name.split("<")[0].rpartition("::")[2] for name in names]
    assert stems == ["clear_dq", "backward_features", "convert_dq_features"]


def test_frames_and_parts_are_features_of_their_own():
    """A kernel for plain calls that asks for a frame, or a part that plain kernels would round."""
    plain = random_call(dtype=torch.bfloat16, seqlen_q=64)
    framed = plain._replace(frame=torch.zeros(2, 6, dtype=torch.int32))
    kernels = native_gpu.Kernels(_emulated, "cpu")

    def kernel(call, part):
        out, lse = torch.empty_like(call.q), torch.empty(call.q.shape[:3])
        native = kernels._native(call, kernels._canonical(call), out, lse, part)
        point(native, o=out)
        return native.forward_kernel(1, True)

    assert kernel(plain, False) == "sm80 plain"
    assert kernel(plain, True) == kernel(framed, False) == "sm80 features"
