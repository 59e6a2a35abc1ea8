"""The operators that callers of xformers name, ask or call by themselves: `fmha.cutlass.FwOp`,
`fmha.flash.BwOp` and so on, with `fmha.Inputs`, `fmha.Context` and `fmha.Gradients`.

All of them are attn_ext, which chooses its kernels by itself: they differ in their names only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from attn_ext.core import validate
from attn_ext.core.schema import Call, Needs, lse_shape, statistics_dtype
from attn_ext.functional import common
from attn_ext.integrations.xformers import bias as biases
from attn_ext.integrations.xformers import paged
from attn_ext.ops import parts


@dataclass
class Inputs:
    """The arguments of `memory_efficient_attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: Any = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def scale_float(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def get_output_dtype(self) -> torch.dtype:
        """That of the result: a partial one is float32, or float64 of float64."""
        if self.output_dtype is None and self.is_partial:
            return torch.promote_types(self.query.dtype, torch.float32)
        return self.query.dtype if self.output_dtype is None else self.output_dtype


@dataclass
class Context:
    """What a backward needs of its forward."""

    lse: torch.Tensor
    out: torch.Tensor
    op_bw: Any = None  # where dropout ties it to one operator
    rng_state: Any = None  # of the dropout
    qkv_share_storage: bool = False

    def get_padded_lse(self, pad_to: int, force_pad_inf: bool = False) -> torch.Tensor:
        """lse [B, H, M] with M rounded up to a multiple of pad_to; what is added is inf."""
        pad_to = validate.integer("pad_to", pad_to, 1)
        lse = self.lse[..., : self.out.shape[1]] if force_pad_inf else self.lse
        more = -lse.shape[-1] % pad_to
        return torch.nn.functional.pad(lse, (0, more), value=math.inf)


@dataclass
class Gradients:
    """Those of a backward; db where attn_bias is a tensor that requires one."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    db: torch.Tensor | None = None


class AttentionOpBase:
    """What all operators tell of themselves."""

    NAME = "attn_ext"
    OPERATOR_CATEGORY = "memory_efficient_attention"
    SUPPORTED_DEVICES = frozenset(("cpu", "cuda"))
    SUPPORTED_DTYPES = frozenset(validate.FLOATING)
    SUPPORTED_MAX_K = math.inf
    SUPPORTED_MIN_K = 1
    SUPPORTED_ATTN_BIAS_TYPES = (
        type(None), torch.Tensor, *(kind for kind in biases.PUBLIC + paged.PUBLIC
                                    if kind is not biases.AttentionBias),
    )  # fmt: skip
    CUDA_MINIMUM_COMPUTE_CAPABILITY = (8, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = None
    SUPPORTS_DROPOUT = SUPPORTS_CUSTOM_SCALE = SUPPORTS_DIFFERENT_VALUE_EMBED = True
    SUPPORTS_OUTPUT_DTYPE = SUPPORTS_PARTIAL = SUPPORTS_BMGHK = True
    SUPPORTS_ATTN_BIAS_GRAD = True
    IS_DETERMINISTIC = True  # a forward is; see AttentionBwOpBase
    VARLEN_LSE_PACKED = True

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def supports(cls, d: Inputs) -> bool:
        """Whether attn_ext takes these inputs."""
        return not cls.not_supported_reasons(d)

    @classmethod
    def shape_not_supported_reasons(cls, Mq: int, Mkv: int, K: int, Kv: int) -> list[str]:
        """Why sizes are refused, whatever else the call has."""
        if min(K, Kv) >= cls.SUPPORTED_MIN_K:
            return []
        return [f"K and Kv must be at least {cls.SUPPORTED_MIN_K}, got {K} and {Kv}"]

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        """The error that the call would raise, or nothing."""
        try:
            cls.prepared(replace(d, p=0.0))  # with p > 0 it draws from torch's generator
            validate.number("p", d.p, 0.0, 1.0)
        except (NotImplementedError, TypeError, ValueError) as error:
            return [str(error)]
        return []

    @staticmethod
    def prepared(inp: Inputs) -> tuple[Call, Callable]:
        """The call of attn_ext, and what brings its (out, lse) into xformers' layout."""
        raise NotImplementedError("the operators are in xformers.ops.fmha's modules")


class AttentionFwOpBase(AttentionOpBase):
    """A forward pass."""

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[torch.Tensor, Context | None]:
        """(out, Context where needs_gradient says so), without a graph."""
        needs_gradient = validate.switch("needs_gradient", needs_gradient)
        with torch.no_grad():
            call, layout = cls.prepared(inp)
            out, lse = layout(*common.result(call, True, False))
        if not needs_gradient:
            return out, None
        return out, Context(lse=lse, out=out, rng_state=call.rng_state)


class AttentionBwOpBase(AttentionOpBase):
    """A backward pass.  On GPUs some kernels add up dQ and the gradient of a shared bias in an
    order that varies, unless torch.use_deterministic_algorithms forbids it."""

    IS_DETERMINISTIC = False

    @classmethod
    def apply(cls, ctx: Context, inp: Inputs, grad: torch.Tensor) -> Gradients:
        """The gradients of the inputs, with out and lse of ctx."""
        return gradients(cls.prepared, ctx, inp, grad)


def gradients(
    prepared: Callable, ctx: Context, inp: Inputs, grad: torch.Tensor, out_name: str = "out"
) -> Gradients:
    """Those of the inputs, of which `prepared` (see `AttentionOpBase`) makes a call, where out and
    lse of ctx may be those of rows that have seen more keys, as `merge_attentions` gives them."""
    for name in ("query", "key", "value"):
        validate.tensor(name, getattr(inp, name))
        validate.floating(name, getattr(inp, name))
    leaves = [x.detach().requires_grad_() for x in (inp.query, inp.key, inp.value)]
    bias = inp.attn_bias
    if isinstance(bias, torch.Tensor) and bias.requires_grad:
        bias = bias.detach().requires_grad_()
        leaves.append(bias)
    # with p > 0 `prepared` would draw a mask from torch's generator, which all later ones follow
    again = replace(inp, query=leaves[0], key=leaves[1], value=leaves[2], attn_bias=bias, p=0.0)
    dropout_p = validate.number("p", inp.p, 0.0, 1.0)
    with torch.enable_grad():
        call, layout = prepared(again)
        out = call.q.detach().new_zeros((*call.q.shape[:-1], call.v.shape[-1]))
        lse = out.new_zeros(lse_shape(call), dtype=statistics_dtype(out.dtype))
        own = (out.requires_grad_(), lse.requires_grad_())
        shaped = layout(*own)
    if dropout_p > 0:
        if not isinstance(ctx.rng_state, torch.Tensor):
            raise ValueError(
                "ctx must have the rng_state of a forward of attn_ext with dropout, got "
                f"{type(ctx.rng_state).__name__}"
            )
        call = call._replace(dropout_p=dropout_p, rng_state=ctx.rng_state)
    pairs = (("grad", grad, shaped[0]), (out_name, ctx.out, shaped[0]), ("lse", ctx.lse, shaped[1]))
    for name, x, like in pairs:
        validate.tensor(name, x)
        validate.floating(name, x)
        if x.shape != like.shape or x.device != like.device:
            raise ValueError(
                f"{name} must have the shape {tuple(like.shape)} on {like.device}, got "
                f"{tuple(x.shape)} on {x.device}"
            )
    # a layout only moves numbers, so that its derivative moves them back
    moved = [
        torch.autograd.grad(like, of, x.to(like.dtype), retain_graph=True)[0]
        for (_, x, like), of in zip(pairs, (own[0], *own), strict=True)
    ]
    held = (call.q, call.k, call.v, call.bias)[: len(leaves)]
    needs = Needs(q=True, k=True, v=True, bias=len(leaves) > 3)
    with torch.no_grad():
        found = parts.backward_of_rows(call, *moved, needs)[: len(leaves)]
    return Gradients(*torch.autograd.grad(held, leaves, found))


# xformers' modules of operators, with the beginning of their names there
MODULES = {
    "ck": "ckF", "ck_splitk": "ck_splitKF", "cutlass": "cutlassF", "cutlass_blackwell": "cutlassF",
    "flash": "fa2F", "flash3": "fa3F", "triton_splitk": "triton_splitKF",
}  # fmt: skip


def module(name: str, prepared: Callable[[Inputs], tuple[Call, Callable]]) -> dict:
    """FwOp and BwOp of the module of that name; prepared: see `AttentionOpBase.prepared`."""
    named, serve = MODULES[name], staticmethod(prepared)
    forward = {"NAME": f"{named}@attn_ext", "prepared": serve}
    backward = {"NAME": f"{named[:-1]}B@attn_ext", "prepared": serve}
    return {
        "FwOp": type("FwOp", (AttentionFwOpBase,), forward),
        "BwOp": type("BwOp", (AttentionBwOpBase,), backward),
    }
