"""Figures made of images: samples, cards, attention maps. Shown through `plots`.

Images are PIL images, or arrays (H, W, 3) or (3, H, W), uint8 or floats in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from clipcap_lib.style import (
    DIVERGING,
    HEAT,
    INK,
    MUTED,
    PALETTE,
    WIDTH,
    Picture,
    colour_scale,
    new_picture,
    pixels,
    place,
    show_image,
    wrap,
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
    blocks = {name: "\n".join(wrap(line, 70) for line in lines) for name, lines in sections.items()}
    height = max(4.0, 0.6 + sum(0.42 + 0.2 * (block.count("\n") + 1) for block in blocks.values()))
    figure = new_picture(height, title, f"{title}: one image and its texts.", layout=None)
    axes = place(figure, 0.15, 0.5, 3.3, 3.3)
    axes.set_anchor("NW")
    show_image(axes, image)
    top = 0.5
    for index, (name, block) in enumerate(blocks.items()):
        figure.text(3.7 / WIDTH, 1 - top / height, name, va="top", fontsize=9, color=PALETTE[index % len(PALETTE)])
        figure.text(3.7 / WIDTH, 1 - (top + 0.22) / height, block, va="top", fontsize=10.5, linespacing=1.35)
        top += 0.42 + 0.2 * (block.count("\n") + 1)
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
