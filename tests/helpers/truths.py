"""The reference's results, computed once for all backends, instruction sets and modes of the
emulator that meet the same call: it takes ten times as long as a kernel.
"""

import hashlib
from collections import OrderedDict

import torch

from attn_ext import testing

MOST_BYTES = 128 << 20  # of what is remembered


def _parts(x):
    """Tensors and other values in a nest of tuples, None left in its place."""
    if isinstance(x, tuple):
        for each in x:
            yield from _parts(each)
    else:
        yield x


def key_of(*arguments) -> bytes:
    """A digest of values: of tensors dtype, shape and what they hold."""
    total = hashlib.blake2b(digest_size=16)
    for x in _parts(arguments):
        if isinstance(x, torch.Tensor):
            flat = x.detach().contiguous().flatten()
            total.update(f"{x.dtype} {tuple(x.shape)} {x.device}".encode())
            total.update(flat.view(torch.uint8).cpu().numpy() if flat.numel() else b"")
        else:
            total.update(repr(x).encode())
        total.update(b"|")
    return total.digest()


class Remembered:
    """A function of tensors that forgets what was not asked for longest."""

    def __init__(self, function):
        self.function, self.found, self.size = function, OrderedDict(), 0

    def __call__(self, *arguments):
        key = key_of(*arguments)
        if key in self.found:
            self.found.move_to_end(key)
            return self.found[key]
        results = self.found[key] = self.function(*arguments)
        self.size += _bytes(results)
        while self.size > MOST_BYTES and len(self.found) > 1:
            self.size -= _bytes(self.found.popitem(last=False)[1])
        return results


def _bytes(results) -> int:
    return sum(x.nbytes for x in _parts(results) if isinstance(x, torch.Tensor))


def remember() -> None:
    """From now on `check_call` asks the reference once for each call."""
    if not isinstance(testing.referred, Remembered):
        testing.referred = Remembered(testing.referred)
