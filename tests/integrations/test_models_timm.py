"""timm's ViT and Swin (bias, shifted windows) and torch's own encoder under attn_ext.replace_sdpa,
against torch's SDPA in float64 and float32.
"""

import contextlib
import copy

import pytest
import torch
from model_checks import compare, results, spread
from torchvision_stub import torchvision_stub

import attn_ext
from attn_ext.integrations import sdpa


@pytest.fixture(scope="module")
def timm():
    """The timm module, whether or not torchvision is installed."""
    with torchvision_stub():
        return pytest.importorskip("timm", reason="timm is not installed")


def normal(*shape, seed=8):
    """Normally distributed numbers, the same for one seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(model, picture, calls, train=True, factor=2.0):
    """Forward and backward under replace_sdpa(strict) against torch, and the number of calls."""
    spread(model, factor)
    pick = lambda output: {"output": output}  # noqa: E731
    exact = copy.deepcopy(model).double()

    def run(model, picture, context):
        with context:
            return results(_Named(model), {"x": picture}, pick, train)

    truths, truth_grads = run(exact, picture.double(), contextlib.nullcontext())
    naives, naive_grads = run(model, picture, contextlib.nullcontext())
    naive_grads = {name: grad.clone() for name, grad in naive_grads.items()}
    for module in model.modules():  # timm asks for SDPA in Swin only where told to
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    sdpa.reset()
    actual, grads = run(model, picture, attn_ext.replace_sdpa(strict=True))
    assert sum(sdpa.report().served.values()) == calls
    compare(actual, truths, naives, "out")
    compare(grads, truth_grads, naive_grads, "grad")


class _Named(torch.nn.Module):
    """A model whose only input has a name."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        """The model's output."""
        return self.model(x)


def test_vit(timm):
    """Heads and tokens mixed up; the class token lost."""
    torch.manual_seed(3)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5, qk_norm=True
    )
    assert all(block.attn.fused_attn for block in model.blocks)
    check(model, normal(2, 3, 32, 32), calls=2)


def test_swin(timm):
    """The relative position bias without gradient, or the mask of shifted windows lost."""
    torch.manual_seed(3)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
        num_classes=5, drop_path_rate=0.0,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    tables = [n for n, _ in model.named_parameters() if n.endswith("position_bias_table")]
    assert len(tables) == 4
    check(model, normal(2, 3, 32, 32), calls=4)


@pytest.mark.parametrize("train", [True, False])
def test_torch_encoder(train):
    """torch's fused encoder path going around the replacement."""
    torch.manual_seed(3)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    check(model, normal(2, 9, 32), calls=2, train=train, factor=1.5)
