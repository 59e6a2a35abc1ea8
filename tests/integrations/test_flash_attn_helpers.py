"""flash_attn.layers.rotary and flash_attn.bert_padding as attn_ext serves them: against rotations
written as products of complex numbers.
"""

import pickle
import subprocess
import sys

import pytest
import torch
from closeness import ONE_SUM, assert_close

from attn_ext.integrations import flash_attn as fa
from attn_ext.integrations.flash_attn import kernels, passes, rotary
from attn_ext.integrations.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def angles(length, half):
    theta = torch.rand(length, half, dtype=torch.float64) * 6
    return theta.cos(), theta.sin()


def spun(x, cos, sin, at, interleaved):
    """x [..., S, H, D] turned by rows `at` [S] of the tables: pairs are complex numbers."""
    half = cos.shape[1]
    turn = torch.complex(cos, sin)[at][..., None, :]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        pairs = torch.complex(part[..., 0::2], part[..., 1::2]) * turn
        part = torch.stack((pairs.real, pairs.imag), dim=-1).flatten(-2)
    else:
        pairs = torch.complex(part[..., :half], part[..., half:]) * turn
        part = torch.cat((pairs.real, pairs.imag), dim=-1)
    return torch.cat((part, rest), dim=-1)


def backward_agrees(out, expected, leaf, theirs):
    """Values, and gradients with respect to two leaves."""
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, leaf, weight)
    (grad,) = torch.autograd.grad(expected, theirs, weight)
    torch.testing.assert_close(ours, grad)


