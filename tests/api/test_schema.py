"""The table of fields (attn_ext/core/schema.py) and everything that remembers a call: a field that
a memory forgets would silently give the next call the last one's value.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import attn_ext
from attn_ext.backends import cpu, cpu_second, native_gpu
from attn_ext.core import schema
from attn_ext.core.schema import FIELDS, GRADIENTS, TENSORS, Call, Rows, Tangents
from attn_ext.ops import execute, fast
from attn_ext.testing import check_call, random_call

ROOT = Path(attn_ext.__file__).parents[1]
SIZES = {"batch": 2, "heads_q": 2, "seqlen_q": 9, "seqlen_k": 9, "head_dim": 8}
# every optional tensor, of one call that has it
SIDES = random_call(
    **SIZES, mask="bhqk", bias="bhqk", alibi=True, sink=True, dropout_p=0.5
)._asdict()
SIDES["w"] = random_call(**SIZES, additive=True).w
for _name in ("cu_seqlens_q", "cu_seqlens_k"):
    SIDES[_name] = torch.tensor([0, 4, 9], dtype=torch.int32)
SIDES["seqlens_k"] = torch.tensor([9, 5], dtype=torch.int32)
SIDES["block_table"] = torch.tensor([[0], [1]], dtype=torch.int32)
SIDES["frame"] = torch.zeros(2, 6, dtype=torch.int32)


def plain() -> Call:
    """A call that every memory keeps."""
    return random_call(3, **SIZES)


def another(name: str):
    """A value of the field that `plain` does not have."""
    value = getattr(plain(), name)
    if name in FIELDS[:3]:
        return torch.cat((value, value), dim=1)[:, :, :, :4]  # other heads, other width
    if name in FIELDS[:TENSORS]:
        return SIDES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"normalizer": "sigmoid", "backend": "reference"}[name]
    if name == "align":
        return 1 - value
    return 0.25 if value is None else value + (0.5 if isinstance(value, float) else 3)


def test_the_operators_have_the_fields_of_the_table():
    """A schema that lists a field twice, leaves one out or has another order."""
    forward = torch.ops.attn_ext.forward.default._schema
    backward = torch.ops.attn_ext.backward.default._schema
    assert tuple(a.name for a in forward.arguments) == FIELDS
    assert tuple(a.name for a in backward.arguments[4:-1]) == FIELDS
    assert [r.name for r in backward.returns] == [f"d{name}" for name in GRADIENTS]
    for argument in forward.arguments:
        optional = "Optional" in str(argument.type)
        assert optional == ("None" in str(Call.__annotations__[argument.name])), argument.name


def triton_key(call: Call) -> tuple:
    """The key of a recipe of launches."""
    replay = pytest.importorskip("attn_ext.triton_kernels.launch.replay")
    return replay.key_of(call, call[:TENSORS])


def second_key(call: Call) -> tuple | None:
    """The key of the native calls of second derivatives."""
    return cpu_second.plan_key(call, Tangents(q=call.q), Rows())


MEMORIES = {
    "backends/cpu.py": cpu.plan_key,
    "backends/cpu_second.py": second_key,
    "backends/native_gpu.py": native_gpu.plan_key,
    "ops/execute.py": execute.serving_key,
    "triton_kernels/launch/replay.py": triton_key,
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_in_every_key(name, memory):
    """A new field that a memory forgets.  None: the memory keeps no such call."""
    key_of = MEMORIES[memory]
    before, after = plain(), plain()._replace(**{name: another(name)})
    assert key_of(before) == key_of(plain())
    assert key_of(before) is not None
    assert key_of(after) is None or key_of(after) != key_of(before)


def tensors_of(result) -> list:
    """All tensors of what `attention` returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in tensors_of(part)]


@pytest.mark.parametrize("name", inspect.signature(attn_ext.attention).parameters)
def test_each_argument_is_in_the_key_of_the_short_way(name):
    """The short way of `attention`, whose key is made of its arguments: one that is forgotten, or
    that the short way takes although it is not in the key."""
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    arguments = {"q": q, "k": k, "v": v}
    other = {
        "q": q.transpose(2, 3).contiguous().transpose(2, 3), "k": k[:, :1], "v": v[..., :4],
        "causal": "top_left", "window": (1, 0), "mask": torch.eye(5, dtype=torch.bool),
        "bias": torch.arange(25.0).view(5, 5), "softcap": 0.1, "alibi_slopes": torch.ones(2),
        "sink": torch.ones(2), "dropout_p": 0.5, "scale": 0.1, "return_lse": True,
        "return_stats": True, "deterministic": True, "normalizer": "sigmoid", "sigmoid_bias": 0.5,
        "backend": "reference",
    }  # fmt: skip
    first = attn_ext.attention(**arguments)
    changed = {**arguments, name: other[name]}
    if name == "sigmoid_bias":
        changed["normalizer"] = "sigmoid"
    if name == "k":
        changed["v"] = v[:, :1]
    results = []
    for forget in (False, True):
        if forget:
            fast.forget()
            cpu.forget()
        torch.manual_seed(1)
        results.append(attn_ext.attention(**changed))
    got, want = map(tensors_of, results)
    assert len(got) == len(want)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    if name not in ("q", "return_lse", "return_stats", "deterministic", "backend"):
        assert got[0].shape != first.shape or not torch.equal(got[0], first), "it changes nothing"


# What a kernel reads beside these lengths is what they say; `attn_ext.ops.checks` holds them to it.
LENGTHS = ("max_seqlen_q", "max_seqlen_k")


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in LENGTHS and n != "backend"])
def test_a_call_after_another_is_itself(name):
    """The value of the last call in place of a field's own, in forward or backward."""
    before = plain()
    changes = {name: another(name)}
    if name == "dropout_p":
        changes["rng_state"] = SIDES["rng_state"]
    if name == "w":
        changes["scale"] = 1.0
    if name in ("q", "k", "v"):  # they must change together
        changes = {n: another(n) for n in ("q", "k", "v")}
    after = before._replace(**changes)
    if name in ("cu_seqlens_q", "cu_seqlens_k"):
        after = random_call(3, seqlens_q=[4, 5], heads_q=2, head_dim=8)
    elif name == "block_table":
        after = random_call(3, **{**SIZES, "seqlen_q": 2}, cache_seqlens=[9, 5], page_size=9)
    for call in (before, before, after, after, before):
        check_call(call, "cpu", dlse=call.normalizer == "softmax")


def test_every_memory_is_tested():
    """A new dict of plans that the tests above do not know."""
    known, found = {*MEMORIES, "ops/fast.py"}, set()
    for folder in ("attn_ext", "triton_kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Plans":
                    found.add(file.relative_to(ROOT).as_posix().removeprefix("attn_ext/"))
    assert found == known


def test_the_kernels_are_told_every_number_of_the_table():
    """A number that the table marks as the kernels' and csrc does not know."""
    told = re.findall(r'\{"(\w+)", &Problem::(\w+)\}', (ROOT / "csrc/params.h").read_text())
    assert [name for name, _ in told] == [field for _, field in told]
    assert sorted(schema.KERNEL_SCALARS) == sorted(name for name, _ in told)
