"""The cache of compiled kernels where the disk is full, the folder cannot be written to, files are
damaged, and processes are killed or start together.  No compiler runs here: a stand-in's kernels
are a few bytes.
"""

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import types
from pathlib import Path

import pytest

from attn_ext.backends.jit import cache, first_use, nvrtc, sources
from attn_ext.cli import compile as command
from attn_ext.cli.errors import BadArgument

EXPRESSION = "attn::cuda::sm80::combine<float>"
LIMIT = 60  # seconds that a process may take to end
FORK = multiprocessing.get_context("fork")


class Standin:
    """In place of Nvrtc.  during: what happens while it compiles."""

    version = (13, 0)

    def __init__(self, during=lambda: None):
        self.during, self.count = during, 0

    def compile(self, text, expression, options, headers):
        self.count += 1
        self.during()
        return nvrtc.Binary("symbol", b".ptx", expression.encode() * 400, "Used 3 registers")


def get(folder: Path, standin: Standin | None = None) -> first_use.Result:
    """The kernel, as a process gets it that has just started."""
    compiler = first_use.Compiler(standin or Standin(), sources.root(), cache.Cache(folder))
    return compiler.get(EXPRESSION, "80")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# ---- what cannot be written ---------------------------------------------------------------------
class Full:
    """A file on a disk that has no room from some point on."""

    def __init__(self, file, fails):
        self.file, self.fails = file, fails

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.fails == "close":
            no_space()

    def write(self, data):
        self.file.write(data[: len(data) // 2] if self.fails == "write" else data)
        if self.fails == "write":
            no_space()


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails", ["mkdir", "mkstemp", "write", "close", "replace"])
def test_no_room_at_any_point(tmp_path, monkeypatch, fails):
    """A full disk that costs the call, or leaves a part of a file."""
    folder, fdopen = tmp_path / "kernels", os.fdopen
    with monkeypatch.context() as full:
        if fails == "mkdir":
            full.setattr(Path, "mkdir", no_space)
        elif fails == "mkstemp":
            full.setattr(cache.tempfile, "mkstemp", no_space)
        elif fails == "replace":
            full.setattr(os, "replace", no_space)
        else:
            full.setattr(os, "fdopen", lambda *a: Full(fdopen(*a), fails))
        found = get(folder)
        assert not found.cached and found.binary.name == "symbol"
    assert files(tmp_path) == []
    assert not get(folder).cached and get(folder).cached  # there is room again


def in_process(work, *arguments) -> int:
    """The exit code of a process that does the work."""
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join(LIMIT)
    assert not process.is_alive(), "it does not end"
    return process.exitcode


def short_of_space(folder: Path, limit: int):
    """The system itself refuses to write more than `limit` bytes of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert not get(folder).cached
    assert files(folder) == []


@pytest.mark.parametrize("limit", [0, 1000])
def test_the_system_writes_no_more(tmp_path, limit):
    """The same by the system's own refusal, after none or some of the bytes."""
    assert in_process(short_of_space, tmp_path / "kernels", limit) == 0


def test_folders_that_cannot_be_written():
    """A read-only container, also for the user who may write everywhere: no folder can be made in
    /proc; a file stands where the folder should be."""
    for folder in (Path("/proc/attn_ext"), Path("/dev/null/kernels")):
        assert not get(folder).cached
        assert cache.Cache(folder).size() == (0, 0)
        assert cache.Cache(folder).clear() == 0


# ---- what is damaged ----------------------------------------------------------------------------
def test_damaged_files(tmp_path):
    """A file that is loaded although it is not whole, is another version's or holds nothing; one
    that stays damaged."""
    assert not get(tmp_path).cached
    (path,) = files(tmp_path)
    good = path.read_bytes()
    head = len(cache.MARK)
    damage = {
        "empty": b"", "the mark alone": good[:head], "no body": good[: head + 32],
        "cut": good[:-1], "half": good[: len(good) // 2], "longer": good + b"\0",
        "zeros": bytes(len(good)), "a zeroed page": good[:64] + bytes(100) + good[164:],
        "another version": b"attn_ext kernel 0\n" + good[head:],
        "another digest": good[:head] + bytes(32) + good[head + 32 :],
        "one bit": good[:-9] + bytes([good[-9] ^ 64]) + good[-8:],
        "text": b"<html>404</html>",
    }  # fmt: skip
    for name, data in damage.items():
        path.write_bytes(data)
        assert not get(tmp_path).cached, name
        assert path.read_bytes() == good and get(tmp_path).cached, name


def test_what_is_no_file(tmp_path, monkeypatch, capsys):
    """A folder or a dangling link in the place of a file: the call goes on, and --clear says in one
    line what it cannot take away."""
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "kernels"
    get(folder)
    (path,) = files(folder)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert not get(folder).cached and get(folder).cached
    path.unlink()
    path.mkdir()
    assert not get(folder).cached
    with pytest.raises(BadArgument, match=rf"cannot be emptied: .*{path.name}"):
        command.clear(True)
    path.rmdir()
    assert command.clear(True) == 0 and json.loads(capsys.readouterr().out) == {"cleared": 0}
    assert files(folder) == []  # what was left of the write that failed


# ---- processes ----------------------------------------------------------------------------------
def hang(pipe):
    """Tell that the place is reached, and go no further."""
    pipe.send(b"here")
    while True:
        signal.pause()


def compile_until(folder: Path, place: str, pipe):
    """A process that comes as far as `place`."""
    if place == "compile":
        get(folder, Standin(lambda: hang(pipe)))
    elif place == "write":
        os.replace = lambda *_: hang(pipe)
        get(folder)
    else:
        get(folder)
        hang(pipe)


@pytest.mark.parametrize("place", ["compile", "write", "after"])
def test_a_killed_compile(tmp_path, place):
    """A process that is killed, and leaves what others wait for, load, or never take away."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=compile_until, args=(tmp_path, place, there))
    process.start()
    assert here.poll(LIMIT), "it does not come so far"
    process.kill()
    process.join(LIMIT)
    left = [path for path in files(tmp_path) if path.name.endswith(cache.NEW)]
    assert len(left) == (place == "write")
    assert get(tmp_path).cached == (place == "after") and get(tmp_path).cached
    assert cache.Cache(tmp_path).size()[0] == 1
    for path in left:  # an hour later the next who writes takes it away
        os.utime(path, (1, 1))
        cache.Cache(tmp_path).put("ab", nvrtc.Binary("n", b"", b"", ""))
        assert not path.exists()


def use_backend(folder: Path, barrier, results):
    """A call on the driver without a GPU, whose kernels come from a cache that others use, too."""
    from fake_driver import Kernels, driver, elf_of

    from attn_ext._C import cuda as _cuda
    from attn_ext.testing import random_call

    compiled = []

    def compile_one(text, expression, options, headers):
        compiled.append(expression)
        return nvrtc.Binary(expression, b"", elf_of(expression), "")

    standin = types.SimpleNamespace(version=(13, 0), compile=compile_one)
    compiler = first_use.Compiler(standin, sources.root(), cache.Cache(folder))

    def image(kernel, capability):
        binary = compiler.get(kernel, str(capability)).binary
        return binary.name, binary.cubin

    with driver(80, runs=False) as fake:
        _cuda.set_compile(image)
        barrier.wait(LIMIT)
        Kernels().forward(random_call(1, head_dim=32))
        results.put((compiled, fake.calls("cuLaunchKernel")))


def test_processes_that_start_together(tmp_path):
    """Four processes on one empty cache, as torchrun starts them: one that fails, or compiles a
    kernel twice; a fifth that compiles although all is there."""
    pytest.importorskip("attn_ext._emulated", reason="the driver without a GPU needs it")
    from fake_driver import library

    library()  # once, and not by each process
    results = FORK.Queue()
    for count in (4, 1):
        barrier = FORK.Barrier(count)
        processes = [
            FORK.Process(target=use_backend, args=(tmp_path, barrier, results))
            for _ in range(count)
        ]
        for each in processes:
            each.start()
        found = [results.get(timeout=LIMIT) for _ in processes]
        for each in processes:
            each.join(LIMIT)
        assert [each.exitcode for each in processes] == [0] * count
        assert all(launches == 1 for _, launches in found)
        compiles = [len(compiled) for compiled, _ in found]
        assert max(compiles) <= 1 and (max(compiles) == 1) == (count == 4), compiles
    assert len(files(tmp_path)) == 1


# ---- what is told -------------------------------------------------------------------------------
def test_a_first_compile_is_told_once(tmp_path, monkeypatch, caplog):
    """Seconds of silence at the first call; the same advice at each kernel."""
    compiler = first_use.Compiler(Standin(), sources.root(), cache.Cache(tmp_path))
    compiler.architectures = (80, 90)
    monkeypatch.setattr(first_use, "default", lambda driver: compiler)
    monkeypatch.setattr(logging.getLogger("attn_ext"), "propagate", True)
    caplog.set_level(logging.INFO, "attn_ext")
    first_use._tell.cache_clear()
    for expression in (EXPRESSION, EXPRESSION, "attn::cuda::sm80::backward_delta<float>"):
        first_use.image(expression, 86)
    advice = [text for text in caplog.messages if "`attn-ext compile`" in text]
    assert len(advice) == 1 and str(first_use.folder()) in advice[0]
    told = [text for text in caplog.messages if text.startswith("compiled")]
    assert [text.split(" in ")[0] for text in told] == [
        f"compiled {EXPRESSION} for sm_80",
        "compiled attn::cuda::sm80::backward_delta<float> for sm_80",
    ]


def test_a_second_run_reads_each_source_once(tmp_path, monkeypatch):
    """Sources that are read anew for each kernel, which took most of a second run's time; and, in a
    process, a source that is edited and counts as it was."""
    for path in (sources.root() / "cuda").rglob("*.*h"):
        target = tmp_path / "csrc" / path.relative_to(sources.root())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    read, original = [], Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda p, *a, **k: read.append(p) or original(p, *a, **k)
    )
    root, standin = tmp_path / "csrc", Standin()
    kernels = [sources.kernel(f"attn::cuda::{space}::{name}<>", "80")
               for space, names in sources.HEADERS.items() for name in names]  # fmt: skip
    keys = [first_use.key_of(standin, each, root) for each in kernels]
    assert len(read) == len(set(read)) > len(kernels)
    (root / kernels[0].header).write_text("int edited;")
    assert first_use.key_of(standin, kernels[0], root) != keys[0]


def test_an_edit_during_a_compile_is_not_kept(tmp_path):
    """Machine code of new sources under the digest of old ones."""
    header = tmp_path / "csrc" / sources.kernel(EXPRESSION, "80").header
    header.parent.mkdir(parents=True)
    header.write_text("int before;")
    store, edited = cache.Cache(tmp_path / "kernels"), []

    def edit():
        if not edited:
            edited.append(header.write_text("int behind_it;"))

    for count in (0, 1):
        compiler = first_use.Compiler(Standin(edit), tmp_path / "csrc", store)
        assert not compiler.get(EXPRESSION, "80").cached
        assert store.size()[0] == count
