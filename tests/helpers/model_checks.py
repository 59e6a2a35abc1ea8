"""What every test of a real model class does: the library's own attention against attn_ext's.

The truth is `naive_forward` below in float64 (transformers' eager paths round to float32 inside),
the naive path the library's own one in float32, which must agree with the truth; attn_ext runs in
float32, and the rule of attn_ext/testing.py decides, on outputs and the gradients of all
parameters.  generate() must give the same tokens.
"""

import copy
import importlib

import pytest
import torch
from closeness import assert_same

from attn_ext.testing import assert_close_to_reference

ATTENTION = "attn_ext"


def transformers():
    """The transformers module with attn_ext registered, or a skip where it is not installed."""
    library = pytest.importorskip("transformers", reason="extra `integrations` is not installed")
    library.logging.set_verbosity_error()
    importlib.import_module("attn_ext.integrations.transformers").register()
    library.AttentionInterface.register("naive64", naive_forward)
    library.AttentionMaskInterface.register("naive64", library.masking_utils.sdpa_mask)
    return library


def naive_forward(
    module, query, key, value, attention_mask, scaling=None, is_causal=None, position_bias=None,
    softcap=None, s_aux=None, **kwargs,
):  # fmt: skip
    """Attention in plain torch in the inputs' dtype, without dropout and without attn_ext."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if is_causal and query.shape[2] > 1:
            attention_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # rows of padding see nothing: spread evenly, as long as it is not NaN nobody looks
        logits = logits.masked_fill(~attention_mask, -1e4)
    elif attention_mask is not None:
        logits = logits + attention_mask
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sinks.to(logits)], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


class Calls:
    """Counts the calls of attn_ext's attention functions that the integration makes."""

    def __init__(self, monkeypatch, module):
        self.dense, self.varlen = [], []
        for name, log in (("attention", self.dense), ("attention_varlen", self.varlen)):
            original = getattr(module, name, None)
            if original is not None:
                monkeypatch.setattr(module, name, self._logged(original, log))

    @staticmethod
    def _logged(original, log):
        def call(*args, **kwargs):
            log.append(kwargs)
            return original(*args, **kwargs)

        return call

    @property
    def count(self) -> int:
        return len(self.dense) + len(self.varlen)


def integration():
    """The module whose calls a test counts."""
    transformers()
    return importlib.import_module("attn_ext.integrations.transformers")


def spread(model, factor: float = 6.0):
    """Random weights so large that attention is far from uniform: a wrong mask must show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(factor)
    return model


def results(model, inputs: dict, pick, train: bool = False):
    """(outputs, gradients): pick(model(**inputs)) -> dict of tensors; loss is their fixed
    projection.
    """
    model.train(train)
    model.zero_grad()
    outputs = pick(model(**inputs))
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum()
        / out.numel() ** 0.5
        for out in outputs.values()
    )
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: out.detach() for name, out in outputs.items()}, grads


def in_float64(inputs: dict) -> dict:
    """Floating tensors of the inputs in float64."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def check_model(
    model, inputs: dict, pick, extra: dict | None = None, own: str = "eager", agree=1e-3
):
    """attn_ext's outputs and gradients of `model` against the library's own path `own`.

    `extra` are inputs that only attn_ext's run gets (cu_seq_lens of packed sequences); `agree` is
    how far, of the largest element, the library's own path may be from the truth.
    """
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("naive64")
    truths, truth_grads = results(exact, in_float64(inputs), pick)
    model.set_attn_implementation(own)
    naives, naive_grads = results(model, inputs, pick)
    naive_grads = {name: grad.clone() for name, grad in naive_grads.items()}
    model.set_attn_implementation(ATTENTION)
    actual, grads = results(model, {**inputs, **(extra or {})}, pick)
    for name, naive in (naives | naive_grads).items():  # the truth is what the library means
        truth = (truths | truth_grads)[name]
        scale = truth.abs().max().item() + 1e-3
        torch.testing.assert_close(naive.double(), truth, rtol=agree, atol=agree * scale)
    compare(actual, truths, naives, "out")
    compare(grads, truth_grads, naive_grads, "grad")


def compare(actual: dict, truths: dict, naives: dict, kind: str) -> None:
    """Each tensor by the tolerance rule."""
    assert actual.keys() == truths.keys() == naives.keys()
    for name, got in actual.items():
        assert_close_to_reference(got, truths[name], naives[name], kind, name)


def check_generate(model, inputs: dict, own: str = "sdpa", new_tokens: int = 8, **options):
    """Greedy generation gives the same tokens with attn_ext as with the library's own path."""
    model.eval()
    texts = []
    for attention in (own, ATTENTION):
        model.set_attn_implementation(attention)
        texts.append(
            model.generate(
                **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                **options,
            )
        )  # fmt: skip
    assert_same(texts[1], texts[0])
    return texts[1]


def last_hidden(output) -> dict:
    """The last hidden state of a base model."""
    return {"last_hidden_state": output.last_hidden_state}


def valid_rows(attention_mask):
    """A picker of the hidden states at positions that are not padding."""
    keep = attention_mask.bool()
    return lambda output: {"valid": output[0][keep]}


def text(batch: int = 2, length: int = 19, vocabulary: int = 90, seed: int = 1):
    """Random token numbers, int64 [batch, length], none of them special (0 to 9)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocabulary, (batch, length), generator=generator)


def padding(batch: int, length: int, left: bool) -> torch.Tensor:
    """An attention mask [batch, length] whose sequences lose 0, 4, 8 ... positions at one side."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for b in range(1, batch):
        mask[b, slice(0, 4 * b) if left else slice(length - 4 * b, None)] = 0
    return mask
