"""A KVCache on the Triton kernels: pages, trees and a window that rolls, by the same model as on
the other backends."""

import pytest
import torch
from cache_checks import Model

TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()


@pytest.mark.parametrize("options", [{}, {"window": 5}], ids=["all", "window"])
def test_a_life(options):
    """Pages that are shared, copied and freed between calls; NaN wherever nothing is held."""
    model = Model(2, 4, max_length=24, backend="triton", **options)
    model.append(9, counts=[9, 2])
    model.check(2)
    model.reorder([0, 0])
    model.append(3)
    model.check(3, tree_mask=TREE)
    model.append(1, rows=[1])
    model.check(1, rows=[1], softcap=3.0)
