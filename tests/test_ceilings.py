"""The ceiling micro-benchmark: figures that a machine can have, and clear refusals."""

import pytest
import torch

from attn_ext import _C


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_rates_are_those_of_hardware(isa):
    """A loop that the compiler removed would run at an impossible rate, a wrong unit at none."""
    fma = _C.ceilings("fma", isa, 1, 0.02)
    assert 0.5 < fma < 1000
    assert 0.01 < _C.ceilings("exp", isa, 1, 0.02) < fma
    assert 0.1 < _C.ceilings("read", isa, 1, 0.02) < 2000


def test_bf16_products_are_faster_than_float32_where_they_exist():
    """A chain of too few accumulators is bound by latency and no faster than float32."""
    bf16 = _C.ceilings("bf16", "", 1, 0.05)
    has = "avx512" in _C.isa() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert bf16 == 0 if not has else bf16 == 0 or bf16 > 1.3 * _C.ceilings("fma", "", 1, 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemm",), "name must be fma, bf16, exp or read, got 'gemm'"),
        (("fma", "mmx"), "isa must be one that this machine supports, got 'mmx'"),
        (("fma", "", 0), "threads must be from 1 to 4096, got 0"),
        (("fma", "", 1, -1.0), "seconds must be above 0"),
        (("fma", "", 1, float("nan")), "seconds must be above 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    """A wrong name or count that measures something else, or nothing for ever."""
    with pytest.raises(ValueError, match=message):
        _C.ceilings(*arguments)
