"""hopper_pipeline.png: the producer and the two consumers of the Hopper forward over time."""

from __future__ import annotations

from drawing import BLUE, GREEN, GREY, ORANGE, arrow, box, canvas, frame, note, save

TURN, PRODUCTS, SOFTMAX = 40, 20, 20


def consumer(axes, y: float, start: float, name: str) -> list[float]:
    """Products and softmax of four tiles, from `start` on; where each tile's products begin."""
    note(axes, 0, y + 5, name, 9)
    begins = []
    box(axes, start, y, 12, 10, "S 0", GREEN, 8.5)
    box(axes, start + 12, y, SOFTMAX, 10, "softmax 0", BLUE, 8.5)
    x = start + 12 + SOFTMAX
    for tile in range(1, 4):
        begins.append(x)
        box(axes, x, y, PRODUCTS, 10, "", "white")
        box(axes, x, y + 5, PRODUCTS, 5, f"S {tile} = Q K {tile}", GREEN, 8)
        box(axes, x, y, PRODUCTS + 8, 5, f"O += P V {tile - 1}", ORANGE, 8)
        box(axes, x + PRODUCTS, y + 5, SOFTMAX, 5, f"softmax {tile}", BLUE, 8)
        x += TURN
    box(axes, x, y, 12, 10, "P V 3", ORANGE, 8)
    return begins


def main() -> None:
    figure, (axes,) = canvas(11, 4.4)
    frame(
        axes,
        226,
        84,
        "One CTA of the Hopper forward over time (lengths are schematic; whole tiles only)",
    )
    note(axes, 0, 71, "producer\n(TMA)", 9)
    x = 24
    for text, color in (("Q", GREY), ("K 0", GREEN), ("K 1", GREEN), ("V 0", ORANGE)):
        box(axes, x, 66, 10, 10, text, color, 8.5)
        x += 10
    for tile, at in ((2, 78), (3, 118)):
        box(axes, at, 66, 10, 10, f"K {tile}", GREEN, 8.5)
        box(axes, at + 10, 66, 10, 10, f"V {tile - 1}", ORANGE, 8.5)
    box(axes, 158, 66, 10, 10, "V 3", ORANGE, 8.5)
    note(
        axes,
        66,
        80,
        "waits until a buffer is empty, then fills it: two buffers of K, two of V",
        8.5,
    )
    first = consumer(axes, 44, 36, "consumer 0\n64 queries")
    second = consumer(axes, 22, 56, "consumer 1\n64 queries")
    for tile, (a, b) in enumerate(zip(first, second, strict=True)):
        arrow(axes, (a + PRODUCTS, 44), (b, 32), color="#7b4fb0")
        if tile < 2:
            arrow(axes, (b + PRODUCTS, 32), (first[tile + 1], 44), color="#7b4fb0")
    box(axes, 2, 3, 5, 5, "", GREEN)
    note(axes, 9, 5.5, "S = Q K^T", 8.5)
    box(axes, 34, 3, 5, 5, "", ORANGE)
    note(axes, 41, 5.5, "O += P V of the tile before", 8.5)
    box(axes, 90, 3, 5, 5, "", BLUE)
    note(axes, 97, 5.5, "softmax, while O is computed", 8.5)
    arrow(axes, (150, 5.5), (160, 5.5), color="#7b4fb0")
    note(axes, 162, 5.5, "the turn: who may issue products", 8.5)
    save(figure, __doc__, "hopper_pipeline")


if __name__ == "__main__":
    main()
