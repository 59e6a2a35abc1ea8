"""Size of the page of attn_ext.inspect.look, and how long it takes for an action, in a headless
Chromium:  python bench/look_page.py [--length 4096 --layers 6 --heads 8]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from machine import describe

import attn_ext

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
# each action is done so often, and its layout is forced before the clock is read
SCRIPT = """<pre id="times"></pre><script>
const $ = id => document.getElementById(id), times = {};
const timed = (name, act) => {
  const start = performance.now();
  act();
  document.body.getBoundingClientRect();
  (times[name] ||= []).push(performance.now() - start);
};
const press = (key, on = document.body) =>
  on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const change = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
for (let at = 0; at < 5; at++) {
  if (at < index0.layers) timed("layer that is seen for the first time", () => change("layer", at));
  timed("next token", () => press("ArrowLeft"));
  timed("another window", () => $("earlier").click());
  timed("next head", () => press("]"));
  timed("comparison", () => press("c"));
  $("find").value = `w${at}`;
  timed("search", () => $("find").dispatchEvent(new Event("input")));
  timed("next place", () => press("Enter", $("find")));
  timed("colours", () => change("colour", ["row", "log", "linear"][at % 3]));
}
$("times").textContent = JSON.stringify(times);
</script>"""


def recorded(length: int, layers: int, heads: int) -> attn_ext.inspect.record:
    torch.manual_seed(0)
    with attn_ext.inspect.record() as seen:
        for _ in range(layers):
            q, k = (1.5 * torch.randn(1, heads, length, 64) for _ in range(2))
            attn_ext.attention(q, k, k, causal=True)
    return seen


def times_of(page: Path, layers: int) -> dict[str, list[float]]:
    """Milliseconds of each action."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"a headless Chromium must be on the path: one of {', '.join(BROWSERS)}")
    known = f"<script>const index0 = {{layers: {layers}}};</script>"
    head, _, tail = page.read_text("utf-8").rpartition("</body>")
    page.write_text(f"{head}{known}{SCRIPT}</body>{tail}", "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000",
               "--dump-dom", page.resolve().as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(re.search(r'<pre id="times">(.+?)</pre>', done.stdout)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("length", 4096), ("layers", 6), ("heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    print(describe())
    start = time.perf_counter()
    seen = recorded(given.length, given.layers, given.heads)
    print(f"recorded in {time.perf_counter() - start:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        start = time.perf_counter()
        seen.page(tokens=[f" w{i}" for i in range(given.length)]).save(page)
        print(f"written in {time.perf_counter() - start:.1f} s: {page.stat().st_size / 1e6:.1f} MB")
        for name, times in times_of(page, given.layers).items():
            print(f"{name:40} median {statistics.median(times):6.1f} ms  most {max(times):6.1f} ms")


if __name__ == "__main__":
    main()
