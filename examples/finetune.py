"""Train a small Llama on the Python that runs this, with transformers' Trainer: attn_ext against
torch's SDPA.

    python examples/finetune.py [--short] [--steps 60] [--length 512] [--out out/finetune]

The text is what every Python brings along: its licence and the docstrings of its standard library,
as bytes.  The same training runs with attn_implementation="attn_ext", with "sdpa", and with "sdpa"
in float64; the losses of the two float32 runs are held to the tolerance rule of attn_ext.testing.
Writes finetune.png (loss curves, time a step).
"""

from __future__ import annotations

import argparse
import ast
import copy
import statistics
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

from attn_ext.integrations import transformers as integration
from attn_ext.testing import assert_close_to_reference

try:
    import transformers
except ModuleNotFoundError:
    raise SystemExit('finetune.py needs transformers: pip install ".[integrations]"') from None

BATCH = 4
RUNS = {"attn_ext": torch.float32, "sdpa": torch.float32, "float64": torch.float64}


def python_text(size: int) -> bytes:
    """`size` bytes of the licence and the docstrings of the standard library of this Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    licence = folder / "LICENSE.txt"
    parts = [licence.read_text(errors="replace")] if licence.exists() else []
    length = sum(map(len, parts))
    for path in sorted(folder.glob("*.py")):
        try:
            with warnings.catch_warnings():  # escapes in strings of old modules
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        parts += [text for text in found if text]
        length += sum(len(text) for text in found if text)
        if length >= size:
            break
    data = "\n\n".join(parts).encode()
    if len(data) < size:
        raise SystemExit(f"this Python has {len(data)} bytes of docstrings, {size} are needed")
    return data[:size]


class Chunks(torch.utils.data.Dataset):
    """Pieces of `length` bytes as input_ids and labels, int64 [length]."""

    def __init__(self, data: bytes, length: int):
        self.pieces = torch.tensor(list(data)).view(-1, length)

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, index):
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def new_model(length: int):
    """A Llama of 2 layers, 4 query heads on 2 key heads, whose tokens are bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=length,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Log(transformers.TrainerCallback):
    """Loss and milliseconds of each step."""

    def __init__(self):
        self.losses, self.times, self._start = [], [], 0.0

    def on_step_begin(self, *_, **__):
        self._start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.times.append(1000 * (time.perf_counter() - self._start))

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class ExactLosses(transformers.Trainer):
    """Trainer that logs losses as they are (transformers rounds its log to 4 digits)."""

    def compute_loss(self, model, inputs, **options):
        loss = super().compute_loss(model, inputs, **options)
        self.callback_handler.call_event("on_log", self.args, self.state, self.control,
                                         logs={"loss": loss.item()})  # fmt: skip
        return loss


def train(model, run: str, data: Chunks, args) -> Log:
    """One run of the Trainer over `data` in its order, the same for every run."""
    model = copy.deepcopy(model).to(RUNS[run])
    model.set_attn_implementation("attn_ext" if run == "attn_ext" else "sdpa")
    log = Log()
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=BATCH,
            learning_rate=2e-3, warmup_steps=args.steps // 10, seed=7, data_seed=7,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=args.device == "cpu",
        )  # fmt: skip
        trainer = ExactLosses(model=model, args=options, train_dataset=data, callbacks=[log])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return log


def draw(logs: dict, path: Path, length: int) -> None:
    """Loss curves on the left, median time a step on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1))
    for run, style in zip(RUNS, ("-", "--", ":"), strict=True):
        left.plot(logs[run].losses, style, label=run if run != "float64" else "sdpa in float64")
    left.set(xlabel="step", ylabel="loss, nats a byte", title="the three curves lie on each other")
    left.legend()
    runs = ["attn_ext", "sdpa"]
    right.bar(runs, [statistics.median(logs[run].times) for run in runs], color=["C0", "C1"])
    right.set(ylabel="ms a training step", title=f"{BATCH} x {length} bytes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def arguments():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--length", type=int, default=512, help="bytes of a sequence")
    parser.add_argument("--out", type=Path, default=Path("out/finetune"), help="of the picture")
    parser.add_argument("--short", action="store_true", help="8 steps of 64 bytes (for CI)")
    args = parser.parse_args()
    if args.short:
        args.steps, args.length = 8, 64
    for name, least in (("steps", 2), ("length", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    """Train three times, check the losses, print the table, draw the picture."""
    args = arguments()
    transformers.logging.set_verbosity_error()
    integration.register()
    data = Chunks(python_text(args.steps * BATCH * args.length), args.length)
    model = new_model(args.length)
    logs = {run: train(model, run, data, args) for run in RUNS}
    losses = {run: torch.tensor(log.losses, dtype=RUNS[run]) for run, log in logs.items()}
    if any(len(x) != args.steps for x in losses.values()):
        raise SystemExit(f"each run must log {args.steps} losses: {losses}")
    assert_close_to_reference(
        losses["attn_ext"], losses["float64"], losses["sdpa"], "grad", "loss curve"
    )
    table = Table(title=f"{args.steps} steps of {BATCH} x {args.length} bytes on {args.device}")
    for column in ("attention", "first loss", "last loss", "off float64", "ms a step"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for run, log in logs.items():
        off = (losses[run].double() - losses["float64"]).abs().max()
        table.add_row(
            run, f"{log.losses[0]:.5f}", f"{log.losses[-1]:.5f}", f"{off:.1e}",
            f"{statistics.median(log.times):.1f}",
        )  # fmt: skip
    Console(width=100).print(table)
    print("loss curves agree with float64 by the rule of attn_ext.testing")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(logs, args.out / "finetune.png", args.length)
    print(f"wrote {args.out / 'finetune.png'}")


if __name__ == "__main__":
    main()
