"""The ceiling micro-benchmark: figures that a machine can have, and clear refusals."""

import pytest

from attn_ext import _C


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_rates_are_those_of_hardware(isa):
    """A loop that the compiler removed would run at an impossible rate, a wrong unit at none."""
    fma = _C.ceilings("fma", isa, 1, 0.02)
    assert 0.5 < fma < 1000
    assert 0.01 < _C.ceilings("exp", isa, 1, 0.02) < fma
    assert 0.1 < _C.ceilings("read", isa, 1, 0.02) < 2000


def test_bf16_products_are_measured_where_they_exist():
    """A ceiling of float32 in bfloat16's place, or one of instructions that the machine lacks."""
    for isa in _C.supported_isas():
        bf16 = _C.ceilings("bf16", isa, 1, 0.02)
        if isa in ("avx512_bf16", "avx512_amx"):
            assert 0.5 < bf16 < 20000
        elif isa != "avx512":  # there it is 0 or not, as the machine is
            assert bf16 == 0


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
