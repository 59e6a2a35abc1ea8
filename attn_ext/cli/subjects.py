"""What `attn-ext verify` puts to the test: attn_ext's backends, and peers with the same interface.

unsupported(call, grad) -> list of reasons;  run(call, dout, dlse) -> (outputs, grads): outputs
(out, lse, max_logit, entropy), grads a Grads or None; None where not given.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F

from attn_ext.backends import registry, tuned
from attn_ext.cli.second import Second
from attn_ext.core import logit
from attn_ext.core.problem import Problem
from attn_ext.core.schema import TOP_LEFT, Call, Grads
from attn_ext.testing import differentiated, needs_of, poisoned_memory

ALSO = ("torch", "flash_attn")


class Backend:
    """A backend of attn_ext, called as `attn_ext.ops.execute` calls it"""

    ours = True

    def __init__(self, name: str, device: str, module: ModuleType | None = None):
        self.name, self.device = name, device
        self.module = module or registry.get(name)

    def unsupported(self, call: Call, grad: bool) -> list[str]:
        """The backend's own reasons"""
        return self.module.unsupported(Problem.of(differentiated(call, grad)))

    def run(self, call: Call, dout, dlse):
        """Forward and, where dout is given, backward, in poisoned memory"""
        with poisoned_memory():
            outputs = self.module.forward(call)
            if dout is None:
                return outputs, None
            needs = needs_of(call)
            out, lse = outputs[:2]
            return outputs, self.module.backward(call, dout, out, lse, dlse, needs)


def _absent(call: Call, known: tuple[str, ...]) -> list[str]:
    """Which features of the call are not among `known`"""
    has = {
        "mask": call.mask is not None,
        "bias": call.bias is not None,
        "softcap": call.softcap > 0,
        "ALiBi": call.alibi_slopes is not None,
        "sink": call.sink is not None,
        "dropout": call.dropout_p > 0,
        "varlen": call.cu_seqlens_q is not None,
        "a KV cache with lengths": call.seqlens_k is not None or call.block_table is not None,
        "row statistics": call.need_stats,
        "window": call.window_left >= 0 or call.window_right > 0,
    }
    return [f"has no {name}" for name, used in has.items() if used and name not in known]


class TorchSdpa:
    """One backend of F.scaled_dot_product_attention; what it has no argument for becomes a mask"""

    ours = False

    def __init__(self, backend, device: str):
        self.backend, self.device = backend, device
        self.name = f"torch-{backend.name.lower().replace('_attention', '')}"

    def unsupported(self, call: Call, grad: bool) -> list[str]:
        """Features that it lacks"""
        return _absent(call, ("mask", "bias", "window"))

    def run(self, call: Call, dout, dlse):
        """out and the gradients of q, k, v and bias"""
        from torch.nn.attention import sdpa_kernel

        square = call.max_seqlen_q == call.max_seqlen_k
        plain = call.mask is None and call.bias is None and call.window_left < 0
        causal = plain and call.window_right == 0 and (square or call.align == TOP_LEFT)
        leaves = {
            name: getattr(call, name).detach().requires_grad_(dout is not None)
            for name in ("q", "k", "v", "bias")
            if getattr(call, name) is not None
        }
        mask = None
        if not causal:
            mask = self._mask(call, leaves.get("bias"))
        with (
            warnings.catch_warnings(),
            sdpa_kernel(self.backend),
            torch.set_grad_enabled(dout is not None),
        ):
            warnings.simplefilter("ignore")  # torch warns of every backend that it cannot take
            out = F.scaled_dot_product_attention(
                leaves["q"], leaves["k"], leaves["v"], mask, is_causal=causal, scale=call.scale,
                enable_gqa=call.q.shape[1] != call.k.shape[1],
            )  # fmt: skip
            grads = None
            if dout is not None:
                found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
                named = dict(zip(leaves, found, strict=True))
                grads = Grads(**named)
        return (out.detach(), None, None, None), grads

    @staticmethod
    def _mask(call: Call, bias):
        """bool, or the bias with -inf where the call excludes; None where nothing is excluded"""
        visible = call.mask
        if call.window_left >= 0 or call.window_right >= 0:
            whole = (call.max_seqlen_q, call.max_seqlen_k, call.q.device)
            pairs = logit.in_window(call, logit.Pairs.all_of(*whole))
            visible = pairs if visible is None else visible & pairs
        if bias is None:
            return visible
        bias = bias.to(call.q.dtype)
        return bias if visible is None else torch.where(visible, bias, -torch.inf)


