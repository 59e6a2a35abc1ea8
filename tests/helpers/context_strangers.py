"""What a newcomer does with context parallelism, each function on every rank of a group: calls that
are right though unusual, and calls that are wrong, of all ranks or of the last one alone.
"""

import os
import time

import torch
import torch.distributed as dist
from closeness import relative
from context_dtensors import dtensors, plain_side  # noqa: F401  cases of the same processes
from context_models import model, model_refuses  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh

import attn_ext
from attn_ext.distributed import (
    ContextParallelError,
    Layout,
    context_attention,
    context_decode,
    mean_loss,
)
from attn_ext.distributed.names import Names
from attn_ext.integrations.deepspeed import LocalAttention

SEQLEN, HEADS, WIDTH = 37, 12, 16


def _whole(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, HEADS, SEQLEN, WIDTH).to(dtype) for _ in range(4)]


def unusual(group, rank, parts, method, change, dtype, leaves) -> float:
    """The largest error of O and the gradients that were asked for; inf where one is missing."""
    layout = Layout.zigzag(SEQLEN, parts)
    *inputs, dout = _whole(getattr(torch, dtype))
    want = [x.clone().requires_grad_(name in leaves) for x, name in zip(inputs, "qkv", strict=True)]
    got = [_CHANGES[change](layout.shard(x.detach(), 2, rank)).detach() for x in want]
    got = [x.requires_grad_(name in leaves) for x, name in zip(got, "qkv", strict=True)]
    one = attn_ext.attention(*want, causal=True)
    out = context_attention(*got, layout=layout, mesh=group, method=method, causal=True)
    pairs = [(out, one)]
    if leaves:
        one.backward(dout)
        out.backward(layout.shard(dout, 2, rank))
        pairs += [(a.grad, b.grad) for a, b in zip(got, want, strict=True) if b.grad is not None]
        assert all((a.grad is None) == (b.grad is None) for a, b in zip(got, want, strict=True))
    return max(relative(a, layout.shard(b, 2, rank)) for a, b in pairs)


_CHANGES = {
    "plain": lambda x: x,
    "rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),  # the last stride is not 1
}


def groups(group, rank, parts) -> float:
    """Of four ranks: a subgroup, two meshes at once, and a group of one."""
    q, k, v, _ = _whole()
    want = attn_ext.attention(q, k, v, causal=True)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    middle = dist.new_group([1, 2])
    alone = [dist.new_group([r]) for r in range(parts)][rank]

    def error(mesh, place, size, method="ring"):
        layout = Layout.zigzag(SEQLEN, size)
        own = (layout.shard(x, 2, place) for x in (q, k, v))
        got = context_attention(*own, layout=layout, mesh=mesh, causal=True, method=method)
        return relative(got, layout.shard(want, 2, place))

    found = [error(square[name], square.get_local_rank(name), 2) for name in ("context", "data")]
    found += [error(alone, 0, 1, method) for method in ("ring", "ulysses", "allgather")]
    found.append(error(group, rank, parts, "ulysses"))
    if rank in (1, 2):
        found.append(error(middle, rank - 1, 2))
    return max(found)


def _ring(layout, group, rank, /, **more):
    q, k, v, _ = _whole()
    own = {name: layout.shard(x, 2, rank) for name, x in zip("qkv", (q, k, v), strict=True)}
    own |= dict(layout=layout, mesh=group, method="ring", causal=True) | more
    return context_attention(own.pop("q"), own.pop("k"), own.pop("v"), **own)


def wrong_everywhere(group, rank, parts) -> dict:
    """{what: (type of the error, its text)}, of calls that are wrong on every rank."""
    layout = Layout.zigzag(SEQLEN, parts)
    call = lambda **more: _ring(layout, group, rank, **more)  # noqa: E731
    x = torch.ones(2, HEADS, layout.length(rank), WIDTH)
    length = torch.full((2,), 5, dtype=torch.int32)
    calls = {
        "mesh": lambda: call(mesh=None),
        "layout": lambda: call(layout="zigzag"),
        "method": lambda: call(method="Ring"),
        "dimensions": lambda: call(q=x[0]),
        "integers": lambda: call(q=x.long(), k=x.long(), v=x.long()),
        "columns": lambda: call(mask=torch.ones(1, 1, x.shape[2], x.shape[2], dtype=torch.bool)),
        "loss": lambda: mean_loss(torch.ones(3), 3, group),
        "lengths": lambda: context_decode(x, x, x, k_first=0, whole_lengths=[5, 5], group=group),
        "group": lambda: context_decode(x, x, x, k_first=0, whole_lengths=length, group="world"),
        "twice": lambda: _second(call, x),
        "forward": lambda: torch.func.jvp(lambda q: call(q=q), (x,), (x,)),
    }
    found = {name: _error(function) for name, function in calls.items()}
    assert torch.isfinite(call()).all(), "a right call after wrong ones"
    return found


