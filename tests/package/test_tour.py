"""docs/design/tour.md leads through the code: each of its links is a file that holds the symbol."""

import re

import pytest
from repository import ROOT

TOUR = ROOT / "docs" / "design" / "tour.md"
LINK = re.compile(r"^\| (\d+) \| \[[^\]]+\]\(([^)]+)\) \| `(\w+)` \|", re.MULTILINE)


def tours() -> dict[str, list]:
    """heading -> [(number, path, symbol)]"""
    parts = re.split(r"^## (.*)$", TOUR.read_text(), flags=re.MULTILINE)
    return {h: LINK.findall(text) for h, text in zip(parts[1::2], parts[2::2], strict=True)}


def defines(text: str, name: str) -> bool:
    """Whether the text defines the name: a function or class of Python, a function of C++ or CUDA,
    or a function that pybind11 gives to Python."""
    python = rf"^ *(?:def|class) {name}\b"
    native = rf"^(?! *return\b)[ \w:<>*&,]*\w[ *&]+{name}\("
    return bool(re.search(rf'{python}|{native}|"{name}"', text, re.MULTILINE))


def test_the_tour_has_ten_links():
    """A table that the test below no longer reads."""
    found = tours()
    numbers = {heading: [int(n) for n, _, _ in links] for heading, links in found.items()}
    assert numbers == {
        "On a CPU": list(range(1, 11)),
        "On a GPU, by CUDA": list(range(6, 11)),
        "On a GPU, by Triton": list(range(6, 11)),
    }


@pytest.mark.parametrize(
    "path, name", [(path, name) for links in tours().values() for _, path, name in links]
)
def test_each_link_holds_its_symbol(path, name):
    """A symbol that moved to another file, or was renamed."""
    file = (TOUR.parent / path).resolve()
    assert file.exists(), path
    assert defines(file.read_text(), name), f"{path} defines no {name}"


def test_a_mention_is_no_definition():
    """A tour that leads to a caller."""
    assert not defines("x = multiply_all(y)\n# calls multiply(x)\n", "multiply")
    assert not defines("from fwd import forward_kernel", "forward_kernel")
    assert defines("ATTN_INLINE void multiply(int64_t depth) {", "multiply")
