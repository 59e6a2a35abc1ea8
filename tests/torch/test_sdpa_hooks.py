"""Attention in a hook that runs in backward() belongs to the block of replace_sdpa in which the
node of the hook was made.

Calls are counted: none may be torch's, unless a warning or an error says so.
"""

import contextlib
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from sdpa_blocks import (
    RecomputePart,
    all_served,
    attend,
    leaf,
    nothing_stays_behind,  # noqa: F401  a fixture of all tests here
    run,
)
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext.integrations import sdpa, sdpa_scopes


@pytest.mark.parametrize("place", ["inside", "after"])
def test_hooks_of_tensors_and_nodes(place):
    """Attention in a hook, which runs in backward() under the node of its tensor."""
    x, seen = leaf(), []
    with attn_ext.replace_sdpa(strict=True):
        y = x * 2
        y.register_hook(lambda grad: seen.append(attend(grad, 0.0)))
        z = y.sin()
        z.grad_fn.register_hook(lambda *grads: seen.append(attend(y.detach(), 0.0)))
        if place == "inside":
            x.register_hook(lambda grad: seen.append(attend(grad, 0.0)))  # a leaf
            z.sum().backward()
    if place == "after":
        z.sum().backward()
    all_served(3 if place == "inside" else 2)


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("of", ["attention", "another node"])
@pytest.mark.parametrize("form", [None, True, False, "function"])
def test_hooks_in_a_part_that_is_recomputed(form, of, place):
    """A hook of attention's own output, or of a node that a recomputation made, left to torch in
    silence: neither node was made in the block as the others are."""
    ways = (torch.Tensor.register_hook, _hook_node, _hook_node_before, _hook_together)
    for register in ways:
        seen = []

        def part(x, register=register, seen=seen):
            y = attend(x, 0.0)
            y = y if of == "attention" else y * 3
            if y.requires_grad:
                register(y, lambda *grads: seen.append(attend(y.detach(), 0.0)))
            return y.sin()

        def model(x, part=part):
            if form is None:
                return part(x)
            if form == "function":
                return RecomputePart.apply(x, part)
            return checkpoint(part, x, use_reentrant=form)

        sdpa.reset()
        run(model, place)
        assert len(seen) == 1
        all_served(2 if form is None else 3)


def _hook_node(y, hook):
    y.grad_fn.register_hook(lambda into, out: hook())  # what a hook returns takes a place


def _hook_node_before(y, hook):
    y.grad_fn.register_prehook(lambda out: hook() and None)


def _hook_together(y, hook):
    torch.autograd.graph.register_multi_grad_hook((y,), hook)


def test_a_hook_of_a_part_outside_stays_torchs():
    """Its node is made in a recomputation, while backward() runs in a block."""

    def part(x):
        y = attend(x, 0.0) * 3
        if y.requires_grad:
            y.register_hook(lambda grad: attend(grad.detach(), 0.0))
        return y.sin()

    for wrap in (
        lambda x: checkpoint(part, x, use_reentrant=True),
        lambda x: checkpoint(part, x, use_reentrant=False),
        lambda x: RecomputePart.apply(x, part),
    ):
        y = wrap(leaf() * 1)
        with attn_ext.replace_sdpa(strict=True):
            y.sum().backward()
        assert sdpa.report() == ({}, {}, {})


def _hook_parameters(way, parameters, hook):
    """Register hook(parameter, gradient) by one of the ways to follow accumulation; returns what
    must live on."""
    nodes = []
    for p in parameters:
        if way == "post":
            p.register_post_accumulate_grad_hook(lambda p: hook(p, p.grad))
        elif way == "tensor":
            p.register_hook(lambda grad, p=p: hook(p, grad))
        else:
            nodes.append(p.view_as(p).grad_fn.next_functions[0][0])
            if way == "before":
                nodes[-1].register_prehook(lambda grads, p=p: hook(p, grads[0]))
            else:
                nodes[-1].register_hook(lambda _, grads, p=p: hook(p, grads[0]))
    return nodes


class Layer(torch.nn.Module):
    """Attention with parameters."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("way", ["post", "tensor", "before", "behind", "optimizer"])
def test_hooks_of_accumulation(way, place):
    """Hooks of parameters that call attention, and optimizers that step in backward(), beside
    recomputations: each gradient once, as by torch without a block, and nothing left to torch."""

    def train(form, block):
        torch.manual_seed(4)
        layers = torch.nn.ModuleList([Layer(), Layer()])
        parameters = list(layers.parameters())
        steps = {p: torch.optim.SGD([p], lr=0.1) for p in parameters}
        seen = []

        def hook(p, grad):
            seen.append(grad.detach().clone())
            if way == "optimizer":
                steps[p].step()
                steps[p].zero_grad()
            F.scaled_dot_product_attention(*[torch.ones(1, 2, 4, 8)] * 3)

        kept = _hook_parameters("post" if way == "optimizer" else way, parameters, hook)
        for _ in range(2):
            with attn_ext.replace_sdpa(strict=True) if block else contextlib.nullcontext():
                x = leaf()
                for layer in layers:
                    x = layer(x) if form is None else checkpoint(layer, x, use_reentrant=form)
                if place == "inside":
                    x.square().sum().backward()
            if place == "after":
                x.square().sum().backward()
        del kept
        return [*seen, *(p.detach() for p in parameters)]

    want = train(None, False)
    assert len(want) == 2 * 4 + 4
    for form in (None, True, False):
        sdpa.reset()
        got = train(form, True)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        # they belong to where backward() is called, which the reentrant form does in its block
        hooks = 8 if place == "inside" or form else 0
        all_served((4 if form is None else 8) + hooks)


@pytest.mark.parametrize("place", ["inside", "after"])
def test_hooks_of_saved_tensors(place):
    """A checkpoint of the user's own, by torch.autograd.graph.saved_tensors_hooks."""

    def model(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t + 0 * attend(t, 0)):
            return x.sin()

    run(model, place)
    all_served(1)


@pytest.mark.parametrize("open_still", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_a_hook_in_a_thread_that_did_not_build_the_graph(strict, open_still):
    """Attention of a hook that is left to torch in silence: nodes are numbered by the thread that
    makes them, so that the other thread cannot tell in which block this one was made."""
    x, caught = leaf(), []

    def backward():
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                y.sum().backward()
            caught.extend(str(w.message) for w in found)
        except NotImplementedError as error:
            caught.append(error)

    def in_another_thread():
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()

    with attn_ext.replace_sdpa(strict=strict):
        y = x * 1
        y.register_hook(lambda grad: attend(grad, 0.0))
        if open_still:
            in_another_thread()
    if not open_still:
        in_another_thread()
    (what,) = caught
    assert isinstance(what, NotImplementedError) == strict
    assert "backward() runs in another thread" in str(what)
    sdpa.reset()
    z = leaf() * 1  # a graph of no block, in the thread of the blocks: nothing is said
    z.register_hook(lambda grad: attend(grad, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z.sum().backward()
    assert sdpa.report().served == {}


def test_a_hook_of_a_block_that_is_forgotten():
    """A hook that goes to torch in silence, since 4,096 blocks have ended after its own."""
    x = leaf()
    with attn_ext.replace_sdpa(strict=True):
        y = x * 2
        y.register_hook(lambda grad: attend(grad, 0.0))
    for _ in range(sdpa_scopes._RANGES):
        with attn_ext.replace_sdpa(strict=True):
            x.sin()
    with pytest.raises(NotImplementedError, match="thousands of blocks after it"):
        y.sum().backward()
