"""The bits of what the CPU kernels compute on a designed set of calls, as hashes, for each
instruction set of this machine and with one and two threads.

    python tests/helpers/cpu_bits.py --write         renews tests/cpu/cpu_bits.json
    python tests/helpers/cpu_bits.py FILE            writes this build's hashes to FILE
    python tests/helpers/cpu_bits.py --compare A B   names the cases whose hashes differ

A change that only moves code runs the second line before and after, and then the third.  The
committed table holds what repeats on another machine: not cases that call libm (float64, decode and
inspect use exp and log of the C library, which choose their code by processor and version).  It
names the compiler, since another one contracts a * b + c elsewhere.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import torch

from attn_ext import (
    _C,
    additive_attention,
    additive_attention_varlen,
    attention,
    attention_decode,
    attention_varlen,
    inspect,
)

TABLE = Path(__file__).parents[1] / "cpu" / "cpu_bits.json"
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip
CPU = {"backend": "cpu"}


def numbers(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    """Scattered numbers in (-1.3, 1.3) by integer arithmetic: the same on every machine."""
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 2654435761 + seed * 40503 + 12
    x = (x ^ (x >> 13)) * 1103515245 % (1 << 31)
    x = (x ^ (x >> 11)) % 20011
    return ((x - 10005).to(torch.float64) / 7701.0).to(dtype).reshape(shape)


def visible(seed: int, *shape: int) -> torch.Tensor:
    """A boolean mask that leaves out a third, and a whole tile of keys in some rows."""
    mask = numbers(seed, *shape) < 0.5
    mask[..., : shape[-1] // 3] &= (torch.arange(shape[-2]) % 3 > 0)[:, None]
    return mask


# name -> (shape B Hq Hk Sq Sk D Dv, keywords; a callable is given the shape).  What each one runs:
SHAPES = {
    "one block of keys": ((2, 2, 2, 45, 70, 64, 64), {}),
    "causal, grouped heads": ((1, 4, 2, 150, 150, 32, 48), {"causal": True}),
    "several blocks, causal": ((1, 2, 1, 300, 900, 32, 32), {"causal": "bottom_right"}),
    "several blocks": ((1, 1, 1, 130, 800, 64, 64), {}),
    "split keys": ((1, 1, 1, 70, 1500, 16, 16), {}),
    "many panels": ((1, 9, 9, 520, 200, 16, 16), {}),
    "odd sizes": ((2, 3, 1, 77, 431, 7, 13), {"causal": "top_left"}),
    "wide heads": ((1, 1, 1, 20, 260, 200, 257), {}),
    "window": ((1, 2, 2, 190, 470, 24, 24), {"window": (40, 9)}),
    "mask": ((1, 2, 1, 90, 450, 24, 24), {"mask": lambda b, h, m, n: visible(7, b, 1, m, n)}),
    "mask of one block": ((2, 2, 2, 40, 90, 32, 32), {"mask": lambda b, h, m, n: visible(8, m, n)}),
    "bias": ((1, 2, 2, 75, 410, 32, 32), {"bias": lambda b, h, m, n: numbers(9, b, h, m, n)}),
    "bias over keys": ((2, 2, 2, 75, 90, 32, 32), {"bias": lambda b, h, m, n: numbers(9, h, m, 1)}),
    "alibi": ((2, 2, 1, 70, 200, 16, 16), {"alibi_slopes": lambda b, h, m, n: numbers(4, h).abs()}),
    "softcap": ((1, 2, 1, 70, 400, 16, 16), {"softcap": 1.5, "causal": "bottom_right"}),
    "dropout": ((1, 2, 1, 90, 430, 32, 32), {"dropout_p": 0.3}),
    "dropout of one block": ((1, 2, 1, 90, 130, 32, 32), {"dropout_p": 0.3, "causal": "top_left"}),
    "negative scale": ((1, 2, 1, 70, 400, 16, 16), {"scale": -0.7}),
    "large logits": ((1, 1, 1, 130, 800, 32, 32), {"scale": 30.0}),
    "empty rows": ((1, 1, 1, 60, 50, 16, 16), {"window": (3, 2)}),
    "no keys": ((1, 1, 1, 5, 0, 16, 16), {}),
}  # fmt: skip
SINK = {"sink": ((1, 2, 1, 70, 400, 16, 16), {"sink": lambda b, h, m, n: numbers(3, h)})}
NOT_FINITE = ("mask", "causal, grouped heads", "mask of one block", "bias")  # NaN and inf as well
FEW = ("one block of keys", "several blocks, causal", "odd sizes", "mask", "bias", "dropout",
       "softcap", "window")  # fmt: skip


def digest(*tensors: torch.Tensor | None) -> str:
    """Ten hexadecimal digits of the bytes of all tensors; "-" marks one that is absent."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(b"-" if t is None else t.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:10]


def made(options: dict, b: int, hq: int, m: int, n: int) -> dict:
    """The keywords with their tensors."""
    return {k: v(b, hq, m, n) if callable(v) else v for k, v in options.items()}


