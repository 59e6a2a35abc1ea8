"""Checks of what comes by the dispatcher.

Such a call may come from a program that was traced for other sizes, and hooks may have put other
tensors in the place of what a forward saved, so that no check of `attn_ext.functional` has seen
these; a kernel would read and write past their ends.
"""

from __future__ import annotations

from attn_ext.core import validate
from attn_ext.core.schema import GRADIENTS, Call, Frame, is_decode, lse_shape, statistics_dtype


def call(given: Call) -> Call:
    """The call with its true lengths, all its tensors checked against each other."""
    lengths = _lengths(given)
    batch = given.q.shape[0]
    if given.cu_seqlens_q is not None:
        batch = given.cu_seqlens_q.shape[0] - 1
    heads, width = given.q.shape[1], given.q.shape[-1]
    for name, value in (("mask", given.mask), ("bias", given.bias)):
        if value is not None:
            validate.scores(name, value, name == "mask", given.q.device, batch, heads, *lengths)
    if given.dropout_p > 0 and (given.rng_state is None or given.rng_state.shape != (2,)):
        raise ValueError("rng_state must have shape (2,) with dropout_p above 0")
    for name, value, shapes in (
        ("alibi_slopes", given.alibi_slopes, ((heads,), (batch, heads))),
        ("sink", given.sink, ((heads,),)),
        ("w", given.w, ((heads, width),)),
    ):
        if value is not None and tuple(value.shape) not in shapes:
            rule = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {rule}, got {tuple(value.shape)}")
    if given.frame is not None:
        validate.index_tensor("frame", given.frame, given.q.device, 2)
        if given.frame.shape != (batch, len(Frame._fields)):
            want = (batch, len(Frame._fields))
            raise ValueError(f"frame must have shape {want}, got {tuple(given.frame.shape)}")
    if lengths == (given.max_seqlen_q, given.max_seqlen_k):
        return given
    return given._replace(max_seqlen_q=lengths[0], max_seqlen_k=lengths[1])


def _lengths(given: Call) -> tuple:
    """(Sq, Sk) as the tensors have them."""
    q, k, v = given.q, given.k, given.v
    if given.cu_seqlens_q is not None:
        options = (False, None, None, 0.0, 0.0, None, False, "auto")
        validate.varlen(q, k, v, given.cu_seqlens_q, given.cu_seqlens_k, *options)
        return given.max_seqlen_q, given.max_seqlen_k
    if is_decode(given):
        validate.decode_shapes(q, k, v, given.seqlens_k, given.block_table)
        pages = 1 if given.block_table is None else given.block_table.shape[1]
        return q.shape[2], k.shape[2] * pages
    validate.dense_cached(
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        False, None, None, 0.0, 0.0, None, False, "auto",
    )  # fmt: skip
    return q.shape[2], k.shape[2]


def results(dout, dlse, out, lse, given: Call) -> None:
    """ValueError or TypeError unless what goes into a backward is as its forward gave it."""
    q, rows = given.q, lse_shape(given)
    want_out = (*q.shape[:-1], given.v.shape[-1])
    shapes = (
        ("out", out, want_out),
        ("dout", dout, want_out),
        ("lse", lse, rows),
        ("dlse", dlse, rows),
    )
    for name, value, want in shapes:
        if value is not None and tuple(value.shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(value.shape)}")
        if value is not None and value.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {value.device}")
    dtypes = (("out", out, q.dtype), ("lse", lse, statistics_dtype(q.dtype)))
    for name, value, dtype in dtypes:
        if value is not None and value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}")


def tangents(given: Call, found) -> None:
    """ValueError or TypeError unless each tangent is like its input."""
    for name, tangent in zip(GRADIENTS, found, strict=True):
        if tangent is None:
            continue
        like = getattr(given, name)
        if like is None or tangent.shape != like.shape:
            want = None if like is None else tuple(like.shape)
            raise ValueError(f"t{name} must have {name}'s shape {want}, got {tuple(tangent.shape)}")
        if tangent.dtype != like.dtype:
            raise TypeError(f"t{name} must have {name}'s dtype {like.dtype}, got {tangent.dtype}")
        if tangent.device != like.device:
            raise ValueError(f"t{name} must be on {like.device}, got {tangent.device}")
