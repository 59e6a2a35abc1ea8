"""What `record` keeps of a call, the file that it is saved in, and its rows as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attn_ext.core.schema import BOTTOM_RIGHT, Call

TABLES = ("heads", "keys")
NOTHING = (
    "run the model in eager mode within `with attn_ext.inspect.record(model) as seen, "
    "attn_ext.replace_sdpa():`; calls in compiled graphs, and attention that goes neither through "
    "attn_ext nor through torch's scaled_dot_product_attention, are not seen"
)


@dataclass
class CallRecord:
    """What one attention call (one sequence of a packed or ragged one) looked like; what was not
    asked for is None.
    """

    name: str  # the module that was running, "" without a model
    index: int  # the how manieth call, from 0
    sequence: int | None  # of a packed or ragged call
    shape: tuple  # (B, Hq, Hk, Sq, Sk, D)
    kind: str = "softmax"  # or "sigmoid", or "additive"
    entropy: torch.Tensor | None = None  # [B, Hq, Sq], nats
    max_logit: torch.Tensor | None = None  # [B, Hq, Sq]
    lse: torch.Tensor | None = None  # [B, Hq, Sq]
    column_mass: torch.Tensor | None = None  # [B, Hq, Sk]
    top_weights: torch.Tensor | None = None  # [B, Hq, Sq, n]
    top_keys: torch.Tensor | None = None  # int64 [B, Hq, Sq, n], -1 where there is none
    mean_top_weights: torch.Tensor | None = None  # [B, Sq, n], of the mean over heads: whole rows
    mean_top_keys: torch.Tensor | None = None  # int64 [B, Sq, n]
    keys_seen: torch.Tensor | None = None  # int64 [B, Hq, Sq]: keys that the row sees
    keys_seen_by_any: torch.Tensor | None = None  # int64 [B, Sq]: keys that some head sees
    weight_sum: torch.Tensor | None = None  # [B, Hq, Sq]: sum_j P_ij, less than 1 beside a sink
    pooled_map: torch.Tensor | None = None  # [B, Hq, rows, cols]
    collapsed: list = field(default_factory=list)  # heads with hardly any entropy
    sinks: list = field(default_factory=list)  # (head, key, share of the mass)
    mean_entropy: float | None = None  # over the rows that see a key, nats
    first_query: int | None = None  # the key at whose place the first query stands, as causal or a
    # window says; None where neither is given
    q: torch.Tensor | None = None  # [B, Hq, Sq, D], the call's own tensor, with keep="qk"
    k: torch.Tensor | None = None  # [B, Hk, Sk, D]
    options: dict | None = None  # of the call, as `row_stats` takes them; with keep="qk"
    ablated: list = field(default_factory=list)  # heads whose output was set to 0

    def label(self) -> str:
        """Index, module, sequence and kind: "3 layers.1.attention [0] (sigmoid)"."""
        parts = [str(self.index), self.name, "" if self.sequence is None else f"[{self.sequence}]"]
        return " ".join(filter(None, (*parts, "" if self.kind == "softmax" else f"({self.kind})")))

    def title(self) -> str:
        """The label where nothing beside it says that its number is that of a call."""
        return self.label() if self.name else f"call {self.label()}"

    @property
    def layer(self) -> tuple:
        """(q, k, options), as `rollout` takes a layer: row_stats(q, k, **options) is the call's."""
        if self.q is None:
            raise ValueError(f"call {self.label()!r} must be recorded with keep='qk', got no Q, K")
        if self.options is None:
            raise NotImplementedError(
                f"call {self.label()!r} must be softmax over dot products of whole sequences for "
                "row_stats and rollout, which know no other weights: use its q and k by themselves"
            )
        return self.q, self.k, self.options


def options_of(call: Call) -> dict | None:
    """The options with which attn_ext.inspect computes the weights of a dense call; None of a call
    that it cannot: other weights than softmax over dot products, or a part of a longer sequence.
    """
    if call.w is not None or call.normalizer != "softmax" or call.frame is not None:
        return None
    left, right = (None if x < 0 else int(x) for x in (call.window_left, call.window_right))
    top_left = call.align != BOTTOM_RIGHT and right == 0
    options = {
        "causal": "top_left" if top_left else False,
        "window": (left, None if top_left else right),
        "mask": call.mask, "bias": call.bias, "softcap": call.softcap,
        "alibi_slopes": call.alibi_slopes, "sink": call.sink, "scale": call.scale,
    }  # fmt: skip
    return {n: x for n, x in options.items() if x is not None and x is not False}


def _to_file(value):
    """The value without autograd and on the CPU, as a file holds it."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return {n: _to_file(x) for n, x in value.items()} if isinstance(value, dict) else value


def save(calls: Sequence[CallRecord], path: str | Path) -> None:
    """Write the records to a file that `load` and `attn-ext look` read."""
    fields = [f.name for f in dataclasses.fields(CallRecord)]
    torch.save([{name: _to_file(getattr(c, name)) for name in fields} for c in calls], path)


def load(path: str | Path) -> list[CallRecord]:
    """The records of a file that `record.save` wrote; runs no code from the file."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be the path of a file, got {type(path).__name__} {path!r:.80}")
    rows = torch.load(Path(path), weights_only=True)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "shape" in r for r in rows):
        raise ValueError(f"{path} must be a file written by attn_ext.inspect.record.save")
    return [CallRecord(**row) for row in rows]


def table(calls, what: str = "heads") -> list[dict]:
    """Rows with the same columns: one for each call, example and head; or with what="keys" one for
    each recorded key of each query of these, the largest weight first.
    """
    if what not in TABLES:
        raise ValueError(f"what must be {' or '.join(map(repr, TABLES))}, got {what!r}")
    if what == "heads":
        return [row for c in calls for row in _heads(c)]
    if calls and all(c.top_keys is None for c in calls):
        raise ValueError("what='keys' needs the statistic 'top_k', which was not recorded")
    return [row for c in calls if c.top_keys is not None for row in _keys(c)]


def _place(call: CallRecord, example: int, head: int) -> dict:
    return {
        "call": call.index, "name": call.name, "sequence": call.sequence, "kind": call.kind,
        "example": example, "head": head,
    }  # fmt: skip


def _heads(call: CallRecord) -> Iterator[dict]:
    batch, heads, _, seqlen_q, seqlen_k, _ = call.shape
    sinks = {h: (key, share) for h, key, share in call.sinks}
    for b in range(batch):
        for h in range(heads):
            entropy, largest = (
                None if x is None else x[b, h].detach() for x in (call.entropy, call.max_logit)
            )
            if entropy is not None and call.lse is not None:  # rows that see no key have none
                entropy = entropy[call.lse[b, h].detach() != -torch.inf]
            key, share = sinks.get(h, (None, None))
            yield _place(call, b, h) | {
                "queries": seqlen_q, "keys": seqlen_k,
                "mean_entropy": None if entropy is None else float(entropy.mean()),
                "max_logit": None if largest is None else float(largest.max()),
                "collapsed": h in call.collapsed, "sink_key": key, "sink_share": share,
                "ablated": h in call.ablated,
            }  # fmt: skip


def _keys(call: CallRecord) -> Iterator[dict]:
    keys, weights = call.top_keys.tolist(), call.top_weights.tolist()
    for b, heads in enumerate(keys):
        for h, rows in enumerate(heads):
            for i, row in enumerate(rows):
                for rank, key in enumerate(j for j in row if j >= 0):
                    weight = weights[b][h][i][rank]
                    place = {"query": i, "rank": rank, "key": key, "weight": weight}
                    yield _place(call, b, h) | place
