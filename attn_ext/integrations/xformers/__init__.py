"""xformers.ops.memory_efficient_attention on attn_ext: the same layouts, biases and meanings.

query [B, Mq, K], [B, Mq, H, K] or [B, Mq, G, H, K] (G groups of H heads; keys expanded over H are
read once).  attn_bias: an additive tensor or a class of `attn_ext.integrations.xformers.bias`;
xformers' own objects are understood too.  LSE is the natural log.  `install()` makes
`import xformers.ops` find this where the real package is absent.
"""

from __future__ import annotations

import functools
import importlib

import torch

from attn_ext.core import validate
from attn_ext.functional import common, dense, varlen
from attn_ext.integrations import checks, importing
from attn_ext.integrations.xformers import bias as biases
from attn_ext.integrations.xformers import dispatch, indexing, lengths, operators
from attn_ext.integrations.xformers import paged as paged
from attn_ext.integrations.xformers.bias import *  # noqa: F403
from attn_ext.integrations.xformers.indexing import index_select_cat as index_select_cat
from attn_ext.integrations.xformers.indexing import scaled_index_add as scaled_index_add
from attn_ext.integrations.xformers.indexing import unbind as unbind
from attn_ext.integrations.xformers.paged import *  # noqa: F403

VERSION = "0.0.35"  # the version whose signatures these are
_BY_NAME = {kind.__name__: kind for kind in (*biases.PUBLIC, *paged.PUBLIC)}


def _rank(query, key, value) -> int:
    for name, x in (("query", query), ("key", key), ("value", value)):
        validate.tensor(name, x)
        if x.dim() not in (3, 4, 5) or x.dim() != query.dim():
            raise ValueError(
                f"{name} must have 3, 4 or 5 dimensions [B, M, (G, H or H,) K], as many as query, "
                f"got shape {tuple(x.shape)}"
            )
    return query.dim()


def _heads_first(x, shared: bool):
    """[B, M, ..., K] as [B, H, M, K]; with `shared`, one head a group of a 5-dimensional x."""
    if x.dim() == 3:
        return x.unsqueeze(1)
    if x.dim() == 5:
        x = x[:, :, :, 0] if shared else x.flatten(2, 3)
    return x.transpose(1, 2)


def _shared(key, value) -> bool:
    """Whether both are expanded over the heads of a group.  A leaf with a gradient is not taken as
    shared: its gradient has a value for each head.
    """
    return all(
        x.dim() == 5 and x.stride(3) == 0 and not (x.is_leaf and x.requires_grad)
        for x in (key, value)
    )


def _dense_bias(name: str, bias, query):
    """An additive tensor as [B | 1, H | 1, Mq | 1, Mk | 1]."""
    rank = query.dim()
    validate.tensor(name, bias)
    if bias.dtype not in validate.FLOATING:
        raise TypeError(f"{name} must be floating (it is added), got {bias.dtype}")
    if bias.dim() != rank and not (rank == 5 and bias.dim() == 4):
        raise ValueError(
            f"{name} must have {rank} dimensions, as query has, got shape {tuple(bias.shape)}"
        )
    if rank == 3:
        return bias.unsqueeze(1)
    if bias.dim() == 4:
        return bias
    groups = bias.shape[1:3]
    if tuple(groups) != (1, 1) and all(
        n in (1, m) for n, m in zip(groups, query.shape[2:4], strict=True)
    ):
        bias = bias.expand(-1, *query.shape[2:4], -1, -1)
    return bias.flatten(1, 2)


def _known(attn_bias):
    """The class of the module `bias` that an object is or, being xformers' own, is named after."""
    found = _BY_NAME.get(type(attn_bias).__name__)  # torch.compile cannot always trace __mro__
    if found is not None and found is not biases.AttentionBias:
        return found
    for kind in type(attn_bias).__mro__:
        found = _BY_NAME.get(kind.__name__)
        if found is not None and found is not biases.AttentionBias:
            return found
    return None


