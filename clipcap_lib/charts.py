"""Figures of scores: intervals, distributions, weights, errors, and the boards' table. Shown through `plots`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from clipcap_lib.style import FAINT, IMAGE, INK, JOINT, MUTED, PALETTE, TEXT, WIDTH, Picture, new_picture, place


def ridges(axes: Any, groups: Mapping[str, Any], edges: np.ndarray, unit: str, items: str,
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


def score_intervals(table: Any, metric: str = "CIDEr", title: str = "How good, and how sure are we?") -> Picture:
    """Scores with their intervals, a panel a board, a row a system, one axis.

    table: DataFrame with the columns system, board, value, low, high, and kind: "one model", "ensemble", or in grey what
    these are read against. Systems stand in the order in which the table names them.
    """
    boards, systems = list(dict.fromkeys(table["board"])), list(dict.fromkeys(table["system"]))
    figure = new_picture(1.5 + 0.34 * len(systems), title, f"{title} {metric} with intervals of {', '.join(systems)}.")
    shown: dict[str, str] = {}
    panels = figure.subplots(1, len(boards), sharex=True, sharey=True, squeeze=False)[0]
    for panel, board in zip(panels, boards, strict=True):
        for _, row in table[table["board"] == board].dropna(subset=["value"]).iterrows():
            x, y = row["value"], len(systems) - 1 - systems.index(row["system"])
            shown[row["kind"]] = colour = {"one model": IMAGE, "ensemble": JOINT}.get(row["kind"], MUTED)
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
    ridges(axes, scores, np.linspace(low, high if high > low else low + 1, 41), "", "images", middle="mean")
    axes.set_xlabel(f"{metric} of an image (each row as high as its tallest bar; the highest 1 % in the last)")
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
                         "a corner is one model, the middle the plain average; paler between the points; "
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


def board_table(table: Any, title: str = "The boards", note: str = "", beside: int = 0) -> Picture:
    """A table of systems as a picture: numbers, or text that begins with one, or "-"; each column's best is tinted.

    Columns whose name begins with "original" are the published figures and stand apart in grey. beside: how many of the
    last rows are not systems but what these are read against (ceiling and floors): in grey as well, and never the best.
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
    size = [max(1.6, 0.068 * max(map(len, map(str, table.index)))), *(0.8 + 0.07 * longest[i] for i in order)]
    edges = np.cumsum([0.0, *size]) / sum(size)
    for left, right, i in zip(edges[1:], edges[2:], order, strict=False):
        middle = (left + right) / 2
        numbers = [float(match.group()) if (match := re.match(r"-?\d+(\.\d+)?", row[i])) else -math.inf for row in text]
        best = max(numbers[:len(text) - beside])
        axes.text(middle, -0.86, names[i].removeprefix("original "), ha="center", va="center", fontsize=9.5, color=MUTED)
        for r, row in enumerate(text):
            if math.isfinite(numbers[r]) and numbers[r] == best and r < len(text) - beside:
                axes.add_patch(Rectangle((left + 0.006, r - 0.42), right - left - 0.012, 0.84, alpha=0.18, linewidth=0,
                                         color=JOINT if i in ours else MUTED))
            axes.text(middle, r, row[i], ha="center", va="center", fontsize=10,
                      color=INK if i in ours and r < len(text) - beside else MUTED)
    for r, system in enumerate(table.index):
        axes.text(0.008, r, system, va="center", fontsize=10.5 if r < len(text) - beside else 9.5,
                  color=INK if r < len(text) - beside else MUTED)
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


