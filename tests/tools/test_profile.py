"""attn_ext.profile and attn-ext profile: what a trace tells, on recorded and on made-up traces."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reports import MAYBE, NUMBER, Page, check

import attn_ext
from attn_ext.cli.main import main
from attn_ext.measure import report, trace
from attn_ext.ops import route

PROFILE = {
    "format": int, "machine": dict, "ceilings": (dict, None), "headline": str, "device": str,
    "wall_seconds": NUMBER, "busy_seconds": NUMBER, "steps": int, "skipped_steps": int,
    "speedup": NUMBER, "arithmetic": [str],
    "attention_seconds": NUMBER, "saves_seconds": NUMBER, "written_out": dict,
    "groups": [{"shape": str, "backend": str, "peer": str, "direction": str, "calls": int,
                "seconds": NUMBER, "note": str, "share_of_ceiling": MAYBE,
                "replayed_ms": MAYBE, "ours_ms": MAYBE,
                "saves_seconds": MAYBE, "mean_ms": NUMBER}],
}  # fmt: skip
SCRIPT = """
import sys, torch, torch.nn.functional as F
import attn_ext
assert __name__ == "__main__" and sys.argv[1:] == ["--steps", "2"], sys.argv
x = torch.randn(1, 4, 64, 16, requires_grad=True)
for _ in range(2):
    out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    (out + attn_ext.attention(x, x[:, :2], x[:, :2])).sum().backward()
print("the script's own output")
sys.exit(3)
"""


def test_a_block_is_recorded(tmp_path, capsys):
    """Calls that the fast path hides; a backend, mask or direction that is mistaken."""
    q = torch.randn(2, 4, 40, 16, requires_grad=True)
    k = torch.randn(2, 2, 40, 16)
    with attn_ext.profile(tmp_path / "p", replay=False) as p:
        for _ in range(3):
            attn_ext.attention(q, k, k, causal=True).sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(q, q, q)
            for _ in range(2):
                attn_ext.attention(q, k, k)
        torch.softmax(torch.randn(2, 64, 64), -1)
    assert not route.through_dispatcher
    found = {(g.shape, g.backend, g.direction): g for g in p.result.groups}
    assert {key: g.calls for key, g in found.items()} == {
        ("2,4(2),40,16 fp32 causal", "attn_ext", "fwd"): 3,
        ("2,4(2),40,16 fp32 causal", "attn_ext", "bwd"): 3,
        ("2,4(2),40,16 fp32 full", "attn_ext", "fwd"): 2,
        ("2,4,40,16 fp32 full", "torch flash (CPU)", "fwd"): 1,
    }
    assert 0 < p.result.attention <= p.result.busy <= p.result.wall
    assert list(p.result.written_out) == ["2x64x64"]
    assert all(0 < g.share_of_ceiling < 2 for g in p.result.groups)
    data = json.loads((tmp_path / "p" / "profile.json").read_text())
    check(data, PROFILE)
    assert json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    page = Page((tmp_path / "p" / "profile.html").read_text())
    assert page.open == [] and "svg" in page.tags and "2,4(2),40,16 fp32 causal" in page.text
    assert capsys.readouterr().out.startswith("attention is ")


def test_an_error_in_the_block_is_the_users(tmp_path):
    """A profile that swallows exceptions, or leaves the fast path off."""
    with pytest.raises(ZeroDivisionError), attn_ext.profile(quiet=True):
        _ = 1 / 0
    assert not route.through_dispatcher


def test_a_script_is_profiled(capfd, tmp_path):
    """sys.argv, __main__ and the exit code are the script's own; replays tell what would be
    saved."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    code = main(["profile", "--out", str(out), "--json", "--", "python", str(script),
                          "--steps", "2"])  # fmt: skip
    captured = capfd.readouterr()
    data = json.loads(captured.out)
    check(data, PROFILE)
    assert code == 3 and "the script's own output" in captured.err
    groups = {(g["backend"], g["direction"]): g for g in data["groups"]}
    assert len(groups) == 4 and all(g["calls"] == 2 for g in groups.values())
    replayed = groups["torch flash (CPU)", "fwd"]
    assert replayed["replayed_ms"] > 0 and replayed["ours_ms"] > 0
    assert groups["attn_ext", "bwd"]["note"] == "is attn_ext already"
    assert (out / "trace.json").exists() and "attention is" in (out / "profile.html").read_text()


