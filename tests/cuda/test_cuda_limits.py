"""What large, oddly strided or broken calls do to the CUDA kernels: offsets beyond 31 bits, more
heads than a grid dimension holds, rows that 16-byte copies cannot read, lengths that are not true.

On the emulated device of csrc/emulation, and on a GPU where there is one.
"""

import emulated_backend as emulated
import pytest
import torch
from closeness import BFLOAT16, assert_close

from attn_ext.backends import registry
from attn_ext.backends.native import point
from attn_ext.core.layout import strides as strides_of
from attn_ext.core.schema import Call, Needs
from attn_ext.testing import check_call, poisoned_memory, random_call

BF16 = torch.bfloat16


MODULES = [(emulated, "cpu")] if emulated.available() == "" else []
if registry.get("cuda").available() == "":
    MODULES.append((registry.get("cuda"), "cuda"))


def name_of(module):
    return "emulated" if module is emulated else "cuda"


@pytest.fixture(params=MODULES or [None], ids=lambda p: name_of(p[0]) if p else "none built")
def kernels(request):
    """(module, device) with these kernels; the emulator in mode "all"."""
    if request.param is None:
        pytest.skip("neither attn_ext._emulated (ATTN_EXT_EMULATED=1) nor a GPU is here")
    if request.param[0] is emulated:
        emulated.set_mode("all", 1)
    return request.param


def far_apart(x, dim, stride):
    """x's values in untouched (so virtual) memory, `stride` elements apart in dimension `dim`."""
    strides = list(x.contiguous().stride())
    strides[dim] = stride
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    storage = torch.empty(size, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, strides).copy_(x)


FAR = {
    "batch": (0, 3, 2**30 + 8),
    "head": (1, 3, 2**30 + 8),
    "position in a tile": (2, 3, 2**30 + 8),
    "tile": (2, 70, 2**25 + 8),
}


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "bias"])
@pytest.mark.parametrize("where", FAR)
def test_offsets_beyond_31_bits(kernels, name, where):
    """An offset in int32, which wraps in tensors of more than 2^31 elements."""
    dim, count, stride = FAR[where]
    sizes = {"batch": 1, "heads_q": 1, "heads_k": 1, "seqlen_q": 3, "seqlen_k": 3}
    kind = ("batch", "heads", "seqlen")[dim]
    sizes |= {size: count for size in sizes if size.startswith(kind)}
    side = {name: True} if name in ("mask", "bias") else {}
    call = random_call(dtype=BF16, device=kernels[1], **sizes, **side)
    call = call._replace(**{name: far_apart(getattr(call, name), dim, stride)})
    check_call(call, kernels[0])


@pytest.mark.parametrize("dim", [0, 2], ids=["page", "position in a page"])
def test_pages_beyond_31_bits(kernels, dim):
    """The number of a page times its stride in int32."""
    call = random_call(dtype=BF16, batch=1, seqlen_q=1, seqlen_k=20, cache_seqlens=[20],
                       page_size=5, device=kernels[1])  # fmt: skip
    stride = 2**31 // (call.k.shape[dim] - 1) + 8 & ~7
    call = call._replace(k=far_apart(call.k, dim, stride), v=far_apart(call.v, dim, stride))
    check_call(call, kernels[0])


def test_more_heads_than_a_grid_dimension_holds(kernels):
    """B * H in gridDim.y or .z, of at most 65,535 blocks; on the emulator of at most one."""
    if kernels[0] is not emulated:
        q = torch.randn(1, 66000, 1, 8, device=kernels[1]).to(BF16)
        call = Call(q, q, q, max_seqlen_q=1, max_seqlen_k=1)
        assert torch.equal(kernels[0].forward(call)[0], q)  # one key: O = V
        return
    emulated.set_mode("plain", 1, grid_limit=1)
    sizes = {"batch": 3, "heads_q": 4, "heads_k": 2}
    for options in ({}, {"bias": "hqk", "deterministic": True}, {"cache_seqlens": [9, 40, 70]}):
        call = random_call(dtype=BF16, seqlen_k=70, num_splits=2, **sizes, **options)
        check_call(call, emulated, grads="cache_seqlens" not in options)


