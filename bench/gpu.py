"""One command for a GPU at hand for a few minutes: test, sanitize, tune, measure.

    python bench/gpu.py --minutes 8 --out out/gpu

Needs torch with CUDA and pytest; no network, no nvcc and no build: NVRTC compiles CUDA kernels when
they are used.  Only where the extensions of the tree are missing or older than their sources are
they built in place first, which takes a C++ compiler, pybind11 and ninja.  Steps have shares of the
time; each is a process of its own (a kernel that crashes ends its step only) and saves what it has:
summary.json, summary.md, logs.txt, bench.json, bench.md, bars.png, roofline.png, tuned.json, all in
one folder.
--fake runs every step on the CPU, to test this script.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ATTN_EXT = (sys.executable, "-m", "attn_ext.cli")
FLEX_CASES = 2  # of each group: flex_attention compiles for many seconds a case
GPU_PEERS = (
    "attn_ext", "attn_ext-cuda", "attn_ext-triton", "torch-cudnn", "torch-flash", "torch-efficient",
    "flash-attn", "xformers", "flex",
)  # fmt: skip


class Device:
    """What the steps run on a GPU"""

    name = "cuda"
    budget = 1.0  # seconds of timing a case

    def probe(self) -> dict:
        """The GPU and versions; RuntimeError where there is none"""
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device here")
        p = torch.cuda.get_device_properties(0)
        found = {
            "gpu": p.name,
            "arch": f"{p.major}{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": sys.version.split()[0],
        }
        for module in ("triton", "flash_attn", "xformers"):
            if importlib.util.find_spec(module):
                found[module] = getattr(importlib.import_module(module), "__version__", "?")
        return found

    def build(self, probe: dict) -> list[str]:
        """The extensions in place, where they are not there yet"""
        if built():
            raise Skip("nothing to build: kernels are compiled when they are used")
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]

    def verify(self) -> list[str]:
        """The conformance matrix on the GPU's backends"""
        return [*ATTN_EXT, "verify", "--device", "cuda"]

    def tests(self) -> list[str]:
        """The GPU tests of every backend"""
        names = ("cuda/test_cuda_sm90", "cuda/test_cuda_sm90_varlen",
                 "cuda/test_cuda_sm90_features",
                 "cuda/test_cuda_sm90_backward_features", "cuda/test_cuda_kernels",
                 "triton/test_triton_backend", "api/test_api", "api/test_backends_hypothesis",
                 "cpu/test_kernels", "api/test_nonfinite")  # fmt: skip
        files = [f"tests/{name}.py" for name in names]
        # the emulator and the CPU are tested without a GPU
        return [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", "-p",
                "no:cacheprovider", *files, "-k", "(cuda or triton) and not emulated"]  # fmt: skip

    def sanitize(self) -> list[str]:
        """memcheck over some calls of each kernel"""
        if shutil.which("compute-sanitizer") is None:
            raise Skip("compute-sanitizer is not on PATH")
        return ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3",
                sys.executable, str(Path(__file__).resolve()), "--calls", "cuda"]  # fmt: skip

    def race(self) -> list[str]:
        """racecheck over the same"""
        return [x if x != "memcheck" else "racecheck" for x in self.sanitize()]

    def sm90(self, probe: dict) -> list[str]:
        """Hopper's own forward kernel, off by default, against the sm80 one; a table in the log"""
        if probe["arch"] != "90":
            raise Skip("not a Hopper GPU")
        return [sys.executable, "bench/sm90.py"]

    def tune(self, out: Path, seconds: float) -> list[str]:
        """The tiles of Triton, and the table of all kernels"""
        minutes = f"{max(0.1, seconds / 60 - 0.2):.2f}"
        table = str(out / "tuned.json")
        return [*ATTN_EXT, "tune", "--minutes", minutes, "--out", table]

    def cases(self) -> list[tuple]:
        """(case, peers), the most telling first"""
        from attn_ext.measure.cases import GPU_TABLE

        found = []
        for preset in GPU_TABLE.values():
            for index, case in enumerate(preset.cases(device="cuda")):
                peers = [p for p in GPU_PEERS if p != "flex" or index < FLEX_CASES]
                found.append((case, peers))
        return found