def test_options_after_the_script_are_the_scripts(capfd, tmp_path):
    """A forgotten -- that gives the script's own --out to attn-ext."""
    script = tmp_path / "s.py"
    script.write_text("import sys; print('got', sys.argv[1:])")
    code = main(
        ["profile", "--out", str(tmp_path / "o"), "python", str(script), "--out", "x", "--json"]
    )
    assert code == 0 and "got ['--out', 'x', '--json']" in capfd.readouterr().out


def test_a_script_that_fails_keeps_its_traceback(capfd, tmp_path):
    """An error of the script that looks like one of the profiler."""
    script = tmp_path / "bad.py"
    script.write_text("raise RuntimeError('mine')")
    code = main(["profile", "--out", str(tmp_path / "o"), "--", "python", str(script)])
    captured = capfd.readouterr()
    assert code == 1 and "RuntimeError: mine" in captured.err
    assert "no call of an attention operator" in captured.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "got no command"),
        (["--", "ls", "-l"], "got 'ls'"),
        (["--", "python", "none.py"], "there is no file 'none.py'"),
        (["--", "python", "-u", "-m"], "got no script"),
        (["--", "python9.99", "x.py"], "there is no 'python9.99'"),
    ],
)
def test_bad_commands_are_one_line(argv, message, capsys, tmp_path):
    """A shell command that is run and not recorded."""
    code = main(["profile", "--out", str(tmp_path), *argv])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


def event(name, ts, dur, identity, cat="cpu_op", tid=1, **args):
    """One complete event of a trace, times in microseconds"""
    args["External id"] = identity
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def gpu_trace():
    """Two calls of flash attention whose kernels run later than the operators that launch them"""
    qkv = {"Input Dims": [[1, 8, 512, 64]] * 3, "Input type": ["c10::BFloat16"] * 3,
           "Concrete Inputs": ["", "", "", "0.", "True", "False", ""]}  # fmt: skip
    name = "aten::_scaled_dot_product_flash_attention"
    return [
        event(name, 0, 50, 1, **qkv),
        event("aten::_flash_attention_forward", 10, 30, 2, **qkv),
        event("aten::mm", 60, 10, 3),
        event(name, 100, 50, 4, **qkv),
        event("aten::_flash_attention_forward", 110, 30, 5, **qkv),
        event("aten::mm", 20, 10, 6, tid=2),  # another thread, at the same time
        event("flash_fwd_kernel", 200, 1000, 2, "kernel"),
        event("gemm", 1200, 500, 3, "kernel"),
        event("flash_fwd_kernel", 1700, 1100, 5, "kernel"),
        event("gemm", 2800, 400, 6, "kernel"),
    ]


def test_gpu_time_is_that_of_the_kernels():
    """Launch times taken for kernel times; kernels of other threads counted as attention."""
    result = trace.analyze(gpu_trace(), 0.004)
    (group,) = result.groups
    assert (group.shape, group.backend, group.calls) == ("1,8,512,64 bf16 causal", "torch flash", 2)
    assert group.seconds == pytest.approx(2100e-6) and result.busy == pytest.approx(3000e-6)
    assert group.case.device == "cuda" and group.peer == "torch-flash"
    assert "(52%), 70% of GPU time" in report.headline(result)


def test_savings_are_those_of_the_replay(monkeypatch):
    """A saving computed from the recording's own noise, or a loss sold as a gain."""
    result = trace.analyze(gpu_trace(), 0.004)
    (group,) = result.groups
    group.replayed_ms, group.ours_ms = 1.0, 0.5
    group.saves_seconds = group.seconds * 0.5
    assert report.saving(result) == pytest.approx(1050e-6)
    assert "would save 0.00105 s (the whole 1.36x as fast)" in report.headline(result)
    group.saves_seconds = -0.1
    assert report.saving(result) == 0.0 and "save" not in report.headline(result)


