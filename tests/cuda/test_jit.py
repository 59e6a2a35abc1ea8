"""attn_ext.backends.jit: kernels by NVRTC, and the files that keep them.

What kernels take is the matter of test_machine_code.py, what they compute of test_ptx.py.
"""

import errno
import json
import multiprocessing
import os
import stat
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from repository import ROOT

from attn_ext.backends import jit
from attn_ext.backends.jit import cache, first_use, nvrtc, sources
from attn_ext.cli import compile as command
from attn_ext.cli.errors import BadArgument

CSRC = ROOT / "csrc"
COMBINE = sources.kernel("attn::cuda::sm80::combine<attn::ptx::bf16>", "80")
BINARY = nvrtc.Binary("_Zname", b".version 9.0", bytes(range(256)) * 3, "Used 3 registers")

needs_nvrtc = pytest.mark.skipif(jit.find() is None, reason="nvidia-cuda-nvrtc is not installed")


@needs_nvrtc
def test_an_error_names_the_kernel_and_the_line(tmp_path):
    """A source that does not compile."""
    (tmp_path / "cuda/sm80").mkdir(parents=True)
    (tmp_path / COMBINE.header).write_text("int broken = missing;\n")
    with pytest.raises(jit.CompileError, match=r"combine<.*does not compile(.|\n)*missing"):
        jit.compile_kernel(jit.find(), COMBINE, tmp_path)


@needs_nvrtc
def test_a_kernel_is_compiled_once(tmp_path, monkeypatch):
    """A key that changes from call to call, or that does not with the sources."""
    store, count = cache.Cache(tmp_path / "cache"), []
    compile_one = nvrtc.Nvrtc.compile
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda *a: count.append(1) or compile_one(*a))
    first = jit.compile_kernel(jit.find(), COMBINE, CSRC, store)
    assert jit.compile_kernel(jit.find(), COMBINE, CSRC, store) == first and len(count) == 1


def test_a_changed_header_is_another_key(tmp_path):
    """An included file that the digest leaves out."""
    (tmp_path / "cuda").mkdir()
    kernel = sources.Kernel("k<1>", "80", "cuda/a.cuh")
    (tmp_path / "cuda/a.cuh").write_text('#include "../b.h"\n')
    (tmp_path / "b.h").write_text("1")
    before = cache.digest(sources.contents(kernel, tmp_path))
    (tmp_path / "b.h").write_text("2")
    assert cache.digest(sources.contents(kernel, tmp_path)) != before


def test_what_no_library_is_there_for(monkeypatch, tmp_path):
    """NVRTC that is not installed, and one that does not load."""
    monkeypatch.setenv("ATTN_EXT_NVRTC", str(tmp_path / "libnvrtc.so.13"))
    assert nvrtc.find.__wrapped__() is None
    (tmp_path / "libnvrtc.so.13").write_text("no library")
    assert nvrtc.find.__wrapped__() is None


def test_every_kernel_has_its_header():
    """A kernel that was renamed."""
    for space, kernels in sources.HEADERS.items():
        for name, header in kernels.items():
            assert f"void {name}(" in (CSRC / "cuda" / header).read_text(), (space, name)
    with pytest.raises(ValueError, match=r"nothing<1> is no kernel of csrc/cuda"):
        sources.kernel("attn::cuda::sm80::nothing<1>", "80")


# ---- the files ----------------------------------------------------------------------------------
def test_cache_gives_back_what_it_got(tmp_path):
    store = cache.Cache(tmp_path)
    assert store.get("ab12") is None
    store.put("ab12", BINARY)
    assert store.get("ab12") == BINARY
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["ab12"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "longer"])
def test_a_damaged_file_counts_as_absent(tmp_path, damage):
    """A full disk, a crash of the machine, another version's file."""
    store = cache.Cache(tmp_path)
    store.put("ab12", BINARY)
    path = tmp_path / "ab" / "ab12"
    data = path.read_bytes()
    changed = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
    path.write_bytes(
        {"cut": data[:-5], "changed": changed, "empty": b"", "longer": data + b"x"}[damage]
    )
    assert store.get("ab12") is None
    store.put("ab12", BINARY)
    assert store.get("ab12") == BINARY


