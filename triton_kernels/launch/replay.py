"""The short way for a call that is as one before: its kernels are launched again with other
pointers, without a plan and without Triton's own specialisation of each argument.

Triton compiles a binary for what it knows of the arguments: dtypes, which integers are 1 or
multiples of 16, which pointers are multiples of 16 bytes, the compile-time constants.  All of it
follows from the key of a call here (dtypes, shapes, strides, scalars, device) and from the
pointers, so a recipe is made of calls and used for calls whose pointers are all multiples of 16
bytes.  Any other call takes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from attn_ext.core.plans import Plans
from attn_ext.core.schema import TENSORS, Call
from attn_ext.triton_kernels import configs

ALIGNMENT = 16  # bytes, that which Triton specialises pointers for
# Triton's launcher is no public interface: other versions take the long way
LAUNCHER_KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class Launch(NamedTuple):
    """One launch: a compiled kernel, how many programs, its arguments, and which of them are
    tensors: (place in args, slot), descriptors: (place, slot, shape, strides, block), or tuples
    with tensors: (place, ((place in the tuple, slot), ...))."""

    compiled: object
    programs: int
    args: list
    pointers: tuple
    described: tuple
    nested: tuple


class Recipe(NamedTuple):
    """What a call allocates, (shape, strides, dtype, fill | None) each, and what it launches.
    Slots count the inputs first and then what is allocated."""

    allocations: tuple
    launches: tuple[Launch, ...]


_recipes: Plans[Recipe] = Plans()


def layout(x: torch.Tensor | None):
    """What a kernel's binary and its integers depend on, but for the pointer."""
    return None if x is None else (x.dtype, x.shape, x.stride(), x.is_neg())


def key_of(call: Call, tensors: Sequence) -> tuple:
    """Equal for calls that launch the same kernels with the same integers.  `tensors`: all inputs,
    a call's own first."""
    return (call.q.device, configs.generation(), call[TENSORS:], *map(layout, tensors))


def usable(x: torch.Tensor) -> bool:
    """Whether recipes may be made and used now: x's device is the current one, and nobody listens
    to launches (a profiler would be told nothing)."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return False
    return LAUNCHER_KNOWN and (not x.is_cuda or torch.cuda.current_device() == x.device.index)


def find(key: tuple) -> Recipe | None:
    """The recipe of a call with this key, if one came before."""
    return _recipes.get(key)


def forget() -> None:
    """Drop every recipe."""
    _recipes.clear()


def remember(key: tuple, inputs: Sequence, taken: Sequence, owned: Sequence, launched) -> None:
    """Keep a recipe of what a call has done.

    inputs: the tensors of the key; taken: what the kernels were given in place of each; owned:
    (tensor, fill) of each allocation; launched: (compiled, programs, args) of each launch.  Keeps
    nothing where an input was copied, or any pointer is not a multiple of 16 bytes."""
    for x, y in zip(inputs, taken, strict=True):
        if (x is None) != (y is None) or (x is not None and x.data_ptr() != y.data_ptr()):
            return
    tensors = [*taken, *(x for x, _ in owned)]
    if any(x is not None and x.data_ptr() % ALIGNMENT for x in tensors):
        return
    slots = {id(x): slot for slot, x in enumerate(tensors) if x is not None}
    launches = [_launch(slots, *launch) for launch in launched]
    if None in launches:
        return
    allocations = tuple((tuple(x.shape), x.stride(), x.dtype, fill) for x, fill in owned)
    _recipes.keep(key, Recipe(allocations, tuple(launches)))


def _slots_of(slots: dict, values) -> tuple | None:
    """((place, slot), ...) of the tensors among `values`; None where one has no slot: a temporary
    of the launching code."""
    found = [(at, slots.get(id(x))) for at, x in enumerate(values) if isinstance(x, torch.Tensor)]
    return None if any(slot is None for _, slot in found) else tuple(found)


def _launch(slots: dict, compiled, programs: int, args: Sequence) -> Launch | None:
    """A launch as it is kept, without its tensors; None where it cannot be replayed."""
    if compiled is None:  # compiled only, or refused by a hook of Triton's
        return None
    pointers = _slots_of(slots, args)
    described, nested, kept = [], [], list(args)
    for at, arg in enumerate(args):
        if isinstance(arg, TensorDescriptor):
            slot = slots.get(id(arg.base))
            described.append((at, slot, arg.shape, arg.strides, arg.block_shape))
            kept[at] = None
        elif isinstance(arg, tuple):
            nested.append((at, _slots_of(slots, arg)))
            kept[at] = tuple(None if isinstance(x, torch.Tensor) else x for x in arg)
        elif isinstance(arg, torch.Tensor):
            kept[at] = None
    unknown = pointers is None or any(x[1] is None for x in (*described, *nested))
    nested = tuple(x for x in nested if x[1])
    return None if unknown else Launch(compiled, programs, kept, pointers, tuple(described), nested)


def replay(recipe: Recipe, inputs: Sequence) -> list[torch.Tensor] | None:
    """Do what the recipe says; what it allocated, or None, and nothing launched, where a pointer is
    not a multiple of 16 bytes."""
    pointers, bits = [], 0
    for x in inputs:
        pointer = 0 if x is None else x.data_ptr()
        bits |= pointer
        pointers.append(pointer)
    device, owned = inputs[0].device, []
    for shape, strides, dtype, fill in recipe.allocations:
        x = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        if fill is not None:
            x.fill_(fill)
        pointer = x.data_ptr()
        bits |= pointer
        pointers.append(pointer)
        owned.append(x)
    if bits % ALIGNMENT:  # of an input, or from an allocator that knows no alignment
        return None
    stream = triton.runtime.driver.active.get_current_stream(device.index or 0)
    for compiled, programs, template, patches, described, nested in recipe.launches:
        args = template.copy()
        for at, slot in patches:
            args[at] = pointers[slot]
        for at, inner in nested:
            values = list(args[at])
            for place, slot in inner:
                values[place] = pointers[slot]
            args[at] = tuple(values)
        for at, slot, shape, strides, block in described:
            base = inputs[slot] if slot < len(inputs) else owned[slot - len(inputs)]
            args[at] = TensorDescriptor(base, shape, strides, block)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *args,
        )  # fmt: skip
    return owned
