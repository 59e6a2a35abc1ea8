"""DTensors that are sharded over batch, heads or the sequence, each function on every rank of a
group: attention of them against that of the whole tensors.
"""

import torch
from closeness import relative
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import attn_ext

BATCH, HEADS, SEQLEN, WIDTH = 4, 8, 37, 8  # 37: shards of unlike lengths
_meshes: dict = {}


def _mesh_of(group, parts: int, dimensions: int) -> DeviceMesh:
    """All ranks of the group, or 2 x 2 of them."""
    key = (parts, dimensions)
    if key not in _meshes:
        if dimensions == 1:
            _meshes[key] = DeviceMesh.from_group(group, "cpu")
        else:
            _meshes[key] = DeviceMesh("cpu", torch.arange(parts).view(2, -1))
    return _meshes[key]


def _problem(feature: str):
    """(tensors that want gradients by name, all other arguments, those that are tensors)."""
    torch.manual_seed(5)
    shapes = dict(q=(BATCH, HEADS, SEQLEN, WIDTH), k=(BATCH, 4, SEQLEN, WIDTH))
    shapes |= dict(v=(BATCH, 4, SEQLEN, 6))
    more, sides = {"causal": True}, {}
    if feature == "everything":
        shapes |= dict(bias=(1, HEADS, SEQLEN, SEQLEN), sink=(HEADS,))
        more = {"window": (20, 7), "softcap": 3.0}
        sides["mask"] = torch.rand(BATCH, 1, SEQLEN, SEQLEN) < 0.8
        sides["alibi_slopes"] = torch.rand(BATCH, HEADS)
    if feature == "broadcast":
        shapes |= dict(bias=(HEADS, 1, SEQLEN))
        sides["mask"] = torch.rand(BATCH, 1, 1, SEQLEN) < 0.8
    if feature == "dropout":
        more["dropout_p"] = 0.4
    return {name: torch.randn(shape) for name, shape in shapes.items()}, more, sides


def _attend(leaves: dict, more: dict, sides: dict):
    return attn_ext.attention(**leaves, **more, **sides, return_lse=True)


def _results(tensors: dict, more: dict, sides: dict, seed: int, attend=_attend) -> list:
    """out, lse and the gradients, of whole tensors or of DTensors."""
    torch.manual_seed(seed)
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out, lse = attend(leaves, more, sides)
    (out.sin().sum() + torch.where(lse > -1e30, lse, 0.0).sum()).backward()
    return [out.detach(), lse.detach(), *[x.grad for x in leaves.values()]]


def dtensors(group, rank, parts, placements: str, feature: str, way: str = "") -> float:
    """The largest error; placements: a letter for each dimension of the mesh, of batch, heads, rows
    or nothing.  way: "compile", and "whole" where attention must gather the shards."""
    mesh = _mesh_of(group, parts, len(placements))
    places = [
        {"b": Shard(0), "h": Shard(1), "s": Shard(2), "-": Replicate()}[c] for c in placements
    ]
    tensors, more, sides = _problem(feature)
    want = _results(tensors, more, sides, 11)
    whole = [Replicate()] * len(placements)

    def distributed(items: dict) -> dict:
        return {
            name: distribute_tensor(x, mesh, places if name in "qkv" else whole)
            for name, x in items.items()
        }

    attend = _attend
    if "compile" in way:
        attend = torch.compile(_attend, fullgraph=True, backend="aot_eager")
    got = _results(distributed(tensors), more, distributed(sides), 11 + rank, attend)
    places = whole if "whole" in way else places
    assert list(got[0].placements) == places, got[0].placements
    assert got[0].shape == want[0].shape
    return max(relative(a.full_tensor(), b) for a, b in zip(got, want, strict=True))


def plain_side(group, rank, parts) -> str:
    """The error of a mask that is no DTensor."""
    mesh = _mesh_of(group, parts, 1)
    tensors, more, _ = _problem("plain")
    whole = {n: distribute_tensor(x, mesh, [Shard(2)]) for n, x in tensors.items()}
    try:
        attn_ext.attention(**whole, **more, mask=torch.ones(SEQLEN, SEQLEN, dtype=torch.bool))
    except TypeError as error:
        return str(error)
    return "no error"
