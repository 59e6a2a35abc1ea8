"""The tables of hot loops of the Triton kernels beside those of plain Triton, which the committed
files hold, docs/design/triton.md shows, and `machine_code.py --triton` prints; triton_code.py
compiles and counts.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import machine_code
import triton_code
from triton_code import CASES, HEAD_DIMS, ROOT

TABLE = ROOT / "bench" / "results" / "triton_code.json"
OLDEST_TABLE = ROOT / "bench" / "results" / "triton_code-3.6.json"  # full and causal calls
OTHERS_TABLE = ROOT / "bench" / "results" / "triton_code-others.json"  # of OTHER_TILES
OLDEST = ROOT / "build" / "triton-3.6"  # where `make build/triton-3.6/triton` puts it
TABLED = ("sm_80", "sm_90")  # of which the table has rows

# As triton_code.PLAIN_TILES of other widths and types, (architecture, pass, head_dim, type);
# "192/128" are values of 128 columns
OTHER_TILES = {
    ("sm_80", "forward", 96, "bf16"): (128, 32, 4, 2),
    ("sm_80", "dkdv", 96, "bf16"): (32, 128, 8, 2),
    ("sm_80", "dq", 96, "bf16"): (128, 64, 8, 3),
    ("sm_80", "forward", 256, "bf16"): (64, 32, 4, 2),
    ("sm_80", "dkdv", 256, "bf16"): (64, 64, 8, 2),
    ("sm_80", "dq", 256, "bf16"): (64, 32, 4, 2),
    ("sm_80", "forward", 192, "bf16"): (64, 32, 4, 2),
    ("sm_80", "dkdv", 192, "bf16"): (64, 64, 8, 2),
    ("sm_80", "dq", 192, "bf16"): (64, 32, 4, 2),
    ("sm_80", "forward", "192/128", "bf16"): (64, 64, 4, 2),
    ("sm_80", "dkdv", "192/128", "bf16"): (64, 64, 8, 2),
    ("sm_80", "dq", "192/128", "bf16"): (64, 32, 4, 2),
    ("sm_80", "forward", 64, "fp32"): (128, 16, 4, 2),
    ("sm_80", "dkdv", 64, "fp32"): (16, 64, 8, 2),
    ("sm_80", "dq", 64, "fp32"): (64, 16, 8, 2),
    ("sm_80", "forward", 128, "fp32"): (32, 32, 4, 2),
    ("sm_80", "dkdv", 128, "fp32"): (32, 32, 8, 2),
    ("sm_80", "dq", 128, "fp32"): (32, 32, 8, 2),
    ("sm_90", "forward", 96, "bf16"): (128, 128, 8, 2),
    ("sm_90", "dkdv", 96, "bf16"): (64, 128, 8, 2),
    ("sm_90", "dq", 96, "bf16"): (128, 64, 8, 2),
    ("sm_90", "forward", 256, "bf16"): (128, 64, 8, 2),
    ("sm_90", "dkdv", 256, "bf16"): (32, 64, 8, 2),
    ("sm_90", "dq", 256, "bf16"): (128, 32, 8, 2),
    ("sm_90", "forward", 192, "bf16"): (128, 64, 8, 2),
    ("sm_90", "dkdv", 192, "bf16"): (32, 64, 8, 2),
    ("sm_90", "dq", 192, "bf16"): (128, 32, 8, 2),
    ("sm_90", "forward", "192/128", "bf16"): (128, 64, 8, 2),
    ("sm_90", "dkdv", "192/128", "bf16"): (64, 64, 8, 2),
    ("sm_90", "dq", "192/128", "bf16"): (128, 64, 8, 2),
    ("sm_90", "forward", 64, "fp16"): (128, 128, 4, 3),
    ("sm_90", "dkdv", 64, "fp16"): (64, 128, 8, 2),
    ("sm_90", "dq", 64, "fp16"): (128, 128, 8, 2),
    ("sm_90", "forward", 128, "fp16"): (128, 128, 8, 2),
    ("sm_90", "dkdv", 128, "fp16"): (64, 128, 8, 2),
    ("sm_90", "forward", 64, "fp32"): (128, 64, 8, 2),
    ("sm_90", "dkdv", 64, "fp32"): (32, 128, 8, 2),
    ("sm_90", "dq", 64, "fp32"): (128, 32, 8, 2),
    ("sm_90", "forward", 128, "fp32"): (128, 32, 8, 2),
    ("sm_90", "dq", 128, "fp32"): (32, 32, 8, 2),
    ("sm_100", "forward", 64, "bf16"): (128, 128, 8, 2),
    ("sm_100", "forward", 128, "bf16"): (128, 128, 8, 2),
    ("sm_100", "forward", 256, "bf16"): (128, 64, 8, 2),
    ("sm_100", "dkdv", 64, "bf16"): (64, 128, 8, 2),
    ("sm_100", "dkdv", 128, "bf16"): (64, 128, 8, 2),
    ("sm_100", "dq", 64, "bf16"): (128, 128, 8, 2),
    ("sm_100", "dq", 128, "bf16"): (128, 128, 8, 2),
}


def measure_others(architecture: str, only: str = "", write: bool = False) -> dict:
    """{"sm_90 dkdv 256 bf16": {"ours": row, "plain": row}, ...} of OTHER_TILES, those that begin
    with `only`; `write`: each into the table as soon as it is there."""
    import plain_triton

    if write:
        refuse_another(OTHERS_TABLE)
    triton_code.prepare(architecture)
    rows = {}
    for (target, name, head_dim, dtype), tile in OTHER_TILES.items():
        label = f"{target} {name} {head_dim} {dtype}"
        if target != architecture or not label.startswith(only):
            continue
        found, chosen = triton_code.ours(name, head_dim, "full", None, dtype)
        own = triton_code.row(found, architecture, chosen, name, head_dim)
        found = plain_triton.compiled(name, architecture, head_dim, tile, dtype)
        rows[label] = {
            "ours": own,
            "plain": triton_code.row(found, architecture, tile, name, head_dim),
        }
        print(
            label,
            *map(triton_code.line, rows[label].values()),
            sep="\n  ",
            file=sys.stderr,
            flush=True,
        )
        if write:
            known = rows_of(OTHERS_TABLE) | rows
            save(OTHERS_TABLE, metadata.version("triton"), dict(sorted(known.items())))
    return rows


def rows_of(path: Path) -> dict:
    """The rows of a table; none where it is of another Triton than the installed one."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return known.get("rows", {}) if known.get("triton") == metadata.version("triton") else {}