def _window_of(attn_bias, kind) -> tuple:
    """(causal, window) of a bias of that kind; xformers' own objects have the same fields."""
    window = kind.window
    if isinstance(window, property):  # torch.compile cannot trace a call of its fget
        if hasattr(attn_bias, "window_left"):
            window = (attn_bias.window_left, attn_bias.window_right)
        else:
            window = (attn_bias._window_size - 1, None)
    return kind.causal, window


def _ends(intervals: list) -> list:
    """Where the blocks end once they are packed, from 0."""
    ends = [0]
    for first, end in intervals:
        ends.append(ends[-1] + end - first)
    return ends


def _longest(intervals: list) -> int:
    longest = 0
    for first, end in intervals:  # torch 2.6's torch.compile cannot trace max() of a list
        longest = max(longest, end - first)
    return longest


def _packed(x, intervals: list):
    """x [1, M, ..., K] without the room between the blocks."""
    if all(first == at for (first, _), at in zip(intervals, _ends(intervals)[:-1], strict=True)):
        return x
    return x[:, torch.cat([torch.arange(*block, device=x.device) for block in intervals])]


def _from_pages(name: str, x, attn_bias):
    """x [1, pages * page_size, ..., K] -> the keys of all blocks, one after the other."""
    rows = torch.cat(paged.rows_of_blocks(attn_bias)).to(x.device)
    if x.shape[0] != 1:
        raise ValueError(f"{name} must have shape [1, rows, ...], got {tuple(x.shape)}")
    if x.device.type == "cpu" and len(rows) and not 0 <= rows.min() <= rows.max() < x.shape[1]:
        raise ValueError(
            f"block_tables must hold pages within {name}'s {x.shape[1]} rows, "
            f"got rows {int(rows.min())} to {int(rows.max())}"
        )
    return x[:, rows]


def _check_blocks(name: str, x, total: int) -> None:
    if x.shape[0] != 1 or x.shape[1] != total:
        raise ValueError(
            f"{name} must have shape [1, {total}, ...] with a block-diagonal attn_bias, "
            f"got {tuple(x.shape)}"
        )


def _blocks_call(query, key, value, attn_bias, kind, p, scale):
    """The call of packed sequences, and what makes its results out [1, total_q, ..., Kv] and lse
    [1, H, total_q]."""
    q_info, k_info = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    in_pages = issubclass(kind, paged.Paged)
    _check_blocks("query", query, lengths.starts(q_info)[-1])
    shared = _shared(key, value)
    if shared:  # before anything is gathered: one head a group
        key, value = key[:, :, :, :1], value[:, :, :, :1]
    if in_pages:
        k_blocks = paged.logical(attn_bias)
        key, value = _from_pages("key", key, attn_bias), _from_pages("value", value, attn_bias)
    else:
        k_blocks = lengths.intervals(k_info)
        rows = lengths.starts(k_info)[-1]
        _check_blocks("key", key, rows)
        _check_blocks("value", value, rows)
        key, value = _packed(key, k_blocks), _packed(value, k_blocks)
    q_blocks = lengths.intervals(q_info)
    ends_q, ends_k = _ends(q_blocks), _ends(k_blocks)
    cu_q = torch.tensor(ends_q, dtype=torch.int32, device=query.device)
    cu_k = cu_q
    if ends_k != ends_q:
        cu_k = torch.tensor(ends_k, dtype=torch.int32, device=query.device)
    q, k, v = (
        _heads_first(x, s)[0].transpose(0, 1)
        for x, s in ((query, False), (key, shared), (value, shared))
    )
    checks.rows(q, k, v)
    causal, window = _window_of(attn_bias, kind)
    call = varlen.varlen_call(
        q, k, v, cu_q, cu_k, _longest(q_blocks), _longest(k_blocks), causal=causal, window=window,
        dropout_p=p, scale=scale,
    )  # fmt: skip
    shape = (*query.shape[:-1], value.shape[-1])
    return call, lambda out, lse: (out.reshape(shape), lse[None])


