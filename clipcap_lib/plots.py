"""Data in, figure out. Call `use_house_style()` once; every function then returns a figure that shows itself.

This room draws charts and is the door to all figures: those made of images are in `panels`, the two architecture drawings
in `diagrams`, fonts and colours in `style`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from clipcap_lib.diagrams import caption_architecture, clip_architecture
from clipcap_lib.panels import (
    CAVEAT,
    attention_strip,
    attention_word,
    caption_card,
    sample_grid,
    similarity_before_after,
    similarity_matrix,
)
from clipcap_lib.style import (
    FAINT,
    IMAGE,
    INK,
    JOINT,
    MUTED,
    PALETTE,
    SEQUENTIAL,
    TEXT,
    WIDTH,
    Picture,
    arrows,
    contrast,
    new_picture,
    place,
    png_bytes,
    save,
    show,
    use_house_style,
)

__all__ = [
    "attention_strip", "attention_word", "board_table", "caption_architecture", "caption_card", "caption_lengths",
    "clip_architecture", "concept_frequencies", "concept_log_odds", "png_bytes", "recall_bars", "sample_grid", "save",
    "score_distributions", "score_intervals", "share_bars", "show", "similarity_before_after", "similarity_matrix",
    "simplex", "training_curves", "use_house_style", "vocabulary_growth",
]

LABELS = {"loss": "loss (nats)", "learning_rate": "learning rate", "images_per_second": "images / s",
          "image->text R@1": "recall@1, image → text (%)", "text->image R@1": "recall@1, text → image (%)",
          "CIDEr": "validation CIDEr", "distinct": "distinct validation captions"}


def recall_bars(recalls: Mapping[str, Mapping[str, float]], chance: float | Mapping[str, float] | None = None,
                title: str = "Retrieval: is the right one among the first k?") -> Picture:
    """Recall in percent, a bar a run and metric ("image->text R@1"; others are left out), chance as a dashed line.

    chance: one level in percent, or one for each metric, by its name or its last word ("R@1").
    """
    metrics = [m for m in next(iter(recalls.values())) if "R@" in m]
    figure = new_picture(3.4, title, f"{title} Recall in percent for {', '.join(recalls)}.")
    axes = figure.subplots()
    thickness = 0.8 / len(recalls)
    ways = [m.partition(" R@")[0] for m in metrics]
    centres = np.arange(len(metrics)) + 0.5 * np.cumsum([0, *(a != b for a, b in itertools.pairwise(ways))])
    for index, (name, values) in enumerate(recalls.items()):
        x = centres - 0.4 + (index + 0.5) * thickness
        bars = axes.bar(x, [values[m] for m in metrics], thickness * 0.92, label=name, color=PALETTE[index % len(PALETTE)])
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    if chance is not None:
        levels = [chance.get(m, chance.get(m.split()[-1])) if isinstance(chance, Mapping) else chance for m in metrics]
        axes.hlines(levels, centres - 0.46, centres + 0.46, color=INK, linestyle=(0, (3, 2)), linewidth=1.2,
                    label="chance")
    axes.set(xticks=centres, ylim=(0, 106), ylabel="recall (% of queries)")
    axes.set_xticklabels([arrows(m).replace(" R@", "\nR@") for m in metrics])
    axes.grid(False, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


# -- training --------------------------------------------------------------------------------------------------------

def training_curves(histories: Mapping[str, Any], columns: Sequence[str] = ("loss",), title: str = "Training") -> Picture:
    """One panel a quantity, one line a run, against epochs where all runs know them, else steps.

    histories: name -> DataFrame with `step`, perhaps `epoch`, and the columns; gaps are skipped.
    """
    x = "epoch" if all("epoch" in history for history in histories.values()) else "step"
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure = new_picture(0.8 + 2.5 * down, title, f"{title}: {', '.join(columns)} by {x}, runs {', '.join(histories)}.")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, column in zip(panels, columns, strict=False):
        for index, (name, history) in enumerate(histories.items()):
            if column not in history:
                continue
            rows = history[[x, column]].dropna()
            colour, window = PALETTE[index % len(PALETTE)], len(rows) // 20
            if window >= 2:  # the line is a moving mean; what was measured stays visible behind it
                panel.plot(rows[x], rows[column], color=colour, alpha=0.25, linewidth=0.8)
                smooth = rows[column].rolling(window, center=True, min_periods=1).mean()
                panel.plot(rows[x], smooth, color=colour, label=name)
            else:
                panel.plot(rows[x], rows[column], color=colour, marker="o", markersize=3.5, label=name)
        panel.set(title=LABELS.get(column, arrows(column).replace("_", " ")),
                  xlabel="epochs (passes over the images)" if x == "epoch" else "steps (batches)")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for panel in panels[len(columns):]:
        panel.set_axis_off()
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=6)
    return figure


def share_bars(words: Sequence[str], shares: Sequence[float], title: str = "How much of each word's attention is on the "
               "image") -> Picture:
    """A bar a word: the share of its attention that falls on the image, shares (T,) in [0, 1]; the rest is on the text."""
    figure = new_picture(2.7, title, f"{title}: {', '.join(f'{w} {s:.0%}' for w, s in zip(words, shares, strict=True))}.",
                         CAVEAT)
    axes = figure.subplots()
    values = 100 * np.asarray(shares, dtype=float)
    axes.bar(range(len(words)), 100 - values, bottom=values, color=TEXT, alpha=0.25, label="on the text so far")
    bars = axes.bar(range(len(words)), values, color=IMAGE, label="on the image")
    axes.bar_label(bars, fmt="%.0f", fontsize=8, label_type="center", color="white")
    axes.set(ylim=(0, 100), ylabel="attention (%)")
    axes.set_xticks(range(len(words)), words, fontsize=11)
    axes.grid(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


# -- corpora ---------------------------------------------------------------------------------------------------------

def _ridges(axes: Any, groups: Mapping[str, Any], edges: np.ndarray, unit: str, items: str,
            middle: str = "median") -> None:
    """One histogram a row on a shared axis, each as high as its row, its median or mean marked and written."""
    compute = {"median": np.median, "mean": np.mean}[middle]
    for row, values in enumerate(reversed(groups.values())):
        values = np.asarray(values, dtype=float)
        colour = PALETTE[(len(groups) - 1 - row) % len(PALETTE)]
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        heights = row + 0.78 * counts / max(1, counts.max())
        axes.fill_between(edges, row, np.append(heights, heights[-1]), step="post", color=colour, alpha=0.75, linewidth=0)
        centre = compute(values) if len(values) else math.nan
        axes.plot([centre, centre], [row, row + 0.84], color=INK, linewidth=1.4)
        axes.text(1.01, row + 0.3, f"{middle} {centre:.3g} {unit}\n{len(values):,} {items}",
                  transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=MUTED)
    axes.set(yticks=np.arange(len(groups)) + 0.3, yticklabels=list(reversed(groups)), ylim=(-0.05, len(groups)),
             xlim=(edges[0], edges[-1]))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def caption_lengths(lengths: Mapping[str, Sequence[int]], title: str = "How long captions are") -> Picture:
    """The distribution of caption lengths in characters, a row a corpus; longer than the 99.5th percentile: last bin."""
    longest = max(np.percentile(values, 99.5) for values in lengths.values() if len(values))
    figure = new_picture(1.1 + 0.62 * len(lengths), title, f"{title}: histograms for {', '.join(lengths)}.")
    axes = figure.subplots()
    _ridges(axes, lengths, np.arange(0, int(longest) + 3) - 0.5, "characters", "captions")
    axes.set(xlabel="length of a caption (characters; each row as high as its tallest bar)", xlim=(0, None))
    return figure


def concept_log_odds(rows: Sequence[tuple[str, float, float, float]], title: str = "Which words set the two apart?",
                     negative: str = "commoner in the other set", positive: str = "commoner in the shifted set") -> Picture:
    """Concepts by log-odds ratio (natural logarithm) with interval; rows of (concept, log_odds, low, high).

    negative and positive say what the two sides mean.
    """
    rows = sorted(rows, key=lambda row: row[1])
    figure = new_picture(1.3 + 0.25 * len(rows), title, f"{title}: log-odds ratios of {len(rows)} concepts.")
    axes = figure.subplots()
    for y, (_, centre, low, high) in enumerate(rows):
        colour = MUTED if low <= 0 <= high else TEXT if centre > 0 else IMAGE
        axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.6, solid_capstyle="round")
        axes.plot(centre, y, "o", color=colour, markersize=6)
    axes.axvline(0, color=INK, linewidth=1)
    reach = 1.08 * max(max(abs(row[2]), abs(row[3])) for row in rows)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set(xlim=(-reach, reach), ylim=(-0.7, len(rows) - 0.3),
             xlabel="log-odds ratio (natural logarithm; grey: the interval holds 0)")
    axes.text(0.0, 1.01, f"← {negative}", transform=axes.transAxes, color=IMAGE, fontsize=9.5, va="bottom")
    axes.text(1.0, 1.01, f"{positive} →", transform=axes.transAxes, color=TEXT, fontsize=9.5, va="bottom", ha="right")
    return figure


def concept_frequencies(frequencies: Any, title: str = "How often a concept is named",
                        unit: str = "per 1,000 captions") -> Picture:
    """Concepts (rows) by corpora (columns) as a heat map. DataFrame of numbers in `unit`, written in the cells."""
    values = frequencies.to_numpy(dtype=float)
    rows, columns = values.shape
    figure = new_picture(1.2 + 0.26 * rows, title,
                         f"{title}: {rows} concepts in {', '.join(map(str, frequencies.columns))}.")
    axes = figure.subplots()
    axes.grid(False)
    colours = matplotlib.colormaps[SEQUENTIAL]
    drawn = axes.imshow(values, cmap=colours, vmin=0, vmax=np.nanmax(values) or 1, aspect="auto", interpolation="nearest")
    for r, c in np.ndindex(rows, columns):
        text = "-" if np.isnan(values[r, c]) else f"{values[r, c]:.1f}"
        axes.text(c, r, text, ha="center", va="center", fontsize=8.5, color=contrast(colours(drawn.norm(values[r, c]))))
    axes.set(xticks=range(columns), xticklabels=frequencies.columns, yticks=range(rows), yticklabels=frequencies.index)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, label=unit, pad=0.02).outline.set_visible(False)
    return figure


def vocabulary_growth(growth: Mapping[str, Sequence[int]], title: str = "Does the vocabulary stop growing?") -> Picture:
    """Distinct characters at equal steps through a corpus, a line a corpus; the legend has the final numbers."""
    figure = new_picture(3.4, title, f"{title} Distinct characters by share of the corpus read, for {', '.join(growth)}.")
    axes = figure.subplots()
    for index, (name, counts) in enumerate(growth.items()):
        colour = PALETTE[index % len(PALETTE)]
        axes.plot(np.linspace(0, 100, len(counts)), counts, color=colour, label=f"{name} ({counts[-1]:,})")
        axes.plot(100, counts[-1], "o", color=colour, markersize=4.5)
    axes.set(xlabel="share of the corpus read (%)", ylabel="distinct characters", xlim=(0, 102), ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(title="corpus (characters at the end)", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


# -- scores ----------------------------------------------------------------------------------------------------------

def score_intervals(table: Any, metric: str = "CIDEr", title: str = "How good, and how sure are we?") -> Picture:
    """Scores with their intervals, a panel a board, a row a system, one axis.

    table: DataFrame with the columns system, board, low, high and the score under the metric's name or `value`. A row
    without an interval is a floor to compare with, in grey.
    """
    score = metric if metric in table.columns else "value"
    boards, systems = list(dict.fromkeys(table["board"])), list(dict.fromkeys(table["system"]))
    figure = new_picture(1.5 + 0.34 * len(systems), title, f"{title} {metric} with intervals of {', '.join(systems)}.")
    shown: dict[str, str] = {}
    panels = figure.subplots(1, len(boards), sharex=True, sharey=True, squeeze=False)[0]
    for panel, board in zip(panels, boards, strict=True):
        for _, row in table[table["board"] == board].dropna(subset=[score]).iterrows():
            x, y = row[score], len(systems) - 1 - systems.index(row["system"])
            kind = "floor, no interval" if np.isnan(row["low"]) else "ensemble" if "+" in row["system"] else "one model"
            colour = {"one model": IMAGE, "ensemble": JOINT}.get(kind, MUTED)
            shown[kind] = colour
            panel.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2.5, alpha=0.5,
                       solid_capstyle="round")
            panel.plot(x, y, "o", color=colour, markersize=7)
            panel.annotate(f"{x:.1f}", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
        panel.set(title=board, xlabel=f"{metric} with 95 % interval", ylim=(-0.6, len(systems) - 0.3))
        panel.set_yticks(range(len(systems)), list(reversed(systems)))
        panel.tick_params(axis="y", length=0)
    for name, colour in shown.items():
        panels[0].plot([], [], "o", color=colour, label=name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def score_distributions(scores: Mapping[str, Any], title: str = "Scores of single images",
                        metric: str = "CIDEr") -> Picture:
    """Histograms of per-image scores, a row a system, on one axis; above the 99th percentile: the last bin."""
    together = np.concatenate([np.asarray(values, dtype=float) for values in scores.values()])
    figure = new_picture(1.1 + 0.62 * len(scores), title, f"{title}: histograms of {metric} for {', '.join(scores)}.")
    axes = figure.subplots()
    low, high = min(0.0, together.min()), np.percentile(together, 99) or 1.0
    _ridges(axes, scores, np.linspace(low, high if high > low else low + 1, 41), "", "images", middle="mean")
    axes.set_xlabel(f"{metric} of an image (each row as high as its tallest bar)")
    return figure


def simplex(points: np.ndarray, values: np.ndarray, names: Sequence[str], best: Sequence[float] | None = None,
            also: Mapping[str, Sequence[float]] | None = None, metric: str = "CIDEr",
            title: str = "Which weights do three models want?") -> Picture:
    """A score over the weights of three models: corners are single models, the middle is their plain average.

    points (K, 3) weights that sum to 1, values (K,), names of the three, best: the weights to mark with a star (default:
    those of the highest value), also: further weights to mark, by name.
    """
    points, values = np.asarray(points, dtype=float), np.asarray(values, dtype=float)
    best = points[np.argmax(values)] if best is None else np.asarray(best, dtype=float)
    value = values[np.abs(points - best).sum(axis=1).argmin()]
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
    weights = " / ".join(f"{w:.2g}" for w in best)
    figure = new_picture(4.9, title, f"{title} {metric} over ensemble weights; best {value:.2f} at {weights}.",
                         "a corner is one model, the middle the plain average; "
                         f"best {metric} {value:.1f} at {weights}")
    axes = figure.subplots()
    axes.set(aspect="equal", xlim=(-0.8, 1.3), ylim=(-0.1, 0.95))
    axes.set_axis_off()
    x, y = (points @ corners).T
    if len(points) >= 6:
        pale = ListedColormap(0.35 * matplotlib.colormaps["cividis"](np.linspace(0, 1, 256)) + 0.65)
        axes.tricontourf(x, y, values, levels=14, cmap=pale)
    for share in [s for s in np.unique(points.round(4)) if 0 < s < 1][:19]:
        for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            ends = np.array([share * corners[a] + (1 - share) * corners[b], share * corners[a] + (1 - share) * corners[c]])
            axes.plot(*ends.T, color="white", linewidth=0.8, zorder=1.5)
    axes.plot(*corners[[0, 1, 2, 0]].T, color=MUTED, linewidth=1)
    drawn = axes.scatter(x, y, c=values, cmap="cividis", s=46, edgecolor="white", linewidth=0.7, zorder=3)
    axes.scatter(*(best @ corners), marker="*", s=330, color=TEXT, edgecolor="white", linewidth=1, zorder=5, label="best")
    for marker, (name, share) in zip("DsP^v", (also or {}).items(), strict=False):
        axes.scatter(*(np.asarray(share, dtype=float) @ corners), marker=marker, s=80, facecolor="white", edgecolor=INK,
                     linewidth=1.4, zorder=4, label=f"{name} ({' / '.join(f'{w:.2g}' for w in share)})")
    for corner, name, align, shift in zip(corners, names, ("right", "left", "center"),
                                          ((-0.04, -0.04), (0.04, -0.04), (0, 0.05)), strict=True):
        axes.text(*(corner + shift), name, ha=align, va="center", fontsize=11)
    axes.legend(loc="upper left", title="marked weights", alignment="left", bbox_to_anchor=(0, 1))
    figure.colorbar(drawn, label=metric, shrink=0.8, pad=0.02).outline.set_visible(False)
    return figure


def board_table(table: Any, title: str = "The boards", note: str = "") -> Picture:
    """A table of systems as a picture: numbers, or text that begins with one, or "-"; each column's best is tinted.

    Columns whose name begins with "original" are the published figures and stand apart in grey.
    """
    names = [str(column) for column in table.columns]
    ours = [i for i, name in enumerate(names) if not name.startswith("original")]
    order = ours + [i for i in range(len(names)) if i not in ours]
    height = 1.35 + 0.34 * len(table) + (0.3 if note else 0)
    figure = new_picture(height, title, f"{title}: {len(table)} systems by {', '.join(names)}.", layout=None)
    axes = place(figure, 0.15, 0.45, WIDTH - 0.3, height - 0.55 - (0.3 if note else 0))
    axes.set(xlim=(0, 1), ylim=(len(table) - 0.4, -2.1))
    axes.set_axis_off()
    text = [[value if isinstance(value, str) else "-" if math.isnan(value) else f"{value:.2f}" for value in row]
            for row in table.to_numpy(dtype=object)]
    longest = [max(len(name.removeprefix("original ")), *(len(row[i]) for row in text)) for i, name in enumerate(names)]
    size = [1.6, *(0.8 + 0.07 * longest[i] for i in order)]
    edges = np.cumsum([0.0, *size]) / sum(size)
    for left, right, i in zip(edges[1:], edges[2:], order, strict=False):
        middle = (left + right) / 2
        numbers = [float(match.group()) if (match := re.match(r"-?\d+(\.\d+)?", row[i])) else -math.inf for row in text]
        axes.text(middle, -0.86, names[i].removeprefix("original "), ha="center", va="center", fontsize=9.5, color=MUTED)
        for r, row in enumerate(text):
            if math.isfinite(numbers[r]) and numbers[r] == max(numbers):
                axes.add_patch(Rectangle((left + 0.006, r - 0.42), right - left - 0.012, 0.84, alpha=0.18, linewidth=0,
                                         color=JOINT if i in ours else MUTED))
            axes.text(middle, r, row[i], ha="center", va="center", fontsize=10, color=INK if i in ours else MUTED)
    for r, system in enumerate(table.index):
        axes.text(0.008, r, system, va="center", fontsize=10.5)
        axes.plot([0, 1], [r + 0.5] * 2, color=FAINT, linewidth=0.8)
    axes.plot([0, 1], [-0.5] * 2, color=INK, linewidth=1.2)
    halves = (("this workbook", 0, len(ours), JOINT), ("as published", len(ours), len(order), MUTED))
    for label, first, last, colour in halves:
        if last > first:
            left, right = edges[first + 1] + 0.01, edges[last + 1] - 0.01
            axes.text((left + right) / 2, -1.75, label, ha="center", va="center", fontsize=10.5, color=colour)
            axes.plot([left, right], [-1.35] * 2, color=colour, linewidth=1.2)
    if note:
        figure.text(0.15 / WIDTH, 0.1 / height, note, fontsize=8.5, color=MUTED)
    return figure
