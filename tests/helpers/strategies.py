"""Hypothesis strategy for random mixes of all features: keyword arguments of `testing.random_call`.

Arguments rather than calls: a failing example then prints as one line that reproduces it.
"""

import torch
from hypothesis import strategies as st

from attn_ext.core.schema import BOTTOM_RIGHT, TOP_LEFT, UNBOUNDED
from attn_ext.testing import LAYOUTS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# around the edges of vectors and tiles: 1, 4, 8, 16, 32, 64, 128 and their neighbours
LENGTHS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 100, 129)
HEAD_DIMS = (1, 2, 3, 8, 15, 16, 24, 33, 40, 64, 80, 111, 128, 160, 256)
SCORE_DIMS = (False, "k", "q", "bk", "hqk", "bhqk", "h")


def windows():
    """(left, right), each side unbounded half of the time."""
    side = st.one_of(st.just(UNBOUNDED), st.integers(0, 40))
    return st.tuples(side, side)


@st.composite
def call_options(
    draw, kinds=("dense", "varlen", "decode"), dtypes=DTYPES, lengths=LENGTHS, head_dims=HEAD_DIMS,
    heads=(1, 2, 3), groups=(1, 2, 4), most=4,
):  # fmt: skip
    """Keyword arguments of random_call: any sizes with any mix of features.

    heads: of K and V; groups: query heads of each; most: sequences of a varlen or decode call, and
    one more than a dense batch has."""
    heads_k = draw(st.sampled_from(heads))
    options = {
        "seed": draw(st.integers(0, 1000)),
        "dtype": draw(st.sampled_from(dtypes)),
        "heads_k": heads_k,
        "heads_q": heads_k * draw(st.sampled_from(groups)),
        "head_dim": draw(st.sampled_from(head_dims)),
        "head_dim_v": draw(st.sampled_from((None, *head_dims))),
        "causal": draw(st.booleans()),
        "window": draw(windows()),
        "align": draw(st.sampled_from((BOTTOM_RIGHT, TOP_LEFT))),
        "mask": draw(st.sampled_from(SCORE_DIMS)),
        "bias": draw(st.sampled_from(SCORE_DIMS)),
        "softcap": draw(st.sampled_from((0.0, 0.0, 2.0, 30.0))),
        "alibi": draw(st.sampled_from((False, True, "b"))),
        "sink": draw(st.booleans()),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.2, 0.9, 1.0))),
        "stats": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "deterministic": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(kinds))
    length = st.sampled_from(lengths)
    if kind == "varlen":
        pairs = draw(st.lists(st.tuples(length, length), max_size=most))
        options["seqlens_q"] = [q for q, _ in pairs]
        options["seqlens_k"] = [k for _, k in pairs]
    elif kind == "decode":
        capacity = draw(length)
        options["seqlen_q"] = draw(st.integers(1, 5))
        options["seqlen_k"] = capacity
        options["cache_seqlens"] = draw(
            st.lists(st.integers(0, capacity), min_size=1, max_size=most)
        )
        options["page_size"] = draw(st.sampled_from((0, 1, 3, 16, 64)))
        options["num_splits"] = draw(st.sampled_from((0, 0, 1, 2, 3, 100)))
    else:
        options["batch"] = draw(st.integers(0, most - 1))
        options["seqlen_q"] = draw(length)
        options["seqlen_k"] = draw(length)
    return options
