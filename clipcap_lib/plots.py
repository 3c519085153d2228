"""Data in, figure out. Call `use_house_style()` once; every function then returns a figure that shows itself.

This room draws retrieval and corpora and is the door to all figures: those made of images are in `panels`, maps over them in
`overlays`, the joint space in `spaces`, scores in `charts`, what is going on in `live`, drawings in `diagrams`, fonts and
colours in `style`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from clipcap_lib.charts import (
    board_table,
    captioned_images,
    concept_change,
    error_shares,
    ladder,
    null_p_values,
    ridges,
    score_distributions,
    score_intervals,
    scores_by_references,
    side_by_side,
    simplex,
)
from clipcap_lib.diagrams import beam_tree, caption_architecture, clip_architecture
from clipcap_lib.live import next_characters, similarity_pair, training_curves, training_state
from clipcap_lib.matrices import similarity_before_after, similarity_matrix
from clipcap_lib.overlays import layer_head_overview, localisation_bars, method_grid, similarity_maps
from clipcap_lib.panels import (
    CAVEAT,
    attention_strip,
    attention_word,
    caption_card,
    sample_grid,
)
from clipcap_lib.spaces import embedding_map, recall_curves, search_card, similarity_clusters
from clipcap_lib.style import (
    IMAGE,
    INK,
    MUTED,
    PALETTE,
    SEQUENTIAL,
    TEXT,
    Picture,
    arrows,
    contrast,
    new_picture,
    png_bytes,
    save,
    show,
    use_house_style,
)

__all__ = [
    "attention_strip", "attention_word", "beam_tree", "board_table", "caption_architecture", "caption_card",
    "caption_lengths", "captioned_images", "clip_architecture", "concept_change", "concept_frequencies",
    "concept_log_odds", "embedding_map", "error_shares", "ladder", "layer_head_overview", "localisation_bars",
    "method_grid", "next_characters", "null_p_values", "png_bytes", "recall_bars", "recall_curves", "sample_grid",
    "save", "score_distributions", "score_intervals", "scores_by_references", "search_card", "share_bars", "show",
    "side_by_side", "similarity_before_after", "similarity_clusters", "similarity_maps", "similarity_matrix",
    "similarity_pair", "simplex", "training_curves", "training_state", "use_house_style", "vocabulary_growth",
]

def recall_bars(recalls: Mapping[str, Mapping[str, float]], chance: float | Mapping[str, float] | None = None,
                title: str = "Retrieval: is the right one among the first k?") -> Picture:
    """Recall in percent, a bar a run and metric ("image->text R@1"; others are left out), chance as a dashed line.

    chance: one level in percent, or one for each metric, by its name or its last word ("R@1"), or such ones for each run,
    where runs choose among different numbers of images.
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
            mine = chance.get(name, chance) if isinstance(chance, Mapping) else chance
            levels = [mine.get(m, mine.get(m.split()[-1])) if isinstance(mine, Mapping) else mine for m in metrics]
            axes.hlines(levels, x - 0.55 * thickness, x + 0.55 * thickness, color=INK, linestyle=(0, (2, 1)), linewidth=1.4,
                        label=None if index else "chance")
    axes.set(xticks=centres, ylim=(0, 106), ylabel="recall (% of queries)")
    axes.set_xticklabels([arrows(m).replace(" R@", "\nR@") for m in metrics])
    axes.grid(False, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


# -- attention -------------------------------------------------------------------------------------------------------

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
    axes.set_xticks(range(len(words)), words, fontsize=11 if len(words) <= 20 else 7)
    axes.grid(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


# -- corpora ---------------------------------------------------------------------------------------------------------

def caption_lengths(lengths: Mapping[str, Sequence[int]], title: str = "How long captions are") -> Picture:
    """The distribution of caption lengths in characters, a row a corpus; longer than the 99.5th percentile: last bin."""
    longest = max(np.percentile(values, 99.5) for values in lengths.values() if len(values))
    figure = new_picture(1.1 + 0.62 * len(lengths), title, f"{title}: histograms for {', '.join(lengths)}.")
    axes = figure.subplots()
    ridges(axes, lengths, np.arange(0, int(longest) + 3) - 0.5, "characters", "captions")
    axes.set(xlabel="length of a caption (characters; each row as high as its tallest bar; longer ones in the last)",
             xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
