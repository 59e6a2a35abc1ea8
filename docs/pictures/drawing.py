"""What the scripts of this folder share.  Each `draw_NAME.py` draws NAME.png into this folder, or
into the folder that --out names:  python docs/pictures/draw_cpu_tiles.py

`python docs/pictures/drawing.py` runs them all.  The pictures show the design as it is: a script
changes together with the kernel that it tells of.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
MOST_PIXELS = 1600  # of the height
BLUE, ORANGE, GREEN, RED, GREY, VIOLET = (
    "#cfe0f5", "#fbdcb5", "#cfe8cf", "#f4c7c3", "#e6e6e6", "#e0d4ee",
)  # fmt: skip
INK = "#303030"
plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})


def canvas(width: float, height: float, columns: int = 1, rows: int = 1, **options):
    """A figure of width x height inches and its axes without frames."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    for each in axes.flat:
        each.axis("off")
    return figure, axes.flatten()


def box(axes, x, y, width, height, text="", color=GREY, size=9, **options):
    """A rectangle with its lower left corner at (x, y) and a text in its middle."""
    style = {"facecolor": color, "edgecolor": INK, "linewidth": 0.8} | options
    axes.add_patch(plt.Rectangle((x, y), width, height, **style))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes, start, end, color=INK, style="->", **options):
    """An arrow between two points."""
    properties = {"arrowstyle": style, "color": color, "linewidth": 1.1} | options
    axes.annotate("", xy=end, xytext=start, arrowprops=properties)


def note(axes, x, y, text, size=9, **options):
    """A text, its left end at x."""
    axes.text(x, y, text, fontsize=size, **({"va": "center"} | options))


def frame(axes, width, height, title=""):
    """The axes show 0..width and 0..height."""
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left")


def arguments(doc: str, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The command line: --out, a folder that is made if it is missing, and what `parser` adds."""
    parser = parser or argparse.ArgumentParser()
    parser.description = doc.splitlines()[0]
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the picture")
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def save(figure, doc: str, name: str, dpi: int = 100) -> None:
    """Write NAME.png into the folder that the command line names."""
    path = arguments(doc).out / f"{name}.png"
    if figure.get_figheight() * dpi > MOST_PIXELS:
        raise SystemExit(f"{name}.png must be at most {MOST_PIXELS} pixels tall")
    figure.savefig(path, dpi=dpi)
    print(f"wrote {path}")


if __name__ == "__main__":
    for script in sorted(FOLDER.glob("draw_*.py")):
        subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=True)
