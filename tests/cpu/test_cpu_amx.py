"""The bfloat16 CPU kernels on Intel AMX's tile unit, against the float64 reference.

On a processor without AMX its instructions are emulated (amx_unit.py): the machine code that ships
runs, and after each test no instruction was misused and no thread holds tiles.
"""

import ctypes
import random
import re
import shutil
import subprocess

import amx_unit
import pytest
import torch
from kernel_cases import FEATURES, LEVELS, SHAPES, check_threads, random_features

from attn_ext import _C
from attn_ext.backends import cpu
from attn_ext.core.schema import Needs
from attn_ext.testing import check_call, random_call

pytestmark = pytest.mark.skipif(amx_unit.missing() != "", reason=amx_unit.missing() or "-")
NATIVE = amx_unit.ISA in _C.supported_isas()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the helpers are compiled."""
    return tmp_path_factory.mktemp("amx")


@pytest.fixture(scope="session")
def emulator(folder):
    """The emulator of the tile unit; None where the processor has one."""
    return None if NATIVE else amx_unit.Unit(folder)


@pytest.fixture(scope="session")
def helpers(folder):
    """csrc/tests/amx_products.cpp as a library."""
    library = ctypes.CDLL(
        str(
            amx_unit.compile_cpp(
                "csrc/tests/amx_products.cpp", folder / "amx_products.so", "-shared", "-O1"
            )
        )
    )
    library.amx_check_products.restype = ctypes.c_char_p
    library.amx_check_arithmetic.restype = ctypes.c_char_p
    return library


@pytest.fixture(autouse=True)
def unit(emulator):
    """AMX for one test, and what the unit has to say afterwards."""
    if emulator is None:
        _C.set_isa(amx_unit.ISA)
        yield None
        _C.set_isa("")
        return
    with emulator:
        _C.set_isa(amx_unit.ISA)
        yield emulator
        assert emulator.error() == ""
        assert emulator.configured() == 0


def call_of(*args, **options):
    """random_call in bfloat16."""
    return random_call(*args, **{"dtype": torch.bfloat16, **options})


def test_products_are_exact(helpers):
    """Steps of tiles, leftovers of rows, columns and depth, accumulation: on integers, where any
    wrong operand shows.
    """
    assert helpers.amx_check_products(200).decode() == ""


def test_arithmetic_of_the_unit(helpers):
    """An emulator that adds in another order or keeps denormals."""
    assert helpers.amx_check_arithmetic().decode() == ""


MISUSE = [
    "#UD: tilezero without ldtilecfg on this thread",
    "#GP: ldtilecfg with palette 2",
    "#GP: ldtilecfg of 17 rows of 64 bytes",
    "#GP: ldtilecfg of 16 rows of 68 bytes",
    "#GP: ldtilecfg of tile 8",
    "#UD: tileloadd of tile 6, which is not configured",
    "#UD: tdpbf16ps of shapes C 8x64, A 8x64, B 8x64",
    "#UD: tdpbf16ps of tiles 0, 4, 4",
    "ldtilecfg without tilerelease before",
    "#GP: ldtilecfg with reserved bytes",
    "#UD: tilestored of tile 1 with rows of 62 bytes",
    "#UD: tilestored without ldtilecfg on this thread",
]


@pytest.mark.skipif(NATIVE, reason="the processor ends the process at these")
def test_misuse_is_found(helpers, unit):
    """An emulator that lets pass what a processor refuses."""
    for which, text in enumerate(MISUSE):
        assert helpers.amx_misuse(which) == 1
        assert unit.error() == text
    assert helpers.amx_misuse(len(MISUSE)) == 0


def test_wrappers_are_the_instructions_meant(helpers, folder):
    """Operands in another order than the compiler's own intrinsics have them."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is missing: it reads the machine code")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(folder / "amx_products.so")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = {}
    for name in ("amx_wrapped", "amx_intrinsic"):
        body = re.search(rf"<{name}>:\n(.*?)\n\n", text, re.DOTALL)[1]
        found[name] = re.findall(r"\b((?:t?ld|st)?tile\w*|tdp\w+) *(.*)", body)
    assert len(found["amx_wrapped"]) == 6
    assert found["amx_wrapped"] == found["amx_intrinsic"]


@pytest.mark.parametrize("head_dim", [64, 80])
def test_products_run_on_the_unit(unit, head_dim):
    """A path that leaves the work to vdpbf16ps: right, and no faster."""
    if unit is None:
        pytest.skip("the processor does not count its products")
    call = call_of(batch=1, heads_q=1, seqlen_q=128, head_dim=head_dim)
    whole = (head_dim + 31) // 32 * 32  # K Q^T and V dO^T by whole steps
    before = unit.products()
    out, lse, *_ = cpu.forward(call)
    forward = unit.products() - before
    cpu.backward(call, torch.ones_like(out), out, lse, None, Needs(True, True, True))
    backward = unit.products() - before - forward
    one = 16 * 16 * 32
    assert forward * one == 128 * 128 * (whole + head_dim)
    assert backward * one == 128 * 128 * (2 * whole + 3 * head_dim)


def test_only_on_request(unit):
    """Kernels that ran on no machine yet as the default."""
    assert amx_unit.ISA in _C.supported_isas()
    _C.set_isa("")
    assert _C.isa() != amx_unit.ISA


