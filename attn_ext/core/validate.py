"""Checks of what a user passes, before any pointer is used.  Each message gives the argument, the
rule and the value.

`dense`, `varlen` and `decode` check types, dtypes, devices and shapes only (they work on fake and
symbolic tensors) and return the canonical (align, window_left, window_right); values.py reads
what tensors hold.
"""

from __future__ import annotations

import functools
import math

import torch

from attn_ext.core.schema import BOTTOM_RIGHT, TOP_LEFT, UNBOUNDED

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CAUSAL = (False, True, "top_left", "bottom_right")
MAX_SEQLEN = 2**31 - 1  # positions are 32-bit counters of the dropout mask
MAX_ELEMENTS = 2**63 - 1
MAX_WIDTH = 2**29  # of a module: 3 E * E float64 have fewer than 2^63 bytes
SMALLEST = torch.finfo(torch.float32).tiny  # positive normal float32


def tensor(name: str, value) -> None:
    """TypeError unless `value` is a dense torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else ""
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__} {shown}".rstrip()
        )
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense (strided) tensor, got a nested one: attention_varlen takes "
            "packed values, scaled_dot_product_attention three jagged tensors"
        )
    if value.layout is not torch.strided or value.is_quantized:
        kind = "a quantized one" if value.is_quantized else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")


def boolean(name: str, value) -> None:
    """TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


_TRUTHS = ("bool", "torch.bool")


def switch(name: str, value) -> bool:
    """A switch that the other library takes by its truth: bool, None, 0 and 1, numpy's and torch's
    bool; else TypeError."""
    nested = isinstance(value, torch.Tensor) and value.is_nested  # which has no shape
    one = not nested and getattr(value, "shape", None) == () and str(value.dtype) in _TRUTHS
    if value is None or isinstance(value, bool) or one or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def has_tangent(x: torch.Tensor) -> bool:
    """Whether x is a dual number of forward-mode AD at the innermost level.  Traced tensors cannot
    tell, nor can batched ones."""
    functorch = torch._C._functorch
    off = (
        torch.autograd.forward_ad._current_level < 0 and functorch.peek_interpreter_stack() is None
    )
    if off or torch.compiler.is_compiling() or functorch.is_batchedtensor(x):
        return False
    return x.is_floating_point() and torch._VF._unpack_dual(x, level=0)[1] is not None


_PLAIN = (float, int, type(None))
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_OF_NUMPY = ("bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)), "float16",
    "float32", "float64", "float96", "float128")  # fmt: skip


