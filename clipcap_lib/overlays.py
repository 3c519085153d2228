"""Figures of what a model looks at: maps over the image by layer and head, by method, and whether they are right.

Shown through `plots`. The strip of words and the single word are in `panels`, whose overlay this room shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from clipcap_lib.panels import CAVEAT, METHODS, overlay
from clipcap_lib.style import (
    IMAGE,
    INK,
    MUTED,
    SEQUENTIAL,
    WIDTH,
    Picture,
    colour_scale,
    contrast,
    new_picture,
    pixels,
    place,
    show_image,
    wrap,
)


def layer_head_overview(values: np.ndarray, image: Any = None, title: str = "What each head looks at") -> Picture:
    """Every layer (row) and head (column) at one glance.

    values (layers, heads, h, w): maps over the image, on one colour scale. values (layers, heads): shares of the attention
    that falls on the image, from 0 to 1, for models that have no map.
    """
    values = np.asarray(values, dtype=float)
    layers, heads = values.shape[:2]
    cell = min(1.0, (WIDTH - 1.0 - 1.1) / heads - 0.06, 6.5 / layers)
    figure = new_picture(1.05 + layers * (cell + 0.06) + 0.35, title, f"{title}: {layers} layers by {heads} heads.",
                         "row: layer, first to last · column: head", layout=None)
    left, top = 0.85, 0.98
    names = [f"{i + 1}" for i in range(max(layers, heads))]
    high = figure.get_figheight()
    for i in range(heads):
        figure.text((left + i * (cell + 0.06) + cell / 2) / WIDTH, 1 - (top - 0.16) / high,
                    f"head {names[i]}" if cell > 0.6 else names[i], ha="center", fontsize=9, color=MUTED)
    for i in range(layers):
        figure.text((left - 0.1) / WIDTH, 1 - (top + i * (cell + 0.06) + cell / 2) / high, f"layer {names[i]}",
                    ha="right", va="center", fontsize=9, color=MUTED)
    width, height = heads * (cell + 0.06) - 0.06, layers * (cell + 0.06) - 0.06
    if values.ndim == 2:
        axes = place(figure, left, top, width, height)
        colours = matplotlib.colormaps[SEQUENTIAL]
        drawn = axes.imshow(100 * values, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        for layer, head in np.ndindex(layers, heads):
            axes.text(head, layer, f"{100 * values[layer, head]:.0f}", ha="center", va="center", fontsize=8.5,
                      color=contrast(colours(values[layer, head])))
        axes.set_axis_off()
        label = "attention on the image (%)"
    else:
        vmax, drawn = max(float(values.max()), 1e-9), None
        for layer, head in np.ndindex(layers, heads):
            axes = place(figure, left + head * (cell + 0.06), top + layer * (cell + 0.06), cell, cell)
            drawn = overlay(axes, image, values[layer, head], vmax)
        label = "attention weight of a cell"
    colour_scale(figure, drawn, left + width + 0.15, top, height, label)
    figure.text(0.15 / WIDTH, 0.1 / high, CAVEAT, fontsize=8.5, color=MUTED)
    return figure


def method_grid(image: Any, words: Sequence[str], maps: Mapping[str, np.ndarray],
                boxes: Sequence[Sequence[Sequence[float]]] | None = None,
                title: str = "The same words by several methods", shared: str = "") -> Picture:
    """A row a method, a column a word: maps {method: (S, h, w)} over the image, each method on its own scale.

    The scale of a row ends at its highest value, because units differ: weights, first-order nats, nats. Negative values are
    not shown. boxes: for each word the true boxes (x0, y0, x1, y1 as shares of the image), drawn as frames. shared: the
    name of a scale that all rows have, for rows of one method.
    """
    columns, rows = len(words), len(maps)
    cell = min(1.0, (WIDTH - 1.25 - 0.75 * bool(shared) - 0.1 * columns) / columns)
    highest = max(max(float(np.max(found)) for found in maps.values()), 1e-12)
    figure = new_picture(1.0 + rows * (cell + 0.08) + 0.35, title, f"{title}: {', '.join(maps)} for {' '.join(words)}.",
                         (f"all on one scale of {shared}" if shared else
                          "each row from nothing (pale) to its own highest value (dark)")
                         + (" · framed: where the named object is drawn" if boxes else ""), layout=None)
    high = figure.get_figheight()
    height, width = pixels(image).shape[:2]
    for row, (method, found) in enumerate(maps.items()):
        found = np.clip(np.asarray(found, dtype=float), 0, None)
        top, vmax = 1.0 + row * (cell + 0.08), highest if shared else max(float(found.max()), 1e-12)
        figure.text(1.1 / WIDTH, 1 - (top + cell / 2) / high, method, ha="right", va="center", fontsize=10)
        for column, word in enumerate(words):
            left = 1.25 + column * (cell + 0.1)
            axes = place(figure, left, top, cell, cell)
            drawn = overlay(axes, image, found[column], vmax)
            if row == 0:
                figure.text((left + cell / 2) / WIDTH, 1 - 0.95 / high, word, ha="center", va="bottom", fontsize=11)
            for x0, y0, x1, y1 in boxes[column] if boxes else ():
                axes.add_patch(Rectangle((x0 * width - 0.5, y0 * height - 0.5), (x1 - x0) * width, (y1 - y0) * height,
                                         fill=False, edgecolor=INK, linewidth=1.3))
    if shared:
        colour_scale(figure, drawn, 1.25 + columns * (cell + 0.1), 1.0, rows * (cell + 0.08) - 0.08, shared)
    figure.text(0.15 / WIDTH, 0.1 / high, METHODS, fontsize=8.5, color=MUTED)
    return figure


def similarity_maps(images: Sequence[Any], captions: Sequence[str], maps: np.ndarray, cosines: Sequence[float],
                    title: str = "Which part of the image fits the caption") -> Picture:
    """A column a pair: the image, below it the map (N, h, w) of its similarity to its caption, the caption and the cosine.

    Each map has a scale of its own, up to its highest value: similarities of different pairs are not compared here.
    """
    count, maps = len(images), np.clip(np.asarray(maps, dtype=float), 0, None)
    cell = min(1.25, (WIDTH - 0.3) / count - 0.14)
    figure = new_picture(0.75 + 2 * (cell + 0.08) + 1.0, title, f"{title}: {count} images with Grad-CAM maps.",
                         "each map from nothing (pale) to its own highest value (dark)", layout=None)
    for i in range(count):
        left, vmax = 0.15 + i * (cell + 0.14), max(float(maps[i].max()), 1e-12)
        show_image(place(figure, left, 0.75, cell, cell), images[i])
        overlay(place(figure, left, 0.83 + cell, cell, cell), images[i], maps[i], vmax)
        text = wrap(captions[i], int(cell / 0.068), 4) + f"\ncosine {cosines[i]:.2f}".replace("-", "−")
        figure.text(left / WIDTH, 1 - (0.95 + 2 * cell) / figure.get_figheight(), text, va="top", fontsize=9,
                    linespacing=1.3)
    return figure


def localisation_bars(table: Any, title: str = "Are the maps right?") -> Picture:
    """How much of a map lies on the named object: `localisation.summary`'s DataFrame, a row a method.

    Left: the mean share of a map's mass within the object's box. Right: how often the highest point lies in it. Dashed: the
    box's share of the image, which a map that knows nothing reaches.
    """
    figure = new_picture(1.5 + 0.42 * len(table), title, f"{title} {', '.join(table.index)} against a random model.",
                         "maps of words that name an object, against the box in which it is drawn")
    y, box = np.arange(len(table))[::-1], 100 * table["box"].mean()
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for panel, key, label in zip(panels, ("mass", "hit"), ("map's mass within the box (%)", "highest point in the box (%)"),
                                 strict=True):
        for shift, column, colour, name in ((0.19, key, IMAGE, "trained model"),
                                            (-0.19, f"random {key}", "#b8c0c8", "same model, random weights")):
            bars = panel.barh(y + shift, 100 * table[column], 0.36, color=colour, label=name)
            for text in panel.bar_label(bars, fmt="%.0f", fontsize=8.5, padding=3):
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # legible over the dashed line
        panel.axvline(box, color=INK, linewidth=1.2, linestyle=(0, (3, 2)), label="box's share of the image")
        panel.set(xlabel=label, xlim=(0, 105))
        panel.set_yticks(y, table.index)
        panel.tick_params(axis="y", length=0)
        panel.grid(False, axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure
