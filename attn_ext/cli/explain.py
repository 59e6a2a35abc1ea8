"""attn-ext explain: the backend chosen for a problem, and each other one with its reason."""

from __future__ import annotations

import json

from attn_ext.cli.errors import BadArgument
from attn_ext.core.problem import Problem
from attn_ext.functional.explain import of
from attn_ext.measure.cases import make

FEATURES = ("mask", "bias", "softcap", "alibi", "sink", "dropout", "window", "stats")


def run(shape, dtype, device, causal, backward, features, kind, as_json) -> int:
    """Print; 1 when no backend can serve it"""
    if device not in ("cpu", "cuda"):
        raise BadArgument(f"--device must be cpu or cuda, got {device!r}")
    if kind not in ("dense", "varlen", "decode"):
        raise BadArgument(f"--kind must be dense, varlen or decode, got {kind!r}")
    for name in features or ():
        if name not in FEATURES:
            raise BadArgument(f"--features must be among {', '.join(FEATURES)}, got {name!r}")
    try:
        case = make(shape, dtype, causal)
    except ValueError as error:
        raise BadArgument(f"--{error}") from None
    problem = Problem(
        kind, device, case.torch_dtype, case.batch, case.heads_q, case.heads_k, case.seqlen_q,
        case.seqlen_k, case.head_dim, case.head_dim, causal=causal, grad=backward,
        bias_grad=backward and "bias" in (features or ()),
        **dict.fromkeys(features or (), True),
    )  # fmt: skip
    found = of(problem)
    if as_json:
        answer = {"shape": case.shape, "chosen": found.chosen, "reasons": found.reasons}
        print(json.dumps(answer, indent=1))
    else:
        print(found)
    return 0 if found.chosen else 1
