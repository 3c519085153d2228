"""Controls that only choose what `plots` draws. Each is an ipywidgets box: `.controls` by name, `.picture` the image.

All controls are sliders, menus and buttons that the keyboard reaches: tab to one, then the arrow keys. ipywidgets and
IPython are imported where they are used, so that this room opens without them.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_lib import plots


def _panel(controls: Mapping[str, Any], draw: Callable[..., Any], note: str = "") -> Any:
    """Controls above the figure that `draw(**values)` gives; it is drawn again whenever a value changes."""
    import ipywidgets

    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="900px", max_width="100%"))

    def redraw(change: Any = None) -> None:
        figure = draw(**{name: control.value for name, control in controls.items()})
        picture.value = plots.png_bytes(figure, small=False)
        picture.alt = figure.alt  # not its tooltip: ipywidgets 8 looks for a description then, and draws no picture

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    children = [row, picture] + ([ipywidgets.HTML(f"<small>{html.escape(note)}</small>")] if note else [])
    box = ipywidgets.VBox(children)
    box.controls, box.picture, box.redraw = dict(controls), picture, redraw
    return box


def _slider(name: str, last: int, value: int = 1, first: int = 1) -> Any:
    import ipywidgets

    return ipywidgets.IntSlider(value=min(value, last), min=first, max=max(first, last), description=name,
                                continuous_update=False)


def _menu(name: str, options: Sequence[Any]) -> Any:
    import ipywidgets

    return ipywidgets.Dropdown(options=list(options), description=name)


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
    corpus, split, number = _menu("corpus", names), _menu("split", names["all"]), _slider("record", len(corpora))

    def draw(corpus: str, split: str, number: int) -> Any:
        chosen = places.get((corpus, split)) or places[corpus, "all"]  # the menu of splits may not have followed yet
        row = rows[chosen[min(number, len(chosen)) - 1]]
        about = [f"{key}: {row[key]}" for key in ("corpus", "split", "translated") if row.get(key)]
        captions = row["captions"] or ["(none here: the organiser of a board keeps them)"]
        return plots.caption_card(row["image"], {"captions": captions, "origin": [" · ".join(about)]},
                                  str(row["file_name"]))

    def fit(change: Any) -> None:
        if split.options != tuple(names[corpus.value]):
            kept = split.value
            split.options = names[corpus.value]
            split.value = kept if kept in names[corpus.value] else "all"
        number.max = len(places[corpus.value, split.value])

    corpus.observe(fit, "value")
    split.observe(fit, "value")
    return _panel({"corpus": corpus, "split": split, "number": number}, draw)


def similarity_explorer(similarity: np.ndarray, images: Sequence[Any], captions: Sequence[str]) -> Any:
    """What the contrastive loss sees: probabilities of the first n images and captions at a temperature.

    similarity (N, N): cosines, images by captions. Each column sums to one: it asks which caption belongs to the image.
    """
    import ipywidgets

    cosines = np.asarray(similarity, dtype=float)
    size = _slider("batch size", min(len(cosines), 64), value=min(8, len(cosines)), first=2)
    temperature = ipywidgets.FloatLogSlider(value=0.07, base=10, min=-2, max=1, step=0.05, description="temperature τ",
                                            readout_format=".3f", continuous_update=False)

    def draw(size: int, temperature: float) -> Any:
        logits = cosines[:size, :size] / temperature
        losses = [_log_softmax(logits, axis).diagonal() for axis in (1, 0)]
        small = size <= 12
        return plots.similarity_matrix(
            np.exp(_log_softmax(logits, 1)), images[:size] if small else None, captions[:size] if small else None,
            title=f"Batch of {size} at temperature {temperature:.3f}: contrastive loss {-np.mean(losses):.2f} nats "
                  f"(guessing: {np.log(size):.2f})", vmin=0, vmax=1, label="probability of the caption, given the image")

    return _panel({"size": size, "temperature": temperature}, draw,
                  "A larger batch asks a harder question; a lower temperature gives a more decided answer.")


def _log_softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    shifted = logits - logits.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def attention_browser(image: Any, words: Sequence[str], maps: np.ndarray) -> Any:
    """Attention over the image word by word. maps (T, layers, heads, h, w); one colour scale for a layer and head."""
    import ipywidgets

    maps = np.asarray(maps, dtype=float)
    layers, heads = (["mean", *range(1, n + 1)] for n in maps.shape[1:3])
    word = _slider("word", len(words))
    layer, head = _menu("layer", layers), _menu("head", heads)
    layer.value = layers[-1]  # the last layer is the nearest to the choice of the word
    strength = ipywidgets.FloatSlider(value=0.9, min=0, max=1, step=0.1, description="overlay", continuous_update=False)

    def draw(word: int, layer: Any, head: Any, strength: float) -> Any:
        chosen = maps.mean(axis=1) if layer == "mean" else maps[:, layer - 1]  # (T, heads, h, w)
        chosen = chosen.mean(axis=1) if head == "mean" else chosen[:, head - 1]
        return plots.attention_word(image, words, word - 1, chosen[word - 1], max(float(chosen.max()), 1e-9), strength,
                                    title=f"{words[word - 1]} · layer {layer} · head {head}")

    return _panel({"word": word, "layer": layer, "head": head, "strength": strength}, draw)


def error_browser(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Captions of one system, or of two, beside their references: sorted by any score, filtered by error.

    rows: dictionaries with `image` (an image, or a function that gives it), `file`, `references`, and `systems`: for each
    system by name {"caption", "scores": {metric: score}, "errors": [names of what is wrong; may be empty]}.
    """
    systems, first = list(rows[0]["systems"]), next(iter(rows[0]["systems"].values()))
    metrics = list(first["scores"])
    errors = list(dict.fromkeys(e for row in rows for said in row["systems"].values() for e in said["errors"]))
    controls = {"system": _menu("system", systems), "other": _menu("beside", ["-", *systems]),
                "metric": _menu("score", metrics), "error": _menu("only", ["all", *errors]),
                "order": _menu("order", ["worst first", "best first", "largest gain first", "as given"]),
                "number": _slider("image", len(rows))}
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

    return _panel(controls, draw, "Largest gain: where the system beside it scores furthest above.")


