"""Masks and biases that the backward and a forward with dropout load as words of 32 bits, and P by
a multiply-add of a logit in the forward's units, by the Triton kernels, interpreted.
"""

from unittest import mock

import planted_triton
import pytest
import torch

from attn_ext.testing import check_call, needs_of, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import dq, logits, primitives
from attn_ext.triton_kernels.launch import attention, backward

# Whole tiles of keys and queries, and cut ones of both
SIZES = {"batch": 1, "heads_q": 2, "seqlen_q": 66, "seqlen_k": 68, "head_dim": 16}
CASES = {
    "mask, in one kernel": {"mask": "bqk"},
    "mask, in two": {"mask": "bqk", "deterministic": True},
    "bias": {"bias": "hqk", "dtype": torch.bfloat16},
    "bias of float16": {"bias": "hqk", "dtype": torch.float16},
    "both, with dropout": {
        "mask": "bqk", "bias": "hqk", "dropout_p": 0.2, "dtype": torch.bfloat16,
    },
    "an odd length": {"mask": "bqk", "seqlens_q": [33, 7], "seqlens_k": [67, 68]},
    "bias, beside a mask of keys": {"mask": "bk", "bias": "hqk", "dtype": torch.bfloat16},
    "a sum of gradients of the bias": {"bias": "qk", "batch": 2, "dtype": torch.bfloat16},
}  # fmt: skip


def words(call) -> bool:
    """Whether the backward loads words."""
    return bool(attention.Plan(call).backward_flags() & primitives.KEY_WORDS.value)


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_words(name):
    """A byte or half of a word at another key than its own, in S or in its transpose; a word that
    reaches past the last key; a row past the last query."""
    options = dict(CASES[name])
    if "seqlens_k" in options:
        options["batch"] = 2
    call = random_call(3, **SIZES | options)
    assert words(call)
    check_call(call, "triton")


@pytest.mark.parametrize("bias", ["hqk", "qk", "hk", "hq"])
def test_gradients_of_a_bias_of_other_orders(bias):
    """dbias of float32 biases, which are no words: in the keys' own order, and in that of dropout,
    whole tiles and cut ones, of each pair and summed up."""
    for options in ({}, {"dropout_p": 0.2}):
        call = random_call(5, **SIZES | {"bias": bias} | options)
        assert not words(call)
        check_call(call, "triton")


def forward_words(call, loads=0) -> bool:
    """Whether the forward loads words by a tile of these loads."""
    tile = configs.INTERPRETED._replace(loads=loads)
    return bool(attention.Plan(call).query_flags(tile) & primitives.KEY_WORDS.value)


FORWARD = {
    "a mask": {"mask": "bqk"},
    "a mask and a bias": {"mask": "bqk", "bias": "hqk", "dtype": torch.bfloat16},
    "a mask, and a bias of float32": {"mask": "bqk", "bias": "hqk"},
    "a bias, and a mask of keys": {"mask": "bk", "bias": "hqk", "dtype": torch.float16},
    "sigmoid weights": {"mask": "bqk", "sigmoid_bias": -1.0},
    "rows that see no key, and NaN": {"mask": "bqk", "window": (3, 0)},
}


def forward_call(name):
    """A call with dropout whose forward loads words; NaN at a key that the mask hides makes it take
    the careful way, too."""
    options = dict(FORWARD[name])
    sigmoid = options.pop("sigmoid_bias", None)
    call = random_call(3, dropout_p=0.3, **SIZES | options)
    if call.bias is not None and call.bias.dtype == torch.float32:
        # whose halves are numbers of float16: of others the careful way would make good
        call.bias.copy_(call.bias.bfloat16())
    if sigmoid is not None:
        call = call._replace(normalizer="sigmoid", sigmoid_bias=sigmoid)
    if "NaN" in name:
        call.mask[..., 20] = False
        call.v[:, :, 20] = torch.nan
    return call


@pytest.mark.parametrize("name", FORWARD)
def test_forward_by_words(name):
    """With dropout: a byte or half of a word at another key than its own, in whole tiles and cut
    ones; a float32 bias in the keys' own order; one key of the careful way looked up in a word."""
    call = forward_call(name)
    assert forward_words(call)
    check_call(call, "triton", grads=False)


