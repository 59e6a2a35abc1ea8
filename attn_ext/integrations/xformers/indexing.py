"""Functions of xformers.ops beside attention that its users import together with it, in torch:
models of DINOv2's kind take lists of images of several sizes only where all of them are there.
"""

from __future__ import annotations

import torch


def unbind(x, dim):
    """The slices of x along dim, as torch.unbind gives them: no copy is made on the way back."""
    return x.unbind(dim)


def index_select_cat(sources, indices):
    """Rows indices[i] of sources[i] [S_i, D_i], flattened, one after the other: [sum I_i * D_i]."""
    rows = [x[at.long()].flatten() for x, at in zip(sources, indices, strict=True)]
    return torch.cat(rows)


def scaled_index_add(input, index, source, scaling=None, alpha=1.0):
    """Adds alpha * scaling [D] * source [I, M, D] in place to the rows `index` of input [B, M, D].

    As in xformers, an input that a gradient needs must not be a leaf.
    """
    scaled = source if scaling is None else scaling * source
    return input.index_add_(0, index.long(), scaled.to(input.dtype), alpha=alpha)


FUNCTIONS = (index_select_cat, scaled_index_add, unbind)
