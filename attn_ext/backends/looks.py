"""What tensors of the CPU look like: the key of all that is remembered of a dense call.

Reading a tensor from Python costs a microsecond (sizes, strides and dtype are objects made anew),
so that it is done in C where torch has a table of C functions for it (DLPack's, from torch 2.10).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

try:
    from attn_ext import _C
except ImportError:  # attn_ext.backends.cpu says why
    _C = None

PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _by_attributes(*tensors) -> Hashable | None:
    """`looks` for a torch without DLPack's table."""
    seen: list = []
    try:
        for x in tensors:
            if x is None:
                seen.append(None)
                continue
            if (
                type(x) not in PLAIN or not x.is_cpu or x.is_neg()
                or x.layout is not torch.strided or _is_wrapped(x) or _is_batched(x)
            ):  # fmt: skip
                return None
            seen += (x.shape, x.stride(), x.dtype)
    except RuntimeError:  # a nested tensor, which has no strides
        return None
    return tuple(seen)


def _best():
    """The cheapest of both ways here."""
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if _C is not None and table is not None and _C.use_exchange(table, *PLAIN):
        return _C.looks
    return _by_attributes


# looks(*tensors): everything of up to eight tensors (None for one that is absent) that the way of a
# call depends on, but their values and addresses.  What is remembered of a call is found by it, so
# that a kernel never gets a tensor that looks otherwise than the checked one.  None where one is no
# plain tensor whose memory lies on the CPU and holds its values: a subclass, a view with torch's
# negative bit, a sparse one, one that a transform has wrapped.
looks = _best()