def _dense_call(query, key, value, attn_bias, kind, p, scale):
    """The call, and what makes its results out [B, Mq, ..., Kv] and lse [B, H, Mq]."""
    causal, window, bias = False, (None, None), None
    if kind is not None:
        causal, window = _window_of(attn_bias, kind)
        if kind is biases.LowerTriangularMaskWithTensorBias:
            own = attn_bias._bias if hasattr(attn_bias, "_bias") else attn_bias._subtensor
            bias = _dense_bias("attn_bias", own, query)  # _subtensor: xformers before 0.0.32
    elif attn_bias is not None:
        bias = _dense_bias("attn_bias", attn_bias, query)
    shared = _shared(key, value)
    folded = (_heads_first(query, False), _heads_first(key, shared), _heads_first(value, shared))
    checks.heads_first(*folded)
    if bias is not None:
        bias = checks.scores("attn_bias", bias, folded[0], folded[1].shape[2])
    call = dense.dense_call(
        *folded, causal=causal, window=window, bias=bias, dropout_p=p, scale=scale,
    )  # fmt: skip
    shape = (*query.shape[:-1], value.shape[-1])
    return call, lambda out, lse: (out.transpose(1, 2).reshape(shape), lse)


def _output_dtype(output_dtype) -> None:
    known = isinstance(output_dtype, torch.dtype) and output_dtype in validate.FLOATING
    if output_dtype is not None and not known:
        raise TypeError(
            "output_dtype must be None, torch.float16, bfloat16, float32 or float64, "
            f"got {output_dtype!r}"
        )


def _no_dropout(p, advice: str) -> None:
    p = validate.number("p", p, 0.0, 1.0)
    if p != 0.0:
        raise NotImplementedError(f"p must be 0 {advice}, got {p}")


def _call(query, key, value, attn_bias, p, scale, output_dtype):
    """The checked call, and what brings its out and lse into xformers' layout and output_dtype."""
    _rank(query, key, value)
    p = validate.number("p", p, 0.0, 1.0)
    _output_dtype(output_dtype)
    kind = None if attn_bias is None else _known(attn_bias)
    if kind is None and attn_bias is not None and not isinstance(attn_bias, torch.Tensor):
        raise TypeError(
            f"attn_bias must be a tensor or a bias of xformers, got {type(attn_bias).__name__}"
        )
    blocks = kind is not None and issubclass(kind, biases.Blocks)
    function = _blocks_call if blocks else _dense_call
    call, shaped = function(query, key, value, attn_bias, kind, p, scale)

    def layout(out, lse):
        out, lse = shaped(out, lse)
        if query.dim() == 5:
            lse = lse.unflatten(1, query.shape[2:4])
        return (out if output_dtype is None else out.to(output_dtype)), lse

    return call, layout


def _run(*arguments):
    """(out, lse) of the arguments of `_call`."""
    call, layout = _call(*arguments)
    return layout(*common.result(call, True, False))


