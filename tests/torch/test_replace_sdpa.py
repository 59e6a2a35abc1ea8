"""replace_sdpa changes who computes, never what: torch's own attention in float64 is the truth.

Both sides run in float64, so that a difference is one of meaning and not of rounding.
"""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from closeness import BFLOAT16, DROPOUT_MEAN, assert_close, assert_same
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

import attn_ext
from attn_ext.integrations import sdpa


@pytest.fixture(autouse=True)
def counts_from_zero():
    """Each test sees its own calls and warnings; nothing stays switched on."""
    sdpa.reset()
    yield
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert torch._C._len_torch_function_stack() == 0


def tensors(*shapes, dtype=torch.float64, grad=True):
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in shapes]


def outcome(inputs, weight_seed=0, **options):
    """[out, gradients...] of F.scaled_dot_product_attention on copies of `inputs`."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    mask = leaves[3] if len(leaves) > 3 else None
    out = F.scaled_dot_product_attention(*leaves[:3], attn_mask=mask, **options)
    if not out.requires_grad:
        return [out]
    generator = torch.Generator().manual_seed(weight_seed)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    wanted = [x for x in leaves if x.requires_grad]
    return [out, *torch.autograd.grad((out * weight).sum(), wanted)]


SHAPE = ((2, 4, 9, 16), (2, 4, 13, 16), (2, 4, 13, 8))
CASES = {
    "plain": (SHAPE, None, {}),
    "causal_not_square": (SHAPE, None, dict(is_causal=True)),
    "scale": (SHAPE, None, dict(scale=0.3)),
    "bool_mask": (SHAPE, "bool", {}),
    "bool_mask_with_empty_rows": (SHAPE, "empty", {}),
    "float_mask_with_gradient": (SHAPE, "float", {}),
    "gqa": (((2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)), None, dict(enable_gqa=True)),
    "3d": (((3, 9, 8), (3, 5, 8), (3, 5, 8)), "bool", {}),
    "2d": (((9, 8), (5, 8), (5, 8)), None, {}),
    "5d": (((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)), None, dict(is_causal=True)),
    "no_keys": (((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 6)), None, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_same_values_and_gradients_as_torch(name):
    """A wrong alignment, polarity, fold or lost gradient on the way through the mode."""
    shapes, kind, options = CASES[name]
    inputs = tensors(*shapes)
    rows, keys = shapes[0][-2], shapes[1][-2]
    if kind == "float":
        inputs.append(torch.randn(4, rows, keys, dtype=torch.float64).requires_grad_())
    elif kind is not None:
        mask = torch.rand(rows, keys) < 0.6
        mask[1] = kind != "empty"
        inputs.append(mask)
    theirs = outcome(inputs, **options)
    with attn_ext.replace_sdpa(strict=True):
        ours = outcome(inputs, **options)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert sdpa.report() == ({"cpu": 1}, {}, {})


def test_expanded_keys_under_autocast():
    """Zero strides, and autocast's dtype on the result."""
    q = torch.randn(2, 4, 9, 16)
    k = torch.randn(1, 1, 9, 16).expand(2, 4, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = F.scaled_dot_product_attention(q, k, k)
        with attn_ext.replace_sdpa(strict=True):
            ours = F.scaled_dot_product_attention(q, k, k)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert_close(ours, theirs, BFLOAT16)


def test_dropout_has_its_mean_and_repeats_with_the_seed():
    """A dropout_p that is lost or applied twice: the mean over many heads is the output without."""
    q, k, v = (torch.randn(1, 512, 4, 8) for _ in range(3))
    plain = F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1])
    with attn_ext.replace_sdpa(strict=True):
        same = [x[:, :1].expand(1, 4000, 4, 8) for x in (q, k, v)]
        torch.manual_seed(3)
        first = F.scaled_dot_product_attention(*same, dropout_p=0.5)
        torch.manual_seed(3)
        second = F.scaled_dot_product_attention(*same, dropout_p=0.5)
    assert torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])
    assert_close(first.mean(1, keepdim=True), plain, DROPOUT_MEAN)


def test_a_name_imported_earlier_is_replaced_too():
    """A replacement that overwrites F would miss it."""
    q, k, v = tensors(*SHAPE)
    with attn_ext.replace_sdpa():
        imported_by_name(q, k, v)
    assert sdpa.report().served == {"cpu": 1}


