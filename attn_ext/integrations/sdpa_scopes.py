"""To which `replace_sdpa` a call of attention belongs, also one that runs in backward().

Each thread keeps the blocks that it is in; torch's own thread-local state, which autograd hands on
to its threads, names the thread that called backward().
What runs in backward() belongs to the block in which its forward ran, and that is read off the
autograd node at work, because a node knows its past whichever thread it runs in and however
backward() was reached:

- Node of a custom autograd.Function (reentrant checkpoint, reversible layers, custom operators):
  its context notes the block when it is made, and its backward, with the nodes that it makes in
  the thread that called backward(), runs in that block.  `mark_contexts` adds that to torch's base
  class of contexts.
- Other node that unpacks a saved tensor (checkpoint with use_reentrant=False): the unpack hook
  is wrapped when its saved_tensors_hooks are entered.
- Other node with a hook: nodes of a thread are numbered in the order of their making, and each
  block keeps the range of numbers made in it.

So a block holds without any help of the model, `torch.utils.checkpoint` itself is left as it is,
and nothing depends on whether backward() runs in a block, after it, or in another one.  A hook of
a leaf (a parameter) has no forward and belongs to where backward() is called.

Numbers are a thread's own.  So a hook of such a node is not in its block when backward() is called
in another thread than the one that built the graph, nor when so many blocks have ended since that
its own is forgotten: `lost` tells that it may be so.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import types
import weakref
from collections import deque
from typing import NamedTuple

import torch

_KEY = "attn_ext.replace_sdpa"
_MARK = "_attn_ext_replace_sdpa"
_LEAF = 2**63  # the least number of a leaf's node
_RANGES = 4096  # blocks of a thread whose nodes' hooks are still known
_has, _get, _set = torch._C._is_key_in_tls, torch._C._get_obj_in_tls, torch._C._stash_obj_in_tls
_task, _node = torch._C._current_graph_task_id, torch._C._current_autograd_node
_next_number = torch._C._autograd._get_sequence_nr


class Settings(NamedTuple):
    """What a `replace_sdpa` was given."""

    strict: bool
    backend: str


class Entry(NamedTuple):
    """One block that a thread is in, or a stretch that belongs to no block (settings None)."""

    settings: Settings | None
    task: int  # the backward() in which it was entered, -1 outside of any
    first: int  # the number of the first node made in it
    frame: types.FrameType | None = None  # of a compiled graph: it ends with this frame at last


class Thread:
    """The blocks of a thread, innermost last, (first, end, settings) of those that ended and of
    stretches of recomputation, and the last of the former that had to be forgotten.

    `entries` is replaced, never changed: autograd's threads read it while it is.
    """

    __slots__ = ("__weakref__", "ended", "entries", "forgotten", "recomputed")

    def __init__(self):
        self.entries: tuple = ()
        self.ended: deque = deque(maxlen=_RANGES)
        self.recomputed: deque = deque(maxlen=_RANGES)
        self.forgotten: tuple | None = None
        with _lock:
            _alive.add(self)


everywhere: list[Settings] = []  # of `enable()`, for threads that are in no block
_lock = threading.Lock()
_alive: weakref.WeakSet[Thread] = weakref.WeakSet()
_all_ended: deque = deque(maxlen=_RANGES)  # (thread, first, end, settings), of ended threads too
_local = threading.local()
_marking = False


def _own() -> Thread:
    """The record of the running thread."""
    thread = getattr(_local, "thread", None)
    if thread is None:
        thread = _local.thread = Thread()
    if _task() == -1 and not _has(_KEY):  # within backward() the state is put back at each node
        # torch 2.6 keeps a stashed object without counting its reference
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thread))
        _set(_KEY, thread)
    return thread


def enter(settings: Settings | None, frame=None) -> None:
    """Begin a block in this thread."""
    thread = _own()
    thread.entries = (*thread.entries, Entry(settings, _task(), _next_number(), frame))


def leave(settings: Settings | None, recomputed: bool = False) -> None:
    """End the innermost block with these settings, the very object; blocks begun later stay,
    stretches of a compiled graph that failed do not.  recomputed: a stretch of backward(), of
    which there may be many, so that blocks are not forgotten for it.
    """
    thread = _own()
    entries = thread.entries
    for index in range(len(entries) - 1, -1, -1):
        if entries[index].settings is settings:
            above = (e for e in entries[index + 1 :] if e.frame is None)
            thread.entries = (*entries[:index], *above)
            if entries[index].first == (end := _next_number()):
                return  # no node was made
            if recomputed:
                thread.recomputed.append((entries[index].first, end, settings))
            else:
                if len(thread.ended) == _RANGES and thread.ended[0][2] is not None:
                    thread.forgotten = thread.ended[0]
                thread.ended.append((entries[index].first, end, settings))
                if settings is not None:
                    with _lock:
                        _all_ended.append((thread, entries[index].first, end, settings))
            return


class within:
    """A stretch of this thread that belongs to the given block, or to none (None)."""

    def __init__(self, settings: Settings | None, recomputed: bool = False):
        self.settings, self.recomputed = settings, recomputed

    def __enter__(self):
        enter(self.settings)

    def __exit__(self, *error):
        leave(self.settings, self.recomputed)


def current() -> Settings | None:
    """The block to which what this thread computes now belongs; None outside of all."""
    thread = getattr(_local, "thread", None)
    entries = _running(thread) if thread is not None else ()
    task = _task()
    if entries and entries[-1].task == task:
        return entries[-1].settings
    node = _node() if task != -1 else None
    if node is None:
        return entries[-1].settings if entries else _switch()
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return getattr(node, _MARK, None)
    # one of autograd's threads has the state of the thread that called backward()
    caller = _get(_KEY) if _has(_KEY) else thread
    return _of_node(node._sequence_nr(), caller)


def lost() -> Settings | None:
    """The block that the node at work may have been made in, where `current()` finds none because
    backward() was called in another thread than the forward, or because it is forgotten."""
    task, thread = _task(), getattr(_local, "thread", None)
    node = _node() if task != -1 else None
    if node is None or isinstance(node, torch.autograd.function.BackwardCFunction):
        return None
    if thread is not None and thread.entries and thread.entries[-1].task == task:
        return None  # a hook of saved tensors, which knows that it is in no block
    caller = _get(_KEY) if _has(_KEY) else thread
    number = node._sequence_nr()
    if caller is not None and caller.forgotten is not None and number < caller.forgotten[1]:
        return caller.forgotten[2]
    with _lock:
        others = [each for each in _alive if each is not caller]
        ended = tuple(_all_ended)
    for maker, first, end, settings in ended:
        if maker is not caller and first <= number < end:
            return settings
    for each in others:
        for entry in each.entries:
            if entry.settings is not None and entry.first <= number < _LEAF:
                return entry.settings
    return None


def _switch() -> Settings | None:
    return everywhere[-1] if everywhere else None


def _of_node(number: int, thread: Thread | None) -> Settings | None:
    """The block in which a node without a mark was made.  Leaves' nodes have the largest number:
    they belong to the innermost block that backward() was called in.
    """
    switch = _switch()
    if thread is None:
        return switch
    entries = thread.entries
    for entry in reversed(entries):
        if number >= entry.first:
            return entry.settings
    ended = (*thread.ended, *thread.recomputed)
    held = [r for r in ended if r[0] <= number < r[1]]
    if held:
        return max(held, key=lambda r: r[0])[2]  # the innermost began last
    before = any(entry.settings is switch for entry in entries)  # made before enable()
    return None if before else switch


def _running(thread: Thread) -> tuple:
    """A thread's entries without those of compiled graphs that ended without saying so."""
    entries = thread.entries
    if not entries or entries[-1].frame is None:
        return entries
    running, frame = set(), sys._getframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    thread.entries = tuple(e for e in entries if e.frame is None or e.frame in running)
    return thread.entries


