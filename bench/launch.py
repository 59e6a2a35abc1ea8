"""What a call of the Triton backend costs in Python, apart from the driver.

    python bench/launch.py

Without a GPU the kernels are compiled for sm_90 and launched into a stub of Triton's driver on CPU
tensors: then the figures hold all but Triton's launcher in C and cuLaunchKernel.  "again" is a
call as one before (triton_kernels/launch/replay.py), "first" the same without that memory, "triton"
Triton's own launch of the same kernels with the same arguments, "outputs" the torch.empty of the
outputs.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch
import triton

from attn_ext.core.schema import Needs
from attn_ext.testing import random_call
from attn_ext.triton_kernels.launch import attention, backward, replay

COUNT, ROUNDS = 200, 25
CALLS = {
    "dense causal": {"seqlen_q": 128, "causal": True},
    "dense, GQA, mask, bias, sink, dropout": {
        "seqlen_q": 128, "heads_q": 4, "heads_k": 2, "mask": "bk", "bias": "hqk", "sink": True,
        "dropout_p": 0.1,
    },
    "varlen causal": {"seqlens_q": [60, 68], "causal": True},
    "decode, paged, split": {
        "seqlen_q": 1, "seqlen_k": 4096, "heads_q": 8, "heads_k": 2, "cache_seqlens": [4096],
        "page_size": 16,
    },
}  # fmt: skip


def microseconds(function) -> float:
    """Median over ROUNDS of the mean of COUNT calls; CPU time of the calling thread."""
    for _ in range(20):
        function()
    means = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(COUNT):
            function()
        means.append((time.thread_time() - start) / COUNT * 1e6)
    return statistics.median(means)


def stub() -> str:
    """Put the stub in the driver's place; what is measured then."""
    path = Path(__file__).parents[1] / "tests" / "helpers" / "triton_offline.py"
    spec = importlib.util.spec_from_file_location("triton_offline", path)
    offline = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))  # as Python has it for a script
    spec.loader.exec_module(offline)
    triton.runtime.driver.set_active(offline.StubDriver("sm_90", lambda *args: None))
    attention.architecture = lambda x: "sm_90"
    attention.multiprocessors = lambda x: 132
    return "a stub driver, sm_90"


def without_memory(function):
    """`function` with no recipe found or kept."""

    def call():
        replay.forget()
        return function()

    return call


def noted(call):
    """O and LSE of a forward, and the arguments of each launch."""
    launched, keep = [], attention.run

    def run(*args):
        launched.append(args)
        return keep(*args)

    attention.run = run
    try:
        out, lse, *_ = attention.forward(call)
    finally:
        attention.run = keep
    return out, lse, launched


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else stub()
    print(f"triton {triton.__version__}, torch {torch.__version__}, {where}; microseconds a call")
    print(f"{'':40}{'again':>8}{'first':>8}{'triton':>8}{'outputs':>8}")
    for name, options in CALLS.items():
        call = random_call(head_dim=64, dtype=torch.bfloat16, device=device, **options)
        out, lse, launched = noted(call)
        outputs = microseconds(lambda: (torch.empty_like(out), torch.empty_like(lse)))  # noqa: B023
        rows = {"forward": (lambda: attention.forward(call), launched)}  # noqa: B023
        if call.seqlens_k is None:
            dout = torch.randn_like(out)
            needs = Needs(True, True, True)
            rows["backward"] = (
                lambda: backward.backward(call, dout, out, lse, None, needs), []  # noqa: B023
            )  # fmt: skip
        for direction, (function, kernels) in rows.items():
            figures = [microseconds(function), microseconds(without_memory(function))]
            if kernels:
                figures.append(microseconds(lambda: [attention.run(*a) for a in kernels]))  # noqa: B023
                figures.append(outputs)
            print(f"{name + ', ' + direction:40}" + "".join(f"{x:8.1f}" for x in figures))


if __name__ == "__main__":
    main()
