"""Figures of what is going on: a training as it runs, a caption as it is written. Shown through `plots`.

The two that widgets draw again and again place their axes themselves: a layout engine would take longer than the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from clipcap_lib.style import (
    IMAGE,
    INK,
    MUTED,
    PALETTE,
    TEXT,
    WIDTH,
    Picture,
    arrows,
    new_picture,
    place,
    show_image,
    wrap,
    write_words,
)

LABELS = {"loss": "loss (nats)", "reward": "reward (CIDEr-D of samples)", "learning_rate": "learning rate",
          "images_per_second": "throughput (images / s)",
          "image->text R@1": "recall@1, image → text (%)", "text->image R@1": "recall@1, text → image (%)",
          "CIDEr": "validation CIDEr", "distinct": "distinct validation captions"}


def _curves(panel: Any, histories: Mapping[str, Any], column: str, x: str) -> None:
    """One quantity, one line a run. With many points in one of them, all lines are moving means."""
    window = max((len(history[column].dropna()) for history in histories.values() if column in history), default=0) // 20
    for index, (name, history) in enumerate(histories.items()):
        if column not in history:
            continue
        rows = history[[x, column]].dropna()
        colour = PALETTE[index % len(PALETTE)]
        if window >= 2:  # the line is a moving mean; what was measured stays visible behind it
            panel.plot(rows[x], rows[column], color=colour, alpha=0.25, linewidth=0.8)
            smooth = rows[column].rolling(window, center=True, min_periods=1).mean()
            panel.plot(rows[x], smooth, color=colour, label=name)
        else:
            panel.plot(rows[x], rows[column], color=colour, marker="o", markersize=3.5, label=name)
    panel.set(title=LABELS.get(column, arrows(column).replace("_", " ")),
              xlabel="epochs (passes over the images)" if x == "epoch" else "steps (batches)")
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))


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
        _curves(panel, histories, column, x)
    for panel in panels[len(columns):]:
        panel.set_axis_off()
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        beside = int(WIDTH / (0.45 + 0.062 * max(map(len, handles))))  # as many as a line of the figure holds
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=max(1, min(6, beside)))
    return figure


def training_state(history: Any, columns: Sequence[str], samples: Mapping[str, str], title: str) -> Picture:
    """One run as it stands: a panel a quantity, and the latest captions of validation images, as many as eight.

    history: DataFrame with `epoch` and the columns, perhaps empty. samples: file -> caption.
    """
    down, lines = math.ceil(len(columns) / 3), [f"{file}: {caption}" for file, caption in list(samples.items())[:8]]
    below = 0.45 + 0.2 * math.ceil(len(lines) / 2) if lines else 0.1
    height = 0.5 + 2.2 * down + below
    figure = new_picture(height, title, f"{title}. Curves of {', '.join(columns)}; {len(lines)} sample captions.",
                         layout=None)
    for index, column in enumerate(columns):
        panel = place(figure, 0.6 + (index % 3) * 2.9, 0.8 + (index // 3) * 2.2, 2.4, 1.4)
        panel.grid(True)
        _curves(panel, {"run": history}, column, "epoch")
        panel.set_ylim(0, None)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))  # the numbers beside axes take most of the time
        panel.yaxis.set_major_locator(MaxNLocator(3))
    if lines:
        top = 0.5 + 2.2 * down
        figure.text(0.15 / WIDTH, 1 - top / height, "captions of validation images, as of the last epoch", va="top",
                    fontsize=9, color=MUTED)
        for index, line in enumerate(lines):
            figure.text((0.15 + 4.4 * (index % 2)) / WIDTH, 1 - (top + 0.24 + 0.2 * (index // 2)) / height,
                        wrap(line, 62, 1), va="top", fontsize=9)
    return figure


def similarity_pair(image: Any, caption: str, facts: Sequence[str], title: str) -> Picture:
    """One image and one caption, and under the caption what is known of the two, a line each."""
    height = 1.85
    figure = new_picture(height, title, f"{title}. {caption} {' '.join(facts)}", layout=None)
    axes = place(figure, 0.15, 0.5, 1.2, 1.2)
    axes.set_anchor("NW")
    show_image(axes, image)
    figure.text(1.6 / WIDTH, 1 - 0.52 / height, wrap(caption, 76, 2), va="top", fontsize=12, linespacing=1.25)
    figure.text(1.6 / WIDTH, 1 - 1.08 / height, "\n".join(facts), va="top", fontsize=9.5, linespacing=1.5, color=MUTED)
    return figure


def next_characters(image: Any, words: Sequence[str], index: int, choices: Sequence[tuple[str, float]], about: str = "",
                    others: Sequence[str] = (), title: str = "Which character comes next?") -> Picture:
    """The caption so far beside its image, and the characters that may stand at place `index`, with their probabilities.

    choices: (character, probability in [0, 1]), the likeliest first. index is len(words) where nothing stands yet. about: a
    line under the caption; others: captions to compare with, at the bottom.
    """
    height = max(4.75, 2.85 + 0.21 * len(choices))
    figure = new_picture(height, title, f"{title} {''.join(words)}: " +
                         ", ".join(f"{word} {share:.1%}" for word, share in choices) + f". {' '.join(others)}", layout=None)
    axes = place(figure, 0.15, 0.5, 3.3, 3.3)
    axes.set_anchor("NW")
    show_image(axes, image)
    taken = words[index] if index < len(words) else None
    write_words(figure, [*words, *["？"] * (taken is None)], index, 3.75, 0.7, step=0.36, size=13)
    figure.text(3.75 / WIDTH, 1 - 1.85 / height, about, va="top", fontsize=9, color=MUTED)
    bars = place(figure, 4.45, 2.15, WIDTH - 5.2, 0.21 * len(choices))
    shares = [100 * share for _, share in choices]
    drawn = bars.barh(range(len(choices)), shares, 0.72, color=[TEXT if word == taken else IMAGE for word, _ in choices])
    bars.bar_label(drawn, [f"{share:.1f} %" if share >= 0.05 else "< 0.1 %" for share in shares], padding=3, fontsize=9)
    bars.set_yticks(range(len(choices)), [word for word, _ in choices], fontsize=11)
    bars.set(xlim=(0, 100), ylim=(len(choices) - 0.4, -0.6), xlabel="probability of the next character (%)")
    bars.tick_params(axis="y", length=0)
    for row, line in enumerate(list(others)[-3:]):
        figure.text(0.15 / WIDTH, 1 - (3.95 + 0.22 * row) / height, wrap(line, 62, 1), va="top", fontsize=9,
                    color=INK if row == len(others) - 1 else MUTED)
    return figure
