"""Figures of the joint space: who lies near whom. Shown through `plots`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipcap_lib.matrices import similarity_image
from clipcap_lib.style import (
    IMAGE,
    INK,
    MUTED,
    PALETTE,
    TEXT,
    WIDTH,
    Picture,
    arrows,
    colour_scale,
    new_picture,
    place,
    show_image,
    wrap,
)


def recall_curves(ranks: Mapping[str, Mapping[str, Sequence[int]]], images: int,
                  title: str = "How far down the list is the right one?") -> Picture:
    """Recall at every k, a panel a direction, a line a run; the dashed line is chance.

    ranks: for each run {"image->text": ranks (1 is best), "text->image": ranks}, see `metrics.retrieval_ranks`. images: how
    many there are to choose from.
    """
    ways = list(next(iter(ranks.values())))
    figure = new_picture(3.7, title, f"{title} Recall at k in percent for {', '.join(ranks)}, {images} images.",
                         f"among {images} images with a caption each")
    k = np.arange(1, images + 1)
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for panel, way in zip(panels, ways, strict=True):
        for index, (name, found) in enumerate(ranks.items()):
            recall = 100 * np.mean(np.asarray(found[way])[:, None] <= k, axis=0)
            panel.plot(k, recall, color=PALETTE[index % len(PALETTE)], label=name)
        panel.plot(k, 100 * k / images, color=INK, linewidth=1.2, linestyle=(0, (3, 2)), label="chance")
        panel.set(xscale="log", xlim=(1, max(2, images)), ylim=(0, 102), title=arrows(way), xlabel="k (logarithmic)")
        panel.set_xticks(shown := [n for n in (1, 5, 10, 50, 100, 500, 1000) if n <= images], [str(n) for n in shown])
        panel.minorticks_off()
    panels[0].set_ylabel("among the first k (% of queries)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def embedding_map(projections: Mapping[str, np.ndarray], concepts: Sequence[str], texts: Sequence[bool],
                  title: str = "The joint space, flattened") -> Picture:
    """Embeddings as points of the plane: a panel a projection, a colour a concept, discs for images, crosses for captions.

    projections {name: (N, 2)}; concepts (N,): what each is about (the seven commonest have a colour, the rest is grey);
    texts (N,): whether it is a caption. Axes have no unit; what near means, a projection's name can say.
    """
    concepts, texts = np.asarray(concepts), np.asarray(texts, dtype=bool)
    common = [name for name, _ in Counter(concepts.tolist()).most_common(len(PALETTE))]
    figure = new_picture(4.9, title, f"{title}: {len(concepts)} images and captions by {', '.join(projections)}, coloured "
                         "by what they are about.", "axes have no unit · disc: image · cross: caption")
    panels = figure.subplots(1, len(projections), squeeze=False)[0]
    for panel, (name, points) in zip(panels, projections.items(), strict=True):
        points = np.asarray(points, dtype=float)
        for index, concept in enumerate([None, *common]):
            mine = ~np.isin(concepts, common) if concept is None else concepts == concept
            colour = "#c9d0d6" if concept is None else PALETTE[index - 1]
            for marker, chosen, size in (("o", mine & ~texts, 16), ("x", mine & texts, 18)):
                panel.scatter(*points[chosen].T, s=size, marker=marker, color=colour, alpha=0.75, linewidths=1.1,
                              label=("other" if concept is None else concept) if marker == "o" else None)
        panel.set(title=name, xticks=[], yticks=[])
        panel.spines[:].set(visible=True, color="#c5ccd3")
    handles, labels = panels[0].get_legend_handles_labels()
    order = [*range(1, len(labels)), 0]  # "other" last
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower left", ncols=8,
                  handletextpad=0.1, columnspacing=1.2)
    return figure


def cluster_order(similarity: np.ndarray, clusters: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a similarity matrix (N, N), alike ones side by side -> order (N,), the cluster of each in that order (N,).

    Average linkage of the similarity profiles by correlation, with optimal leaf order (Bar-Joseph et al. 2001).
    """
    from scipy.cluster import hierarchy

    if len(similarity) < 3:  # nothing to sort
        return np.arange(len(similarity)), np.ones(len(similarity), dtype=int)
    profiles = np.concatenate([similarity, similarity.T], axis=1)
    if np.ptp(profiles, axis=1).min() == 0:  # an encoder that tells nothing apart: profiles have no correlation
        return np.arange(len(similarity)), np.ones(len(similarity), dtype=int)
    tree = hierarchy.linkage(profiles, "average", "correlation", optimal_ordering=True)
    order = hierarchy.leaves_list(tree)
    return order, hierarchy.fcluster(tree, min(clusters, len(order)), "maxclust")[order]