def scores_by_references(table: Any, title: str = "The number of references decides the number, too") -> Picture:
    """Scores against the number of references an image, a panel a metric, a line a segmentation.

    table: DataFrame with the columns references, segmentation, and one a metric.
    """
    metrics = [name for name in table.columns if name not in ("references", "segmentation")]
    figure = new_picture(2.9, title, f"{title}: {', '.join(metrics)} for "
                                     f"{table['references'].min()} to {table['references'].max()} references.")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for index, (segmentation, rows) in enumerate(table.groupby("segmentation", sort=False)):
            panel.plot(rows["references"], rows[metric], "o-", color=(IMAGE, TEXT)[index % 2], label=segmentation,
                       markersize=9 - 4 * index, linewidth=4 - 2.4 * index)  # METEOR's two lines are one
        panel.set(title=metric, ylim=(0, 1.08 * table[metric].max()), xlabel="references an image",
                  xticks=sorted(table["references"].unique()))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def null_p_values(p: Sequence[float], level: float = 0.05,
                  title: str = "Two samples of one system: does the test cry wolf?") -> Picture:
    """Sorted p values of comparisons with nothing to find against the uniform distribution they should have.

    The band holds each sorted value of uniform samples with 95 % (the binomial's, read off by its normal limit).
    """
    values = np.sort(np.asarray(p, dtype=float))
    n = len(values)
    expected = (np.arange(n) + 0.5) / n
    spread = 1.96 * np.sqrt(expected * (1 - expected) / n)
    found, allowed = int((values <= level).sum()), 1.96 * math.sqrt(level * (1 - level) * n)
    figure = new_picture(4.0, title, f"{title} {found} of {n} p values are at most {level}.",
                         f"{found} of {n} comparisons have p ≤ {level:g}; {level * n:.0f} ± {allowed:.0f} are expected")
    axes = figure.subplots()
    axes.fill_between(expected, expected - spread, expected + spread, color=FAINT, label="95 % of uniform samples")
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="uniform: the level means what it says")
    axes.plot(expected, values, color=IMAGE, label="p values, sorted")
    axes.axhline(level, color=TEXT, linewidth=1)
    axes.annotate(f"p = {level:g}", (1, level), (0, 3), textcoords="offset points", ha="right", color=TEXT, fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of the comparisons", ylabel="p value")
    axes.legend(loc="upper left")
    return figure


def error_shares(shares: Any, title: str = "What goes wrong") -> Picture:
    """Shares of images in percent by kind of error (rows), a bar a column of the DataFrame. An image may have several."""
    figure = new_picture(1.3 + 0.2 * shares.size + 0.12 * len(shares), title,
                         f"{title}: {', '.join(map(str, shares.index))} for {', '.join(map(str, shares.columns))}.")
    axes = figure.subplots()
    thickness = 0.84 / shares.shape[1]
    for index, column in enumerate(shares.columns):
        bars = axes.barh(np.arange(len(shares)) + (index - (shares.shape[1] - 1) / 2) * thickness, shares[column],
                         height=thickness, label=column, color=PALETTE[index % len(PALETTE)])
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8.5)
    axes.set(yticks=range(len(shares)), yticklabels=shares.index, xlim=(0, 108), xlabel="images (%)")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def concept_change(table: Any, before: str, after: str, marked: Sequence[str] = (),
                   mark: str = "", title: str = "Which concepts did it repair?") -> Picture:
    """How often a concept that is there is named, in percent, before and after: a line a concept, largest gain on top.

    table: DataFrame by concept, with two columns of percentages named `before` and `after`, and `images`, in how many
    the concept is. marked: concepts written in bold colour; mark says what that means.
    """
    table = table.assign(change=table[after] - table[before]).sort_values("change")
    figure = new_picture(1.3 + 0.22 * len(table), title, f"{title}: recall of {len(table)} concepts, {before} and {after}.",
                         mark)
    axes = figure.subplots()
    for y, (_, row) in enumerate(table.iterrows()):
        gains = row[after] >= row[before]
        axes.plot([row[before], row[after]], [y, y], color=JOINT if gains else TEXT, linewidth=2.4, alpha=0.55)
    axes.plot(table[before], range(len(table)), "o", markerfacecolor="white", markeredgecolor=MUTED, markersize=9.5,
              label=before)
    axes.plot(table[after], range(len(table)), "o", color=INK, markersize=6.5, label=after)
    axes.set(yticks=range(len(table)), ylim=(-0.8, len(table) - 0.2), xlim=(-3, 103),
             yticklabels=[f"{name} ({n:.0f})" for name, n in zip(table.index, table["images"], strict=True)],
             xlabel="named, of the images that show it (%)")
    for label, name in zip(axes.get_yticklabels(), table.index, strict=True):
        label.set_color(IMAGE if name in marked else INK)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def side_by_side(first: Sequence[float], second: Sequence[float], names: tuple[str, str], metric: str = "CIDEr",
                 title: str = "Image by image") -> Picture:
    """The score of every image under two systems, against each other; above the diagonal the second is better."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    better, worse = int((b > a).sum()), int((b < a).sum())
    figure = new_picture(4.9, title, f"{title}: {metric} of {len(a)} images under {names[0]} and {names[1]}.",
                         f"of {len(a)} images, {names[1]} is better on {better} (green), {names[0]} on {worse} (orange); "
                         "grey: equal")
    axes = figure.subplots()
    most = 1.04 * max(a.max(), b.max(), 1e-9)
    axes.plot([0, most], [0, most], color=MUTED, linewidth=1, linestyle="--")
    for colour, mask in ((JOINT, b > a), (TEXT, b < a), (MUTED, b == a)):
        axes.plot(a[mask], b[mask], "o", color=colour, markersize=5, alpha=0.55, markeredgewidth=0)
    axes.set(xlim=(-0.02 * most, most), ylim=(-0.02 * most, most), xlabel=f"{metric} under {names[0]}",
             ylabel=f"{metric} under {names[1]}", aspect="equal")
    return figure


def captioned_images(table: Any, starts: Mapping[str, str], title: str = "How many captioned images does it take?",
                     note: str = "") -> Picture:
    """A score against the number of captioned images (logarithmic), a line a start: means over seeds and a dot each; the
    interval over images where there is one seed. Dashed: the best constant caption, what can be had without looking.

    table: DataFrame with the columns start, images, seed, CIDEr, low, high, constant. starts: what each is called, in order.
    """
    seeds, sizes = table["seed"].nunique(), sorted(table["images"].unique())
    figure = new_picture(4.2, title, f"{title} CIDEr of {', '.join(starts.values())}, fine-tuned on "
                                     f"{', '.join(f'{n:,}' for n in sizes)} images; number of seeds: {seeds}.", note)
    axes = figure.subplots()
    for index, (start, label) in enumerate(starts.items()):
        rows = table[table["start"] == start]
        if rows.empty:
            continue
        aside = 1.03 ** (index - (len(starts) - 1) / 2)  # dots of the same number of images stand beside each other
        colour = (MUTED, TEXT, IMAGE, JOINT)[index % 4]
        mean = rows.groupby("images")["CIDEr"].mean()
        axes.plot(mean.index * aside, mean, color=colour, label=label, marker="_", markersize=14, markeredgewidth=2.4)
        axes.plot(rows["images"] * aside, rows["CIDEr"], "o", color=colour, markersize=4.5, alpha=0.75)
        if seeds == 1:
            axes.vlines(rows["images"] * aside, rows["low"], rows["high"], color=colour, linewidth=2.2, alpha=0.45)
    axes.axhline(table["constant"].iloc[0], color=INK, linewidth=1.2, linestyle=(0, (3, 2)), label="best constant caption")
    axes.set(xscale="log", xlabel="captioned images (logarithmic)", ylabel="CIDEr", ylim=(0, None),
             xlim=(sizes[0] / 1.25, sizes[-1] * 1.25))
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def ladder(gains: Any, title: str = "What does each step add?", note: str = "") -> Picture:
    """What each comparison gains, a panel a number of captioned images, a dot a seed with its interval.

    gains: DataFrame with the columns comparison, images, seed, difference, low, high.
    """
    sizes, asked = sorted(gains["images"].unique()), list(dict.fromkeys(gains["comparison"]))
    figure = new_picture(1.5 + 0.52 * len(asked), title, f"{title} CIDEr gained by {', '.join(asked)}, with 95 % intervals "
                         f"over images.", note)
    panels = figure.subplots(1, len(sizes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, size in zip(panels, sizes, strict=True):
        for row, comparison in enumerate(asked):
            found = gains[(gains["comparison"] == comparison) & (gains["images"] == size)].sort_values("seed")
            y = row + np.linspace(-0.22, 0.22, len(found)) if len(found) > 1 else [row] * len(found)
            colour = (TEXT, IMAGE, PALETTE[3], JOINT, INK)[row % 5]
            panel.hlines(y, found["low"], found["high"], color=colour, linewidth=2.5, alpha=0.5)
            panel.plot(found["difference"], y, "o", color=colour, markersize=6)
        panel.axvline(0, color=INK, linewidth=1)
        panel.set(title=f"{size:,} images", xlabel="CIDEr gained", ylim=(len(asked) - 0.4, -0.6))
        panel.set_yticks(range(len(asked)), asked)
        panel.tick_params(axis="y", length=0)
        panel.grid(False, axis="y")
    return figure