def _second(call, x):
    q = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(q=q).square().sum(), q, create_graph=True)
    gradient.sum().backward()


def _error(function) -> tuple[str, str]:
    try:
        function()
    except (TypeError, ValueError, NotImplementedError) as error:
        return type(error).__name__, str(error)
    return "no error", ""


def wrong_on_one(group, rank, parts) -> dict:
    """{what: text of the error}, of calls in which the last rank alone is wrong, after one that all
    have agreed on."""
    layout, last = Layout.zigzag(SEQLEN, parts), rank == parts - 1
    call = lambda **more: _ring(layout, group, rank, **more)  # noqa: E731
    call()
    n = layout.length(rank)
    mask = torch.ones(1, 1, n + last, SEQLEN, dtype=torch.bool)
    q = torch.randn(2, HEADS, n, WIDTH)
    length = torch.full((2,), 5, dtype=torch.int32)
    heads = q[:, : 4 if last else HEADS, :2]
    calls = {
        "mask": lambda: call(mask=mask),
        "sink": lambda: call(sink=torch.zeros(HEADS + last)),
        "return_lse": lambda: call(softcap=1.0, return_lse=7 if last else False),
        "q": lambda: call(softcap=2.0, **(dict(q=None) if last else {})),
        "layout": lambda: call(softcap=3.0, **(dict(layout=None) if last else {})),
        "gradient": lambda: call(softcap=4.0, q=q.requires_grad_(last)),
        "decode": lambda: context_decode(
            heads, q[:, :4], q[:, :4], k_first=0, whole_lengths=length, group=group
        ),
        "unshard": lambda: layout.unshard(q[:, : HEADS - last], 2, group),
    }
    found = {name: _error(function)[1] for name, function in calls.items()}
    assert torch.isfinite(call(softcap=5.0)).all(), "a right call after wrong ones"
    return found


def forgotten(group, rank, parts) -> bool:
    """What is remembered of layouts that come by once."""
    names = Names(2)
    for i in range(9):
        names.put(str(i), i, keep=i == 3)
    kept = len(names) == 3 and (names.get("3"), names.get("8")) == (3, 8)
    try:
        names.get("0")
    except RuntimeError as error:
        return kept and "must follow its forward" in str(error)
    return False


def unheard(rank, world) -> tuple:
    """(seconds, peer, hop) of the error where the last rank says nothing before the agreement."""
    layout = Layout.zigzag(SEQLEN, world)
    if rank == world - 1:
        time.sleep(60)  # silent for longer than the others wait; ranks.run kills it then
    begun = time.monotonic()
    try:
        _ring(layout, dist.group.WORLD, rank)
    except ContextParallelError as error:
        return time.monotonic() - begun, error.peer, error.hop
    return 0.0, None, "no error"


def slot_of_deepspeed(rank, world) -> float:
    """The largest error of O and the gradients of DeepSpeed's own Ulysses with our local attention,
    sequence or batch first, with fewer heads of K and V."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for minutes
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    errors = []
    for heads_k, at in ((8, 0), (4, 0), (2, 1)):
        torch.manual_seed(3)
        q, k, v, dout = (
            torch.randn(2, 12, heads, 16).transpose(0, 1 - at) for heads in (8, heads_k, heads_k, 8)
        )
        options = {"causal": True, "window": (7, None)}
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        order = (0, 2, 1, 3) if at else (1, 2, 0, 3)
        out = attn_ext.attention(*(x.permute(order) for x in whole), **options)
        want = out.permute((0, 2, 1, 3) if at else (2, 0, 1, 3))
        want.backward(dout)
        own = [x.chunk(world, at)[rank].contiguous().requires_grad_() for x in (q, k, v)]
        local = LocalAttention(at, **options)
        attend = DistributedAttention(local, dist.group.WORLD, gather_idx=at)
        got = attend(*own, 1 - at)
        got.backward(dout.chunk(world, at)[rank])
        pairs = [(got, want), *((a.grad, b.grad) for a, b in zip(own, whole, strict=True))]
        errors += [relative(a, b.chunk(world, at)[rank]) for a, b in pairs]
    return max(errors)
