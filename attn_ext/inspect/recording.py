"""record: statistics of every attention call of a model, collected while it runs.

    with attn_ext.inspect.record(model) as seen, attn_ext.replace_sdpa():
        model(x)
    print(seen.summary())          # a line a call: entropy, largest logit, collapse, sinks
    seen.save("attention.pt")      # for `attn-ext look attention.pt`

Every call that goes through attn_ext's own functions is seen (also from replace_sdpa, attn_ext.nn,
the integrations and torch's own switch), whatever made it; a compiled graph is not, unless it calls
torch's operators, as that switch has it.  O(N) memory a call.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from attn_ext.core import reference, validate
from attn_ext.core.schema import BOTTOM_RIGHT, Call, is_decode
from attn_ext.inspect import kernels, logits, maps, records
from attn_ext.inspect.records import NOTHING, CallRecord
from attn_ext.inspect.statistics import row_stats_of
from attn_ext.ops import route

if TYPE_CHECKING:
    from pathlib import Path

    import pandas

    from attn_ext.inspect.page import Page

STATISTICS = ("entropy", "max_logit", "lse", "column_mass", "top_k", "pooled_map")
DIFFERENTIABLE = ("entropy", "max_logit", "lse")
KEEP = ("qk",)


class record:
    """Context manager that collects a `CallRecord` of every attention call within it, in `calls`.

    model: names come from its modules (None: no names).  statistics: some of STATISTICS.
    top_k: keys a query; pooled: rows and columns of the averaged map.
    collapse_entropy: a head whose mean entropy (over the rows that see a key, but for the first,
    which a causal mask leaves one) is below it, in nats, is flagged as collapsed.  sink_share: a
    key with more than this share of a head's whole mass is flagged as a sink (calls of at least 4
    keys).

    keep: "qk" keeps the q, k and options of each call, too: `layers()` is what `rollout` takes, and
    gradients with respect to a call's q and k can be had from them.
    differentiable: entropy, max_logit and lse of softmax calls hold their graph, for a loss.
    ablate: {module's name or the call's index: heads}; the output of these heads becomes 0.
    """

    def __init__(
        self, model: torch.nn.Module | None = None, statistics: Sequence[str] = STATISTICS, *,
        top_k: int = 16, pooled: int = 64, collapse_entropy: float = 0.1, sink_share: float = 0.5,
        keep: str | None = None, differentiable: bool = False, ablate: Mapping | None = None,
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
        validate.boolean("differentiable", differentiable)
        if keep is not None and keep not in KEEP:
            raise ValueError(f"keep must be None or 'qk', got {keep!r}")
        self.model, self.statistics = model, frozenset(statistics)
        if differentiable and not self.statistics & set(DIFFERENTIABLE):
            known = ", ".join(DIFFERENTIABLE)
            raise ValueError(
                f"differentiable needs a statistic that has a gradient ({known}), got "
                f"{sorted(self.statistics)}"
            )
        self.top_k, self.pooled, self.keep, self.differentiable = (
            top_k, pooled, keep, differentiable
        )  # fmt: skip
        self.collapse_entropy, self.sink_share = collapse_entropy, sink_share
        self.ablate = _ablation(model, ablate)
        self.calls: list[CallRecord] = []
        self._count, self._running, self._hooks = 0, [], []
        self._without_values, self._modules_ran, self._ablated = 0, 0, set()
        self._error: Exception | None = None

    def __enter__(self) -> record:
        for name, module in self.model.named_modules() if self.model is not None else ():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(module.register_forward_hook(self._leaving, always_call=True))
        route.observers.append(self._observe)
        return self

    def __exit__(self, error, *exception) -> None:
        route.observers.remove(self._observe)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._running = [], []
        if self._error is not None and error is None:  # replace_sdpa has taken torch's way instead
            raise self._error
        unused = [place for place in self.ablate if place not in self._ablated]
        if unused and error is None:
            raise RuntimeError(
                f"ablate must name modules or indices of calls that are seen, got {unused[0]!r}, "
                f"and saw {len(self.calls)} calls: {self._names() or self.why_nothing()}"
            )

    def _names(self) -> str:
        names = dict.fromkeys(f"{c.index} {c.name}".strip() for c in self.calls)
        return ", ".join(names)

    def _entering(self, name: str):
        def hook(module, args):
            self._running.append(name)
            self._modules_ran += 1

        return hook

    def _leaving(self, module, args, output) -> None:
        if self._running:
            self._running.pop()

    def _observe(self, call: Call):
        """Record the call; what sets the outputs of ablated heads to 0, if there are any."""
        try:
            return self._seen(call)
        except (ValueError, NotImplementedError) as error:
            self._error = error
            raise

    def _seen(self, call: Call):
        if (self.differentiable or self.ablate) and _is_below_autograd(call):
            raise NotImplementedError(
                "differentiable=True and ablate with gradients need calls that autograd sees, got "
                "one of torch's own switch (activate_flash_attention_impl): use "
                "attn_ext.replace_sdpa() in its place, or ablate under torch.no_grad()"
            )
        name = self._running[-1] if self._running else ""
        index, self._count = self._count, self._count + 1
        heads = self._heads_to_ablate(name, index, call)
        if not all(map(logits.holds_values, (call.q, call.k))):  # meta and fake tensors, torch.func
            self._without_values += 1
        else:
            for sequence, dense in sequences(call):
                found = self._look_at(logits.detached(dense), name, index, sequence)
                found.ablated = heads
                self._keep_graph(found, dense)
                self.calls.append(found)
        return (lambda results: _without(results, heads)) if heads else None

    def _heads_to_ablate(self, name: str, index: int, call: Call) -> list[int]:
        """Those of the call's place; a head that it has not is a ValueError."""
        places = [p for p in (name, index) if p in self.ablate]
        heads = sorted({h for p in places for h in self.ablate[p]})
        self._ablated.update(places)
        if heads and heads[-1] >= call.q.shape[1]:
            raise ValueError(
                f"ablate must name heads below the {call.q.shape[1]} of call {index} {name!r}, got "
                f"{heads[-1]}"
            )
        return heads

    def _keep_graph(self, found: CallRecord, call: Call) -> None:
        """What shares the graph of the model: statistics for a loss, Q and K."""
        if self.differentiable:
            if found.kind != "softmax" or call.frame is not None:
                raise NotImplementedError(
                    "differentiable=True knows softmax over dot products of whole sequences, got "
                    f"call {found.label()!r}: record without it, or keep='qk'"
                )
            plain = call._replace(v=call.k[..., :1].contiguous(), dropout_p=0.0, rng_state=None)
            stats = row_stats_of(plain._replace(backend="auto"))
            for name in self.statistics & set(DIFFERENTIABLE):
                setattr(found, name, getattr(stats, name))
        if self.keep == "qk":
            found.q, found.k, found.options = call.q, call.k, records.options_of(call)

    @torch.no_grad()
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
            ) = (x.cpu() for x in kernels.mean_top_k(call, n, lse))  # fmt: skip
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

    def why_nothing(self) -> str:
        """What to do where no call was seen, or where names are missing; "" if neither."""
        if self.calls:
            if self.model is not None and not self._modules_ran:
                return (
                    "no module of the model that record was given ran, so calls have no names: "
                    "give record the model that is called"
                )
            return ""
        why = []
        if self._without_values:
            why.append(
                f"{self._without_values} calls were on tensors without values (meta, fake, or of a "
                "transform of torch.func)"
            )
        if self.model is not None and not self._modules_ran:
            why.append("no module of the model that record was given ran: call that model")
        if self.model is not None and any(map(_is_compiled, self.model.modules())):
            why.append(
                "the model is compiled, and calls of compiled graphs are not seen: run it under "
                "torch.compiler.set_stance('force_eager')"
            )
        return "; ".join((*why, NOTHING))

    def summary(self) -> str:
        """A line a call: name, sizes, mean entropy in nats of the rows that see a key, largest
        logit, flags; and what to do where nothing was seen.
        """
        lines = [f"{'call':40} {'B,Hq,Sq,Sk':>18} {'entropy/nats':>12} {'max logit':>9}  flags"]
        for c in self.calls:
            b, hq, _, sq, sk, _ = c.shape
            entropy = f"{c.mean_entropy:.3f}" if c.mean_entropy is not None else "-"
            top = f"{c.max_logit.max():.2f}" if c.max_logit is not None else "-"
            flags = [f"head {h} collapsed" for h in c.collapsed]
            flags += [f"head {h}: key {j} has {s:.0%} of the mass" for h, j, s in c.sinks]
            flags += [f"head {h} ablated" for h in c.ablated]
            size = f"{b},{hq},{sq},{sk}"
            lines.append(
                f"{c.label():40} {size:>18} {entropy:>12} {top:>9}  {'; '.join(flags)}".rstrip()
            )
        why = self.why_nothing()
        return "\n".join((*lines, f"no call was seen: {why}" if not self.calls else why)).rstrip()

    def layers(self) -> list[tuple]:
        """(q, k, options) of each call, with keep="qk": what `rollout` takes."""
        return [c.layer for c in self.calls]

    def save(self, path: str | Path) -> None:
        """Write the records to a file that `load` and `attn-ext look` read."""
        records.save(self.calls, path)

    def to_dataframe(self, what: str = "heads") -> pandas.DataFrame:
        """A pandas.DataFrame with a row for each call, example and head; with what="keys" for each
        recorded key of each query of these.
        """
        rows = records.table(self.calls, what)
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_dataframe needs pandas: pip install pandas, or use to_csv"
            ) from error
        return pandas.DataFrame(rows)

    def to_csv(self, path: str | Path, what: str = "heads") -> None:
        """The rows of `to_dataframe` as a file of comma-separated values; needs no pandas."""
        rows = records.table(self.calls, what)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)

    def page(self, **options) -> Page:
        """The page of `look`, which a notebook shows and `save` writes; options: tokens,
        query_tokens, tokenizer, title, as `look`.
        """
        from attn_ext.inspect.look import page_of

        return page_of(self, **options)

    def _repr_html_(self) -> str:
        """The page without tokens, as notebooks show it."""
        from attn_ext.inspect.look import in_a_notebook

        return in_a_notebook(self)


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile has made it, or has changed it in place."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _is_below_autograd(call: Call) -> bool:
    """Whether gradients will be asked for of a call that torch's autograd has already passed: its
    backward is torch's and knows of no change of the results."""
    key = torch._C.DispatchKey.AutogradFunctionality
    passed = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    return passed and route.wants_grad(call.q, call.k, call.v, call.bias)


