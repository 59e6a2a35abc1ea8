"""The one table of the fields of an attention call: name, type and default of each, once.

`Call` is the table.  Derived from it, here and wherever fields are listed: the operators' schemas,
the positions of the gradients, `Needs` and `Grads`, what the native kernels are told by name, and
the keys of everything that is remembered of a call.  So a new field is written down once, and no
memory can forget it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, get_args, get_origin, get_type_hints

import torch

TOP_LEFT, BOTTOM_RIGHT = 0, 1
UNBOUNDED = -1

# What the table says of a field beside its type
GRADIENT = "gradient"  # a tensor that the call is differentiated by
KERNEL = "kernel"  # a number that csrc/params.h has under the same name
SYMBOLIC = "SymInt"  # an int that torch.compile may keep symbolic


class Call(NamedTuple):
    """One attention call in canonical form, as `attn_ext.functional` makes it of what users give:
    causal is `window_right = 0`, windows are inclusive and relative to the aligned diagonal, -1 is
    an unbounded side, mask and bias have 4 dimensions.

    Dense: q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv].
    Varlen (cu_seqlens given): q [total_q, Hq, D], k [total_k, Hk, D], v [total_k, Hk, Dv].
    Paged (block_table given): k [pages, Hk, page_size, D], v alike.
    """

    # The tensors come first: `TENSORS` says how many they are.
    q: Annotated[torch.Tensor, GRADIENT]
    k: Annotated[torch.Tensor, GRADIENT]
    v: Annotated[torch.Tensor, GRADIENT]
    mask: torch.Tensor | None = None  # bool, broadcastable to [B, Hq, Sq, Sk]; True = attend
    bias: Annotated[torch.Tensor | None, GRADIENT] = None  # floating, broadcastable alike
    alibi_slopes: torch.Tensor | None = None  # float32 [Hq] or [B, Hq]
    sink: Annotated[torch.Tensor | None, GRADIENT] = None  # [Hq], in the statistics' dtype
    # [Hq, D], in the statistics' dtype: s_ij = sum_d w_d tanh(q_id + k_jd) in place of q_i . k_j
    w: Annotated[torch.Tensor | None, GRADIENT] = None
    rng_state: torch.Tensor | None = None  # int64 [2]: seed, offset; on q's device
    cu_seqlens_q: torch.Tensor | None = None  # int32 [B + 1]
    cu_seqlens_k: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None  # int32 [B]: used length of each K/V row or page list
    block_table: torch.Tensor | None = None  # int32 [B, max_pages]
    frame: torch.Tensor | None = None  # int32 [B, 6], a `Frame` for each sequence
    max_seqlen_q: Annotated[int, SYMBOLIC] = 0  # Sq, or the longest sequence
    max_seqlen_k: Annotated[int, SYMBOLIC] = 0
    scale: Annotated[float | None, KERNEL] = 1.0  # None: 1 / sqrt(D)
    softcap: Annotated[float, KERNEL] = 0.0
    dropout_p: Annotated[float, KERNEL] = 0.0
    align: int = BOTTOM_RIGHT
    window_left: Annotated[int, SYMBOLIC, KERNEL] = UNBOUNDED
    window_right: Annotated[int, SYMBOLIC, KERNEL] = UNBOUNDED
    need_stats: bool = False
    deterministic: bool = False
    normalizer: str = "softmax"  # or "sigmoid": P = sigmoid(s + sigmoid_bias), LSE is 0
    sigmoid_bias: float | None = None  # None: -ln of the sequence's number of keys
    # decode: parts of the keys that are worked on at a time; 0: not said
    num_splits: Annotated[int, SYMBOLIC, KERNEL] = 0
    grad: bool = False  # whether autograd will ask for any gradient
    bias_grad: bool = False  # whether it will ask for that of the bias
    backend: str = "auto"  # who shall serve the call


class Frame(NamedTuple):
    """Where a sequence of a call stands in a longer one, of which it has some queries and some
    keys.  Diagonal, window, ALiBi, sigmoid's bias and dropout's counter are those of the longer
    one; mask and bias are of the call's own queries and keys."""

    first_b: int  # what dropout counts this sequence as
    first_h: int  # and the call's first query head
    q_first: int  # position of the first query
    k_first: int  # position of the first key
    whole_q: int  # lengths of the longer sequence
    whole_k: int

    @classmethod
    def of(cls, call: Call, b: int, seqlen_q: int, seqlen_k: int) -> Frame:
        """That of sequence b of a call, which has these lengths."""
        if call.frame is None:
            return cls(b, 0, 0, 0, seqlen_q, seqlen_k)
        return cls(*call.frame[b].tolist())


_HINTS = get_type_hints(Call, include_extras=True)


