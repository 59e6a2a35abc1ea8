"""attn-ext: output and exit code of each command; a planted wrong backend that verify must name."""

import json
import re
import types
from pathlib import Path

import pytest
import torch
from reports import MAYBE, NUMBER, Page, check

import attn_ext
from attn_ext.backends import reference, registry
from attn_ext.cli import matrix
from attn_ext.cli.main import app, main

DOCTOR = {
    "attn_ext": str, "python": str, "platform": str, "torch_cuda": (str, None), "packages": dict,
    "cuda_kernels": str,
    "environment": dict, "tuned": dict,
    "cpu": {"model": str, "cores": int, "threads": int, "memory_available_gib": NUMBER,
            "caches": dict, "isa": (str, None), "isas": [str], "bf16_dot": (bool, None)},
    "gpus": [{"name": str, "arch": str, "memory_gib": NUMBER, "processors": int}],
    "compilers": {"c++": (str, None), "nvcc": (str, None), "driver": (str, None)},
    "backends": [{"name": str, "works": bool, "reason": str, "advice": str}],
}  # fmt: skip
MEASURE = {"name": str, "max_error": (int, float, str), "rms_error": (int, float, str),
           "allowed": NUMBER}  # fmt: skip
VERIFY = {
    "format": int, "machine": dict, "full": bool, "complete": bool, "seconds": NUMBER,
    "passed": int, "failed": int, "peers_failed": int, "not_applicable": int,
    "outcomes": [{"subject": str, "ours": bool, "group": str, "check": str, "dtype": str,
                  "state": str, "reason": str, "sweep": int, "measures": [MEASURE]}],
}  # fmt: skip
BENCH = {
    "format": int, "title": str, "complete": bool, "machine": dict, "ceilings": dict,
    "rows": [{"shape": str, "dtype": str, "causal": bool, "direction": str, "device": str,
              "peer": str, "state": str, "error": NUMBER, "allowed": NUMBER, "median_ms": MAYBE,
              "best_ms": MAYBE, "samples": int, "tflops": MAYBE, "gb_s": MAYBE, "peak_mib": MAYBE,
              "share": MAYBE, "bound": (str, None), "ratio": MAYBE}],
    "skipped": [{"case": str, "peer": str, "reason": str}],
}  # fmt: skip


def run(capsys, *argv):
    """(exit code, stdout, stderr)"""
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def off_by_one(name="planted"):
    """A backend whose causal mask ends one key late"""

    def late(call):

        wrong = call.window_right == 0 and call.max_seqlen_k > 1
        return call._replace(window_right=1) if wrong else call

    return types.SimpleNamespace(
        __name__=name,
        available=lambda: "",
        unsupported=lambda problem: [],
        forward=lambda call: reference.forward(late(call)),
        backward=lambda call, *rest: reference.backward(late(call), *rest),
    )


@pytest.fixture
def planted():
    """The planted backend, known by name while the test runs"""
    registry.TEST_ONLY["planted"] = off_by_one()
    registry.get.cache_clear()
    yield "planted"
    registry.TEST_ONLY.clear()
    registry.get.cache_clear()


def test_doctor(capsys):
    """A backend that is missing without a word on why and what to do."""
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    check(found, DOCTOR)
    assert code == 0 and found["cpu"]["isa"] in found["cpu"]["isas"]
    assert [b["name"] for b in found["backends"]] == list(registry.ORDER)
    assert all(b["works"] or (b["reason"] and b["advice"]) for b in found["backends"])
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and found["cpu"]["model"] in out
    assert torch.__version__.partition("+")[0] in out


def test_verify_passes_and_reports(capsys, tmp_path):
    """A report that cannot be opened, or that hides what it measured."""
    path = tmp_path / "deep" / "r.html"
    code, out, err = run(capsys, "verify", "--only", "length", "--backend", "cpu", "--also",
                         "torch", "--report", path, "--json")  # fmt: skip
    data = json.loads(out)
    check(data, VERIFY)
    assert code == 0 and data["failed"] == 0 and data["passed"] > 20 and data["complete"]
    worst = [m for o in data["outcomes"] for m in o["measures"]]
    assert {m["name"] for m in worst} >= {"out", "lse", "dq", "dk", "dv"}
    assert all(0 <= m["rms_error"] <= m["max_error"] <= m["allowed"] for m in worst)
    page = Page(path.read_text())
    text = " ".join(page.text)
    assert page.open == [] and page.outside == []  # well-formed, nothing loaded from elsewhere
    assert "svg" in page.tags and page.tags.count("polyline") >= 6
    assert page.tags.count("circle") >= 3 * 7 and "cpu bf16" in text and "S = 192" in text
    assert str(path.name) in err