def open_in_graph(strict: bool, backend: str) -> None:
    """A node of a graph traced by torch.compile: what follows belongs to a block.

    A graph cannot hold a `try`.  So the stretch ends with `close_in_graph` or with the frame that
    runs the graph, whichever comes first: an error in the graph, or torch.compile trying this one
    node, leaves nothing behind.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in ("call_function", "run_node"):
        frame = frame.f_back  # of torch.fx.Interpreter, whose method `run` is what lasts
    enter(Settings(strict, backend), frame)


def close_in_graph() -> None:
    """A node of a graph: the stretch that `open_in_graph` began ends."""
    thread = _own()
    entries = _running(thread)
    if entries and entries[-1].frame is not None:
        thread.entries = entries[:-1]


def mark_contexts() -> None:
    """Let contexts of autograd.Functions and hooks of saved tensors note the block that they are
    made in, from now on.  What was made before is of no block.
    """
    global _marking
    with _lock:
        if _marking:
            return
        _marking = True
    contexts = torch.autograd.function.BackwardCFunction
    hooks = torch.autograd.graph.saved_tensors_hooks
    init, apply, enter_hooks = contexts.__init__, contexts.apply, hooks.__enter__

    @functools.wraps(init)
    def marked_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        settings = current()
        if settings is not None:
            setattr(self, _MARK, settings)

    @functools.wraps(apply)
    def carrying_apply(self, *args):
        settings, thread = getattr(self, _MARK, None), getattr(_local, "thread", None)
        if settings is None and (thread is None or not thread.entries):
            return apply(self, *args)
        if _has(_KEY) and _get(_KEY) is not thread:
            return apply(self, *args)  # in a thread of autograd, whose numbers are its own
        with within(settings, recomputed=True):  # the nodes that a recomputation makes, too
            return apply(self, *args)

    @functools.wraps(enter_hooks)
    def carrying_enter(self):
        unpack = self.unpack_hook
        if torch.compiler.is_dynamo_compiling():
            return enter_hooks(self)
        self.unpack_hook = _carried(current(), unpack)
        try:
            return enter_hooks(self)
        finally:
            self.unpack_hook = unpack

    contexts.__init__, contexts.apply = marked_init, carrying_apply
    hooks.__enter__ = carrying_enter
    from attn_ext.ops import autograd

    for own in (autograd.EagerAttention, autograd.RememberedAttention):
        own._backward_cls.apply = apply  # their backward calls no attention of torch


def _carried(settings: Settings | None, function):
    """`function`, whose calls belong to the block."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with within(settings):
            return function(*args, **kwargs)

    return run
