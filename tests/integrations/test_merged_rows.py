"""Backward passes of other libraries as their ring attention calls them: each for some of the keys,
with O and LSE of rows that have seen all of them, against autograd of the whole in float64.
"""

import pytest
import torch
from closeness import FLOAT32, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from attn_ext.core.schema import Needs
from attn_ext.functional import dense
from attn_ext.integrations import xformers as xf
from attn_ext.integrations.flash_attn import passes
from attn_ext.ops import execute, parts

ROWS, FIRST = 9, 5  # queries; keys of the first part, of `keys` in all
# few, where some kernels of the CPU find a row's sum again, and more than one tile
KEYS = (8, 300)


class Whole:
    """q [2, S, H, D] and so on in float32, and their gradients through whole rows in float64."""

    def __init__(self, keys: int, scale: float = 0.4):
        generator = torch.Generator().manual_seed(keys)
        sizes = (ROWS, keys, keys, ROWS)
        self.q, self.k, self.v, self.dout = (
            torch.randn(2, n, 2, 8, generator=generator) for n in sizes
        )
        self.scale = scale
        leaves = [x.double().requires_grad_() for x in (self.q, self.k, self.v)]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        s = scale * q @ k.transpose(2, 3)
        lse = s.logsumexp(-1)
        out = (torch.exp(s - lse[..., None]) @ v).transpose(1, 2)
        self.grads = torch.autograd.grad(out, leaves, self.dout.double())
        self.out, self.lse = out.detach().float(), lse.detach().float()  # lse [2, H, S]

    def pieces(self):
        """(k, v) of the first keys and of the rest."""
        for keys in (slice(None, FIRST), slice(FIRST, None)):
            yield self.k[:, keys], self.v[:, keys]

    def check(self, found):
        """(dq, dk, dv) of each part of the keys."""
        dq, dk, dv = zip(*found, strict=True)
        whole = (sum(dq), torch.cat(dk, 1), torch.cat(dv, 1))
        for got, want in zip(whole, self.grads, strict=True):
            assert_close(got, want.float(), FLOAT32)


@pytest.mark.parametrize("keys", KEYS)
def test_flash_attn(keys):
    """Weights of a part that sum to 1, in the pass that diffusers and ring-flash-attention call."""
    whole, found = Whole(keys), []
    for k, v in whole.pieces():
        grads = [torch.empty_like(x) for x in (whole.q, k, v)]
        passes.backward(
            whole.dout, whole.q, k, v, whole.out, whole.lse, *grads, 0.0, whole.scale, False
        )
        found.append(grads)
    whole.check(found)


@pytest.mark.parametrize("keys", KEYS)
def test_flash_attn_packed(keys):
    """The same in the pass of packed sequences."""
    whole, found = Whole(keys), []
    q, dout, out = (x.flatten(0, 1) for x in (whole.q, whole.dout, whole.out))
    lse = whole.lse.transpose(0, 1).flatten(1)
    for k, v in whole.pieces():
        cu_q, cu_k = (torch.arange(3, dtype=torch.int32) * x.shape[1] for x in (whole.q, k))
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        passes.varlen_backward(
            dout, q, k, v, out, lse, *grads, cu_q, cu_k, ROWS, keys, 0.0, whole.scale, False
        )
        found.append([x.unflatten(0, (2, -1)) for x in grads])
    whole.check(found)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("groups", [False, True])
def test_xformers(keys, groups):
    """A forward that is run again, whose rows have not seen the other keys."""
    whole, found = Whole(keys), []
    shape = (2, 1) if groups else (2,)  # [B, M, G, H, K] or [B, M, H, K]
    q, dout, out = (x.unflatten(2, shape) for x in (whole.q, whole.dout, whole.out))
    lse = whole.lse.unflatten(1, shape)
    for part in whole.pieces():
        k, v = (x.unflatten(2, shape) for x in part)
        grads = xf.memory_efficient_attention_backward(
            dout, out, lse, q, k, v, None, 0.0, whole.scale
        )
        found.append([x.flatten(2, 3) if groups else x for x in grads])
    whole.check(found)