class Fake(Device):
    """The same path on the CPU, with small work in place of each step"""

    name = "cpu"
    budget = 0.05

    def probe(self) -> dict:
        """As if an sm_90 GPU were here"""
        import torch

        return {"gpu": "fake", "arch": "90", "torch": torch.__version__, "python": "3"}

    def build(self, probe: dict) -> list[str]:
        """Nothing to build"""
        return [sys.executable, "-c", "print('built')"]

    def verify(self) -> list[str]:
        """A part of the matrix on the CPU backend"""
        return [
            sys.executable,
            "-m",
            "attn_ext.cli",
            "verify",
            "--backend",
            "cpu",
            "--only",
            "one KV",
        ]

    def tests(self) -> list[str]:
        """One quick test file"""
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                "tests/tools/test_ceilings.py"]  # fmt: skip

    def sanitize(self) -> list[str]:
        """The sanitizer's calls, without it"""
        return [sys.executable, str(Path(__file__).resolve()), "--calls", "cpu"]

    def sm90(self, probe: dict) -> list[str]:
        """The same on the emulator"""
        if importlib.util.find_spec("attn_ext._emulated") is None:
            raise Skip("attn_ext._emulated is not built")
        return [sys.executable, "bench/sm90.py", "--fake"]

    def tune(self, out: Path, seconds: float) -> list[str]:
        """The first classes of a CPU"""
        return [*ATTN_EXT, "tune", "--device", "cpu", "--minutes", "0.01"]

    def cases(self) -> list[tuple]:
        """Three small cases"""
        from attn_ext.measure.cases import make

        peers = ["attn_ext", "torch", "xformers"]
        return [(make("1,2,64,16", "bf16", True), peers), (make("1,2,48,16", "fp32"), peers),
                (make("1,4/2,32,16", "fp32", True, "fwd+bwd"), peers)]  # fmt: skip


class Skip(Exception):
    """Why a step does nothing here"""


def built() -> bool:
    """Whether the tree has its extensions, none older than a source of theirs"""
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cuh")]
    newest = max(path.stat().st_mtime for path in sources)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    extension = ROOT / "attn_ext" / f"_C{suffix}"
    return extension.exists() and extension.stat().st_mtime >= newest


@dataclass
class Run:
    """The whole run: folder, clock, and what each step gave"""

    out: Path
    seconds: float
    device: Device
    probe: dict = field(default_factory=dict)
    steps: dict[str, dict] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)
    predicted: str = ""  # a table, at the end of the summary

    @property
    def left(self) -> float:
        """Seconds that are left"""
        return self.seconds - (time.monotonic() - self.start)

    def environment(self) -> dict:
        """Of every step: the tree itself is importable"""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in paths if p))
        return env

    def save(self) -> None:
        """summary.json and summary.md"""
        used = round(self.seconds - self.left, 1)
        data = {"device": self.probe, "seconds": used, "budget": self.seconds, "steps": self.steps}
        (self.out / "summary.json").write_text(json.dumps(data, indent=1) + "\n")
        lines = ["# bench/gpu.py", "", ", ".join(f"{k} {v}" for k, v in self.probe.items()), ""]
        lines += [
            f"{used} s of {self.seconds:.0f} s",
            "",
            "| step | state | s | |",
            "|---|---|---|---|",
        ]
        for name, step in self.steps.items():
            lines.append(f"| {name} | {step['state']} | {step['seconds']} | {step['line']} |")
        bench = self.out / "bench.md"
        if bench.exists():
            lines += ["", bench.read_text()]
        if self.predicted:
            lines += ["", "## Predicted by the machine code, and measured", "", self.predicted]
        (self.out / "summary.md").write_text("\n".join(lines) + "\n")

    def step(self, name: str, command, share: float, **environment) -> str:
        """Run a command for at most `share` of all the time; returns its state.

        At its limit it gets SIGINT first, upon which pytest and attn-ext say what they have.
        """
        limit = min(share * self.seconds, self.left)
        begun = time.monotonic()
        record = {"state": "skipped", "seconds": 0.0, "line": ""}
        self.steps[name] = record
        print(f"{name}: at most {limit:.0f} s", flush=True)
        try:
            if limit < 1:
                raise Skip("no time was left")
            line = command() if callable(command) else command
            record["command"] = " ".join(line)
            log = self.out / "logs.txt"
            with log.open("a") as stream:
                stream.write(f"\n===== {name}: {' '.join(line)}\n")
                stream.flush()
                at = stream.tell()
                record["state"] = self._wait(line, stream, limit, environment)
            with log.open() as stream:
                stream.seek(at)
                record["line"] = last_line(stream.read())
        except Skip as why:
            record["line"] = str(why)
        except OSError as error:
            record["state"], record["line"] = "failed", str(error)
        record["seconds"] = round(time.monotonic() - begun, 1)
        self.save()
        print(f"  {record['state']} in {record['seconds']} s: {record['line']}", flush=True)
        return record["state"]

    def _wait(self, line, stream, limit: float, environment: dict) -> str:
        env = self.environment() | environment
        child = subprocess.Popen(
            line, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit)
            return "ok" if code == 0 else f"failed ({code})"
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            for number, patience in ((signal.SIGINT, 8), (signal.SIGKILL, 5)):
                if child.poll() is None:
                    os.killpg(child.pid, number)
                    try:
                        child.wait(patience)
                    except subprocess.TimeoutExpired:
                        continue
            if isinstance(error, KeyboardInterrupt):
                raise
            return "time is up"