def _ablation(model, ablate) -> dict:
    """{module's name or call's index: heads}, checked."""
    if ablate is None:
        return {}
    if not isinstance(ablate, Mapping):
        raise TypeError(
            "ablate must be a dict of heads by the name of a module or the index of a call, as "
            f"{{'layers.1.attention': [0, 3]}}, got {type(ablate).__name__} {ablate!r:.80}"
        )
    names = None if model is None else dict(model.named_modules())
    found = {}
    for place, heads in ablate.items():
        if isinstance(place, bool) or not isinstance(place, (str, int)):
            raise TypeError(f"ablate must name modules or indices of calls, got {place!r:.80}")
        if isinstance(place, str) and place not in (names or ()):
            what = "needs a model to find" if names is None else "must name modules of model, got"
            raise ValueError(f"ablate {what} {place!r}")
        heads = [heads] if isinstance(heads, int) else heads
        if isinstance(heads, str) or not isinstance(heads, Iterable):
            raise TypeError(f"ablate must give a list of heads for {place!r}, got {heads!r:.80}")
        found[place] = list(heads)
        for head in found[place]:
            validate.integer("a head of ablate", head, 0)
    return found


def _without(results: tuple, heads: list[int]) -> tuple:
    """The results of a call with O = 0 at these heads; O is [B or total_q, Hq, ...]."""
    out = results[0]
    kept = torch.ones(out.shape[1], dtype=torch.bool, device=out.device)
    kept[heads] = False
    shape = (1, -1, *(1,) * (out.dim() - 2))
    return (torch.where(kept.view(shape), out, 0.0), *results[1:])


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
