"""attn_ext.nn.MultiheadAttention against torch.nn.MultiheadAttention with the same parameters, in
float64: output, weights, gradients of inputs, masks and parameters.
"""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from closeness import BFLOAT16_LAYERS, HALF, assert_close
from torch import nn

import attn_ext
from attn_ext.nn import MultiheadAttention, convert, revert

L, S, N, E, H = 5, 7, 3, 16, 4

MODULES = {
    "plain": {},
    "no_bias": dict(bias=False),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True),
    "bias_kv_and_zero_attn": dict(add_bias_kv=True, add_zero_attn=True),
    "kdim_vdim": dict(kdim=10, vdim=6),
    "kdim_no_bias": dict(kdim=10, bias=False),
    "sequence_first": dict(batch_first=False),
    "sequence_first_bias_kv": dict(batch_first=False, add_bias_kv=True),
}
MASKS = ("none", "bool2", "bool3", "float2", "float3", "padding", "float_padding", "both", "mixed")


def modules(**options):
    """torch's module and ours with the same random parameters."""
    options = dict(batch_first=True, dtype=torch.float64) | options
    theirs = nn.MultiheadAttention(E, H, **options)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    ours = MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module, batched=True):
    shapes = ((N, L, E), (N, S, module.kdim), (N, S, module.vdim))
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    if not batched:
        tensors = [x[0] for x in tensors]
    elif not module.batch_first:
        tensors = [x.transpose(0, 1) for x in tensors]
    return [x.detach().requires_grad_() for x in tensors]


def masks(kind, batch=N):
    """attn_mask and key_padding_mask; the first key is always open."""

    def drop(*shape):
        mask = torch.rand(shape) < 0.4
        mask[..., 0] = False
        return mask

    def added(*shape):
        mask = torch.randn(shape, dtype=torch.float64)
        mask[..., 1] = -torch.inf
        return mask.requires_grad_()

    return {
        "none": {},
        "bool2": dict(attn_mask=drop(L, S)),
        "bool3": dict(attn_mask=drop(batch * H, L, S)),
        "float2": dict(attn_mask=added(L, S)),
        "float3": dict(attn_mask=added(batch * H, L, S)),
        "padding": dict(key_padding_mask=drop(batch, S)),
        "float_padding": dict(key_padding_mask=added(batch, S)),
        "both": dict(attn_mask=drop(L, S), key_padding_mask=drop(batch, S)),
        "mixed": dict(attn_mask=added(batch * H, L, S), key_padding_mask=drop(batch, S)),
    }[kind]


