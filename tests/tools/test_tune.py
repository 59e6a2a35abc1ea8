"""`attn-ext tune`, its table, and what "auto", "fastest" and `prefer` make of it."""

import contextlib
import dataclasses
import json
import types

import pytest
import torch
from closeness import BFLOAT16_LAYERS, FLOAT32, assert_close

import attn_ext
from attn_ext.backends import cpu, registry, tuned
from attn_ext.cli import main, verify
from attn_ext.core.problem import Problem
from attn_ext.functional import explain
from attn_ext.measure import tuning
from attn_ext.measure.cases import make
from attn_ext.measure.peers import Peer, bind_backend

ISAS = registry.get("cpu").available() == "" and cpu._C.supported_isas()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; what was chosen by a table is forgotten before and after."""
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(tmp_path))
    tuning.choose_again()
    yield tmp_path
    tuning.choose_again()


def row(seconds: dict, **changes) -> tuned.Row:
    """A row of float32 forwards of 4 heads, 96 x 96, D = 32."""
    sizes = dict(dtype="float32", grad=False, causal=False, heads=4, seqlen_q=96, seqlen_k=96,
                 head_dim=32)  # fmt: skip
    return tuned.Row(**(sizes | changes), seconds=seconds)


def keep(*rows: tuned.Row) -> None:
    """Write a table of this machine's CPU."""
    tuning.save("cpu", tuned.Table(tuple(rows), date="2026-01-01", complete=True))


def qkv(seqlen: int = 96, heads: int = 4, dtype=torch.float32, grad: bool = False):
    draw = torch.Generator("cpu").manual_seed(1)
    shape = (1, heads, seqlen, 32)
    x = [torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu") for _ in range(3)]
    return [t.to(dtype).requires_grad_(grad) for t in x]


@pytest.mark.skipif(len(ISAS or ()) < 2, reason="this CPU has one instruction set alone")
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_the_fastest_instruction_set_serves(cache, grad):
    """A table that is written and never read, or kernels that are not those of its row: bits of
    the results are those of the instruction set that was measured to be the fastest."""

    def results():
        tuning.choose_again()
        inputs = qkv(grad=grad)
        out = attn_ext.attention(*inputs)
        return [out, *torch.autograd.grad(out.sum(), inputs)] if grad else [out]

    def of(isa):
        cpu._C.set_isa(isa)
        try:
            return results()
        finally:
            cpu._C.set_isa("")

    slow, fast = of(ISAS[0]), of("")
    assert not all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))
    keep(row({f"cpu:{ISAS[0]}": 1e-3, f"cpu:{cpu._C.isa()}": 2e-3}, grad=grad))
    chosen = results()
    assert all(torch.equal(a, b) for a, b in zip(chosen, slow, strict=True))
    cpu._C.set_isa(ISAS[-1] if ISAS[-1] != cpu.AMX else ISAS[-2])  # whoever names one gets it
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(), fast, strict=True))
    finally:
        cpu._C.set_isa("")


