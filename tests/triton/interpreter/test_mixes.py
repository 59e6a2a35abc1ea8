"""Random mixes of all features through the public functions, forward and backward, interpreted,
against the float64 reference.

The same examples on every run of CI; ATTN_EXT_EXAMPLES=300 for other and more ones.
"""

import os
from unittest import mock

import pytest
import strategies
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attn_ext
from attn_ext.core.schema import BOTTOM_RIGHT, GRADIENTS, TOP_LEFT, Grads
from attn_ext.functional import dense, varlen
from attn_ext.testing import check_call, random_call

EXAMPLES = int(os.environ.get("ATTN_EXT_EXAMPLES", "0"))
# around the edges of the interpreter's tiles of 32 x 32
LENGTHS = (0, 1, 2, 7, 31, 32, 33, 50, 65)
HEAD_DIMS = (1, 3, 8, 16, 24, 33, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the backend refuses float64


class PublicFunctions:
    """The public functions with backend="triton" in the form of a backend, for `check_call`."""

    __name__ = "the public functions"

    @staticmethod
    def available():
        return ""

    @staticmethod
    def unsupported(problem):
        return []

    def forward(self, call):
        """(out, lse, max_logit | None, entropy | None), and the graph kept for `backward`."""
        leaves = {n: getattr(call, n) for n in GRADIENTS if getattr(call, n) is not None}
        decode = call.seqlens_k is not None
        self.leaves = {n: x.detach().requires_grad_(not decode) for n, x in leaves.items()}
        options = {n: self.leaves.get(n) for n in ("bias", "sink")} | {
            "mask": call.mask, "alibi_slopes": call.alibi_slopes, "softcap": call.softcap,
            "scale": call.scale, "return_lse": True, "backend": "triton",
        }  # fmt: skip
        causal = call.window_right == 0
        sides = (call.window_left, -1 if causal else call.window_right)
        options["window"] = tuple(None if side < 0 else side for side in sides)
        options["causal"] = causal and ("top_left" if call.align == TOP_LEFT else "bottom_right")
        tensors = [self.leaves[n] for n in "qkv"]
        if decode:
            self.out, self.lse = attn_ext.attention_decode(
                *tensors, call.seqlens_k, block_table=call.block_table,
                num_splits=call.num_splits, **options | {"causal": causal},
            )  # fmt: skip
            return self.out, self.lse, None, None
        options |= {
            "dropout_p": call.dropout_p, "return_stats": call.need_stats,
            "deterministic": call.deterministic,
        }  # fmt: skip
        function, module = attn_ext.attention, dense
        if call.cu_seqlens_q is not None:
            function, module = attn_ext.attention_varlen, varlen
            tensors += [call.cu_seqlens_q, call.cu_seqlens_k]
        with mock.patch.object(module, "draw_rng_state", lambda q: call.rng_state):
            self.out, self.lse, *stats = function(*tensors, **options)
        max_logit, entropy = stats[0][1:] if stats else (None, None)
        return self.out.detach(), self.lse.detach(), max_logit, entropy

    def backward(self, call, dout, out, lse, dlse, needs):
        """(dq, dk, dv, dbias, dsink) by autograd."""
        results, seeds = (self.out, self.lse), (dout, dlse)
        if dlse is None:
            results, seeds = (self.out,), (dout,)
        found = torch.autograd.grad(results, list(self.leaves.values()), seeds)
        found = dict(zip(self.leaves, found, strict=True))
        return Grads(**found)


@st.composite
def small_options(draw, kind):
    """Keyword arguments of random_call that the public functions can say, in small sizes."""
    options = draw(
        strategies.call_options(
            kinds=(kind,), dtypes=DTYPES, lengths=LENGTHS, head_dims=HEAD_DIMS, heads=(1, 2),
            groups=(1, 2, 2, 7), most=3,
        )
    )  # fmt: skip
    if not options["causal"]:
        options["align"] = BOTTOM_RIGHT
    if kind == "decode":
        options |= {"dropout_p": 0.0, "stats": False, "align": BOTTOM_RIGHT}
        size = options["page_size"] or 1  # masks reach over whole pages
        options["seqlen_k"] = -(-options["seqlen_k"] // size) * size
    return options


@pytest.mark.parametrize("kind", ["dense", "varlen", "decode"])
def test_any_mix_of_features_obeys_the_tolerance_rule(kind):
    """Features that are right alone and wrong together, around every tile edge."""

    @settings(
        max_examples=EXAMPLES or 12,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(options=small_options(kind))
    def check(options):
        check_call(random_call(**options), PublicFunctions(), dlse=options["seed"] % 2 == 0)

    check()