def compare(theirs, ours, tensors, **options):
    """Outputs, weights and all gradients."""
    given = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for module in (theirs, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on masks of two types
            out, weights = module(*tensors, **options)
        total = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
        if weights is not None:
            total = total + weights.square().sum()
        leaves = [*dict.fromkeys(tensors), *given, *module.parameters()]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append((out, weights, *grads))
    assert len(results[0]) == len(results[1])
    for expected, got in zip(*results, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("need_weights", [False, True])
def test_constructors(name, need_weights):
    """Parameters used in another role, keys added at the wrong end, a layout mixed up."""
    theirs, ours = modules(**MODULES[name])
    options = masks("both") | dict(need_weights=need_weights)
    compare(theirs, ours, inputs(theirs), **options)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("average", [None, True, False], ids=["no_weights", "averaged", "by_head"])
def test_masks(kind, average):
    """The polarity of a mask, a broadcast over the wrong dimension, a lost mask gradient."""
    theirs, ours = modules(add_bias_kv=True)
    options = dict(need_weights=average is not None, average_attn_weights=bool(average))
    compare(theirs, ours, inputs(theirs), **masks(kind), **options)


@pytest.mark.parametrize("kind", MASKS)
def test_unbatched(kind):
    """A batch dimension left in or missed."""
    theirs, ours = modules()
    options = masks(kind, batch=1)
    if "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][0].detach()
    compare(theirs, ours, inputs(theirs, batched=False), **options)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("how", ["self", "key_is_value"])
def test_shared_inputs_and_the_causal_hint(how, need_weights):
    """The packed projection of shared inputs; a hint that is taken for a mask or forgotten."""
    theirs, ours = modules()
    x, y, _ = inputs(theirs)
    tensors = [x, x, x] if how == "self" else [x, y, y]
    causal = torch.triu(torch.ones(L, tensors[1].shape[1], dtype=torch.bool), 1)
    compare(theirs, ours, tensors, attn_mask=causal, is_causal=True, need_weights=need_weights)
    compare(theirs, ours, tensors, need_weights=need_weights)


def test_rows_of_weights():
    """Weights of other rows than those asked for."""
    _, ours = modules()
    tensors, options = inputs(ours), masks("mixed")
    _, whole = ours(*tensors, **options)
    _, some = ours(*tensors, **options, weights_rows=torch.tensor([3, 0]))
    torch.testing.assert_close(some, whole[:, [3, 0]])
    _, some = ours(*tensors, **options, weights_rows=slice(1, 3), average_attn_weights=False)
    torch.testing.assert_close(some.mean(1), whole[:, 1:3])


def test_empty_rows_are_zero_also_with_weights():
    """NaN where torch has it: a padded batch element poisons training."""
    theirs, ours = modules()
    tensors = inputs(ours)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*tensors, key_padding_mask=padding)
    expected, _ = theirs(*tensors, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(out, expected)
    assert weights[1].abs().max() == 0
    grads = torch.autograd.grad(out.sum() + weights.square().sum(), tensors)
    assert all(g.isfinite().all() for g in grads)


def test_weights_of_a_row_masked_by_the_smallest_number():
    """Weights of 1 instead of 1 / S: an LSE beside finfo.min has no room for ln S."""
    theirs, ours = modules()
    tensors = inputs(ours)
    mask = torch.zeros(L, S, dtype=tensors[0].dtype)
    mask[1] = torch.finfo(torch.float32).min
    want, got = (m(*tensors, attn_mask=mask)[1] for m in (theirs, ours))
    torch.testing.assert_close(got, want)


def test_dropout_weights_are_those_used():
    """Dropout in evaluation, or weights of another mask than the output's."""
    _, ours = modules(dropout=0.5, bias=False)
    tensors = inputs(ours)
    ours.eval()
    assert torch.equal(ours(*tensors)[0], ours(*tensors)[0])
    ours.train()
    nn.init.eye_(ours.out_proj.weight)
    out, weights = ours(*tensors, average_attn_weights=False)
    value = tensors[2] @ ours.in_proj_weight[2 * E :].T
    value = value.unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close((weights @ value).transpose(1, 2).flatten(2), out)
    assert 0.2 < (weights == 0).double().mean() < 0.8


def test_same_constructor_state_dict_and_pickle():
    """A parameter of another name, or an argument that torch's module does not have."""
    ours, theirs = MultiheadAttention, nn.MultiheadAttention
    told = [inspect.signature(kind.__init__).parameters.values() for kind in (ours, theirs)]
    told = [[(each.name, each.kind, each.default) for each in side] for side in told]
    assert told[0] == told[1]
    names = list(inspect.signature(theirs.forward).parameters)
    assert list(inspect.signature(ours.forward).parameters)[: len(names)] == names
    a, b = modules(add_bias_kv=True)
    assert list(a.state_dict()) == list(b.state_dict())
    a.load_state_dict(b.state_dict())
    tensors = inputs(b)
    for other in (copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
        assert type(other) is MultiheadAttention
        assert torch.equal(other(*tensors)[0], b(*tensors)[0])


def test_autocast_and_half():
    """A mask or LSE dtype that meets a half-precision product."""
    module = MultiheadAttention(E, H, batch_first=True, add_bias_kv=True)
    x = torch.randn(N, L, E)
    mask = torch.randn(L, L)
    expected, weights = module(x, x, x, attn_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, low = module(x, x, x, attn_mask=mask)
    assert out.dtype == low.dtype == torch.bfloat16
    assert_close(out.float(), expected, BFLOAT16_LAYERS)
    assert_close(low.float(), weights, BFLOAT16_LAYERS)
    half = copy.deepcopy(module).half()
    assert_close(
        half(x.half(), x.half(), x.half(), attn_mask=mask.half())[0].float(),
        expected, HALF)  # fmt: skip


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile(need_weights):
    """A graph break in the module."""
    torch.compiler.reset()
    _, ours = modules()
    tensors, options = inputs(ours), masks("both") | dict(need_weights=need_weights)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(*tensors, **options), ours(*tensors, **options), strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected)


def model():
    """nn.Transformer, evaluation paths and all."""
    whole = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    return whole.eval()


@pytest.mark.parametrize("grad", [False, True])
def test_convert_transformer_and_back(grad):
    """Torch's fused path still taken after convert, a module missed, or not given back."""
    whole = model()
    source, target = torch.randn(N, S, E).double(), torch.randn(N, L, E).double()
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 4:] = True
    keys = list(whole.state_dict())

    def run():
        with torch.set_grad_enabled(grad):
            return whole(
                source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding,
                tgt_mask=nn.Transformer.generate_square_subsequent_mask(L).double(),
                tgt_is_causal=True,
            )  # fmt: skip

    expected = run()
    seen = []
    assert convert(whole) is whole
    attention = [m for m in whole.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attention) == 6 and all(type(m) is MultiheadAttention for m in attention)
    for m in attention:
        m.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(run(), expected)
    assert len(seen) == 6
    assert list(whole.state_dict()) == keys
    convert(whole)  # twice is once
    assert revert(whole) is whole
    assert all(type(m) is nn.MultiheadAttention for m in attention)
    assert whole.encoder.use_nested_tensor and whole.encoder.layers[0].activation_relu_or_gelu == 1
    torch.testing.assert_close(run(), expected)


def test_convert_without_hooks_does_not_take_the_fused_path(monkeypatch):
    """torch._transformer_encoder_layer_fwd, which knows no attn_ext."""

    def refuse(*args):
        raise AssertionError("fused path taken")

    encoder = model().encoder
    x = torch.randn(N, S, E).double()
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.inference_mode():
        expected = encoder(x, src_key_padding_mask=padding)
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", refuse)
        with pytest.raises(AssertionError, match="fused"):  # the trap is there
            encoder(x, src_key_padding_mask=padding)
        got = convert(encoder)(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding])


def test_convert_one_module():
    """A model that is itself the module; what is no model."""
    assert type(convert(nn.MultiheadAttention(E, H))) is MultiheadAttention
    with pytest.raises(TypeError, match="model must be"):
        convert("model")
    with pytest.raises(TypeError, match="model must be"):
        revert(None)


BAD = {
    "rank": (dict(query=(N, L, 2, E)), ValueError, "query must have 3 dimensions"),
    "mixed_ranks": (dict(key=(S, E)), ValueError, "key must have 3 dimensions"),
    "width": (dict(query=(N, L, E + 1)), ValueError, "query must have a last dimension of 16"),
    "batch": (dict(key=(N + 1, S, E), value=(N + 1, S, E)), ValueError, "key must have query's"),
    "value": (dict(value=(N, S + 1, E)), ValueError, "value must have key's"),
    "mask_shape": (dict(attn_mask=torch.zeros(L, S + 1)), ValueError, "attn_mask must have shape"),
    "mask_dtype": (dict(attn_mask=torch.zeros(L, S).int()), TypeError, "attn_mask must be bool"),
    "padding": (dict(key_padding_mask=torch.zeros(S)), ValueError, "key_padding_mask must have"),
    "causal": (dict(is_causal=True), ValueError, "attn_mask must be given"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """An error that does not name the argument, or none."""
    options, kind, match = dict(BAD[name][0]), *BAD[name][1:]
    shapes = dict(query=(N, L, E), key=(N, S, E), value=(N, S, E))
    tensors = {k: torch.randn(options.pop(k, s)) for k, s in shapes.items()}
    module = attn_ext.nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(kind, match=match):
        module(**tensors, **options)
