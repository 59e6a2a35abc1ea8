"""Dropout bits: the reference's Philox against plain Python integers, published vectors and
csrc/philox.h.
"""

import re
from pathlib import Path

import pytest
import torch

from attn_ext.core import reference
from attn_ext.core.reference import dropout_keep_mask, philox_key

HEADER = Path(__file__).parents[2] / "csrc" / "philox.h"


def philox4x32(counter, key, rounds):
    """Philox4x32 as in the paper (Salmon et al., SC'11, section 3.3), one block of Python
    integers.
    """
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def splitmix64(seed, offset):
    """The (offset + 1)-th output of the splitmix64 generator started at `seed`."""
    z = (seed + (offset + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_plain_python_philox_meets_the_published_vectors(counter, key, expected):
    """Would catch a test-side Philox that is wrong in the same way as the one under test."""
    assert philox4x32(counter, key, 10) == [int(word, 16) for word in expected.split()]


def test_splitmix64_meets_its_published_outputs():
    """Would catch a wrong shift or constant in the key: the first outputs for seed 1234567 are
    published.
    """
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for offset, value in enumerate(known):
        assert splitmix64(1234567, offset) == value
        assert philox_key(1234567, offset) == (value % 2**32, value >> 32)


@pytest.mark.parametrize("seed, offset", [(0, 0), (42, 7), (-1, 3), (2**63 - 1, 2**40)])
def test_keep_mask_is_philox_counted_by_position(seed, offset):
    """Would catch a swapped counter word, a lost carry in the 64-bit product, or a sign error
    for negative seeds.
    """
    b_n, h_n, sq, sk, p = 2, 3, 5, 11, 0.4
    mask = dropout_keep_mask(seed, offset, b_n, h_n, sq, sk, p, "cpu", first_batch=1)
    z = splitmix64(seed % 2**64, offset)
    for b in range(b_n):
        for h in range(h_n):
            for i in range(sq):
                words = [
                    word
                    for block in range(3)
                    for word in philox4x32([block, i, h, b + 1], [z % 2**32, z >> 32], 7)
                ]
                expected = [word >= int(p * 2**32) for word in words[:sk]]
                assert mask[b, h, i].tolist() == expected, (b, h, i)


def test_constants_are_those_of_the_header():
    """Would catch a change of csrc/philox.h that the reference did not follow."""
    text = HEADER.read_text()
    words = dict(re.findall(r"kPhilox(\w\d) = (0x[0-9A-F]+)u", text))
    assert {name: int(value, 16) for name, value in words.items()} == {
        "M0": reference.PHILOX_M0,
        "M1": reference.PHILOX_M1,
        "W0": reference.PHILOX_W0,
        "W1": reference.PHILOX_W1,
    }
    assert int(re.search(r"kPhiloxRounds = (\d+)", text)[1]) == reference.PHILOX_ROUNDS
    for constant in ("0x9E3779B97F4A7C15", "0xBF58476D1CE4E5B9", "0x94D049BB133111EB"):
        assert constant in text


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_kept_fraction_is_one_minus_p(p):
    """Would catch an inverted comparison or a threshold off by a factor; 6 standard deviations
    of leeway.
    """
    mask = dropout_keep_mask(3, 1, 2, 4, 128, 130, p)
    leeway = 6 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - (1 - p)) <= leeway


def test_a_word_equal_to_the_threshold_is_kept():
    """Would catch > for >=, and a threshold scaled by 2^32 - 1: the edge is hit on purpose."""
    z = splitmix64(1, 2)
    word = philox4x32([0, 0, 0, 0], [z % 2**32, z >> 32], 7)[2]
    assert dropout_keep_mask(1, 2, 1, 1, 1, 3, word / 2**32)[0, 0, 0, 2]
    assert not dropout_keep_mask(1, 2, 1, 1, 1, 3, (word + 1) / 2**32)[0, 0, 0, 2]


def test_rows_heads_batches_and_seeds_are_uncorrelated():
    """Would catch a counter word or a key word that is not used: two slices would then be equal."""
    base = dropout_keep_mask(3, 1, 2, 2, 64, 64, 0.5)
    others = [
        base.roll(1, dims=0),
        base.roll(1, dims=1),
        base.roll(1, dims=2),
        base.roll(1, dims=3),
        dropout_keep_mask(4, 1, 2, 2, 64, 64, 0.5),
        dropout_keep_mask(3, 2, 2, 2, 64, 64, 0.5),
    ]
    for other in others:
        agreement = (base == other).double().mean().item()
        assert abs(agreement - 0.5) < 0.03


def test_part_of_a_mask_is_the_mask_of_the_part():
    """Would catch a counter that depends on the sizes of the problem instead of the position."""
    whole = dropout_keep_mask(9, 0, 3, 4, 16, 33, 0.3)
    assert torch.equal(dropout_keep_mask(9, 0, 2, 2, 7, 9, 0.3), whole[:2, :2, :7, :9])
