"""record: statistics of every attention call of a model, collected while it runs.

    with attn_ext.inspect.record(model) as seen, attn_ext.replace_sdpa():
        model(x)
    print(seen.summary())          # a line a call: entropy, largest logit, collapse, sinks
    seen.save("attention.pt")      # for `attn-ext look attention.pt`

Every call that goes through attn_ext's own functions is seen (also from replace_sdpa, attn_ext.nn
and the integrations), whatever made it; a compiled graph is not.  O(N) memory a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from attn_ext.core import reference, validate
from attn_ext.core.schema import BOTTOM_RIGHT, Call, is_decode
from attn_ext.inspect import kernels, logits, maps
from attn_ext.ops import route

STATISTICS = ("entropy", "max_logit", "lse", "column_mass", "top_k", "pooled_map")


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

    def label(self) -> str:
        """Index, module, sequence and kind: "3 layers.1.attention [0] (sigmoid)"."""
        parts = [str(self.index), self.name, "" if self.sequence is None else f"[{self.sequence}]"]
        return " ".join(filter(None, (*parts, "" if self.kind == "softmax" else f"({self.kind})")))


class record:
    """Context manager that collects a `CallRecord` of every attention call within it, in `calls`.

    model: names come from its modules (None: no names).  statistics: some of STATISTICS.
    top_k: keys a query; pooled: rows and columns of the averaged map.
    collapse_entropy: a head whose mean entropy (over the rows that see a key, but for the first,
    which a causal mask leaves one) is below it, in nats, is flagged as collapsed.  sink_share: a
    key with more than this share of a head's whole mass is flagged as a sink (calls of at least 4
    keys).
    """

    def __init__(
        self, model=None, statistics=STATISTICS, *, top_k: int = 16, pooled: int = 64,
        collapse_entropy: float = 0.1, sink_share: float = 0.5,
    ):  # fmt: skip
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(statistics, str) or not isinstance(statistics, Iterable):
            raise TypeError(f"statistics must be a list of names, got {statistics!r:.80}")
        for name in statistics:
            if name not in STATISTICS:
                known = ", ".join(STATISTICS)
                raise ValueError(f"statistics must be some of {known}, got {name!r}")
        validate.integer("top_k", top_k, 1)
        validate.integer("pooled", pooled, 1)
        validate.number("collapse_entropy", collapse_entropy, 0.0)
        validate.number("sink_share", sink_share, 0.0, 1.0)
        self.model, self.statistics = model, frozenset(statistics)
        self.top_k, self.pooled = top_k, pooled
        self.collapse_entropy, self.sink_share = collapse_entropy, sink_share
        self.calls: list[CallRecord] = []
        self._count, self._running, self._hooks = 0, [], []

    def __enter__(self) -> record:
        for name, module in self.model.named_modules() if self.model is not None else ():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(module.register_forward_hook(self._leaving, always_call=True))
        route.observers.append(self._observe)
        return self

    def __exit__(self, *exception) -> None:
        route.observers.remove(self._observe)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._running = [], []

    def _entering(self, name: str):
        def hook(module, args):
            self._running.append(name)

        return hook

    def _leaving(self, module, args, output) -> None:
        if self._running:
            self._running.pop()

    @torch.no_grad()
    def _observe(self, call: Call) -> None:
        name = self._running[-1] if self._running else ""
        index, self._count = self._count, self._count + 1
        if not all(map(logits.holds_values, (call.q, call.k))):  # meta and fake tensors, torch.func
            return
        for sequence, dense in sequences(call):
            self.calls.append(self._look_at(logits.detached(dense), name, index, sequence))

    def _look_at(self, call: Call, name: str, index: int, sequence) -> CallRecord:
        batch, heads, seqlen_q, width = call.q.shape
        shape = (batch, heads, call.k.shape[1], seqlen_q, call.k.shape[2], width)
        kind = "additive" if call.w is not None else call.normalizer
        v = call.k[..., :1].contiguous()
        call = call._replace(v=v, dropout_p=0.0, rng_state=None, need_stats=False)
        lse, max_logit, entropy = kernels.row_stats(call)
        mass = kernels.column_mass(call, lse)
        found = CallRecord(name, index, sequence, shape, kind)
        if call.window_left >= 0 or call.window_right >= 0:
            found.first_query = shape[4] - shape[3] if call.align == BOTTOM_RIGHT else 0
        if "entropy" in self.statistics:
            found.mean_entropy = float(entropy[lse != -torch.inf].mean())
        found.collapsed = self._collapsed(entropy, lse)
        found.sinks = self._sinks(mass, call)
        kept = {"entropy": entropy, "max_logit": max_logit, "lse": lse, "column_mass": mass}
        for statistic in self.statistics & kept.keys():
            setattr(found, statistic, kept[statistic].cpu())
        if "top_k" in self.statistics:
            n = min(self.top_k, shape[4])
            best, keys = kernels.top_k(call, n, lse)
            found.top_weights, found.top_keys = best.cpu(), keys.cpu()
            (
                found.mean_top_weights, found.mean_top_keys, found.keys_seen,
                found.keys_seen_by_any, found.weight_sum,
            ) = (x.cpu() for x in kernels.mean_top_k(call, n))  # fmt: skip
        if "pooled_map" in self.statistics:
            found.pooled_map = maps.pooled_map_of(call, (self.pooled, self.pooled), lse).cpu()
        return found

    def _collapsed(self, entropy, lse) -> list:
        """Heads whose rows, but for the first (which a causal mask leaves one key), have hardly any
        entropy.
        """
        if entropy.shape[-1] < 2:
            return []
        seen = torch.isfinite(lse[..., 1:])
        total = torch.where(seen, entropy[..., 1:], 0.0).sum((0, 2))
        mean = total / seen.sum((0, 2))  # NaN, so not below, where no row sees a key
        return [h for h, value in enumerate(mean.tolist()) if value < self.collapse_entropy]

    def _sinks(self, mass, call: Call) -> list:
        if mass.shape[-1] < 4 or call.q.shape[2] < 2:
            return []
        by_key = mass.sum(0)  # [Hq, Sk]
        share, key = (by_key / by_key.sum(-1, keepdim=True).clamp_min(1e-30)).max(-1)
        pairs = enumerate(zip(key.tolist(), share.tolist(), strict=True))
        return [(h, j, s) for h, (j, s) in pairs if s > self.sink_share]

    def summary(self) -> str:
        """A line a call: name, sizes, mean entropy in nats of the rows that see a key, largest
        logit, flags.
        """
        lines = [f"{'call':40} {'B,Hq,Sq,Sk':>18} {'entropy/nats':>12} {'max logit':>9}  flags"]
        for c in self.calls:
            b, hq, _, sq, sk, _ = c.shape
            entropy = f"{c.mean_entropy:.3f}" if c.mean_entropy is not None else "-"
            top = f"{c.max_logit.max():.2f}" if c.max_logit is not None else "-"
            flags = [f"head {h} collapsed" for h in c.collapsed]
            flags += [f"head {h}: key {j} has {s:.0%} of the mass" for h, j, s in c.sinks]
            size = f"{b},{hq},{sq},{sk}"
            lines.append(
                f"{c.label():40} {size:>18} {entropy:>12} {top:>9}  {'; '.join(flags)}".rstrip()
            )
        return "\n".join(lines)

    def save(self, path) -> None:
        """Write the records to a file that `load` and `attn-ext look` read."""
        torch.save([dataclasses.asdict(c) for c in self.calls], path)


def load(path) -> list[CallRecord]:
    """The records of a file that `record.save` wrote; runs no code from the file."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be the path of a file, got {type(path).__name__} {path!r:.80}")
    rows = torch.load(Path(path), weights_only=True)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "shape" in r for r in rows):
        raise ValueError(f"{path} must be a file written by attn_ext.inspect.record.save")
    return [CallRecord(**row) for row in rows]


