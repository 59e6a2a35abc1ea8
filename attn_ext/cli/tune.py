"""attn-ext tune: hands over to attn_ext.triton_kernels.tune, or says why it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import time
from pathlib import Path

import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def why_not() -> str:
    """The reason why nothing can be tuned here; "" when it can"""
    if importlib.util.find_spec("triton") is None:
        return "tune needs Triton, which is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "tune measures the Triton kernels on a GPU, and torch sees none here"
    if importlib.util.find_spec("attn_ext.triton_kernels.tune") is None:
        return "this version of attn_ext has no attn_ext.triton_kernels.tune"
    return ""


def run(minutes: float, head_dims: list[int], dtype: str, out: Path | None) -> int:
    """Tune one direction and width after the other until the time is up; 1 with a line on stderr
    where nothing can be tuned.  `out` gets a copy of the cache file.
    """
    why = why_not()
    if why:
        print(f"attn-ext: {why}", file=sys.stderr)
        return 1
    module = importlib.import_module("attn_ext.triton_kernels.tune")
    configs = importlib.import_module("attn_ext.triton_kernels.configs")
    end = time.monotonic() + 60 * minutes
    tasks = [(d, kind) for d in head_dims for kind in configs.DIRECTIONS]
    for index, (head_dim, kind) in enumerate(tasks):
        if time.monotonic() > end:
            print(f"the time is up: {len(tasks) - index} of {len(tasks)} tables keep their values")
            break
        options = ["--head-dims", str(head_dim), "--directions", kind, "--dtype", dtype]
        code = module.main(options)
        if code:
            return int(code)
    if out is not None:
        shutil.copyfile(configs.cache_file(), out)
    return 0
