"""The CUDA backend on a driver without a GPU (tests/helpers/fake_driver): what it compiles,
loads and launches, in which context and stream, and what it says when something fails.
"""

import logging
import re
import threading
from pathlib import Path

import pytest
import torch
from repository import ROOT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from fake_driver import Kernels, driver

from attn_ext import _emulated
from attn_ext._C import cuda as _cuda
from attn_ext.backends import jit
from attn_ext.backends.jit import first_use
from attn_ext.core.schema import Needs
from attn_ext.testing import check_call, needs_of, random_call

HEADER = Path("/usr/local/cuda/include/cuda.h")
LIMIT = 300  # seconds that threads may take, compilers included
needs_nvrtc = pytest.mark.skipif(jit.find() is None, reason="nvidia-cuda-nvrtc is not installed")
PLAIN = {"dtype": torch.bfloat16, "head_dim": 32, "heads_q": 2, "heads_k": 2, "batch": 1,
         "seqlen_q": 140, "seqlen_k": 70}  # fmt: skip


@pytest.fixture(autouse=True)
def machine():
    _emulated.set_mode("plain", seed=1, smem_limit=227 * 1024)


@needs_nvrtc
def test_forward_and_backward():
    """A parameter block that g++ and NVRTC lay out otherwise; a kernel that is compiled, or loaded,
    at each call; the slow pair of backward kernels where the call is not deterministic."""
    with driver() as fake:
        kernels = Kernels()
        check_call(random_call(1, **PLAIN), kernels, grads=True)
        launches, loads = fake.calls("cuLaunchKernel"), fake.calls("cuModuleLoadData")
        assert [re.search(r"sm80::(\w+)", name)[1] for name, _ in fake.compiled] == [
            "forward_plain", "backward_delta", "clear_dq", "backward_fused", "convert_dq",
            "backward_far_queries", "backward_far_keys",
        ]  # fmt: skip
        assert loads == 7
        assert fake.calls("cuFuncSetAttribute") == 1  # 65 KiB, of the fused one
        check_call(random_call(2, **PLAIN), kernels, grads=True)
        assert fake.calls("cuLaunchKernel") == 2 * launches
        assert fake.calls("cuModuleLoadData") == loads
        assert fake.calls("cuFuncSetAttribute") == 1
        assert fake.lib.fake_depth() == 0  # no context is left behind in this thread


@needs_nvrtc
def test_threads_devices_and_streams():
    """A context that is current in the first thread alone, or is that of another device."""
    call, failures = random_call(1, **PLAIN), []
    with driver(80, 80) as fake:
        streams = [fake.lib.fake_stream(i, 0) for i in range(2)]

        def work(index):
            try:
                check_call(call, Kernels(index % 2, streams[index % 2]), grads=False)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(LIMIT)
        assert not any(each.is_alive() for each in threads), "threads wait for each other"
        assert not failures, failures
        assert fake.calls("cuDevicePrimaryCtxRetain") == 2
        assert 2 <= len(fake.compiled) <= 4  # each device has its own
        assert fake.calls("cuModuleLoadData") == 2  # of two threads, one loads


def test_capture():
    """A kernel that is loaded while a graph is captured; one used before that is refused."""
    call = random_call(1, **PLAIN)
    with driver(80, runs=False) as fake:
        stream = fake.lib.fake_stream(0, 1)
        with pytest.raises(RuntimeError, match=r"captured.*forward_plain.*once before the capture"):
            Kernels(0, stream).forward(call)
        fake.lib.fake_capture(stream, 0)
        Kernels(0, stream).forward(call)
        fake.lib.fake_capture(stream, 1)
        Kernels(0, stream).forward(call)
        assert fake.lib.fake_captured(stream) == 1


