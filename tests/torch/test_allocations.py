"""Every tensor that the package makes says its device and dtype: torch.set_default_device and
torch.set_default_dtype are the user's, and change no result.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("default_device_worker.py")
FILES = sorted([*ROOT.glob("attn_ext/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")])
# torch's functions whose result goes to the default device; of the first ones it also has the
# default dtype, whatever the arguments (tensor, full and scalar_tensor: if they are floats)
BY_DTYPE = {
    "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided", "eye", "full",
    "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace", "ones", "rand",
    "randn", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
BY_DEVICE = {
    "Generator", "arange", "as_tensor", "asarray", "randint", "randperm", "sparse_bsc_tensor",
    "sparse_bsr_tensor", "sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csc_tensor",
    "sparse_csr_tensor", "tril_indices", "triu_indices",
}  # fmt: skip
OLD = {
    "BoolTensor", "ByteTensor", "DoubleTensor", "FloatTensor", "HalfTensor", "IntTensor",
    "LongTensor", "Tensor", "range",
}  # fmt: skip


def keywords(call: ast.Call, tree: ast.Module) -> set:
    """The names that are passed by keyword, those of `**options` too where `options` is everywhere
    in the file a dict written out."""
    names = {k.arg for k in call.keywords if k.arg}
    for given in (k.value for k in call.keywords if k.arg is None):
        written = [
            {key.value for key in node.value.keys} if isinstance(node.value, ast.Dict) else set()
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == ast.unparse(given)
        ]
        names |= set.intersection(*written) if written else set()
    return names


def faults(text: str) -> list[str]:
    """What is allocated in this source text without saying where or of which dtype."""
    found, tree = [], ast.parse(text)
    parameters = {  # made where and as a module's other parameters are: by the user's defaults
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            names = {alias.name for alias in node.names} & (BY_DTYPE | BY_DEVICE | OLD)
            names.discard("Tensor")  # for annotations; a call of it is found below
            found += [f"line {node.lineno}: {name} imported from torch" for name in sorted(names)]
        if not isinstance(node, ast.Call) or id(node) in parameters:
            continue
        module, _, name = ast.unparse(node.func).rpartition(".")
        if ast.unparse(node.func) == "Tensor":
            module = "torch"
        if module != "torch" or name not in BY_DTYPE | BY_DEVICE | OLD:
            continue
        given = keywords(node, tree)
        if name == "Generator" and node.args:
            given.add("device")
        wanted = ["device"] * (name not in OLD) + ["dtype"] * (name in BY_DTYPE)
        missing = [w for w in wanted if w not in given] + ["another function"] * (name in OLD)
        found += (
            [f"line {node.lineno}: torch.{name} without {', '.join(missing)}"] if missing else []
        )
    return found


def test_every_allocation_says_its_device_and_dtype():
    """A result on the default device: a crash where a kernel gets a pointer to no memory."""
    found = {str(p.relative_to(ROOT)): faults(p.read_text()) for p in FILES}
    assert len(found) > 80 and not {name: what for name, what in found.items() if what}


def test_the_lint_finds_what_it_is_for():
    """A lint that has gone blind; the list of functions against torch's own."""
    for bad in (
        "torch.zeros(3)", "torch.zeros(3, dtype=d)", "torch.zeros(3, device=d)", "torch.arange(3)",
        "torch.Generator()", "torch.tensor([1.0], device=d)", "torch.Tensor(3)", "Tensor(3)",
        "torch.full((2,), 1, **options)", "options = {'dtype': d}\ntorch.empty(2, **options)",
        "from torch import ones", "w = nn.Parameter(a)\nw.copy_(torch.rand(2))",
    ):  # fmt: skip
        assert len(faults(bad)) == 1, bad
    for good in (
        "torch.zeros(3, dtype=d, device=d)", "torch.arange(3, device=d)", "x.new_zeros(3)",
        "torch.Generator('cpu')", "nn.Parameter(torch.rand(2) * 3)", "tl.zeros([3], tl.float32)",
        "options = {'dtype': d, 'device': d}\ntorch.empty(2, **options)",
    ):  # fmt: skip
        assert not faults(good), good
    torch.set_default_device("meta")
    try:
        arguments = {"arange": (2,), "randint": (2, (2,)), "randperm": (2,),
                     "as_tensor": (2,), "asarray": (2,), "tril_indices": (2, 2),
                     "triu_indices": (2, 2), "empty_permuted": ((2,), (0,)), "full": ((2,), 1.0),
                     "empty_strided": ((2,), (1,)), "linspace": (0, 1, 2), "logspace": (0, 1, 2),
                     "tensor": (2.0,), "scalar_tensor": (2.0,)}  # fmt: skip
        for name in BY_DTYPE | BY_DEVICE:
            if name != "Generator" and not name.startswith("sparse"):
                assert getattr(torch, name)(*arguments.get(name, (2,))).is_meta, name
    finally:
        torch.set_default_device(None)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker gave without and with defaults that no kernel can use."""
    folder, found = tmp_path_factory.mktemp("defaults"), []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for device, dtype in (("none", "float32"), ("meta", "float64")):
        file = folder / f"{device}.pt"
        done = subprocess.run(
            [sys.executable, str(WORKER), device, dtype, str(file)], env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.returncode} with {device}: {done.stderr[-2000:]}"
        found.append(torch.load(file, weights_only=True))
    return found


def test_defaults_change_no_result(results):
    """A scratch tensor or a result on the default device or of the default dtype."""
    plain, defaulted = results
    assert plain.keys() == defaulted.keys() and len(plain) > 200
    for name, want in plain.items():
        got = defaulted[name]
        if isinstance(want, str):
            assert got == want, name
            continue
        assert (got.device, got.dtype, got.shape) == (want.device, want.dtype, want.shape), name
        assert torch.equal(got.nan_to_num(nan=9e9), want.nan_to_num(nan=9e9)), name
