"""The Triton kernels of additive and sigmoid attention, of shards, of attn_ext.inspect, of decode
with int8 compile for absent GPUs: without spills (shards and sigmoid: few in the hot loop),
within shared memory, with tensor cores for products of matrices.  What was seen of these sources
(tests/helpers/seen.py) is compiled again in turn only.
"""

import os

import pytest
import seen
import triton_seen

from attn_ext.triton_kernels import configs

SCRIPT = """
import functools, json, sys
import torch, triton
import triton_offline as offline
from attn_ext.triton_kernels.launch import additive as additive_launch
from attn_ext.triton_kernels.launch import attention as launch
from attn_ext.triton_kernels.launch import backward as launch_backward
from attn_ext.triton_kernels.launch import decode_int8
from attn_ext.triton_kernels.launch import inspect as inspect_launch
from attn_ext.testing import needs_of, random_call

architecture, table = sys.argv[1], {}
triton.runtime.driver.set_active(offline.StubDriver(architecture))
launch.architecture = lambda x: architecture
launch.multiprocessors = lambda x: 132

def run(label, kernel, programs, tile, *args):
    compiled = kernel.warmup(*args, grid=(programs,), **launch.options(tile))
    table[f"{kernel.fn.__name__} {label}"] = offline.resources(compiled)

shape = {"seqlen_q": 128, "seqlen_k": 128, "heads_q": 4, "heads_k": 2}
rest = {"mask": "bk", "bias": "hqk", "dropout_p": 0.2, "window": (30, 5)}
calls = {
    "64": random_call(causal=True, head_dim=64, dtype=torch.bfloat16, **shape),
    "128": random_call(causal=True, head_dim=128, dtype=torch.bfloat16, **shape),
    "float32": random_call(causal=True, head_dim=64, **shape),
    "features": random_call(head_dim=64, dtype=torch.bfloat16, **rest, **shape),
}

def additive(call):
    call = call._replace(w=torch.zeros(4, call.q.shape[-1]), scale=1.0)
    out, lse, _, _ = additive_launch.forward(call)
    additive_launch.backward(call, out, out, lse, lse, needs_of(call))

def sigmoid(call):
    call = call._replace(normalizer="sigmoid")
    out, lse, _, _ = launch.forward(call)
    launch_backward.backward(call, out, out, lse, None, needs_of(call))

def shards(call):
    call = call._replace(frame=torch.zeros(2, 6, dtype=torch.int32), window_left=30)
    out, lse, _, _ = launch.forward(call, partial=True)
    launch_backward.backward(call, out.to(call.q.dtype), None, lse, lse, needs_of(call))

def look(call):
    call = call._replace(v=call.k[..., :1], rng_state=None, dropout_p=0.0)
    lse = torch.zeros(call.q.shape[:3])
    inspect_launch.column_mass(call, lse)
    inspect_launch.top_k(call, 16, lse)
    inspect_launch.mean_top_k(call, 16, lse)
    inspect_launch.pooled_map(call, 64, 64, lse)

def int8(call):
    dtype = torch.bfloat16 if call.mask is None else torch.float32
    k, v = (torch.zeros(x.shape, dtype=torch.int8) for x in (call.k, call.v))
    factors = [torch.zeros(*x.shape[:3], 1) for x in (k, v)]
    decode_int8.forward(call._replace(k=k, v=v), *factors, dtype)

cache = {"seqlen_q": 1, "seqlen_k": 4096, "heads_q": 8, "heads_k": 2, "cache_seqlens": [4096],
         "page_size": 16, "head_dim": 128}
calls["cache"] = random_call(**cache)
calls["cache features"] = random_call(**cache, mask="bk", bias="hqk", softcap=5.0, sink=True)
families = {additive: list(calls)[:4], sigmoid: ["128"], shards: ["64", "128", "features"],
            look: ["128", "features"], int8: ["cache", "cache features"]}
for family, names in families.items():
    for name in names:
        launch.run = functools.partial(run, f"{family.__name__} {name}")
        family(calls[name])
print(json.dumps(table))
"""


# bytes, where all else spills none
SPILLS = {
    ("sm_80", "mean_top_k_kernel look features"): 16,
    ("sm_120", "mean_top_k_kernel look features"): 8,
}
# wgmma and large tiles, the least shared memory, AMD; with ATTN_EXT_TRITON_ALL=1 all
ARCHITECTURES = ["sm_90", "sm_120", "gfx942"]
if os.environ.get("ATTN_EXT_TRITON_ALL") == "1":
    ARCHITECTURES += ["sm_80", "sm_89", "sm_100"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture, tmp_path):
    """A kernel that Triton refuses, that spills, or that asks for more shared memory than is."""
    name, today = triton_seen.families(architecture), triton_seen.digest(__file__)
    if seen.known(triton_seen.TABLE, name, today, triton_seen.DUE):
        return
    table = triton_seen.compiled(SCRIPT, architecture, tmp_path)
    assert len(table) >= 26, table.keys()
    for name, (registers, spilled, shared, products, loop) in table.items():
        if loop and ("sigmoid" in name or "shards" in name):
            # by the tiles of softmax; up to a twelfth of the hot loop
            assert loop[2] <= loop[1] // 12, (name, registers, loop)
        elif name.startswith("far_"):  # rows that are rare
            assert spilled <= 512, (name, registers, spilled)
        else:
            assert spilled <= SPILLS.get((architecture, name), 0), (name, registers, spilled)
        assert shared <= configs.SHARED_LIMIT[architecture], (name, shared)
        # those multiply by FMA, or not at all
        if not any(word in name for word in ("delta", "combine", "dq_from_sums", "float32")):
            assert products, name
    seen.passed(triton_seen.TABLE, triton_seen.families(architecture), today)
