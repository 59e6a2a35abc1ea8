"""Which ISA of csrc/cpu a machine may run, and what each one runs, without running it: a machine
rarely has them all.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from attn_ext import _C

ROOT = Path(__file__).resolve().parents[2]
TABLE = {name: (features.split(",") if features else [], kernels)
         for name, features, kernels in _C.isa_table()}  # fmt: skip
FEATURES = sorted({f for features, _ in TABLE.values() for f in features})
X86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="other processors run the baseline only"
)


def flag(feature: str) -> str:
    """What Linux calls the feature in /proc/cpuinfo."""
    names = {"sse3": "pni", "avx512bf16": "avx512_bf16"}
    return names.get(feature, feature.replace(".", "_").replace("-", "_"))


@X86
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists CPU features")
def test_features_are_those_of_the_kernel():
    """A wrong leaf, register or bit of CPUID, or registers that the system does not save."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    wrong = {f: _C.cpu_has(f) for f in FEATURES if _C.cpu_has(f) != (flag(f) in flags.split())}
    assert wrong == {}


def test_supported_isas_have_all_their_features():
    """An ISA that is offered where one of the features of its code is missing (f16c)."""
    for name, (features, _) in TABLE.items():
        if name != "avx512_amx":  # whose tiles Linux must hand out, too
            assert (name in _C.supported_isas()) == all(map(_C.cpu_has, features)), name


def test_an_unknown_feature_is_an_error():
    """A misspelt feature that counts as missing: an ISA that is never used."""
    with pytest.raises(ValueError, match=r"no CPU feature is called 'avx3'"):
        _C.cpu_has("avx3")


@X86
@pytest.mark.skipif(shutil.which("g++") is None, reason="asks g++ what a list of features implies")
@pytest.mark.parametrize("isa", [name for name, (features, _) in TABLE.items() if features])
def test_a_target_implies_nothing_that_is_not_asked_for(isa):
    """g++ takes more features for granted than the list names, as popcnt with avx."""
    features = TABLE[isa][0]

    def macros(*options):
        command = ["g++", *options, "-dM", "-E", "-x", "c++", os.devnull]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return set(
            re.findall(r"#define __((?:SSE|SSSE|AVX|FMA|F16C|POPCNT|AMX|BMI|LZCNT)\w*)__", text)
        )

    implied = macros(*(f"-m{f}" for f in features)) - macros()
    named = {f.upper().replace(".", "_").replace("-", "_") for f in features}
    # not instructions: sums by SSE registers; crc32 is SSE4.2's own
    assert implied - {"SSE_MATH", "SSE2_MATH"} == named


@X86
def test_every_region_is_compiled_for_its_own_list():
    """A target region whose features are spelt out beside the table that CPUID is asked for."""
    for source in sorted((ROOT / "csrc" / "cpu").rglob("*")):
        if source.suffix in (".h", ".cpp") and source.name != "features.h":
            assert not re.search(r'target\(\s*"', source.read_text()), source


def test_the_table_of_kernels():
    """An entry that is missing, or that belongs to another ISA: on most machines it never runs."""
    bf16 = {"forward_bf16", "backward_bf16"}
    for name, (_, kernels) in TABLE.items():
        assert all(kernels.values()), name
        if name in ("avx512_bf16", "avx512_amx"):
            others = {k: v for k, v in kernels.items() if k not in bf16}
            assert others == {k: v for k, v in TABLE["avx512"][1].items() if k not in bf16}
        else:
            assert kernels["forward_bf16"] == kernels["forward"]
            assert kernels["backward_bf16"] == kernels["backward"]
    own = [kernels for name, (_, kernels) in TABLE.items() if not name.startswith("avx512_")]
    for name in own[0]:
        addresses = [kernels[name] for kernels in own]
        assert len(set(addresses)) == len(addresses), name
    for name in bf16:
        addresses = [kernels[name] for _, kernels in TABLE.values()]
        assert len(set(addresses)) == len(addresses), name
