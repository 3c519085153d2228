"""Figures made of images: samples, similarity matrices, attention maps. Shown through `plots`.

Images are PIL images, or arrays (H, W, 3) or (3, H, W), uint8 or floats in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle

from clipcap_lib.style import (
    DIVERGING,
    HEAT,
    INK,
    MUTED,
    PALETTE,
    SEQUENTIAL,
    TEXT,
    WIDTH,
    Picture,
    contrast,
    new_picture,
    pixels,
    place,
    show_image,
    wrap,
    write_numbers,
    write_words,
)

METHODS = "A map is one method's answer; methods disagree, and none proves what the word rests on."
CAVEAT = "Weights are not explanations: a map shows where the model looked, not why it chose the word."


# -- images and captions ---------------------------------------------------------------------------------------------

def sample_grid(images: Sequence[Any], captions: Sequence[str], titles: Sequence[str] | None = None, columns: int = 4,
                title: str = "Images and their captions") -> Picture:
    """A grid of images, each with its caption below (line breaks are kept) and its title above."""
    columns = max(1, min(columns, len(images)))
    cell = (WIDTH - 0.3 - 0.2 * (columns - 1)) / columns
    blocks = ["\n".join(wrap(line, int(cell / 0.068)) for line in str(c).split("\n")) for c in captions]
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    aspect = max(pixels(image).shape[0] / pixels(image).shape[1] for image in images)
    picture, head = min(aspect, 1.2) * cell, 0.24 if titles else 0.0
    heights = [head + picture + 0.2 + 0.172 * max(blocks[i].count("\n") + 1 for i in row) for row in rows]
    figure = new_picture(0.5 + sum(heights), title, f"{title}: {len(images)} images, each above its caption.", layout=None)
    top = 0.48
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = 0.15 + column * (cell + 0.2)
            axes = place(figure, left, top + head, cell, picture)
            axes.set_anchor("N")
            show_image(axes, images[i])
            if titles:
                name = wrap(titles[i], int(cell / 0.075), 1)
                figure.text(left / WIDTH, 1 - (top + 0.02) / figure.get_figheight(), name, va="top", fontsize=9,
                            color=MUTED)
            figure.text(left / WIDTH, 1 - (top + head + picture + 0.06) / figure.get_figheight(), blocks[i], va="top",
                        fontsize=9, linespacing=1.3)
        top += height
    return figure


def caption_card(image: Any, sections: Mapping[str, Sequence[str]], title: str = "") -> Picture:
    """One image at the left; at the right, under each section's name, its lines of text."""
    figure = new_picture(4.0, title, f"{title}: one image and its texts.", layout=None)
    axes = place(figure, 0.15, 0.5, 3.3, 3.3)
    axes.set_anchor("NW")
    show_image(axes, image)
    top = 0.5
    for index, (name, lines) in enumerate(sections.items()):
        figure.text(3.7 / WIDTH, 1 - top / 4.0, name, va="top", fontsize=9, color=PALETTE[index % len(PALETTE)])
        block = "\n".join(wrap(line, 70) for line in lines)
        figure.text(3.7 / WIDTH, 1 - (top + 0.22) / 4.0, block, va="top", fontsize=10.5, linespacing=1.35)
        top += 0.42 + 0.2 * (block.count("\n") + 1)
    return figure


# -- similarity ------------------------------------------------------------------------------------------------------

def similarity_image(figure: Picture, values: np.ndarray, box: tuple[float, float, float, float],
                     images: Sequence[Any] | None = None, vmin: float = -1, vmax: float = 1) -> Any:
    """Draw (texts, images) into the box (left, top, width, height) in inches, thumbnails above it."""
    rows, columns = values.shape
    left, top, width, height = box
    axes = place(figure, *box)
    colours = matplotlib.colormaps[DIVERGING if vmin < 0 else SEQUENTIAL]
    drawn = axes.imshow(values, cmap=colours, vmin=vmin, vmax=vmax, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#aab3bc")
    cell = min(width / columns, height / rows)
    if max(rows, columns) <= 12:
        faces = colours(drawn.norm(values))
        numbers: dict[str, list[tuple[str, float, float]]] = {}
        for r, c in np.ndindex(rows, columns):
            text = f"{values[r, c] + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")
            at = left + (c + 0.5) * width / columns, top + (r + 0.5) * height / rows
            numbers.setdefault(contrast(faces[r, c]), []).append(
                (text.replace("0.", ".", 1) if cell < 0.42 else text, *at))
        for colour, written in numbers.items():
            write_numbers(figure, written, 8 if cell >= 0.42 else 6.5 if cell > 0.3 else 5.8, colour)
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


