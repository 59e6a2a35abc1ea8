"""What is measured: one `Case` is a shape, a dtype and a direction; presets are tables of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
# Matrix products of each direction in units of the forward's two: backward has five.
PRODUCTS = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}


@dataclass(frozen=True)
class Case:
    """q [B, Hq, Sq, D] against k and v [B, Hk, Sk, D]; causal is bottom-right aligned."""

    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "fp32"
    causal: bool = False
    direction: str = "fwd"
    device: str = "cpu"
    dropout: float = 0.0

    @property
    def shape(self) -> str:
        """B,H,S,D as it is written on the command line: H as Hq(Hk), S as Sq/Sk where unequal"""
        heads = f"{self.heads_q}" + (f"({self.heads_k})" if self.heads_k != self.heads_q else "")
        unequal = self.seqlen_k != self.seqlen_q
        length = f"{self.seqlen_q}" + (f"/{self.seqlen_k}" if unequal else "")
        return f"{self.batch},{heads},{length},{self.head_dim}"

    @property
    def name(self) -> str:
        """Shape, dtype, mask, dropout and direction in one line"""
        kind = "causal" if self.causal else "full"
        kind += f" dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.shape} {self.dtype} {kind} {self.direction}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's"""
        return DTYPES[self.dtype]

    @property
    def flops(self) -> float:
        """4 B Hq pairs D a forward, pairs = Sq Sk, half of it causal (with Sq != Sk: counted)"""
        pairs = self.seqlen_q * self.seqlen_k
        if self.causal and self.seqlen_q == self.seqlen_k:
            pairs /= 2
        elif self.causal:
            off = self.seqlen_k - self.seqlen_q
            pairs = sum(min(self.seqlen_k, max(0, i + off + 1)) for i in range(self.seqlen_q))
        return 4.0 * self.batch * self.heads_q * pairs * self.head_dim * PRODUCTS[self.direction]

    @property
    def bytes(self) -> float:
        """What must cross memory at least once: inputs read, outputs written, in bytes"""
        item = self.torch_dtype.itemsize
        q = self.batch * self.heads_q * self.seqlen_q * self.head_dim * item
        kv = 2 * self.batch * self.heads_k * self.seqlen_k * self.head_dim * item
        forward = q + kv + q  # O
        backward = q + kv + 2 * q + q + kv  # O and dO read; dQ, dK, dV written
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[self.direction]

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """q, k, v, dout: normally distributed, the same for the same case and seed"""
        generator = torch.Generator("cpu").manual_seed(seed)
        normal = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        q = (self.batch, self.heads_q, self.seqlen_q, self.head_dim)
        kv = (self.batch, self.heads_k, self.seqlen_k, self.head_dim)
        return tuple(
            torch.randn(shape, **normal).to(self.torch_dtype).to(self.device)
            for shape in (q, kv, kv, q)
        )


def parse_shape(text: str) -> tuple[int, int, int, int, int, int]:
    """(B, Hq, Hk, Sq, Sk, D) of "B,H,S,D", where H may be Hq(Hk) or Hq/Hk and S may be Sq/Sk.

    ValueError says what is wrong with another text.
    """
    rule = "shape must be B,H,S,D (H may be Hq/Hk, S may be Sq/Sk)"
    parts = text.replace(" ", "").replace("(", "/").replace(")", "").split(",")
    if len(parts) != 4:
        raise ValueError(f"{rule}, got {text!r}")
    numbers = []
    for part, pair in zip(parts, (False, True, True, False), strict=True):
        values = part.split("/")
        if len(values) > (2 if pair else 1) or not all(v.isascii() and v.isdigit() for v in values):
            raise ValueError(f"{rule}, got {text!r}")
        numbers.append([int(v) for v in values])
    batch, heads, length, dim = numbers
    sizes = (batch[0], heads[0], heads[-1], length[0], length[-1], dim[0])
    if min(sizes) < 1 or max(sizes) > 2**31 - 1:
        raise ValueError(f"shape must have sizes from 1 to 2147483647, got {text!r}")
    if heads[0] % heads[-1]:
        raise ValueError(f"shape must have Hq a multiple of Hk, got {text!r}")
    return sizes


