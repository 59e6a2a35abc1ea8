"""Sums over the lanes of a warp of which each lane gets its own rounding.

Lanes that add what a butterfly shuffle brings end with the same sum, as additions commute.  Where
what they add is a product, a compiler may make an FMA of the product and the addition: of
x y + x' y' one lane rounds x' y' before it adds, the other x y, and they end with different sums of
the same numbers.
"""

from __future__ import annotations

import re

REGISTER = r"%\w+"
PRODUCT = re.compile(rf"\bmul\.[\w.]*f\d+(?:x2)?\s+({REGISTER})")
BUTTERFLY = re.compile(rf"\bshfl\.sync\.bfly\.b32\s+({REGISTER})(?:\|{REGISTER})?,\s*({REGISTER})")
PACK = re.compile(rf"\bmov\.b64\s+({REGISTER}),\s*\{{\s*({REGISTER}),\s*({REGISTER})\s*\}}")
UNPACK = re.compile(rf"\bmov\.b64\s+\{{\s*({REGISTER}),\s*({REGISTER})\s*\}},\s*({REGISTER})")
FUSED = re.compile(rf"\bfma\.[^;]*,\s*({REGISTER})\s*;")


def fused_over_lanes(text: str) -> list[str]:
    """The FMAs of a PTX text that add a product of another lane to one of their own."""
    products = {match[1] for match in PRODUCT.finditer(text)}
    for match in UNPACK.finditer(text):
        if match[3] in products:
            products |= {match[1], match[2]}
    foreign = {match[1] for match in BUTTERFLY.finditer(text) if match[2] in products}
    for match in PACK.finditer(text):
        if foreign & {match[2], match[3]}:
            foreign.add(match[1])
    return [match[0] for match in FUSED.finditer(text) if match[1] in foreign]