def test_the_math_path_has_a_backward(tmp_path):
    """Half of the time of training with dropout on a CPU that is nowhere in the report, or counted
    with what another operator's backward took; a replay without dropout."""
    x = torch.randn(2, 4, 64, 16, requires_grad=True)
    with attn_ext.profile(tmp_path, quiet=True) as p:
        for _ in range(2):
            out = F.scaled_dot_product_attention(x, x, x, dropout_p=0.25, is_causal=True)
            (out @ torch.randn(16, 512)).sin().sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)
    found = {(g.shape, g.direction): g for g in p.result.groups}
    causal = "2,4,64,16 fp32 causal dropout 0.25"
    assert {key: g.calls for key, g in found.items()} == {
        (causal, "fwd"): 2, (causal, "bwd"): 2, ("2,4,64,16 fp32 full dropout 0.25", "fwd"): 1,
    }  # fmt: skip
    assert all(g.backend == "torch math" and g.replayed_ms and g.ours_ms for g in found.values())
    events = trace.load(tmp_path / "trace.json")
    nodes = [e for e in events if e["name"].startswith(trace.NODE) and "MmBackward" in e["name"]]
    assert nodes, "the product behind attention"
    backward = sum(e["dur"] for e in events if e["name"].startswith(trace.NODE)) / 1e6
    others = sum(e["dur"] for e in nodes) / 1e6
    assert 0 < found[causal, "bwd"].seconds <= backward - others


def training(loop: dict) -> list[dict]:
    """A trace of a training loop: imports, a first step that compiles, then steps of `other` ms
    beside attention, in microseconds."""
    events, at = [event("aten::empty", 0, 10, 0)], 5_000_000.0
    sizes = {"Input Dims": [[2, 4, 512, 32]] * 3, "Input type": [loop["dtype"]] * 3}
    for step in range(6):
        began = at
        if step == 0:
            events.append(event("aten::mm", at, 9e6, 1))  # as long as all others
            at += 9e6
        forward = {**sizes, "Concrete Inputs": [""] * 3 + loop["inputs"]}
        if loop["math"]:
            inner = {"Sequence number": 10 + step, "Fwd thread id": 0}
            node = {"Sequence number": 10 + step, "Fwd thread id": 1}
            name = "aten::_scaled_dot_product_attention_math"
            events.append(event(name, at, loop["fwd"], 2, **forward, **inner))
            events.append(event("aten::matmul", at + 1, loop["fwd"] - 2, 3, **inner))
            at += loop["fwd"]
            events.append(event(trace.NODE + "MulBackward0", at, loop["bwd"], 4, **node))
        else:
            name = "aten::_scaled_dot_product_flash_attention_for_cpu"
            events.append(event(name, at, loop["fwd"], 2, **forward))
            at += loop["fwd"]
            backward = {"Input Dims": [[]] + sizes["Input Dims"],
                        "Input type": [""] + sizes["Input type"],
                        "Concrete Inputs": [""] * 4 + ["", "", "0.", "True"]}  # fmt: skip
            events.append(event(f"{name}_backward", at, loop["bwd"], 4, **backward))
        at += loop["bwd"]
        events.append(event("aten::addmm", at, loop["other"], 5))
        at += loop["other"]
        name = "Optimizer.step#AdamW.step"
        events.append(event(name, at - 1, 1, 6, cat="user_annotation"))
        if loop["compiled"]:
            events.append(event("Torch-Compiled Region: 0/0", began, 10, 7, cat="user_annotation"))
    return [*events, event("aten::save", at + 1e6, 8e6, 8)]