def plain_number(name: str, value):
    """The number of Python in what torch takes for one: numpy's scalars, and tensors of one element
    without dimensions and gradient.  Anything else as it is, for the caller to judge.
    """
    if type(value) in _PLAIN or isinstance(value, (bool, torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, torch.Tensor):
        if value.is_nested or value.dim() > 0 or value.is_complex():
            return value
        if value.requires_grad:
            raise TypeError(f"{name} must be a number without a gradient, got one that requires it")
        if has_tangent(value):
            raise TypeError(f"{name} must be a number without a tangent, got one that has it")
        if torch._C._functorch.is_batchedtensor(value):
            raise ValueError(f"{name} must be one number, got a tensor that torch.func.vmap maps")
        if value.is_meta:
            raise ValueError(f"{name} must be a number, got a tensor on meta, which holds none")
        return value.item()
    if getattr(value, "ndim", None) == 0 and str(getattr(value, "dtype", "")) in _OF_NUMPY:
        return value.item() if value.dtype.itemsize <= 8 else float(value)
    return value


def scalars(softcap, dropout_p, scale) -> tuple:
    """The three as numbers of Python, their values not yet checked."""
    if type(softcap) in _PLAIN and type(dropout_p) in _PLAIN and type(scale) in _PLAIN:
        return softcap, dropout_p, scale
    named = (("softcap", softcap), ("dropout_p", dropout_p), ("scale", scale))
    values = [plain_number(name, value) for name, value in named]
    return tuple(float(x) if isinstance(x, bool) else x for x in values)


def number(name: str, value, low: float = -math.inf, high: float = math.inf):
    """`value` as a finite number of Python within [low, high], where torch takes it for a float."""
    if type(value) not in _PLAIN:
        value = plain_number(name, value)
        value = float(value) if isinstance(value, bool) else value
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    too_big = isinstance(value, int) and abs(value) > 10**308  # no float holds it
    if not (low <= value <= high) or value in (math.inf, -math.inf) or too_big:
        bounds = "finite" if low == -math.inf else f"at least {low:g} and finite"
        if high != math.inf:
            bounds = f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")
    return value


def some_integer(name: str, value):
    """`value` as an int of Python, whatever its size; TypeError if torch takes it for none."""
    value = plain_number(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    return value


def integer(name: str, value, low: int = 0):
    """`value` as an int of Python; TypeError if torch takes it for none, ValueError below `low`."""
    value = some_integer(name, value)
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if type(value) is int and value > MAX_ELEMENTS:
        raise ValueError(f"{name} must be at most {MAX_ELEMENTS}, got {value}")
    return value


def width(name: str, value, low: int = 1):
    """`integer` of a size of a module, of which no two make more numbers than torch can count."""
    value = integer(name, value, low)
    if type(value) is int and value > MAX_WIDTH:
        raise ValueError(f"{name} must be at most {MAX_WIDTH}, got {value}")
    return value


def floating(name: str, value) -> None:
    """TypeError unless the tensor `value` is of a floating dtype that the kernels know."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating, got {value.dtype}")


def module_dtype(name: str, value, weight) -> None:
    """TypeError unless an input is floating and of its module's dtype, where that must be so."""
    floating(name, value)
    plain, kind = type(weight) in (torch.Tensor, torch.nn.Parameter), value.device.type
    if (
        plain
        and value.dtype != weight.dtype
        and not (kind != "meta" and torch.is_autocast_enabled(kind))
    ):
        raise TypeError(f"{name} must have the module's dtype {weight.dtype}, got {value.dtype}")


def dimensions(name: str, shape, count: int, layout: str) -> None:
    """ValueError unless a shape has `count` dimensions, those of `layout`."""
    if len(shape) != count:
        raise ValueError(f"{name} must have {count} dimensions {layout}, got shape {tuple(shape)}")


def window_pair(window) -> tuple:
    """(left, right) of a window argument; None stands for (None, None)."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)):
        raise TypeError(
            f"window must be a tuple (left, right), got {type(window).__name__} {window!r}"
        )
    if len(window) != 2:
        raise ValueError(f"window must have two entries (left, right), got {tuple(window)!r}")
    left, right = window
    if type(left) in _PLAIN and type(right) in _PLAIN:
        return left, right
    return plain_number("window left", left), plain_number("window right", right)


def options(causal, left, right, softcap, dropout_p, scale, deterministic, backend) -> tuple:
    """Check the scalar options; return (align, window_left, window_right) in canonical form."""
    if isinstance(causal, str):
        if causal not in ("top_left", "bottom_right"):
            raise ValueError(f"causal must be one of {CAUSAL}, got {causal!r}")
    elif not isinstance(causal, bool):
        raise TypeError(f"causal must be one of {CAUSAL}, got {type(causal).__name__} {causal!r}")
    for name, side in (("window left", left), ("window right", right)):
        if side is not None:
            integer(f"{name} (None = unbounded)", side)
    number("softcap", softcap, 0.0)
    if 0 < softcap < SMALLEST:  # as a float32 it would be 0: no cap at all
        raise ValueError(f"softcap must be 0 (none) or at least {SMALLEST:g}, got {softcap!r}")
    number("dropout_p", dropout_p, 0.0, 1.0)
    if scale is not None:
        number("scale", scale)
    boolean("deterministic", deterministic)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got {type(backend).__name__} {backend!r}")
    # Past any distance there is a side is no bound, and no kernel has to add to it.
    window_left, window_right = (
        UNBOUNDED if side is None or (type(side) is int and side > 2 * MAX_SEQLEN) else side
        for side in (left, right)
    )
    if causal is not False:
        window_right = 0
    return (TOP_LEFT if causal == "top_left" else BOTTOM_RIGHT), window_left, window_right


def same_kind(
    q_dtype, k_dtype, v_dtype, q_device, k_device, v_device, names=("q", "k", "v")
) -> None:
    """Equal floating dtypes and equal devices of q, k and v."""
    if q_dtype not in FLOATING:
        raise TypeError(f"{names[0]} must be float16, bfloat16, float32 or float64, got {q_dtype}")
    for name, dtype in ((names[1], k_dtype), (names[2], v_dtype)):
        if dtype != q_dtype:
            raise TypeError(f"{name} must have {names[0]}'s dtype {q_dtype}, got {dtype}")
    for name, device in ((names[1], k_device), (names[2], v_device)):
        if device != q_device:
            raise ValueError(f"{name} must be on {names[0]}'s device {q_device}, got {device}")


def _heads(heads_q, heads_k, q_name: str, k_name: str) -> None:
    if heads_q == 0:
        raise ValueError(f"{q_name} must have at least one head, got {heads_q}")
    if heads_k == 0:
        raise ValueError(f"{k_name} must have at least one head, got {heads_k}")
    if heads_q % heads_k != 0:
        raise ValueError(
            f"{q_name}'s heads must be a multiple of {k_name}'s heads, got {heads_q} and {heads_k}"
        )


def _sizes(batch, heads_q, seqlen_q, seqlen_k, head_dim, head_dim_v, names) -> None:
    q_name, k_name, v_name = names
    if head_dim == 0:
        raise ValueError(f"{q_name}'s head_dim must be at least 1, got {head_dim}")
    if head_dim_v == 0:
        raise ValueError(f"{v_name}'s head_dim must be at least 1, got {head_dim_v}")
    for name, length in ((q_name, seqlen_q), (k_name, seqlen_k)):
        # a traced length has no value yet, and a check would bound it for torch.export
        traced = torch.compiler.is_compiling() or isinstance(length, torch.SymInt)
        if not traced and length > MAX_SEQLEN:
            raise ValueError(f"{name}'s length must be at most {MAX_SEQLEN}, got {length}")
    elements = batch * heads_q * seqlen_q * max(head_dim, head_dim_v)
    if elements > MAX_ELEMENTS:
        raise ValueError(
            f"{q_name}: the output must have at most {MAX_ELEMENTS} elements, got {elements}"
        )


def dense(
    q_shape, k_shape, v_shape, q_dtype, k_dtype, v_dtype, q_device, k_device, v_device,
    causal, left, right, softcap, dropout_p, scale, deterministic, backend, names=("q", "k", "v"),
) -> tuple:  # fmt: skip
    """Check a dense call; return (align, window_left, window_right)."""
    canonical = options(causal, left, right, softcap, dropout_p, scale, deterministic, backend)
    for name, shape in zip(names, (q_shape, k_shape, v_shape), strict=True):
        dimensions(name, shape, 4, "[B, H, S, D]")
    same_kind(q_dtype, k_dtype, v_dtype, q_device, k_device, v_device, names)
    for name, shape in ((names[1], k_shape), (names[2], v_shape)):
        if shape[0] != q_shape[0]:
            raise ValueError(
                f"{name} must have {names[0]}'s batch size {q_shape[0]}, got {shape[0]}"
            )
    if k_shape[1] != v_shape[1]:
        raise ValueError(f"{names[2]} must have {names[1]}'s {k_shape[1]} heads, got {v_shape[1]}")
    if k_shape[2] != v_shape[2]:
        raise ValueError(f"{names[2]} must have {names[1]}'s length {k_shape[2]}, got {v_shape[2]}")
    if k_shape[3] != q_shape[3]:
        raise ValueError(
            f"{names[1]} must have {names[0]}'s head_dim {q_shape[3]}, got {k_shape[3]}"
        )
    _heads(q_shape[1], k_shape[1], names[0], names[1])
    _sizes(q_shape[0], q_shape[1], q_shape[2], k_shape[2], q_shape[3], v_shape[3], names)
    if causal is True and q_shape[2] != k_shape[2]:
        raise ValueError(
            f"causal=True needs Sq == Sk, got {q_shape[2]} and {k_shape[2]}: say causal='top_left' "
            "(torch) or causal='bottom_right' (flash-attn)"
        )
    return canonical


# typed, so that 1 and True are not taken for each other
_dense_remembered = functools.lru_cache(maxsize=1024, typed=True)(dense)


def dense_cached(*arguments) -> tuple:
    """`dense` for plain eager tensors, from memory where it has accepted the same before."""
    try:
        return _dense_remembered(*arguments)
    except TypeError:  # also of an argument that has no hash, which is then named
        return dense(*arguments)


def scores(
    name: str, value, is_mask: bool, device, batch, heads, seqlen_q, seqlen_k
) -> torch.Tensor:
    """Check a mask or bias that broadcasts to [B, Hq, Sq, Sk]; return it with 4 dimensions."""
    tensor(name, value)
    if is_mask and value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = attend; additive: bias=), got {value.dtype}")
    if not is_mask and value.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating (bool: mask=), got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {value.device}")
    full = (batch, heads, seqlen_q, seqlen_k)
    shape = value.shape
    if len(shape) > 4:
        raise ValueError(f"{name} must have at most 4 dimensions, got shape {tuple(shape)}")
    for size, want in zip(shape, full[4 - len(shape) :], strict=True):
        if size != want and size != 1:
            raise ValueError(f"{name} must be broadcastable to {full}, got shape {tuple(shape)}")
    return value if len(shape) == 4 else value[(None,) * (4 - len(shape))]


def alibi(value, device, batch, heads) -> torch.Tensor:
    """Check alibi_slopes [Hq] or [B, Hq]; return them in float32."""
    tensor("alibi_slopes", value)
    floating("alibi_slopes", value)
    if value.device != device:
        raise ValueError(f"alibi_slopes must be on q's device {device}, got {value.device}")
    shape = tuple(value.shape)
    if shape != (heads,) and shape != (batch, heads):
        raise ValueError(
            f"alibi_slopes must have shape {(heads,)} or {(batch, heads)}, got {shape}"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "alibi_slopes must not require a gradient (use bias), got requires_grad=True"
        )
    return value.float().contiguous()


def sink_logits(value, device, dtype, heads) -> torch.Tensor:
    """Check sink [Hq]; return it in float32 (float64 for float64 inputs)."""
    tensor("sink", value)
    floating("sink", value)
    if value.device != device:
        raise ValueError(f"sink must be on q's device {device}, got {value.device}")
    if tuple(value.shape) != (heads,):
        raise ValueError(f"sink must have shape {(heads,)}, got {tuple(value.shape)}")
    return value.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()


def normalizer(value, sigmoid_bias, sink, need_stats):
    """Check the normalizer and what goes with it; return sigmoid_bias as a number of Python."""
    if not isinstance(value, str):
        raise TypeError(f"normalizer must be a str, got {type(value).__name__} {value!r}")
    if value not in ("softmax", "sigmoid"):
        raise ValueError(f"normalizer must be 'softmax' or 'sigmoid', got {value!r}")
    if sigmoid_bias is not None:
        sigmoid_bias = number("sigmoid_bias", sigmoid_bias)
        if value != "sigmoid":
            raise ValueError(
                f"sigmoid_bias must be None unless normalizer='sigmoid', got {sigmoid_bias!r}"
            )
    if value == "sigmoid" and sink is not None:
        raise ValueError("sink must be None with normalizer='sigmoid', which has no sum, got one")
    if value == "sigmoid" and need_stats:
        raise ValueError("return_stats must be False with normalizer='sigmoid', got True")
    return sigmoid_bias


def index_tensor(name: str, value, device, dims: int) -> None:
    """Check an int32 tensor of `dims` dimensions."""
    tensor(name, value)
    if value.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {value.dtype}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {value.device}")


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, *scalars) -> tuple:
    """Check a varlen call (q [total_q, Hq, D]); return (align, window_left, window_right)."""
    canonical = options(causal, *scalars)
    for name, value in (("q", q), ("k", k), ("v", v)):
        dimensions(name, value.shape, 3, "[total, H, D]")
    same_kind(q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v must have k's length and heads {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}"
        )
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have q's head_dim {q.shape[2]}, got {k.shape[2]}")
    index_tensor("cu_seqlens_q", cu_seqlens_q, q.device, 1)
    index_tensor("cu_seqlens_k", cu_seqlens_k, q.device, 1)
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"cu_seqlens_q must have batch + 1 entries, got {cu_seqlens_q.shape[0]}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's {cu_seqlens_q.shape[0]} entries, "
            f"got {cu_seqlens_k.shape[0]}"
        )
    _heads(q.shape[1], k.shape[1], "q", "k")
    _sizes(1, q.shape[1], q.shape[0], k.shape[0], q.shape[2], v.shape[2], ("q", "k", "v"))
    return canonical


def decode_shapes(q, k_cache, v_cache, cache_seqlens, block_table) -> None:
    """Check q [B, Hq, Sq, D] against a contiguous or paged cache."""
    names = ("q", "k_cache", "v_cache")
    cache = "[B, H, S, D]" if block_table is None else "[pages, H, page_size, D]"
    layouts = ("[B, H, S, D]", cache, cache)
    for name, value, layout in zip(names, (q, k_cache, v_cache), layouts, strict=True):
        dimensions(name, value.shape, 4, layout)
    same_kind(
        q.dtype, k_cache.dtype, v_cache.dtype, q.device, k_cache.device, v_cache.device, names
    )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache must have k_cache's first three sizes {tuple(k_cache.shape[:3])}, "
            f"got {tuple(v_cache.shape[:3])}"
        )
    if k_cache.shape[3] != q.shape[3]:
        raise ValueError(f"k_cache must have q's head_dim {q.shape[3]}, got {k_cache.shape[3]}")
    _heads(q.shape[1], k_cache.shape[1], "q", "k_cache")
    _sizes(
        q.shape[0], q.shape[1], q.shape[2], k_cache.shape[2], q.shape[3], v_cache.shape[3], names
    )
    if cache_seqlens is not None:
        index_tensor("cache_seqlens", cache_seqlens, q.device, 1)
        if cache_seqlens.shape[0] != q.shape[0]:
            raise ValueError(
                f"cache_seqlens must have {q.shape[0]} entries, got {cache_seqlens.shape[0]}"
            )
    if block_table is None:
        if k_cache.shape[0] != q.shape[0]:
            raise ValueError(
                f"k_cache must have q's batch size {q.shape[0]}, got {k_cache.shape[0]}"
            )
        return
    index_tensor("block_table", block_table, q.device, 2)
    if block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table must have {q.shape[0]} rows, got {block_table.shape[0]}")
    if k_cache.shape[2] < 1:
        raise ValueError(f"k_cache must have a page size of at least 1, got {k_cache.shape[2]}")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with a block_table, got None")


def new_rows(name: str, new, cache, q, cache_name: str) -> None:
    """Check k_new or v_new [B, Hk, Snew, D] against its cache."""
    tensor(name, new)
    want = (q.shape[0], cache.shape[1], cache.shape[3])
    if new.dim() != 4 or (new.shape[0], new.shape[1], new.shape[3]) != want:
        raise ValueError(
            f"{name} must have shape [{want[0]}, {want[1]}, Snew, {want[2]}], "
            f"got {tuple(new.shape)}"
        )
    if new.dtype != cache.dtype:
        raise TypeError(f"{name} must have {cache_name}'s dtype {cache.dtype}, got {new.dtype}")
    if new.device != cache.device:
        raise ValueError(
            f"{name} must be on {cache_name}'s device {cache.device}, got {new.device}"
        )
