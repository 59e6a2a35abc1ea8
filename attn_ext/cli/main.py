"""attn-ext: the commands and their options.  Each command's work is in a module of its own.

Exit codes: 0 done, 1 a check failed, 2 a bad argument (one line on stderr), 130 interrupted.
A further command is one more function here: `@app.command()`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from attn_ext.cli.errors import BadArgument

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def words(text: str | None) -> list[str] | None:
    """The words of a comma-separated option; None where it was not given"""
    return [w.strip() for w in text.split(",") if w.strip()] if text is not None else None


def writable(path: Path | None, option: str, folder: bool = False) -> Path | None:
    """`path` with its folder made; BadArgument where that cannot be"""
    if path is None:
        return None
    try:
        (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"{option} cannot be written: {error}") from None
    if not folder and path.is_dir():
        raise BadArgument(f"{option} must be a file, got the folder {path}")
    return path


def _print_version(asked: bool) -> None:
    if asked:
        import attn_ext

        print(f"attn_ext {attn_ext.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Exact attention, verified and measured on this machine."""


@app.command()
def doctor(json: Json = False) -> int:
    """What this machine has, which backends work, and what to do about those that do not."""
    from attn_ext.cli import doctor as command

    return command.run(json)


@app.command()
def look(
    file: Annotated[Path, typer.Argument(help="what attn_ext.inspect.record(...).save() wrote")],
    tokens: Annotated[
        str | None,
        typer.Option(help="the tokens, separated by spaces, or FILE.json, a list of strings"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("out/look"),
    title: Annotated[str, typer.Option(help="title of both")] = "attention",
) -> int:
    """Draw recorded attention: a heat map, and a page that shows what each token attends to."""
    from attn_ext.cli import look as command

    return command.run(file, tokens, writable(out, "--out", folder=True), title)


@app.command()
def verify(
    backend: Annotated[
        str | None, typer.Option(help="backends to verify, comma-separated; default: all here")
    ] = None,
    also: Annotated[
        str | None, typer.Option(help="peers to put through the same matrix: torch, flash_attn")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="under a minute; the default")] = False,
    full: Annotated[bool, typer.Option("--full", help="longer sequences, offsets > 2^31")] = False,
    only: Annotated[
        str | None, typer.Option(help="only checks whose group or name contains this")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: both")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="a peer's failure counts too")] = False,
    report: Annotated[Path | None, typer.Option(help="write an HTML report to this file")] = None,
    json: Json = False,
) -> int:
    """Run the conformance matrix, forward and backward, against the float64 reference."""
    from attn_ext.cli import verify as command

    if quick and full:
        raise BadArgument("--quick and --full exclude each other")
    report = writable(report, "--report")
    return command.run(words(backend), words(also), full, only, device, strict, report, json)


@app.command()
def bench(
    preset: Annotated[
        str | None, typer.Option(help="train, prefill, decode, bert, vit or long")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="B,H,S,D; H may be Hq/Hk and S may be Sq/Sk")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16; comma-separated")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="of --shape")] = False,
    backward: Annotated[
        bool, typer.Option("--backward", help="measure forward + backward")
    ] = False,
    peers: Annotated[
        str | None, typer.Option(help="comma-separated, or all; default: all but flex")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any")] = None,
    budget: Annotated[float, typer.Option(help="seconds of timing a case")] = 2.0,
    out: Annotated[
        Path | None, typer.Option(help="folder for bench.json, .csv, .md and the figures")
    ] = None,
    json: Json = False,
) -> int:
    """Time attn_ext and every peer, each checked first, against the machine's ceiling."""
    from attn_ext.cli import bench as command

    if preset and shape:
        raise BadArgument("--preset and --shape exclude each other")
    if not 0 < budget <= 3600:
        raise BadArgument(f"--budget must be above 0 and at most 3600 seconds, got {budget}")
    if shape is None and preset is None:
        preset = "bert"
    cases = command.cases(preset, shape, words(dtype), causal, backward, device)
    return command.run(cases, words(peers), budget, writable(out, "--out", folder=True), json)


@app.command()
def explain(
    shape: Annotated[str, typer.Option(help="B,H,S,D; H may be Hq/Hk and S may be Sq/Sk")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    causal: Annotated[bool, typer.Option("--causal")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="with gradients")] = False,
    features: Annotated[
        str | None,
        typer.Option(help="mask, bias, softcap, alibi, sink, dropout, window, stats; with commas"),
    ] = None,
    kind: Annotated[str, typer.Option(help="dense, varlen or decode")] = "dense",
    json: Json = False,
) -> int:
    """The backend that a call would get, and each other one with its reason."""
    from attn_ext.cli import explain as command

    return command.run(shape, dtype, device, causal, backward, words(features), kind, json)


@app.command()
def compile(
    arch: Annotated[
        str | None, typer.Option(help="80, 86, 89, 90a, 100, 120; with commas; default: this GPU")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="llama, bert, gpt2 or vit")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="B,H,S,D; H may be Hq/Hk and S may be Sq/Sk")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32; with commas")] = "bf16",
    features: Annotated[
        list[str] | None,
        typer.Option(help="of a kind of calls: causal,mask ...; none; again for another kind"),
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="with gradients")] = False,
    keep: Annotated[Path | None, typer.Option(help="write the machine code here, too")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="take compiled kernels away")] = False,
    json: Json = False,
) -> int:
    """Compile the CUDA kernels of a model ahead of time; needs NVRTC and no GPU."""
    from attn_ext.cli import compile as command

    if clear:
        return command.clear(json)
    found = words(arch) or command.here()
    keep = writable(keep, "--keep", folder=True)
    kinds = [words(kind) or [] for kind in features or []]
    return command.run(found, preset, shape or [], words(dtype) or [], kinds, backward, keep, json)


