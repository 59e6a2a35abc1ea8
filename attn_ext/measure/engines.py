"""Peers that run a graph of one operator: ONNX Runtime and OpenVINO, forward on the CPU only, with
as many threads as torch.  Inputs are handed over without a copy, in the layout each likes best.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attn_ext.measure.cases import Case


class Unavailable(Exception):
    """Why a peer cannot run a case here"""


@dataclass
class Bound:
    """A peer bound to inputs: `forward()` gives what `result` turns into out [B, Hq, Sq, D]"""

    forward: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    result: Callable[[object], torch.Tensor] = lambda out: out
    differentiable: bool = True


def _forward_on_cpu(module: str, case: Case, dtypes: tuple[str, ...]) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed (pip install 'attn_ext[peers]')")
    if case.device != "cpu":
        raise Unavailable("is measured on the CPU only")
    if case.direction != "fwd":
        raise Unavailable("has no backward")
    if case.dtype not in dtypes:
        raise Unavailable(f"computes {' and '.join(dtypes)} only on a CPU")


def _onnx_session(case: Case, node, inputs: dict, outputs: dict, opset: int):
    """(session, binding, results) of a graph of one node; inputs: name -> tensor, outputs: name ->
    shape.  Each run overwrites results[name].
    """
    import onnx
    import onnxruntime as ort

    kinds = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.int32: onnx.TensorProto.INT32,
    }
    value = onnx.helper.make_tensor_value_info
    dtype = case.torch_dtype
    graph = onnx.helper.make_graph(
        [node],
        "one_op",
        [value(n, kinds[x.dtype], list(x.shape)) for n, x in inputs.items()],
        [value(n, kinds[dtype], shape) for n, shape in outputs.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, tensor in inputs.items():
        binding.bind_cpu_input(name, tensor.numpy())
    results = {}
    for name, shape in outputs.items():
        zeros = torch.zeros(shape, dtype=dtype, device="cpu").numpy()
        results[name] = ort.OrtValue.ortvalue_from_numpy(zeros)
        binding.bind_ortvalue_output(name, results[name])
    return session, binding, results


def _bound_session(case: Case, node, inputs, outputs, opset, result) -> Bound:
    session, binding, results = _onnx_session(case, node, inputs, outputs, opset)
    first = next(iter(outputs))

    def forward():
        session.run_with_iobinding(binding)
        return results[first]

    return Bound(
        forward, result=lambda o: result(torch.from_numpy(o.numpy())), differentiable=False
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as a contiguous [B, S, H * D]"""
    return x.transpose(1, 2).flatten(2).contiguous()


def _heads(case: Case):
    return lambda out: out.view(case.batch, case.seqlen_q, case.heads_q, -1).transpose(1, 2)


def onnx_mha(case: Case, q, k, v) -> Bound:
    """com.microsoft.MultiHeadAttention"""
    _forward_on_cpu("onnxruntime", case, ("fp32",))
    if case.heads_q != case.heads_k:
        raise Unavailable("has no grouped heads")
    if case.causal and case.seqlen_q != case.seqlen_k:
        raise Unavailable("is causal for equal lengths only")
    from onnx import helper

    node = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["out"], domain="com.microsoft",
        num_heads=case.heads_q, unidirectional=int(case.causal),
    )  # fmt: skip
    inputs = {"q": _rows(q), "k": _rows(k), "v": _rows(v)}
    return _bound_session(case, node, inputs, {"out": inputs["q"].shape}, 20, _heads(case))


def onnx_gqa(case: Case, q, k, v) -> Bound:
    """com.microsoft.GroupQueryAttention on a prompt: always causal"""
    _forward_on_cpu("onnxruntime", case, ("fp32",))
    if not case.causal or case.seqlen_q != case.seqlen_k:
        raise Unavailable("its prompt form is causal with equal lengths only")
    from onnx import helper

    node = helper.make_node(
        "GroupQueryAttention", ["q", "k", "v", "", "", "lengths", "total"],
        ["out", "present_k", "present_v"], domain="com.microsoft",
        num_heads=case.heads_q, kv_num_heads=case.heads_k,
    )  # fmt: skip
    lengths = torch.full((case.batch,), case.seqlen_k - 1, dtype=torch.int32, device="cpu")
    inputs = {"q": _rows(q), "k": _rows(k), "v": _rows(v), "lengths": lengths}
    inputs["total"] = torch.tensor([case.seqlen_k], dtype=torch.int32, device="cpu")
    outputs = {"out": inputs["q"].shape, "present_k": k.shape, "present_v": v.shape}
    return _bound_session(case, node, inputs, outputs, 20, _heads(case))


def onnx_attention(case: Case, q, k, v) -> Bound:
    """Attention of ONNX opset 23"""
    _forward_on_cpu("onnxruntime", case, ("fp32",))
    if case.causal and case.seqlen_q != case.seqlen_k:
        raise Unavailable("its is_causal is aligned to the top left")
    from onnx import helper

    node = helper.make_node("Attention", ["q", "k", "v"], ["out"], is_causal=int(case.causal))
    inputs = {"q": q, "k": k, "v": v}
    return _bound_session(case, node, inputs, {"out": q.shape}, 23, lambda out: out)


