"""The process in which `attn-ext profile` runs a user's script:

python -m attn_ext.measure.child FOLDER SCRIPT|-m MODULE|-c CODE [ARGUMENTS ...]
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Record the script as __main__, with its own sys.argv and sys.path[0]"""
    out, what, *rest = argv
    from attn_ext.measure.recorder import record

    if what == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        return record(lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True),
                      Path(out))  # fmt: skip
    if what == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        scope = {"__name__": "__main__"}
        return record(lambda: exec(compile(rest[0], "<string>", "exec"), scope), Path(out))
    sys.argv, sys.path[0] = [what, *rest], str(Path(what).resolve().parent)
    return record(lambda: runpy.run_path(what, run_name="__main__"), Path(out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