def leaves(shape: tuple, dtype, spoilt: bool = False) -> list:
    """q, k, v that require a gradient; `spoilt`: inf and NaN in some rows of K and V."""
    b, hq, hk, m, n, d, dv = shape
    q, k, v = numbers(1, b, hq, m, d), numbers(2, b, hk, n, d), numbers(3, b, hk, n, dv)
    if spoilt:
        k[..., n // 4, 0], v[..., n // 4, -1] = torch.inf, torch.nan
        v[..., n - 1, 0] = -torch.inf
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def gradients(out, lse, wanted) -> list:
    """Of a sum over O (and LSE), each element with another factor."""
    loss = (out.double() * numbers(5, *out.shape)).nan_to_num(0, 0, 0).sum()
    if lse is not None:
        loss = loss + (lse.double() * numbers(6, *lse.shape)).nan_to_num(0, 0, 0).sum()
    return torch.autograd.grad(loss, wanted, allow_unused=True)


def dense(shape, options, dtype, spoilt=False, with_lse=True) -> dict:
    """O, LSE and all gradients of `attention`."""
    torch.manual_seed(11)
    b, hq, _, m, n, *_ = shape
    inputs, call = leaves(shape, dtype, spoilt), made(options, b, hq, m, n)
    if "bias" in call:
        call["bias"] = call["bias"].to(dtype)
    sides = [call[name].requires_grad_() for name in ("bias", "sink") if name in call]
    out, lse = attention(*inputs, **call, **CPU, return_lse=True) if with_lse else (
        attention(*inputs, **call, **CPU), None)  # fmt: skip
    grads = gradients(out, lse, inputs + sides)
    return {"forward": digest(out, lse), "backward": digest(*grads)}


def statistics(shape, options, dtype) -> dict:
    """O and the statistics of each row, from the forward kernel."""
    b, hq, _, m, n, *_ = shape
    out, stats = attention(
        *(x.detach() for x in leaves(shape, dtype)), **made(options, b, hq, m, n), **CPU,
        return_stats=True,
    )  # fmt: skip
    return {"statistics": digest(out, *stats)}


def sigmoid(shape, options, dtype) -> dict:
    return dense(shape, options | {"normalizer": "sigmoid"}, dtype, with_lse=False)


def additive(shape, options, dtype) -> dict:
    """O, LSE and all gradients of `additive_attention`."""
    torch.manual_seed(11)
    b, hq, _, m, n, d, _ = shape
    call = made(options, b, hq, m, n)
    if "bias" in call:
        call["bias"] = call["bias"].to(dtype)
    inputs = [*leaves(shape, dtype), numbers(8, hq, d).to(dtype).requires_grad_()]
    out, lse = additive_attention(*inputs, **call, **CPU, return_lse=True)
    return {"forward": digest(out, lse), "backward": digest(*gradients(out, lse, inputs))}


def packed(dtype, causal, w=None) -> dict:
    """Sequences of unlike lengths, an empty one among them, w: additive scores."""
    lengths_q, lengths_k = torch.tensor([5, 0, 133, 64]), torch.tensor([240, 7, 133, 900])
    ends = [torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in (lengths_q, lengths_k)]
    q = numbers(1, int(lengths_q.sum()), 4, 16)
    k, v = (numbers(s, int(lengths_k.sum()), 2, 16) for s in (2, 3))
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    if w is None:
        call = attention_varlen(*inputs, *ends, causal=causal, **CPU, return_lse=True)
    else:
        inputs.append(w.to(dtype).requires_grad_())
        call = additive_attention_varlen(*inputs, *ends, causal=causal, **CPU, return_lse=True)
    return {"forward": digest(*call), "backward": digest(*gradients(*call, inputs))}


def decode(dtype, heads_q, seqlen_q, page_size=0, head_dim=64, **options) -> dict:
    """A KV cache of three sequences, contiguous or in pages."""
    lengths, d = torch.tensor([300, 77, 190], dtype=torch.int32), head_dim
    q = numbers(1, 3, heads_q, seqlen_q, d, dtype=dtype)
    caches = [numbers(s, 3, 2, 320, d, dtype=dtype) for s in (2, 3)]
    table = None
    if page_size:
        pages = 320 // page_size
        caches = [c.reshape(3, 2, pages, page_size, d).transpose(1, 2).reshape(-1, 2, page_size, d)
                  for c in caches]  # fmt: skip
        table = torch.arange(3 * pages, dtype=torch.int32).reshape(3, pages)
    options = made(options, 3, heads_q, seqlen_q, 320)
    result = attention_decode(q, *caches, lengths, block_table=table, **options, **CPU,
                              return_lse=True)  # fmt: skip
    return {"forward": digest(*result)}


def maps(shape, options, dtype) -> dict:
    """attn_ext.inspect's four maps on the CPU kernel."""
    b, hq, _, m, n, *_ = shape
    q, k, _ = (x.detach() for x in leaves(shape, dtype))
    call = made(options, b, hq, m, n) | CPU
    best = inspect.top_k(q, k, 5, **call)
    return {
        "top_k": digest(*best),
        "column_mass": digest(inspect.column_mass(q, k, **call)),
        "pooled_map": digest(inspect.pooled_map(q, k, 16, **call)),
    }


def cases(kept: bool) -> dict:
    """name -> function without arguments; kept: those of the committed table only."""
    found = {}
    for name, (shape, options) in SHAPES.items():
        for kind in (
            ("fp32", "bf16") if name not in FEW else DTYPES if not kept else list(DTYPES)[:3]
        ):
            found[f"{name}, {kind}"] = lambda s=shape, o=options, t=kind: dense(s, o, DTYPES[t])
        if name in NOT_FINITE:
            for kind in ("fp32", "bf16"):
                found[f"{name}, not finite, {kind}"] = lambda s=shape, o=options, t=kind: dense(
                    s, o, DTYPES[t], spoilt=True
                )
        if name in FEW:
            options = {k: v for k, v in options.items() if k != "dropout_p"}
            found[f"statistics, {name}"] = lambda s=shape, o=options: statistics(
                s, o, torch.float32
            )
    for causal in (False, "bottom_right"):
        found[f"varlen, causal={causal}"] = lambda c=causal: packed(torch.float32, c)
        found[f"varlen, causal={causal}, bf16"] = lambda c=causal: packed(torch.bfloat16, c)
    if kept:
        return found
    for kind, dtype in DTYPES.items():
        shape, options = SINK["sink"]
        found[f"sink, {kind}"] = lambda s=shape, o=options, t=dtype: dense(s, o, t)
        for name in FEW:
            shape, options = SHAPES[name]
            found[f"sigmoid, {name}, {kind}"] = lambda s=shape, o=options, t=dtype: sigmoid(s, o, t)
            if name != "softcap":
                found[f"additive, {name}, {kind}"] = lambda s=shape, o=options, t=dtype: additive(
                    s, o, t
                )
        found[f"additive, varlen, {kind}"] = lambda t=dtype: packed(t, False, numbers(4, 4, 16))
        for heads, seqlen, page, dim in (
            (8, 1, 0, 64),
            (4, 3, 16, 64),
            (2, 2, 0, 33),
            (2, 1, 7, 64),
        ):
            if page != 7:
                found[f"decode, {heads} {seqlen} {page} {dim}, {kind}"] = (
                    lambda t=dtype, a=(heads, seqlen, page, dim): decode(t, *a)
                )
        found[f"decode, mask and bias, {kind}"] = lambda t=dtype: decode(
            t, 4, 2, mask=lambda b, h, m, n: visible(5, b, 1, m, n),
            bias=lambda b, h, m, n: numbers(6, 1, 1, m, n), softcap=3.0,
        )  # fmt: skip
    for name in ("one block of keys", "odd sizes", "window", "mask", "bias", "softcap", "alibi"):
        shape, options = SHAPES[name]
        found[f"inspect, {name}"] = lambda s=shape, o=options: maps(s, o, torch.float32)
    return found


def hashes(kept: bool, isas=None, threads: tuple = (1, 2), names=None) -> dict:
    """{instruction set: {case: "output=digest ..."}}, of the named cases only where `names` is
    given; ValueError where threads change the bits."""
    before, table = torch.get_num_threads(), {}
    try:
        for isa in isas or _C.supported_isas():
            _C.set_isa(isa)
            rows = table[isa] = {}
            for name, run in cases(kept).items():
                for n in threads if names is None or name in names else ():
                    torch.set_num_threads(n)
                    row = " ".join(f"{k}={v}" for k, v in run().items())
                    if rows.setdefault(name, row) != row:
                        raise ValueError(
                            f"{isa}, {name}: {n} threads give other bits than {threads[0]}"
                        )
    finally:
        torch.set_num_threads(before)
        _C.set_isa("")
    return table


def compiler() -> str:
    """What compiled attn_ext._C, from the comment that it leaves in the file."""
    found = re.search(
        rb"(GCC: \([^)]*\) [\d.]+|clang version [\d.]+)", Path(_C.__file__).read_bytes()
    )
    return found[1].decode() if found else "unknown"


def differences(a: dict, b: dict) -> list[str]:
    """Each case that both tables have and whose hashes differ."""
    return [
        f"{isa}: {name}: {a[isa][name]} -> {b[isa][name]}"
        for isa in a.keys() & b.keys()
        for name in a[isa]
        if name in b[isa] and a[isa][name] != b[isa][name]
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="where to write this build's hashes")
    parser.add_argument("--write", action="store_true", help="renew the committed table")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of hashes")
    args = parser.parse_args()
    if args.compare:
        a, b = (json.loads(Path(f).read_text()) for f in args.compare)
        found = differences(a, b)
        print(*found, f"{len(found)} of {sum(map(len, a.values()))} cases differ", sep="\n")
        raise SystemExit(bool(found))
    if args.write:
        table = {"compiler": compiler(), **hashes(kept=True)}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    if args.file:
        Path(args.file).write_text(json.dumps(hashes(kept=False), indent=1) + "\n")


if __name__ == "__main__":
    main()
