"""cpu_tiles.png: a tile of the CPU forward, and the order in which key blocks of the backward add
to dQ.
"""

from __future__ import annotations

from drawing import BLUE, GREEN, ORANGE, RED, VIOLET, arrow, box, canvas, frame, note, plt, save

SUMS = """6 keys by 4 vectors of queries:
the sums that AVX-512 registers
hold; numbers of K are broadcast"""
TICKETS = (
    "dQ += dS K of block 1 waits until block 0 has added its part, so the order of additions, and "
    "every bit,\nis the same for any number of threads.  dK and dV belong to one block alone."
)
KEYS, QUERIES, GRAIN, ROWS, LANES = 192, 64, 16, 6, 16


def forward_tile(axes) -> None:
    """S^T = K Q^T of a causal edge: which rectangles are computed, and what registers hold."""
    frame(axes, 250, 236, "Forward: a tile of scores, S^T = K Q^T   (causal edge)")
    left, top = 92, 200
    box(axes, 40, top - KEYS, 40, KEYS, "K\n[192, D]\nread where\nit lies", BLUE)
    box(axes, left, top + 6, QUERIES, 24, "Q^T  [D, 64]", GREEN)
    box(axes, left, top - KEYS, QUERIES, KEYS, "", "white")
    for grain in range(4):  # the diagonal: query i of the panel sees keys up to 100 + i
        seen = 100 + (grain + 1) * GRAIN
        x = left + grain * GRAIN
        axes.add_patch(
            plt.Rectangle((x, top - seen), GRAIN, seen, facecolor=ORANGE, edgecolor="white")
        )
        corners = [(x, top - 100 - grain * GRAIN), (x, top - seen), (x + GRAIN, top - seen)]
        axes.add_patch(plt.Polygon(corners, facecolor=RED, edgecolor="none"))
        axes.plot([x, x], [top - KEYS, top], color="#909090", linewidth=0.5)
    box(axes, left, top - 60, QUERIES, ROWS, "", VIOLET)
    for lane in range(1, QUERIES // LANES):
        axes.plot(
            [left + lane * LANES] * 2, [top - 60, top - 60 + ROWS], color="black", linewidth=0.6
        )
    box(axes, 40, top - 60, 40, ROWS, "", VIOLET)
    arrow(axes, (81, top - 57), (left - 1, top - 57))
    x = left + QUERIES + 6
    note(axes, x, top - 20, "192 keys by a panel of 64 queries;\na column is a query", 8.5)
    note(
        axes,
        x,
        top - 57,
        SUMS,
        8.5,
    )
    note(axes, x, top - 108, "computed, and seen", 8.5, color="#a05a00")
    note(axes, x, top - 134, "computed, then masked to -inf", 8.5, color="#b03030")
    note(
        axes,
        x,
        top - 168,
        "not computed: no query of\nthe grain (16 queries) sees it",
        8.5,
        color="#606060",
    )
    for grain in range(4):
        note(axes, left + grain * GRAIN + 8, top - KEYS - 6, f"{grain}", 7.5, ha="center")
    note(axes, left + QUERIES / 2, top - KEYS - 16, "grains", 8, ha="center", va="center")
    note(axes, 36, top - 96, "keys", 9, rotation=90, ha="right")


def backward_order(axes) -> None:
    """Two threads, each with a key block; panels of dQ are handed on by tickets."""
    frame(
        axes,
        150,
        60,
        "Backward: two threads over time; a panel of dQ is handed on by its ticket",
    )
    width, parts = 30, (("S dP", 9, ORANGE), ("dV dK", 9, BLUE), ("dQ", 6, GREEN))
    begin = {}
    for thread, (y, delay) in enumerate(((36, 0), (12, 9))):
        note(axes, 0, y + 4, f"thread {thread}\nkey block {thread}", 8.5)
        for panel in range(4):
            x = 22 + delay + panel * (width - 2)
            note(axes, x, y + 11, f"panel {panel}", 8)
            for text, length, color in parts:
                box(axes, x, y, length, 8, text, color, 8)
                if text == "dQ":
                    begin[thread, panel] = x
                x += length
    for panel in range(4):
        arrow(axes, (begin[0, panel] + 6, 36), (begin[1, panel], 20), color="#2e7d32")
    note(axes, 22, 3, TICKETS, 8.5)


def main() -> None:
    figure, axes = canvas(9.6, 8.6, 1, 2, height_ratios=(1.9, 1))
    forward_tile(axes[0])
    backward_order(axes[1])
    save(figure, __doc__, "cpu_tiles")


if __name__ == "__main__":
    main()
