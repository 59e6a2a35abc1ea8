# What a type checker sees of `import attn_ext`: what a call returns follows from return_lse and
# return_stats.  tests/package/test_typing.py holds the names to the functions themselves.

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from attn_ext import flops as flops
from attn_ext import inspect as inspect
from attn_ext import integrations as integrations
from attn_ext import nn as nn
from attn_ext import reference as reference
from attn_ext import testing as testing
from attn_ext.functional.common import RowStats as RowStats
from attn_ext.functional.explain import Explanation
from attn_ext.integrations.sdpa import replace_sdpa as replace_sdpa
from attn_ext.measure.recorder import profile as profile

__version__: str

class _Scores(TypedDict, total=False):
    window: Sequence[int | None] | None
    mask: Tensor | None
    bias: Tensor | None
    backend: str

class _Dots(_Scores, total=False):
    softcap: float
    alibi_slopes: Tensor | None
    sink: Tensor | None
    scale: float | None

class _Attention(_Dots, total=False):
    causal: bool | Literal["top_left", "bottom_right"]
    dropout_p: float
    deterministic: bool
    normalizer: Literal["softmax", "sigmoid"]
    sigmoid_bias: float | None

class _Decode(_Dots, total=False):
    k_new: Tensor | None
    v_new: Tensor | None
    block_table: Tensor | None
    causal: bool
    num_splits: int

class _Additive(_Scores, total=False):
    b: Tensor | None
    causal: bool | Literal["top_left", "bottom_right"]
    dropout_p: float

class _AdditiveDense(_Additive, total=False):
    lengths: Tensor | None

def backends() -> dict[str, str]: ...
def explain(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Explanation: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[_Attention],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
    **options: Unpack[_Attention],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
    **options: Unpack[_Attention],
) -> tuple[Tensor, RowStats]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[_Attention],
) -> tuple[Tensor, Tensor, RowStats]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    return_stats: bool = False,
    **options: Unpack[_Attention],
) -> Any: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[_Attention],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
    **options: Unpack[_Attention],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
    **options: Unpack[_Attention],
) -> tuple[Tensor, RowStats]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[_Attention],
) -> tuple[Tensor, Tensor, RowStats]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool,
    return_stats: bool = False,
    **options: Unpack[_Attention],
) -> Any: ...
@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Decode],
) -> Tensor: ...
@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Decode],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    return_lse: bool,
    **options: Unpack[_Decode],
) -> Any: ...
@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_AdditiveDense],
) -> Tensor: ...
@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[_AdditiveDense],
) -> tuple[Tensor, Tensor]: ...
@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[_AdditiveDense],
) -> Any: ...
@overload
def additive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Additive],
) -> Tensor: ...
@overload
def additive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Additive],
) -> tuple[Tensor, Tensor]: ...
@overload
def additive_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool,
    **options: Unpack[_Additive],
) -> Any: ...
