"""Compares what replayed calls launch with what the long way launches, as JSON on stdout; see
tests/triton/test_triton_replay.py.
"""

import contextlib
import json
import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_offline import ALL_FEATURES, StubDriver

from attn_ext.core.schema import TENSORS
from attn_ext.testing import needs_of, poisoned_memory, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.launch import attention, backward, replay

launches = []
driver = StubDriver("sm_90", lambda *args: launches.append(args))
triton.runtime.driver.set_active(driver)
attention.architecture = lambda x: "sm_90"
attention.multiprocessors = lambda x: 132
SMALL = configs.Tile(16, 32, 4, 1)  # quick to compile
# Nothing runs the machine code: the PTX, which differs where that does, stands for it.
CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()


def plain(x):
    """What a launch hands to the driver in place of x."""
    if isinstance(x, TensorDescriptor):
        return (x.base.data_ptr(), tuple(x.shape), tuple(x.strides), tuple(x.block_shape))
    return x.data_ptr() if isinstance(x, torch.Tensor) else 0 if x is None else x


def flat(args):
    """The arguments, those within tuples in the place of these."""
    return [y for x in args for y in (flat(x) if isinstance(x, tuple) else (x,))]


def own_pointers_hidden(rows, tensors):
    """Launches as (grid, binary, args), the pointers of allocations numbered as they come: they
    differ from call to call."""
    known = {x.data_ptr() for x in tensors if x is not None}
    names = {}

    def hide(x, was_tensor):
        return names.setdefault(x, f"allocated {len(names)}") if was_tensor else x

    shown = []
    for grid, _, _, _, function, packed, _, _, _, *args in rows:
        values = []
        for x in flat(args):
            value = plain(x)
            # an allocation's pointer: a tensor in the long way, a large integer in a replay
            large = isinstance(value, int) and value > 1 << 40 and value not in known
            values.append(hide(value, large or (isinstance(x, torch.Tensor) and large)))
        shown.append((grid, hash(function), packed, values))
    return shown


def run(call, dout=None, forward=None):
    """(what was launched, results) of a forward, or of a backward."""
    launches.clear()
    if dout is None:
        results = attention.forward(call)
        inputs = call[:TENSORS]
    else:
        needs = needs_of(call)
        results = backward.backward(call, dout, *forward, None, needs)
        inputs = (*call[:TENSORS], dout, *forward)
    return own_pointers_hidden(launches, inputs), results


@contextlib.contextmanager
def counting():
    """A list that gets one element for each recipe that is used."""
    used, keep = [], replay.replay

    def counted(*args):
        result = keep(*args)
        if result is not None:
            used.append(1)
        return result

    replay.replay = counted
    try:
        yield used
    finally:
        replay.replay = keep


def described(results):
    """dtypes, layouts and values; no kernel runs, so the values are fills, and poison elsewhere."""
    return [
        None if x is None else (x.dtype, x.shape, x.stride(), x.nan_to_num(nan=7.0).tolist())
        for x in results
    ]


def same_again(call) -> dict:
    """Whether the second forward and backward are replayed, and launch what the first did, with
    the pointers of other inputs."""
    found = {}
    replay.forget()
    other = call._replace(q=call.q.clone(memory_format=torch.preserve_format))
    forward = attention.forward(call)[:2]
    dout = torch.randn_like(forward[0])
    for direction in ("forward", "backward"):
        args = (None, None) if direction == "forward" else (dout, forward)
        if direction == "backward" and call.seqlens_k is not None:
            found[direction] = "same"  # decode has none
            continue
        replay.forget()
        run(call, *args)
        with counting() as used, poisoned_memory():
            short, results = run(other, *args)
        replay.forget()
        with poisoned_memory():
            long, expected = run(other, *args)
        same = short == long and described(results) == described(expected) and used
        found[direction] = "same" if same else f"{len(used)} replayed; {short} is not {long}"
    return found


def moved(x, elements: int):
    """x's values and strides, `elements` past a multiple of 64 bytes."""
    storage = torch.empty(x.numel() + 64, dtype=x.dtype)
    start = (-storage.data_ptr() % 64) // x.element_size() + elements
    return storage[start : start + x.numel()].view(x.shape).copy_(x)


def takes_the_long_way(base, call) -> str:
    """Whether `call` is not replayed after `base`, and launches what it launches by itself."""
    replay.forget()
    run(base)
    with counting() as used:
        after, _ = run(call)
    replay.forget()
    alone, _ = run(call)
    if used:
        return "replayed"
    return "long way, same launches as without memory" if after == alone else "other launches"


