"""Attention of other libraries, served by attn_ext: torch's SDPA, flash-attn, xformers,
transformers, diffusers, and the context parallelism of torchtitan and DeepSpeed.

Each module maps another library's arguments onto `attn_ext.attention`, `attention_varlen` or
`attention_decode` and imports that library only inside functions.
"""

import importlib

_MODULES = (
    "deepspeed", "diffusers", "flash_attn", "sdpa", "torchtitan", "transformers", "xformers",
)  # fmt: skip


def __getattr__(name: str):
    """`attn_ext.integrations.transformers` after a plain `import attn_ext`, loaded on use."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name!r}")


def __dir__():
    """Names of this package, those not yet loaded included."""
    return sorted({*globals(), *_MODULES})
