"""Handlers of what a warp, a warpgroup or the copy engine does: rendezvous, copies, matrices."""

from __future__ import annotations

import re

from ptx.emit import Emitter, Opcode, handles
from ptx.parse import Unsupported

HERE = "{__builtin_FILE(), __builtin_LINE()}"


def _words(em: Emitter, args: list[str]) -> list[str]:
    return [em.read(each, "u32") for each in args]


# ---- rendezvous ----------------------------------------------------------------------------------
@handles("bar", "barrier")
def barrier(em: Emitter, op: Opcode, args: list[str]) -> str:
    if op.take("warp"):
        op.take("sync")
        return f"compiled::sync_warp({em.read(args[0], 'u32')});"
    op.take("cta"), op.take("aligned")
    if op.take("red"):
        if not op.take("or") or not op.take("pred"):
            raise Unsupported("a reduction other than .or.pred")
        barrier_id, threads = (
            _words(em, args[1:3]) if len(args) == 4 else [*_words(em, args[1:2]), "0u"]
        )
        return em.write(
            args[0], "pred", f"barrier_or({barrier_id}, {threads}, {em.read(args[-1], 'pred')})"
        )
    what = op.one_of("sync", "arrive")
    if not what:
        raise Unsupported("a barrier other than .sync, .arrive and .red")
    words = [*_words(em, args), "0u"][:2]
    return f"compiled::barrier({', '.join(words)}, {'true' if what == 'sync' else 'false'});"