class Operators(TorchDispatchMode):
    """Notes the name of each operator of torch that runs within it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def capture_safety(call) -> dict:
    """What a CUDA graph's capture depends on, of a first and of a second (replayed) training step:
    the streams of the launches, and the operators of torch that run."""
    found = {}
    replay.forget()
    out, lse = attention.forward(call)[:2]
    dout = torch.randn_like(out)
    replay.forget()
    for stream, name in ((7, "first"), (11, "second")):
        driver.stream = stream
        launches.clear()
        with Operators() as seen, counting() as used:
            attention.forward(call)
            needs = needs_of(call)._replace(sink=False)
            backward.backward(call, dout, out, lse, None, needs)
        found[name] = {
            "streams": sorted({args[3] for args in launches}), "launches": len(launches),
            "operators": sorted(seen.names), "replayed": len(used),
        }  # fmt: skip
    driver.stream = 0
    return found


def main() -> None:
    found = {"capture": capture_safety(random_call(seqlen_q=64, head_dim=64, causal=True))}
    found |= {"replayed": {}, "differ": {}, "long way": {}}
    shape = {"seqlen_q": 64, "head_dim": 64, "dtype": torch.bfloat16, "batch": 1}
    calls = {
        "causal": shape | {"causal": True, "layout": "bshd"},
        "all features": shape | ALL_FEATURES,
        "varlen": shape | {"seqlens_q": [30, 34]},
        "paged, split": shape | {
            "seqlen_q": 1, "seqlen_k": 4096, "cache_seqlens": [4096], "page_size": 16,
            "stats": True,
        },
        "sigmoid": shape,
        "seqlen 1": shape | {"seqlen_q": 1, "seqlen_k": 1},
    }  # fmt: skip
    for name, options in calls.items():
        call = random_call(**options)
        call = call._replace(normalizer=name if name == "sigmoid" else "softmax")
        found["replayed"][name] = same_again(call)
    with configs.using(configs.key("fwd", 64, 2), configs.Tile(64, 64, 4, 2, 1)):
        found["replayed"]["descriptors"] = same_again(random_call(**shape))

    shape = shape | {"head_dim": 16}
    base = random_call(**shape, bias="hqk", sink=True)
    change = type(base)._replace
    wide = random_call(**shape | {"head_dim": 24}, bias="hqk", sink=True)
    differ = {
        "q misaligned": change(base, q=moved(base.q, 1)),
        "v misaligned": change(base, v=moved(base.v, 4)),
        "bias misaligned": change(base, bias=moved(base.bias, 1)),
        "row stride no multiple of 16": change(base, k=wide.k[..., :16]),
        "stride of bias": change(base, bias=base.bias.transpose(2, 3)),
        "bias in float32": change(base, bias=base.bias.float()),
        "float16": change(base, q=base.q.half(), k=base.k.half(), v=base.v.half()),
        "shorter": change(base, q=base.q[:, :, :48], bias=base.bias[:, :, :48], max_seqlen_q=48),
        "scale": change(base, scale=0.3),
        "window": change(base, window_right=0),
        "window's width": change(base, window_right=3),
        "softcap": change(base, softcap=3.0),
        "no bias": change(base, bias=None),
        "statistics": change(base, need_stats=True),
        "sigmoid": change(base, normalizer="sigmoid", sink=None),
        "negated view": change(base, q=torch._neg_view(base.q)),
    }
    for name, call in differ.items():
        found["differ"][name] = takes_the_long_way(base, call)
    run(base)
    with configs.using(configs.key("fwd", 16, 2, "bias"), SMALL), counting() as used:
        run(base)
        outcome = "replayed" if used else "long way, same launches as without memory"
        found["differ"]["another tile"] = outcome
    misaligned, _ = run(differ["q misaligned"])
    aligned, _ = run(base)
    found["alignment matters"] = misaligned[0][1] != aligned[0][1]

    strided = change(base, q=base.q.repeat_interleave(2, -1)[..., ::2])
    slopes = change(base, alibi_slopes=torch.rand(2, dtype=torch.float64))
    hook = triton.knobs.runtime.launch_enter_hook
    for name, call in {"last stride 2": strided, "float64 slopes": slopes}.items():
        replay.forget()
        run(call)
        with counting() as used:
            run(call)
        found["long way"][name] = not used
    replay.forget()
    run(base)
    hook.add(print_nothing)
    with counting() as used:
        run(base)
    found["long way"]["launch hook"] = not used
    print(json.dumps(found))


def print_nothing(*args):
    """A hook that listens to launches."""


if __name__ == "__main__":
    main()
