"""`with attn_ext.profile():` - records a block, and tells how much of it is attention."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch


class profile:  # a context manager, named as it is used
    """Record the torch operators of a block, and find the attention in it.

        with attn_ext.profile(out="prof") as p:
            train_some_steps()
        print(p)

    out: a folder for trace.json (open it in chrome://tracing or Perfetto), profile.json and
    profile.html; None: nothing is kept.   replay: measure afterwards, on random data of the
    recorded shapes, what attn_ext would save (about a second a shape).   quiet: do not print.
    skip_steps: how many steps of an optimizer (torch.optim) at the beginning are not counted; None:
    the first, and those after it that are slow.
    After the block `p.result` is an `attn_ext.measure.trace.Profile`; times in seconds.
    While it records, calls of attn_ext go through torch's dispatcher (some microseconds each).
    """

    def __init__(
        self,
        out: str | Path | None = None,
        replay: bool = True,
        quiet: bool = False,
        skip_steps: int | None = None,
    ):
        from attn_ext.core import validate

        if skip_steps is not None:
            skip_steps = validate.integer("skip_steps", skip_steps)
        self.skip_steps = skip_steps
        self.out = None if out is None else Path(out)
        self.replay, self.quiet = replay, quiet
        self.result = None
        self.ceilings = None

    def __enter__(self) -> profile:
        from attn_ext.ops import route

        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
        self._through_dispatcher, route.through_dispatcher = route.through_dispatcher, True
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._recorder = torch.profiler.profile(activities=kinds, record_shapes=True)
        self._recorder.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        from attn_ext.ops import route

        wall = time.perf_counter() - self._start
        route.through_dispatcher = self._through_dispatcher
        self._recorder.__exit__(kind, error, traceback)
        with tempfile.TemporaryDirectory() as folder:
            path = (self.out or Path(folder)) / "trace.json"
            self._recorder.export_chrome_trace(str(path))
            del self._recorder
            if kind is None or kind is SystemExit:
                self._finish(path, wall)

    def _finish(self, path: Path, wall: float) -> None:
        from attn_ext.measure import report, trace

        self.result = trace.analyze(trace.load(path), wall, self.skip_steps)
        self.ceilings = report.complete(self.result, self.replay)
        if self.out is not None:
            report.write(self.result, self.ceilings, self.out)
        if not self.quiet:
            print(self)

    def __str__(self) -> str:
        from attn_ext.measure import report

        return report.text(self.result) if self.result else "nothing recorded yet"


def record(run, out: Path) -> int:
    """Call `run()` under torch.profiler and write out/trace.json and out/run.json; for the child
    process of `attn-ext profile`.  Returns the exit code of what ran.
    """
    code = 0
    recorder = profile(out, quiet=True)
    recorder._finish = lambda path, wall: None  # the parent does it, in a clean process
    start = time.perf_counter()
    try:
        with recorder:
            start = time.perf_counter()
            try:
                run()
            except SystemExit as leave:
                code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
                if isinstance(leave.code, str):
                    print(leave.code)
            except KeyboardInterrupt:
                code = 130
            wall = time.perf_counter() - start
    except Exception:
        (out / "run.json").write_text(json.dumps({"wall": time.perf_counter() - start, "code": 1}))
        raise
    found = {"wall": wall, "code": code, "threads": torch.get_num_threads()}
    (out / "run.json").write_text(json.dumps(found))
    return code
