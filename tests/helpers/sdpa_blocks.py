"""A small attention, run in a block of replace_sdpa with backward() inside or after it."""

import pytest
import torch
import torch.nn.functional as F

import attn_ext
from attn_ext.integrations import sdpa, sdpa_scopes


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    """Counts from zero; no block of this thread outlives its test."""
    sdpa.reset()
    yield
    assert torch._C._len_torch_function_stack() == 0
    assert sdpa_scopes._own().entries == ()


def attend(x, dropout_p=0.4):
    return F.scaled_dot_product_attention(x * 2, x.sin(), x, dropout_p=dropout_p)


def leaf():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def finish(y, leaves, by):
    """Gradients of y by one of torch's ways to ask for them."""
    loss = y.square().sum()
    if by == "autograd.grad":
        return torch.autograd.grad(loss, leaves)
    if by == "autograd.backward":
        torch.autograd.backward([loss])
    else:
        loss.backward()
    return [x.grad for x in leaves]


def run(model, place="inside", by="backward", make=leaf):
    """[output, gradient] of model(x) run in a block, with backward() inside or after it."""
    x = make()
    torch.manual_seed(11)
    with attn_ext.replace_sdpa(strict=True):
        y = model(x * 1)
        if place == "inside":
            grads = finish(y, [x], by)
    if place == "after":
        grads = finish(y, [x], by)
    return [y.detach(), *grads]


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def all_served(calls):
    """Every one of `calls` calls by attn_ext."""
    assert sdpa.report() == ({"cpu": calls}, {}, {})


def layers(x, dropout_p=0.4):
    return attend(attend(x, dropout_p), dropout_p)


class RecomputePart(torch.autograd.Function):
    """A recomputation, as reversible networks do it, of any function without dropout."""

    @staticmethod
    def forward(ctx, x, part):
        ctx.save_for_backward(x)
        ctx.part = part
        return part(x)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.part(x), x, dout)[0], None