def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path):
    """A read-only container; a file where the folder should be."""
    (tmp_path / "file").write_text("")
    store = cache.Cache(tmp_path / "file" / "cache")
    store.put("ab12", BINARY)
    assert store.get("ab12") is None
    if os.geteuid():  # who may do anything may write there
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
        cache.Cache(tmp_path / "locked").put("ab12", BINARY)


def _write(folder, count):
    for _ in range(count):
        cache.Cache(folder).put("ab12", BINARY)


def test_a_full_disk_and_a_killed_writer_leave_nothing(tmp_path, monkeypatch):
    """Half a file that is read, a call that fails for its cache, files that pile up."""
    store = cache.Cache(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(cache, "pack", _no_space)
        store.put("ab12", BINARY)
    assert store.get("ab12") is None and store.size() == (0, 0)
    left = tmp_path / "ab" / f".killed{cache.NEW}"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    store.put("ab34", BINARY)
    assert store.get("ab34") == BINARY and not left.exists()


def _no_space(binary):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_cache_is_bounded_and_can_be_emptied(tmp_path):
    """A folder that grows for ever, or loses what was used last."""
    size = len(cache.pack(BINARY))
    store = cache.Cache(tmp_path, limit=3 * size)
    for index, key in enumerate(("ab1", "ab2", "ab3")):
        store.put(key, BINARY)
        os.utime(tmp_path / "ab" / key, (index + 1, index + 1))
    assert store.get("ab1") == BINARY  # used now
    store.put("cd4", BINARY)
    assert store.size() == (3, 3 * size)
    assert store.get("ab2") is None and store.get("ab1") == BINARY
    assert store.clear() == 3 and store.size() == (0, 0)


def test_architectures():
    """Hopper's own instructions left out; machine code of another major version."""
    known = (75, 80, 86, 89, 90, 100, 103, 120)
    found = [first_use.architecture(each, known) for each in (80, 86, 87, 89, 90, 101, 121)]
    assert found == ["80", "86", "86", "89", "90a", "100", "120"]
    with pytest.raises(nvrtc.CompileError, match=r"capability 7\.5"):
        first_use.architecture(75, known)


def test_what_keeps_compiled_kernels_from_running():
    """A reason that names no remedy; a driver of the same major version refused."""
    compiler = types.SimpleNamespace(version=(13, 0))
    assert first_use.problem(13000, compiler) == "" == first_use.problem(14000, compiler)
    assert "cu12" in first_use.problem(12040, compiler)
    assert "pip install nvidia-cuda-nvrtc" in first_use.problem(13000, None)


@needs_nvrtc
def test_first_use_compiles_once_and_mends_a_broken_file(tmp_path, monkeypatch):
    """Two threads that compile one kernel twice; a corrupted file that is loaded or stays."""
    count, compile_one = [], nvrtc.Nvrtc.compile
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda *a: count.append(1) or compile_one(*a))
    store = cache.Cache(tmp_path)

    def make(_=None):
        return first_use.Compiler(jit.find(), CSRC, store).get(COMBINE.expression, "80")

    shared = first_use.Compiler(jit.find(), CSRC, store)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: shared.get(COMBINE.expression, "80"), range(4)))
    assert len(count) == 1 and make().cached
    (path,) = [each for each in tmp_path.glob("??/*") if each.is_file()]
    path.write_bytes(path.read_bytes()[:-1])
    assert not make().cached and len(count) == 2 and make().cached


def test_instructions_of_an_elf_file():
    """Padding that counts, a section of data that counts."""
    nop, add = (0x918).to_bytes(16, "little"), (0x210).to_bytes(16, "little")
    code, begin = add * 3 + nop * 2, 64

    def section(flags):
        return bytes(8) + b"".join(n.to_bytes(8, "little") for n in (flags, 0, begin, len(code))) \
            + bytes(24)  # fmt: skip

    head = bytearray(64)
    head[40:48] = (begin + len(code)).to_bytes(8, "little")
    head[58:60], head[60:62] = (64).to_bytes(2, "little"), (2).to_bytes(2, "little")
    assert nvrtc.instructions(bytes(head) + code + section(6) + section(2)) == 3


