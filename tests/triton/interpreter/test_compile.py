"""torch.compile, fake tensors and opcheck of calls that name the Triton backend, interpreted."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attn_ext


def inputs(seqlen=33):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, seqlen, 16), (1, 2, 40, 16), (1, 2, 40, 24))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def step(q, k, v):
    """O and LSE of a call with several features."""
    return attn_ext.attention(
        q, k, v, causal="bottom_right", softcap=3.0, return_lse=True, backend="triton"
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    """A call that Dynamo cannot trace as one graph, a graph without the operator, other gradients
    than eager ones."""
    graphs = []

    def note(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=note, dynamic=dynamic)
    for seqlen in (33, 20):
        leaves = inputs(seqlen)
        results = []
        for function in (compiled, step):
            out, lse = function(*leaves)
            results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert any("attn_ext" in target for target in targets), targets


def test_compile_through_autograd():
    """A backward whose shapes, dtypes or strides are not those that its fake promises."""
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = inputs()
    results = []
    for function in (compiled, step):
        out, lse = function(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_have_the_shapes_of_real_ones(dtype):
    """A kernel that runs on a tensor without memory, or an output of another layout."""
    with torch.no_grad():
        real = step(*(x.to(dtype) for x in inputs()))
    with FakeTensorMode() as mode:
        fake = step(*(mode.from_tensor(x.detach().to(dtype)) for x in inputs()))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