LOOPS = {
    "dropout": dict(math=True, compiled=False, dtype="float", fwd=9000.0, bwd=12000.0, ours=4000.0,
                    other=15000.0, inputs=["", "0.1", "True"]),
    "without": dict(math=False, compiled=False, dtype="float", fwd=3000.0, bwd=7000.0, ours=5000.0,
                    other=15000.0, inputs=["0.", "True"]),
    "bf16": dict(math=False, compiled=False, dtype="c10::BFloat16", fwd=5000.0, bwd=9000.0,
                 ours=9000.0, other=40000.0, inputs=["0.", "True"]),
    "compiled": dict(math=False, compiled=True, dtype="float", fwd=3000.0, bwd=7000.0, ours=5000.0,
                     other=8000.0, inputs=["0.", "True"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_the_prediction_is_what_is_gained(name):
    """A gain diluted by imports, compilation and what follows the last step, or without the
    backward of the math path: the report's arithmetic on loops whose gain is known."""
    loop = LOOPS[name]
    result = trace.analyze(training(loop))
    assert (result.steps, result.skipped, result.compiled) == (5, 1, loop["compiled"])
    whole = loop["fwd"] + loop["bwd"] + loop["other"]
    assert result.wall == pytest.approx(5 * whole / 1e6)
    for group in result.groups:
        assert group.calls == 5 and group.case.dropout == (0.1 if loop["math"] else 0.0)
        theirs = loop[group.direction]
        group.replayed_ms = theirs / 1200  # a replay finds its memory warm
        group.ours_ms = group.replayed_ms * loop["ours"] / (loop["fwd"] + loop["bwd"])
        group.saves_seconds = group.seconds * (1 - group.ours_ms / group.replayed_ms)
    gain = whole / (loop["ours"] + loop["other"])
    assert report.speedup(result) == pytest.approx(gain)
    *_, last = report.arithmetic(result)
    assert last.endswith(f"= {gain:.2f}") and last.startswith(f"{result.wall:.4g} s - ")
    assert "in 5 steps after 1 of warm-up" in report.headline(result)


def test_steps_that_are_left_out():
    """More or fewer steps than were asked for; more than there are."""
    events = training(LOOPS["without"])
    for skip, wall in ((0, 5_000_000 + 9e6 + 6 * 25_000), (2, 4 * 25_000)):
        result = trace.analyze(events, None, skip)
        assert (result.steps, result.skipped) == (6 - skip, skip)
        assert result.wall == pytest.approx(wall / 1e6)
    with pytest.raises(ValueError, match=r"skip_steps must be less than the 6 steps .* got 6"):
        trace.analyze(events, None, 6)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        attn_ext.profile(skip_steps=-1)


def test_attention_that_compiled_code_hides():
    """Silence about dropout in compiled code, whose attention has no operator of its own."""
    events = [event("aten::addmm", 0, 10, 1),
              event("Torch-Compiled Region: 0/0", 0, 10, 2, cat="user_annotation")]  # fmt: skip
    assert "in code of torch.compile, which writes some" in report.headline(trace.analyze(events))


def test_options_of_the_command(capfd, tmp_path):
    """--skip-steps that is not passed on; a page with a header row of nothing."""
    script = tmp_path / "s.py"
    script.write_text(
        "import torch, torch.nn.functional as F\n"
        "w = torch.nn.Parameter(torch.randn(1, 2, 512, 16))\n"
        "opt = torch.optim.SGD([w], 0.1)\n"
        "for _ in range(4):\n"
        "    F.scaled_dot_product_attention(w, w, w, dropout_p=0.1).sum().backward(); opt.step()\n"
    )
    out = tmp_path / "o"
    assert main(["profile", "--out", str(out), "--skip-steps", "3", "--", str(script)]) == 0
    assert "in 1 steps after 3 of warm-up" in capfd.readouterr().out
    page = (out / "profile.html").read_text()
    assert "<th></th>" not in page and "How the saving is computed" in page
    assert main(["profile", "--out", str(out), "--skip-steps", "-1", "--", str(script)]) == 2
    assert "--skip-steps must be at least 0, got -1" in capfd.readouterr().err


def test_more_steps_to_skip_than_there_are(monkeypatch, capfd, tmp_path):
    """A traceback in place of the rule."""

    def recorded(line, stdout):
        (tmp_path / "run.json").write_text("{}")
        (tmp_path / "trace.json").write_text('{"traceEvents": []}')
        return SimpleNamespace(wait=lambda: 0, returncode=0)

    monkeypatch.setattr(subprocess, "Popen", recorded)
    assert main(["profile", "--out", str(tmp_path), "--skip-steps", "4", "--", "python", "-c",
                 "1"]) == 2  # fmt: skip
    assert "--skip-steps must be less than the 0 steps" in capfd.readouterr().err