def test_decorator_and_nesting():
    """The innermost settings hold, and leaving one restores the other."""

    @attn_ext.replace_sdpa(backend="reference")
    def inner():
        return F.scaled_dot_product_attention(*tensors(*SHAPE))

    with attn_ext.replace_sdpa():
        inner()
        F.scaled_dot_product_attention(*tensors(*SHAPE))
    inner()
    assert sdpa.report().served == {"reference": 2, "cpu": 1}


def test_other_threads_are_untouched_by_the_scoped_form():
    """A scoped replacement that leaks into another thread."""
    q, k, v = tensors(*SHAPE)
    with attn_ext.replace_sdpa():
        run_in_thread(lambda: F.scaled_dot_product_attention(q, k, v))
    assert sdpa.report().served == {}


def run_in_thread(function):
    """Result of `function` in another thread, or its exception."""
    box = []

    def run():
        try:
            box.append(function())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def test_the_switch_reaches_every_thread_and_comes_off():
    """A switch that is thread-local, is lost under a mode entered later, or survives undo()."""
    q, k, v = tensors(*SHAPE)
    switch = attn_ext.replace_sdpa().enable()
    try:
        run_in_thread(lambda: F.scaled_dot_product_attention(q, k, v))
        F.scaled_dot_product_attention(q, k, v)
        imported_by_name(q, k, v)
        assert sdpa.report().served == {"cpu": 3}
        assert not torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(RuntimeError, match="on already"):
            switch.enable()
        with torch.device("cpu"):  # a mode above the switch
            switch.undo()
            with pytest.raises(RuntimeError, match="is not on"):
                switch.undo()
    finally:
        if switch._switch is not None:
            switch.undo()
    assert torch.backends.mha.get_fastpath_enabled()
    F.scaled_dot_product_attention(q, k, v)
    run_in_thread(lambda: F.scaled_dot_product_attention(q, k, v))
    assert sdpa.report().served == {"cpu": 3}


def test_many_threads_count_right():
    """A race in the counters or in a shared mode."""
    q, k, v = tensors(*SHAPE, grad=False)
    expected = F.scaled_dot_product_attention(q, k, v)
    shared = attn_ext.replace_sdpa(strict=True)
    errors = []

    def work():
        try:
            with shared:
                for _ in range(50):
                    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sdpa.report().served == {"cpu": 200}


def test_what_cannot_be_served_goes_to_torch_with_one_warning_or_raises():
    """A silent fallback, a warning a call, or a strict mode that is not."""
    q, k, v = (x.cfloat() for x in tensors(*SHAPE, grad=False))
    with attn_ext.replace_sdpa(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            with pytest.raises(RuntimeError):  # torch's own error
                F.scaled_dot_product_attention(q, k, v)
    assert len(seen) == 1 and "complex" in str(seen[0].message)
    (reason,) = sdpa.report().torch
    assert sdpa.report().torch[reason] == 3
    with attn_ext.replace_sdpa(strict=True), pytest.raises((TypeError, NotImplementedError)):
        F.scaled_dot_product_attention(q, k, v)


def test_forward_mode_and_double_backward_have_a_way():
    """Both are served, and left to torch under sdpa_kernel(MATH)."""
    q, k, v = tensors((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8))

    def f(x):
        return F.scaled_dot_product_attention(x, k, v)

    tangent = torch.randn_like(q)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(f, (q,), (tangent,))[1]
        with attn_ext.replace_sdpa(), pytest.warns(UserWarning, match="MATH"):
            assert torch.autograd.gradgradcheck(f, (q,))
    with attn_ext.replace_sdpa(strict=True):
        torch.testing.assert_close(torch.func.jvp(f, (q,), (tangent,))[1], expected)
        assert torch.autograd.gradgradcheck(f, (q.double(),), fast_mode=True)


def test_vmap_and_grad_transforms():
    """functorch transforms through the mode."""
    q, k, v = tensors((3, 2, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8), grad=False)

    def loss(q, k, v):
        return F.scaled_dot_product_attention(q, k, v).square().sum()

    expected = torch.vmap(torch.func.grad(loss))(q, k, v)
    with attn_ext.replace_sdpa(strict=True):
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q, k, v), expected)


