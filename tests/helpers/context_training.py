"""What trains around context attention, each function on every rank of a group: torch.compile,
checkpointing, DDP, FSDP2 and gradients that add up, against one process or an eager call.
"""

import contextlib

import torch
from closeness import relative
from context_cases import Problem, layout_of, mesh_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext.distributed import Layout, context_attention, mean_loss

STARTS = ([0, 9, 10, 37], [0, 20, 37])  # of the documents of two passes
ROWS, WIDTH = 37, 32


def around(group, rank, parts, way, method, kind, lengths) -> float:
    """A call within torch.compile(fullgraph=True) or a checkpoint against the call itself: O and
    the gradients of a function of it, with dropout.  The same bits, or an error."""
    layout = layout_of(kind, lengths, parts)
    problem = Problem(layout, parts, "window")
    mesh = mesh_of(group, parts, method)

    def call(q, k, v):
        more = dict(problem.options, dropout_p=0.3, method=method)
        return context_attention(q * 2, k, v, layout=layout, mesh=mesh, **more).sin()

    def gradients(function):
        torch.manual_seed(7 + rank)
        own = [layout.shard(x, 2, rank).requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = function(*own)
        out.sum().backward()
        return [out.detach(), *[x.grad for x in own]]

    ways = {
        "compile": lambda: torch.compile(call, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda: lambda *x: checkpoint(call, *x, use_reentrant=False),
        "reentrant": lambda: lambda *x: checkpoint(call, *x, use_reentrant=True),
    }
    pairs = zip(gradients(ways[way]()), gradients(call), strict=True)
    return max(relative(a, b) for a, b in pairs)


class Layer(torch.nn.Module):
    """A layer whose attention is given."""

    def __init__(self):
        super().__init__()
        names = ("q", "k", "v", "out")
        self.of = torch.nn.ModuleDict({n: torch.nn.Linear(WIDTH, WIDTH, bias=False) for n in names})

    def forward(self, x, attend):
        """[1, S, width] -> the same."""
        heads = (self.of[n](x).unflatten(-1, (4, 8)).transpose(1, 2) for n in "qkv")
        return x + self.of["out"](attend(*heads).transpose(1, 2).flatten(2))


class Model(torch.nn.Module):
    """Two layers; form: how each is checkpointed, or "compile"."""

    def __init__(self, form: str = ""):
        super().__init__()
        torch.manual_seed(1)
        self.layers, self.form = torch.nn.ModuleList([Layer(), Layer()]), form

    def forward(self, x, attend):
        """[1, S, width] -> logits."""
        for layer in self.layers:
            if self.form == "compile":
                # fullgraph: a graph break is an error
                x = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, attend)
            elif self.form:
                x = checkpoint(layer, x, attend, use_reentrant=self.form == "reentrant")
            else:
                x = layer(x, attend)
        return x + 0.0  # FSDP2 asks for no view


def _documents(starts):
    bounds = torch.tensor(starts, dtype=torch.int32)

    def whole(q, k, v):
        rows = (y[0].transpose(0, 1) for y in (q, k, v))
        out = attn_ext.attention_varlen(*rows, bounds, bounds, causal=True)
        return out.transpose(0, 1)[None]

    return whole


def _step(model, passes, total, hold=contextlib.nullcontext) -> float:
    """A step of SGD, whose gradients add up over the passes (x, labels, attend); returns the loss.
    hold: within it gradients stay on their rank."""
    losses = 0.0
    for at, (x, labels, attend) in enumerate(passes):
        with hold() if at < len(passes) - 1 else contextlib.nullcontext():
            logits = model(x.clone().requires_grad_(), attend)  # as an embedding's, for reentrant
            each = torch.nn.functional.cross_entropy(
                logits[0], labels[0], reduction="sum", ignore_index=-100
            )
            loss = total(each, int((labels != -100).sum())) / len(passes)
            loss.backward()
        losses += float(loss.detach())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
            parameter.grad = None
    return losses


def _wrapped(wrapper: str, model, group):
    """(the model on all ranks of a group, what holds its gradients back)."""
    if wrapper == "ddp":
        model = DistributedDataParallel(model, process_group=group)
        return model, model.no_sync
    mesh = DeviceMesh.from_group(group, "cpu")
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)

    @contextlib.contextmanager
    def hold():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return model, hold


def trained(group, rank, parts, wrapper, form) -> float:
    """The largest relative error of the losses of three steps of packed documents, two passes each,
    against one process."""
    torch.manual_seed(2)
    x, tokens = torch.randn(2, 1, ROWS, WIDTH), torch.randint(0, WIDTH, (2, 1, ROWS))
    whole, own = [], []
    for at, starts in enumerate(STARTS):
        layout = Layout.packed(starts, parts)

        def shard(q, k, v, layout=layout):
            return context_attention(q, k, v, layout=layout, mesh=group, causal=True)

        labels = Layout.packed(starts, 1).shift_labels(tokens[at], 0)
        whole.append((x[at], labels, _documents(starts)))
        own.append((layout.shard(x[at], 1, rank), layout.shift_labels(tokens[at], rank), shard))
    one = Model()
    model, hold = _wrapped(wrapper, Model(form), group)
    worst = 0.0
    for _ in range(3):
        want = _step(one, whole, lambda s, n: s / n)
        got = _step(model, own, lambda s, n: mean_loss(s, n, group), hold)
        worst = max(worst, abs(got - want) / want)
    return worst
