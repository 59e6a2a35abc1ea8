"""The measuring engine: wrong results are not timed, finished rows survive an interruption, files
hold what was measured.
"""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from attn_ext.core.schema import Needs
from attn_ext.measure import ceilings, plots, timing
from attn_ext.measure.cases import DTYPES, PRESETS, Case, make, parse_shape
from attn_ext.measure.checks import Reference, blockwise
from attn_ext.measure.engines import Bound
from attn_ext.measure.measure import measure_all, measure_case
from attn_ext.measure.peers import PEERS, Peer, chosen
from attn_ext.measure.results import Report, Row
from attn_ext.testing import random_call, to_float64

ROOT = Path(__file__).parents[2]
SMALL = make("1,4/2,70,16", "fp32", True, "fwd+bwd")
ROOFS = ceilings.Ceilings(fp32=100.0, half=200.0, read=20.0)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1,8,1024,64", (1, 8, 8, 1024, 1024, 64)),
        ("8,32/8,1/4096,128", (8, 32, 8, 1, 4096, 128)),
        ("8,32(8),1/4096,128", (8, 32, 8, 1, 4096, 128)),
    ],
)
def test_shapes_are_read_as_written(text, sizes):
    """Heads and lengths that change places; a printed shape that cannot be typed again."""
    assert parse_shape(text) == sizes
    assert parse_shape(make(text).shape) == sizes


@pytest.mark.parametrize(
    "text", ["", "1,8,64", "1,8,64,64,2", "1,-8,64,64", "1,8/3,64,64", "0,8,64,64", "1,8,x,64",
             "1/2,8,64,64", "1,8,64,99999999999", "1,8,6.5,64", "1,²,64,64"],
)  # fmt: skip
def test_bad_shapes_are_refused(text):
    """A shape that would fail deep inside torch, or allocate for ever."""
    with pytest.raises(ValueError, match=r"shape must .*got"):
        parse_shape(text)


def test_flops_and_bytes_of_a_case():
    """A factor of two in either: every share of the ceiling would be wrong by it."""
    full = make("2,8/2,100,64")
    assert full.flops == 4 * 2 * 8 * 100 * 100 * 64
    assert make("2,8/2,100,64", causal=True).flops == full.flops / 2
    assert make("2,8/2,100,64", direction="fwd+bwd").flops == 3.5 * full.flops
    assert make("1,1,2/4,8", causal=True).flops == 4 * (3 + 4) * 8
    assert full.bytes == 4 * 64 * 100 * 2 * (8 + 2 + 2 + 8)
    assert make("2,8/2,100,64", "bf16").bytes == full.bytes / 2


def test_every_preset_is_well_formed():
    """A misspelt shape in a table, seen only when a user asks for it."""
    for preset in PRESETS.values():
        for case in preset.cases():
            assert case.flops > 0 and case.dtype in DTYPES


