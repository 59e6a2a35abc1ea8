"""The package flash-attn 2 on attn_ext: its functions (`functions`), its passes (`passes`), its
extension (`kernels`), padding (`bert_padding`), rotary embeddings (`rotary`) and modules
(`modules`).

`install()` makes `import flash_attn` find this where the real package is absent.
"""

from __future__ import annotations

import importlib

from attn_ext.integrations import importing
from attn_ext.integrations.flash_attn import bert_padding, kernels, passes, rotary
from attn_ext.integrations.flash_attn.functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    get_block_size_n,
)  # fmt: skip

VERSION = "2.8.3"  # the version whose signatures these are
FUNCTIONS = (
    flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache,
)  # fmt: skip


def _top() -> dict:
    inner = importlib.import_module("flash_attn.flash_attn_interface")
    return {"__version__": VERSION, "flash_attn_interface": inner, **_interface()}


def _interface() -> dict:
    own = {f.__name__: f for f in FUNCTIONS} | {"_get_block_size_n": get_block_size_n}
    gpu = importlib.import_module("flash_attn_2_cuda")
    return {**own, **passes.NAMES, "USE_TRITON_ROCM": False, "flash_attn_gpu": gpu}


def _extension() -> dict:
    return {f.__name__: f for f in kernels.FUNCTIONS}


def _padding() -> dict:
    return {n: f for n, f in vars(bert_padding).items() if callable(f) and not n.startswith("_")}


def _rotary() -> dict:
    own = (
        rotary.RotaryEmbedding, rotary.apply_rotary_emb, rotary.apply_rotary_emb_kv_,
        rotary.apply_rotary_emb_qkv_, rotary.apply_rotary_emb_torch,
    )  # fmt: skip
    return {**{f.__name__: f for f in own}, "apply_rotary_emb_func": rotary.apply_rotary_emb}


def _modules() -> dict:
    own = importlib.import_module("attn_ext.integrations.flash_attn.modules")
    return {kind.__name__: kind for kind in (own.FlashCrossAttention, own.FlashSelfAttention)}


_STAND_IN = importing.StandIn(
    "flash_attn", "flash-attn", VERSION,
    {
        "flash_attn": _top,
        "flash_attn.flash_attn_interface": _interface,
        "flash_attn.bert_padding": _padding,
        "flash_attn.layers": dict,
        "flash_attn.layers.rotary": _rotary,
        "flash_attn.modules": dict,
        "flash_attn.modules.mha": _modules,
        "flash_attn_2_cuda": _extension,
    },
)  # fmt: skip


def install() -> bool:
    """Make `import flash_attn` resolve to this module unless the real package is installed.

    Covers flash_attn, flash_attn.flash_attn_interface, flash_attn.bert_padding,
    flash_attn.layers.rotary, FlashSelfAttention and FlashCrossAttention of flash_attn.modules.mha,
    flash_attn_2_cuda, importlib.util.find_spec and importlib.metadata.
    Returns True if the stand-in is in place, False if the real package is.
    """
    return _STAND_IN.install()


def uninstall() -> None:
    """Undo `install()`."""
    _STAND_IN.uninstall()