# Where a tensor [2, 2, 9, 16] lies: (strides, first element).  8 halves or 4 floats are 16 bytes.
ODD = {
    "base": ((288, 144, 16), 1),
    "batch": ((301, 144, 16), 0),
    "head": ((331, 165, 16), 0),
    "row": ((340, 170, 17), 0),
}


def laid(x, where):
    """x's values at ODD[where], NaN around them."""
    strides, first = ODD[where]
    storage = torch.full((2000,), torch.nan, dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, (*strides, 1), first).copy_(x)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("where", ODD)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_rows_that_16_byte_copies_cannot_read(kernels, dtype, where, name):
    """cp.async of a misaligned address: the emulator names the line, a GPU stops the context.  One
    tensor lies badly, so that a copy which looks at another's alignment is seen."""
    module, device = kernels
    call = random_call(dtype=dtype, batch=2, heads_q=2, seqlen_q=9, device=device)
    if name != "dout":
        call = call._replace(**{name: laid(getattr(call, name), where)})
        return check_call(call, module)
    out, lse, *_ = module.forward(call)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    needs = Needs(True, True, True)
    want = module.backward(call, dout, out, lse, None, needs)
    got = module.backward(call, laid(dout, where), out, lse, None, needs)
    for a, b in zip(want[:3], got[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dims", [(12, 16), (16, 12), (7, 9)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_head_dims_that_are_no_whole_copies(kernels, dtype, dims):
    """The last copy of a row, which reads the next row or beyond the tensor."""
    call = random_call(dtype=dtype, seqlen_q=9, head_dim=dims[0], head_dim_v=dims[1],
                       layout="padded", device=kernels[1])  # fmt: skip
    check_call(call, kernels[0])


@pytest.mark.parametrize("length", [21, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("page_size", [0, 4])
def test_a_cache_length_that_is_not_true(kernels, length, page_size):
    """Memory beyond the cache or the block table, which a GPU call cannot check without a sync."""
    module, device = kernels
    sizes = dict(dtype=BF16, seqlen_q=2, heads_q=2, seqlen_k=20, page_size=page_size, device=device)
    true = random_call(cache_seqlens=[20 if length > 0 else 0], causal=True, **sizes)
    lie = true._replace(seqlens_k=torch.full_like(true.seqlens_k, length))
    if length < 0:  # the cache holds values, so that a key read is seen
        lie = lie._replace(k=lie.k.nan_to_num(1.0), v=lie.v.nan_to_num(1.0))
    with poisoned_memory():
        want, got = module.forward(true), module.forward(lie)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("entry", [6, 9, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_block_table_that_is_not_true(kernels, dtype, num_splits, entry):
    """Memory before or behind the cache, by the number of a page that it does not have."""
    module, device = kernels
    sizes = dict(dtype=dtype, seqlen_q=2, seqlen_k=20, heads_q=2, page_size=4, cache_seqlens=[20])
    call = random_call(num_splits=num_splits, device=device, **sizes)
    assert call.k.shape[0] == 6  # pages
    for name in ("k", "v"):  # a read outside is seen: there is NaN, which O would have
        x = getattr(call, name).nan_to_num(1.0)  # also of the page that no entry names
        call = call._replace(**{name: Guarded(x.shape, dtype, device, x, torch.nan).x})
    call.block_table[:, 1::2] = entry
    true = call._replace(block_table=call.block_table.clamp(0, 5))
    got, want = module.forward(call), module.forward(true)
    assert want[0].isfinite().all()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_sequences_longer_than_they_were_told_to_be(kernels):
    """A mask or bias read beyond its end by a sequence longer than max_seqlen."""
    module, device = kernels
    call = random_call(seqlens_q=[5, 9], seqlens_k=[6, 9], mask="k", bias="qk", dtype=BF16,
                       device=device)  # fmt: skip
    want = module.forward(random_call(seqlens_q=[5, 9], seqlens_k=[6, 9], mask="k", bias="qk",
                                      dtype=BF16, device=device))  # fmt: skip
    told = call._replace(max_seqlen_q=7, max_seqlen_k=9)
    with poisoned_memory():
        out, lse = module.forward(told)[:2]
        dq, dk, dv, dbias, *_ = module.backward(
            told, torch.ones_like(out), out, lse, None, Needs(True, True, True, True)
        )
    assert torch.equal(out[:5], want[0][:5])  # the first sequence is as long as promised
    for x in (out, dq, dk, dv, dbias):
        assert x.isfinite().all()


def test_a_call_with_too_many_tiles_is_refused(kernels):
    """A grid of 2^31 blocks or more, which wraps into a small one."""
    module, device = kernels
    call = random_call(dtype=BF16, batch=1, heads_q=1, seqlen_q=1, device=device)
    many = call.q.expand(2**10, 2**10, 1, 16)
    call = call._replace(q=many, max_seqlen_q=2**29)
    native = module._kernels()._native(call, module._kernels()._canonical(call), many, many[..., 0])
    with pytest.raises(ValueError, match="blocks, more than a CUDA grid holds"):
        native.forward(0, 0, 0, 1, False)


def test_scratch_of_a_single_head(kernels):
    """Scratch sized by the stride of a dimension of size 1, of which torch may say anything: delta
    is written beyond its end.
    """
    module, device = kernels
    call = random_call(dtype=BF16, heads_q=1, seqlens_q=[170, 130], device=device)
    lse, odd = torch.empty(1, 300, device=device), torch.empty(300, 1, device=device).t()
    assert odd.is_contiguous() and odd.stride() != lse.stride()
    native = module._kernels()
    inputs = native._canonical(call)
    for x in (lse, odd):
        assert native._native(call, inputs, call.q, x).backward_workspace(False) >= 300


def test_a_scale_that_is_zero_as_a_float(kernels):
    """0 * -inf in the kernels that mask before they scale."""
    check_call(
        random_call(dtype=BF16, seqlen_q=40, causal=True, scale=1e-50, device=kernels[1]),
        kernels[0],
    )


class Guarded:
    """A tensor within a larger piece of memory, which it can tell to be untouched."""

    ROOM = 65536

    def __init__(self, shape, dtype, device, values=None, around=7.0):
        self.around, n = around, torch.Size(shape).numel()
        self.storage = torch.full((n + 2 * self.ROOM,), around, dtype=dtype, device=device)
        self.x = self.storage[self.ROOM : self.ROOM + n].view(shape)
        self.x.copy_(torch.zeros(()) if values is None else values)

    def untouched(self):
        return bool((torch.cat([self.storage[: self.ROOM], self.storage[-self.ROOM :]]) == 7).all())


LIES = {  # lengths of the sequences, and where they are said to start
    "beyond the end": ([5, 7], [0, 5, 25]),
    "before the beginning": ([5, 7], [-9, 5, 12]),
    "falling": ([5, 7], [12, 5, -(2**31)]),
    "all beyond": ([5, 7], [30, 30, 40]),
    "the first behind a tile": ([150, 150], [200, 210, 300]),
    "the second before the first": ([150, 150], [290, 20, 300]),
    # by their numbers, the last has a second tile of 128 keys and no first, for which it would wait
    "falling by tiles": ([100, 100, 100], [0, 300, 100, 300]),
}


@pytest.mark.parametrize("sm90", [False, True], ids=["sm80", "sm90"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "one order"])
@pytest.mark.parametrize("name", LIES)
def test_cu_seqlens_that_are_not_true(kernels, name, deterministic, sm90, monkeypatch):
    """Rows read and written before or beyond a tensor's by sequences that do not lie within it; a
    tile that waits for one which does not exist."""
    module, device = kernels
    if sm90 and device == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the Hopper kernels run on Hopper GPUs only")
    kernels = module._kernels()
    monkeypatch.setattr(kernels, "sm90", sm90)
    if module is emulated:  # with as much shared memory as these kernels may have
        emulated.set_mode("all", 1)
    options = {"heads_q": 2, "heads_k": 2, "head_dim": 64, "dtype": BF16, "device": device}
    lengths, starts = LIES[name]
    call = random_call(seqlens_q=lengths, seqlens_k=lengths, **options)
    lie = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = max(40, sum(lengths))
    call = call._replace(
        cu_seqlens_q=lie, cu_seqlens_k=lie, max_seqlen_q=longest, max_seqlen_k=longest
    )
    dout = torch.ones_like(call.q)
    inputs = [
        Guarded(x.shape, BF16, device, x, torch.nan).x for x in (call.q, call.k, call.v, dout)
    ]
    q, k, v, dout = inputs
    call = call._replace(q=q, k=k, v=v)
    out, dq, dk, dv = outputs = [Guarded(x.shape, BF16, device) for x in inputs]
    lse = Guarded((2, sum(lengths)), torch.float32, device)
    target = (*kernels._target(call.q.device)[:3], sm90)
    canonical = kernels._canonical(call)  # whose memory the native call points to
    native = kernels._native(call, canonical, out.x, lse.x)
    native.forward(0, *target)
    strides = [strides_of(x, True) for x in inputs]
    native.set_gradients(strides[3], *strides[:3], (0, 0, 0, 0), deterministic)
    point(native, dout=dout, dq=dq.x, dk=dk.x, dv=dv.x)
    scratch = Guarded((native.backward_workspace(sm90),), torch.float32, device)
    native.backward(scratch.x.data_ptr(), *target)
    for x in (*outputs, lse, scratch):
        assert x.untouched()
    assert all(x.x.isfinite().all() for x in outputs)


@pytest.mark.parametrize("sm90", [False, True], ids=["sm80", "sm90"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "one order"])
@pytest.mark.parametrize("first", [7, 64, 200])
def test_a_first_start_that_is_not_zero(kernels, first, deterministic, sm90, monkeypatch):
    """Sums of dQ, marks of far rows and tiles counted from where the first sequence is said to
    start: rows in front of it belong to none, and the others get what they get without those."""
    module, device = kernels
    if sm90 and device == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the Hopper kernels run on Hopper GPUs only")
    monkeypatch.setattr(module._kernels(), "sm90", sm90)
    if module is emulated:
        monkeypatch.setattr(module._kernels(), "_devices", {0: (1, True)})
        emulated.set_mode("all", 1)  # with as much shared memory as these kernels may have
    options = {"heads_q": 2, "heads_k": 1, "head_dim": 64, "dtype": BF16, "device": device}
    lengths = [70, 140]
    call = random_call(seqlens_q=lengths, seqlens_k=lengths, causal=True,
                       deterministic=deterministic, **options)  # fmt: skip
    # a quarter of the rows is far from 0, which takes the marks
    scale = torch.where(torch.arange(call.q.shape[0]) % 4 == 0, 300.0, 1.0).to(call.q)
    call = call._replace(q=call.q * scale.view(-1, 1, 1))
    front = {name: torch.cat([getattr(call, name)[:1].expand(first, -1, -1), getattr(call, name)])
             for name in ("q", "k", "v")}  # fmt: skip
    starts = call.cu_seqlens_q + first
    behind = call._replace(**front, cu_seqlens_q=starts, cu_seqlens_k=starts)
    needs = Needs(True, True, True)
    results = []
    for each, skip in ((call, 0), (behind, first)):
        out, lse = module.forward(each)[:2]
        dout = torch.ones_like(out)
        grads = module.backward(each, dout, out, lse, None, needs)[:3]
        assert all(not x[:skip].any() for x in (out, *grads))
        results.append([out[skip:], lse[:, skip:], *(x[skip:] for x in grads)])
    for want, got in zip(*results, strict=True):
        assert_close(got, want, BFLOAT16)


@pytest.mark.parametrize("name", ["q", "k"])
def test_packed_rows_beyond_31_bits_are_refused(kernels, name):
    """The number of a row, or of a tile behind the last, in int32: rows elsewhere in memory."""
    module, device = kernels
    call = random_call(dtype=BF16, seqlens_q=[5, 3], seqlens_k=[4, 7], heads_q=1, device=device)
    rows = 2**31 - 1023
    many = {"q": call.q, "k": call.k, "v": call.v}
    for x in ("q",) if name == "q" else ("k", "v"):
        many[x] = many[x][:1].expand(rows, -1, -1)
    call = call._replace(**many)
    found = module._kernels()
    out = call.q
    lse = call.q[..., 0].transpose(0, 1).float() if name == "k" else call.q[..., 0].transpose(0, 1)
    native = found._native(call, found._canonical(call), out, lse)
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1024 rows on cuda, got 2147482625"):
        native.forward(0, 0, 0, 1, False)
