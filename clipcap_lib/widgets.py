"""Controls that only choose what `plots` draws. Each is an ipywidgets box: `.controls` by name, `.picture` the image.

All controls are sliders, menus and buttons that the keyboard reaches: tab to one, then the arrow keys, or enter on a button.
This room has the browsers and is the door to all widgets: the training monitor is in `monitor`, the decoding stepper in
`stepping`. ipywidgets and IPython are imported where they are used, so that this room opens without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from clipcap_lib import plots
from clipcap_lib.controls import menu, panel, slider
from clipcap_lib.monitor import LiveTraining, read_metrics, read_samples, training_monitor
from clipcap_lib.panels import CAVEAT, METHODS
from clipcap_lib.stepping import CaptionPath, decoding_stepper

__all__ = [
    "CaptionPath", "LiveTraining", "attention_browser", "corpus_browser", "decoding_stepper", "error_browser",
    "read_metrics", "read_samples", "similarity_explorer", "training_monitor",
]


ATTENTION = "attention weight"  # the method that has layers and heads
UNITS = {"occlusion": "occlusion (nats)", "HiResCAM": "HiResCAM (nats, first order)"}


def _column(rows: Any, name: str) -> list[Any]:
    """A column of a datasets table (without decoding its images) or of a list of dictionaries."""
    return list(rows[name]) if hasattr(rows, "column_names") else [row[name] for row in rows]


def corpus_browser(rows: Any) -> Any:
    """Step through records, of one corpus and split or of all.

    rows: image, captions, file_name, corpus and split (a list of dictionaries, or prepared data). The splits to choose
    from are those that the chosen corpus has.
    """
    corpora, splits = _column(rows, "corpus"), _column(rows, "split")
    places: dict[tuple[str, str], list[int]] = {}
    for i, pair in enumerate(zip(corpora, splits, strict=True)):
        for key in (pair, (pair[0], "all"), ("all", pair[1]), ("all", "all")):
            places.setdefault(key, []).append(i)
    names = {name: ["all", *dict.fromkeys(s for c, s in zip(corpora, splits, strict=True) if name in (c, "all"))]
             for name in ("all", *dict.fromkeys(corpora))}
    corpus, split, number = menu("corpus", names), menu("split", names["all"]), slider("record", len(corpora))

    def draw(corpus: str, split: str, number: int) -> Any:
        chosen = places.get((corpus, split)) or places[corpus, "all"]  # the menu of splits may not have followed yet
        row = rows[chosen[min(number, len(chosen)) - 1]]
        about = [f"{key}: {row[key]}" for key in ("corpus", "split", "translated") if row.get(key)]
        captions = row["captions"] or ["(none here: the organiser of a board keeps them)"]
        return plots.caption_card(row["image"], {"captions": captions, "origin": [" · ".join(about)]},
                                  f"{row['file_name']} · {min(number, len(chosen))} of {len(chosen)}")

    def settle() -> None:
        if split.options != tuple(names[corpus.value]):
            kept = split.value
            split.options = names[corpus.value]
            split.value = kept if kept in names[corpus.value] else "all"
        number.max = len(places[corpus.value, split.value])

    return panel({"corpus": corpus, "split": split, "number": number}, draw, settle=settle)


def similarity_explorer(similarity: np.ndarray, images: Sequence[Any], captions: Sequence[str]) -> Any:
    """What the contrastive loss sees: probabilities of the first n images and captions at a temperature, and any one pair.

    similarity (N, N): cosines, images by captions. Each column sums to one: it asks which caption belongs to the image.
    """
    import ipywidgets

    cosines = np.asarray(similarity, dtype=float)
    size = slider("batch size", min(len(cosines), 64), value=min(8, len(cosines)), first=2)
    temperature = ipywidgets.FloatLogSlider(value=0.07, base=10, min=-2, max=1, step=0.05, description="temp. τ",
                                            readout_format=".3f", continuous_update=False)
    image, caption = slider("image", size.value), slider("caption", size.value)

    def settle() -> None:
        image.max = caption.max = size.value

    @lru_cache(maxsize=1)
    def blank(size: int) -> Any:
        shown = (images[:size], captions[:size]) if size <= 12 else (None, None)
        return plots.similarity_matrix(np.zeros((size, size)), *shown, vmin=0, vmax=1, marked=(0, 0),
                                       label="probability of the caption, given the image")

    @lru_cache(maxsize=1)
    def matrix(size: int, temperature: float) -> tuple[np.ndarray, np.ndarray, Any]:
        given_image, given_caption = (_log_softmax(cosines[:size, :size] / temperature, axis) for axis in (1, 0))
        loss, figure = -np.mean([given_image.diagonal(), given_caption.diagonal()]), blank(size)
        figure.renew(np.exp(given_image), f"Batch of {size} at temperature {temperature:.3f}: contrastive loss {loss:.2f} "
                                          f"nats (guessing: {np.log(size):.2f})")
        return given_image, given_caption, figure

    def draw(size: int, temperature: float, image: int, caption: int) -> list[Any]:
        given_image, given_caption, figure = matrix(size, temperature)
        batch, i, c = cosines[:size, :size], image - 1, caption - 1
        figure.mark(i, c)
        pair = plots.similarity_pair(images[i], captions[c], [
            f"cosine similarity {batch[i, c]:.3f}".replace("-", "−"),
            f"given the image, the caption has probability {np.exp(given_image[i, c]):.1%} and is number "
            f"{1 + (batch[i] > batch[i, c]).sum()} of {size} captions",
            f"given the caption, the image has probability {np.exp(given_caption[i, c]):.1%} and is number "
            f"{1 + (batch[:, c] > batch[i, c]).sum()} of {size} images",
        ], f"Image {image} and caption {caption}: " + ("a pair that belongs together" if i == c else "not a pair"))
        return [pair, figure]

    return panel({"size": size, "temperature": temperature, "image": image, "caption": caption}, draw,
                 "A larger batch asks a harder question; a lower temperature gives a more decided answer.", settle)


def _log_softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    shifted = logits - logits.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def attention_browser(image: Any, words: Sequence[str], maps: np.ndarray | None,
                      methods: Mapping[str, np.ndarray] | None = None) -> Any:
    """What each word looks at, or rests on by other methods, word by word.

    maps (T, layers, heads, h, w): attention weights, one colour scale for a layer and head; None where a model has no map.
    methods: name -> maps (T, h, w) on one colour scale, which may be negative ("occlusion", with its unit, say).
    """
    import ipywidgets

    methods = {name: np.asarray(found, dtype=float) for name, found in (methods or {}).items()}
    weights = None if maps is None else np.asarray(maps, dtype=float)
    layers, heads = (["mean", *range(1, n + 1)] for n in ((0, 0) if weights is None else weights.shape[1:3]))
    method = menu("method", [*([] if weights is None else [ATTENTION]), *methods])
    word, layer, head = slider("word", len(words)), menu("layer", layers), menu("head", heads)
    layer.value = layers[-1]  # the last layer is the nearest to the choice of the word
    strength = ipywidgets.FloatSlider(value=0.9, min=0, max=1, step=0.1, description="overlay", continuous_update=False)

    def settle() -> None:
        layer.disabled = head.disabled = method.value != ATTENTION

    def draw(method: str, word: int, layer: Any, head: Any, strength: float) -> Any:
        name = f"{words[word - 1]} · {method}"
        if method == ATTENTION:
            chosen = weights.mean(axis=1) if layer == "mean" else weights[:, layer - 1]  # (T, heads, h, w)
            chosen = chosen.mean(axis=1) if head == "mean" else chosen[:, head - 1]
            name = f"{words[word - 1]} · layer {layer} · head {head}"
        else:
            chosen = methods[method]
        return plots.attention_word(image, words, word - 1, chosen[word - 1], max(float(np.abs(chosen).max()), 1e-9),
                                    strength, name, label=UNITS.get(method, method), signed=bool((chosen < 0).any()),
                                    caveat=CAVEAT if method == ATTENTION else METHODS)

    return panel({"method": method, "word": word, "layer": layer, "head": head, "strength": strength}, draw, settle=settle)


def error_browser(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Captions of one system, or of two, beside their references: sorted by any score, filtered by error.

    rows: dictionaries with `image` (an image, or a function that gives it), `file`, `references`, and `systems`: for each
    system by name {"caption", "scores": {metric: score}, "errors": [names of what is wrong; may be empty]}.
    """
    systems, first = list(rows[0]["systems"]), next(iter(rows[0]["systems"].values()))
    metrics = list(first["scores"])
    errors = list(dict.fromkeys(e for row in rows for said in row["systems"].values() for e in said["errors"]))
    controls = {"system": menu("system", systems), "other": menu("beside", ["-", *systems]),
                "metric": menu("score", metrics), "error": menu("only", ["all", *errors]),
                "order": menu("order", ["worst first", "best first", "largest gain first", "as given"]),
                "number": slider("image", len(rows))}
    if "CIDEr" in metrics:
        controls["metric"].value = "CIDEr"

    def chosen(system: str, other: str, metric: str, error: str, order: str) -> list[Mapping[str, Any]]:
        kept = [row for row in rows if error == "all" or error in row["systems"][system]["errors"]]

        def score(row: Mapping[str, Any], of: str) -> float:
            return row["systems"][of]["scores"][metric]

        if order == "as given":
            return kept
        if order == "largest gain first" and other != "-":
            return sorted(kept, key=lambda row: score(row, system) - score(row, other))
        return sorted(kept, key=lambda row: score(row, system), reverse=order == "best first")

    def settle() -> None:
        if controls["order"].value == "largest gain first" and controls["other"].value == "-":
            controls["order"].value = "worst first"  # nothing stands beside it
        kept = chosen(**{name: control.value for name, control in controls.items() if name != "number"})
        controls["number"].max = max(1, len(kept))

    def draw(number: int, **choice: Any) -> Any:
        kept = chosen(**choice)
        if not kept:
            return plots.caption_card(np.full((4, 4, 3), 255, dtype=np.uint8), {"nothing": ["no image makes this error"]},
                                      f"{choice['system']}: {choice['error']}")
        row = kept[min(number, len(kept)) - 1]
        shown = [choice["system"]] + [choice["other"]] * (choice["other"] not in ("-", choice["system"]))
        sections = {}
        for name in shown:
            said = row["systems"][name]
            scores = " · ".join(f"{metric} {value:.0f}" for metric, value in said["scores"].items())
            sections[name] = [said["caption"], scores, *(["errors: " + "，".join(said["errors"])] if said["errors"] else [])]
        image = row["image"]() if callable(row["image"]) else row["image"]
        return plots.caption_card(image, {**sections, "references": row["references"]},
                                  f"{row['file']} · {min(number, len(kept))} of {len(kept)}")

    return panel(controls, draw, "Largest gain: where the system beside it scores furthest above.", settle)
