"""torch.compile under replace_sdpa, where Dynamo hands a call on without looking into it: bodies of
checkpoint and torch.cond, F.multi_head_attention_forward; other threads; the compiler's caches.
"""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext.integrations import sdpa


@pytest.fixture(autouse=True)
def from_zero():
    """Counts and compiled code of this test only."""
    sdpa.reset()
    torch._dynamo.reset()
    yield
    assert torch._C._len_torch_function_stack() == 0


def attend(x):
    return F.scaled_dot_product_attention(x * 2, x.sin(), x)


torch.manual_seed(2)
MHA = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
BODIES = {
    "checkpoint": lambda x: checkpoint(attend, x, use_reentrant=False),
    "checkpoint_reentrant": lambda x: checkpoint(attend, x * 1, use_reentrant=True),
    "checkpoint_twice": lambda x: checkpoint(
        lambda x: checkpoint(attend, x, use_reentrant=False) + x, x, use_reentrant=False
    ),
    "cond": lambda x: torch.cond(  # both branches must have outputs of the same strides
        x.sum() > -1e9, lambda x: attend(x).contiguous(), torch.sin, (x,)
    ),
    "mha": lambda x: MHA(x[0], x[0], x[0], need_weights=False)[0],
    "mha_in_checkpoint": lambda x: checkpoint(
        lambda x: MHA(x[0], x[0], x[0], need_weights=False)[0], x, use_reentrant=False
    ),
}


@attn_ext.replace_sdpa(strict=True)
def decorated(function, x):
    return function(x)


def inside(function, x):
    with attn_ext.replace_sdpa(strict=True):
        return function(x)


def outcome(function):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 2, 5, 16, generator=generator, dtype=torch.float64).requires_grad_()
    out = function(x)
    out.square().sum().backward()
    return [out.detach(), x.grad]


def attention_nodes(graph) -> list:
    """Names of the attention operators in a graph and the graphs within it."""
    modules = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    names = [str(node.target) for m in modules for node in m.graph.nodes]
    return [n for n in names if "attn_ext" in n or "scaled_dot" in n or "softmax" in n]


@pytest.mark.parametrize("place", ["around", "inside", "decorator"])
@pytest.mark.parametrize("body", BODIES)
def test_bodies_that_dynamo_hands_on(body, place):
    """torch's attention silently in the graph, in the forward or in its recomputation."""
    own = BODIES[body]
    if body.endswith("reentrant") and place != "around":
        own = BODIES["checkpoint"]
    found = []

    def keep(graph, example):
        found.extend(attention_nodes(graph))
        return graph

    function = {
        "around": own, "inside": lambda x: inside(own, x), "decorator": lambda x: decorated(own, x)
    }[place]  # fmt: skip
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    around = attn_ext.replace_sdpa(strict=True) if place == "around" else contextlib.nullcontext()
    with around:
        got = outcome(compiled)
    assert found and all("attn_ext" in name for name in found), found
    assert set(sdpa.report().compiled) == {"attn_ext"} and not sdpa.report().torch
    for a, b in zip(got, outcome(own), strict=True):
        torch.testing.assert_close(a, b)
    if place == "around":  # compiled again without the block
        found.clear()
        if body.startswith("cond"):  # torch refuses the gradients of cond around its own attention
            compiled(torch.randn(1, 2, 5, 16, dtype=torch.float64))
        else:
            outcome(compiled)
        assert found and not any("attn_ext" in name for name in found), found


def test_dropout_in_a_compiled_checkpoint():
    """A recomputation in a compiled graph that draws another mask: the forward is linear in the
    values, so its gradient with respect to them must give the output back."""

    def f(q, v):
        return checkpoint(
            lambda q, v: F.scaled_dot_product_attention(q, q, v, dropout_p=0.5), q, v,
            use_reentrant=False,
        )  # fmt: skip

    q, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(2))
    v.requires_grad_()
    with attn_ext.replace_sdpa(strict=True):
        out = torch.compile(f, backend="aot_eager", fullgraph=True)(q, v)
    weight = torch.randn_like(out)
    (dv,) = torch.autograd.grad((out * weight).sum(), v)
    torch.testing.assert_close((dv * v).sum(), (out * weight).sum())


def test_a_graph_that_fails_leaves_no_block_behind():
    """A node of a graph that begins a block and an error before the node that ends it."""

    def fails(x):
        return checkpoint(lambda x: attend(x[:, :, :1].expand(-1, -1, 3, -1)) @ x, x,
                          use_reentrant=False)  # fmt: skip

    x = torch.randn(1, 2, 5, 16, requires_grad=True)
    with pytest.raises(Exception, match=r"expected|size|shape"):
        torch.compile(lambda x: inside(fails, x), backend="eager")(x)
    sdpa.reset()
    attend(x)
    assert sdpa.report() == ({}, {}, {})


def test_threads_under_the_switch():
    """Code that a thread without a mode compiled before enable(), while it is on, and after."""
    compiled = torch.compile(BODIES["checkpoint"], backend="aot_eager", fullgraph=True)
    want = outcome(BODIES["checkpoint"])

    def in_thread():
        box = []
        thread = threading.Thread(target=lambda: box.append(outcome(compiled)))
        thread.start()
        thread.join()
        for a, b in zip(box[0], want, strict=True):
            torch.testing.assert_close(a, b)
        counted = sdpa.report().compiled
        sdpa.reset()
        return counted

    assert in_thread() == {}
    switch = attn_ext.replace_sdpa(strict=True).enable()
    try:
        assert in_thread() == {"attn_ext": 1}
    finally:
        switch.undo()
    assert in_thread() == {}


CACHED = """if True:
    import sys, torch, attn_ext
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint
    from torch._inductor.utils import run_and_get_code

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    def f(x):
        return checkpoint(attend, x, use_reentrant=False).sin()

    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    for way in sys.argv[1:]:
        torch._dynamo.reset()
        seen = []
        switch = attn_ext.replace_sdpa(strict=True)
        if way == "switch":
            switch.enable()
        elif way == "block":
            switch.__enter__()
        compiled = torch.compile(f, fullgraph=True)
        with torch.profiler.profile() as profile:
            compiled(x)
        if way == "switch":
            switch.undo()
        elif way == "block":
            switch.__exit__(None, None, None)
        names = {event.name for event in profile.events()}
        print(way, any("attn_ext::forward" in n for n in names))
"""


def test_caches_on_disk(tmp_path, monkeypatch):
    """A graph compiled in a block and loaded outside of it in a later process, or the reverse."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for order in (("none", "block", "switch"), ("switch", "block", "none")):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, *order], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found = dict(line.split() for line in done.stdout.splitlines())
        assert found == {"none": "False", "block": "True", "switch": "True"}


def test_unflatten_does_not_break_the_graph():
    """Dynamo's own break at Tensor.unflatten under any mode of torch functions, which costs a
    compiled model its fusion."""

    def attend(x):
        q, k, v = x.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).unflatten(dim=2, sizes=(2, 3))

    torch._dynamo.reset()
    x = torch.randn(1, 6, 48)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with attn_ext.replace_sdpa(strict=True):
        torch.testing.assert_close(compiled(x), attend(x))
