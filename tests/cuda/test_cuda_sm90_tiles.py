"""The frame of the Hopper forward: CTAs that work on one tile of queries after the other, in the
order in which a counter gives them out, and O that the copy engine stores.

The fixture has one multiprocessor, so that one CTA has all tiles of a call; here there are others.
"""

import pytest
import torch

from attn_ext.testing import check_call

# name -> (multiprocessors, options): what each would catch
CASES = {
    "one CTA has all": (1, {"seqlen_q": 300, "seqlen_k": 300, "causal": True}),
    "three CTAs, no multiple": (3, {"seqlen_q": 300, "seqlen_k": 140, "heads_q": 4}),
    "as many CTAs as tiles: no counter": (8, {"seqlen_q": 200, "seqlen_k": 140}),
    "one tile fewer than there are": (7, {"seqlen_q": 200, "seqlen_k": 140}),
    # sections of 256 KiB of L2 cache, half of which counts: K and V of 130 keys are 33 KB
    "sections of some heads, the last one smaller": (
        2, {"seqlen_q": 130, "seqlen_k": 130, "heads_q": 10, "heads_k": 5, "causal": True}
    ),
    "batches in one section": (
        2, {"seqlen_q": 130, "seqlen_k": 70, "heads_q": 2, "heads_k": 1, "batch": 3}
    ),
    "a section for each head": (2, {"seqlen_q": 130, "seqlen_k": 600, "heads_q": 4, "heads_k": 2}),
    "tiles that see nothing between others": (
        1, {"seqlen_q": 400, "seqlen_k": 140, "causal": True}
    ),
    "a warpgroup without rows, then one with": (
        1, {"seqlen_q": 150, "seqlen_k": 280, "heads_q": 4}
    ),
    "odd numbers of keys: rings stand elsewhere at each tile": (
        1, {"seqlen_q": 260, "seqlen_k": 384, "heads_q": 2, "heads_k": 1}
    ),
}  # fmt: skip
FEATURES = {
    "a mask": {"mask": "qk"},
    "dropout and a sink": {"dropout_p": 0.3, "sink": True},
    "statistics": {"stats": True},
}


def on(hopper, multiprocessors):
    hopper.kernels._devices[0] = (multiprocessors, True)


@pytest.mark.parametrize("name", CASES)
def test_every_tile_is_computed_once(hopper, name):
    """A tile that no CTA takes; a parity or a buffer of the tile before; turns of another tile."""
    multiprocessors, options = CASES[name]
    on(hopper, multiprocessors)
    call = hopper.call(**{"head_dim": 64, **options})
    assert hopper.kernel(call) == "sm90"
    check_call(call, hopper.module, grads=False)


@pytest.mark.parametrize("head_dim", [96, 128, 192, 256])
def test_head_dims(hopper, head_dim):
    """Two buffers of Q, or one: O that is stored from where the next Q is loaded."""
    on(hopper, 2)
    options = {"seqlen_q": 300, "seqlen_k": 150, "causal": True, "heads_q": 2, "heads_k": 1}
    check_call(hopper.call(head_dim=head_dim, **options), hopper.module, grads=False)


@pytest.mark.parametrize("name", FEATURES)
def test_features(hopper, name):
    """The same frame around the loop with features."""
    on(hopper, 2)
    options = {"seqlen_q": 300, "seqlen_k": 150, "head_dim": 64, "heads_q": 2, "heads_k": 1}
    call = hopper.call(**options, **FEATURES[name])
    assert hopper.kernel(call) == "sm90 features"
    check_call(call, hopper.module, grads=False)


PACKED = {
    "ends within and at the end of a tile": {"seqlens_q": [127, 128, 129, 64, 63, 192]},
    "sequences without queries between": {"seqlens_q": [0, 130, 0, 0, 5, 0],
                                          "seqlens_k": [3, 140, 0, 2, 300, 1]},
    "the last one is the longest": {"seqlens_q": [1, 20, 300], "causal": True},
    "more sequences than are skipped at a time": {
        "seqlens_q": [1] * 60 + [130] + [1, 0] * 20, "heads_q": 1, "heads_k": 1},
    "of many only short ones": {"seqlens_q": [300] + 20 * [1], "heads_q": 2, "heads_k": 1},
}  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(hopper, name, multiprocessors):
    """O stored over the next sequence's; a sequence whose tiles are counted wrongly, so that all
    behind it are left out."""
    on(hopper, multiprocessors)
    call = hopper.call(head_dim=64, **PACKED[name])
    check_call(call, hopper.module, grads=False)


def outputs(hopper, call, counter=None, out=None):
    """O and LSE by the native call; counter: what the workspace holds before."""
    out = (
        torch.full((*call.q.shape[:-1], call.v.shape[-1]), torch.nan).to(call.q)
        if out is None
        else out
    )
    lse = torch.full(call.q.shape[:3], torch.nan, device=out.device)
    native = hopper.kernels._native(call, hopper.kernels._canonical(call), out, lse)
    target = hopper.kernels._target(out.device)
    floats = native.forward_workspace(*target[2:])
    work = torch.full((max(1, floats),), counter or 0, dtype=torch.int32, device=out.device)
    native.forward(work.data_ptr() if floats else 0, *target)
    return out, lse, floats


def test_a_counter_that_holds_something(hopper):
    """A counter that is not cleared: tiles that the call before has claimed are left out."""
    call = hopper.call(seqlen_q=300, seqlen_k=140, head_dim=64)
    on(hopper, 1000)
    *want, floats = outputs(hopper, call)
    assert floats == 0  # a CTA a tile
    on(hopper, 2)
    for counter in (5, -3):
        *got, floats = outputs(hopper, call, counter)
        assert floats == 1
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_outputs_of_any_stride(hopper):
    """O where the copy engine cannot store it, and where it must leave out what lies between."""
    call = hopper.call(seqlen_q=200, seqlen_k=140, head_dim=64, batch=2)
    on(hopper, 2)
    want = outputs(hopper, call)[0]
    for row in (64, 72, 65):  # elements from row to row; of 65 no row but some begin at 16 bytes
        buffer = torch.full((2, 200, 4, row), 7.0).to(call.q)
        out = buffer[..., :64].transpose(1, 2)
        outputs(hopper, call, out=out)
        assert torch.equal(out, want)
        assert (buffer[..., 64:] == 7.0).all()


@pytest.mark.parametrize("where", ["q", "k"])
def test_rows_that_are_computed_once_more(hopper, where):
    """O by the copy engine over what a warp has mended, or the other way round."""
    on(hopper, 2)
    call = hopper.call(seqlen_q=300, seqlen_k=260, head_dim=64, heads_q=2, heads_k=1)
    call.q.abs_()
    if where == "k":
        call.k[:, :, 5], call.v[:, :, 5] = -torch.inf, torch.inf  # 0 * inf
    else:
        call.q[:, :, 139] = torch.inf
    check_call(call, hopper.module, grads=False)
