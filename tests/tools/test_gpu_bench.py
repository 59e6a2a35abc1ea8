"""bench/gpu.py without a GPU: every step on a fake device, time limits, crashes, a missing GPU."""

import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_bench", ROOT / "bench" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu_bench"] = gpu  # its dataclasses look themselves up
spec.loader.exec_module(gpu)


def test_the_whole_path_on_a_fake_device(tmp_path):
    """A step that cannot start, a result that is not written: ten minutes of a GPU lost."""
    from matplotlib import image

    # tests and race differ from the other steps by their command line only
    code = gpu.main(["--fake", "--minutes", "5", "--out", str(tmp_path), "--skip", "tests,race"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {name: step["state"] for name, step in summary["steps"].items()}
    assert code == 0, (tmp_path / "logs.txt").read_text()
    assert [states[n] for n in ("build", "verify", "bench", "sanitize", "figures")] == ["ok"] * 5
    assert states["sm90"] == "ok" or importlib.util.find_spec("attn_ext._emulated") is None
    assert states["tune"] == "ok"
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert bench["complete"] and len(bench["rows"]) == 6 and bench["ceilings"]["fp32"] > 0
    text = (tmp_path / "summary.md").read_text()
    assert "| build | ok |" in text and "| 1,2,64,16 bf16 causal fwd | attn_ext |" in text
    assert "No measured row has a prediction." in text  # the model is of GPUs
    assert "===== verify:" in (tmp_path / "logs.txt").read_text()
    for name in ("bars.png", "roofline.png"):
        assert image.imread(tmp_path / name)[..., :3].std() > 0.02
    kept = sorted(p.name for p in tmp_path.iterdir())
    assert len(kept) <= 8 and not any(name.startswith(".") for name in kept)


def test_nothing_is_built_where_the_extensions_are(tmp_path, monkeypatch):
    """Minutes of a GPU for extensions that are there; or a measurement of old ones."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    source = tmp_path / "csrc" / "cuda" / "launch.cpp"
    extension = tmp_path / "attn_ext" / f"_C{gpu.sysconfig.get_config_var('EXT_SUFFIX')}"
    for path in (source, extension):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (100, 100))
    assert gpu.built()
    with pytest.raises(gpu.Skip, match="nothing to build"):
        gpu.Device().build({})
    os.utime(source, (101, 101))
    assert not gpu.built() and "build_ext" in gpu.Device().build({})
    os.utime(source, (100, 100))
    extension.unlink()
    assert not gpu.built()


@pytest.fixture
def run(tmp_path):
    """A run of a minute on the fake device"""
    return gpu.Run(tmp_path, 60.0, gpu.Fake())


def test_a_step_ends_at_its_limit_and_says_what_it_had(run):
    """A hanging kernel that takes the time of every later step."""
    code = (
        "import time, sys\nprint('begun', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('half a result')"
    )
    begun = time.monotonic()
    run.step("slow", [sys.executable, "-c", code], 4 / 60)
    assert time.monotonic() - begun < 30
    assert run.steps["slow"]["state"] == "time is up"
    assert run.steps["slow"]["line"] in ("half a result", "begun")
    assert json.loads((run.out / "summary.json").read_text())["steps"]["slow"]


def test_a_step_that_ignores_the_signal_is_killed(run, monkeypatch):
    """A process that holds the GPU after its time."""
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    real = gpu.subprocess.Popen.wait
    monkeypatch.setattr(gpu.subprocess.Popen, "wait", lambda self, t=None: real(self, min(t, 3)))
    begun = time.monotonic()
    run.step("deaf", [sys.executable, "-c", code], 2 / 60)
    assert time.monotonic() - begun < 20 and run.steps["deaf"]["state"] == "time is up"


def test_failing_missing_and_late_steps_do_not_stop_the_run(run):
    """An exception in the driver, with nothing saved."""
    run.step("bad", [sys.executable, "-c", "print('why | not'); raise SystemExit(7)"], 0.5)
    assert (run.steps["bad"]["state"], run.steps["bad"]["line"]) == ("failed (7)", "why / not")
    run.step("absent", ["/nonexistent/compute-sanitizer"], 0.5)
    assert run.steps["absent"]["state"] == "failed" and "nonexistent" in run.steps["absent"]["line"]

    def skips():
        raise gpu.Skip("no compiler")

    run.step("left out", skips, 0.5)
    assert run.steps["left out"]["state"] == "skipped"
    run.start -= 1000
    run.step("late", [sys.executable, "-c", "1"], 0.5)
    assert run.steps["late"]["line"] == "no time was left"


def test_measuring_goes_on_behind_a_case_that_crashes(run, monkeypatch):
    """An illegal memory access in one case that costs all the others, or is tried for ever."""
    cases = ["a", "b", "c"]
    path = run.out / "bench.json"
    path.write_text(json.dumps({"rows": [], "skipped": []}))

    def step(name, command, share, **environment):
        data = json.loads(path.read_text())
        done = data["rows"] + [skip["case"] for skip in data["skipped"]]
        for case in cases:
            if case in done:
                continue
            if case == "b":
                (run.out / ".attempt").write_text(case)
                return "failed (-11)"
            data["rows"].append(case)
            path.write_text(json.dumps(data))
        return "ok"

    monkeypatch.setattr(run, "step", step)
    gpu.bench(run, 0.9, [])
    data = json.loads(path.read_text())
    assert data["rows"] == ["a", "c"] and not (run.out / ".attempt").exists()
    assert data["skipped"] == [
        {"case": "b", "peer": "all", "reason": "the process ended: failed (-11)"}
    ]


def test_measuring_goes_on_from_what_is_saved(tmp_path):
    """A second process that begins again, or loses the rows of the first."""
    assert gpu.measure(gpu.Fake(), tmp_path, 0.0) == 0  # no time: ceilings only, no case
    assert not (tmp_path / "bench.json").exists()
    device = gpu.Fake()
    first, *_ = device.cases()
    device.cases = lambda: [first]
    gpu.measure(device, tmp_path, 60.0)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    device.cases = lambda: gpu.Fake().cases()[:2]
    gpu.measure(device, tmp_path, 60.0)
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["rows"][: len(rows)] == rows and len(data["rows"]) == 2 * len(rows)


def test_predictions_stand_beside_what_was_measured():
    """A pass at the rate of another kernel, the passes of a step averaged as if they took the same
    time, rows that the model does not know."""
    table = (ROOT / "bench" / "results" / "machine_code.json").read_text()
    kernels = json.loads(table)["kernels"]
    forward = kernels["sm90_forward 128"]["share_2_norm"]
    backward = kernels["sm90_backward_fused 128"]["share_2_norm"]
    common = {"dtype": "bf16", "causal": True, "peer": "attn_ext-cuda", "bound": "compute",
              "tflops": 400.0, "share": 0.5}  # fmt: skip
    rows = [
        common | {"shape": "2,16(4),4096,128", "direction": "fwd"},
        common | {"shape": "2,16,4096/8192,128", "direction": "fwd+bwd"},
        common | {"shape": "2,16,4096,96", "direction": "fwd"},
        common | {"shape": "2,16,1/4096,128", "direction": "fwd"},
        common | {"shape": "2,16,4096,128", "direction": "fwd", "dtype": "fp32"},
        common | {"shape": "2,16,4096,128", "direction": "fwd", "peer": "torch-cudnn"},
        common | {"shape": "2,16,4096,128", "direction": "fwd", "share": None, "bound": None},
    ]
    model = importlib.import_module("predicted")
    found = list(model.predictions({"rows": rows}, "90"))
    both = 3.5 / (1 / forward + 2.5 / backward)
    assert [x["predicted"] for x in found] == pytest.approx([forward, both])
    assert [x["ratio"] for x in found] == pytest.approx([0.5 / forward, 0.5 / both])
    older = next(model.predictions({"rows": rows}, "120"))
    assert older["predicted"] == kernels["sm80_forward 128"]["share_2_norm"]
    assert "| 2,16(4),4096,128 bf16 causal fwd | attn_ext-cuda | 400.0 |" in model.table(found)


def test_the_real_device_plans_what_is_needed():
    """A misspelt peer or preset, seen on the GPU only."""
    from attn_ext.measure.peers import PEERS

    device = gpu.Device()
    cases = device.cases()
    assert {peer for _, peers in cases for peer in peers} <= set(PEERS)
    assert {case.direction for case, _ in cases} == {"fwd", "fwd+bwd"}
    assert any(case.seqlen_q == 1 for case, _ in cases) and all(
        c.device == "cuda" for c, _ in cases
    )
    assert "tests/cuda/test_cuda_kernels.py" in device.tests()
    assert "3.80" in device.tune(Path("x"), 240)


def test_no_gpu_is_one_line(tmp_path, capsys):
    """A traceback where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "torch sees no CUDA device here" in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "0"])
