"""attn-ext compile: CUDA kernels of a model into the cache, ahead of time, also without a GPU."""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from attn_ext.backends import native_gpu
from attn_ext.backends.jit import cache, first_use, sources
from attn_ext.backends.jit.nvrtc import CompileError
from attn_ext.cli.errors import BadArgument
from attn_ext.core.schema import Call, Frame, Needs
from attn_ext.measure.cases import make
from attn_ext.testing import random_call

# KiB of shared memory that a CTA may have, by compute capability (CUDA's programming guide)
SHARED_KIB = {"80": 163, "86": 99, "87": 163, "89": 99, "90a": 227, "100": 227, "103": 227,
              "110": 227, "120": 99, "121": 99}  # fmt: skip
FEATURES = {  # name -> what random_call() takes
    "none": {}, "causal": {"causal": True}, "mask": {"mask": True}, "bias": {"bias": True},
    "softcap": {"softcap": 30.0}, "alibi": {"alibi": True}, "sink": {"sink": True},
    "dropout": {"dropout_p": 0.1}, "window": {"window": (16, 16)}, "stats": {"stats": True},
    "deterministic": {"deterministic": True},
    "decode": {"cache_seqlens": [256], "seqlen_k": 256, "seqlen_q": 1},
    "paged": {"cache_seqlens": [256], "seqlen_k": 256, "seqlen_q": 1, "page_size": 16},
    "chunk": {"cache_seqlens": [256], "seqlen_k": 256, "seqlen_q": 32},  # of a prompt, in a cache
    "paged_chunk": {"cache_seqlens": [256], "seqlen_k": 256, "seqlen_q": 32, "page_size": 16},
    "frame": {}, "part": {},  # of context parallelism: whose positions count; results in float32
    "frozen_keys": {}, "frozen_queries": {},  # whose gradients are not wanted; of keys and values
    "values_128": {"head_dim_v": 128},  # of multi-head latent attention, beside keys of 192
}  # fmt: skip
PRESETS = {  # (shape, features) of each kind of call that such a model makes
    "llama": (("1,32/8,128,128", ("causal",)), ("1,32/8,128,128", ("causal", "mask")),
              ("1,32/8,1,128", ("paged",)), ("1,32/8,128,128", ("paged_chunk",))),
    "bert": (("1,12,128,64", ()), ("1,12,128,64", ("mask",)),
             ("1,12,128,64", ("mask", "dropout"))),
    "gpt2": (("1,12,128,64", ("causal",)), ("1,12,128,64", ("causal", "dropout")),
             ("1,12,1,64", ("decode",))),
    "vit": (("1,12,128,64", ()),),
}  # fmt: skip
MULTIPROCESSORS = 108  # many, so that decode is split as on a GPU


class Wanted(NamedTuple):
    """A kernel for one architecture, and what a CTA of it takes."""

    kernel: str
    arch: str
    threads: int
    shared_memory: int


@functools.cache
def short_call(shape: str, dtype: str, features: tuple[str, ...]) -> Call:
    """A call of one kind with two tiles of rows at most: which kernels it launches depends on sizes
    through the head dimension, on whether there are few queries for many keys (sm80/decode.h) or a
    batch, and on whether keys are shared out."""
    case = make(shape, dtype)
    options = {"seqlen_q": min(case.seqlen_q, 128), "seqlen_k": min(case.seqlen_k, 256)}
    for name in features:
        options |= FEATURES[name]
    batch = len(options["cache_seqlens"]) if "cache_seqlens" in options else min(case.batch, 2)
    call = random_call(
        batch=batch, heads_q=case.heads_q, heads_k=case.heads_k, head_dim=case.head_dim,
        dtype=case.torch_dtype, **options,
    )  # fmt: skip
    if "frame" not in features:
        return call
    frame = Frame(0, 0, 0, 0, options["seqlen_q"], options["seqlen_k"])
    return call._replace(
        frame=torch.tensor([frame] * batch, dtype=torch.int32, device=call.q.device)
    )


def wanted(shape: str, dtype: str, features: Iterable[str], backward: bool, arch: str):
    """The kernels that one kind of call launches."""
    from attn_ext._C import cuda as _cuda

    call = short_call(shape, dtype, tuple(features))
    decodes = call.seqlens_k is not None
    kernels = native_gpu.Kernels(_cuda, "cpu")
    for sm90 in (False, True) if arch == "90a" else (False,):
        device = (MULTIPROCESSORS if decodes else 1, sm90, SHARED_KIB[arch] * 1024)
        for direction in (False, True)[: 1 + (backward and not decodes)]:
            part, keys = "part" in features, "frozen_keys" not in features
            needs = Needs("frozen_queries" not in features, keys, keys)
            for kernel, threads, smem in kernels.launches(call, direction, device, part, needs):
                yield Wanted(kernel, arch, threads, smem)


