"""Where the CUDA kernels run, as a fixture: on the emulated device in each of its modes, and on a
GPU where there is one; and the Hopper kernels, on a Hopper GPU.
"""

import zlib

import pytest
import torch

from attn_ext.backends import registry
from attn_ext.backends.native import point
from attn_ext.core.layout import strides as strides_of
from attn_ext.testing import check_call, random_call

if "emulated" in registry.ORDER:
    emulated = registry.get("emulated")
    BACKENDS = [("emulated", mode) for mode in emulated.MODES]
else:
    BACKENDS = []
PLACES = [(name, "cpu", mode) for name, mode in BACKENDS]
if registry.get("cuda").available() == "":
    PLACES.append(("cuda", "cuda", ""))
    if torch.cuda.get_device_capability() == (9, 0):
        BACKENDS.append(("cuda", ""))


@pytest.fixture(
    params=PLACES or [None], ids=lambda p: "-".join(filter(None, p[::2])) if p else "none built"
)
def place(request):
    """(name of a backend, device, mode of the emulator or ""), in that mode."""
    if request.param is None:
        pytest.skip("neither attn_ext._emulated (ATTN_EXT_EMULATED=1) nor a GPU is here")
    name, _, mode = request.param
    if mode:
        registry.get(name).set_mode(mode, 1)
    return request.param


class Hopper:
    """A backend that takes the Hopper kernel wherever that serves a call."""

    def __init__(self, name, mode, seed):
        self.name, self.module = name, registry.get(name)
        self.device = "cpu" if mode else "cuda"
        self.kernels = self.module._kernels()
        self.before = self.kernels.sm90, dict(self.kernels._devices)
        self.kernels.sm90 = True
        # one multiprocessor: no call is small enough to be split
        self.kernels._devices[0] = (1, True)
        if mode:
            self.module.set_mode(mode, seed)

    def restore(self):
        self.kernels.sm90, self.kernels._devices = self.before

    def call(self, seed=1, **options):
        options = {"dtype": torch.bfloat16, "heads_q": 4, "heads_k": 2, "batch": 1, **options}
        return random_call(seed, device=self.device, **options)

    def kernel(self, call):
        """Which kernel a call gets."""
        out = torch.empty(*call.q.shape[:-1], call.v.shape[-1], dtype=call.q.dtype)
        lse = torch.empty(call.q.shape[:3])
        native = self.kernels._native(call, self.kernels._canonical(call), out, lse)
        if call.need_stats:
            point(native, max_logit=lse, entropy=lse)
        return native.forward_kernel(1, True)

    def backward_kernel(self, call, dout=None):
        """The same of backward; dout: as O where None."""
        out = torch.empty(*call.q.shape[:-1], call.v.shape[-1], dtype=call.q.dtype)
        lse = torch.empty(call.q.shape[:3])
        native = self.kernels._native(call, self.kernels._canonical(call), out, lse)
        dout = out if dout is None else dout
        strides = strides_of(dout, call.cu_seqlens_q is not None)
        native.set_gradients(strides, *[(0, 0, 0)] * 3, (0, 0, 0, 0), call.deterministic)
        point(native, dout=dout, dq=out, dk=call.k, dv=call.v)
        return native.backward_kernel(1, True)

    def check(self, call, grads=False):
        assert self.kernel(call) == "sm90"
        assert not grads or self.backward_kernel(call) == "sm90"
        check_call(call, self.module, grads=grads)


@pytest.fixture(
    params=BACKENDS or [None], ids=lambda p: "-".join(filter(None, p)) if p else "none built"
)
def hopper(request):
    if request.param is None:
        pytest.skip("neither attn_ext._emulated (ATTN_EXT_EMULATED=1) nor a Hopper GPU is here")
    found = Hopper(*request.param, zlib.crc32(request.node.name.encode()))
    yield found
    found.restore()
