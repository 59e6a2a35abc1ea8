"""Models of transformers whose sequences lie on several ranks, each function on every rank of a
group: `register(mesh=...)` against the same model on one process.
"""

import torch
import torch.distributed as dist
from closeness import relative

from attn_ext.distributed import Layout

PACKED = ([0, 9, 10, 38], 38)
BATCH, VOCABULARY = 2, 64


def _model(kind: str, implementation: str):
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attn_implementation=implementation,
        **({"sliding_window": 11} if kind == "Mistral" else {}),
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _layout(kind: str, parts: int) -> Layout:
    starts, seqlen = PACKED
    if kind == "packed":
        return Layout.packed(starts, parts)
    # 36: as 2 P equal chunks, which position_ids alone can say
    return getattr(Layout, kind)(36 if kind == "zigzag" else seqlen, parts)


def _results(model, ids, positions, weights, group=None) -> list:
    """Logits, and the gradients of all parameters, added up over the ranks."""
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    (logits * weights).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    if group is not None:
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)
    return [logits.detach(), *gradients]


def model(group, rank, parts, kind, shards) -> float:
    """The largest error of logits and gradients."""
    from attn_ext.integrations import transformers as integration

    layout = _layout(shards, parts)
    given = {"layout": lambda: layout} if layout.is_packed else {}
    integration.register()
    integration.register("attn_ext_context", mesh=group, **given)
    torch.manual_seed(7)
    batch = 1 if layout.is_packed else BATCH
    ids = torch.randint(VOCABULARY, (batch, layout.seqlen))
    weights = torch.randn(batch, layout.seqlen, VOCABULARY)
    whole = Layout.packed(PACKED[0], 1) if layout.is_packed else Layout.contiguous(layout.seqlen, 1)
    want = _results(_model(kind, "attn_ext"), ids, whole.position_ids(0)[None], weights)
    own, own_weights = layout.shard(ids, 1, rank), layout.shard(weights, 1, rank)
    positions = layout.position_ids(rank)[None]
    got = _results(_model(kind, "attn_ext_context"), own, positions, own_weights, group)
    want[0] = layout.shard(want[0], 1, rank)
    return max(relative(a, b) for a, b in zip(got, want, strict=True))


def model_refuses(group, rank, parts) -> dict:
    """{what: the error} of calls that would be wrong without a word."""
    from attn_ext.integrations import transformers as integration

    integration.register("attn_ext_refusing", mesh=group)
    layout, model = Layout.zigzag(36, parts), _model("Llama", "attn_ext_refusing").eval()
    n = layout.length(rank)
    ids, positions = torch.zeros(1, n, dtype=torch.long), layout.position_ids(rank)[None]
    padded = torch.ones(1, n, dtype=torch.long)
    padded[:, 0] = 0
    square = torch.ones(1, 1, n, n, dtype=torch.bool)
    first = model(input_ids=ids, position_ids=positions).past_key_values
    calls = {
        "no positions": dict(),
        "padding": dict(position_ids=positions, attention_mask=padded),
        "a mask of the shard": dict(position_ids=positions, attention_mask=square),
        "a cache": dict(position_ids=positions, past_key_values=first),
    }
    found = {}
    for name, options in calls.items():
        try:
            model(input_ids=ids, **options)
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
    for name, options in {
        "layout": dict(layout=3),
        "method": dict(method="ring", mesh=None),
    }.items():
        try:
            integration.register("attn_ext_refusing", **(dict(mesh=group) | options))
            found[name] = "no error"
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found