INSIDE = pytest.param(
    True, id="mode_inside",
    marks=pytest.mark.skipif(
        torch.__version__ < (2, 7), reason="Dynamo of torch 2.6 loses its settings: migrate.md"
    ),
)  # fmt: skip


@pytest.mark.parametrize("inside", [pytest.param(False, id="mode_outside"), INSIDE])
def test_torch_compile(inside):
    """A graph break, or a compiled graph that keeps torch's attention."""
    torch._dynamo.reset()

    def f(q, k, v):
        return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True)

    def g(q, k, v):
        with attn_ext.replace_sdpa(strict=True):
            return f(q, k, v)

    inputs = tensors(*SHAPE)
    expected = outcome_of(f, inputs)
    targets = []

    def backend(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(g if inside else f, backend=backend, fullgraph=True)
    with attn_ext.replace_sdpa(strict=True):
        got = outcome_of(compiled, inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert any("attn_ext" in t for t in targets), targets
    assert not any("scaled_dot_product" in t for t in targets), targets
    assert sdpa.report().compiled == {"attn_ext": 1}
    if not inside:  # compiled again without the mode: torch's own
        targets.clear()
        outcome_of(compiled, inputs)
        assert any("scaled_dot_product" in t for t in targets), targets


def test_torch_compile_of_modules_with_attention():
    """A mode that torch.compile cannot follow into F.multi_head_attention_forward."""
    torch._dynamo.reset()
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    expected = module(x, x, x, need_weights=False)[0]
    compiled = torch.compile(module, backend="aot_eager")
    with attn_ext.replace_sdpa(strict=True):
        got = compiled(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(got, expected)
    assert sdpa.report().compiled == {"attn_ext": 1}


def test_torch_compile_under_the_switch():
    """A compiled graph in a thread without a mode that keeps torch's attention, or outlives the
    switch."""
    torch._dynamo.reset()

    def f(q):
        return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    expected = f(q)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    switch = attn_ext.replace_sdpa(strict=True).enable()
    try:
        torch.testing.assert_close(run_in_thread(lambda: compiled(q)), expected)
        torch.testing.assert_close(compiled(q), expected)
    finally:
        switch.undo()
    counted = sdpa.report().compiled["attn_ext"]
    assert counted >= 1
    torch.testing.assert_close(compiled(q), expected)
    assert sdpa.report().compiled["attn_ext"] == counted


def test_the_first_compilation_of_a_process_under_the_switch():
    """torch.compile that takes the stand-in for torch's function, for good: after undo() a scoped
    replacement would no longer be seen."""
    code = """if True:
        import torch, attn_ext
        import torch.nn.functional as F
        from attn_ext.integrations import sdpa
        q = torch.randn(1, 2, 5, 8)
        compiled = torch.compile(
            lambda q: F.scaled_dot_product_attention(q, q, q), backend="eager", fullgraph=True
        )
        switch = attn_ext.replace_sdpa(strict=True).enable()
        compiled(q)
        assert sdpa.report().compiled == {"attn_ext": 1}, sdpa.report()
        switch.undo()
        torch._dynamo.reset()
        with attn_ext.replace_sdpa(strict=True):
            compiled(q)
        assert sdpa.report().compiled == {"attn_ext": 2}, sdpa.report()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def outcome_of(function, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_multihead_attention_and_encoder_are_served_in_training_and_evaluation():
    """torch's fused encoder path goes around F.scaled_dot_product_attention, and
    F.multi_head_attention_forward hides it from a mode."""
    layer = torch.nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    model = torch.nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    for training in (True, False):
        model.train(training)
        with torch.inference_mode(not training):
            expected = model(x, src_key_padding_mask=padding)
            sdpa.reset()
            with attn_ext.replace_sdpa(strict=True):
                got = model(x, src_key_padding_mask=padding)
        keep = ~padding  # evaluation by nested tensors gives 0 at padded places
        torch.testing.assert_close(got[keep], expected[keep])
        assert sdpa.report().served == {"cpu": 2}, training


LENGTHS = ([3, 5, 1], [4, 2, 7])


def nested(lengths, heads, dim, dtype=torch.float64):
    parts = [torch.randn(n, heads, dim, dtype=dtype) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_jagged_nested_tensors(causal, cross):
    """Sequences that see one another, a lost gradient, or a result that is no nested tensor."""
    q = nested(LENGTHS[0], 4, 8)
    k = nested(LENGTHS[1 if cross else 0], 4, 8)
    v = torch.nested.nested_tensor_from_jagged(
        torch.randn(k.values().shape, dtype=torch.float64).requires_grad_(), k.offsets()
    )
    with attn_ext.replace_sdpa(strict=True):
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        )
    assert sdpa.report().served == {"cpu": 1}
    assert out.is_nested and out.shape == q.transpose(1, 2).shape
    called = attn_ext.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
    )
    assert_same(called.values(), out.values())
    grads = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), (q, k))
    rows = zip(*(x.detach().unbind() for x in (q, k, v)), strict=True)
    for i, parts in enumerate(rows):
        a, b, c = (x.transpose(0, 1).clone().requires_grad_() for x in parts)
        one = F.scaled_dot_product_attention(a, b, c, is_causal=causal)
        torch.testing.assert_close(out.unbind()[i], one)
        da, db = torch.autograd.grad(one.square().sum(), (a, b))
        torch.testing.assert_close(grads[0].unbind()[i], da.transpose(0, 1))
        torch.testing.assert_close(grads[1].unbind()[i], db.transpose(0, 1))


def test_a_compiled_module_on_jagged_tensors():
    """Views of one projection as nested queries, keys and values: torch's own math refuses them."""
    torch._dynamo.reset()
    project, mix = (torch.nn.Linear(16, n, dtype=torch.float64) for n in (48, 16))

    def module(x):
        heads = [
            y.reshape(x.size(0), x.size(1), 2, 8).transpose(1, 2) for y in project(x).chunk(3, -1)
        ]
        out = F.scaled_dot_product_attention(*heads)
        return mix(out.transpose(1, 2).reshape(x.size(0), x.size(1), 16))

    parts = [torch.randn(n, 16, dtype=torch.float64) for n in (3, 6)]
    expected = [module(part[None])[0] for part in parts]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with attn_ext.replace_sdpa(strict=True):
        for got in (module(x), compiled(x)):
            torch.testing.assert_close(got.values(), torch.cat(expected))
    assert sdpa.report() == ({"cpu": 1}, {}, {"attn_ext": 1})


def test_strided_nested_tensors_go_to_torch():
    """The old nested layout is torch's own."""
    parts = [torch.randn(2, n, 8) for n in (3, 5)]
    old = torch.nested.nested_tensor(parts)
    with attn_ext.replace_sdpa(), pytest.warns(UserWarning, match="jagged"):
        out = F.scaled_dot_product_attention(old, old, old)
    expected = F.scaled_dot_product_attention(parts[1], parts[1], parts[1])
    torch.testing.assert_close(out.unbind()[1], expected)


def test_jagged_tensors_of_another_shape_go_to_torch():
    """The ragged dimension taken for the heads'."""
    q = nested(LENGTHS[0], 4, 8)  # [B, ragged, H, D], not transposed
    theirs = F.scaled_dot_product_attention(q, q, q)
    with attn_ext.replace_sdpa(), pytest.warns(UserWarning, match="ragged"):
        ours = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(ours.values(), theirs.values())


def test_meta_tensors_are_torchs_and_no_matter_of_a_warning():
    """A model built on the meta device."""
    q = torch.empty(2, 4, 5, 8, device="meta")
    with attn_ext.replace_sdpa(strict=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape


def test_a_tensor_subclass_keeps_its_own_operations():
    """A kernel that reads the memory of a tensor which computes otherwise."""
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    q = torch.randn(1, 2, 4, 8).as_subclass(Logged)
    with attn_ext.replace_sdpa(), pytest.warns(UserWarning, match="subclass"):
        F.scaled_dot_product_attention(q, q, q)
    assert "scaled_dot_product_attention" in seen


@pytest.mark.parametrize("bad", [dict(strict=1), dict(backend="cudnn")])
def test_bad_settings(bad):
    """A misspelt backend that quietly means auto."""
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
        attn_ext.replace_sdpa(**bad)


def test_invalid_calls_get_torchs_own_error():
    """An error of another type than torch's, where a caller catches RuntimeError."""
    q, k, v = tensors((2, 2, 4, 8), (2, 2, 4, 6), (2, 2, 4, 8))
    with (
        attn_ext.replace_sdpa(),
        pytest.warns(UserWarning, match="key must have"),
        pytest.raises(RuntimeError),
    ):
        F.scaled_dot_product_attention(q, k, v)
