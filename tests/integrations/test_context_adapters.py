"""What the adapters of torchtitan and DeepSpeed take and refuse; but for DeepSpeed's own Ulysses,
without these packages.  How they compute on several ranks is held by context_attention's own tests.
"""

import ast
import importlib.util
import inspect
import re

import pytest
import torch
from closeness import SHARDS, relative
from repository import ROOT

import attn_ext
from attn_ext.distributed import Layout, context_attention
from attn_ext.integrations import torchtitan
from attn_ext.integrations.deepspeed import LocalAttention
from attn_ext.integrations.transformers import register

GUIDE = ROOT / "docs/guide/distributed.md"


@pytest.mark.parametrize("sequence_dim", (0, 1))
def test_the_slot_of_ulysses(sequence_dim):
    """Dimensions that are taken for others."""
    q, k, v = (torch.randn(2, 9, h, 8) for h in (4, 2, 2))  # [B, S, H, D]
    swap = (lambda x: x.transpose(0, 1)) if sequence_dim == 0 else (lambda x: x)
    local = LocalAttention(sequence_dim, causal=True)
    want = attn_ext.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    got = swap(local(*map(swap, (q, k, v)), None, dropout_mask=None))
    assert relative(got, want.transpose(1, 2)) <= SHARDS[torch.float32]
    with pytest.raises(ValueError, match="query, key and value alone, got also Tensor"):
        local(q, k, v, torch.ones(1))
    with pytest.raises(ValueError, match="sequence_dim must be 0 or 1, got 2"):
        LocalAttention(2)
    for name in ("sink", "alibi_slopes"):
        with pytest.raises(ValueError, match=f"{name} must not be given to LocalAttention"):
            LocalAttention(**{name: torch.zeros(4)})


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install --no-deps deepspeed hjson py-cpuinfo msgpack "
    "einops",
)
def test_deepspeeds_own_ulysses():
    """A slot that DeepSpeed calls in another way than we take it, on two processes."""
    import ranks

    found = ranks.run_alone("context_strangers", "slot_of_deepspeed", 2, 60, 300, lost=0)
    assert len(found) == 2 and max(found.values()) <= SHARDS[torch.float32]


def test_torchtitan_refuses_masks():
    """A mask that is dropped; shards that are cut by one."""
    modules = [torch.nn.Identity()]
    with pytest.raises(ValueError, match="load_balancer must be 'headtail' or None, got 'ptrr'"):
        torchtitan.apply_cp_to_forward(modules, None, "ptrr")
    torchtitan.apply_cp_to_forward(modules, None)
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"attention_masks must be None .* got Tensor"):
        modules[0].forward(x, x, x, attention_masks=x)


NAMED = {
    "context_attention": context_attention, "register": register,
    "apply_cp_to_forward": torchtitan.apply_cp_to_forward, "LocalAttention": LocalAttention,
    "zigzag": Layout.zigzag, "shard": Layout.shard, "position_ids": Layout.position_ids,
    "shift_labels": Layout.shift_labels,
}  # fmt: skip


def test_recipes_of_the_guide():
    """A keyword that is not there, a recipe that does not parse, or one that is gone."""
    seen = set()
    for block in re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in NAMED:
                continue
            seen.add(name)
            parameters = inspect.signature(NAMED[name]).parameters
            bound = [k.arg for k in node.keywords]
            loose = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            assert loose or set(bound) <= set(parameters), (name, bound)
    assert seen == set(NAMED)
