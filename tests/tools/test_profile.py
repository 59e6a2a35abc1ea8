"""attn_ext.profile and attn-ext profile: what a trace tells, on recorded and on made-up traces."""

import json

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
    "wall_seconds": NUMBER, "busy_seconds": NUMBER,
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
