"""The peers as a table: name -> how to bind it to a case.  `PEERS[name].bind(case, q, k, v)` gives
a `Bound`, or raises `Unavailable` with the reason, which the reports print.

A new peer is one function and one row of the table.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attn_ext.functional.decode import attention_decode
from attn_ext.functional.dense import attention
from attn_ext.measure import engines
from attn_ext.measure.cases import Case
from attn_ext.measure.engines import Bound, Unavailable

OURS = "attn_ext"


@dataclass(frozen=True)
class Peer:
    """A row of the table.  `slow`: bound only when asked for by name (it compiles for long)."""

    about: str
    bind: Callable[..., Bound]
    slow: bool = False


def bind_backend(backend: str):
    """attn_ext on one backend, as a row of the table has it"""

    def bind(case: Case, q, k, v) -> Bound:
        causal = "bottom_right" if case.causal else False
        if case.direction == "fwd" and case.seqlen_k > 4 * case.seqlen_q:
            attend = attention_decode  # the split of keys is chosen by shape
            return Bound(lambda: attend(q, k, v, causal=bool(case.causal), backend=backend))
        return Bound(lambda: attention(q, k, v, causal=causal, backend=backend))

    return bind


def available_bytes(device: str) -> int:
    """Memory that can still be taken on a device"""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 1 << 33


def _naive(case: Case, q, k, v) -> Bound:
    scores = case.batch * case.heads_q * case.seqlen_q * case.seqlen_k * q.element_size()
    copies = 3 if case.direction == "fwd" else 6
    if scores * copies > available_bytes(case.device) * 0.8:
        raise Unavailable(f"the score matrix alone takes {scores / 2**30:.1f} GiB")
    mask = None
    if case.causal:
        shape = (case.seqlen_q, case.seqlen_k)
        mask = ~torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])
    group, scale = case.heads_q // case.heads_k, case.head_dim**-0.5

    def forward():
        keys, values, queries = k, v, q
        if group > 1 and case.seqlen_q == 1:  # the group's heads as the rows of one product
            queries = q.view(case.batch, case.heads_k, group, case.head_dim)
        elif group > 1:
            keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        s = (queries @ keys.transpose(-1, -2)) * scale
        if mask is not None:
            s = s.masked_fill(mask, -torch.inf)
        return (torch.softmax(s, -1) @ values).view(q.shape)

    return Bound(forward)


def _sdpa(backend: str | None):
    """torch's F.scaled_dot_product_attention, on one of its backends where one is named"""

    def bind(case: Case, q, k, v) -> Bound:
        if case.causal and case.seqlen_q != case.seqlen_k:
            raise Unavailable("its is_causal is aligned to the top left")
        kwargs = {"is_causal": case.causal, "enable_gqa": case.heads_q != case.heads_k}
        context = contextlib.nullcontext
        if backend is not None:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            if backend in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION") and case.device == "cpu":
                raise Unavailable("needs a CUDA device")
            if backend == "FLASH_ATTENTION" and case.device == "cpu":
                raise Unavailable("is what torch itself chooses on a CPU")

            def context():
                return sdpa_kernel(getattr(SDPBackend, backend))

        return Bound(lambda: F.scaled_dot_product_attention(q, k, v, **kwargs), context)

    return bind


def _flex(case: Case, q, k, v) -> Bound:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sizes = (case.seqlen_q, case.seqlen_k)
    off = sizes[1] - sizes[0]
    block_mask = None
    if case.causal:
        block_mask = create_block_mask(
            lambda b, h, i, j: i + off >= j, None, None, *sizes, device=case.device
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = case.heads_q != case.heads_k
    return Bound(lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa))


def _needs(module: str, case: Case, device: str | None = None) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")
    if device and torch.device(case.device).type != device:
        raise Unavailable(f"needs a {device.upper()} device")


def _flash_attn(case: Case, q, k, v) -> Bound:
    _needs("flash_attn", case, "cuda")
    from flash_attn import flash_attn_func

    if case.dtype not in ("fp16", "bf16"):
        raise Unavailable("computes fp16 and bf16 only")

    def forward():
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(*turned, causal=case.causal).transpose(1, 2)

    return Bound(forward)


def _xformers(case: Case, q, k, v) -> Bound:
    _needs("xformers", case, "cuda")
    from xformers.ops import LowerTriangularFromBottomRightMask, memory_efficient_attention

    if case.heads_q != case.heads_k:
        raise Unavailable("grouped heads would have to be expanded")
    mask = LowerTriangularFromBottomRightMask() if case.causal else None

    def forward():
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return memory_efficient_attention(*turned, attn_bias=mask).transpose(1, 2)

    return Bound(forward)


PEERS = {
    OURS: Peer("attn_ext.attention on the backend it chooses", bind_backend("auto")),
    "attn_ext-triton": Peer("attn_ext on its Triton backend", bind_backend("triton"), slow=True),
    "attn_ext-cuda": Peer("attn_ext on its CUDA backend", bind_backend("cuda"), slow=True),
    "naive": Peer("matmul, softmax, matmul in torch", _naive),
    "torch": Peer("F.scaled_dot_product_attention as torch chooses", _sdpa(None)),
    "torch-math": Peer("torch SDPA, math backend", _sdpa("MATH")),
    "torch-flash": Peer("torch SDPA, flash backend", _sdpa("FLASH_ATTENTION")),
    "torch-efficient": Peer("torch SDPA, efficient backend", _sdpa("EFFICIENT_ATTENTION")),
    "torch-cudnn": Peer("torch SDPA, cuDNN backend", _sdpa("CUDNN_ATTENTION")),
    "flex": Peer("torch flex_attention, compiled", _flex, slow=True),
    "flash-attn": Peer("the flash-attn package", _flash_attn),
    "xformers": Peer("xformers' memory_efficient_attention", _xformers),
    "onnxruntime-mha": Peer("ONNX Runtime, MultiHeadAttention", engines.onnx_mha),
    "onnxruntime-gqa": Peer("ONNX Runtime, GroupQueryAttention", engines.onnx_gqa),
    "onnxruntime-att23": Peer("ONNX Runtime, Attention of opset 23", engines.onnx_attention),
    "openvino": Peer("OpenVINO, ScaledDotProductAttention", engines.openvino),
}

ALIASES = {"onnxruntime": ("onnxruntime-mha", "onnxruntime-gqa", "onnxruntime-att23")}


def chosen(names: list[str] | None) -> list[str]:
    """The peers of a list of names ("all": every one; None: all but the slow ones), ours first.

    ValueError for an unknown name.
    """
    if names is None:
        return [name for name, peer in PEERS.items() if not peer.slow]
    wanted = [OURS]
    for name in names:
        if name == "all":
            wanted += PEERS
        elif name in ALIASES:
            wanted += ALIASES[name]
        elif name in PEERS:
            wanted.append(name)
        else:
            known = ", ".join(("all", *PEERS, *ALIASES))
            raise ValueError(f"peers must be among {known}, got {name!r}")
    return list(dict.fromkeys(wanted))