def refuse_another(path: Path) -> None:
    """ValueError where a table is of another Triton, whose rows would be lost beside new ones."""
    installed = metadata.version("triton")
    of = json.loads(path.read_text())["triton"] if path.exists() else installed
    if of != installed:
        raise ValueError(
            f"{path.name} is of Triton {of}, installed is {installed}: write all rows anew "
            "(take the table away first), or install that one"
        )


def save(path: Path, version: str, rows: dict) -> None:
    """Write a table of this version of Triton."""
    path.write_text(json.dumps({"triton": version, "rows": rows}, indent=1) + "\n")


def put(rows: dict) -> None:
    """Put some of `triton_code.measure`'s rows into the table, whose order stays that of all.
    ValueError where the table is of another Triton, or has no such rows."""
    refuse_another(TABLE)
    places = itertools.product(TABLED, triton_code.PASSES, HEAD_DIMS)
    names = {f"{place[0]} {place[1]} {place[2]}": place[1] for place in places}
    if strange := rows.keys() - names.keys():
        raise ValueError(f"{TABLE.name} has no rows of {', '.join(sorted(strange))}")
    known = rows_of(TABLE)
    for label, each in rows.items():
        known[label] = known.get(label, {}) | each
    ordered = {}
    for label, name in names.items():
        each = known.get(label, {})
        ordered[label] = {kind: each[kind] for kind in triton_code.kinds_of(name) if kind in each}
    save(TABLE, metadata.version("triton"), ordered)


