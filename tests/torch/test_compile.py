"""torch.compile of calls: no graph break, nothing burnt into a graph, the results of eager mode."""

import pytest
import torch
import torch._dynamo.testing
from inputs import leaves

import attn_ext

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def model(q, k, v, bias, sink):
    """A call with work around it for the compiler, all outputs used."""
    out, lse = attn_ext.attention(
        q * 1.5, k, v, causal="bottom_right", bias=bias, sink=sink, softcap=5.0, return_lse=True
    )
    return (out.tanh() * 2).sum() + lse.sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_forward_and_backward(compiler):
    """A graph break, or other gradients compiled than eager."""
    inputs = leaves()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    got, want = compiled(*inputs), model(*inputs)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_compile_dynamic_shapes():
    """A size burnt into the graph: each new sequence length compiles again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for seqlen_q, seqlen_k in ((5, 9), (6, 11), (13, 17)):
        inputs = leaves(seqlen_q, seqlen_k)
        got, want = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)
        )
        counts.append(counter.frame_count)
    assert counts[0] == counts[2]


@pytest.mark.parametrize("name", ["dropout_p", "scale", "softcap"])
def test_compile_numbers_that_change(name):
    """A symbolic float, which Dynamo makes of a number that changes (a scheduled dropout), and with
    dynamic=True of every one, in a check that it cannot trace.
    """
    q = torch.randn(1, 2, 5, 8)
    for dynamic in (None, True):
        torch.compiler.reset()
        f = lambda q, x: attn_ext.attention(q, q, q, **{name: x})  # noqa: E731
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for value in (0.3, 0.2):
            out = compiled(q, value)
            if name != "dropout_p":
                torch.testing.assert_close(out, f(q, value))


def test_compile_varlen_decode_and_sdpa():
    """A public function that only eager mode can run."""
    packed = torch.randn(9, 2, 8)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    f = lambda x, c: attn_ext.attention_varlen(x, x, x, c, c, 5, 5, causal=True)  # noqa: E731
    torch.testing.assert_close(
        torch.compile(f, fullgraph=True, backend="aot_eager")(packed, cu), f(packed, cu)
    )
    x = torch.randn(3, 2, 4, 8)
    g = lambda x: attn_ext.scaled_dot_product_attention(x, x, x, is_causal=True)  # noqa: E731
    torch.testing.assert_close(torch.compile(g, fullgraph=True, backend="aot_eager")(x), g(x))
    lengths = torch.tensor([3, 1, 0], dtype=torch.int32)

    def decode(q, cache, lengths, new):
        return attn_ext.attention_decode(q, cache, cache, lengths, k_new=new, v_new=new)

    caches = [torch.zeros(3, 2, 8, 8) for _ in range(2)]
    new = torch.randn(3, 2, 1, 8)
    want = decode(x[:, :, :1], caches[0], lengths, new)
    got = torch.compile(decode, fullgraph=True, backend="aot_eager")(
        x[:, :, :1], caches[1], lengths, new
    )
    torch.testing.assert_close(got, want)
    assert torch.equal(*caches)  # the append happened inside the graph too


def test_compile_longest_sequences_that_only_the_run_knows(monkeypatch):
    """A check of a length that the graph reads from a tensor, which no trace can decide."""
    monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", True)

    def f(x, c, lengths):
        longest = lengths.max().item()
        return attn_ext.attention_varlen(x, x, x, c, c, longest, longest, causal=True)

    x, cu = torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, cu, cu.diff()), f(x, cu, cu.diff()))
    for shorter in (4, -1):
        with pytest.raises(ValueError, match=f"max_seqlen_q must be at least 5, got {shorter}"):
            compiled(x, cu, torch.tensor([shorter]))


def test_compile_dropout_draws_anew():
    """The seed of the dropout mask frozen into the graph."""
    q = torch.randn(1, 2, 32, 8)
    f = torch.compile(
        lambda q: attn_ext.attention(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(3)
    first, second = f(q), f(q)
    torch.manual_seed(3)
    assert torch.equal(f(q), first)
    assert not torch.equal(first, second)