def changed(**fields):
    def change(text: str) -> str:
        return json.dumps(json.loads(text) | fields)

    return change


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda text: text[: len(text) // 2], "is no JSON"),
        (lambda text: "[1, 2]", "is of another format"),
        (changed(format=99), "is of another format"),
        (changed(device="another CPU"), "was measured on another CPU"),
        (changed(versions={"attn_ext": "0.0.1"}), "was measured with attn_ext 0.0.1"),
        (changed(versions=None), "was measured with attn_ext None"),
        (changed(versions=[7]), "was measured with attn_ext None"),
        (lambda text: "[" * 100_000, "is no JSON"),
        (changed(kernels="0"), "was measured with other kernels"),
        (changed(rows=[{"dtype": "float32"}]), "has a bad row"),
        (changed(rows=[row({"cpu:avx2": -1.0})._asdict()]), "has a bad row"),
        (changed(rows=[row({"cpu:avx2": "fast"})._asdict()]), "has a bad row"),
        (changed(rows=[row({}, seqlen_q=0)._asdict()]), "has a bad row"),
        (changed(rows=[row({}, dtype="Tensor")._asdict()]), "has a bad row"),
        (changed(rows=7), "has a bad row"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_hold_here_is_ignored(cache, change, why):
    """A crash at the first call, or kernels chosen by what another machine, version or a broken
    file says; and a file that is left aside without a word."""
    keep(row({"torch": 1e-3, "cpu:avx2": 2e-3}))
    path = tuned.path("cpu")
    path.write_text(change(path.read_text()))
    tuning.choose_again()
    with pytest.warns(RuntimeWarning, match=why):
        out = attn_ext.attention(*qkv(), backend="fastest")
    assert_close(out, attn_ext.attention(*qkv(), backend="reference"), FLOAT32)
    assert why in tuned.state("cpu")
    assert attn_ext.explain(*qkv(), backend="fastest").chosen == "cpu"


def test_fastest_takes_torch_where_it_was_measured_to_be(cache):
    """Calls that are left to torch without a measurement, for "auto", with a feature that torch
    has no fast kernel for, or of another class; and a report that hides it."""
    quick = {"torch": 1e-3, "cpu:avx2": 2e-3}
    assert attn_ext.explain(*qkv(), backend="fastest").chosen == "cpu"  # no table
    keep(row(quick), row({"torch": 2e-3, "cpu:avx2": 1e-3}, seqlen_q=1024, seqlen_k=1024))
    found = attn_ext.explain(*qkv(), backend="fastest")
    assert found.chosen == "torch" and "torch 1 ms, cpu:avx2 2 ms" in str(found)
    assert attn_ext.explain(*qkv()).chosen == "cpu"
    assert attn_ext.explain(*qkv(900), backend="fastest").chosen == "cpu"
    mask = torch.ones(96, 96, dtype=torch.bool)
    for features in (dict(mask=mask), dict(window=(3, 3)), dict(causal=True), dict(softcap=2.0)):
        assert attn_ext.explain(*qkv(), **features, backend="fastest").chosen == "cpu"
    assert attn_ext.explain(*qkv(grad=True), backend="fastest").chosen == "cpu"  # not measured


@pytest.mark.parametrize("prefer, served", [("fastest", "torch"), ("attn_ext", "cpu")])
def test_prefer_in_replace_sdpa_and_modules(cache, prefer, served):
    """A replaced call or a converted module that is slower than what it replaced, although a table
    says so; `prefer="attn_ext"` that is not kept."""
    from attn_ext import nn
    from attn_ext.integrations import transformers
    from attn_ext.integrations.sdpa import report, reset

    keep(row({"torch": 1e-3, "cpu:avx2": 2e-3}), row({"torch": 1e-3, "cpu:avx2": 2e-3}, grad=True))
    inputs = qkv(grad=True)
    reset()
    with attn_ext.replace_sdpa(prefer=prefer, strict=True):
        out = torch.nn.functional.scaled_dot_product_attention(*inputs)
        grads = torch.autograd.grad(out.square().sum(), inputs)
    assert report().served == {served: 1} and not report().torch
    own = attn_ext.attention(*inputs, backend="reference")
    assert_close(out, own, FLOAT32)
    for got, right in zip(grads, torch.autograd.grad(own.square().sum(), inputs), strict=True):
        assert_close(got, right, FLOAT32)
    model = nn.convert(torch.nn.MultiheadAttention(128, 4, batch_first=True), prefer=prefer)
    x = torch.ones(1, 96, 128)
    with counted(served) as calls:
        model(x, x, x, need_weights=False)
    assert calls == [served]
    nn.revert(model)
    assert "prefer" not in vars(model)
    layer = types.SimpleNamespace(is_causal=False, training=True)
    tuning.choose_again()  # the plan of the same call above would go around `forward`
    with counted(served) as calls:
        transformers.attention_forward(layer, *inputs, None, prefer=prefer)
    assert calls == [served]


@contextlib.contextmanager
def counted(name: str):
    """The calls of a backend's forward."""
    module, calls = registry.get(name), []
    forward = module.forward

    def counting(call):
        calls.append(name)
        return forward(call)

    module.forward = counting
    try:
        yield calls
    finally:
        module.forward = forward


@pytest.mark.parametrize("value, error", [("speed", ValueError), (True, TypeError)])
def test_prefer_is_checked(value, error):
    """A misspelt preference that is taken for the default."""
    from attn_ext import nn
    from attn_ext.integrations import transformers

    with pytest.raises(error, match="prefer must be"):
        attn_ext.replace_sdpa(prefer=value)
    with pytest.raises(error, match="prefer must be"):
        nn.convert(torch.nn.MultiheadAttention(8, 2), prefer=value)
    with pytest.raises(error, match="prefer must be"):
        transformers.attention_forward(types.SimpleNamespace(), *qkv(), None, prefer=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_torch_as_a_backend(dtype, causal):
    """O, LSE or gradients, that of LSE among them, that differ from attn_ext's own."""
    results = []
    for backend in ("torch", "reference"):
        inputs = qkv(70, dtype=dtype, grad=True)
        out, lse = attn_ext.attention(*inputs, causal=causal, return_lse=True, backend=backend)
        total = out.square().sum() + lse.sin().sum()
        results.append((out, lse, *torch.autograd.grad(total, inputs)))
    near = BFLOAT16_LAYERS if dtype == torch.bfloat16 else FLOAT32
    for got, right in zip(*results, strict=True):
        assert_close(got, right, near)


class Clock:
    """Runs each candidate and says what it took: one of them longer than the others."""

    device = "cpu"

    def __init__(self, slow: str = ""):
        self.slow = slow

    def turn(self, candidate, known):
        """One call, said to take 1 ms, or 3"""
        candidate.run()
        candidate.seconds.append(3e-3 if candidate.name == self.slow else 1e-3)


def planted(wrong: str = "") -> dict[str, Peer]:
    """Three engines that run the same kernels; one adds 1."""

    def engine(name):
        bind = bind_backend("cpu")

        def bound(case, q, k, v):
            found = bind(case, q, k, v)
            forward = found.forward

            def run():
                return forward() + (name == wrong)

            found.forward = run
            return found

        return Peer(name, bound)

    return {name: engine(name) for name in ("cpu:one", "cpu:two", "torch")}


def test_planted_engines(cache, monkeypatch):
    """A fast engine with wrong results that is in the table, a slow one that is the fastest, and
    a reason that nobody hears of."""
    monkeypatch.setattr(tuning, "cases", lambda device: [make("1,2,32,16")])
    monkeypatch.setattr(tuning, "engines", lambda device: planted("torch"))
    monkeypatch.setattr(tuning, "clock_for", lambda device: Clock("cpu:one"))
    heard = []
    table = tuning.run("cpu", 60, lambda *told: heard.append(told))
    (measured,) = table.rows
    assert set(measured.seconds) == {"cpu:one", "cpu:two"} and table.complete
    assert measured.seconds["cpu:one"] == 3 * measured.seconds["cpu:two"]
    ((done, total, found),) = heard
    assert (done, total) == (1, 1) and "wrong" in found.left_out["torch"]
    assert tuned.load("cpu") == (table, "")


def test_an_interrupted_run_goes_on(cache, monkeypatch):
    """Classes that are measured twice, or a run that begins anew after each interruption."""
    wanted = [make("1,2,32,16"), make("1,2,48,16"), make("1,2,32,16", "bf16")]
    monkeypatch.setattr(tuning, "cases", lambda device: wanted)
    monkeypatch.setattr(tuning, "engines", lambda device: planted())
    monkeypatch.setattr(tuning, "clock_for", lambda device: Clock())

    def stop(done, total, found):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning.run("cpu", 60, stop)
    assert len(tuned.load("cpu")[0].rows) == 1
    heard = []
    table = tuning.run("cpu", 60, lambda done, total, found: heard.append(done))
    assert heard == [2, 3] and table.complete
    assert not tuning.run("cpu", 60, stop).rows[3:]  # nothing is left to measure
    assert len(tuning.run("cpu", 0, stop, anew=True).rows) == 0


def test_every_class_and_engine_of_this_machine():
    """A class twice, or one whose row no call would find; an engine without a backend."""
    for device in ("cpu", "cuda:0"):
        cases = tuning.cases(device)
        assert len({(*c.shape, c.dtype, c.causal, c.direction) for c in cases}) == len(cases)
    for name in tuning.engines("cpu"):
        assert name == "torch" or name.removeprefix("cpu:") in ISAS


def test_the_command(cache, monkeypatch, capsys):
    """A command that measures and keeps nothing, and JSON that is no JSON."""
    monkeypatch.setattr(tuning, "cases", lambda device: [make("1,2,32,16")])
    monkeypatch.setattr(tuning, "clock_for", lambda device: Clock())
    monkeypatch.delenv("ATTN_EXT_ISA", raising=False)
    assert main.main(["tune", "--device", "cpu", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["complete"] and answer["file"] == str(tuned.path("cpu"))
    assert answer["rows"][0]["seconds"] and tuned.path("cpu").exists()
    assert main.main(["tune", "--device", "cpu"]) == 0
    assert "fastest in" in capsys.readouterr().out
    assert main.main(["doctor"]) == 0
    assert "1 classes of calls measured" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(cache, monkeypatch, capsys):
    """A traceback after minutes of measuring."""
    (cache / "file").write_text("")
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(cache / "file" / "folder"))
    monkeypatch.setattr(tuning, "cases", lambda device: [make("1,2,32,16")])
    monkeypatch.setattr(tuning, "clock_for", lambda device: Clock())
    tuned.forget()
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert main.main(["tune", "--device", "cpu"]) == 1
    assert "cannot be kept" in capsys.readouterr().out


class TestAmx:
    """AMX serves bfloat16 as soon as it has agreed with AVX-512 on the machine."""

    @pytest.fixture
    def machine(self, monkeypatch):
        """A CPU that says to have AMX; its kernels are those of another instruction set."""
        sets = [*cpu._C.supported_isas(), cpu.AMX]
        results = cpu._results
        fake = types.SimpleNamespace(supported_isas=lambda: sets, isa_forced=lambda: False)
        wrong = []

        def of(call, dout, isa):
            found = results(call, dout, "")
            for name in wrong if isa == cpu.AMX else ():
                found[("out", "dq", "dk", "dv").index(name)][0, 0, 140, 3] += 0.5
            return found

        native = cpu._C
        fake.Call = native.Call
        monkeypatch.setattr(cpu, "_C", fake)
        monkeypatch.setattr(cpu, "_results", of)
        cpu.amx_is_right.cache_clear()
        yield wrong
        cpu.amx_is_right.cache_clear()

    def test_it_serves_bfloat16_where_it_agrees(self, machine, cache):
        """Hardware that is left idle, or used for what it does not round as."""
        call = attn_ext.functional.dense.dense_call(*qkv(dtype=torch.bfloat16))
        assert cpu._isa(call) == cpu.AMX
        call = attn_ext.functional.dense.dense_call(*qkv())
        assert cpu._isa(call) == ""

    @pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
    def test_it_is_left_out_where_it_does_not(self, machine, cache, name):
        """Wrong results on the first machine that has AMX."""
        machine.append(name)
        call = attn_ext.functional.dense.dense_call(*qkv(dtype=torch.bfloat16))
        with pytest.warns(RuntimeWarning, match=f"{name} differs.*report"):
            assert cpu._isa(call) == ""


class TestHopper:
    """The kernels for Hopper serve once the GPU itself has verified them."""

    @pytest.fixture
    def gpu(self, cache, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100 of this test")
        yield
        tuned.device_name.cache_clear()

    def outcome(self, state, subject=tuned.HOPPER):
        return types.SimpleNamespace(subject=subject, state=state)

    @pytest.mark.parametrize(
        "states, serves", [(["pass", "n/a"], True), (["pass", "fail"], False), (["n/a"], False)]
    )
    def test_verify_remembers(self, gpu, states, serves):
        """Kernels that are on before they passed, or stay off after it."""
        assert not tuned.hopper(0)
        said = []
        verify.remember([self.outcome(s) for s in states],
                        types.SimpleNamespace(print=said.append))  # fmt: skip
        assert tuned.hopper(0) is serves and len(said) == 1
        verify.remember([self.outcome("pass", "cuda")], types.SimpleNamespace(print=said.append))
        assert tuned.hopper(0) is serves and len(said) == 1

    @pytest.mark.parametrize("state", ["pass", "fail", "n/a"])
    def test_second_derivatives_of_triton(self, gpu, state):
        """Kernels that no GPU has run, and that serve one which has not verified them."""
        call = attn_ext.functional.dense.dense_call(*qkv(dtype=torch.bfloat16))
        problem = dataclasses.replace(Problem.of(call), device="cuda")
        assert registry.second("triton", problem) == registry.second("cuda", problem) == "blocked"
        (why,) = registry.second_reasons("triton", problem)
        assert "`attn-ext verify` has not passed" in why
        assert why in explain.of(problem, "triton").second
        told = [self.outcome(state, tuned.SECOND), self.outcome("pass")]
        verify.remember(told, types.SimpleNamespace(print=lambda text: None))
        expected = "triton_second" if state == "pass" else "blocked"
        assert registry.second("triton", problem) == expected
        assert registry.second("cuda", problem) == expected

    @pytest.mark.parametrize("own, serves", [(1e-3, True), (3e-3, False)])
    def test_they_stay_off_where_they_were_measured_slower(self, gpu, own, serves):
        """A verified kernel that slows calls down."""
        rows = (row({tuned.HOPPER: own, "cuda": 2e-3}),)
        tuning.save("cuda", tuned.Table(rows, verified=(tuned.HOPPER,), date="2026-01-01"))
        assert tuned.hopper(0) is serves