def test_which_forward_loads_words():
    """Words in an order of keys that is not theirs, or of terms that have none."""
    call = forward_call("a mask")
    assert not forward_words(call, loads=1)
    assert not forward_words(call._replace(dropout_p=0.0))
    for options in ({"mask": "bk"}, {"bias": "hqk"}, {"mask": "bqk", "seqlen_k": 66}):
        assert not forward_words(random_call(3, dropout_p=0.3, **SIZES | options))


PLANTED_FORWARD = {
    "another byte": ("visible_keys", "<< (place * 8)", "<< ((place ^ 1) * 8)", "a mask"),
    "words as they lie": (
        "score_words", "tl.permute(words, [0, 1, 3, 2, 4])",
        "tl.reshape(words, [M, N // 16, 4 // KEYS, 4, 1])", "a mask and a bias",
    ),
    "a bias of float32 as words": (
        "bias_tile", "HALVES: tl.constexpr = terms.bias.dtype.element_ty.primitive_bitwidth == 16",
        "HALVES: tl.constexpr = True", "a mask, and a bias of float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_FORWARD)
def test_planted_bug_in_the_words_of_the_forward_is_caught(name, monkeypatch, tmp_path):
    """The test above that no wrong word fails."""
    function, before, after, case = PLANTED_FORWARD[name]
    module = planted_triton.planted("logits", before, after, tmp_path)
    monkeypatch.setattr(logits, function, getattr(module, function))
    with pytest.raises(AssertionError):
        check_call(forward_call(case), "triton", grads=False)


def test_terms_without_words():
    """Words at an address that is no multiple of four; a length that is none; a bias of float32."""
    call = random_call(3, **SIZES | {"mask": "bqk"})
    whole = torch.zeros(*call.mask.shape[:3], 76, dtype=torch.bool)
    for first, expected in ((2, False), (4, True)):
        mask = whole[..., first : first + 68].copy_(call.mask)
        cut = call._replace(mask=mask)
        assert words(cut) == expected
        check_call(cut, "triton")
    for options in ({"mask": "bqk", "seqlen_k": 66}, {"bias": "hqk"}, {"mask": "bk"}):
        call = random_call(3, **SIZES | options)
        assert not words(call)
        check_call(call, "triton")


PLANTED = {
    "another byte": ("visible_keys", "<< (place * 8)", "<< ((place ^ 1) * 8)", "mask, in two"),
    "another half": ("bias_tile", "place == 0, words << 16", "place != 0, words << 16", "bias"),
    "rows of S^T as they lie": (
        "score_words", "(n & 1) * 2 + ((n & 8) >> 3)", "n & 3", "mask, in one kernel"
    ),
    "columns of S as they lie": (
        "score_words", "((n & 8) >> 2) + (n & 1)", "n & 3", "mask, in two"
    ),
    "words of S as they lie": (
        "score_words", "tl.permute(words, [0, 1, 3, 2, 4])",
        "tl.reshape(words, [M, N // 16, 4 // KEYS, 4, 1])", "bias",
    ),
    "pairs of a mask of keys": (
        "visible_keys", " and not (KEY_WORDS & FLAGS)", "", "bias, beside a mask of keys"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_in_the_words_is_caught(name, monkeypatch, tmp_path):
    """The test above that no wrong word fails."""
    function, before, after, case = PLANTED[name]
    module = planted_triton.planted("logits", before, after, tmp_path)
    monkeypatch.setattr(logits, function, getattr(module, function))
    with pytest.raises(AssertionError):
        check_call(random_call(3, **SIZES | CASES[case]), "triton")


PLANTED_DBIAS = {
    "keys as threads hold them": ("[1, 3, 0, 2, 5, 4, 6]", "[1, 3, 0, 2, 4, 5, 6]", "bias"),
    "rows eight apart": ("8 * tl.arange(0, 2)", "1 * tl.arange(0, 2)", "bias"),
    "the last row": ("i_first + r < seqlen_q", "i_first + r < seqlen_q - 1", "bias"),
    "a store where one adds": (
        "if DBIAS_STORE & FLAGS:\n            tl.store", "if True:\n            tl.store",
        "a sum of gradients of the bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_DBIAS)
def test_planted_bug_in_the_gradient_of_a_bias_is_caught(name, monkeypatch, tmp_path):
    """The tests above that look at cut tiles of dbias alone."""
    before, after, case = PLANTED_DBIAS[name]
    module = planted_triton.planted("scores", before, after, tmp_path)
    monkeypatch.setattr(dq, "add_whole_dbias", module.add_whole_dbias)
    with pytest.raises(AssertionError):
        check_call(random_call(3, **SIZES | CASES[case]), "triton")


def rows_of_large_biases(bias="hqk"):
    """Rows whose logits are the largest and the least number, and infinite, beside others; dbias of
    each pair is stored, or with a bias of "qk" added up."""
    call = random_call(7, bias=bias, **SIZES | {"dtype": torch.bfloat16})
    largest = torch.finfo(torch.bfloat16).max
    call.bias[:, :, 2], call.bias[:, :, 3] = -largest, largest
    call.bias[:, :, 4, :40], call.bias[:, :, 5, 3] = -largest, largest
    call.bias[:, :, 6, ::2], call.bias[:, :, 7] = -torch.inf, -torch.inf
    call.bias[:, :, 8, 40:] = -torch.inf
    call.k[:, :, 45] = torch.nan  # which only row 8 does not see
    return call


@pytest.mark.parametrize("bias", ["hqk", "qk"])
def test_biases_of_any_size(bias):
    """A base-2 logit that overflows and makes NaN of a bias' gradient; 0 * NaN of an excluded pair
    in it, in a row of NaN and in others."""
    call = rows_of_large_biases(bias)
    assert attention.Plan(call).backward_flags() & primitives.NATURAL.value
    assert needs_of(call).bias
    check_call(call, "triton")
    call.bias[..., 45] = -torch.inf  # which no row sees: no row has a NaN
    call.v[:, :, 45] = torch.nan
    check_call(call, "triton")
    call.k[:, :, 45], call.v[:, :, 45] = 1.0, 1.0
    check_call(call, "triton")


def gradient_of_the_largest() -> torch.Tensor:
    """dbias, summed over heads, of a row whose logits are all the largest number."""
    call = random_call(7, bias="qk", **SIZES | {"dtype": torch.bfloat16})
    call.bias[..., 3, :] = torch.finfo(torch.bfloat16).max
    out, lse, *_ = attention.forward(call)
    grads = backward.backward(call, torch.ones_like(out), out, lse, None, needs_of(call))
    return grads.bias[..., 3, :]


def test_a_row_of_the_largest_number_has_a_gradient():
    """inf - inf where the logit overflows in base 2 and its row, a far one, has no LSE here."""
    assert gradient_of_the_largest().isfinite().all()


def dq_of_another_gradient(monkeypatch, folder):
    module = planted_triton.planted("scores", "tl.where(p > 0, ds", "tl.where(p != 0, ds", folder)
    monkeypatch.setattr(dq, "score_gradient", module.score_gradient)


def dq_with(before, after):
    """What replaces the kernel of dQ by one with this bug."""

    def plant(monkeypatch, folder):
        module = planted_triton.planted("dq", before, after, folder)
        monkeypatch.setattr(backward, "dq_kernel", module.dq_kernel)

    return plant


PLANTED_CHECKS = {
    "NaN of an excluded pair is added": ("qk", dq_of_another_gradient),
    "a row of NaN has a gradient of 0": ("qk", dq_with("lost > 0", "lost > BLOCK_M")),
    "NaN of an excluded pair stays": (
        "hqk",
        dq_with(
            "if DBIAS_STORE & FLAGS:\n            add_dbias", "if False:\n            add_dbias"
        ),
    ),
}


@pytest.mark.parametrize("name", PLANTED_CHECKS)
def test_planted_bug_in_what_a_gradient_checks_is_caught(name, monkeypatch, tmp_path):
    """The test above that looks at rows without any NaN alone, or at none."""
    bias, plant = PLANTED_CHECKS[name]
    plant(monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        test_biases_of_any_size(bias)


PLANTED_CLEARS = {
    "another byte": ("functions", "only_seen", "place * 8 + 7", "(place ^ 1) * 8 + 7"),
    "a carry lost": ("functions", "byte_signs", " | words", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_CLEARS)
def test_planted_bug_in_what_a_mask_clears_is_caught(name, monkeypatch, tmp_path):
    """The test above without a kernel of dQ, or of a mask that holds no other byte than 0 and 1."""
    module, function, before, after = PLANTED_CLEARS[name]
    planted = planted_triton.planted(module, before, after, tmp_path)
    monkeypatch.setattr(dq, function, getattr(planted, function))
    with pytest.raises(AssertionError):
        check_call(masked_by_any_byte(), "triton")


def masked_by_any_byte():
    """A call whose mask has other bytes than 1 where a query sees a key."""
    call = random_call(3, **SIZES | CASES["mask, in two"] | {"dtype": torch.bfloat16})
    raw = call.mask.view(torch.uint8)
    raw *= torch.tensor([1, 2, 128, 255], dtype=torch.uint8).repeat(17)
    return call


CLEARED = {
    "V, with dropout": {"dtype": torch.float16, "dropout_p": 0.2, "seqlen_q": 64},
    "K": {"dtype": torch.bfloat16, "seqlen_q": 18, "seqlen_k": 36},
    "nothing, odd lengths": {"dtype": torch.bfloat16, "seqlens_q": [33, 7], "seqlens_k": [67, 68]},
}


def cleared(name):
    """A call in 16 bits whose dQ alone is cleared by the mask, with NaN at a key that it hides."""
    options = SIZES | {"heads_q": 1, "mask": "bqk", "deterministic": True} | CLEARED[name]
    options["batch"] = len(options.get("seqlens_q", [0]))
    call = random_call(9, **options)
    call.mask[..., 20], call.mask[..., 3, :] = False, False
    if name[0] in "KV":
        (call.k if name[0] == "K" else call.v)[:, :, 20] = torch.nan
    return call


@pytest.mark.parametrize("name", CLEARED)
def test_what_a_mask_clears(name):
    """NaN of a masked pair in dP or in dS K; dS of a row without keys; the last, cut word."""
    call = cleared(name)
    assert words(call)
    check_call(call, "triton")


def test_planted_bug_in_the_careful_way_of_what_a_mask_clears(monkeypatch, tmp_path):
    """The test above whose NaN no program meets: one that leaves the mask out there, too."""
    before = "careful_flags(FLAGS),\n        )"
    module = planted_triton.planted(
        "dq", before, before.replace("careful_flags(FLAGS)", "without_mask(careful_flags(FLAGS))"),
        tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(backward, "dq_kernel", module.dq_kernel)
    with pytest.raises(AssertionError):
        check_call(cleared("K"), "triton")


def test_a_gradient_with_rows_far_apart_has_wide_offsets():
    """Offsets of 32 bits in a tile of dbias whose rows are 2^23 elements apart, where the bias
    itself is expanded, with strides of 0."""
    call = random_call(3, **SIZES | {"bias": "hqk", "dtype": torch.bfloat16})
    call = call._replace(bias=call.bias[:, :, :1, :1].expand_as(call.bias))
    for apart, expected in ((1 << 23, primitives.WIDE.value), ((1 << 23) - 1, 0)):
        plan = attention.Plan(call)
        plan.run = mock.Mock()
        steps = (1 << 40, 1 << 32, apart, 1)
        dbias = torch.empty_strided(plan.sizes, steps, device="meta")
        backward.Backward.queries(mock.MagicMock(plan=plan), None, dbias)
        assert plan.run.call_args.args[-1] & primitives.WIDE.value == expected


def test_a_mask_of_any_byte():
    """A byte of a bool tensor that another library wrote, whose lowest bit alone is looked at, or
    that carries into its neighbour."""
    check_call(masked_by_any_byte(), "triton")


def test_planted_bug_in_far_rows_is_caught(monkeypatch, tmp_path):
    """The test above that looks at another row."""
    module = planted_triton.planted("scores", ' | (lse == float("inf"))', "", tmp_path)
    monkeypatch.setattr(dq, "tile_probabilities", module.tile_probabilities)
    assert not gradient_of_the_largest().isfinite().all()