class FlashAttn:
    """flash_attn.flash_attn_func"""

    ours = False
    name = "flash_attn"

    def __init__(self, device: str):
        self.device = device

    def unsupported(self, call: Call, grad: bool) -> list[str]:
        """Features that it lacks"""
        why = _absent(call, ("softcap", "ALiBi", "window"))
        if call.q.dtype not in (torch.float16, torch.bfloat16):
            why.append("computes float16 and bfloat16 only")
        if (
            call.align == TOP_LEFT
            and call.window_right >= 0
            and call.max_seqlen_q != call.max_seqlen_k
        ):
            why.append("is aligned to the bottom right")
        if call.k.shape[-1] != call.v.shape[-1] or call.k.shape[-1] > 256:
            why.append("needs Dv = D <= 256")
        return why

    def run(self, call: Call, dout, dlse):
        """out and the gradients of q, k and v"""
        from flash_attn import flash_attn_func

        leaves = [x.detach().requires_grad_(dout is not None) for x in (call.q, call.k, call.v)]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        window = (call.window_left, call.window_right)
        out = flash_attn_func(
            q, k, v, softmax_scale=call.scale, window_size=window, softcap=call.softcap,
            alibi_slopes=call.alibi_slopes, deterministic=call.deterministic,
        ).transpose(1, 2)  # fmt: skip
        grads = None
        if dout is not None:
            grads = Grads(*torch.autograd.grad(out, leaves, dout))
        return (out.detach(), None, None, None), grads


def ours(names: list[str] | None, devices: list[str]) -> list[Backend]:
    """The backends to verify: those named, or all that run here but the reference itself.

    ValueError for one that is unknown or cannot run here.
    """
    found = []
    for name in names or registry.ORDER:
        why = registry.get(name).available()
        usable = [d for d in devices if (d == "cuda") == (name in ("cuda", "triton"))]
        if name not in registry.ORDER or name == "reference":
            usable = devices[-1:]
        if names and (why or not usable):
            raise ValueError(f"--backend {name} cannot run here: {why or 'no device for it'}")
        if not why and (names or name != "reference"):
            found += [Backend(name, device) for device in usable]
        if name == "cuda" and not why and registry.get("cuda").is_hopper(0):
            found.append(Backend(tuned.HOPPER, "cuda", registry.get("cuda").Hopper()))
        if name == "triton" and not why and "cuda" in devices:
            found.append(Second("cuda"))
    return found


def also(names: list[str], devices: list[str]) -> tuple[list, list[str]]:
    """(subjects, lines that say what is not there) for --also; ValueError for an unknown name"""
    found, absent = [], []
    for name in names:
        if name not in ALSO:
            raise ValueError(f"--also must be among {', '.join(ALSO)}, got {name!r}")
        if name == "flash_attn":
            if importlib.util.find_spec("flash_attn") is None or "cuda" not in devices:
                absent.append("flash_attn: not installed, or no CUDA device")
            else:
                found.append(FlashAttn("cuda"))
            continue
        with contextlib.suppress(ImportError):
            from torch.nn.attention import SDPBackend

            for device in devices:
                kinds = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
                if device == "cuda":
                    kinds += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
                found += [TorchSdpa(kind, device) for kind in kinds]
    return found, absent