@needs_nvrtc
def test_the_way_that_ships(tmp_path, monkeypatch, caplog):
    """What attn_ext itself sets as the compiler: a wrong version or architecture, a kernel that is
    compiled again by the next process, a compile that nobody hears of."""
    monkeypatch.setenv("ATTN_EXT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("attn_ext"), "propagate", True)
    caplog.set_level(logging.INFO, "attn_ext")
    call, told = random_call(1, **PLAIN), []
    try:
        for _ in range(2):  # as in two processes, one after the other
            first_use.default.cache_clear()
            caplog.clear()
            with driver(80, shipped=True) as fake:
                for _ in range(2):
                    check_call(call, Kernels(), grads=False)
                assert fake.calls("cuModuleLoadData") == 1 and fake.calls("cuLaunchKernel") == 2
            told.append([text for text in caplog.messages if text.startswith("compiled")])
    finally:
        first_use.default.cache_clear()
    assert len(told[0]) == 1 and not told[1]
    assert re.search(r"forward_plain<attn::ptx::bf16, 32> for sm_80 in", told[0][0])


# ---- launches that are checked and not computed -------------------------------------------------
def test_first_use_beside_a_capture():
    """A kernel that is loaded on one stream while another is captured: the driver refuses that, and
    ends the capture, unless the thread says that it knows what it does."""
    with driver(80, runs=False) as fake:
        captured = fake.lib.fake_stream(0, 1)
        Kernels().forward(random_call(1, **PLAIN))
        assert fake.calls("cuLaunchKernel") == 1 and fake.lib.fake_captured(captured) == 0
        assert fake.lib.fake_capture_mode() == 0  # as it was


def gradients(kernels, call, needs=None):
    """Forward and backward, whose results mean nothing."""
    out, lse, *_ = kernels.forward(call)
    return kernels.backward(call, torch.ones_like(out), out, lse, None, needs or needs_of(call))


def test_hopper_launches():
    """A tensor map that the driver refuses or that is made for each kernel anew; shared memory that
    is not asked for, or asked for at each call; the pair of kernels where one is enough."""
    call = random_call(1, **{**PLAIN, "head_dim": 64})
    with driver(90, runs=False) as fake:
        kernels = Kernels()
        kernels.sm90 = True
        for deterministic, needs, names, maps, attributes in (
            (False, None, "forward clear_dq backward_fused convert_dq", 4 + 4, 2),
            (True, None, "backward_features", 4 + 4, 1),
            (True, Needs(True, False, False), "backward_dq", 4 + 4, 1),
            (False, Needs(False, True, True), "backward_dkdv", 4 + 4, 1),
        ):
            seen = [fake.calls(name) for name in ("cuTensorMapEncodeTiled", "cuFuncSetAttribute")]
            begin = len(fake.compiled)
            for _ in range(2):
                gradients(kernels, call._replace(deterministic=deterministic), needs)
            found = [re.search(r"sm90::(\w+)", name) for name, _ in fake.compiled[begin:]]
            assert [each[1] for each in found if each] == names.split()
            assert fake.calls("cuTensorMapEncodeTiled") - seen[0] == 2 * maps
            assert fake.calls("cuFuncSetAttribute") - seen[1] == attributes  # once a kernel
        assert {capability for _, capability in fake.compiled} == {90}


def test_hopper_launches_of_wide_heads_with_features():
    """A call that goes to the kernels of sm_80 though Hopper's know it; one whose gradients nobody
    asked for; boxes of K and V in the order of another kernel, which are maps of their own."""
    call = random_call(1, **{**PLAIN, "head_dim": 256}, softcap=20.0)
    with driver(90, runs=False) as fake:
        kernels = Kernels()
        kernels.sm90 = True
        for needs, names, maps in (
            (Needs(False, True, True), "backward_dkdv_features", 4 + 4),
            (None, "backward_dq_features", 4 + 4 + 4),
        ):
            seen, begin = fake.calls("cuTensorMapEncodeTiled"), len(fake.compiled)
            gradients(kernels, call, needs)
            found = [re.search(r"sm90::(backward\w+)", name) for name, _ in fake.compiled[begin:]]
            assert [each[1] for each in found if each] == names.split()
            assert fake.calls("cuTensorMapEncodeTiled") - seen == maps


def test_split_decode_launches():
    """A decode whose keys are not shared out among the multiprocessors, or whose parts nobody puts
    together."""
    call = random_call(1, **{**PLAIN, "seqlen_q": 1, "seqlen_k": 900})
    with driver(80, runs=False) as fake:
        Kernels().forward(call)
        names = [re.search(r"sm80::(\w+)", name)[1] for name, _ in fake.compiled]
        assert names == ["forward_decode", "combine"] and fake.calls("cuLaunchKernel") == 2


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_launch_keeps_the_rules(capability):
    """Tiles that take more shared memory than a GPU has, for one data type and width."""
    with driver(capability, runs=False) as fake:
        for sm90 in (False, True)[: 1 + (capability == 90)]:
            kernels = Kernels()
            kernels.sm90 = sm90
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for head_dim in (32, 64, 96, 128, 192, 256):
                    for more in ({}, {"deterministic": True}, {"softcap": 5.0, "bias": True}):
                        shape = {**PLAIN, "dtype": dtype, "head_dim": head_dim}
                        gradients(kernels, random_call(1, **shape, **more))
        assert fake.calls("cuLaunchKernel") > 3 * 6 * 3 * 3
        assert fake.calls("cuModuleLoadData") == len(set(fake.compiled))


def test_a_launch_that_the_gpu_has_no_room_for():
    """Shared memory that a GPU lacks, told without the kernel and the number."""
    with driver(80, runs=False) as fake:
        fake.lib.fake_shared_memory(0, 64 * 1024)  # not what the driver said at the start
        with pytest.raises(
            RuntimeError,
            match=r"66560 bytes of shared memory for .*backward_fused.* on cuda:0: "
            r"CUDA_ERROR_INVALID_VALUE: .*launched .*clear_dq",
        ):
            gradients(Kernels(), random_call(1, **PLAIN))


def test_errors_name_the_kernel():
    """An error that an earlier kernel left, told as the fault of nobody."""
    call = random_call(1, **PLAIN)
    with driver(80, runs=False) as fake:
        kernels = Kernels()
        kernels.forward(call)
        fake.lib.fake_break(719)
        with pytest.raises(
            RuntimeError,
            match=r"launch of attn::cuda::sm80::forward_plain<attn::ptx::bf16, 32> on cuda:0: "
            r"CUDA_ERROR_LAUNCH_FAILED: in words \(attn_ext launched .*forward_plain.* before\)",
        ):
            kernels.forward(call)


def test_an_image_that_the_driver_refuses():
    """A broken image that is kept as loaded; NVRTC's own error that is lost on its way."""
    with driver() as fake:
        _cuda.set_compile(lambda kernel, capability: ("k", b"\x7fELF" + bytes(100)))
        with pytest.raises(RuntimeError, match=r"loading attn::cuda::.*CUDA_ERROR_INVALID_IMAGE"):
            Kernels().forward(random_call(1, **PLAIN))

        def fail(kernel, capability):
            raise jit.CompileError("line 3")

        _cuda.set_compile(fail)
        with pytest.raises(jit.CompileError, match="line 3"):
            Kernels().forward(random_call(1, **PLAIN))
        assert fake.calls("cuLaunchKernel") == 0


def test_what_is_missing_is_told():
    """A machine without a driver, a GPU or a new enough one that is an import error or a crash."""
    with driver(75):
        assert "capability 7.5, the kernels need 8.0" in _cuda.device_problem(0)
        assert _cuda.device_problem(1) == "no CUDA device 1"
    with driver(80, init=100):
        assert "CUDA_ERROR_NO_DEVICE" in _cuda.driver_problem()
        with pytest.raises(RuntimeError, match="CUDA_ERROR_NO_DEVICE"):
            Kernels().forward(random_call(1, **PLAIN))
    with driver(80, version=12040):
        assert _cuda.driver_version() == 12040 and _cuda.driver_problem() == ""
    _cuda.open_driver("no such library")
    assert "driver is not installed" in _cuda.driver_problem()


@pytest.mark.skipif(not HEADER.exists(), reason="CUDA's headers are not installed")
def test_numbers_of_the_driver_are_those_of_cuda_h():
    """A number of driver_api.h that means something else to the driver."""
    ours = (ROOT / "csrc/cuda/driver_api.h").read_text()
    names = {
        "ERROR_NO_DEVICE": "CUDA_ERROR_NO_DEVICE",
        "ERROR_STREAM_CAPTURE_IMPLICIT": "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
        "ATTRIBUTE_MULTIPROCESSOR_COUNT": "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",
        "ATTRIBUTE_CAPABILITY_MAJOR": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
        "ATTRIBUTE_CAPABILITY_MINOR": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
        "ATTRIBUTE_SHARED_MEMORY_OPTIN":
            "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
        "CAPTURE_MODE_RELAXED": "CU_STREAM_CAPTURE_MODE_RELAXED",
        "FUNCTION_DYNAMIC_SHARED_MEMORY": "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
    }  # fmt: skip
    for mine, theirs in names.items():
        number = re.search(rf"\b{mine} = (\d+)", ours)[1]
        assert re.search(rf"\b{theirs}\s*=\s*{number}\b", HEADER.read_text()), mine
    # without a number of their own there: by their order
    kinds = re.search(r"CUtensorMapDataType_enum \{(.*?)\}", HEADER.read_text(), re.S)[1]
    order = re.findall(r"CU_TENSOR_MAP_DATA_TYPE_(\w+)", kinds)
    assert (order.index("FLOAT16"), order.index("BFLOAT16")) == (6, 9)
    assert "TENSOR_FLOAT16 = 6" in ours and "TENSOR_BFLOAT16 = 9" in ours
