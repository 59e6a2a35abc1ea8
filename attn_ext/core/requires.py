"""Imported before all else: says what to install where torch is missing or too old."""

OLDEST = (2, 6)

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":  # torch is there, and something of its own is missing
        raise
    raise ImportError(
        "attn_ext needs torch >= 2.6, which is not installed: pip install torch"
    ) from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"attn_ext needs torch >= 2.6, got {torch.__version__}: pip install -U torch")