@app.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,  # --out after the script's name is the script's own
    }
)
def profile(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="folder for trace.json, profile.html, .json")] = Path(
        "attn-ext-profile"
    ),
    replay: Annotated[bool, typer.Option(help="measure what attn_ext would save")] = True,
    skip_steps: Annotated[
        int | None, typer.Option(help="first steps not to count; else those that warm up")
    ] = None,
    json: Json = False,
) -> int:
    """Run a script (attn-ext profile -- python train.py ...): how much of it is attention?"""
    from attn_ext.cli import profile as command

    if skip_steps is not None and skip_steps < 0:
        raise BadArgument(f"--skip-steps must be at least 0, got {skip_steps}")
    folder = writable(out, "--out", folder=True)
    return command.run(context.args, folder, replay, json, skip_steps)


@app.command()
def tune(
    minutes: Annotated[float, typer.Option(help="nothing more is begun after these")] = 3.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if any")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="forget what was measured before")] = False,
    head_dims: Annotated[str, typer.Option(help="of Triton's tiles; comma-separated")] = "64,128",
    dtype: Annotated[str, typer.Option(help="of Triton's tiles: bf16, fp16 or fp32")] = "bf16",
    out: Annotated[Path | None, typer.Option(help="copy the table to this file")] = None,
    json: Json = False,
) -> int:
    """Measure this machine's kernels, torch's own among them, for "auto" to take the fastest."""
    from attn_ext.cli import tune as command

    if not 0 < minutes <= 600:
        raise BadArgument(f"--minutes must be above 0 and at most 600, got {minutes}")
    if dtype not in command.DTYPES:
        raise BadArgument(f"--dtype must be one of {', '.join(command.DTYPES)}, got {dtype!r}")
    dims = words(head_dims)
    if not dims or not all(d.isdecimal() and 1 <= int(d) <= 256 for d in dims):
        raise BadArgument(f"--head-dims must be numbers from 1 to 256, got {head_dims!r}")
    dims = [int(d) for d in dims]
    out = writable(out, "--out")
    return command.run(minutes, device, anew, dims, command.DTYPES[dtype], out, json)


def _line(message: str) -> str:
    return " ".join(str(message).split())


def _fit_output() -> None:
    """Tables on any terminal: `?` for what its encoding lacks, and a width of 0 means unknown"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and "utf" not in (stream.encoding or "").lower():
            stream.reconfigure(errors="replace")
    if os.environ.get("COLUMNS", "").strip("0") == "":
        os.environ.pop("COLUMNS", None)


def main(argv: list[str] | None = None) -> int:
    """Run `attn-ext` with `argv` (sys.argv if None) and return the exit code"""
    _fit_output()
    try:
        return int(app(args=argv, prog_name="attn-ext", standalone_mode=False) or 0)
    except KeyboardInterrupt:
        print("attn-ext: interrupted", file=sys.stderr)
        return 130
    except BadArgument as error:
        print(f"attn-ext: {_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stdout = None  # nobody reads any more: say nothing at exit either
        return 1
    except Exception as error:
        # click's errors (typer brings its own click, so they are known by their methods)
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError" or message.lstrip().startswith("Usage"):
            print(message)
            return 2
        print(f"attn-ext: {_line(message)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
