"""Is a result right?  The float64 truth for some heads of a case, by blocks of queries, and the
tolerance rule of `attn_ext.testing` applied to what a peer computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_ext.measure.cases import Case
from attn_ext.testing import allowed_error

BLOCK_BYTES = 64 << 20  # of scores that are held at a time
PAIRS = 1 << 26  # (query, key) pairs that a check may cost; always at least one group of heads
NAMES = ("out", "dq", "dk", "dv")
INACCURATE, WRONG = 1.0, 16.0  # times the allowed error: above the one a remark, above the other no


def blockwise(case: Case, q, k, v, dout=None, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """(out,) or (out, dq, dk, dv) in `dtype` of q [G, Sq, D] against k, v [Sk, D]: one group of
    query heads.  What is rounded in a `dtype` of 16 bits is S and P, as a plain user's would be.
    """
    q, k, v = (x.to(dtype) for x in (q, k, v))
    group, seqlen_q, dim = q.shape
    seqlen_k, scale = k.shape[0], case.head_dim**-0.5
    rows = max(1, BLOCK_BYTES // max(1, 8 * group * seqlen_k))
    j = torch.arange(seqlen_k, device=q.device)
    out = torch.empty_like(q)
    grads = None if dout is None else [torch.zeros_like(x) for x in (q, k, v)]
    for start in range(0, seqlen_q, rows):
        block = slice(start, min(seqlen_q, start + rows))
        s = (q[:, block] @ k.T) * scale  # [G, rows, Sk]
        if case.causal:
            i = torch.arange(block.start, block.stop, device=q.device) + seqlen_k - seqlen_q
            s.masked_fill_(j[None] > i[:, None], -torch.inf)
        p = torch.softmax(s, -1).nan_to_num_(0.0)
        out[:, block] = p @ v
        if grads is not None:
            do = dout[:, block].to(dtype)
            dp = do @ v.T
            ds = p * (dp - (do * out[:, block]).sum(-1, keepdim=True)) * scale
            grads[0][:, block] = ds @ k
            grads[1] += ds.flatten(0, 1).T @ q[:, block].reshape(-1, dim)
            grads[2] += p.flatten(0, 1).T @ do.reshape(-1, dim)
    return (out,) if grads is None else (out, *grads)


@dataclass
class Verdict:
    """max error and the allowed one of the worst output"""

    error: float
    allowed: float
    output: str

    @property
    def state(self) -> str:
        """ "ok", "inaccurate" (still timed) or "wrong" (not timed)"""
        ratio = self.error / self.allowed
        if not ratio <= WRONG:  # NaN too
            return "wrong"
        return "ok" if ratio <= INACCURATE else "inaccurate"


class Reference:
    """The truth of a case for its first, its last and one other group of heads; `most`: so many"""

    def __init__(self, case: Case, q, k, v, dout, most: int = 3):
        self.case, self.group = case, case.heads_q // case.heads_k
        backward = case.direction != "fwd"
        groups = case.batch * case.heads_k
        cost = self.group * case.seqlen_q * case.seqlen_k
        chosen = [0, groups - 1, groups * 5 // 8]
        chosen = list(dict.fromkeys(chosen[: min(most, max(1, PAIRS // cost))]))
        self.truths = []
        for index in chosen:
            at = divmod(index, case.heads_k)
            inputs = (self._heads(q, at), k[at], v[at], self._heads(dout, at) if backward else None)
            truth = blockwise(case, *inputs)
            naive = blockwise(case, *inputs, dtype=case.torch_dtype)
            self.truths.append((at, truth, naive))

    def _heads(self, x, at):
        """The query heads of KV head at[1] in batch element at[0]: [G, Sq, D]"""
        return x[at[0], at[1] * self.group : (at[1] + 1) * self.group]

    def check(self, results) -> Verdict:
        """Hold (out,) or (out, dq, dk, dv) or (dq, dk, dv) to the rule; the worst one counts"""
        worst = Verdict(0.0, 1.0, "out")
        for at, truths, naives in self.truths:
            pairs = list(zip(NAMES, truths, naives, strict=False))[-len(results) :]
            for got, (name, truth, naive) in zip(results, pairs, strict=True):
                part = self._heads(got, at) if name in ("out", "dq") else got[at]
                kind = "out" if name == "out" else "grad"
                error = (part.double() - truth).abs().max().item()
                allowed = allowed_error(truth, naive, kind)
                if not error / allowed <= worst.error / worst.allowed:
                    worst = Verdict(error, allowed, name)
                if error != error:
                    return worst
        return worst
