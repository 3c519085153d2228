"""Figures of image-text similarity: a column an image, a row a caption. Shown through `plots`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle

from clipcap_lib.style import (
    DIVERGING,
    INK,
    SEQUENTIAL,
    TEXT,
    WIDTH,
    Picture,
    colour_scale,
    contrast,
    new_picture,
    pixels,
    place,
    wrap,
    write_numbers,
)


def similarity_image(figure: Picture, values: np.ndarray, box: tuple[float, float, float, float],
                     images: Sequence[Any] | None = None, vmin: float = -1, vmax: float = 1) -> Any:
    """Draw (texts, images) into the box (left, top, width, height) in inches, thumbnails above it."""
    rows, columns = values.shape
    left, top, width, _ = box
    axes = place(figure, *box)
    colours = matplotlib.colormaps[DIVERGING if vmin < 0 else SEQUENTIAL]
    drawn = axes.imshow(values, cmap=colours, vmin=vmin, vmax=vmax, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#aab3bc")
    if max(rows, columns) <= 12:
        _numbers(figure, drawn, box)
        frame = np.array([(-0.47, -0.47), (0.47, -0.47), (0.47, 0.47), (-0.47, 0.47)])
        axes.add_collection(PolyCollection([frame + i for i in range(min(rows, columns))], facecolor="none", edgecolor=INK,
                                           linewidth=1.6), autolim=False)
        axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=1, zorder=0.5)
        axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=1, zorder=0.5)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    else:  # two lines beside the diagonal, which stays visible between them
        end = min(rows, columns)
        for shift in (-1, 1):
            axes.plot([-0.5 + max(shift, 0), end - 0.5 + min(shift, 0)], [-0.5 - min(shift, 0), end - 0.5 - max(shift, 0)],
                      color=INK, linewidth=0.8)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel=f"image, 1 to {columns}")
    if images is not None and columns <= 12:
        step, size = width / columns, min(width / columns - 0.04, 0.9)
        row = place(figure, left, top - size - 0.06, width, size)
        _thumbnails(row, images[:columns], step, size)
    return drawn


def _numbers(figure: Picture, drawn: Any, box: tuple[float, float, float, float]) -> list[Any]:
    """Write each value into its cell, in the colour that is read on it -> what was drawn."""
    values = drawn.get_array()
    (rows, columns), (left, top, width, height) = values.shape, box
    cell, faces = min(width / columns, height / rows), drawn.cmap(drawn.norm(values))
    numbers: dict[str, list[tuple[str, float, float]]] = {}
    for r, c in np.ndindex(rows, columns):
        text = f"{values[r, c] + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")
        at = left + (c + 0.5) * width / columns, top + (r + 0.5) * height / rows
        numbers.setdefault(contrast(faces[r, c]), []).append((text.replace("0.", ".", 1) if cell < 0.42 else text, *at))
    return [write_numbers(figure, written, 8 if cell >= 0.42 else 6.5 if cell > 0.3 else 5.8, colour)
            for colour, written in numbers.items()]


def _thumbnails(axes: Any, images: Sequence[Any], step: float, size: float) -> None:
    """Images in the middle of each `step` inches, as one picture: to draw each by itself takes most of a matrix's time."""
    dots, whole = round(170 * size), round(170 * step)  # as many as a saved figure has
    strip = PIL.Image.new("RGB", (whole * len(images), dots), "white")
    for i, image in enumerate(images):
        small = PIL.Image.fromarray(pixels(image)).resize((dots, dots), PIL.Image.Resampling.LANCZOS)
        strip.paste(small, (i * whole + (whole - dots) // 2, 0))
    axes.imshow(strip, extent=(0, step * len(images), 0, size), aspect="auto")
    edges = [[(x, 0), (x + size, 0), (x + size, size), (x, size)]
             for x in step * (np.arange(len(images)) + 0.5) - size / 2]
    axes.add_collection(PolyCollection(edges, facecolor="none", edgecolor="#c5ccd3", linewidth=0.8), autolim=False)
    axes.set(xlim=(0, step * len(images)), ylim=(-0.01, size + 0.01))
    axes.set_axis_off()


def _mark(axes: Any, small: bool) -> Callable[[int, int], None]:
    """A frame for one cell, and pointers at its column and row where the cell alone is too small to find -> a function
    that moves them to (image, caption)."""
    pad = 0.03 if small else 0.5
    frames = [axes.add_patch(Rectangle((0, 0), 1 + 2 * pad, 1 + 2 * pad, fill=False, edgecolor=colour, linewidth=width,
                                       clip_on=False, zorder=4)) for width, colour in ((6, "white"), (3, TEXT))]
    style = {"color": TEXT, "markersize": 9, "clip_on": False, "linestyle": "none", "visible": not small}
    column, = axes.plot(0, 1.02, marker="v", transform=axes.get_xaxis_transform(), **style)
    row, = axes.plot(-0.02, 0, marker=">", transform=axes.get_yaxis_transform(), **style)

    def move(image: int, caption: int) -> None:
        for frame in frames:
            frame.set_xy((image - 0.5 - pad, caption - 0.5 - pad))
        column.set_xdata([image])
        row.set_ydata([caption])

    return move


def _row_captions(figure: Picture, captions: Sequence[str], left: float, top: float, width: float, height: float) -> None:
    step, total = height / len(captions), figure.get_figheight()
    for i, caption in enumerate(captions):
        text = wrap(caption, int(width / 0.062), max(1, int(step / 0.15)))
        figure.text((left + width - 0.08) / WIDTH, 1 - (top + (i + 0.5) * step) / total, text, ha="right", va="center",
                    fontsize=8, linespacing=1.2)


def similarity_matrix(similarity: np.ndarray, images: Sequence[Any] | None = None, captions: Sequence[str] | None = None,
                      title: str = "Similarity of images and captions", vmin: float = -1, vmax: float = 1,
                      label: str = "cosine similarity", marked: tuple[int, int] | None = None) -> Picture:
    """Similarity (images, texts) drawn transposed: a column an image (thumbnail above), a row a caption (text beside).

    The colours run from vmin to vmax whatever the values are. Pairs that belong together are framed. Values stand in the
    cells up to 12 x 12. For probabilities give vmin=0 and their label.

    marked: (image, caption) of one cell to point out. The figure's `mark(image, caption)` then moves to another, and
    `renew(similarity, title)` shows other values of the same images and captions, without the rest being drawn again.
    """
    values = np.asarray(similarity, dtype=float).T
    rows, columns = values.shape
    small = max(rows, columns) <= 12
    beside, above = 2.5 if captions and rows <= 12 else 0.5, 0.0
    width = WIDTH - beside - 1.1 if small else 5.5
    width = min(width, 1.0 * columns) if small else width
    if images is not None and columns <= 12:
        above = min(width / columns - 0.04, 0.9) + 0.1
    if not small:
        width *= min(1.0, columns / rows)  # of many captions no more than a page
    height = width * rows / columns if not small else min(0.62, max(0.36, width / columns)) * rows

    def words(values: np.ndarray) -> str:
        own, others = np.diagonal(values).mean(), values.sum() - np.trace(values)
        return ("column: image · row: caption · " + "orange: the pair shown · " * (marked is not None)
                + f"framed: pairs that belong together, mean {own:.2f}; others "
                f"{others / max(1, values.size - min(rows, columns)):.2f}".replace("-", "−"))

    def about(title: str, values: np.ndarray) -> str:
        return f"{title}: {columns} images by {rows} captions; {words(values)}."

    figure = new_picture(0.75 + above + height + 0.35, title, about(title, values), words(values), layout=None)
    box = beside, 0.75 + above, width, height
    drawn = similarity_image(figure, values, box, images, vmin, vmax)

    def renew(similarity: np.ndarray, title: str) -> None:
        values = np.asarray(similarity, dtype=float).T
        drawn.set_data(values)
        for patch in list(figure.patches):
            patch.remove()
        numbers, (head, under) = _numbers(figure, drawn, box) if small else [], figure.texts[:2]
        head.set_text(title)
        under.set_text(words(values))
        figure.alt, figure.moving = about(title, values), (drawn.axes, *numbers, head, under)

    if marked is not None:
        figure.mark, figure.renew = _mark(drawn.axes, small), renew
        figure.mark(*marked)
        figure.moving = (drawn.axes, *figure.patches, *figure.texts[:2])
    if captions and rows <= 12:
        _row_captions(figure, captions[:rows], 0.1, 0.75 + above, beside - 0.1, height)
    elif not small:
        drawn.axes.set_ylabel(f"caption, 1 to {rows}")
    colour_scale(figure, drawn, beside + width + 0.15, 0.75 + above, height, label)
    return figure


def similarity_before_after(before: np.ndarray, after: np.ndarray, images: Sequence[Any] | None = None,
                            captions: Sequence[str] | None = None, title: str = "What contrastive training changes",
                            vmin: float = -1, vmax: float = 1) -> Picture:
    """Two similarity matrices (images, texts), before and after training, on one colour scale. See similarity_matrix."""
    pair = [np.asarray(before, dtype=float).T, np.asarray(after, dtype=float).T]
    rows, columns = pair[0].shape
    beside = 2.0 if captions and rows <= 12 else 0.4
    width = (WIDTH - beside - 0.2 - 1.05) / 2
    height = width * rows / columns
    above = min(width / columns - 0.04, 0.9) + 0.1 if images is not None and columns <= 12 else 0.0
    figure = new_picture(1.05 + above + height + 0.35, title, f"{title}: similarity of {columns} images and {rows} captions "
                      "before and after training, on one colour scale.",
                      "column: image · row: caption · framed: pairs that belong together", layout=None)
    for index, (name, values) in enumerate(zip(("before", "after"), pair, strict=True)):
        left, own = beside + index * (width + 0.2), np.diagonal(values).mean()
        others = (values.sum() - np.trace(values)) / max(1, values.size - min(rows, columns))
        figure.text(left / WIDTH, 1 - 0.72 / figure.get_figheight(),
                    f"{name}: pairs {own:.2f}, others {others:.2f}".replace("-", "−"), va="top", fontsize=10.5)
        drawn = similarity_image(figure, values, (left, 1.05 + above, width, height), images, vmin, vmax)
    if captions and rows <= 12:
        _row_captions(figure, captions[:rows], 0.1, 1.05 + above, beside - 0.1, height)
    colour_scale(figure, drawn, left + width + 0.12, 1.05 + above, height, "cosine similarity")
    return figure
