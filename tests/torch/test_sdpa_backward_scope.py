"""What runs in backward() belongs to the block of replace_sdpa in which its forward ran.

Each case is run twice from one seed under replace_sdpa, with and without recomputation, and must
give the same output and gradients to the last bit: with dropout, the forward of one kernel and the
recomputation of another would draw different masks.  Calls are counted: none may be torch's.
"""

import contextlib
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from closeness import QUOTIENT, assert_close
from sdpa_blocks import (
    all_served,
    attend,
    finish,
    layers,
    leaf,
    nothing_stays_behind,  # noqa: F401  a fixture of all tests here
    run,
    same,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import attn_ext
from attn_ext.integrations import sdpa, sdpa_scopes


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("by", ["backward", "autograd.backward", "autograd.grad"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [True, False])
def test_both_forms_of_checkpoint(reentrant, dropout_p, by, place):
    """A recomputation by torch's attention: CheckpointError, or silently another dropout mask."""
    if reentrant and by == "autograd.grad":
        by = "backward"  # torch refuses the other for this form

    def model(x):
        for _ in range(2):
            x = checkpoint(attend, x, dropout_p, use_reentrant=reentrant)
        return x

    want = run(lambda x: layers(x, dropout_p))
    sdpa.reset()
    same(run(model, place, by), want)
    all_served(4)


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_nested_checkpoints(outer, inner, place):
    """A recomputation within a recomputation that forgets where it came from."""

    def part(x):
        return checkpoint(attend, attend(x), use_reentrant=inner)

    want = run(layers)
    sdpa.reset()
    same(run(lambda x: checkpoint(part, x, use_reentrant=outer), place), want)
    served = sdpa.report()
    assert served.served["cpu"] >= 4 and not served.torch


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sequential(reentrant, place):
    """torch's own loop over parts."""

    class Attend(torch.nn.Module):
        def forward(self, x):
            return attend(x)

    parts = torch.nn.Sequential(*(Attend() for _ in range(4)))
    want = run(parts)
    sdpa.reset()
    same(run(lambda x: checkpoint_sequential(parts, 2, x, use_reentrant=reentrant), place), want)
    all_served(6)  # the last part is not recomputed


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("keep", [True, False])
def test_selective_checkpointing(keep, place):
    """A policy that keeps or recomputes attn_ext's operator, by name as for torch's."""

    def policy(context, op, *args, **kwargs):
        kept = keep and op == torch.ops.attn_ext.forward.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def model(x):
        return checkpoint(
            layers, x, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip

    want = run(layers)
    sdpa.reset()
    same(run(model, place), want)
    assert set(sdpa.report().served) == {"cpu"} and not sdpa.report().torch


def test_the_decorator_on_a_training_step():
    """backward() is a torch function that a mode sees, and runs with the mode off."""

    def step(model):
        @attn_ext.replace_sdpa(strict=True)
        def whole():
            x = leaf()
            torch.manual_seed(11)
            model(x * 1).square().sum().backward()
            return [x.grad]

        return whole()

    want = step(layers)
    sdpa.reset()
    same(step(lambda x: checkpoint(layers, x, use_reentrant=False)), want)
    all_served(4)


class Recompute(torch.autograd.Function):
    """What reversible networks do: nothing is kept but the input, and backward() runs it again."""

    @staticmethod
    def forward(ctx, x):
        ctx.state = torch.get_rng_state()
        ctx.save_for_backward(x)
        return attend(x)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), torch.random.fork_rng():
            torch.set_rng_state(ctx.state)
            x = x.detach().requires_grad_()
            return torch.autograd.grad(attend(x), x, dout)[0]


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("outer", [None, True, False])
def test_functions_that_recompute(outer, place):
    """A custom autograd.Function, alone and in a checkpoint of either form."""

    def model(x):
        if outer is None:
            return Recompute.apply(Recompute.apply(x))
        return checkpoint(
            lambda x: Recompute.apply(Recompute.apply(x)), x, use_reentrant=outer
        )  # fmt: skip

    want = run(layers)
    sdpa.reset()
    same(run(model, place), want)
    assert set(sdpa.report().served) == {"cpu"} and not sdpa.report().torch


def test_bodies_of_custom_operators():
    """torch.library.custom_op: its body and its backward are far from any mode."""

    @torch.library.custom_op("attn_ext_test::attend", mutates_args=())
    def attend_op(x: torch.Tensor) -> torch.Tensor:
        return attend(x, 0.0)

    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(attend(x, 0.0), x, dout)[0]

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    attend_op.register_autograd(backward, setup_context=keep)
    want = run(lambda x: layers(x, 0.0))
    for place in ("inside", "after"):
        sdpa.reset()
        same(run(lambda x: attend_op(attend_op(x)), place), want)
        all_served(4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_outside_stays_torchs(reentrant):
    """Two models at once: the one whose forward ran outside is recomputed by torch, also when its
    backward() is called in a block."""

    def losses(wrap):
        x = leaf()
        torch.manual_seed(11)
        outside = wrap(x * 1)
        with attn_ext.replace_sdpa(strict=True):
            inside = wrap(x * 1)
            outside.square().sum().backward()
            first = x.grad.clone()
        inside.square().sum().backward()
        return [outside.detach(), inside.detach(), first, x.grad]

    want = losses(layers)
    assert sdpa.report().served == {"cpu": 2}
    sdpa.reset()
    same(losses(lambda x: checkpoint(layers, x, use_reentrant=reentrant)), want)
    all_served(4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_threads(reentrant):
    """A block seen by a thread beside it, and a graph whose backward() runs in another thread."""
    box, errors = {}, []
    barrier = threading.Barrier(2)

    def forward(name, block):
        x = leaf()
        with torch.random.fork_rng():  # the generator is shared: without dropout
            barrier.wait()
            if block:
                with attn_ext.replace_sdpa(strict=True):
                    y = checkpoint(layers, x * 1, 0.0, use_reentrant=reentrant)
                    barrier.wait()
            else:
                y = checkpoint(layers, x * 1, 0.0, use_reentrant=reentrant)
                barrier.wait()
        box[name] = (x, y)

    def work(name, block):
        try:
            forward(name, block)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(b, b)) for b in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    all_served(2)
    box[False][1].sum().backward()
    all_served(2)
    box[True][1].sum().backward()
    all_served(4)
    torch.testing.assert_close(box[True][0].grad, box[False][0].grad)


def test_a_block_that_ends_by_an_exception():
    """A block that stays on, or forgets what was computed in it."""
    x, box = leaf(), []
    with pytest.raises(KeyError), attn_ext.replace_sdpa(strict=True):
        box.append(checkpoint(attend, x * 1, use_reentrant=False))
        raise KeyError
    F.scaled_dot_product_attention(x, x, x)
    all_served(1)
    box[0].sum().backward()
    all_served(2)


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_an_exception_in_a_recomputation_leaves_nothing(reentrant, nested, place):
    """A block entered for a recomputation and never left, an error that is not the user's own, and
    a graph that cannot be used again: where torch can repeat backward(), so can a block."""
    want = run(lambda x: layers(x, 0.0))
    for kind in (KeyError, KeyboardInterrupt, NotImplementedError, ValueError):
        for moment in ("before", "between", "hook"):
            x, fail = leaf(), []

            def part(x, kind=kind, moment=moment, fail=fail):
                if fail and moment == "before":
                    raise kind("mine")
                y = attend(x, 0.0)
                if fail and moment == "between":
                    raise kind("mine")
                return attend(y, 0.0)

            def hook(grad, kind=kind, fail=fail):
                if fail:
                    raise kind("mine")

            def model(x, part=part):
                if nested:
                    part_of = part
                    part = lambda x: checkpoint(part_of, x, use_reentrant=reentrant)  # noqa: E731
                return checkpoint(part, x, use_reentrant=reentrant)

            with contextlib.ExitStack() as block:
                block.enter_context(attn_ext.replace_sdpa(strict=True))
                inside = sdpa_scopes._own().entries
                y = model(x * 1)
                if moment == "hook":
                    y.register_hook(hook)
                if place == "after":
                    block.close()
                before = sdpa_scopes._own().entries
                assert before == (inside if place == "inside" else ())
                fail.append(True)
                with pytest.raises(kind, match="mine"):
                    y.square().sum().backward(retain_graph=True)
                assert sdpa_scopes._own().entries == before
                sdpa.reset()
                F.scaled_dot_product_attention(x, x, x)
                assert sdpa.report().served == ({"cpu": 1} if place == "inside" else {})
                fail.clear()
                x.grad = None
                y.square().sum().backward()
                same([y.detach(), x.grad], want)
                assert not sdpa.report().torch


def test_settings_follow_the_forward():
    """Two nested blocks of different backends: the recomputation by the wrong one."""
    x = leaf()
    with attn_ext.replace_sdpa(backend="reference"):
        a = checkpoint(attend, x * 1, use_reentrant=False)
        with attn_ext.replace_sdpa():
            b = checkpoint(attend, a, use_reentrant=True)
    with attn_ext.replace_sdpa(strict=True):
        b.sum().backward()
    assert sdpa.report().served == {"reference": 2, "cpu": 2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_switch(reentrant):
    """A forward under enable() whose backward() comes after undo(), or in another thread."""
    want = run(layers)
    sdpa.reset()
    x = leaf()
    torch.manual_seed(11)
    switch = attn_ext.replace_sdpa(strict=True).enable()
    try:
        y = checkpoint(layers, x * 1, use_reentrant=reentrant)
    finally:
        switch.undo()
    thread = threading.Thread(target=lambda: y.square().sum().backward())
    thread.start()
    thread.join()
    same([y.detach(), x.grad], want)
    all_served(4)


def test_what_stays_torchs_in_a_recomputation_warns_or_raises():
    """A silent fall back in backward()."""

    def refused(x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return attend(x)

    x = leaf()
    with attn_ext.replace_sdpa(), pytest.warns(UserWarning, match="MATH"):
        y = checkpoint(refused, x * 1, use_reentrant=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning, not one a recomputation
        y.sum().backward()
    (count,) = sdpa.report().torch.values()
    assert count == 2 and not sdpa.report().served
    with attn_ext.replace_sdpa(strict=True), pytest.raises(NotImplementedError, match="MATH"):
        refused(x)


def test_outside_of_blocks_torch_is_untouched():
    """Kernels that stay registered and change what torch computes outside: values, gradients, the
    generator, transforms, second derivatives, scripts."""
    with attn_ext.replace_sdpa():
        pass
    assert torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::scaled_dot_product_attention", "AutogradCPU"
    )
    x = leaf()
    torch.manual_seed(3)
    got = finish(attend(x), [x], "autograd.grad")
    torch.manual_seed(3)
    weights = F.dropout(torch.softmax(x * 2 @ x.sin().mT / 8**0.5, -1), 0.4)
    torch.testing.assert_close(got, finish(weights @ x, [x], "autograd.grad"))
    tangent = torch.randn_like(x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda x: attend(x, 0.0), (x.detach(),), (tangent,))
    numeric = (attend(x + 1e-6 * tangent, 0.0) - attend(x - 1e-6 * tangent, 0.0)) / 2e-6
    assert_close(slope, numeric, QUOTIENT)
    assert sdpa.report() == ({}, {}, {})
