"""Pictures of the documents: drawn by scripts that still run, of a height that a page can show, and
none that no page shows.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image
from repository import ROOT

PICTURES = ROOT / "docs" / "pictures"
SCRIPTS = sorted(PICTURES.glob("draw_*.py"))
DRAWINGS = [s for s in SCRIPTS if s.stem != "draw_look"]
MOST_PIXELS = 1600  # of the height
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def run(script: Path, folder: Path, *options: str) -> Path:
    """The picture that the script draws into the folder."""
    command = [sys.executable, str(script), "--out", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / script.with_suffix(".png").name.removeprefix("draw_")


def shown() -> set[Path]:
    """Every picture that some document shows or links."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found = set()
    for document in documents:
        for link in re.findall(r"\]\(([^)\s#]+\.(?:png|svg))\)", document.read_text()):
            found.add((document.parent / link).resolve())
    return found


def test_every_picture_is_shown():
    """A picture that nobody sees, or a page whose picture is missing."""
    pictures = {p.resolve() for folder in ("docs", "bench") for p in (ROOT / folder).rglob("*.png")}
    assert pictures == shown()


@pytest.mark.parametrize("picture", sorted(shown()), ids=lambda p: p.name)
def test_pictures_fit_a_page(picture):
    """A picture that one scrolls through for a minute."""
    assert image.imread(picture).shape[0] <= MOST_PIXELS


@pytest.mark.parametrize("script", DRAWINGS, ids=lambda s: s.stem)
def test_pictures_are_drawn_by_their_scripts(script, tmp_path):
    """A script that fails by now, or whose picture was not drawn again after it changed."""
    committed = image.imread(PICTURES / script.with_suffix(".png").name.removeprefix("draw_"))
    drawn = image.imread(run(script, tmp_path))
    # versions of matplotlib place text differently by some pixels
    assert abs(drawn.shape[0] - committed.shape[0]) <= 8
    assert abs(drawn.shape[1] - committed.shape[1]) <= 8
    rows, columns = (min(a, b) for a, b in zip(drawn.shape[:2], committed.shape[:2], strict=True))
    differ = abs(drawn[:rows, :columns, :3] - committed[:rows, :columns, :3]).max(-1) > 0.2
    assert differ.mean() < 0.02


def test_the_picture_of_look_can_be_drawn(tmp_path):
    """A change of the page, of record or of the example that leaves README's picture behind."""
    if not any(map(shutil.which, BROWSERS)):
        pytest.skip("draws in a headless Chromium, and there is none here")
    pixels = image.imread(run(PICTURES / "draw_look.py", tmp_path, "--steps", "5"))
    committed = image.imread(PICTURES / "look.png")
    assert pixels.shape[:2] == committed.shape[:2] and pixels[..., :3].std() > 0.02
