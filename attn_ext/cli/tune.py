"""attn-ext tune: hands over to attn_ext.triton_kernels.tune, or says why it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch


def why_not() -> str:
    """The reason why nothing can be tuned here; "" when it can"""
    if importlib.util.find_spec("triton") is None:
        return "tune needs Triton, which is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "tune measures the Triton kernels on a GPU, and torch sees none here"
    if importlib.util.find_spec("attn_ext.triton_kernels.tune") is None:
        return "this version of attn_ext has no attn_ext.triton_kernels.tune"
    return ""


def run(minutes: float, out) -> int:
    """Tune; 1 with a line on stderr where it cannot"""
    why = why_not()
    if why:
        print(f"attn-ext: {why}", file=sys.stderr)
        return 1
    module = importlib.import_module("attn_ext.triton_kernels.tune")
    arguments = ["--minutes", str(minutes)]
    return int(module.main(arguments + (["--out", str(out)] if out else [])) or 0)
