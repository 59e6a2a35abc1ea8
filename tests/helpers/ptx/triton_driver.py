"""Triton's kernels on the emulated machine: a driver whose launches run the PTX that Triton made.

Triton compiles as for a GPU of `architecture` and stops before ptxas; its own launcher (the Python
half of it) brings the arguments in order, with tensor descriptors taken apart and the pointers to
scratch memory behind them.  What the C half does with a GPU is done here: the values are laid out
as the kernel's parameters, and its PTX is launched by tests/helpers/ptx/build.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.backends.nvidia import driver as nvidia

from attn_ext import _emulated
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.launch import attention, replay
from ptx import build, parse

SHARED_KIB = {"sm_80": 163, "sm_90": 227}
# types of a kernel's signature -> as struct packs them; pointers aside
PACKED = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B",
          "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip
CONSTANT, ARGUMENT, TUPLE = range(3)  # what an argument of a launch is
SWIZZLED = (0, 32, 64, 128)  # bytes, by CUtensorMapSwizzle
# The smallest tiles that use an architecture's instructions: their kernels are a few thousand lines
# of PTX, those of the shipped ones ten thousand and more.
SMALL = {
    "fwd": configs.Tile(64, 32, 4, 2), "dkdv": configs.Tile(32, 64, 4, 2),
    "dq": configs.Tile(64, 32, 4, 2), "fused": configs.Tile(32, 64, 4, 2),
    "dbias": configs.Tile(64, 32, 4, 1), "decode": configs.Tile(16, 32, 4, 2),
}  # fmt: skip


def small(architecture, direction, width, element_size, rich="", descriptors=True):
    """In place of configs.shipped: a small tile, with descriptors where the shipped one has."""
    shipped = SHIPPED(architecture, direction, width, element_size, rich, descriptors)
    if shipped == configs.PAIR and rich != "all":  # of "all" to try the kernel with every feature
        return configs.PAIR
    loads = shipped.loads
    return SMALL[direction]._replace(loads=min(loads, 1))


SHIPPED = configs.shipped


def tensor_map(base, swizzle, size, kind, box, shape, strides, padding) -> bytes:
    """A tensor map as the emulator's copy engine reads it: a TensorSpec of ptx_types.h.  The
    arguments are those of Triton's fill_tma_descriptor_tiled, the outermost dimension first."""
    assert len(shape) == 4 and padding == 0, (shape, padding)
    steps = [step * size for step in strides[-2::-1]]
    spec = struct.pack("<Q?7x4q3q4iiii", base, False, *shape[::-1], *steps, *box[::-1], size,
                       SWIZZLED[swizzle], 1)  # fmt: skip
    return spec.ljust(128, b"\0")