def _plain(name: str):
    """The type of a field without what the table says beside it."""
    hint = _HINTS[name]
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _marked(mark: str) -> tuple[str, ...]:
    """The fields of which the table says `mark`, in its order."""
    return tuple(n for n in Call._fields if mark in getattr(_HINTS[n], "__metadata__", ()))


def _is_tensor(name: str) -> bool:
    return _plain(name) in (torch.Tensor, torch.Tensor | None)


FIELDS = Call._fields
TENSORS = sum(map(_is_tensor, FIELDS))  # how many fields are tensors; they are the first ones
INDEX = {name: index for index, name in enumerate(FIELDS)}
GRADIENTS = _marked(GRADIENT)  # names
GRADIENT_AT = tuple(INDEX[name] for name in GRADIENTS)  # positions
KERNEL_SCALARS = _marked(KERNEL)
assert all(map(_is_tensor, FIELDS[:TENSORS])), "the tensors of the table come first"

Needs = NamedTuple("Needs", [(name, bool) for name in GRADIENTS])
Needs.__new__.__defaults__ = (False,) * len(GRADIENTS)
Needs.__doc__ = "Which gradients are wanted."
Grads = NamedTuple("Grads", [(name, torch.Tensor | None) for name in GRADIENTS])
Grads.__new__.__defaults__ = (None,) * len(GRADIENTS)
Grads.__doc__ = "The gradients of a call; None where one is not wanted or not there."

Tangents = NamedTuple("Tangents", [(name, torch.Tensor | None) for name in GRADIENTS])
Tangents.__new__.__defaults__ = (None,) * len(GRADIENTS)
Tangents.__doc__ = "Tangents of a call's inputs, each like its input; None where it is 0."


class Rows(NamedTuple):
    """What the tangent of a backward takes beside the call: tensors like O and LSE, the gradients
    with respect to them (d...), and the tangents of these four (t...).  None: 0, but for tout and
    tlse: a backend that needs them finds them itself."""

    dout: torch.Tensor | None = None
    dlse: torch.Tensor | None = None
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    tout: torch.Tensor | None = None
    tlse: torch.Tensor | None = None
    tdout: torch.Tensor | None = None
    tdlse: torch.Tensor | None = None


_NAMES = {torch.Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str"}


def _declared(name: str) -> str:
    """The field as a parameter of an operator: "Tensor? mask"."""
    plain, options = _plain(name), get_args(_plain(name))
    kind = options[0] if options else plain
    told = SYMBOLIC if name in _SYMBOLIC else _NAMES[kind]
    return f"{told}{'?' if options else ''} {name}"


_SYMBOLIC = _marked(SYMBOLIC)
PARAMETERS = ", ".join(map(_declared, FIELDS))  # of the operator attn_ext::forward
GRADIENT_RESULTS = ", ".join(f"Tensor d{name}" for name in GRADIENTS)  # of attn_ext::backward
# Of attn_ext::tangent and attn_ext::backward_tangent
TANGENT_PARAMETERS = ", ".join(f"Tensor? t{name}" for name in GRADIENTS)
TANGENT_RESULTS = ", ".join(f"Tensor td{name}" for name in GRADIENTS)
ROW_PARAMETERS = (
    "Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor? tout, Tensor? tlse, "
    "Tensor? tdout, Tensor? tdlse"
)


def call_of(scalars: tuple, **tensors) -> Call:
    """The call of these tensors and of `scalars`, the slice [TENSORS:] of another call."""
    return Call(**tensors, **dict(zip(FIELDS[TENSORS:], scalars, strict=True)))


def given(call: Call, names=GRADIENTS) -> dict[str, torch.Tensor]:
    """The fields among `names` that the call has, by name."""
    return {name: x for name in names if (x := getattr(call, name)) is not None}


def of_gradients(values) -> tuple:
    """Of one value for each field, those of the inputs that have a gradient."""
    return tuple(values[at] for at in GRADIENT_AT)


def at_inputs(grads, needs, count: int) -> tuple:
    """One value for each of `count` inputs that begin with the call's fields: the gradients that
    are needed where they belong, else None.
    """
    placed: list = [None] * count
    for at, grad, need in zip(GRADIENT_AT, grads, needs, strict=True):
        if need:
            placed[at] = grad
    return tuple(placed)


def is_decode(call: Call) -> bool:
    """Whether the keys are a cache, of given lengths or in pages."""
    return call.seqlens_k is not None or call.block_table is not None


def lse_shape(call: Call) -> tuple[int, ...]:
    """The shape of LSE and of each row's statistics: [B, Hq, Sq]; [Hq, total_q] for varlen."""
    shape = call.q.shape
    return (shape[1], shape[0]) if call.cu_seqlens_q is not None else tuple(shape[:3])


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of LSE, statistics and sinks: float32, float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
