"""cuda_tiles.png: the tiles of the sm_80 forward, and its copies and products over time."""

from __future__ import annotations

from drawing import BLUE, GREEN, GREY, ORANGE, VIOLET, arrow, box, canvas, frame, note, save

WARPS = ("#d9e8fb", "#c3daf6", "#adccf1", "#97beec")


def tiles(axes) -> None:
    """Who owns what of a CTA."""
    frame(
        axes,
        200,
        100,
        "A CTA of the forward: 64 queries of one head, head dimension up to 128, 16-bit elements",
    )
    for warp, color in enumerate(WARPS):
        y = 62 - 14 * warp
        box(axes, 4, y, 34, 14, f"Q, warp {warp}: 16 rows", color, 8.5)
        box(axes, 112, y, 34, 14, "S, P  [16, 64]", color, 8.5)
        box(axes, 158, y, 34, 14, "O  [16, Dv]", color, 8.5)
    note(axes, 21, 82, "shared memory, once", 8.5, ha="center")
    note(axes, 129, 82, "registers of each warp", 8.5, ha="center")
    note(axes, 175, 82, "registers of each warp", 8.5, ha="center")
    note(axes, 75, 92, "shared memory, two stages", 8.5, ha="center")
    for stage, x in ((0, 50), (1, 80)):
        box(axes, x, 50, 24, 34, f"K\n64 keys\nstage {stage}", GREEN, 8.5)
        box(axes, x, 12, 24, 34, f"V\n64 keys\nstage {stage}", ORANGE, 8.5)
    arrow(axes, (39, 48), (49, 48))
    arrow(axes, (105, 48), (111, 48))
    arrow(axes, (147, 48), (157, 48))
    note(
        axes,
        4,
        5,
        "A warp has all keys of a tile, so its softmax needs nobody else.  Tiles t and t + 1 "
        "use the two stages in turn.",
        8.5,
    )


def timeline(axes) -> None:
    """One barrier a tile, behind which the copy of the next tile begins."""
    frame(axes, 200, 62, "Over time (lengths are schematic)")
    note(axes, 0, 47, "cp.async", 9)
    note(axes, 0, 24, "each warp", 9)
    box(axes, 20, 42, 36, 10, "copy Q, K 0, V 0", GREY, 8.5)
    x = 58
    for tile in range(3):
        box(axes, x, 14, 3, 40, "", VIOLET)
        note(axes, x + 1.5, 58, "wait +\nbarrier", 7.5, ha="center")
        if tile < 2:
            box(axes, x + 4, 42, 34, 10, f"copy K {tile + 1}, V {tile + 1}", GREY, 8.5)
        for part, (text, color) in enumerate(
            ((f"S of tile {tile}", GREEN), ("softmax", BLUE), (f"O, tile {tile}", ORANGE))
        ):
            box(axes, x + 4 + 14 * part, 19, 14, 10, text, color, 7.5)
        x += 47
    note(
        axes,
        20,
        5,
        "The barrier says that tile t has landed and that every warp is done with tile t - 1, "
        "whose buffer the next copy overwrites.",
        8.5,
    )


def main() -> None:
    figure, axes = canvas(9.8, 7.2, 1, 2, height_ratios=(1.5, 1))
    tiles(axes[0])
    timeline(axes[1])
    save(figure, __doc__, "cuda_tiles")


if __name__ == "__main__":
    main()
