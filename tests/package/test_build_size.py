"""How much machine code the CPU kernels of each instruction set are, against a committed table.

Compile time goes with it: the C++ took 192 CPU seconds (g++ 12, AMD EPYC, Zen 3) when attn_ext._C
had 3.5 MB, and 92 with 2.1 MB; `pip wheel . --no-build-isolation --no-deps` takes 47.5 with
1.6 MB (g++ 12, AMD EPYC, Zen 5).  It grew unseen, by one inlined helper and one template flag after
the other; so a figure in the tree must grow first, in a change that says what it pays for.

    python tests/package/test_build_size.py --write      renews tests/package/build_size.json
"""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from attn_ext import _C

TABLE = Path(__file__).with_name("build_size.json")
SLACK = 1.1  # of another compiler


def sizes() -> dict[str, dict[str, int]]:
    """{instruction set: {"functions": how many, "kib": of machine code}} of attn_ext._C."""
    listing = subprocess.run(
        ["nm", "--print-size", "--defined-only", _C.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    functions, code = Counter(), Counter()
    for line in listing.splitlines():
        # address size kind name; `4attn3cpu4avx2` is attn::cpu::avx2 in a mangled name
        found = re.match(r"\w+ (\w+) [tTwW] \S*?4attn3cpu(\d+)([a-z]\w+)", line)
        if found:
            name = found[3][: int(found[2])]
            functions[name] += 1
            code[name] += int(found[1], 16)
    return {
        name: {"functions": functions[name], "kib": code[name] // 1024}
        for name in ("baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx")
        if name in functions
    }


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm lists the functions")
def test_kernels_are_no_more_code_than_the_table_says():
    """A template flag or an inlined helper that makes every kernel anew, and the build slower."""
    found = sizes()
    if not found:
        pytest.skip("this extension was stripped of its symbols")
    table = json.loads(TABLE.read_text())
    assert found.keys() <= table.keys()
    for name, row in found.items():
        for what, value in row.items():
            assert value <= SLACK * table[name][what], (name, what, value, table[name][what])


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    TABLE.write_text(json.dumps(sizes(), indent=1) + "\n")