def test_blockwise_truth_equals_the_reference(monkeypatch):
    """The truth of the benchmark itself, across a block's edge, causal, backward."""
    import attn_ext.backends.reference as reference
    from attn_ext.measure import checks

    monkeypatch.setattr(checks, "BLOCK_BYTES", 8 * 33 * 23)
    call = to_float64(random_call(batch=1, heads_q=1, seqlen_q=31, seqlen_k=33, causal=True))
    dout = torch.randn_like(call.q)
    case = Case(1, 1, 1, 31, 33, 16, "fp64", True, "fwd+bwd")
    got = blockwise(case, call.q[0], call.k[0, 0], call.v[0, 0], dout[0])
    out = reference.forward(call)[0]
    grads = reference.backward(call, dout, None, None, None, Needs(True, True, True))
    expected = (out[0], grads[0][0], grads[1][0, 0], grads[2][0, 0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def wrong(kind):
    """attn_ext with a planted error of some kind"""

    def bind(case, q, k, v):
        right = PEERS["attn_ext"].bind(case, q, k, v).forward

        def forward():
            out = right()
            if kind == "nan":
                return out * torch.where(torch.arange(out.shape[2]) == 5, math.nan, 1.0)[:, None]
            return out * 1.05 if kind == "scaled" else out.roll(1, 2)

        return Bound(forward)

    return Peer("a planted wrong peer", bind)


@pytest.mark.parametrize("kind", ["nan", "scaled", "shifted"])
def test_a_wrong_peer_is_reported_and_not_timed(kind, monkeypatch):
    """A fast wrong answer that wins the benchmark."""
    monkeypatch.setitem(PEERS, "planted", wrong(kind))
    rows, skipped = measure_case(
        SMALL, ["attn_ext", "planted"], timing.CpuClock(), ROOFS, 1, 0.01, memory=False
    )
    ours, planted = rows
    assert (ours.state, planted.state, skipped) == ("ok", "wrong", [])
    assert planted.median_ms is None and ours.median_ms > 0
    assert not planted.error <= planted.allowed


def test_a_wrong_gradient_is_seen():
    """A check of outputs only."""
    q, k, v, dout = SMALL.inputs()
    reference = Reference(SMALL, q, k, v, dout)
    for x in (q, k, v):
        x.requires_grad_()
    out = PEERS["attn_ext"].bind(SMALL, q, k, v).forward()
    grads = list(torch.autograd.grad(out, (q, k, v), dout))
    assert reference.check((out, *grads)).state == "ok"
    for i in range(3):
        spoilt = [g * 1.1 if i == j else g for j, g in enumerate(grads)]
        assert reference.check((out, *spoilt)).output == ("dq", "dk", "dv")[i]
        assert reference.check(spoilt).state == "wrong"


def test_the_peers_agree_on_a_grouped_causal_case():
    """A peer bound with a wrong layout or mask: it would be called wrong, or worse, timed."""
    for case in (make("1,4/2,70,16", "fp32", True), make("2,4,65,32", "bf16"), make("1,2,50,16")):
        rows, skipped = measure_case(case, chosen(None), timing.CpuClock(), None, 1, 0.01, False)
        assert {row.peer for row in rows} >= {"attn_ext", "naive", "torch", "torch-math"}
        assert {row.state for row in rows} <= {"ok", "inaccurate"}
        assert all(": " not in skip["reason"] for skip in skipped), skipped  # no exceptions


def test_an_unknown_peer_is_named():
    """A misspelt peer that is silently not measured."""
    with pytest.raises(ValueError, match="got 'toarch'"):
        chosen(["torch", "toarch"])
    assert chosen(["torch"]) == ["attn_ext", "torch"]


def test_interleaving_gives_every_candidate_the_same_turns():
    """One candidate measured while the machine was quiet, the other while it was not."""
    order = []
    candidates = [timing.Candidate(name, lambda n=name: order.append(n)) for name in "ab"]

    class Clock:
        def turn(self, candidate, known):
            candidate.run()
            candidate.seconds.append(0.001)

    timing.interleave(candidates, Clock(), turns=4, budget=10)
    assert order == list("abbaabbaab")
    assert [len(c.seconds) for c in candidates] == [4, 4]  # the first turn warms up


def interrupted_report(tmp_path):
    """A report of two cases, interrupted within the third"""
    report = Report("test", {"cpu": "a | b"}, ROOFS)
    report.save_to = [tmp_path / f"r.{kind}" for kind in ("json", "csv", "md")]
    cases = [make("1,2,16,8"), make("1,2,32,8", "bf16", True), make("1,2,64,8")]

    def on_case(case, rows, skipped):
        if case == cases[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_all(
            report, cases, ["attn_ext", "torch", "xformers"], timing.CpuClock(), on_case=on_case,
            turns=1, budget=0.01, memory=True,
        )  # fmt: skip
    return report


def test_an_interruption_leaves_finished_rows(tmp_path):
    """Ctrl-C after ten minutes, and nothing on disk."""
    interrupted_report(tmp_path)
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["complete"] is False and len(data["rows"]) == 4
    assert set(data["rows"][0]) == set(Row.__dataclass_fields__)
    assert data["rows"][0]["share"] > 0 and data["rows"][1]["ratio"] > 0
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[1].split('"')[1] == "1,2,16,8"
    text = (tmp_path / "r.md").read_text()
    assert "- xformers: " in text and "(2 cases)" in text
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("plot", [plots.bars, plots.roofline])
def test_figures_are_not_blank(plot, tmp_path):
    """An empty picture."""
    from matplotlib import image

    path = plot(interrupted_report(tmp_path), tmp_path / "p.png")
    pixels = image.imread(path)
    assert pixels.shape[0] > 200 and pixels[..., :3].std() > 0.02
    assert len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).round(2).tolist()}) > 5


def test_a_long_report_fits_a_page(tmp_path):
    """A picture of all rows that is 7,900 pixels tall, as it was."""
    from matplotlib import image

    report = Report.load(ROOT / "bench" / "results" / "cpu.json")
    assert len({row.case for row in report.rows}) > 60
    pixels = image.imread(plots.bars(report, tmp_path / "p.png"))
    assert 400 < pixels.shape[0] <= plots.MOST_PIXELS


def test_bench_cpu_runs_a_row(tmp_path, capsys):
    """The benchmark script itself, end to end on a small shape."""
    main = runpy.run_path(str(ROOT / "bench" / "cpu.py"))["main"]
    path = tmp_path / "cpu.json"
    assert main(["--shape", "1,2,64,16", "--peers", "torch", "--budget", "0.05", "--json",
                 str(path)]) == 0  # fmt: skip
    data = json.loads(path.read_text())
    assert data["complete"] and [row["peer"] for row in data["rows"]] == ["attn_ext", "torch"]
    assert data["ceilings"]["fp32"] > 0 and path.with_suffix(".png").stat().st_size > 5000
    assert "1,2,64,16 fp32 full fwd" in capsys.readouterr().out
    arguments = ["--peers", "torch", "--budget", "0.05", "--json", str(path), "--resume"]
    before = data["rows"]
    assert main(["--shape", "1,2,64,16", "--shape", "1,2,32,16", *arguments, "--seconds", "0"]) == 0
    assert "go on with --resume" in capsys.readouterr().out
    assert main(["--shape", "1,2,64,16", "--shape", "1,2,32,16", *arguments]) == 0
    data = json.loads(path.read_text())
    assert data["rows"][:2] == before and len(data["rows"]) == 4 and data["complete"]
    path.write_text('{"machine": {}, "rows": []}')
    with pytest.raises(SystemExit):
        main(["--shape", "1,2,64,16", *arguments])
    assert "is not a result file of format 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no row matches"):
        main(["--rows", "nonsense"])
