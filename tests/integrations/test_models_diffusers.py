"""diffusers through set_attention_backend("attn_ext") (Flux) and AttnProcessor (UNets, VAE layers),
against its native path (torch's SDPA) in float64 and float32.
"""

import copy
import importlib
import pickle

import pytest
import torch
from closeness import FLOAT32, assert_close
from model_checks import Calls, compare, in_float64, results, spread


@pytest.fixture
def diffusers():
    """The diffusers module with attn_ext registered; its active backend is put back."""
    library = pytest.importorskip("diffusers", reason="extra `integrations` is not installed")
    library.utils.logging.set_verbosity_error()
    importlib.import_module("attn_ext.integrations.diffusers").register()
    with library.attention_backend("native"):
        yield library


@pytest.fixture
def served(diffusers, monkeypatch):
    """The calls that reach attn_ext."""
    return Calls(monkeypatch, importlib.import_module("attn_ext.integrations.diffusers"))


def normal(*shape, seed=8):
    """Normally distributed numbers, the same for one seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(model, inputs, switch):
    """`model` before and after switch(model), forward and backward."""
    spread(model, 2.0)
    pick = lambda output: {"sample": output.sample}  # noqa: E731
    exact = copy.deepcopy(model).double()
    truths, truth_grads = results(exact, in_float64(inputs), pick)
    naives, naive_grads = results(model, inputs, pick)
    naive_grads = {name: grad.clone() for name, grad in naive_grads.items()}
    switch(model)
    actual, grads = results(model, inputs, pick)
    compare(actual, truths, naives, "out")
    compare(grads, truth_grads, naive_grads, "grad")


def flux(diffusers):
    """A Flux transformer of one double and one single block, and its inputs."""
    torch.manual_seed(3)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(2, 15, 4), "encoder_hidden_states": normal(2, 6, 24),
        "pooled_projections": normal(2, 8), "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.arange(45.0).view(15, 3) % 5, "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    return model, inputs


def test_flux(diffusers, served):
    """The [B, S, H, D] layout read as [B, H, S, D]; joint text and picture attention."""
    model, inputs = flux(diffusers)
    check(model, inputs, lambda m: m.set_attention_backend("attn_ext"))
    assert served.count == 2


def test_context_manager(diffusers, served):
    """A name that the registry knows but the Enum does not."""
    model, inputs = flux(diffusers)
    with torch.no_grad():
        before = model(**inputs).sample
        with diffusers.attention_backend("attn_ext"):
            inside = model(**inputs).sample
        assert served.count == 2
        model(**inputs)
    assert served.count == 2
    assert_close(inside, before, FLOAT32)


def unet(diffusers, **options):
    """A conditional UNet with self- and cross-attention, and its inputs."""
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
        attention_head_dim=4, norm_num_groups=4, **options,
    )  # fmt: skip
    inputs = {
        "sample": normal(2, 4, 8, 8), "timestep": torch.tensor(3),
        "encoder_hidden_states": normal(2, 7, 12),
    }  # fmt: skip
    return model, inputs


@pytest.mark.parametrize("masked", [False, True])
def test_unet(diffusers, served, masked):
    """Residuals, norms or the text's padding mask lost by the processor."""
    from attn_ext.integrations.diffusers import AttnProcessor

    model, inputs = unet(diffusers)
    if masked:
        inputs["encoder_attention_mask"] = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    check(model, inputs, lambda m: m.set_attn_processor(AttnProcessor()))
    assert served.count == 8


def test_default_processor_after_ours(diffusers):
    """diffusers refusing to go back, because it does not know the class of a processor; the plain
    processor in a model whose layers add keys.
    """
    from diffusers.models import attention_processor as own

    from attn_ext.integrations.diffusers import AttnAddedKVProcessor, AttnProcessor

    model, inputs = unet(diffusers)
    before = model(**inputs).sample
    model.set_attn_processor(AttnProcessor())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each in (model, copied):
        each.set_default_attn_processor()
        assert {type(p) for p in each.attn_processors.values()} == {own.AttnProcessor}
        assert_close(each(**inputs).sample, before, FLOAT32)
    model, inputs = adding_unet(diffusers)
    before = model(**inputs).sample
    model.set_attn_processor(AttnAddedKVProcessor())
    model.set_default_attn_processor()
    assert {type(p) for p in model.attn_processors.values()} == {own.AttnAddedKVProcessor}
    model.set_attn_processor(AttnProcessor())
    model(**inputs)
    model.set_default_attn_processor()
    assert_close(model(**inputs).sample, before, FLOAT32)


def adding_unet(diffusers):
    """A UNet whose layers have added keys and values, and its inputs."""
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4,
        out_channels=4, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=12,
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    inputs = {
        "sample": normal(2, 4, 8, 8), "timestep": torch.tensor(3),
        "encoder_hidden_states": normal(2, 7, 12),
    }  # fmt: skip
    return model, inputs


def test_unet_with_added_keys(diffusers, served):
    """The order of added keys; pictures that come as [B, C, H, W]."""
    from attn_ext.integrations.diffusers import AttnProcessor

    model, inputs = adding_unet(diffusers)
    check(model, inputs, lambda m: m.set_attn_processor(AttnProcessor()))
    assert served.count == 4


def test_backend_masks_and_lse(diffusers):
    """A [B, Sk] padding mask read as [Sq, Sk]; LSE in the wrong order."""
    from attn_ext.integrations.diffusers import attention_backend

    q, k, v = (normal(2, 5, 3, 4, seed=s).double() for s in (1, 2, 3))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    out, lse = attention_backend(q, k, v, mask, return_lse=True)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    want = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, logits.logsumexp(-1).transpose(1, 2))
    additive = torch.where(mask, 0.0, -torch.inf).double()
    torch.testing.assert_close(attention_backend(q, k, v, additive), want)
    causal = attention_backend(q, k, v, is_causal=True)
    torch.testing.assert_close(causal[:, 0], v[:, 0])


def test_names(diffusers):
    """A registration that shadows diffusers' own backends."""
    from attn_ext.integrations.diffusers import register

    register()
    with pytest.raises(
        ValueError, match="must not be one of diffusers' own backends, got 'native'"
    ):
        register("native")
    with pytest.raises(TypeError, match="name must be a str, got int 3"):
        register(3)
