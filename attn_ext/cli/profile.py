"""attn-ext profile -- python train.py ...: records the script in a process of its own, then reads
the trace, measures the ceilings and replays the recorded shapes in this one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from attn_ext.cli.errors import BadArgument
from attn_ext.measure import report, trace

RULE = "profile runs Python: attn-ext profile -- python train.py ..."
WITH_VALUE = ("-W", "-X")  # options of the interpreter that take one


def command(arguments: list[str], out: Path) -> list[str]:
    """The child's command line for the user's; BadArgument where it is not Python"""
    if not arguments:
        raise BadArgument(f"{RULE}, got no command")
    first, *rest = arguments
    if Path(first).name.startswith("python"):
        bare = first in ("python", "python3")  # then the interpreter that has attn_ext
        python = sys.executable if bare else shutil.which(first)
        if python is None:
            raise BadArgument(f"{RULE}, and there is no {first!r}")
    elif first.endswith(".py"):
        python, rest = sys.executable, arguments
    else:
        raise BadArgument(f"{RULE}, got {first!r}")
    options = []
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
        options.append(rest.pop(0))
        if options[-1] in WITH_VALUE and rest:
            options.append(rest.pop(0))
    if not rest or (rest[0] in ("-m", "-c") and len(rest) < 2):
        raise BadArgument(f"{RULE}, got no script")
    if rest[0] not in ("-m", "-c") and not Path(rest[0]).is_file():
        raise BadArgument(f"{RULE}, and there is no file {rest[0]!r}")
    return [python, *options, "-m", "attn_ext.measure.child", str(out.resolve()), *rest]


def run(
    arguments: list[str], out: Path, replay: bool, as_json: bool, skip_steps: int | None = None
) -> int:
    """Profile; the exit code is that of the script"""
    line = command(arguments, out)
    run_file, trace_file = out / "run.json", out / "trace.json"
    for path in (run_file, trace_file):
        path.unlink(missing_ok=True)
    child = subprocess.Popen(line, stdout=sys.stderr if as_json else None)
    try:
        child.wait()
    except KeyboardInterrupt:  # the child got it too, and writes what it has
        child.wait()
    if not (run_file.exists() and trace_file.exists()):
        print(f"attn-ext: the script ended with code {child.returncode} before anything was "
              "recorded", file=sys.stderr)  # fmt: skip
        return child.returncode or 1
    try:  # from the first operator on: imports are not counted
        result = trace.analyze(trace.load(trace_file), None, skip_steps)
    except ValueError as error:
        raise BadArgument(str(error).replace("skip_steps", "--skip-steps")) from None
    roofs = report.complete(result, replay)
    data = report.write(result, roofs, out)
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        _print(result, out)
    return child.returncode


def _print(result, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    console.print(report.headline(result), style="bold", soft_wrap=True)
    if result.groups:
        table = Table()
        for name in report.HEAD:
            text = name in ("shape", "direction", "backend", "note")
            table.add_column(name, justify="left" if text else "right")
        for group in result.groups:
            table.add_row(*report.cells(group))
        Console(highlight=False, markup=False, width=max(console.width, 150)).print(table)
    for line in report.arithmetic(result):
        console.print(line, soft_wrap=True)
    console.print(f"wrote {out}/trace.json, profile.json, profile.html", soft_wrap=True)