def measure_all(
    only: Sequence[str] = (), kinds: Sequence[str] = (), folder: Path | None = None
) -> dict:
    """`measure` of each architecture, in processes of their own: Triton remembers its target.
    folder: of another Triton than the installed one."""
    environment = os.environ | ({"PYTHONPATH": str(folder)} if folder else {})
    rows = {}
    for architecture in TABLED:
        wanted = [name for name in only if name.startswith(architecture)]
        if only and not wanted:
            continue
        command = [
            sys.executable,
            triton_code.__file__,
            architecture,
            "--rows",
            *wanted,
            "--kinds",
            *kinds,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{architecture}: {done.stderr[-3000:]}")
        rows |= json.loads(done.stdout)
    return rows


def differences(table: dict, rows: dict, slack: float = 0.05) -> list[str]:
    """What a fresh compile has more of than the table says, by more than `slack`."""
    lines = []
    for name, each in rows.items():
        fresh = {kind: found for kind, found in each.items() if kind.startswith("ours")}
        lines += [
            f"{name}, {text}"
            for text in machine_code.differences(
                {"kernels": table["rows"].get(name, {})}, fresh, slack
            )
        ]
    return lines


# What the loop of a whole tile is held to: share of the peak at widths 64 and 128, of full calls
GOALS = {
    ("sm_80", "forward"): (0.58, 0.60), ("sm_80", "dkdv"): (0.57, 0.57),
    ("sm_80", "dq"): (0.55, 0.55),
    ("sm_90", "forward"): (0.50, 0.64), ("sm_90", "dkdv"): (0.58, 0.66),
    ("sm_90", "dq"): (0.55, 0.55),
}  # fmt: skip
# and instructions a product over those of plain Triton, by option
MOST_OVER_PLAIN = {
    "full": 1.05, "causal": 1.05, "varlen": 1.3, "softcap": 1.3, "alibi": 1.3, "key mask": 1.5,
    "mask": 1.5, "bias": 1.5, "bias gradient": 1.5, "dropout": 1.8,
}  # fmt: skip


def goals(label: str, kind: str, each: dict) -> list[tuple[str, float, float, bool]]:
    """(what, value, goal, whether it is met) of one of our rows."""
    architecture, name, head_dim = label.split()
    found, case = each[kind], kind.removeprefix("ours ")
    plain = each["plain, our tile" if case in CASES else "plain"]
    over = round(found["slots_a_product"] / plain["slots_a_product"], 2)
    most = MOST_OVER_PLAIN[case]
    lines = [("slots over plain", over, most, over <= most)]
    if case in CASES and (architecture, name) in GOALS:
        least = GOALS[architecture, name][HEAD_DIMS.index(int(head_dim))]
        share = round(found["share_2_norm"], 2)
        lines.append(("share", share, least, share >= least))
    return lines


def cells_of(found: dict) -> str:
    """Tile, instructions and ldmatrix a product, spills, bound and share of one row."""
    counts = found["counts"]
    m, n, warps, stages, *loads = found["tile"]
    products = found["tensor_cycles"] / 8
    # two waits for each warpgroup's product at most, unless ptxas serialises them
    waits = counts.get("warpgroup", 0) > counts["product"]
    wgmma = "wgmma" if counts.get("warpgroup") else "mma"
    return (
        f"{m}x{n}, {warps}, {stages}{', TMA' if any(loads) else ''} | {wgmma}"
        f"{', each waited for' if waits else ''} | {found['slots_a_product']:.2f} | "
        f"{counts.get('ldmatrix', 0) / products:.2f} | {counts.get('spill', 0)} | "
        f"{found['bound']} {found['share']:.2f} | {found['share_2_norm']:.2f}"
    )


def markdown(tables: dict[str, dict]) -> str:
    """{version of Triton: rows} as the table that docs/design/triton.md shows."""
    names = ("hot loop", "whose", "Triton", "tile", "products", "slots", "ldmatrix", "spills",
             "bound, its share", "share", "goals")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    first = next(iter(tables.values()))
    for label, kinds in first.items():
        for kind, (version, rows) in itertools.product(kinds, tables.items()):
            each = rows.get(label, {})
            if kind not in each or (kind == "plain, our tile" and _same_tile(each)):
                continue
            found = ""
            if kind.startswith("ours"):
                found = "; ".join(
                    f"{'met' if met else 'missed'}: {what} {value:.2f}, wanted {goal:.2f}"
                    for what, value, goal, met in goals(label, kind, each)
                )
            lines.append(f"| {label} | {kind} | {version} | {cells_of(each[kind])} | {found} |")
    return "\n".join(lines)


def others_markdown() -> str:
    """The rows of OTHERS_TABLE as docs/design/triton.md shows them."""
    lines = ["| loop, whole tiles | ours: tile; slots, spilled, share | plain Triton's best |",
             "|---|---|---|"]  # fmt: skip
    for label, each in json.loads(OTHERS_TABLE.read_text())["rows"].items():
        cells = []
        for found in (each["ours"], each["plain"]):
            m, n, warps, stages, *loads = found["tile"]
            cells.append(
                f"{m}x{n}, {warps}, {stages}{', TMA' if any(loads) else ''}; "
                f"{found['slots_a_product']:.2f}, {found['counts'].get('spill', 0)}, "
                f"{found['share_2_norm']:.2f}"
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _same_tile(each: dict) -> bool:
    return each["plain"]["tile"] == each["plain, our tile"]["tile"]


def tables() -> dict[str, dict]:
    """{version of Triton: rows} as committed, the newest first."""
    found = [json.loads(path.read_text()) for path in (TABLE, OLDEST_TABLE)]
    return {each["triton"]: each["rows"] for each in found}


def report(write: bool) -> int:
    """What `machine_code.py --triton` does, of the installed Triton and, if it is there, of 3.6."""
    content = {TABLE: {"version": metadata.version("triton"), "rows": measure_all()}}
    if OLDEST.exists():
        kinds = [*(f"ours {case}" for case in CASES), "plain", "plain, our tile"]
        rows = measure_all(kinds=kinds, folder=OLDEST)
        content[OLDEST_TABLE] = {"version": "3.6.0", "rows": rows}
    print(markdown({each["version"]: each["rows"] for each in content.values()}))
    lines = []
    for path, each in content.items():
        if write:
            save(path, **each)
        else:
            lines += differences(json.loads(path.read_text()), each["rows"])
    if not write:
        print("\n".join(lines) or "as in the table")
    return bool(lines)