def last_line(text: str) -> str:
    """The last line that says something, without what would break a Markdown table"""
    lines = [x for x in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if re.search(r"\w", x)]
    return lines[-1].strip().replace("|", "/")[:200] if lines else ""


def measure(device: Device, out: Path, seconds: float) -> int:
    """The step that measures, in a process of its own: goes on from what bench.json has"""
    from attn_ext.measure import ceilings, timing
    from attn_ext.measure.measure import measure_case
    from attn_ext.measure.results import Report, machine

    end = time.monotonic() + seconds
    path, attempt = out / "bench.json", out / ".attempt"
    if path.exists():
        report = Report.load(path)
    else:
        report = Report("attn_ext on a GPU", machine(device.name), ceilings.measure(device.name))
    report.save_to = [path, out / "bench.md"]
    done = {row.case for row in report.rows} | {skip["case"] for skip in report.skipped}
    clock = timing.clock_for(device.name)
    for case, peers in device.cases():
        if case.name in done:
            continue
        if time.monotonic() > end:
            return 0
        attempt.write_text(case.name)  # a crash of this process leaves it there
        rows, skipped = measure_case(case, peers, clock, report.ceilings, budget=device.budget)
        report.add(rows, skipped)
        attempt.unlink()
        best = min((row for row in rows if row.median_ms), key=lambda r: r.median_ms, default=None)
        ours = next((row for row in rows if row.peer == "attn_ext" and row.median_ms), None)
        said = f"attn_ext {ours.median_ms:.3f} ms" if ours else "attn_ext failed"
        print(f"{case.name}: {said}, best {best.peer if best else '-'}", flush=True)
    report.complete = True
    report.save()
    return 0


def bench(run: Run, share: float, arguments: list[str]) -> None:
    """The measuring step, begun again after a case that crashed"""
    attempt = run.out / ".attempt"
    end = time.monotonic() + min(share * run.seconds, run.left)
    for turn in range(6):
        left = end - time.monotonic()
        if left < 5 and turn:
            break
        command = [sys.executable, str(Path(__file__).resolve()), "--measure",
                   f"{max(1.0, left - 5):.0f}", "--out", str(run.out), *arguments]  # fmt: skip
        name = "bench" if not turn else f"bench again {turn}"
        state = run.step(name, command, max(left, 1.0) / run.seconds)
        if not attempt.exists():
            break
        crashed = attempt.read_text()
        attempt.unlink()
        _note_crash(run.out, crashed, state)


def _note_crash(out: Path, case: str, state: str) -> None:
    path = out / "bench.json"
    if path.exists():
        data = json.loads(path.read_text())
        data["skipped"].append(
            {"case": case, "peer": "all", "reason": f"the process ended: {state}"}
        )
        path.write_text(json.dumps(data, indent=1) + "\n")


def figures(out: Path) -> str:
    """bars.png and roofline.png of bench.json; returns what was done"""
    try:
        from attn_ext.measure import plots
        from attn_ext.measure.results import Report

        report = Report.load(out / "bench.json")
        plots.bars(report, out / "bars.png")
        plots.roofline(report, out / "roofline.png")
    except (ImportError, OSError, ValueError) as error:
        return f"no figures: {error}"
    return "bars.png, roofline.png"