def test_square_brackets_are_text(capsys, tmp_path):
    """Names and remedies such as `pip install 'attn_ext[peers]'` whose end the console takes for
    colours and leaves out."""
    path = tmp_path / "r[cpu].html"
    code, out, _ = run(capsys, "verify", "--quick", "--only", "S = 16", "--backend", "cpu",
                       "--report", path)  # fmt: skip
    assert code == 0 and "r[cpu].html" in out


def test_verify_names_the_case_that_a_wrong_backend_fails(capsys, planted, tmp_path):
    """An off-by-one mask that conformance does not see."""
    path = tmp_path / "r.html"
    code, out, _ = run(capsys, "verify", "--backend", planted, "--only", "mask", "--report", path)
    assert code == 1
    assert re.search(r"FAIL planted: mask: causal, fp32: out: max error", out)
    failed = {m.split(", fp32")[0] for m in re.findall(r"FAIL planted: (.*?):? (?:out|lse)", out)}
    assert failed and not any("window" in f and "causal" not in f for f in failed)
    assert "planted" in " ".join(Page(path.read_text()).text)
    code, _, _ = run(capsys, "verify", "--backend", planted, "--only", "one KV")
    assert code == 0  # it is right where nothing is causal


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda out, lse: (out * float("nan"), lse), "out: max error inf"),
        (lambda out, lse: (out, lse + 0.01), "lse: max error 0.01"),
        (lambda out, lse: (out[:, :, :-1], lse), "out: max error inf"),
        (lambda out, lse: (None, lse), "AssertionError: out must be given"),
        (lambda out, lse: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_verify_sees_every_kind_of_wrong_result(capsys, planted, spoil, named):
    """NaN, a wrong statistic, a wrong shape, nothing, an exception: each must fail, none crash."""
    module = registry.TEST_ONLY[planted]
    right = reference.forward
    module.forward = lambda call: (*spoil(*right(call)[:2]), *right(call)[2:])
    code, out, _ = run(capsys, "verify", "--backend", planted, "--only", "grouped heads")
    assert code == 1 and named in out


def test_verify_sees_results_that_change_from_run_to_run(capsys, planted):
    """Gradients that differ in the last bit between two runs."""
    module = registry.TEST_ONLY[planted]
    runs = []

    def unsteady(call):
        runs.append(1)
        out, *rest = reference.forward(call)
        out[..., 0] += (len(runs) % 2) * 1e-6
        return out, *rest

    module.forward = unsteady
    code, out, _ = run(capsys, "verify", "--backend", planted, "--only", "repeated")
    assert code == 1 and "FAIL planted: repeated runs: forward and backward, fp32: result 0" in out


def test_verify_reports_where_a_peer_fails(capsys):
    """torch lets NaN of masked keys through: seen, told, and counted only with --strict."""
    options = ("verify", "--backend", "cpu", "--also", "torch", "--only", "masked keys hold NaN")
    code, out, _ = run(capsys, *options)
    assert code == 0 and "FAIL torch-math: NaN in padding" in out and "3 passed, 0 failed" in out
    assert run(capsys, *options, "--strict")[0] == 1


def test_interrupted_verify_keeps_what_it_has(capsys, monkeypatch, tmp_path):
    """Ctrl-C that loses the report."""
    from attn_ext.cli import verify

    calls = []

    def interrupt(check, dtype, tested, real=verify.run_check):
        calls.append(check)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(check, dtype, tested)

    monkeypatch.setattr(verify, "run_check", interrupt)
    path = tmp_path / "r.html"
    code, out, err = run(capsys, "verify", "--backend", "cpu", "--only", "length", "--json",
                         "--report", path)  # fmt: skip
    data = json.loads(out)
    assert code == 130 and len(data["outcomes"]) == 2 and data["complete"] is False
    assert "S = 1" in path.read_text() and "interrupted after 2 results" in err


def test_the_matrix_holds_the_cases_where_others_broke():
    """A case that is lost when the table is edited."""
    groups = {c.group for c in matrix.CHECKS}
    assert groups >= {"S % 128 == 64", "very negative LSE", "empty rows", "NaN in padding",
                      "strides", "large", "repeated runs", "stream"}  # fmt: skip
    names = [(c.group, c.name) for c in matrix.CHECKS]
    assert len(set(names)) == len(names)
    assert {c.name for c in matrix.selected(True)} > {c.name for c in matrix.selected(False)}


def test_large_offsets_are_tested_or_refused_with_a_reason(monkeypatch):
    """An int32 offset, seen only beyond 2^31 elements; a machine without the memory."""
    from attn_ext.cli import conform, subjects

    large = next(c for c in matrix.CHECKS if c.kind == "large")
    monkeypatch.setattr(conform, "available_bytes", lambda device: 1 << 30)
    (outcome,) = conform.run_check(large, "bf16", [subjects.Backend("cpu", "cpu")])
    assert outcome.state == "n/a" and "GiB of memory" in outcome.reason


def test_bench(capsys, tmp_path):
    """Tables, files and figures of a run."""
    from matplotlib import image

    code, out, _ = run(capsys, "bench", "--shape", "1,2,64,16", "--dtype", "fp32,bf16",
                         "--causal", "--backward", "--peers", "torch,naive,xformers", "--budget",
                         0.05, "--out", tmp_path, "--device", "cpu", "--json")  # fmt: skip
    data = json.loads(out)
    check(data, BENCH)
    assert code == 0 and len(data["rows"]) == 6 and data["skipped"][0]["peer"] == "xformers"
    assert json.loads((tmp_path / "bench.json").read_text()) == data
    assert (tmp_path / "bench.csv").read_text().count("\n") == 7
    assert "| 1,2,64,16 bf16 causal fwd+bwd | attn_ext |" in (tmp_path / "bench.md").read_text()
    for name in ("bars.png", "roofline.png"):
        assert image.imread(tmp_path / name)[..., :3].std() > 0.02
    code, out, _ = run(capsys, "bench", "--shape", "1,2,64,16", "--dtype", "fp32", "--peers",
                       "naive", "--budget", 0.05, "--device", "cpu")  # fmt: skip
    assert code == 0 and "1,2,64,16 fp32 full fwd" in out and "ceilings: fp32" in out


def test_interrupted_bench_leaves_finished_rows(capsys, tmp_path, monkeypatch):
    """Ctrl-C in the second case: the first one is on disk."""
    from attn_ext.measure import measure

    real, calls = measure.measure_case, []

    def interrupt(case, *rest, **options):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(case, *rest, **options)

    monkeypatch.setattr(measure, "measure_case", interrupt)
    code, _, err = run(capsys, "bench", "--shape", "1,2,32,16", "--peers", "torch", "--budget",
                       0.05, "--device", "cpu", "--out", tmp_path)  # fmt: skip
    data = json.loads((tmp_path / "bench.json").read_text())
    assert code == 130 and len(data["rows"]) == 2 and data["complete"] is False
    assert "interrupted after 2 rows" in err and (tmp_path / "bars.png").exists()


def test_explain(capsys):
    """A choice without reasons; a problem that no backend takes, with success."""
    code, out, _ = run(capsys, "explain", "--shape", "1,8/2,128,64", "--features", "mask,bias",
                       "--backward", "--json")  # fmt: skip
    found = json.loads(out)
    check(found, {"shape": str, "chosen": (str, None), "reasons": dict})
    assert code == 0 and found["chosen"] == "cpu" and found["reasons"]["cuda"]
    code, out, _ = run(capsys, "explain", "--shape", "1,8,128,64", "--device", "cuda")
    assert code == 0 and "tensors must be on the cpu, got cuda" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("verify", "--backend", "nope"), "backend must be 'auto' or one of"),
        (("verify", "--backend", "cuda"), "--backend cuda cannot run here"),
        (("verify", "--also", "tensorflow"), "--also must be among torch, flash_attn, got"),
        (("verify", "--device", "tpu"), "--device must be cpu here, got 'tpu'"),
        (("verify", "--only", "zebra"), "--only matches no check, got 'zebra'"),
        (("verify", "--quick", "--full"), "--quick and --full exclude each other"),
        (("verify", "--report", "/proc/none/r.html"), "--report cannot be written"),
        (("bench", "--preset", "nope"), "--preset must be one of bert, vit"),
        (("bench", "--shape", "1,2,3"), "--shape must be B,H,S,D"),
        (("bench", "--shape", "1,8/3,64,64"), "Hq a multiple of Hk"),
        (("bench", "--shape", "1,8,64,64", "--dtype", "int8"), "--dtype must be one of fp32"),
        (("bench", "--shape", "9999,999,99999,128"), "GiB for its tensors"),
        (("bench", "--peers", "nope"), "--peers must be among all, attn_ext"),
        (("bench", "--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("bench", "--budget", "nan"), "--budget must be above 0"),
        (("bench", "--budget", "x"), "Invalid value for '--budget'"),
        (("bench", "--preset", "bert", "--shape", "1,1,1,1"), "exclude each other"),
        (("explain",), "Missing option '--shape'"),
        (("explain", "--shape", "1,8,64,64", "--features", "magic"), "--features must be among"),
        (("explain", "--shape", "1,8,64,64", "--kind", "odd"), "--kind must be dense"),
        (("tune", "--minutes", "-1"), "--minutes must be above 0"),
        (("tune", "--dtype", "int8"), "--dtype must be one of bf16, fp16, fp32, got 'int8'"),
        (("tune", "--head-dims", "64,x"), "--head-dims must be numbers from 1 to 256"),
        (("tune", "--device", "tpu"), "--device must be cpu"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("doctor", "--nope"), "No such option"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_arguments_are_one_line_and_exit_2(argv, message, capsys):
    """A traceback, a page of usage, or work that starts with a wrong argument."""
    if argv[1:] == ("--backend", "cuda") and not attn_ext.backends()["cuda"]:
        argv = ("verify", "--backend", "nope")
        message = "backend must be"
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and message in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_the_installed_script_runs_without_a_traceback():
    """An entry point that does not exist, or an exception on a closed pipe."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "attn_ext.cli", "explain", "--shape", "1,1,1,1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and "chosen" in ran.stdout and ran.stderr == ""
    ran = subprocess.run([*command[:3], "explain"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2 and ran.stderr == "attn-ext: Missing option '--shape'.\n"


def test_tune_hands_over_to_the_tuner_of_tiles(capsys, monkeypatch):
    """Options that Triton's tuner does not know; a time budget that is not kept."""
    import importlib
    import time

    from attn_ext.cli import tune

    pytest.importorskip("triton", reason="the tuner imports Triton")
    module = importlib.import_module("attn_ext.triton_kernels.tune")
    configs = importlib.import_module("attn_ext.triton_kernels.configs")
    tuned, said = [], []

    def fake(directions, head_dims, seqlen, dtype, device, repeats=10, report=print):
        tuned.append((directions, head_dims, dtype))

    monkeypatch.setattr(module, "tune", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tune.tune_tiles(time.monotonic() + 60, [96], "float16", said.append)
    assert tuned == [([kind], [96], torch.float16) for kind in configs.DIRECTIONS]
    tuned.clear()
    tune.tune_tiles(time.monotonic() - 1, [96], "float16", said.append)
    assert not tuned and "the time is up" in said[-1]


def test_version(capsys):
    """No such option."""
    assert run(capsys, "--version")[:2] == (0, f"attn_ext {attn_ext.__version__}\n")


def test_look_at_what_is_no_recording(capsys, tmp_path):
    """A traceback of the unpickler, about a path that was mistaken."""
    for content in (b"root:x:0:0\n", b"\x7fELF", b"PK\x03\x04", b""):
        path = tmp_path / "file"
        path.write_bytes(content)
        code, out, err = run(capsys, "look", path)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert "FILE must be written by attn_ext.inspect.record.save" in err
    code, _, err = run(capsys, "look", tmp_path / "none.pt")
    assert code == 2 and "FILE must be there" in err


def documented():
    """(document, command, options) of every attn-ext command line in the documents"""
    root = Path(__file__).parents[2]
    for document in [*root.glob("*.md"), *(root / "docs").rglob("*.md")]:
        for line in re.findall(
            r"(?:^ {0,4}\$? ?|`)attn-ext ([a-z][^`\n]*)", document.read_text(), re.M
        ):
            words = line.split(" -- ")[0].split()
            yield document.name, words[0], [w.split("=")[0] for w in words if w.startswith("--")]


def test_documented_commands_and_options_exist():
    """A document that names an option which was renamed."""
    import typer

    commands = typer.main.get_command(app).commands
    lines = list(documented())
    assert len(lines) >= 8 and {"doctor", "verify", "bench", "profile"} <= {c for _, c, _ in lines}
    for document, command, options in lines:
        assert command in commands, (document, command)
        params = commands[command].params
        known = {o for p in params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert set(options) <= known, (document, command, options)
