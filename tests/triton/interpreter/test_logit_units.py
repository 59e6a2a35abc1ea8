"""Which units the forward's softmax takes logits in, and how masks and biases reach it, by the
Triton kernels, interpreted.
"""

import planted_triton
import pytest
import torch

import attn_ext
from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import dkdv, dq, fwd, logits, primitives
from attn_ext.triton_kernels.launch import attention


def coarse_call(dtype=torch.float32, bias_dtype=torch.float32, **options):
    """A call whose rows lie on either side of where logits count as coarse, some in both tiles."""
    sizes = {"batch": 1, "heads_q": 1, "seqlen_q": 20, "seqlen_k": 70, "head_dim": 16}
    call = random_call(7, dtype=dtype, bias="hqk", **sizes, **options)
    bias, least = call.bias.to(bias_dtype), torch.finfo(bias_dtype).min
    bias[:, :, 2] = least
    bias[:, :, 3], bias[:, :, 4] = -1e9, -1e8
    bias[:, :, 5], bias[:, :, 5, 40:] = least, -1e9
    bias[:, :, 6, :40] = least
    bias[:, :, 7, :40], bias[:, :, 8] = -torch.inf, -torch.inf
    bias[:, :, 9] = 1e9
    bias[:, :, 10, :33], bias[:, :, 10, 33:] = 5.36e8, 5.37e8
    bias[:, :, 11], bias[:, :, 12] = -(2.0**29), -(2.0**29) + 40
    bias[:, :, 13, ::2] = -1e7
    return call._replace(bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_coarse_logits(dtype):
    """A base that times log2(e) is infinite, or has lost what its row's logits differ by; a row
    whose base comes from the other side in a later tile."""
    bias_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    check_call(coarse_call(dtype, bias_dtype), "triton", grads=False)


def test_statistics_of_coarse_rows():
    """A distance in the other base that entropy takes; a sink beside the least number."""
    check_call(coarse_call(stats=True, sink=True), "triton", grads=False)


def computed_again(monkeypatch) -> bool:
    """Whether rows that a mask of low numbers excludes are computed a second time, key by key."""
    taken, careful_rows = [], fwd.careful_rows

    def noted(*args):
        taken.append(1)
        return careful_rows(*args)

    monkeypatch.setattr(fwd, "careful_rows", noted)
    call = random_call(7, batch=1, heads_q=1, seqlen_q=20, seqlen_k=40, bias="hqk")
    for row, value in enumerate((torch.finfo(torch.float32).min, -1e30, -1e9, 1e9)):
        call.bias[:, :, row] = value
    call.bias[:, :, 5, :32], call.bias[:, :, 5, 32:] = 5.3e8, 7e8
    check_call(call, "triton", grads=False)
    return bool(taken)


def test_padding_takes_the_fast_way(monkeypatch):
    """A batch with padding that is many times slower: its rows are finfo.min, or -1e9."""
    assert not computed_again(monkeypatch)


# Each leaves NaN or infinities, which the careful way then mends
PLANTED = {
    "no row is coarse": ("coarse = tl.abs(m_safe) >= COARSE", "coarse = tl.abs(m_safe) < 0"),
    "the base in base 2 alone": ("base2 = m_safe * times", "base2 = m_safe * factor"),
    "what was summed shrinks as if no row were coarse": (
        "tl.where(coarse, row_max - m_safe, row_max * factor - base2)",
        "row_max * factor - base2",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_in_the_softmax_is_caught(name, monkeypatch, tmp_path):
    """The test above that passes whatever a coarse row is."""
    module = planted_triton.planted("softmax", *PLANTED[name], tmp_path)
    monkeypatch.setattr(fwd, "online_softmax", module.online_softmax)
    assert computed_again(monkeypatch)


MASKED = {"batch": 1, "heads_q": 2, "seqlen_q": 34, "head_dim": 16, "mask": "bqk"}


@pytest.mark.parametrize("mask", ["bqk", "bk"])
@pytest.mark.parametrize("seqlen_k", [66, 67])  # with 67 no words; both have a cut tile
def test_words_of_a_mask(seqlen_k, mask):
    """The bytes of a word in the other order; a word that reaches past the last key; rows past the
    last query that read outside of the mask."""
    call = random_call(3, seqlen_k=seqlen_k, **MASKED | {"mask": mask})
    words = bool(attention.Plan(call).flags & primitives.MASK_PAIRS.value)
    assert words == (seqlen_k == 66)
    check_call(call, "triton")


def test_a_mask_without_words():
    """Words at an odd address: a mask that is cut out of another one."""
    call = random_call(3, seqlen_k=66, **MASKED)
    whole = torch.zeros(*call.mask.shape[:3], 68, dtype=torch.bool)
    for first, words in ((1, False), (2, True)):
        mask = whole[..., first : first + 66].copy_(call.mask)
        cut = call._replace(mask=mask)
        assert bool(attention.Plan(cut).flags & primitives.MASK_PAIRS.value) == words
        check_call(cut, "triton", grads=False)


@pytest.mark.parametrize("mask", ["bqk", "bk"])
def test_planted_bug_in_the_words_is_caught(mask, monkeypatch, tmp_path):
    """A test above that no wrong byte fails: each key takes the byte of its neighbour."""
    bug = ("(tl.arange(0, c.shape[1]) & 1) * 8", "(1 - (tl.arange(0, c.shape[1]) & 1)) * 8")
    module = planted_triton.planted("logits", *bug, tmp_path)
    monkeypatch.setattr(logits, "visible_keys", module.visible_keys)
    with pytest.raises(AssertionError):
        check_call(random_call(3, seqlen_k=66, **MASKED | {"mask": mask}), "triton", grads=False)


CAPPED = {"batch": 1, "heads_q": 2, "seqlen_q": 34, "seqlen_k": 70, "head_dim": 16}


def bounded(call) -> bool:
    """Whether the softmax of a call looks for no maximum."""
    return bool(attention.Plan(call).forward_flags() & primitives.BOUNDED.value)


def capped_call(softcap=30.0, dtype=torch.bfloat16, **options):
    """A call with logits at both ends of the cap, in rows of their own, and between."""
    call = random_call(5, softcap=softcap, dtype=dtype, sink=True, **CAPPED | options)
    call.q[:, :, 3:6], call.k[:, :, ::2] = 40.0, 40.0
    call.q[:, :, 6:9] = -40.0
    return call


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": "bqk", "dropout_p": 0.2}])
def test_soft_cap_without_a_maximum(options):
    """A weight above 1 that is not divided out again; LSE of another base; rows without keys."""
    call = capped_call(50.0, **options)
    assert bounded(call)
    check_call(call, "triton")


def test_which_soft_caps_need_a_maximum():
    """Weights that leave float16 or float32; a largest logit that nobody has looked for."""
    assert not bounded(capped_call(60.0))
    assert not bounded(capped_call(dtype=torch.float16))
    assert not bounded(capped_call(dtype=torch.float32))
    for options in ({"stats": True}, {"bias": "hqk"}, {"alibi": True, "causal": True}):
        assert not bounded(capped_call(**options))
        check_call(capped_call(**options), "triton", grads=False)


def test_sinks_far_above_the_cap():
    """Weights that are all 0 beside the sink, since their sum and it have no maximum in common."""
    call = capped_call(50.0)
    call.q[..., 3:9, :] = 40.0
    for sink in (105.0, 120.0, -140.0):
        check_call(call._replace(sink=torch.full_like(call.sink, sink)), "triton", grads=False)
        rows = attn_ext.attention(
            *call[:3], softcap=50.0, sink=torch.full_like(call.sink, sink), backend="triton"
        )
        assert (rows[..., 3:9, :] != 0).all()


def test_parts_that_are_finite_have_a_finite_sum():
    """A split whose parts are joined by a maximum that none of them looked for."""
    call = random_call(
        5, softcap=50.0, dtype=torch.bfloat16, batch=1, heads_q=2, head_dim=16, seqlen_q=1,
        seqlen_k=256, cache_seqlens=[256], num_splits=4,
    )  # fmt: skip
    call.q.fill_(40.0), call.k.fill_(40.0), call.v.fill_(5e14)
    assert bounded(call)
    check_call(call, "triton", grads=False)


def large_values():
    """A call with values that weights above 1 make infinite, all of one sign: no NaN of inf - inf
    tells of them."""
    call = capped_call()
    call.v.abs_().mul_(1e30)
    return call


def test_values_that_a_weight_makes_infinite():
    """An O of inf or NaN where the mean of finite values is finite."""
    check_call(large_values(), "triton", grads=False)


def test_planted_bug_in_what_overflows_is_caught(monkeypatch, tmp_path):
    """The test above that passes whatever the kernel looks for."""
    module = planted_triton.planted("softmax", "acc = acc * 0.0", "acc = acc * 1.0", tmp_path)
    monkeypatch.setattr(fwd, "again_count", module.again_count)
    with pytest.raises(AssertionError):
        check_call(large_values(), "triton", grads=False)


def alibi_call(dtype=torch.bfloat16, **options):
    """Whole tiles in front of the diagonal, one of which ends at the position of a query; slopes
    that count from a tile's first key and, in head 1, one that does not."""
    sizes = {"batch": 1, "heads_q": 2, "seqlen_q": 64, "seqlen_k": 95, "head_dim": 16}
    call = random_call(9, dtype=dtype, alibi=True, causal=True, **sizes | options)
    call.alibi_slopes[..., 0], call.alibi_slopes[..., 1] = 0.5, 1e6
    return call


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alibi_from_the_first_key_of_a_tile(dtype):
    """A row's own distance left out of its weights; digits that a steep slope leaves to nothing."""
    for options in ({}, {"stats": True}, {"mask": "bqk"}, {"seqlen_q": 9, "seqlens_q": [9, 40]}):
        call = alibi_call(dtype, **options)
        plan = attention.Plan(call)
        assert plan.forward_flags() & plan.backward_flags() & primitives.RELATIVE.value
        check_call(call, "triton")
        check_call(call._replace(deterministic=True), "triton")
    plan = attention.Plan(alibi_call(torch.float32))  # of which near keys would lose digits
    assert not (plan.forward_flags() | plan.backward_flags()) & primitives.RELATIVE.value


def test_where_the_keys_of_alibi_count_from_their_tile(monkeypatch):
    """dK and dV on sm_80 at 128 columns with 3.40 instructions a product, where whole ones take
    3.19; on sm_90 the other way round with 3.93 for 3.62."""
    plan = attention.Plan(alibi_call())
    for name, warps, expected in (("sm_80", 8, False), ("sm_80", 4, True), ("sm_90", 8, True)):
        monkeypatch.setattr(attention, "architecture", lambda _, name=name: name)
        flags = plan.key_flags(configs.Tile(32, 128, warps, 2))
        assert bool(flags & primitives.RELATIVE.value) == expected


OF_ALIBI = {
    "a row's distance is not in its weights": (
        "softmax", "online_softmax", "base += behind", "base += 0 * behind"
    ),
    "steep slopes count from a tile's first key": (
        "logits", "is_steep", "<= STEEP) == 0", "<= STEEP) == 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_ALIBI)
def test_planted_bug_in_alibi_is_caught(name, monkeypatch, tmp_path):
    """The test above that any distance passes."""
    kernels, function, before, after = OF_ALIBI[name]
    module = planted_triton.planted(kernels, before, after, tmp_path)
    monkeypatch.setattr(fwd, function, getattr(module, function))
    with pytest.raises(AssertionError):
        check_call(alibi_call(), "triton", grads=False)


OF_ALIBI_BACKWARD = {
    "a row's distance is not in its weights": (
        "scores", "tile_probabilities", "lse += behind", "lse += 0 * behind"
    ),
    "steep slopes count from a tile's first key": (
        "logits", "is_steep", "<= STEEP) == 0", "<= STEEP) == 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernels", [dkdv, dq])
@pytest.mark.parametrize("name", OF_ALIBI_BACKWARD)
def test_planted_bug_in_the_backward_of_alibi_is_caught(kernels, name, monkeypatch, tmp_path):
    """The test above whose gradients any distance passes, of keys or of queries."""
    where, function, before, after = OF_ALIBI_BACKWARD[name]
    module = planted_triton.planted(where, before, after, tmp_path)
    monkeypatch.setattr(kernels, function, getattr(module, function))
    with pytest.raises(AssertionError):
        check_call(alibi_call(deterministic=True), "triton")