def sequences(call: Call) -> Iterator[tuple[int | None, Call]]:
    """(None, call) of a dense call, else (b, a dense call) of each sequence that has queries and
    keys.
    """
    plain = {"cu_seqlens_q": None, "cu_seqlens_k": None, "seqlens_k": None, "block_table": None}
    if call.cu_seqlens_q is None and not is_decode(call):
        if call.q.numel() and call.k.numel():
            yield None, call
        return
    if call.cu_seqlens_q is not None:
        starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        spans = [
            (slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2]))
            for b in range(len(starts_q) - 1)
        ]
        parts = [
            (call.q[rows].transpose(0, 1)[None], call.k[cols].transpose(0, 1)[None])
            for rows, cols in spans
        ]
    else:
        lengths = [call.max_seqlen_k] * call.q.shape[0]
        lengths = lengths if call.seqlens_k is None else call.seqlens_k.tolist()
        parts = [
            (call.q[b : b + 1], reference.cached_rows(call, call.k, b, n))
            for b, n in enumerate(lengths)
        ]
    for b, (q, k) in enumerate(parts):
        if not (q.numel() and k.numel()):
            continue
        mask, bias = (
            reference.sequence_scores(x, b, q.shape[2], k.shape[2]) for x in (call.mask, call.bias)
        )
        alibi = call.alibi_slopes
        alibi = alibi if alibi is None or alibi.dim() == 1 else alibi[b]
        yield b, call._replace(
            q=q, k=k, v=k[..., :1], mask=mask, bias=bias, alibi_slopes=alibi,
            max_seqlen_q=q.shape[2], max_seqlen_k=k.shape[2], **plain,
        )  # fmt: skip