@handles("shfl")
def shuffle(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("sync"), op.take("b32")
    kind = op.one_of("up", "down", "bfly", "idx").upper()
    target, *predicate = (each.strip() for each in args[0].split("|"))
    text = f"const auto s = shuffle(compiled::Shuffle::{kind}, {', '.join(_words(em, args[1:5]))});"
    text += em.write(target, "b32", "s.value")
    return text + "".join(em.write(each, "pred", "s.inside") for each in predicate)


@handles("vote")
def vote(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("sync")
    how, mask = op.one_of("ballot", "any", "all"), em.read(args[2], "u32")
    op.kind()
    negated = f"!{em.read(args[1], 'pred')}" if how == "all" else em.read(args[1], "pred")
    bits = f"ballot({negated}, {mask})"
    if how == "ballot":
        return em.write(args[0], "b32", bits)
    return em.write(args[0], "pred", f"{bits} {'==' if how == 'all' else '!='} 0")


@handles("redux")
def reduction(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("sync")
    kind, how = op.kind(), op.one_of("add", "min", "max", "and", "or", "xor")
    value = {
        "add": "x + y", "and": "x & y", "or": "x | y", "xor": "x ^ y",
        "min": "std::min(x, y)", "max": "std::max(x, y)",
    }[how]  # fmt: skip
    if kind not in ("u32", "s32", "b32"):
        raise Unsupported(f"redux of {kind}")
    both = f"[](auto x, auto y) {{ return decltype(x)({value}); }}"
    value = f"reduce({em.read(args[1], kind)}, {em.read(args[2], 'u32')}, {both})"
    return em.write(args[0], kind, value)


@handles("elect")
def elect(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("sync")
    target, predicate = (each.strip() for each in args[0].split("|"))
    text = f"const bool chosen = elect({em.read(args[1], 'u32')});"
    text += em.write(predicate, "pred", "chosen")
    if target != "_":
        text += em.write(target, "u32", "elected(chosen)")
    return text


# ---- copies --------------------------------------------------------------------------------------
@handles("cp")
def copy(em: Emitter, op: Opcode, args: list[str]) -> str:
    if op.take("reduce"):
        return _bulk_add(em, op, args)
    if not op.take("async"):
        raise Unsupported("a copy that is not asynchronous")
    if op.take("bulk"):
        return _bulk(em, op, args)
    if op.take("commit_group"):
        return f"machine.copy_commit({HERE});"
    if op.take("wait_group"):
        return f"machine.copy_wait({int(args[0], 0)}, {HERE});"
    if op.take("wait_all"):
        return f"machine.copy_commit({HERE}); machine.copy_wait(0, {HERE});"
    how, size = op.one_of("cg", "ca"), int(args[2], 0)
    if (how, size) != ("cg", 16) and (how != "ca" or size not in (4, 8, 16)):
        raise Unsupported(f"cp.async.{how} of {size} bytes")
    op.take("shared") or op.take("shared::cta"), op.take("global")
    for each in ("L2::64B", "L2::128B", "L2::256B"):
        op.take(each)
    source = em.read(args[3], "u32") if len(args) > 3 else f"{size}u"
    to, from_ = em.address(args[0], "u32"), em.address(args[1], "u64")
    return f"copy_async({to}, {from_}, {size}, {source});"


def _bulk(em: Emitter, op: Opcode, args: list[str]) -> str:
    if op.take("commit_group"):
        return f"machine.bulk_commit({HERE});"
    if op.take("wait_group"):
        wait = "bulk_wait_read" if op.take("read") else "bulk_wait"
        return f"machine.{wait}({int(args[0], 0)}, {HERE});"
    if not op.take("tensor") or not op.take("4d"):
        raise Unsupported("a bulk copy other than of a tensor with 4 dimensions")
    if op.parts[:2] == ["global", "shared::cta"]:
        return _tensor_store(em, op, args)
    if not (op.take("shared::cluster") or op.take("shared::cta")):
        raise Unsupported("a copy to global memory")
    op.take("global"), op.take("tile")
    if not op.take("mbarrier::complete_tx::bytes"):
        raise Unsupported("a load that no mbarrier counts")
    map_, corner = _tensor(em, args[1])
    to, bar = em.address(args[0], "u32"), em.address(args[2], "u32")
    return f"tensor_load({to}, {map_}, {bar}, {{{corner}}});"


def _tensor(em: Emitter, operand: str) -> tuple[str, str]:
    """The address of a tensor map and a corner of a box."""
    match = re.fullmatch(r"\[\s*([^\s,]+)\s*,\s*\{(.*)\}\s*\]", operand)
    if match is None:
        raise Unsupported(f"tensor operand {operand}")
    corner = ", ".join(em.read(each.strip(), "s32") for each in match[2].split(","))
    return em.read(match[1], "u64"), corner


def _tensor_store(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("global"), op.take("shared::cta"), op.take("tile")
    if not op.take("bulk_group"):
        raise Unsupported("a store of no bulk group")
    map_, corner = _tensor(em, args[0])
    return f"tensor_store({map_}, {{{corner}}}, {em.address(args[1], 'u32')});"


def _bulk_add(em: Emitter, op: Opcode, args: list[str]) -> str:
    for each in ("async", "bulk", "global", "shared::cta", "bulk_group", "add", "f32"):
        if not op.take(each):
            raise Unsupported("a reduction other than the sum of floats of shared memory in global")
    to, from_ = em.address(args[0], "u64"), em.address(args[1], "u32")
    size = em.read(args[2], "u32")
    return f"machine.bulk_add(reinterpret_cast<float*>({to}), {from_}, int({size}), {HERE});"


@handles("mbarrier")
def mbarrier(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("shared::cta") or op.take("shared"), op.take("b64")
    if op.take("init"):
        count = em.read(args[1], "u32")
        return f"machine.mbarrier_init({em.address(args[0], 'u32')}, int({count}), {HERE});"
    if op.take("inval"):
        return f"machine.mbarrier_inval({em.address(args[0], 'u32')}, {HERE});"
    if op.take("try_wait"):
        if not op.take("parity"):
            raise Unsupported("try_wait by a state")
        bar, parity = em.address(args[1], "u32"), em.read(args[2], "u32")
        wait = "try_wait_or_not" if em.kernel.prints else "try_wait"
        return em.write(args[0], "pred", f"{wait}({bar}, {parity})")
    if not op.take("arrive"):
        raise Unsupported("unknown operation of an mbarrier")
    op.take("release"), op.take("cta")
    if args[0] != "_":
        raise Unsupported("the state that an arrival gives")
    size, count = "0", "1"
    if op.take("expect_tx"):
        size = f"int({em.read(args[2], 'u32')})"
    elif len(args) > 2:
        count = em.read(args[2], "u32")
    arrival = f"machine.mbarrier_arrive({em.address(args[1], 'u32')}, {size}, {HERE});"
    return f"for (uint32_t i = 0; i < {count}; ++i) {{ {arrival} }}"


@handles("setmaxnreg")
def set_registers(em: Emitter, op: Opcode, args: list[str]) -> str:
    more = str(op.one_of("inc", "dec") == "inc").lower()
    op.take("sync"), op.take("aligned"), op.take("u32")
    return f"machine.set_registers({int(args[0], 0)}, {more}, {HERE});"


# ---- matrices ------------------------------------------------------------------------------------
@handles("ldmatrix")
def load_matrix(em: Emitter, op: Opcode, args: list[str]) -> str:
    for part in ("sync", "aligned", "m8n8", "b16"):
        if not op.take(part):
            raise Unsupported("tiles other than m8n8 of b16")
    op.take("shared") or op.take("shared::cta")
    tiles, trans = int(op.one_of("x1", "x2", "x4")[1:]), "true" if op.take("trans") else "false"
    if len(em.vector(args[0])) != tiles:
        raise Unsupported(f"{tiles} tiles to {len(em.vector(args[0]))} registers")
    text = f"uint32_t tiles[{tiles}];"
    text += f"load_matrix<{trans}, {tiles}>(tiles, {em.address(args[1], 'u32')});"
    return text + "".join(
        em.write(target, "b32", f"tiles[{i}]") for i, target in enumerate(em.vector(args[0]))
    )


@handles("stmatrix")
def store_matrix(em: Emitter, op: Opcode, args: list[str]) -> str:
    for part in ("sync", "aligned", "m8n8", "b16"):
        if not op.take(part):
            raise Unsupported("tiles other than m8n8 of b16")
    op.take("shared") or op.take("shared::cta")
    count, trans = int(op.one_of("x1", "x2", "x4")[1:]), "true" if op.take("trans") else "false"
    tiles = _words(em, em.vector(args[1]))
    if len(tiles) != count:
        raise Unsupported(f"{count} tiles of {len(tiles)} registers")
    text = f"const uint32_t tiles[{count}] = {{{', '.join(tiles)}}};"
    return text + f"stmatrix({em.address(args[0], 'u32')}, tiles, {count}, {trans});"


MMA = {
    ("m16n8k16", "f32", "bf16", "bf16", "f32"): "mma_bf16",
    ("m16n8k16", "f32", "f16", "f16", "f32"): "mma_fp16",
    ("m16n8k8", "f32", "tf32", "tf32", "f32"): "mma_tf32",
}


@handles("mma")
def multiply(em: Emitter, op: Opcode, args: list[str]) -> str:
    for part in ("sync", "aligned", "row", "col"):
        if not op.take(part):
            raise Unsupported("an mma other than .row.col")
    call = MMA.get(tuple(op.parts))
    if call is None:
        raise Unsupported("unknown shape or types of mma")
    op.parts.clear()
    a, b = (", ".join(_words(em, em.vector(each))) for each in args[1:3])
    sums = ", ".join(em.read(each, "f32") for each in em.vector(args[3]))
    text = (
        f"float c[4] = {{{sums}}}; const uint32_t a[4] = {{{a}}}, b[2] = {{{b}}}; {call}(c, a, b);"
    )
    return text + "".join(
        em.write(target, "f32", f"c[{i}]") for i, target in enumerate(em.vector(args[0]))
    )


@handles("wgmma")
def warpgroup(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("sync"), op.take("aligned")
    if op.take("fence"):
        return f"machine.wgmma_fence({HERE});"
    if op.take("commit_group"):
        return f"machine.wgmma_commit({HERE});"
    if op.take("wait_group"):
        keep = int(args[0], 0)
        em.effect.lands = 1 if keep else 2
        return f"machine.wgmma_wait({keep}, {HERE});"
    if not op.take("mma_async"):
        raise Unsupported("unknown operation of a warpgroup")
    return _product(em, op, args)


def _product(em: Emitter, op: Opcode, args: list[str]) -> str:
    shape, *types = op.parts
    op.parts.clear()
    columns = re.fullmatch(r"m64n(\d+)k(16|8)", shape)
    deep = columns and columns[2] == "16"
    known = (["f32", "bf16", "bf16"], ["f32", "f16", "f16"]) if deep else (["f32", "tf32", "tf32"],)
    if columns is None or types not in known:
        raise Unsupported("unknown shape or types of wgmma")
    registers, count = em.vector(args[0]), int(columns[1]) // 2
    from_registers = args[1].startswith("{")
    scale, *signs = args[3:6]
    transposed = args[6:]
    if len(registers) != count or signs != ["1", "1"]:
        raise Unsupported("accumulators by another number, or a negated operand")
    # of 16 bits each operand in shared memory may be K-major or, "1", MN-major
    orders = [] if not deep else ["b"] if from_registers else ["a", "b"]
    if len(transposed) != len(orders) or not set(transposed) <= {"0", "1"}:
        raise Unsupported("unknown orders of the operands")
    major = dict(zip(orders, transposed, strict=True))
    em.raw = em.effect.flies = True
    sums = ", ".join(em.read(each, "b32") for each in registers)
    em.raw = False
    a, a_smem = "nullptr", "0"
    text = f"uint32_t d[{count}] = {{{sums}}};"
    if from_registers:
        text += f"const uint32_t a[4] = {{{', '.join(_words(em, em.vector(args[1])))}}};"
        a = "a"
    else:
        a_smem = em.read(args[1], "u64")
    flags = [em.read(scale, "pred"),
             *("true" if major.get(each) == "1" else "false" for each in "ab"),
             *("true" if kind in types else "false" for kind in ("bf16", "tf32"))]  # fmt: skip
    text += f"product(d, {count}, {a}, {a_smem}, {em.read(args[2], 'u64')}, {', '.join(flags)});"
    return text + "".join(em.write(each, "b32", f"d[{i}]") for i, each in enumerate(registers))