def _prepared(inp: operators.Inputs) -> tuple:
    """`_call` of the inputs of an operator."""
    _rank(inp.query, inp.key, inp.value)
    for name in ("query", "key", "value"):  # before get_output_dtype reads that of query
        validate.floating(name, getattr(inp, name))
    return _call(
        inp.query, inp.key, inp.value, inp.attn_bias, inp.p, inp.scale, inp.get_output_dtype()
    )


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> torch.Tensor:
    """Attention of query [B, Mq, (G, H or H,) K] to key and value [B, Mk, ..., K and Kv].

    attn_bias: floating [B, Mq, Mk], [B, H, Mq, Mk] or [B, G, H, Mq, Mk], added, with gradient; or
    a bias object.  With a block-diagonal one all sequences are packed in [1, total, ...].
    p: dropout probability.  scale: 1/sqrt(K) if None.  op is ignored: attn_ext chooses by itself.
    Returns [B, Mq, (G, H or H,) Kv] in output_dtype (query's if None).  A query without keys: 0.
    """
    return _run(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> torch.Tensor:
    """`memory_efficient_attention` without gradients."""
    with torch.no_grad():
        return _run(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    """(out, lse [B, (G, H or H,) Mq], [1, ..., total_q] with blocks), without gradients; p must
    be 0.
    """
    _no_dropout(p, "here: use memory_efficient_attention")
    with torch.no_grad():
        return _run(query, key, value, attn_bias, p, scale, output_dtype)


def memory_efficient_attention_partial(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    """(out, lse) over some of the keys, differentiable in both; `merge_attentions` joins them.

    output_dtype None is float32 (float64 for float64 inputs).
    """
    _no_dropout(p, "for a partial result")
    if output_dtype is None and getattr(query, "dtype", None) in validate.FLOATING:
        output_dtype = torch.promote_types(query.dtype, torch.float32)
    return _run(query, key, value, attn_bias, p, scale, output_dtype)


def _parts(name: str, split) -> torch.Tensor:
    """One tensor, or a list of tensors of one shape, with a first dimension for the parts."""
    if not isinstance(split, (torch.Tensor, list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(split).__name__}")
    if isinstance(split, torch.Tensor):
        validate.tensor(name, split)
        split = [split] if split.dim() == 0 else split
    parts = list(split)
    for part in parts:
        validate.tensor(name, part)
        validate.floating(name, part)
        if (part.shape, part.dtype, part.device) != (
            parts[0].shape,
            parts[0].dtype,
            parts[0].device,
        ):
            raise ValueError(
                f"{name} must hold tensors of one shape, dtype and device, got "
                f"{tuple(part.shape)} {part.dtype} beside {tuple(parts[0].shape)} {parts[0].dtype}"
            )
    if not parts:
        raise ValueError(f"{name} must hold at least one part, got none")
    return torch.stack(parts)


def merge_attentions(attn_split, lse_split, write_lse=True, output_dtype=None):
    """(out in output_dtype, the parts' if None; lse or None) of partial results over different
    keys.

    attn_split: a list of [B, M, (G, H or H,) K], or one tensor with a first dimension for the
    parts; lse_split: alike of [B, (G, H or H,) M].
    """
    outs, lses = _parts("attn_split", attn_split), _parts("lse_split", lse_split)
    write_lse = validate.switch("write_lse", write_lse)
    _output_dtype(output_dtype)
    if outs.shape[0] != lses.shape[0] or not outs.shape[0]:
        raise ValueError(
            f"lse_split must have attn_split's number of parts, at least 1, got {lses.shape[0]} "
            f"for {outs.shape[0]}"
        )
    if outs.dim() not in (5, 6) or lses.dim() != outs.dim() - 1:
        raise ValueError(
            "attn_split must hold [B, M, (G, H or H,) K] and lse_split [B, (G, H or H,) M], "
            f"got shapes {tuple(outs.shape[1:])} and {tuple(lses.shape[1:])}"
        )
    # [B, M, ..., K] -> [B, ..., M]
    wanted = (outs.shape[1], *outs.shape[3:-1], outs.shape[2])
    if tuple(lses.shape[1:]) != wanted or lses.device != outs.device:
        raise ValueError(
            f"lse_split must hold {wanted} on {outs.device}, got {tuple(lses.shape[1:])} on "
            f"{lses.device}"
        )
    lse = torch.logsumexp(lses, dim=0)
    share = torch.exp(lses - torch.where(lse == -torch.inf, 0.0, lse))
    weight = share.movedim(-1, 2).unsqueeze(-1)
    out = (outs * weight.to(outs.dtype)).sum(dim=0)
    return out if output_dtype is None else out.to(output_dtype), lse if write_lse else None


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    """(dq, dk, dv) of `memory_efficient_attention` for `grad`; p must be 0.

    output and lse are those of `memory_efficient_attention_forward_requires_grad`, or of rows that
    have seen more keys, merged by `merge_attentions`.
    """
    _no_dropout(p, "here: use memory_efficient_attention")
    inp = operators.Inputs(query, key, value, attn_bias, p, scale)
    _rank(query, key, value)
    found = operators.gradients(_prepared, operators.Context(lse, output), inp, grad, "output")
    return found.dq, found.dk, found.dv


FUNCTIONS = (
    memory_efficient_attention, memory_efficient_attention_backward,
    memory_efficient_attention_forward, memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial, merge_attentions, *indexing.FUNCTIONS,
)  # fmt: skip
# what callers pass as `op`: the modules of the forward and of the backward
_OPS = {
    "MemoryEfficientAttentionCkOp": ("ck", "ck"),
    "MemoryEfficientAttentionCutlassBlackwellOp": ("cutlass_blackwell", "cutlass_blackwell"),
    "MemoryEfficientAttentionCutlassFwdFlashBwOp": ("cutlass", "flash"),
    "MemoryEfficientAttentionCutlassOp": ("cutlass", "cutlass"),
    "MemoryEfficientAttentionFlashAttentionOp": ("flash", "flash"),
    "MemoryEfficientAttentionSplitKCkOp": ("ck_splitk", "ck"),
}
_OF_OPERATORS = (
    operators.AttentionBwOpBase, operators.AttentionFwOpBase, operators.AttentionOpBase,
    operators.Context, operators.Gradients, operators.Inputs,
)  # fmt: skip
_FMHA = "xformers.ops.fmha"


def _bias_module() -> dict:
    """Besides the biases what callers use to recognise and describe them."""
    return {
        **_BY_NAME,
        "VARLEN_BIASES": (biases.Blocks,),
        "_GappySeqInfo": lengths.GappySeqInfo,
        "_PaddedSeqLenInfo": lengths.PaddedSeqLenInfo,
        "_SeqLenInfo": lengths.SeqLenInfo,
    }


def _ops() -> dict:
    return {"fmha": importlib.import_module("xformers.ops.fmha"), **_names()}


def _fmha() -> dict:
    inner = ("attn_bias", "common", "dispatch", *operators.MODULES)
    modules = {name: importlib.import_module(f"{_FMHA}.{name}") for name in inner}
    kinds = [modules[name] for name in operators.MODULES]
    ops = {"ALL_FW_OPS": [m.FwOp for m in kinds], "ALL_BW_OPS": [m.BwOp for m in kinds]}
    return {**modules, **_names(), **ops, **dispatch.names()}


def _common() -> dict:
    return {**{kind.__name__: kind for kind in _OF_OPERATORS}, "AttentionOp": tuple}


def _names() -> dict:
    """What is in `xformers.ops` and in `xformers.ops.fmha`."""
    pairs = {
        name: (
            importlib.import_module(f"{_FMHA}.{forward}").FwOp,
            importlib.import_module(f"{_FMHA}.{backward}").BwOp,
        )
        for name, (forward, backward) in _OPS.items()
    }
    own = {f.__name__: f for f in FUNCTIONS}
    return {**_BY_NAME, **own, **_common(), **pairs, "AttentionMask": biases.AttentionBias}


_STAND_IN = importing.StandIn(
    "xformers", "xformers", VERSION,
    {
        "xformers": lambda: {"__version__": VERSION},
        "xformers.version": lambda: {"__version__": VERSION},
        "xformers.ops": _ops,
        "xformers.ops.fmha": _fmha,
        "xformers.ops.fmha.attn_bias": _bias_module,
        "xformers.ops.fmha.common": _common,
        "xformers.ops.fmha.dispatch": dispatch.names,
        **{
            f"{_FMHA}.{name}": functools.partial(operators.module, name, _prepared)
            for name in operators.MODULES
        },
    },
)  # fmt: skip


def install() -> bool:
    """Make `import xformers.ops` resolve to this module unless the real package is installed.

    Returns True if the stand-in is in place, False if the real package is.
    """
    return _STAND_IN.install()


def uninstall() -> None:
    """Undo `install()`."""
    _STAND_IN.uninstall()
