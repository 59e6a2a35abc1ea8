"""look.png: the page of attn_ext.inspect.look for the text classifier of the examples, as a browser
shows it.  Needs a headless Chromium.

The classifier is trained for some seconds on the movie reviews of the examples and then judges one
sentence; `record` sees its attention, `look` writes the page, and the token is chosen by the page's
own address.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from drawing import ROOT, arguments

import attn_ext

sys.path.insert(0, str(ROOT / "examples"))
from text_classifier import (
    BATCH,
    FIRST_WORD,
    Training,
    encode,
    load,
    with_attn_ext,
    words,
)

SENTENCE = "too long, too loud and never funny, a waste of a good cast"
TOKEN, HEAD = "long", -1
SIZE = "1100,760"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def trained(steps: int) -> tuple:
    """(model, vocabulary) after `steps` steps from a fixed seed."""
    data = load()
    counts = Counter(w for sentence, _ in data for w in sentence)
    known = [w for w, times in counts.items() if times >= 5]
    vocabulary = {w: i + FIRST_WORD for i, w in enumerate(known)}
    run = Training(with_attn_ext, torch.float32, vocabulary)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        rows = [data[order[(step * BATCH + i) % len(data)]] for i in range(BATCH)]
        run.step(encode(vocabulary, [s for s, _ in rows]), torch.tensor([y for _, y in rows]))
    return run.model.eval(), vocabulary


def write_page(folder: Path, steps: int) -> tuple[Path, int]:
    """The page, and the number of the token to point at."""
    model, vocabulary = trained(steps)
    tokens = words(SENTENCE)
    with torch.no_grad(), attn_ext.inspect.record(model) as seen:
        verdict = F.sigmoid(model(encode(vocabulary, [tokens]))).item()
    print(seen.summary())
    title = f"a film review, judged {verdict:.0%} positive"
    _, page = attn_ext.inspect.look(seen, folder, tokens=tokens, title=title)
    return page, tokens.index(TOKEN)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250, help="of the training")
    given = arguments(__doc__, parser)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"a headless Chromium must be on the path: one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        page, token = write_page(Path(folder), given.steps)
        address = f"{page.resolve().as_uri()}#layer=0&head={HEAD}&example=0&token={token}"
        picture = (given.out / "look.png").resolve()
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             f"--window-size={SIZE}", f"--screenshot={picture}", address],
            check=True, capture_output=True, cwd=folder, timeout=120,
        )  # fmt: skip
    if not picture.exists():
        raise SystemExit("the browser wrote no picture")
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