def predicted(out: Path, architecture: str) -> str:
    """What the counts of hot loops let expect beside bench.json: a table, or why there is none"""
    import predicted as model

    try:
        report = json.loads((out / "bench.json").read_text())
        return model.table(list(model.predictions(report, architecture)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"No prediction: {error!r}\n"


def calls(device: str) -> int:
    """Some calls of each kernel, small, for compute-sanitizer"""
    from attn_ext.backends import registry
    from attn_ext.testing import check_call, random_call

    names = ("cuda", "triton") if device == "cuda" else ("cpu",)
    shapes = (
        {"causal": True, "seqlen_q": 70},
        {"mask": True, "bias": "hk", "seqlen_q": 65, "sink": True},
        {"heads_q": 4, "dropout_p": 0.1, "alibi": True, "softcap": 5.0, "head_dim": 64},
        {"seqlens_q": (3, 40, 0), "causal": True, "layout": "padded"},
        {"seqlen_q": 1, "seqlen_k": 90, "cache_seqlens": (90, 17), "page_size": 16},
    )
    made = 0
    for name in names:
        if registry.get(name).available():
            continue
        for arguments in shapes:
            import torch

            check_call(random_call(dtype=torch.float16, device=device, **arguments), name)
            made += 1
    print(f"{made} calls")
    return 0 if made else 1


def importable_tree() -> None:
    """Make `attn_ext.triton_kernels` importable from the tree, as an installation would"""
    link = ROOT / "attn_ext" / "triton_kernels"
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("attn_ext.triton_kernels") is None and not link.exists():
        link.symlink_to(Path("..") / "triton_kernels", target_is_directory=True)


def main(argv: list[str] | None = None) -> int:
    """Run the steps; 0 when the build, the tests and the measurement went through"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="time for everything (default 8)")
    add("--out", type=Path, default=Path("out/gpu"), help="folder of the results")
    add("--skip", default="", help="steps to leave out, comma-separated")
    add("--fake", action="store_true", help="run every step on the CPU")
    add("--measure", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    add("--calls", metavar="DEVICE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = Fake() if options.fake else Device()
    if not 0 < options.minutes <= 600:
        parser.error(f"--minutes must be above 0 and at most 600, got {options.minutes}")
    if options.calls:
        return calls(options.calls)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    if options.measure is not None:
        return measure(device, out, options.measure)
    for name in ("bench.json", "bench.md", "logs.txt", ".attempt", "tuned.json"):
        (out / name).unlink(missing_ok=True)
    run = Run(out, options.minutes * 60, device)
    try:
        run.probe = device.probe()
    except (RuntimeError, ImportError) as error:
        print(f"bench/gpu.py: {error} (--fake runs every step on the CPU)", file=sys.stderr)
        return 2
    importable_tree()
    run.save()
    left_out = options.skip.split(",")
    arguments = ["--fake"] if options.fake else []
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an overrun leaves its allocation then
    steps = (
        ("build", lambda: run.step("build", lambda: device.build(run.probe), 0.4)),
        ("verify", lambda: run.step("verify", device.verify, 0.15)),
        ("sm90", lambda: run.step("sm90", lambda: device.sm90(run.probe), 0.15)),
        ("bench", lambda: bench(run, 0.35, arguments)),
        ("tests", lambda: run.step("tests", device.tests, 0.2)),
        ("sanitize", lambda: run.step("sanitize", device.sanitize, 0.1, **no_cache)),
        ("race", lambda: run.step("race", device.race, 0.1, **no_cache)),
        ("tune", lambda: run.step("tune", lambda: device.tune(out, run.left), 0.3)),
    )
    code = 0
    try:
        for name, action in steps:
            if name not in left_out:
                action()
    except KeyboardInterrupt:
        code = 130
    run.steps["figures"] = {"state": "ok", "seconds": 0.0, "line": figures(out)}
    (out / ".attempt").unlink(missing_ok=True)
    run.predicted = predicted(out, run.probe["arch"])
    run.save()
    print(run.predicted, end="")
    print(f"{run.seconds - run.left:.0f} s; results are in {out}")
    bad = [n for n, s in run.steps.items() if s["state"].startswith("failed") and n != "tune"]
    return code or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
