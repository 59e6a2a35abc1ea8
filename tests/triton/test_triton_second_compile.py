"""The Triton kernels of second derivatives compile for absent GPUs: with tensor cores, within
shared memory, and without spills in their loops.  What was seen of these sources
(tests/helpers/seen.py) is compiled again in turn only.
"""

import pytest
import seen
import triton_seen

from attn_ext.triton_kernels import configs

SCRIPT = """
import functools, json, sys
import torch, triton
import triton_offline as offline
from attn_ext.core.schema import Needs, Rows, Tangents
from attn_ext.testing import needs_of, random_call
from attn_ext.triton_kernels.launch import attention as launch
from attn_ext.triton_kernels.launch import second

architecture, table = sys.argv[1], {}
triton.runtime.driver.set_active(offline.StubDriver(architecture))
launch.architecture = lambda x: architecture

def run(label, kernel, programs, tile, *args):
    if kernel.fn.__name__ != "delta_tangent_kernel" or label == "64 bf16":
        compiled = kernel.warmup(*args, grid=(programs,), **launch.options(tile))
        table[f"{kernel.fn.__name__} {label}"] = offline.resources(compiled)

shape = {"seqlen_q": 128, "seqlen_k": 128}
features = offline.ALL_FEATURES | {"window": (30, 5)}
calls = {
    "64 bf16": {"head_dim": 64, "dtype": torch.bfloat16, "causal": True},
    "128 fp16 features": {"head_dim": 128, "dtype": torch.float16, **features},
    "64 fp32 features": {"head_dim": 64, **features},
}
for name, options in calls.items():
    call = random_call(**shape, **options)._replace(need_stats=False)
    out, lse = torch.empty_like(call.q), torch.zeros(call.q.shape[:3])
    tangents = Tangents(q=call.q, k=call.k, v=call.v, bias=call.bias, sink=call.sink)
    rows = Rows(out, lse, out, lse, out, lse, out, lse)
    launch.run = functools.partial(run, name)
    second.tangent(call, tangents, rows)
    second.backward_tangent(call, tangents, rows, needs_of(call), Needs())
print(json.dumps(table))
"""

# (architecture, kernel) -> accesses to spilled registers in a turn of its loop, of 1270 and 1190
# instructions, in the smallest tiles that tensor cores take.
SPILLS = {
    ("sm_90", "dq_tangent_kernel 64 fp32 features"): 4,
    ("sm_80", "dkdv_tangent_kernel 128 fp16 features"): 47,
    ("sm_90", "dkdv_tangent_kernel 128 fp16 features"): 45,
    ("sm_90", "dkdv_tangent_kernel 64 fp32 features"): 1,
}


@pytest.mark.parametrize("architecture", triton_seen.SECOND)
def test_kernels_compile_without_spills_in_their_loops(architecture, tmp_path):
    """A kernel that Triton refuses, a tile that spills where it counts, products by FMA."""
    name, today = triton_seen.second(architecture), triton_seen.digest(__file__)
    if seen.known(triton_seen.TABLE, name, today, triton_seen.DUE):
        return
    table = triton_seen.compiled(SCRIPT, architecture, tmp_path)
    assert len(table) == 10, table.keys()
    for kernel, (registers, _, shared, products, loop) in table.items():
        assert shared <= configs.SHARED_LIMIT["sm_89"], (kernel, shared)  # the smallest of all
        if not kernel.startswith("delta"):
            assert products and loop, kernel
            assert loop[2] <= SPILLS.get((architecture, kernel), 0), (kernel, registers, loop)
    seen.passed(triton_seen.TABLE, name, today)
