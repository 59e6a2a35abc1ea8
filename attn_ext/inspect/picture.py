"""The picture that `look` writes: the pooled maps of calls, or of a call's heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from attn_ext.inspect.tokens import visible

MAX_PANELS = 12
MAX_TICKS = 48
COLOURS = ("row", "log", "linear")
DECADES = 4  # of logarithmic colours
SAID = {
    "row": "mean weight of each cell / the largest of its row",
    "log": "mean weight of each cell / the largest of its row, on four decades",
    "linear": "mean weight of each cell",
}


@dataclass
class Style:
    title: str
    named: bool  # whether labels are texts, not positions
    colours: str  # one of COLOURS


def panels_of(calls, labels) -> tuple[list, str]:
    """(name, map, labels) of each panel, and what is left out: a panel a call, the mean over its
    heads, or a panel a head where there is one call; of the first example."""
    if len(calls) == 1:
        maps = calls[0].pooled_map[0]
        panels = [(f"head {h}", m, labels[0]) for h, m in enumerate(maps)]
        what, examples = "head", calls[0].shape[0]
    else:
        panels = [
            (f"{c.title()}\nmean over {c.shape[1]} heads", c.pooled_map[0].mean(0), pair)
            for c, pair in zip(calls, labels, strict=True)
        ]
        what, examples = "call", max(c.shape[0] for c in calls)
    more = len(panels) - MAX_PANELS
    said = "" if examples == 1 else f", example 0 of {examples}"
    said += f"; {more} {what}{'s' * (more > 1)} more not shown" if more > 0 else ""
    return panels[:MAX_PANELS], said


def coloured(image: torch.Tensor, colours: str) -> torch.Tensor:
    """The map [rows, cols] as it is coloured: each row by its largest, unless linear."""
    image = image.float()
    if colours == "linear":
        return image
    return image / image.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def draw(calls, labels, path: Path, style: Style) -> None:
    """The maps of `panels_of`, each with the scale of its colours, by position."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"the picture of look needs matplotlib: pip install matplotlib ({path.parent} has the "
            "page already)"
        ) from error
    panels, said = panels_of(calls, labels)
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    side = 3.9 if not style.named else _side([n for *_, one in panels for n in _sizes(one)])
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(side * columns, 6), side * rows + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(figure, axis, panel, style)
    said = f"{style.title}\n{SAID[style.colours]}{said}"
    figure.suptitle(said, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _sizes(labels) -> tuple[int, int]:
    return len(labels.queries[0]), len(labels.keys[0])


def _side(sizes: list[int]) -> float:
    """Inches of a panel whose labels have room: those of the longest axis that has labels."""
    return max(3.9, 0.17 * max((n for n in sizes if n <= MAX_TICKS), default=0))


def _panel(figure, axis, panel: tuple, style: Style) -> None:
    """One map: colours, their scale, positions or texts on its axes, its name."""
    import matplotlib

    name, image, labels = panel
    queries, keys = labels.queries[0], labels.keys[0]
    # a cell covers the positions that it is the mean of
    edges = (-0.5, len(keys) - 0.5, len(queries) - 0.5, -0.5)
    colours = matplotlib.colormaps["magma"].with_extremes(bad="grey")  # NaN
    scale = {"vmin": 0, "vmax": None if style.colours == "linear" else 1}
    if style.colours == "log":
        colours = colours.with_extremes(bad="grey", under=colours(0.0))
        scale = {"norm": matplotlib.colors.LogNorm(10.0**-DECADES, 1.0)}
    shown = coloured(image, style.colours)
    if style.colours == "log":  # a weight of 0 is the darkest, not a number that is missing
        shown = torch.where(shown == 0, torch.finfo(torch.float32).tiny, shown)
    drawn = axis.imshow(shown.numpy(), cmap=colours, aspect="auto", extent=edges, **scale)
    figure.colorbar(drawn, ax=axis, fraction=0.05).ax.tick_params(labelsize=8)
    exact = tuple(image.shape) == (len(queries), len(keys))  # a cell is a pair of tokens
    if exact and style.named and max(len(queries), len(keys)) <= MAX_TICKS:
        size = 8 if max(len(queries), len(keys)) <= MAX_TICKS // 2 else 7
        text = {"fontsize": size, "parse_math": False}  # a token may be "$\\frac{$"
        axis.set_xticks(range(len(keys)), map(_short, keys), rotation=90, **text)
        axis.set_yticks(range(len(queries)), map(_short, queries), **text)
    else:
        for one in (axis.xaxis, axis.yaxis):
            one.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
    positions = "" if exact and style.named else " position"
    axis.set_xlabel(f"key{positions}", fontsize=9)
    axis.set_ylabel(f"query{positions}", fontsize=9)
    axis.set_title(name, fontsize=10, parse_math=False)


def _short(token: str, most: int = 16) -> str:
    shown = visible(token)
    return shown if len(shown) <= most else shown[: most - 1] + "\u2026"