@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rotary(interleaved):
    """Offsets of each sequence, packed sequences, the untouched rest, in place."""
    cos, sin = angles(20, 4)
    x = normal(2, 5, 3, 12)
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=torch.tensor([3, 9]))
    for b, start in enumerate((3, 9)):
        torch.testing.assert_close(
            out[b], spun(x[b], cos, sin, torch.arange(5) + start, interleaved)
        )
    flat = normal(12, 3, 12)  # two rows that belong to no sequence
    at = torch.cat((torch.arange(4), torch.arange(6)))
    expected = torch.cat((spun(flat[:10], cos, sin, at, interleaved), flat[10:]))
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    options = dict(cu_seqlens=bounds, max_seqlen=6)
    torch.testing.assert_close(
        rotary.apply_rotary_emb(flat, cos, sin, interleaved, **options), expected
    )
    packed = rotary.apply_rotary_emb(flat, cos, sin, interleaved, inplace=True, **options)
    assert packed is flat
    torch.testing.assert_close(flat, expected)
    tables = (cos[:5].expand(2, 5, 4), sin[:5].expand(2, 5, 4))
    torch.testing.assert_close(
        rotary.apply_rotary_emb_torch(x, *tables, interleaved),
        spun(x, cos, sin, torch.arange(5), interleaved),
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_in_place_with_gradients(interleaved):
    """A leaf that refuses to be changed; a gradient turned forwards; values turned along."""
    cos, sin = angles(20, 4)
    x = normal(2, 5, 3, 12)
    at = torch.arange(5) + 2
    leaf, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = rotary.apply_rotary_emb(leaf, cos, sin, interleaved, inplace=True, seqlen_offsets=2)
    assert torch.equal(leaf, out)
    backward_agrees(out, spun(theirs, cos, sin, at, interleaved), leaf, theirs)

    cos_k, sin_k = angles(20, 4)
    for tables in ((cos, sin), (cos, sin, cos_k, sin_k)):
        keys = tables[-2:]
        wide = normal(2, 5, 3, 4, 12)
        leaf, theirs = wide.clone().requires_grad_(), wide.clone().requires_grad_()
        out = rotary.apply_rotary_emb_qkv_(leaf, *tables, interleaved=interleaved, seqlen_offsets=2)
        q, k, v = theirs.unbind(2)
        q, k = spun(q, cos, sin, at, interleaved), spun(k, *keys, at, interleaved)
        backward_agrees(out, torch.stack((q, k, v), 2), leaf, theirs)
        leaf = wide.flatten(2, 3).clone()  # 8 query heads, 2 of keys, 2 of values
        out = rotary.apply_rotary_emb_qkv_(
            leaf, *tables, interleaved=interleaved, seqlen_offsets=2, num_heads_q=8
        )
        q, k, v = wide.flatten(2, 3).split([8, 2, 2], 2)
        q, k = spun(q, cos, sin, at, interleaved), spun(k, *keys, at, interleaved)
        assert out is leaf
        torch.testing.assert_close(leaf, torch.cat((q, k, v), 2))

    wide = normal(2, 5, 2, 4, 12)
    leaf, theirs = wide.clone().requires_grad_(), wide.clone().requires_grad_()
    starts = torch.tensor([4, 0])
    out = rotary.apply_rotary_emb_kv_(leaf, cos, sin, interleaved, starts)
    k, v = theirs.unbind(2)
    k = torch.stack(
        [spun(k[b], cos, sin, torch.arange(5) + starts[b], interleaved) for b in (0, 1)]
    )
    backward_agrees(out, torch.stack((k, v), 2), leaf, theirs)


@pytest.mark.parametrize("scale_base", [None, 16])
def test_rotary_embedding(scale_base):
    """Wrong frequencies, tables that do not grow, XPos factors that do not cancel."""
    module = rotary.RotaryEmbedding(8, base=100.0, scale_base=scale_base)
    module = pickle.loads(pickle.dumps(module))
    assert module.state_dict() == {}
    for length, offset in ((5, 0), (3, 20)):
        q, kv = normal(2, length, 3, 12), normal(2, length, 2, 3, 12)
        qkv = torch.stack((q, *kv.unbind(2)), 2)
        out_q, out_kv = module(q.clone(), kv.clone(), seqlen_offset=offset)
        torch.testing.assert_close(module(qkv, seqlen_offset=offset)[:, :, 0], out_q)
        torch.testing.assert_close(qkv[:, :, 1:], out_kv)
        late = module(q.clone(), kv.clone(), torch.tensor([offset, offset]), length + offset)
        torch.testing.assert_close(late[0], out_q)
        theta = torch.arange(30)[:, None] * 100.0 ** -(torch.arange(0, 8, 2) / 8)
        at = torch.arange(length) + offset
        cos, sin = theta.cos().double(), theta.sin().double()
        expected_q = spun(q, cos, sin, at, False)
        expected_k = spun(kv[:, :, 0], cos, sin, at, False)
        ours = torch.einsum("bihd,bjhd->bhij", out_q[..., :8], out_kv[:, :, 0, :, :8])
        theirs = torch.einsum("bihd,bjhd->bhij", expected_q[..., :8], expected_k[..., :8])
        if scale_base is not None:  # zeta^((i - j) / base) of each pair of elements
            zeta = ((torch.arange(0, 8, 2) + 3.2) / 11.2).repeat(2).double()
            power = (at[:, None] - at) / scale_base
            decay = zeta ** power[..., None].double()
            q8, k8 = expected_q[..., :8], expected_k[..., :8]
            theirs = torch.einsum("bihd,bjhd,ijd->bhij", q8, k8, decay)
        assert_close(ours, theirs, ONE_SUM)  # angles are float32
    assert module.half()(normal(1, 2, 3, 2, 8).half()).dtype == torch.float16


def test_bad_rotary_input():
    """Shapes that would rotate something else."""
    cos, sin = angles(4, 4)
    cases = (
        (lambda: rotary.apply_rotary_emb_qkv_(normal(1, 2, 2, 3, 8), cos, sin), "qkv must have"),
        (lambda: rotary.apply_rotary_emb_qkv_(normal(1, 2, 6, 8), cos, sin), "num_heads_q None"),
        (lambda: rotary.apply_rotary_emb_kv_(normal(1, 2, 3, 3, 8), cos, sin), "kv must have"),
        (lambda: rotary.apply_rotary_emb(normal(1, 5, 3, 8), cos, sin), "at least 5 rows"),
        (lambda: rotary.apply_rotary_emb(normal(1, 4, 3, 6), cos, sin), "at most head_dim / 2 = 3"),
    )
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()


def test_padding_round_trip_and_gradients():
    """Tokens at other places than they came from; a gradient lost at the padding."""
    x = normal(3, 5, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    packed, indices, cu, longest, used = unpad_input(x, mask, unused)
    assert cu.tolist() == [0, 4, 4, 9] and cu.dtype == torch.int32
    assert longest == 5 and isinstance(longest, int)
    assert used.tolist() == [3, 0, 5] and indices.tolist() == [0, 1, 2, 4, 10, 11, 12, 13, 14]
    back = pad_input(packed, indices, 3, 5)
    kept = (mask + unused).bool()
    assert torch.equal(back, torch.where(kept[..., None, None], x, 0.0))
    (grad,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(grad, kept[..., None, None].double().expand_as(x))
    assert torch.equal(index_first_axis(x, torch.tensor([2, 0])), x[[2, 0]])
    put = index_put_first_axis(x, torch.tensor([4, 0, 1]), 6)
    assert torch.equal(put[[4, 0, 1]], x) and put[[2, 3, 5]].abs().sum() == 0


def test_concatenated_sequences():
    """Lengths of several sequences in one row."""
    x = normal(2, 6, 3)
    in_length = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu, longest = unpad_input_for_concatenated_sequences(x, in_length)
    assert cu.tolist() == [0, 2, 5, 11] and longest == 6
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("options", [{}, dict(causal=True, softcap=5.0), dict(dropout_p=0.4)])
def test_one_pass(options):
    """The private passes that diffusers' context parallelism imports: gradients of another mask,
    LSE of a row without keys, a window on the wrong side.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, s, 2, 8, requires_grad=True) for s in (6, 4, 4))
    base = dict(dropout_p=0.0, softmax_scale=0.3, causal=False, softcap=0.0) | options
    torch.manual_seed(1)
    want, lse, _ = fa.flash_attn_func(q, k, v, **base, return_attn_probs=True)
    torch.manual_seed(1)
    out, own_lse, _, state = passes._flash_attn_forward(q, k, v, **base)
    assert torch.equal(out, want) and torch.equal(own_lse, lse)
    dout = torch.randn_like(out)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    delta = passes._flash_attn_backward(dout, q, k, v, out, lse, *grads, **base, rng_state=state)
    torch.testing.assert_close(tuple(grads), torch.autograd.grad(want, (q, k, v), dout))
    torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2).detach())


PASSES = [
    {},
    dict(causal=True, softcap=5.0, alibi_slopes=torch.tensor([0.1, 0.2])),
    dict(dropout_p=0.4),
    dict(window_size_left=1, window_size_right=1),
]


@pytest.mark.parametrize("options", PASSES)
def test_one_pass_of_packed_sequences(options):
    """The private passes that ring-flash-attention and Transformer Engine import, and flash-attn's
    extension under them: sequences mixed up, gradients of another dropout mask, an argument in
    another place than flash-attn has it.
    """
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 9], [0, 4, 6, 10]))
    lengths = (cu_q, cu_k, 6, 4)
    q, k, v = (torch.randn(s, h, 8, requires_grad=True) for s, h in ((9, 2), (10, 1), (10, 1)))
    base = dict(dropout_p=0.0, softmax_scale=0.3, causal=False, softcap=0.0) | options
    public = dict(base)
    sides = tuple(public.pop(f"window_size_{side}", -1) for side in ("left", "right"))
    weights = base["dropout_p"] > 0
    torch.manual_seed(1)
    want, lse, dmask = fa.flash_attn_varlen_func(
        q, k, v, *lengths, **public, window_size=sides, return_attn_probs=True
    )
    torch.manual_seed(1)
    found = passes.varlen_forward(q, k, v, *lengths, **base, return_softmax=weights)
    for mine, theirs in zip(found, (want, lse, dmask), strict=False):
        assert torch.equal(mine, theirs) and not mine.requires_grad
    out, state = found[0], found[3]
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(want, (q, k, v), dout)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    delta = passes.varlen_backward(
        dout, q, k, v, out, lse, *grads, *lengths, **base, rng_state=state
    )
    torch.testing.assert_close(tuple(grads), wanted)
    torch.testing.assert_close(delta, (dout * out).sum(-1).T)
    slopes, p = base.get("alibi_slopes"), base["dropout_p"]
    causal, cap = base["causal"], base["softcap"]
    target = torch.empty_like(out)
    torch.manual_seed(1)
    native = kernels.varlen_fwd(
        q, k, v, target, cu_q, cu_k, None, None, None, slopes, 6, 4, p, 0.3, False, causal, *sides,
        cap, weights, None,
    )  # fmt: skip
    assert native[0] is target and torch.equal(target, out) and torch.equal(native[1], lse)
    assert torch.equal(native[2], dmask)
    native = kernels.varlen_bwd(
        dout, q, k, v, out, lse, None, None, None, cu_q, cu_k, slopes, 6, 4, p, 0.3, False, causal,
        *sides, cap, False, None, state,
    )  # fmt: skip
    assert all(map(torch.equal, native, (*grads, delta)))


def test_native_functions_of_dense_calls_and_caches():
    """An argument of flash_attn_2_cuda's functions in another place than flash-attn has it."""
    q, k, v = (torch.randn(2, s, 2, 8) for s in (5, 7, 7))
    slopes = torch.tensor([0.3, 0.1])
    public = dict(softmax_scale=0.3, causal=True, window_size=(3, 0), softcap=4.0)
    x, y, z = (t.clone().requires_grad_() for t in (q, k, v))
    want = fa.flash_attn_func(x, y, z, **public, alibi_slopes=slopes)
    out, lse, _, _ = kernels.fwd(q, k, v, None, slopes, 0.0, 0.3, True, 3, 0, 4.0, False, None)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    *grads, delta = kernels.bwd(
        dout, q, k, v, out, lse, None, None, None, slopes, 0.0, 0.3, True, 3, 0, 4.0, True, None,
    )  # fmt: skip
    torch.testing.assert_close(tuple(grads), torch.autograd.grad(want, (x, y, z), dout))
    torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2))
    used = torch.tensor([4, 7], dtype=torch.int32)
    found = kernels.fwd_kvcache(
        q[:, :1], k, v, None, None, used, None, None, None, None, None, slopes, None, 0.3, True, 3,
        0, 4.0, True, 0,
    )  # fmt: skip
    cached = fa.flash_attn_with_kvcache(
        q[:, :1], k, v, cache_seqlens=used, **public, alibi_slopes=slopes, return_softmax_lse=True
    )
    assert all(map(torch.equal, found, cached))
    with pytest.raises(NotImplementedError, match="gen must be None"):
        kernels.fwd(q, k, v, None, None, 0.0, 0.3, True, -1, -1, 0.0, False, torch.Generator())


@pytest.mark.parametrize("in_pages", [False, True])
def test_used_keys_of_packed_sequences(in_pages):
    """Keys beyond seqused_k seen, or the used ones read from another sequence; an IndexError of k
    and v that do not fit."""
    torch.manual_seed(0)
    cu_q, used = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([3, 5], dtype=torch.int32)
    q, k, v = torch.randn(3, 2, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    cu_k = torch.tensor([0, 6, 12], dtype=torch.int32)
    rows, more = [0, 1, 2, 6, 7, 8, 9, 10], {}
    keys, values = k, v
    if in_pages:
        table = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
        more["block_table"] = table
        keys, values = (x.view(4, 3, 2, 8) for x in (k, v))
        rows = [3, 4, 5, 6, 7, 8, 9, 10]
    want, lse, _ = fa.flash_attn_varlen_func(
        q, k[rows], v[rows], cu_q, torch.tensor([0, 3, 8], dtype=torch.int32), 2, 5,
        return_attn_probs=True,
    )  # fmt: skip
    found = passes.varlen_forward(
        q, keys, values, cu_q, cu_k, 2, 6, 0.0, None, False, seqused_k=used, **more
    )
    assert torch.equal(found[0], want) and torch.equal(found[1], lse)
    if not in_pages:
        with pytest.raises(ValueError, match="seqused_k must be at most the lengths"):
            passes.varlen_forward(q, k, v, cu_q, cu_k, 2, 6, 0.0, None, False, seqused_k=used + 2)
        for keys, values, text in (
            (k, v[:5], "v must have k's (length 12|12 rows), got 5"),
            (torch.tensor(1.0), v, "k must have 3 dimensions"),
        ):
            packed = (q, keys, values, cu_q, cu_k, 2, 6, 0.0, None, False)
            for autocast in (False, True):
                with (
                    torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
                    pytest.raises(ValueError, match=text),
                ):
                    passes.varlen_forward(*packed, seqused_k=used)
        with pytest.raises(NotImplementedError, match="leftpad_k must be None"):
            passes.varlen_forward(q, k, v, cu_q, cu_k, 2, 6, 0.0, None, False, leftpad_k=used)
        with pytest.raises(ValueError, match="return_softmax must be False without dropout"):
            passes.varlen_forward(q, k, v, cu_q, cu_k, 2, 6, 0.0, None, False, return_softmax=True)


def test_diffusers_imports_the_stand_in():
    """diffusers' warning that flash_attn "failed to import" under install()."""
    pytest.importorskip("diffusers", reason="extra `integrations` is not installed")
    code = (
        "from attn_ext.integrations import flash_attn; assert flash_attn.install()\n"
        "from diffusers.models import attention_dispatch as d\n"
        "assert d.flash_attn_func is flash_attn.flash_attn_func\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "failed to import" not in done.stderr, done.stderr
