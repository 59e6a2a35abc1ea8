"""The CPU kernels give the bits that they gave when tests/cpu/cpu_bits.json was written.

Whoever means to change bits (another order of sums, another polynomial) renews the table and says
so; whoever only moves code learns at once that he did more.  cpu_bits.py says what the table holds
and why another compiler gives other bits.
"""

import json
import os

import cpu_bits
import pytest

from attn_ext import _C

KEPT = json.loads(cpu_bits.TABLE.read_text())
SHARED = ("several blocks, causal", "split keys", "dropout", "mask", "bias over keys", "varlen")


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_bits_are_those_of_the_table(isa):
    """A rewritten driver that adds in another order, rounds once more or leaves a key out."""
    if cpu_bits.compiler() != KEPT["compiler"] or os.environ.get("ATTN_EXT_CXXFLAGS"):
        pytest.skip(f"the table is of {KEPT['compiler']}, this build of {cpu_bits.compiler()}")
    if isa not in KEPT:
        pytest.skip(f"the table was written on a machine without {isa}")
    found = cpu_bits.hashes(kept=True, isas=[isa], threads=(1,))
    assert cpu_bits.differences(KEPT, found) == []
    assert found[isa].keys() == KEPT[isa].keys()


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_threads_do_not_change_bits(isa):
    """Sums whose order depends on which thread comes first, or tasks cut by the number of threads;
    on every compiler."""
    names = [n for n in cpu_bits.cases(kept=True) if n.startswith(SHARED)]
    assert len(names) > 15
    cpu_bits.hashes(kept=True, isas=[isa], threads=(1, 2, 3), names=names)


def test_a_changed_bit_is_found():
    """A digest that leaves out some output, or a comparison that never fails."""
    bits = cpu_bits.hashes(kept=True, isas=["baseline"], threads=(1,), names=["softcap, fp32"])
    other = json.loads(json.dumps(bits).replace("backward=", "backward=0"))
    assert cpu_bits.differences(bits, bits) == []
    assert len(cpu_bits.differences(bits, other)) == 1