def calls(preset, shapes, dtypes, features) -> list[tuple[str, str, tuple[str, ...]]]:
    """(shape, dtype, features) of all that was asked for; BadArgument where it makes no sense.
    features: of each kind of call its own."""
    for name in (name for kind in features for name in kind):
        if name not in FEATURES:
            raise BadArgument(f"--features must be among {', '.join(FEATURES)}, got {name!r}")
    if preset is not None and preset not in PRESETS:
        raise BadArgument(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    for dtype in dtypes:
        if dtype not in ("bf16", "fp16", "fp32"):
            raise BadArgument(f"--dtype must be bf16, fp16 or fp32 on cuda, got {dtype!r}")
    asked = [tuple(kind) for kind in features] or [()]
    kinds = [*PRESETS.get(preset, ()), *((shape, kind) for shape in shapes for kind in asked)]
    if not kinds:
        raise BadArgument("--preset or --shape must say what to compile")
    return [(shape, dtype, kind) for shape, kind in kinds for dtype in dtypes]


def here() -> list[str]:
    """The architecture of this machine's GPU."""

    if not torch.cuda.is_available():
        raise BadArgument("--arch must say what to compile for where there is no GPU")
    major, minor = torch.cuda.get_device_capability()
    known = [int(arch.rstrip("a")) for arch in SHARED_KIB]
    try:
        return [first_use.architecture(10 * major + minor, known)]
    except CompileError:  # older than the kernels, or newer than this table
        raise BadArgument(
            f"--arch must be among {', '.join(SHARED_KIB)}, and this machine's GPU has compute "
            f"capability {major}.{minor}"
        ) from None


def clear(as_json: bool) -> int:
    """Empty the cache."""
    folder = first_use.folder()
    try:
        count = cache.Cache(folder).clear() if folder else 0
    except OSError as error:
        raise BadArgument(f"the cache cannot be emptied: {error}") from None
    print(json.dumps({"cleared": count}) if as_json else f"{count} kernels taken away")
    return 0


def row(want: Wanted, found: first_use.Result, keep: Path | None) -> dict:
    """What the command says of one kernel."""
    binary, name = found.binary, want.kernel.split("<")[0]
    told = {
        "name": name, "flags": sources.flags_of(want.kernel, sources.root()),
        "arch": want.arch, "threads": want.threads,
        "registers": binary.resources.registers, "spilled_bytes": binary.resources.spilled_bytes,
        "shared_memory": want.shared_memory, "instructions": binary.instructions,
        "seconds": round(found.seconds, 3), "cached": found.cached,
    }  # fmt: skip
    if keep is not None:
        path = (
            keep / f"{re.sub(r'[^a-z0-9]+', '_', want.kernel.lower()).strip('_')}_{want.arch}.cubin"
        )
        path.write_bytes(binary.cubin)
        told["cubin"] = str(path)
    return told


def with_bar(wants: Iterable[Wanted]) -> Iterator[Wanted]:
    """The kernels one by one, with a progress bar where somebody looks."""
    if not sys.stderr.isatty():
        yield from wants
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    wants = list(wants)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(wants))
        for want in wants:
            told = sources.flags_of(want.kernel, sources.root()).replace("attn::ptx::", "")
            name = want.kernel.split("<")[0].removeprefix("attn::cuda::")
            progress.update(task, description=f"{name}<{told}> sm_{want.arch}")
            yield want
            progress.advance(task)


def run(archs, preset, shapes, dtypes, features, backward, keep, as_json) -> int:
    """Compile, and print a line a kernel; 0 when all compiled"""
    for arch in archs:
        if arch not in SHARED_KIB:
            raise BadArgument(f"--arch must be among {', '.join(SHARED_KIB)}, got {arch!r}")
    try:
        compiler = first_use.default()
    except CompileError as error:
        raise BadArgument(str(error)) from None
    for arch in archs:
        if int(arch.rstrip("a")) not in compiler.architectures:
            raise BadArgument(f"--arch {arch} is not known to NVRTC {compiler.nvrtc.version}")
    begin, rows = time.perf_counter(), []
    try:
        kinds = calls(preset, shapes, dtypes, features)
        wants = dict.fromkeys(
            want for arch in archs for kind in kinds for want in wanted(*kind, backward, arch)
        )
    except ValueError as error:
        raise BadArgument(f"--{error}") from None
    try:
        for want in with_bar(wants):
            found = compiler.get(want.kernel, want.arch)
            rows.append(row(want, found, keep))
            if found.binary.serialized:  # its products wait for one another: right, and slow
                print(f"{want.kernel} sm_{want.arch}: {found.binary.serialized}", file=sys.stderr)
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    for each in rows:
        print(f"{each['name']}<{each['flags']}> sm_{each['arch']}: {each['registers']} registers, "
              f"{each['spilled_bytes']} bytes spilled, {each['instructions']} instructions, "
              f"{'cached' if each['cached'] else str(each['seconds']) + ' s'}")  # fmt: skip
    fresh = sum(not each["cached"] for each in rows)
    print(f"{len(rows)} kernels, {fresh} compiled, in {time.perf_counter() - begin:.1f} s; "
          f"in {first_use.folder()}")  # fmt: skip
    return 0