def test_processes_that_write_at_once(tmp_path):
    """A reader that sees a part of a file."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, 50)) for _ in range(2)]
    _write(tmp_path, 1)
    for each in writers:
        each.start()
    seen_values = {cache.Cache(tmp_path).get("ab12") for _ in range(100)}
    for each in writers:
        each.join()
    assert seen_values == {BINARY} and all(each.exitcode == 0 for each in writers)


# ---- the command --------------------------------------------------------------------------------
@needs_nvrtc
def test_the_command_compiles_keeps_and_clears(tmp_path, monkeypatch, capsys):
    """A launch that the list leaves out; a second run that compiles again; a field that is gone."""
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(tmp_path))
    asked = (["86"], None, ["1,2,64,32"], ["bf16"], [["causal"]], False, tmp_path, True)

    def run():
        first_use.default.cache_clear()
        assert command.run(*asked) == 0
        (row,) = json.loads(capsys.readouterr().out)
        return row

    first, second = run(), run()
    assert set(first) == {
        "name", "flags", "arch", "threads", "registers", "spilled_bytes", "shared_memory",
        "instructions", "seconds", "cached", "cubin",
    }  # fmt: skip
    assert first["name"] == "attn::cuda::sm80::forward_plain"
    assert not first["cached"] and second["cached"] and first["instructions"] > 500
    assert Path(first["cubin"]).read_bytes()[:4] == b"\x7fELF"
    assert command.clear(True) == 0 and json.loads(capsys.readouterr().out) == {"cleared": 1}
    first_use.default.cache_clear()


def test_a_kernel_that_does_not_compile(monkeypatch, capsys):
    """A traceback, or a success, where NVRTC's words and a request to report them belong; the same
    of a warning of ptxas that products wait for one another."""
    log = "1 bytes spill stores, 2 bytes spill loads\nUsed 3 registers\n(C7510) wgmma serialized"
    binary = nvrtc.Binary("k", b"", bytes(64), log)
    results = [first_use.Result(binary, 0.0, False), jit.CompileError("line 3: please report")]

    def get(kernel, arch):
        found = results.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    standin = types.SimpleNamespace(get=get, architectures=(80,))
    monkeypatch.setattr(first_use, "default", lambda: standin)
    asked = (["80"], None, ["1,2,64,32"], ["bf16"], [], True, None, False)
    assert command.run(*asked) == 1
    warned, failed = capsys.readouterr().err.splitlines()
    assert "forward_plain<attn::ptx::bf16, 32> sm_80: (C7510) wgmma serialized" in warned
    assert failed == "line 3: please report"


def test_the_progress_bar(monkeypatch, capsys):
    """A bar in a log of a container's build; none for who looks at a terminal."""
    wants = list(command.wanted("1,2,64,32", "bf16", (), False, "80"))
    assert list(command.with_bar(wants)) == wants and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(command.with_bar(wants)) == wants
    assert "sm80::forward_plain<bf16, 32> sm_80" in capsys.readouterr().err


def test_what_the_command_refuses():
    """A misspelt architecture, preset, feature or dtype that compiles nothing in silence."""
    good = {"archs": ["80"], "preset": None, "shapes": ["1,2,64,32"], "dtypes": ["bf16"],
            "features": [], "backward": False, "keep": None, "as_json": True}  # fmt: skip
    wrong = {"archs": ["70"], "preset": "llm", "features": [["causl"]], "dtypes": ["int8"],
             "shapes": []}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(BadArgument, match=name.rstrip("s")[:5]):
            command.run(**{**good, name: value})


@pytest.mark.parametrize("capability", [(7, 5), (13, 0)])
def test_a_gpu_that_no_kernel_is_compiled_for(monkeypatch, capability):
    """A traceback in place of a line about --arch, on a GPU that is too old or not known yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(
        BadArgument, match=rf"--arch must be among 80, .*{capability[0]}\.{capability[1]}"
    ):
        command.here()


@needs_nvrtc
def test_every_preset_names_its_kernels():
    """A preset whose calls cannot be made."""
    for name in command.PRESETS:
        for shape, dtype, features in command.calls(name, [], ["bf16"], []):
            assert list(command.wanted(shape, dtype, features, True, "90a")), (name, features)
