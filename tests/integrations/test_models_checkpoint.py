"""Small models of transformers, timm and diffusers trained two steps inside a block of replace_sdpa
with their own gradient checkpointing: losses and weights equal those without, dropout included.
"""

import copy

import pytest
import torch
from closeness import TRAINED, assert_close
from model_checks import transformers
from torchvision_stub import torchvision_stub

import attn_ext
from attn_ext.integrations import sdpa


def two_steps(model, loss_of):
    """[losses of two steps of SGD..., the loss after them] in a block, from one seed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    torch.manual_seed(4)
    with attn_ext.replace_sdpa(strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        losses.append(loss_of(model).detach())
    return torch.stack(losses)


def check(model, loss_of, switch_on, calls):
    """Losses with and without checkpointing, and that as many calls more were served as there are
    attention layers to recompute in two backwards."""
    model = model.train()
    other = copy.deepcopy(model)
    sdpa.reset()
    want = two_steps(model, loss_of)
    before = sum(sdpa.report().served.values())
    sdpa.reset()
    switch_on(other)
    got = two_steps(other, loss_of)
    assert_close(got, want, TRAINED)
    assert len(set(got.tolist())) == 3  # it did train
    assert sdpa.report().torch == {}
    assert sum(sdpa.report().served.values()) == before + calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers(reentrant):
    """CheckpointError, or gradients of another dropout mask."""
    library = transformers()
    config = library.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=90, max_position_embeddings=64, attention_dropout=0.2,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(3)
    model = library.LlamaForCausalLM(config)
    ids = torch.randint(3, 90, (2, 12))

    def switch_on(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    check(model, lambda m: m(input_ids=ids, labels=ids, use_cache=False).loss, switch_on, 4)


def test_timm():
    """A ViT with set_grad_checkpointing."""
    with torchvision_stub():
        timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(3)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5,
        attn_drop_rate=0.2,
    )  # fmt: skip
    picture, label = torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    check(
        model, lambda m: torch.nn.functional.cross_entropy(m(picture), label),
        lambda m: m.set_grad_checkpointing(), 4,
    )  # fmt: skip


def test_diffusers():
    """A UNet with enable_gradient_checkpointing."""
    diffusers = pytest.importorskip("diffusers", reason="extra `integrations` is not installed")
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), mid_block_type=None,
    )  # fmt: skip
    sample, text = torch.randn(2, 2, 8, 8), torch.randn(2, 5, 12)
    layers = sum("attn" in name and hasattr(m, "to_q") for name, m in model.named_modules())
    check(
        model, lambda m: m(sample, 3, encoder_hidden_states=text).sample.square().mean(),
        lambda m: m.enable_gradient_checkpointing(), 2 * layers,
    )  # fmt: skip
