"""The table of planted bugs that the interpreter has seen, beside the tests that there are."""

from pathlib import Path

import pytest
import seen
import triton_seen


def test_every_line_of_planted_bugs_has_its_test(request):
    """A line that stays when its test is gone or has another name."""
    asked = request.config
    chosen = asked.option.markexpr or asked.option.deselect or asked.option.lf
    chosen = chosen or asked.option.keyword not in ("", "planted_bug")
    if chosen or any("::" in a for a in asked.args):
        pytest.skip("some tests were not asked for")
    items = request.session.items
    collected = {item.path.stem for item in items}
    there = {f"{item.path.stem}: {item.name}" for item in items}
    for name in seen.read(triton_seen.INTERPRETED):
        stem = name.partition(":")[0]
        if stem not in collected and Path(__file__).with_name(f"{stem}.py").exists():
            there.add(name)
    assert not seen.strangers(triton_seen.INTERPRETED, there)