def _mark(figure: Picture, axes: Any, small: bool) -> Callable[[int, int], None]:
    """A frame for one cell, and pointers at its column and row where the cell alone is too small to find -> a function
    that moves them to (image, caption)."""
    pad = 0.03 if small else 0.5
    frames = [axes.add_patch(Rectangle((0, 0), 1 + 2 * pad, 1 + 2 * pad, fill=False, edgecolor=colour, linewidth=width,
                                       clip_on=False, zorder=4)) for width, colour in ((6, "white"), (3, TEXT))]
    style = {"color": TEXT, "markersize": 9, "clip_on": False, "linestyle": "none", "visible": not small}
    column, = axes.plot(0, 1.02, marker="v", transform=axes.get_xaxis_transform(), **style)
    row, = axes.plot(-0.02, 0, marker=">", transform=axes.get_yaxis_transform(), **style)
    figure.moving = (*frames, column, row)

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


def colour_scale(figure: Picture, drawn: Any, left: float, top: float, height: float, label: str) -> None:
    """A colour bar. Drawn as an image: matplotlib's own takes twice as long."""
    low, high = drawn.get_clim()
    axes = place(figure, left, top, 0.14, height)
    axes.imshow(np.linspace(high, low, 256)[:, None], cmap=drawn.cmap, norm=drawn.norm, aspect="auto",
                extent=(0, 1, low, high), interpolation="bilinear")
    axes.set(xticks=[], ylabel=label)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.spines[:].set_visible(False)


def similarity_matrix(similarity: np.ndarray, images: Sequence[Any] | None = None, captions: Sequence[str] | None = None,
                      title: str = "Similarity of images and captions", vmin: float = -1, vmax: float = 1,
                      label: str = "cosine similarity", marked: tuple[int, int] | None = None) -> Picture:
    """Similarity (images, texts) drawn transposed: a column an image (thumbnail above), a row a caption (text beside).

    The colours run from vmin to vmax whatever the values are. Pairs that belong together are framed. Values stand in the
    cells up to 12 x 12. For probabilities give vmin=0 and their label. marked: (image, caption) of one cell to point out;
    the figure's `mark(image, caption)` then moves to another.
    """
    values = np.asarray(similarity, dtype=float).T
    rows, columns = values.shape
    small = max(rows, columns) <= 12
    beside, above = 2.5 if captions and rows <= 12 else 0.5, 0.0
    width = WIDTH - beside - 1.1 if small else 5.5
    width = min(width, 1.0 * columns) if small else width
    if images is not None and columns <= 12:
        above = min(width / columns - 0.04, 0.9) + 0.1
    height = width * rows / columns if not small else min(0.62, max(0.36, width / columns)) * rows
    mean = np.diagonal(values).mean(), (values.sum() - np.trace(values)) / max(1, values.size - min(rows, columns))
    subtitle = ("column: image · row: caption · " + "orange: the pair shown · " * (marked is not None)
                + f"framed: pairs that belong together, mean {mean[0]:.2f}; others {mean[1]:.2f}")
    figure = new_picture(0.75 + above + height + 0.35, title, f"{title}: {columns} images by {rows} captions; {subtitle}.",
                      subtitle.replace("-", "−"), layout=None)
    drawn = similarity_image(figure, values, (beside, 0.75 + above, width, height), images, vmin, vmax)
    if marked is not None:
        figure.mark = _mark(figure, drawn.axes, small)
        figure.mark(*marked)
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


# -- attention -------------------------------------------------------------------------------------------------------

