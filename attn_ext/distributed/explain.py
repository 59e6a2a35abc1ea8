"""What context_attention would do, in words; no process group is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_ext.core.schema import Call
from attn_ext.distributed import model
from attn_ext.distributed.layout import Layout
from attn_ext.distributed.pieces import Rules, pieces
from attn_ext.ops import parts

if TYPE_CHECKING:
    from collections.abc import Sequence


def explain(
    layout: Layout, heads_q: int, heads_k: int, head_dim: int, *, causal: bool = False,
    dtype: torch.dtype | None = None, window: Sequence[int | None] | None = (None, None),
    alibi: bool = False, dropout: bool = False, scores: bool = False, device: str = "cuda",
    batch: int = 1, backend: str = "auto",
) -> str:  # fmt: skip
    """The model's waiting of each method, which "auto" would take, how many calls the first rank
    makes in each hop of a ring, and who computes those that need the positions of the whole."""
    dtype = torch.bfloat16 if dtype is None else dtype
    sizes = model.Sizes(
        batch, heads_q, heads_k, layout.seqlen, head_dim, dtype.itemsize, layout.parts, causal,
        device,
    )  # fmt: skip
    left, right = (-1 if side is None else side for side in window)
    rules = Rules(left, 0 if causal else right, alibi, dropout, scores)
    own = layout.segments(0)
    hops = [
        pieces(layout, own, layout.segments(-h % layout.parts), rules) for h in range(layout.parts)
    ]
    framed = sum(p.frame is not None for hop in hops for p in hop)
    lines = [model.table(sizes), f"  calls of rank 0 in each hop: {[len(hop) for hop in hops]}"]
    lines.append(
        f"  of these need positions of the whole (frame): {framed}, {_server(device, backend)}"
    )
    return "\n".join(lines)


def _server(device: str, backend: str) -> str:
    """Who serves calls with frames."""
    if torch.device(device).type == "cpu" or torch.cuda.is_available():
        x = torch.empty(1, 1, 1, 8, dtype=torch.float32, device=device)
        frame = torch.zeros(1, 6, dtype=torch.int32, device=device)
        call = Call(q=x, k=x, v=x, frame=frame, max_seqlen_q=1, max_seqlen_k=1, backend=backend)
        return f"served by {parts.served_by(call)}"
    return "served by triton where it is installed, else by torch operations on tiles"
