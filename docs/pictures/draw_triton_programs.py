"""triton_programs.png: the tiles that one Triton program of each kernel walks over."""

from __future__ import annotations

from drawing import BLUE, ORANGE, box, canvas, frame, note, save

TILES = 8  # of queries and of keys
LEFT = 4  # tiles that a window reaches back


def seen(row: int, column: int) -> str:
    """whole, cut or none: a causal window over square tiles."""
    if column > row or column < row - LEFT:
        return "none"
    return "cut" if column in (row, row - LEFT) else "whole"


def matrix(axes, title: str, what: str, order: dict) -> None:
    """The score matrix; `order`: the number of each tile of one program."""
    frame(axes, 10.4, 12.4, title)
    axes.set_ylim(-0.9, 12.2)
    colors = {"none": "white", "whole": BLUE, "cut": ORANGE}
    for row in range(TILES):
        for column in range(TILES):
            number = order.get((row, column))
            color = colors[seen(row, column)]
            thick = (
                {"linewidth": 2.2, "edgecolor": "#b02020"} if number else {"edgecolor": "#a0a0a0"}
            )
            box(axes, 1.4 + column, 10 - row, 1, 1, str(number or ""), color, 10,
                zorder=3 if number else 2, **thick)  # fmt: skip
    for (row, column), number in order.items():  # above the patches
        axes.text(1.9 + column, 10.5 - row, str(number), ha="center", va="center", zorder=4)
    note(axes, 1.4, 11.6, "keys \u2192", 9)
    note(axes, 0.9, 10.6, "queries \u2192", 9, rotation=-90, va="top", ha="center")
    note(axes, 1.4, 1.1, what, 8.8, va="center")


LEGEND = (
    "blue: whole tiles;  orange: tiles that causality or the window cuts;  "
    "white: not visited;  numbers: the order"
)
FORWARD = """BLOCK_M queries stay, keys are streamed:
first the whole tiles, without masks by
position, then the cut ones."""
DKDV = """BLOCK_N keys stay, the queries of all
heads of the group are streamed:
dV += P^T dO,  dK += dS^T Q."""
DQ = """BLOCK_M queries stay again:  dQ += dS K.
S and dP are computed a second time, so
that nothing is added by atomics."""


def visited(tiles: list) -> dict:
    """The number of each tile of a program: whole tiles first."""
    kinds = {tile: seen(*tile) for tile in tiles}
    whole = [tile for tile, kind in kinds.items() if kind == "whole"]
    cut = [tile for tile, kind in kinds.items() if kind == "cut"]
    return {tile: n + 1 for n, tile in enumerate([*whole, *cut])}


def main() -> None:
    figure, axes = canvas(12.4, 5.4, 3, 1)
    of_queries = visited([(5, column) for column in range(TILES)])
    of_keys = visited([(row, 2) for row in range(TILES)])
    matrix(axes[0], "forward: one program", FORWARD, of_queries)
    matrix(axes[1], "dkdv: one program", DKDV, of_keys)
    matrix(axes[2], "dq: one program", DQ, of_queries)
    note(axes[0], 1.4, -0.4, LEGEND, 8.8, clip_on=False, in_layout=False)
    save(figure, __doc__, "triton_programs")


if __name__ == "__main__":
    main()