class Compiled:
    """One kernel that Triton made."""

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text
        (self.kernel,) = parse.kernels(text)

    @functools.cached_property
    def narrowest(self) -> int:
        """Bytes of the narrowest access to shared memory, which several warps may find in one
        word; 4 at most."""
        bits = re.findall(r"\b(?:ld|st)\.shared\S*\.[bsuf](8|16|32)\b", self.text)
        return min([4, *(int(each) // 8 for each in bits)])

    @functools.cached_property
    def body(self) -> int:
        """The address of the function that it has become."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:8]
        return build.address(self.text, self.name, f"triton {self.name} {digest}.ptx")


def flat(annotations, args) -> list:
    """The arguments that the kernel gets, those within tuples in the place of these."""
    found = []
    for (kind, nested), value in zip(annotations, args, strict=True):
        if kind == TUPLE:
            found += flat(nested, value)
        elif kind == ARGUMENT:
            found.append(value)
    return found


def packed(kind: str, value) -> bytes:
    """One parameter."""
    if kind[0] == "*":
        value = value.data_ptr() if hasattr(value, "data_ptr") else value or 0
        return struct.pack("<Q", value)
    return value if kind == "nvTmaDesc" else struct.pack("<" + PACKED[kind], value)


class Utils:
    """In place of the C half of Triton's driver."""

    fill_tma_descriptor_tiled = staticmethod(tensor_map)
    build_signature_metadata = list

    def __init__(self, architecture: str):
        self.architecture = architecture

    def load_binary(self, name, kernel, shared, device):
        """module, function, registers, spills, threads; the kernel is its PTX (active())."""
        return name, (name, kernel.decode()), 0, 0, 1024

    def unload_module(self, module):
        """Nothing is loaded before a launch."""

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_KIB[self.architecture] * 1024}

    @staticmethod
    def launch(
        x, y, z, stream, function, cooperative, dependent, metadata, launch_metadata,
        enter, leave, global_scratch, profile_scratch, annotations, kinds, args,
    ):  # fmt: skip
        """A launch as Triton's C code takes it.  Triton keeps a kernel for all drivers of its
        architecture: the one that is active runs it."""
        assert not cooperative and not dependent, "launches of their own kind are not known"
        values = [*flat(annotations, args), global_scratch, profile_scratch]
        driver = triton.runtime.driver.active
        driver.run(function, (x, y, z), metadata, [*kinds, "*i8", "*i8"], values)


class Driver:
    """What Triton asks for the GPU that is there.  change(name, ptx) is what a test makes of
    Triton's text; tiles: in place of configs.shipped; launched: the names of what ran."""

    def __init__(self, architecture: str, change=None, tiles=small):
        self.architecture, self.change, self.tiles = architecture, change, tiles
        self.number = int(architecture.removeprefix("sm_"))
        self.utils = Utils(architecture)
        self.launcher_cls = nvidia.CudaLauncher
        self.launched: list[str] = []
        self._compiled: dict[tuple[str, str], Compiled] = {}

    def get_current_target(self):
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self):
        """Triton keeps what it compiled by this number."""
        return self.number

    def get_current_stream(self, device=None):
        return 0

    def run(self, function, grid, metadata, kinds, values) -> None:
        """A kernel with these values of its parameters."""
        if function not in self._compiled:
            name, text = function
            self._compiled[function] = Compiled(
                name, self.change(*function) if self.change else text
            )
        found = self._compiled[function]
        memory = bytearray(found.kernel.parameter_bytes)
        places = found.kernel.parameters.values()
        for kind, value, (offset, size) in zip(kinds, values, places, strict=True):
            word = packed(kind, value)
            assert len(word) == size, (found.name, kind, size)
            memory[offset : offset + size] = word
        warps, blocks, shared = metadata
        assert blocks == 1, "clusters are not known"
        self.launched.append(found.name)
        body = found.body
        _emulated.set_rules(init_fences=False, shadow_unit=found.narrowest)
        try:
            _emulated.launch_compiled(body, grid, 32 * warps, shared, bytes(memory))
        finally:
            _emulated.set_rules(init_fences=True, shadow_unit=4)


def annotation(nested_tuple, type):
    """In place of the class that Triton's C code defines."""
    return type, nested_tuple


@contextlib.contextmanager
def active(driver: Driver) -> Iterator[Driver]:
    """attn_ext.triton_kernels launches on CPU tensors, by this driver."""
    name = driver.architecture
    patches = [
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(compiler.CUDABackend, "make_cubin", lambda self, ptx, *_: ptx.encode()),
        mock.patch.object(attention, "architecture", lambda x: name),
        mock.patch.object(attention, "multiprocessors", lambda x: 16),
        mock.patch.object(configs, "shipped", driver.tiles),
        mock.patch.object(replay, "usable", lambda x: False),
        mock.patch.multiple(
            nvidia,
            create=True,
            PyKernelArg=annotation,
            ARG_CONSTEXPR=CONSTANT,
            ARG_KERNEL=ARGUMENT,
            ARG_TUPLE=TUPLE,
        ),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        # what stands there for machine code is PTX: apart from Triton's own cache
        triton.knobs.cache.dir = str(build.FOLDER / "triton")
        for each in patches:
            stack.enter_context(each)
        yield driver


def backend(driver: Driver) -> SimpleNamespace:
    """The backend `triton-ptx`: calls of CPU tensors on Triton's compiled code."""
    from attn_ext.backends import triton as shipped

    def on_machine(function):
        def run(*args):
            with active(driver):
                return getattr(shipped, function)(*args)

        return run

    functions = ("forward", "backward", "inspect_top_k", "inspect_column_mass",
                 "inspect_pooled_map")  # fmt: skip
    constants = {name: getattr(shipped, name) for name in ("NORMALIZERS", "SCORES", "MAPS")}
    return SimpleNamespace(
        __name__="triton-ptx", available=lambda: "", unsupported=unsupported, **constants,
        **{name: on_machine(name) for name in functions},
    )  # fmt: skip


def unsupported(problem) -> list[str]:
    """What the triton backend says of such a call on a GPU."""
    from attn_ext.backends import triton as shipped

    if problem.device != "cpu":
        return [f"tensors must be on the cpu, got {problem.device}"]
    return shipped.unsupported(dataclasses.replace(problem, device="cuda"))


def set_mode(mode: str, driver: Driver, seed: int = 3) -> None:
    """The emulator's mode, with the shared memory of the architecture."""
    kib = SHARED_KIB[driver.architecture]
    _emulated.set_mode(mode, seed=seed, smem_limit=kib * 1024)


def stand_in(registry) -> None:
    """For the rest of this process the backend `triton` takes CPU tensors and is `triton-ptx`
    (tests/conftest.py).  ATTN_EXT_PTX_ARCHITECTURE: sm_80 or sm_90."""
    driver = Driver(os.environ.get("ATTN_EXT_PTX_ARCHITECTURE", "sm_90"))
    registry.TEST_ONLY["triton"] = backend(driver)
    registry.get.cache_clear()
    set_mode(os.environ.get("ATTN_EXT_EMULATOR_MODE", "all"), driver)
