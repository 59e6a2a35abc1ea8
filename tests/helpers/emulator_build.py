"""The emulator's objects, compiled once in a run of pytest for all programs that link them."""

import functools
import os
import platform
import subprocess

import seen
from repository import ROOT

FLAGS = ["-O1", "-std=c++17", "-w", "-Wno-psabi", "-fno-strict-aliasing", "-pthread",
         "-DATTN_EMULATED"]  # fmt: skip
SOURCES = [p for p in sorted(ROOT.glob("csrc/emulation/*.cpp")) if p.stem != "bindings"]


def compiler(*arguments) -> None:
    """The C++ compiler, which must succeed."""
    command = [os.environ.get("CXX", "c++"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-3000:]}"


@functools.cache
def compiler_version() -> str:
    """Of the C++ compiler, and the machine that it compiles for."""
    command = [os.environ.get("CXX", "c++"), "-dumpfullversion", "-dumpversion"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return f"{done.stdout.strip()} {platform.machine()}"


def emulator(factory) -> list:
    """The objects, by name; factory: the fixture tmp_path_factory.  The emulator checks itself what
    it is given, so that no sanitizer needs other ones."""

    def build(folder):
        for source in SOURCES:
            compiler(*FLAGS, "-O2", "-c", source, "-o", folder / f"{source.stem}.o")

    return sorted(seen.once(seen.shared_folder(factory) / "emulator", build).glob("*.o"))