def test_ceiling(unit):
    """The rate of vdpbf16ps as the ceiling of kernels that are not bound by it."""
    before = 0 if unit is None else unit.products()
    assert _C.ceilings("bf16", amx_unit.ISA, 1, 0.005) > 0
    assert unit is None or unit.products() > before


@pytest.mark.skipif(NATIVE, reason="the processor has AMX")
def test_refused_without_amx(unit):
    """A process that an instruction ends."""
    _C.emulate_amx(False)
    with pytest.raises(ValueError, match=r"one that this machine supports .* got 'avx512_amx'"):
        _C.set_isa(amx_unit.ISA)


MORE_SHAPES = {
    "whole blocks of tiles": (128, 192, 64, 64),
    "one tile of rows left": (64, 48, 32, 32),
    "depth of one step and one pair": (64, 64, 34, 34),
    "odd head dimensions": (80, 95, 47, 33),
    "less than a tile": (15, 15, 30, 15),
    "wide heads": (70, 100, 160, 96),
    "keys of several blocks": (65, 770, 32, 32),
}


@pytest.mark.parametrize("name", [*SHAPES, *MORE_SHAPES])
def test_shapes(name):
    """Wrong tails, reads or writes past a row, uninitialised outputs."""
    sizes = {**SHAPES, **MORE_SHAPES}[name]
    keys = ("seqlen_q", "seqlen_k", "head_dim", "head_dim_v")
    check_call(call_of(stats=True, layout="padded", **dict(zip(keys, sizes, strict=True))), "cpu")


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("head_dim", [40, 64])
def test_features(name, head_dim):
    """A feature left out, or its gradient."""
    options = {"seqlen_q": 140, "seqlen_k": 260, "head_dim": head_dim, "stats": True, "batch": 1}
    check_call(call_of(**{**options, **FEATURES[name]}), "cpu")


@pytest.mark.parametrize("seqlen_k", [220, 385])
@pytest.mark.parametrize("name", ["mask with empty rows", "causal, top left", "softcap"])
def test_many_heads(name, seqlen_k):
    """The backward's larger blocks of keys: scratch, K by key up to 384."""
    options = {**FEATURES[name], "seqlen_k": seqlen_k}
    check_call(call_of(batch=4, heads_q=8, seqlen_q=67, head_dim=32, **options), "cpu")


@pytest.mark.parametrize("name", FEATURES)
def test_varlen(name):
    """Rows of another sequence in a tile."""
    options = {k: v for k, v in FEATURES[name].items() if k != "seqlen_k"}
    lengths = {"seqlens_q": [0, 5, 131, 1], "seqlens_k": [4, 7, 140, 0]}
    check_call(call_of(stats=True, head_dim=32, **lengths, **options), "cpu")


@pytest.mark.parametrize("page_size", [0, 3, 64])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_decode(page_size, seqlen_q):
    """Pages, whose rows are not evenly spaced; few queries, which are not these kernels' matter."""
    options = {"heads_q": 2, "seqlen_q": seqlen_q, "seqlen_k": 330, "head_dim": 64}
    call = call_of(cache_seqlens=[0, 7, 330], page_size=page_size, causal=True, **options)
    check_call(call, "cpu", grads=False)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("features", [{}, {"causal": True, "dropout_p": 0.3}], ids=["", "more"])
def test_largest_logit_moves_between_tiles(level, features):
    """Weights on the base of an earlier tile."""
    call = call_of(batch=1, seqlen_q=75, seqlen_k=700, head_dim=32, heads_q=1, **features)
    call.k.mul_(LEVELS[level](torch.arange(700.0))[:, None].to(call.k.dtype))
    check_call(call, "cpu")


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [70, 149])
def test_excluded_values_reach_nothing(where, value, key):
    """0 * NaN from a key that only some queries see, or none; not looked for in every dimension."""
    call = call_of(seqlen_q=150, causal=True, head_dim=32, mask="k", batch=1)
    call.mask[..., 70], call.mask[..., 149] = True, False
    getattr(call, where)[:, :, key, 20:] = value
    check_call(call, "cpu")


@pytest.mark.parametrize("options", [{"causal": True}, {"bias": "k"}, {"heads_q": 4, "heads_k": 1}])
@pytest.mark.parametrize("openmp", [True, False], ids=["torch's threads", "own threads"])
def test_bitwise_equal_for_any_number_of_threads(options, openmp):
    """Threads whose tiles are not configured, an order of additions that depends on scheduling."""
    call = call_of(seqlen_q=300, head_dim=32, batch=1, **options)
    check_threads(call, openmp, (1, 2, 5))


@pytest.mark.parametrize("seed", range(40))
def test_random_mixes(seed):
    """Features that are right alone and wrong together."""
    r = random.Random(1000 + seed)
    heads_k = r.choice([1, 2])
    call = call_of(
        seed,
        batch=r.choice([1, 2]),
        heads_q=heads_k * r.choice([1, 2]),
        heads_k=heads_k,
        seqlen_q=r.choice([16, 33, 64, 129]),
        seqlen_k=r.choice([31, 128, 129, 200]),
        head_dim=r.choice([32, 40, 64, 65]),
        head_dim_v=r.choice([None, 31, 48]),
        **random_features(r),
    )
    check_call(call, "cpu")
