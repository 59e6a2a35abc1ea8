"""emulation.png: one kernel text and two compilers; a warp of the emulated machine over time."""

from __future__ import annotations

from drawing import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, arrow, box, canvas, frame, note, save

SLEEPS = "sleeps in mma"
MEETING = (
    "Lanes that meet in different calls or lines are an error that names both.  When nobody can "
    "run, the error\nlists what each warp waits for."
)
MODES = {  # mode -> (begin, width, text, colour) of each part of the time from issue to wait
    "plain": [(30, 130, "the copied bytes, from the issue on", GREEN)],
    "random": [
        (30, 52, "old bytes", GREY),
        (82, 78, "the copied bytes, from a random moment", GREEN),
    ],
    "poison": [(30, 130, "NaN, which a missing wait lets through to the result", RED)],
    "race": [(30, 130, "belongs to the copy: any other access is told, with both lines", VIOLET)],
}


def compilers(axes) -> None:
    """From the kernel's text to a GPU and to the emulated machine."""
    frame(axes, 200, 62, "One text, two machines")
    box(axes, 2, 22, 44, 18, "kernel text\nforward.cuh, ...", BLUE)
    box(axes, 62, 40, 54, 18, "ptx.cuh for NVRTC:\none instruction a function", GREEN)
    box(axes, 62, 4, 54, 18, "ptx_host.h for g++:\na call of the machine", ORANGE)
    box(axes, 134, 40, 62, 18, "GPU", GREEN)
    box(axes, 134, 4, 62, 18, "emulated machine: fibers,\nshared memory, race detector", ORANGE)
    arrow(axes, (47, 34), (61, 48))
    arrow(axes, (47, 28), (61, 14))
    arrow(axes, (117, 49), (133, 49))
    arrow(axes, (117, 13), (133, 13))


def warp(axes) -> None:
    """Lanes run one after another, and meet in a collective."""
    frame(axes, 200, 82, "A warp meets in an mma (4 of 32 lanes shown; one runs at a time)")
    for lane, name in enumerate((0, 1, 2, 31)):
        y, start, last = 60 - 13 * lane, 18 + 26 * lane, lane == 3
        note(axes, 0, y + 4, f"lane {name}", 8.8)
        if lane:
            box(axes, 18, y, start - 18, 8, "ready", "white", 7.5, edgecolor="#c0c0c0")
        box(axes, start, y, 26, 8, "runs", BLUE, 8)
        if last:
            box(axes, start + 26, y, 22, 8, "mma for all", ORANGE, 8)
        else:
            box(axes, start + 26, y, 26 * (3 - lane) + 22, 8, SLEEPS, GREY, 8)
        then = ("goes on", BLUE) if last else ("ready again", "white")
        box(axes, 144, y, 50, 8, *then, 8)
    note(axes, 18, 9, MEETING, 8.8)


def copies(axes) -> None:
    """When a copy lands, by mode."""
    frame(axes, 200, 60, "What shared memory holds between the issue of a copy and its wait")
    for n, (mode, parts) in enumerate(MODES.items()):
        y = 46 - 13 * n
        note(axes, 0, y + 4, mode, 9)
        for x, width, text, color in parts:
            box(axes, x, y, width, 9, text, color, 8.2)
        box(axes, 160, y, 36, 9, "the copied bytes", GREEN, 8.2)
    for x, text in ((30, "issue"), (160, "wait")):
        axes.plot([x, x], [4, 57], color="black", linewidth=1.2)
        note(axes, x + 1, 58.5, text, 8.5)


def main() -> None:
    figure, axes = canvas(9.8, 10.2, 1, 3, height_ratios=(0.9, 1.25, 1))
    compilers(axes[0])
    warp(axes[1])
    copies(axes[2])
    save(figure, __doc__, "emulation")


if __name__ == "__main__":
    main()
