"""The backends, in the order in which `backend="auto"` tries them, and the choice among them: by
the table that `attn-ext tune` measured where there is one, else by that order.

A backend is a module with

    available() -> str                     "" when it can run here, else the reason and the remedy
    unsupported(problem) -> list[str]      empty when it can serve `problem`, else every reason
    forward(call) -> (out, lse, max_logit | None, entropy | None)
    backward(call, dout, out, lse, dlse | None, needs) -> Grads

A module that serves other normalizers than softmax names them in NORMALIZERS, other scores than dot
products in SCORES, and the maps of `attn_ext.inspect` that it has a kernel for in MAPS; one that
serves shards of larger calls (`frame`) says FRAMES = True.

`needs` is a `attn_ext.core.schema.Needs`; a gradient not needed may be None.  `out` has the strides
that `attn_ext.core.layout.empty_like_layout` gives; lse is [B, Hq, Sq], or [Hq, total_q]
for varlen.  Backends never import each other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType, SimpleNamespace

from attn_ext.backends import tuned
from attn_ext.core.problem import FAR_LSE, Problem

ORDER = ("cuda", "triton", "cpu", "reference")
TORCH = "torch"  # its own attention: by name, or for "fastest"
CHOICES = ("auto", "fastest")  # in place of a name
# The modules that have kernels of second derivatives, by the backend whose calls they take; blocked
# takes all others.
SECOND = {"cpu": "cpu_second", "triton": "triton_second", "cuda": "triton_second"}
NOT_ADDITIVE = ("sink", "paged", "stats")  # features of dot products alone
TEST_ONLY: dict[str, ModuleType] = {}  # modules that tests put up by name; never chosen by "auto"


@functools.cache
def get(name: str) -> ModuleType:
    """The backend module called `name`; ValueError for an unknown one."""
    if name in TEST_ONLY:
        return TEST_ONLY[name]
    if name not in (*ORDER, TORCH):
        names = ", ".join(map(repr, (*CHOICES[1:], *ORDER, TORCH)))
        raise ValueError(f"backend must be 'auto' or one of {names}, got {name!r}")
    if importlib.util.find_spec(f"attn_ext.backends.{name}") is None:
        missing = f"the {name} backend is not part of this version of attn_ext"
        return SimpleNamespace(available=lambda: missing, unsupported=lambda problem: [missing])
    return importlib.import_module(f"attn_ext.backends.{name}")


@functools.cache
def part(name: str) -> ModuleType:
    """A module beside the backends, which serves some of a call's operations: blocked, or one of
    SECOND."""
    return importlib.import_module(f"attn_ext.backends.{name}")


def reasons(name: str, problem: Problem) -> list[str]:
    """Why backend `name` cannot serve `problem`; empty when it can."""
    module = get(name)
    if problem.score not in getattr(module, "SCORES", ("dot",)):
        return [f"{problem.score} attention has no {name} kernel"]
    if problem.map and problem.map not in getattr(module, "MAPS", ()):
        return [f"attn_ext.inspect has no {name} kernel for {problem.map}"]
    if problem.frame and not getattr(module, "FRAMES", False):
        return [f"a shard whose positions count (frame) has no {name} kernel"]
    missing = module.available()
    if missing:
        return [missing]
    if problem.far_lse and name != "reference":  # which takes the sums of whole rows instead
        return [f"lse must be within {FAR_LSE:g} of 0 in its kernels, got {problem.far_lse:g}"]
    served = getattr(module, "NORMALIZERS", ("softmax",))
    if problem.normalizer not in served:
        return [f"normalizer must be {' or '.join(map(repr, served))}, got {problem.normalizer!r}"]
    if problem.score == "additive":
        absent = [f for f in NOT_ADDITIVE if getattr(problem, f)]
        if absent or problem.normalizer != "softmax":
            return [f"additive attention has no {' and no '.join(absent) or problem.normalizer}"]
    return module.unsupported(problem)


def second_reasons(chosen: str, problem: Problem) -> list[str]:
    """Why the backend that serves `problem` does not compute its second derivatives and tangents by
    kernels of its own; empty when it does."""
    if chosen not in SECOND:
        return [f"{chosen} has no kernels of second derivatives"]
    return part(SECOND[chosen]).unsupported(problem)


def second(chosen: str, problem: Problem) -> str:
    """The module that computes second derivatives and tangents of what backend `chosen` serves."""
    if chosen == TORCH:  # has none: whoever "auto" would take
        chosen = select("auto", problem)
    return "blocked" if second_reasons(chosen, problem) else SECOND[chosen]


def automatic(name: str, problem: Problem) -> bool:
    """Whether "auto" may take backend `name`: GPU kernels that are interpreted or emulated on CPU
    tensors are right but slow, and run only when they are named."""
    return problem.device != "cpu" or name not in ("cuda", "triton")


@functools.lru_cache(maxsize=4096)
def select(name: str, problem: Problem) -> str:
    """The backend that serves `problem`: for "auto" the fastest of those able, as far as it was
    measured here, else the first; for "fastest" alike, but torch's own attention is one of them;
    else `name` itself.

    NotImplementedError, with every reason, where there is none.
    """
    if name not in CHOICES:
        why = reasons(name, problem)
        if why:
            raise NotImplementedError(f"backend {name!r} cannot serve this call: {'; '.join(why)}")
        return name
    measured = tuned.row_of(problem) is not None
    able = []
    for candidate in candidates(name, problem):
        if automatic(candidate, problem) and not reasons(candidate, problem):
            able.append(candidate)
            if not measured:
                break  # the others' reasons can be dear to find
    if not able:
        why = "; ".join(f"{c}: {', '.join(reasons(c, problem))}" for c in ORDER)
        raise NotImplementedError(f"no backend can serve this call: {why}")
    engine = tuned.fastest(problem, able) or able[0]
    return engine.partition(":")[0]


def stands_back(problem: Problem) -> str:
    """Why Triton's kernels come before those of the cuda backend on the problem's device; "" where
    they do not."""
    asked = getattr(get("cuda"), "stands_back", None) if problem.device == "cuda" else None
    return asked(problem.device_index) if asked else ""


def candidates(name: str, problem: Problem) -> tuple[str, ...]:
    """The backends that "auto" or "fastest" chooses among, in their order."""
    order = ("triton", "cuda", *ORDER[2:]) if stands_back(problem) else ORDER
    return (*order, TORCH) if name == "fastest" else order


def warn_of_reference(name: str, chosen: str, problem: Problem) -> None:
    """RuntimeWarning, once a reason, where "auto" found nothing but the reference."""
    if name in CHOICES and chosen == "reference":
        foreign = {"reference"} if problem.device == "cpu" else {"reference", "cpu"}
        own = [c for c in ORDER if automatic(c, problem) and c not in foreign]
        _warn_once("; ".join(f"{c}: {', '.join(reasons(c, problem))}" for c in own))


@functools.cache
def _warn_once(why: str) -> None:
    message = f"attn_ext computes this by its reference, slowly and in O(N^2) memory: {why}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