def openvino(case: Case, q, k, v) -> Bound:
    """opset13 ScaledDotProductAttention"""
    _forward_on_cpu("openvino", case, ("fp32", "bf16", "fp16"))
    if case.causal and case.seqlen_q != case.seqlen_k:
        raise Unavailable("is causal for equal lengths only")
    if case.heads_q != case.heads_k:  # as exported models do it: K and V repeated
        group = case.heads_q // case.heads_k
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    import numpy as np
    import openvino as ov
    from openvino import opset13

    kind = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "fp16": ov.Type.f16}[case.dtype]
    parameters = [opset13.parameter(list(x.shape), kind) for x in (q, k, v)]
    sdpa = opset13.scaled_dot_product_attention(*parameters, causal=case.causal)
    precision = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[case.dtype]
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": 1,
    }
    compiled = ov.Core().compile_model(ov.Model([sdpa], parameters), "CPU", options)
    request = compiled.create_infer_request()
    keep = (q, k, v)  # the tensors below are views of these

    def view(x: torch.Tensor) -> ov.Tensor:
        if x.dtype != torch.bfloat16:
            return ov.Tensor(x.numpy(), shared_memory=True)
        raw = x.view(torch.int16).numpy()
        return ov.Tensor(raw, ov.Shape(list(x.shape)), kind)

    for i, x in enumerate(keep):
        request.set_input_tensor(i, view(x))

    def forward():
        request.infer()
        return keep

    def result(_):
        out = request.get_output_tensor(0)
        if case.dtype == "bf16" and out.get_element_type() == ov.Type.bf16:
            raw = np.frombuffer(out.data, dtype=np.int16).reshape(q.shape)
            return torch.from_numpy(raw.copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(out.data)).view(q.shape)

    return Bound(forward, result=result, differentiable=False)


def _ggml(case: Case):
    """The module `ggml` of ggml-py, or why it cannot run a case"""
    if importlib.util.find_spec("ggml") is None:
        raise Unavailable("ggml is not installed (pip install ggml-py, which builds it)")
    _forward_on_cpu("ggml", case, ("fp32", "bf16", "fp16"))
    import ggml

    if not hasattr(ggml, "ggml_flash_attn_ext"):  # other packages have that name, too
        raise Unavailable("this module ggml has no ggml_flash_attn_ext: install ggml-py")
    return ggml


def ggml_flash(case: Case, q, k, v) -> Bound:
    """ggml_flash_attn_ext on the CPU.  Its Q and O are float32 whatever K and V are, as they are in
    llama.cpp; Q is converted before time is taken.
    """
    ggml = _ggml(case)
    import ctypes

    kind = {"fp32": ggml.GGML_TYPE_F32, "bf16": ggml.GGML_TYPE_BF16, "fp16": ggml.GGML_TYPE_F16}
    queries = q.float()
    mask = _ggml_mask(case) if case.causal else None
    tensors = [(queries, "fp32"), (k, case.dtype), (v, case.dtype)]
    tensors += [] if mask is None else [(mask, "fp16")]
    size = sum(x.numel() * x.element_size() for x, _ in tensors) + queries.numel() * 4 + (1 << 20)
    context = ggml.ggml_init(ggml.ggml_init_params(size, None, False))
    made = []
    for x, dtype in tensors:
        made.append(ggml.ggml_new_tensor_4d(context, kind[dtype], *reversed(x.shape)))
        x = x.contiguous()
        ctypes.memmove(ggml.ggml_get_data(made[-1]), x.data_ptr(), x.numel() * x.element_size())
    flash = ggml.ggml_flash_attn_ext
    flash.argtypes = [*flash.argtypes[:7], ctypes.c_float]  # ggml-py 0.10 leaves out the softcap
    masked = made[3] if mask is not None else None
    node = flash(context, *made[:3], masked, case.head_dim**-0.5, 0.0, 0.0)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, node)
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())

    def forward():
        ggml.ggml_backend_graph_compute(backend, graph)

    def result(_):
        shape = (case.batch, case.seqlen_q, case.heads_q, case.head_dim)
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        ctypes.memmove(out.data_ptr(), ggml.ggml_get_data(node), out.numel() * 4)
        return out.transpose(1, 2).to(q.dtype)

    return Bound(forward, result=result, differentiable=False)


def _ggml_mask(case: Case) -> torch.Tensor:
    """The causal mask as ggml reads it: 0 or -inf, in whole blocks of 64 rows"""
    rows = -(-case.seqlen_q // 64) * 64
    mask = torch.zeros(1, 1, rows, case.seqlen_k, dtype=torch.float16, device="cpu")
    visible = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device="cpu")
    visible = visible.tril(case.seqlen_k - case.seqlen_q)
    mask[:, :, : case.seqlen_q].masked_fill_(~visible, -torch.inf)
    return mask
