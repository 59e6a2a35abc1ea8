"""xformers.ops.fmha.dispatch: which operator takes a call.  Here it is always the same one."""

from __future__ import annotations

import importlib

from attn_ext.core import validate


def _dispatch_fw(inp, needs_gradient: bool):
    """The operator of a forward; NotImplementedError where attn_ext refuses the call."""
    return _supporting("FwOp", inp)


def _dispatch_bw(inp, varlen_lse_packed: bool | None = None):
    """The operator of a backward; NotImplementedError where attn_ext refuses the call."""
    return _supporting("BwOp", inp)


def _supporting(which: str, inp):
    op = getattr(importlib.import_module("xformers.ops.fmha.cutlass"), which)
    reasons = op.not_supported_reasons(inp)
    if reasons:
        raise NotImplementedError(f"{op.NAME} does not take these inputs: {reasons[0]}")
    return op


def _set_use_fa3(use_flash_attention3: bool) -> None:
    """A choice of kernels, which attn_ext makes by itself; `_get_use_fa3` gives it back."""
    _STATE["fa3"] = validate.switch("use_flash_attention3", use_flash_attention3)


def _get_use_fa3() -> bool:
    return _STATE["fa3"]


_STATE = {"fa3": True}


def names() -> dict:
    """What is in that module."""
    return {f.__name__: f for f in (_dispatch_fw, _dispatch_bw, _get_use_fa3, _set_use_fa3)}