def overlay(axes: Any, image: Any, weights: np.ndarray | None, vmax: float, strength: float = 1.0,
            signed: bool = False) -> Any:
    """The image, greyed where a map lies over it: colours and opacity rise with the weight, up to vmax (and -vmax)."""
    picture = pixels(image)
    if weights is None:
        show_image(axes, picture)
        return None
    grey = picture.mean(axis=-1, keepdims=True)
    pale = 0.35 * picture + 0.2 * grey + 0.45 * 255  # so that only the map has strong colours
    show_image(axes, ((1 - strength) * picture + strength * pale).astype(np.uint8))
    height, width = picture.shape[:2]
    smooth = PIL.Image.fromarray(np.asarray(weights, dtype=np.float32)).resize((72, 72), PIL.Image.Resampling.BICUBIC)
    vmin = -vmax if signed else 0.0
    smooth = np.clip(np.asarray(smooth), vmin, vmax)  # smoothed here: matplotlib would smooth colour and opacity apart
    return axes.imshow(smooth, cmap=DIVERGING if signed else HEAT, vmin=vmin, vmax=vmax,
                       alpha=strength * 0.85 * np.sqrt(np.abs(smooth) / vmax), interpolation="nearest",
                       extent=(-0.5, width - 0.5, height - 0.5, -0.5))


def attention_strip(image: Any, words: Sequence[str], maps: np.ndarray, shares: Sequence[float] | None = None,
                    title: str = "Where each word looks", label: str = "attention weight") -> Picture:
    """First the image, then a panel a word with its map over the image. maps (T, h, w) on one colour scale.

    shares (T,): the share of each word's attention that falls on the image at all, in [0, 1].
    """
    maps = np.asarray(maps, dtype=float)
    columns = min(7, len(words) + 1)
    rows = math.ceil((len(words) + 1) / columns)
    cell = min(1.6, (WIDTH - 0.3 - 0.75 - 0.1 * (columns - 1)) / columns)
    step = cell + (0.46 if shares is not None else 0.32)
    figure = new_picture(0.55 + rows * step + 0.35, title, f"{title}: maps over the image for {' '.join(words)}.",
                         layout=None)
    vmax, drawn = max(float(maps.max()), 1e-9), None
    for i in range(len(words) + 1):
        left, top = 0.15 + (i % columns) * (cell + 0.1), 0.5 + (i // columns) * step
        axes = place(figure, left, top + 0.26, cell, cell)
        result = overlay(axes, image, maps[i - 1] if i else None, vmax)
        drawn = result or drawn
        axes.set_title(words[i - 1] if i else "the image", loc="center", fontsize=11 if i else 9, pad=4,
                       color=INK if i else MUTED)
        if shares is not None and i:
            axes.set_xlabel(f"{100 * shares[i - 1]:.0f} % on image", fontsize=8, color=MUTED, labelpad=2)
    right = 0.15 + columns * (cell + 0.1)
    colour_scale(figure, drawn, right, 0.76, rows * step - step + cell, label)
    figure.text(0.15 / WIDTH, 0.1 / figure.get_figheight(), CAVEAT, fontsize=8.5, color=MUTED)
    return figure


def attention_word(image: Any, words: Sequence[str], index: int, weights: np.ndarray, vmax: float, strength: float = 1.0,
                   title: str = "", label: str = "attention weight", signed: bool = False, caveat: str = CAVEAT) -> Picture:
    """One word's map (h, w) large over the image, the caption beside it with that word picked out.

    The colours run from 0 to vmax; where maps are `signed`, from -vmax to vmax, white at 0.
    """
    figure = new_picture(4.4, title, f"{title}: map of the word {words[index]}.", layout=None)
    axes = place(figure, 0.15, 0.5, 3.5, 3.5)
    drawn = overlay(axes, image, np.asarray(weights, dtype=float), vmax, strength, signed)
    colour_scale(figure, drawn, 3.75, 0.5, 3.5, label)
    write_words(figure, words, index, 4.9, 0.75)
    figure.text(0.15 / WIDTH, 0.1 / 4.4, caveat, fontsize=8.5, color=MUTED)
    return figure