def similarity_clusters(similarity: np.ndarray, concepts: Sequence[str] | None = None, clusters: int = 8,
                        title: str = "Who resembles whom") -> Picture:
    """A large similarity matrix (images, texts) of N pairs, sorted so that alike pairs stand together.

    concepts (N,): what each pair is about; the commonest of a cluster is written beside it, with its share. Colours run
    from -1 to 1, as in all similarity matrices.
    """
    values = np.asarray(similarity, dtype=float)
    order, groups = cluster_order(values, clusters)
    pairs = len(order)
    own, others = np.diagonal(values).mean(), (values.sum() - np.trace(values)) / max(1, pairs * (pairs - 1))
    figure = new_picture(6.6, title, f"{title}: cosine similarities of {pairs} images and captions, sorted by cluster.",
                         "column: image · row: caption, both sorted by likeness · diagonal: pairs that belong together, "
                         f"mean {own:.2f}; others {others:.2f}".replace("-", "−"), layout=None)
    drawn = similarity_image(figure, values[np.ix_(order, order)].T, (0.5, 0.75, 5.4, 5.4))
    drawn.axes.set_ylabel(f"caption, 1 to {pairs}")
    edges = np.flatnonzero(np.diff(groups)) + 0.5
    for edge in edges:
        drawn.axes.axhline(edge, color="white", linewidth=0.8)
        drawn.axes.axvline(edge, color="white", linewidth=0.8)
    for first, end in zip([-0.5, *edges], [*edges, pairs - 0.5], strict=True):
        members = order[int(first + 0.5):int(end + 0.5)]
        if concepts is not None and len(members) >= pairs / 60:
            name, count = Counter(concepts[i] for i in members).most_common(1)[0]
            text = f"{name} ({count} of {len(members)})"
            drawn.axes.text(pairs + 0.01 * pairs, (first + end) / 2, text, va="center", fontsize=9, color=INK)
    colour_scale(figure, drawn, 7.75, 0.75, 5.4, "cosine similarity")
    return figure


def search_card(query: Any, found: Sequence[tuple[Any, str, float]], captions: Sequence[tuple[str, float]] = (),
                says: Mapping[str, str] | None = None, title: str = "Nearest in the joint space") -> Picture:
    """What lies nearest to an image, or to a text: found images with captions, and captions, each with its cosine.

    query: an image, or a text. found: (image, caption, cosine) a neighbour, best first; captions: (caption, cosine).
    says: what captioners write of the image, by their names, to stand below it.
    """
    says, top, left = says or {}, 0.85, 2.65
    cell = min(1.32, (WIDTH - left - 0.1) / max(1, len(found)) - 0.1)
    below = top + cell + 0.95
    texts = {name: wrap(text, 30) for name, text in says.items()}
    height = max(below + (0.25 * len(captions) + 0.35) * bool(captions), top + 2.2 * (not isinstance(query, str)),
                 top + 2.2 * bool(says) + sum(
        0.32 + 0.19 * (text.count("\n") + 1) for text in texts.values()) + 0.1)
    figure = new_picture(height, title, f"{title}: {len(found)} images and {len(captions)} captions with their cosine "
                         "similarities.", "beside each: its cosine similarity to what was asked, from −1 to 1", layout=None)
    if isinstance(query, str):
        figure.text(0.15 / WIDTH, 1 - (top + 0.1) / height, wrap(f"“{query}”", 26), va="top", fontsize=12, color=TEXT)
    else:
        show_image(place(figure, 0.15, top, 2.0, 2.0), query)
    y = top + 2.2
    for name, text in texts.items():
        figure.text(0.15 / WIDTH, 1 - y / height, name, va="top", fontsize=8.5, color=MUTED)
        figure.text(0.15 / WIDTH, 1 - (y + 0.17) / height, text, va="top", fontsize=10.5, linespacing=1.25)
        y += 0.32 + 0.19 * (text.count("\n") + 1)
    for i, (image, text, cosine) in enumerate(found):
        x = left + i * (cell + 0.1)
        show_image(place(figure, x, top, cell, cell), image)
        figure.text(x / WIDTH, 1 - (top - 0.05) / height, f"{cosine:.2f}".replace("-", "−"), va="bottom", fontsize=9,
                    color=IMAGE)
        figure.text(x / WIDTH, 1 - (top + cell + 0.06) / height, wrap(text, int(cell / 0.068), 4), va="top", fontsize=8.5,
                    linespacing=1.25)
    if captions:
        figure.text(left / WIDTH, 1 - (below - 0.14) / height, "nearest captions", va="top", fontsize=9, color=MUTED)
    for i, (text, cosine) in enumerate(captions):
        y = 1 - (below + 0.25 * i + 0.1) / height
        figure.text(left / WIDTH, y, f"{cosine:.2f}".replace("-", "−"), va="top", fontsize=9, color=IMAGE)
        figure.text((left + 0.45) / WIDTH, y, wrap(text, 80, 1), va="top", fontsize=10.5)
    return figure
