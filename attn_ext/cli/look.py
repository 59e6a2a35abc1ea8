"""attn-ext look: pictures of recorded attention, one PNG and one HTML page."""

from __future__ import annotations

from pathlib import Path

from attn_ext.cli.errors import BadArgument
from attn_ext.inspect import load, look


def run(file: Path, tokens: str | None, out: Path, title: str) -> int:
    """Write attention.png and attention.html of the records in `file` into `out`."""
    if not file.is_file():
        raise BadArgument(f"FILE must be there, got {file}")
    try:
        records = load(file)
    except OSError as error:
        raise BadArgument(f"FILE cannot be read: {error}") from None
    except Exception:  # torch.load raises whatever its unpickler meets in other files
        message = f"FILE must be written by attn_ext.inspect.record.save, got {file}"
        raise BadArgument(message) from None
    try:
        given = None
        if tokens is not None:
            given = Path(tokens) if tokens.endswith(".json") else tokens.split()
        paths = look(records, out, tokens=given, title=title)
    except (OSError, TypeError, ValueError) as error:
        raise BadArgument(str(error)) from None
    for path in paths:
        print(f"wrote {path}")
    return 0