@pytest.mark.parametrize("keys", KEYS)
def test_far_rows_of_one_call(keys):
    """Rows whose LSE has lost their sum, as behind a mask of the smallest float: their gradients
    are too large by the number of keys unless it is found again.
    """
    q, k, v = (torch.randn(2, 2, n, 8) for n in (ROWS, keys, keys))
    dout = torch.randn(2, 2, ROWS, 8)
    mask = torch.full((ROWS, keys), torch.finfo(torch.float32).min)
    call = dense.dense_call(q, k, v, bias=mask, backend="cpu")
    out, lse, _, _ = torch.ops.attn_ext.forward(*call)
    dv = parts.backward_of_rows(call, dout, out, lse, Needs(q=True, k=True, v=True)).v
    assert_close(dv, dout.mean(2, keepdim=True).expand_as(v) * (ROWS / keys), FLOAT32)


@pytest.mark.parametrize(
    ("dtype", "place", "lower", "allowed"),
    [(torch.float32, 1e4, 5.0, 2e-3), (torch.float64, 300.0, 9.0, 1e-10)], ids=str,
)  # fmt: skip
def test_far_rows_of_two_shards(dtype, place, lower, allowed):
    """A shard that has nearly all the weight of rows far from 0 taken for all of them: its own LSE
    is within 1e-6 of theirs."""
    generator = torch.Generator().manual_seed(3)
    k, v, dout = (torch.randn(1, 1, n, 8, generator=generator).double() for n in (8, 8, 5))
    q = torch.zeros(1, 1, 5, 8).double().requires_grad_()
    bias = torch.full((5, 8), place).double()
    bias[:, 4:] -= lower
    v.requires_grad_()
    s = q @ k.transpose(2, 3) + bias
    lse = s.logsumexp(-1)
    out = torch.exp(s - lse[..., None]) @ v
    want_q, want_v = torch.autograd.grad(out, (q, v), dout)
    q, k, v, dout, out, lse, bias = (x.detach().to(dtype) for x in (q, k, v, dout, out, lse, bias))
    found = []
    for keys in (slice(None, 4), slice(4, None)):
        call = dense.dense_call(q, k[:, :, keys], v[:, :, keys], bias=bias[:, keys], scale=1.0)
        found.append(parts.backward_of_rows(call, dout, out, lse, Needs(q=True, k=True, v=True)))
    for got, want in ((sum(g.q for g in found), want_q), (found[0].v, want_v[:, :, :4])):
        assert float((got - want).norm()) <= allowed * float(want.norm())


def test_devices_whose_lse_is_not_read(monkeypatch):
    """LSE read back from a device, which waits for it and which a CUDA graph cannot: what takes the
    place of a GPU here has no values."""
    x = torch.randn(1, 2, 4, 8, device="meta")
    call, lse = dense.dense_call(x, x, x), torch.empty(1, 2, 4, device="meta")
    asked = []
    monkeypatch.setattr(execute, "backward", lambda *given: asked.append(given))
    needs = Needs(q=True, k=True, v=True)
    parts.backward_of_rows(call, x, x, lse, needs)
    ((dout, dlse, out, given_lse, *rest),) = asked
    assert dout is x and out is x and dlse is None and given_lse is lse and rest == [call, needs]


class Sums(TorchDispatchMode):
    """How many times rows of 8 columns are summed up."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sum.dim_IntList and args[0].shape[-1] == 8:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_delta_once():
    """rowsum(dO * O) computed for the caller and again for the kernels."""
    whole = Whole(8)
    grads = [torch.empty_like(x) for x in (whole.q, whole.k, whole.v)]
    with Sums() as sums:
        delta = passes.backward(
            whole.dout, whole.q, whole.k, whole.v, whole.out, whole.lse, *grads, 0.0, whole.scale,
            False,
        )  # fmt: skip
    assert sums.count == 1
    assert_close(delta, (whole.dout * whole.out).sum(-1).transpose(1, 2), FLOAT32)