# -- training ----------------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> Any:
    """metrics.jsonl -> DataFrame: a row a line, validation values as columns of their own; empty if there is no file.

    A last line that is still being written is left out.
    """
    import pandas as pd

    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        validation = values.pop("validation", {})
        lines.append({**values, **validation})
    return pd.DataFrame(lines)


def _curve_columns(frame: Any) -> list[str]:
    wanted = ("loss", "image->text R@1", "text->image R@1", "CIDEr", "distinct", "images_per_second")
    return [name for name in wanted if name in frame]


def _status(line: Mapping[str, Any]) -> str:
    return (f"epoch {line['epoch']:.1f}, step {line['step']:.0f}" + (f" of {line['steps']:.0f}" if "steps" in line else "")
            + f", loss {line['loss']:.3f}, {line['images_per_second']:.0f} images/s")


def training_monitor(metrics_file: Path) -> Any:
    """Curves of a run that is going on or over, read again by the button, or every two seconds while "play" runs."""
    import ipywidgets

    metrics_file = Path(metrics_file)
    play = ipywidgets.Play(value=0, min=0, max=10_000, interval=2000, description="follow")
    refresh = ipywidgets.Button(description="read again", tooltip="read the run's file again")

    def draw(play: int) -> Any:
        frame = read_metrics(metrics_file)
        if frame.empty:
            return plots.training_curves({}, ["loss"], title=f"{metrics_file}: nothing is written yet")
        name = "/".join(metrics_file.parent.parts[-2:])
        return plots.training_curves({name: frame}, _curve_columns(frame), title=f"{name}: {_status(frame.iloc[-1])}")

    box = _panel({"play": play}, draw)
    refresh.on_click(box.redraw)
    box.children[0].children = (*box.children[0].children, refresh)
    box.controls["refresh"] = refresh
    return box


class LiveTraining:
    """A `progress` for training that keeps one line a run, and the curves of the run that is going on, up to date.

    Outside of a notebook it prints a line at the end of each epoch.
    """

    def __init__(self, share: float = 0.03):
        self.share = share  # of the time that may go into drawing the curves: training waits meanwhile
        self.lines: dict[str, str] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self._handles: dict[str, Any] = {}
        self._next = 0.0

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take what `train` reports: `event` is "step", "resumed" or "done before"."""
        run = f"{line['stage']}/{line['name']}"
        over = line["event"] == "done before" or line.get("step") == line.get("steps")
        if line["event"] == "done before":
            self.lines[run] = "done before, nothing has changed"
        elif line["event"] == "resumed":
            self.lines[run] = f"goes on at step {line['step']} of {line['steps']}"
        else:
            values = {**line, **line.get("validation", {})}
            self.history.setdefault(run, []).append(values)
            best = "".join(f", {k} {v:.1f}" for k, v in line.get("validation", {}).items() if k in ("CIDEr", "recall_sum"))
            self.lines[run] = _status(line) + best
        if not self._notebook():
            if line["event"] != "step" or "validation" in line:
                print(f"{run}: {self.lines[run]}", flush=True)
        elif over or line["event"] != "step" or time.monotonic() > self._next:
            started = time.monotonic()
            self._draw(run)
            self._next = time.monotonic() + (time.monotonic() - started) / self.share

    @staticmethod
    def _notebook() -> bool:
        import sys

        return "IPython" in sys.modules and getattr(sys.modules["IPython"].get_ipython(), "kernel", None) is not None

    def _draw(self, run: str) -> None:
        import pandas as pd
        from IPython.display import Pretty

        self._update("text", Pretty("\n".join(f"{name}: {text}" for name, text in self.lines.items())))
        if self.history.get(run):
            frame = pd.DataFrame(self.history[run])
            self._update("curves", plots.training_curves({run: frame}, _curve_columns(frame)[:3], title=f"Training {run}"))

    def _update(self, name: str, shown: Any) -> None:
        from IPython.display import display

        if name in self._handles:
            self._handles[name].update(shown)
        else:
            self._handles[name] = display(shown, display_id=True)