def make(shape: str, dtype="fp32", causal=False, direction="fwd", device="cpu") -> Case:
    """The case of a shape as `parse_shape` reads it"""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    return Case(*parse_shape(shape), dtype, causal, direction, device)


@dataclass(frozen=True)
class Preset:
    """Shapes that belong to one use; masks, directions and dtypes are multiplied out"""

    about: str
    shapes: tuple[str, ...]
    masks: tuple[bool, ...] = (False,)
    directions: tuple[str, ...] = ("fwd",)
    dtypes: tuple[str, ...] = ("fp32", "bf16")

    def cases(self, dtypes=None, directions=None, device="cpu") -> list[Case]:
        """All its cases, with other dtypes and directions where given"""
        return [
            make(shape, dtype, causal, direction, device)
            for shape in self.shapes
            for dtype in dtypes or self.dtypes
            for causal in self.masks
            for direction in directions or self.directions
        ]


_BOTH = (False, True)
PRESETS = {
    "bert": Preset(
        "an encoder's layer: short sequences, no mask",
        ("8,12,128,64", "2,16,512,64"),
    ),
    "vit": Preset("a vision transformer's layer: 197 patches", ("8,12,197,64", "4,16,197,64")),
    "train": Preset(
        "a decoder in training: causal, forward and backward",
        ("1,8,1024,64", "1,8,2048,128"),
        (True,),
        ("fwd+bwd",),
    ),
    "prefill": Preset(
        "a prompt of a language model, GQA", ("1,8,1024,64", "1,32/8,2048,128"), (True,)
    ),
    "decode": Preset("one new token against a KV cache", ("1,32,1/8192,128", "8,32/8,1/4096,128")),
    "long": Preset("long sequences, causal", ("1,8,4096,128", "1,8,16384,64"), (True,)),
}

# The rows of bench/cpu.py.
CPU_TABLE = {
    "forward": Preset(
        "forward at every length",
        ("1,8,1024,64", "1,8,4096,64", "1,8,4096,128", "2,16,512,64", "8,12,128,64"),
        _BOTH,
    ),
    "gqa": Preset("forward with grouped heads", ("1,32/8,2048,128",), _BOTH),
    "short": Preset("forward of short sequences", ("8,12,16,64", "8,12,197,64")),
    "decode": PRESETS["decode"],
    "backward": Preset(
        "forward + backward",
        ("1,8,1024,64", "1,8,4096,64", "1,8,4096,128", "2,16,512,64", "8,12,128,64"),
        _BOTH,
        ("fwd+bwd",),
    ),
    "backward-only": Preset(
        "backward alone",
        ("1,8,1024,64", "1,8,4096,64", "1,8,4096,128"),
        _BOTH,
        ("bwd",),
    ),
    "fp16": Preset(
        "float16 forward", ("1,8,1024,64", "1,8,4096,64"), _BOTH, dtypes=("fp16",)
    ),
}  # fmt: skip

# The rows of bench/gpu.py, the most telling first.
GPU_TABLE = {
    "forward": Preset(
        "forward, 16-bit",
        ("4,16,4096,128", "4,16,2048,64", "16,16,512,64", "2,32/8,8192,128"),
        _BOTH,
        dtypes=("bf16",),
    ),
    "backward": Preset(
        "forward + backward, 16-bit",
        ("4,16,4096,128", "4,16,2048,64", "16,16,512,64"),
        _BOTH,
        ("fwd+bwd",),
        ("bf16",),
    ),
    "decode": Preset(
        "one new token against a KV cache",
        ("16,32/8,1/8192,128", "1,32/8,1/32768,128", "64,32/8,1/2048,128"),
        dtypes=("bf16",),
    ),
    "others": Preset(
        "other dtypes and head dimensions",
        ("4,16,2048,64", "4,16,2048,96", "4,8,2048,256"),
        (True,),
        ("fwd", "fwd+bwd"),
        ("fp16", "fp32"),
    ),
}
