"""Data in, figure out. Call `use_house_style()` once; every function then returns a figure that shows itself.

A figure here is a `Picture`: a matplotlib Figure without a window, which a notebook shows once, with alt text, in few bytes.
Images are PIL images, or arrays (H, W, 3) or (3, H, W), uint8 or floats in [0, 1].
"""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL.PngImagePlugin import PngInfo

WIDTH = 9.0  # inches; at 100 dots an inch the width at which a code host shows a figure
INK, MUTED, FAINT = "#1f2933", "#65717e", "#e4e8ec"
IMAGE, TEXT, JOINT = "#0072B2", "#D55E00", "#009E73"  # one colour each for what is image, text and both, everywhere
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#4d4d4d")  # Okabe and Ito (2008)
SEQUENTIAL, DIVERGING, HEAT = "YlGnBu", "RdBu_r", "inferno"
LABELS = {"loss": "loss (nats)", "learning_rate": "learning rate", "images_per_second": "images / s",
          "temperature": "temperature τ", "epoch": "epoch"}
CAVEAT = "Weights are not explanations: a map shows where the model looked, not why it chose the word."


def use_house_style() -> None:
    """Set matplotlib up for this workbook: a font with Chinese glyphs, safe colours, a white face, fixed resolution."""
    path = Path(__file__).parent / "fonts" / "NotoSansSC-subset.otf"
    family = font_manager.FontProperties(fname=path).get_name()
    if family not in {font.name for font in font_manager.fontManager.ttflist}:
        font_manager.fontManager.addfont(path)
    matplotlib.rcParams.update({
        "font.family": [family, "DejaVu Sans"], "font.size": 9.5, "text.color": INK,
        "text.parse_math": False,  # a "$" in a caption is a dollar
        "axes.prop_cycle": matplotlib.cycler(color=PALETTE), "axes.edgecolor": "#aab3bc", "axes.labelcolor": INK,
        "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 8, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": FAINT, "grid.linewidth": 0.8,
        "xtick.color": "#aab3bc", "ytick.color": "#aab3bc", "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.frameon": False, "legend.fontsize": 9,
        "figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 100, "savefig.dpi": 100,
        "lines.linewidth": 1.8, "hatch.linewidth": 0.6,
    })


class Picture(Figure):
    """A Figure that shows itself in a notebook. It has no window, so that pyplot does not show it a second time."""

    alt = ""  # what the figure shows, in one sentence, for readers who do not see it

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        data = base64.b64encode(png_bytes(self)).decode("ascii")
        return {"image/png": data, "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def png_bytes(figure: Figure, dpi: float = 100, alt: str = "", colours: int | None = 256) -> bytes:
    """The figure as PNG, the same bytes each time. A palette of 256 colours is a third of the size; None keeps all."""
    before, figure.dpi = figure.dpi, dpi
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    figure.dpi = before
    information, buffer = PngInfo(), io.BytesIO()
    if alt:
        information.add_text("Description", alt)
    if colours is None:  # for the controls: speed before size
        image.save(buffer, "png", pnginfo=information, compress_level=1)
    else:
        image.quantize(colours, dither=PIL.Image.Dither.NONE).save(buffer, "png", pnginfo=information, optimize=True)
    return buffer.getvalue()


def save(figure: Figure, folder: Path, name: str, alt: str = "") -> Path:
    """Write `<folder>/<name>.png`, about 1,530 pixels wide and without a date, `alt` as its description -> its path."""
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(figure, dpi=170, alt=alt or getattr(figure, "alt", "")))
    return path


# -- small helpers ---------------------------------------------------------------------------------------------------

def _picture(height: float, title: str, alt: str, subtitle: str = "", layout: str | None = "constrained") -> Picture:
    figure = Picture(figsize=(WIDTH, height), layout=layout)
    figure.alt = alt
    if layout:  # the engine keeps room for a suptitle, not for free text
        figure.suptitle(title + (f"\n{subtitle}" if subtitle else ""), x=0.012, ha="left", fontsize=12.5,
                        linespacing=1.35)
    else:
        figure.text(0.15 / WIDTH, 1 - 0.12 / height, title, fontsize=12.5, va="top")
        figure.text(0.15 / WIDTH, 1 - 0.40 / height, subtitle, fontsize=9, va="top", color=MUTED)
    return figure


def _inches(figure: Figure, left: float, top: float, width: float, height: float) -> Any:
    """Axes placed in inches from the top left corner."""
    w, h = figure.get_size_inches()
    axes = figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
    axes.grid(False)
    return axes


def pixels(image: Any) -> np.ndarray:
    """A PIL image or an array, channels first or last, uint8 or floats in [0, 1] -> (H, W, 3) uint8."""
    array = np.asarray(image.convert("RGB") if isinstance(image, PIL.Image.Image) else image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    return array if array.dtype == np.uint8 else (255 * np.clip(array, 0, 1)).round().astype(np.uint8)


def _show(axes: Any, image: Any, edge: str = "#c5ccd3") -> None:
    axes.imshow(pixels(image))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=edge, linewidth=0.8)


def wrap(text: str, width: int, lines: int | None = None) -> str:
    """Break text after `width` columns; a Chinese character takes two, Latin words stay whole, "，" never leads a line."""
    rows, row, used = [], "", 0
    words: list[str] = []
    for character in str(text):
        glue = character in "，。、；：！？）】》”’,.;:!?)" or (character.isascii() and not character.isspace())
        if words and glue and (not character.isalnum() or words[-1][-1:].isascii() and not words[-1][-1:].isspace()):
            words[-1] += character
        else:
            words.append(character)
    for word in words:
        size = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in word)
        if row and (used + size > width or word == "\n"):
            rows, row, used = [*rows, row.rstrip()], "", 0
        if row or not word.isspace():
            row, used = row + word, used + size
    rows = [*rows, row] if row else rows
    if lines and len(rows) > lines:
        rows = [*rows[:lines - 1], rows[lines - 1][:-1] + "…"]
    return "\n".join(rows)


def _contrast(colour: Sequence[float]) -> str:
    return "white" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55 else INK


def _arrows(text: str) -> str:
    return text.replace("->", " → ")


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
    figure = _picture(0.5 + sum(heights), title, f"{title}: {len(images)} images, each above its caption.", layout=None)
    top = 0.48
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = 0.15 + column * (cell + 0.2)
            axes = _inches(figure, left, top + head, cell, picture)
            axes.set_anchor("N")
            _show(axes, images[i])
            if titles:
                figure.text(left / WIDTH, 1 - (top + 0.02) / figure.get_figheight(), titles[i], va="top", fontsize=9,
                            color=MUTED)
            figure.text(left / WIDTH, 1 - (top + head + picture + 0.06) / figure.get_figheight(), blocks[i], va="top",
                        fontsize=9, linespacing=1.3)
        top += height
    return figure


def caption_card(image: Any, sections: Mapping[str, Sequence[str]], title: str = "") -> Picture:
    """One image at the left; at the right, under each section's name, its lines of text."""
    figure = _picture(4.0, title, f"{title}: one image and its texts.", layout=None)
    axes = _inches(figure, 0.15, 0.5, 3.3, 3.3)
    axes.set_anchor("NW")
    _show(axes, image)
    top = 0.5
    for index, (name, lines) in enumerate(sections.items()):
        figure.text(3.7 / WIDTH, 1 - top / 4.0, name, va="top", fontsize=9, color=PALETTE[index % len(PALETTE)])
        block = "\n".join(wrap(line, 70) for line in lines)
        figure.text(3.7 / WIDTH, 1 - (top + 0.22) / 4.0, block, va="top", fontsize=10.5, linespacing=1.35)
        top += 0.42 + 0.2 * (block.count("\n") + 1)
    return figure


# -- similarity ------------------------------------------------------------------------------------------------------

def _matrix(figure: Figure, values: np.ndarray, box: tuple[float, float, float, float], images: Sequence[Any] | None,
            vmin: float, vmax: float) -> Any:
    """Draw (texts, images) into the box (left, top, width, height) in inches, thumbnails above it."""
    rows, columns = values.shape
    left, top, width, height = box
    axes = _inches(figure, *box)
    colours = matplotlib.colormaps[DIVERGING if vmin < 0 else SEQUENTIAL]
    drawn = axes.imshow(values, cmap=colours, vmin=vmin, vmax=vmax, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#aab3bc")
    cell = min(width / columns, height / rows)
    if max(rows, columns) <= 12:
        for r, c in np.ndindex(rows, columns):
            text = f"{values[r, c]:.2f}".replace("-", "−")
            text = text.replace("0.", ".", 1) if cell < 0.42 else text
            axes.text(c, r, text, ha="center", va="center", fontsize=8 if cell >= 0.42 else 6.5 if cell > 0.3 else 5.8,
                      color=_contrast(colours(drawn.norm(values[r, c]))))
        for i in range(min(rows, columns)):
            axes.add_patch(Rectangle((i - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor=INK, linewidth=1.6))
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(True, which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
    else:  # two lines beside the diagonal, which stays visible between them
        end = min(rows, columns)
        for shift in (-1, 1):
            axes.plot([-0.5 + max(shift, 0), end - 0.5 + min(shift, 0)], [-0.5 - min(shift, 0), end - 0.5 - max(shift, 0)],
                      color=INK, linewidth=0.8)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel=f"image, 1 to {columns}")
    if images is not None and columns <= 12:
        size = min(width / columns - 0.04, 0.9)
        for i in range(columns):
            _show(_inches(figure, left + (i + 0.5) * width / columns - size / 2, top - size - 0.06, size, size), images[i])
    return drawn


def _row_captions(figure: Figure, captions: Sequence[str], left: float, top: float, width: float, height: float) -> None:
    step, total = height / len(captions), figure.get_figheight()
    for i, caption in enumerate(captions):
        text = wrap(caption, int(width / 0.062), max(1, int(step / 0.15)))
        figure.text((left + width - 0.08) / WIDTH, 1 - (top + (i + 0.5) * step) / total, text, ha="right", va="center",
                    fontsize=8, linespacing=1.2)


def _scale(figure: Figure, drawn: Any, left: float, top: float, height: float, label: str) -> None:
    bar = figure.colorbar(drawn, cax=_inches(figure, left, top, 0.14, height))
    bar.set_label(label)
    bar.outline.set_visible(False)


def similarity_matrix(similarity: np.ndarray, images: Sequence[Any] | None = None, captions: Sequence[str] | None = None,
                      title: str = "Similarity of images and captions", vmin: float = -1, vmax: float = 1,
                      label: str = "cosine similarity") -> Picture:
    """Similarity (images, texts) drawn transposed: a column an image (thumbnail above), a row a caption (text beside).

    The colours run from vmin to vmax whatever the values are. Pairs that belong together are framed. Values stand in the
    cells up to 12 x 12. For probabilities give vmin=0 and their label.
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
    subtitle = f"column: image · row: caption · framed: pairs that belong together, mean {mean[0]:.2f}; others {mean[1]:.2f}"
    figure = _picture(0.75 + above + height + 0.35, title, f"{title}: {columns} images by {rows} captions; {subtitle}.",
                      subtitle.replace("-", "−"), layout=None)
    drawn = _matrix(figure, values, (beside, 0.75 + above, width, height), images, vmin, vmax)
    if captions and rows <= 12:
        _row_captions(figure, captions[:rows], 0.1, 0.75 + above, beside - 0.1, height)
    elif not small:
        drawn.axes.set_ylabel(f"caption, 1 to {rows}")
    _scale(figure, drawn, beside + width + 0.15, 0.75 + above, height, label)
    return figure


def similarity_before_after(before: np.ndarray, after: np.ndarray, images: Sequence[Any] | None = None,
                            captions: Sequence[str] | None = None, title: str = "What contrastive training changes",
                            vmin: float = -1, vmax: float = 1) -> Picture:
    """Two similarity matrices (images, texts), before and after training, on one colour scale. See similarity_matrix."""
    pair = [np.asarray(before, dtype=float).T, np.asarray(after, dtype=float).T]
    rows, columns = pair[0].shape
    beside = 2.0 if captions and rows <= 12 else 0.4
    width = (WIDTH - beside - 0.2 - 0.8) / 2
    height = width * rows / columns
    above = min(width / columns - 0.04, 0.9) + 0.1 if images is not None and columns <= 12 else 0.0
    figure = _picture(1.05 + above + height + 0.35, title, f"{title}: similarity of {columns} images and {rows} captions "
                      "before and after training, on one colour scale.",
                      "column: image · row: caption · framed: pairs that belong together", layout=None)
    for index, (name, values) in enumerate(zip(("before", "after"), pair, strict=True)):
        left, own = beside + index * (width + 0.2), np.diagonal(values).mean()
        others = (values.sum() - np.trace(values)) / max(1, values.size - min(rows, columns))
        figure.text(left / WIDTH, 1 - 0.72 / figure.get_figheight(),
                    f"{name}: pairs {own:.2f}, others {others:.2f}".replace("-", "−"), va="top", fontsize=10.5)
        drawn = _matrix(figure, values, (left, 1.05 + above, width, height), images, vmin, vmax)
    if captions and rows <= 12:
        _row_captions(figure, captions[:rows], 0.1, 1.05 + above, beside - 0.1, height)
    _scale(figure, drawn, left + width + 0.12, 1.05 + above, height, "cosine similarity")
    return figure


def recall_bars(recalls: Mapping[str, Mapping[str, float]], chance: float | Mapping[str, float] | None = None,
                title: str = "Retrieval: is the right one among the first k?") -> Picture:
    """Recall in percent, a bar a run and metric ("image->text R@1"; others are left out), chance as a dashed line."""
    metrics = [m for m in next(iter(recalls.values())) if "R@" in m]
    figure = _picture(3.4, title, f"{title} Recall in percent for {', '.join(recalls)}.")
    axes = figure.subplots()
    thickness = 0.8 / len(recalls)
    for index, (name, values) in enumerate(recalls.items()):
        x = np.arange(len(metrics)) - 0.4 + (index + 0.5) * thickness
        bars = axes.bar(x, [values[m] for m in metrics], thickness * 0.92, label=name, color=PALETTE[index % len(PALETTE)])
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    if chance is not None:
        levels = [chance[m] if isinstance(chance, Mapping) else chance for m in metrics]
        axes.hlines(levels, np.arange(len(metrics)) - 0.46, np.arange(len(metrics)) + 0.46, color=INK, linestyle=(0, (3, 2)),
                    linewidth=1.2, label="chance")
    axes.set(xticks=np.arange(len(metrics)), ylim=(0, 108), ylabel="recall (% of queries)")
    axes.set_xticklabels([_arrows(m).replace(" R@", "\nR@") for m in metrics])
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", ncols=len(recalls) + 1)
    return figure


# -- training --------------------------------------------------------------------------------------------------------

def training_curves(histories: Mapping[str, Any], columns: Sequence[str] = ("loss",), title: str = "Training") -> Picture:
    """One panel a quantity, one line a run. histories: name -> DataFrame with `step` and the columns; gaps are skipped."""
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure = _picture(0.8 + 2.5 * down, title, f"{title}: {', '.join(columns)} by step, runs {', '.join(histories)}.")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, column in zip(panels, columns, strict=False):
        for index, (name, history) in enumerate(histories.items()):
            if column not in history:
                continue
            rows = history[["step", column]].dropna()
            colour, window = PALETTE[index % len(PALETTE)], len(rows) // 20
            if window >= 2:  # the line is a moving mean; what was measured stays visible behind it
                panel.plot(rows["step"], rows[column], color=colour, alpha=0.25, linewidth=0.8)
                smooth = rows[column].rolling(window, center=True, min_periods=1).mean()
                panel.plot(rows["step"], smooth, color=colour, label=name)
            else:
                panel.plot(rows["step"], rows[column], color=colour, marker="o", markersize=3.5, label=name)
        panel.set(title=LABELS.get(column, column.replace("_", " ")), xlabel="step (batches)")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for panel in panels[len(columns):]:
        panel.set_axis_off()
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=6)
    return figure


# -- attention -------------------------------------------------------------------------------------------------------

def _overlay(axes: Any, image: Any, weights: np.ndarray | None, vmax: float, strength: float = 1.0) -> Any:
    """The image, greyed where a map lies over it: colours and opacity rise with the weight, up to vmax."""
    picture = pixels(image)
    if weights is None:
        _show(axes, picture)
        return None
    grey = picture.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    _show(axes, ((1 - 0.7 * strength) * picture + 0.7 * strength * grey).astype(np.uint8))
    height, width = picture.shape[:2]
    opacity = strength * (0.15 + 0.7 * np.clip(weights / vmax, 0, 1))
    return axes.imshow(weights, cmap=HEAT, vmin=0, vmax=vmax, alpha=opacity, interpolation="bilinear",
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
    figure = _picture(0.55 + rows * step + 0.35, title, f"{title}: maps over the image for {' '.join(words)}.", layout=None)
    vmax, drawn = max(float(maps.max()), 1e-9), None
    for i in range(len(words) + 1):
        left, top = 0.15 + (i % columns) * (cell + 0.1), 0.5 + (i // columns) * step
        axes = _inches(figure, left, top + 0.26, cell, cell)
        result = _overlay(axes, image, maps[i - 1] if i else None, vmax)
        drawn = result or drawn
        axes.set_title(words[i - 1] if i else "the image", loc="center", fontsize=11 if i else 9, pad=4,
                       color=INK if i else MUTED)
        if shares is not None and i:
            axes.set_xlabel(f"{100 * shares[i - 1]:.0f} % on image", fontsize=8, color=MUTED, labelpad=2)
    right = 0.15 + columns * (cell + 0.1)
    _scale(figure, drawn, right, 0.76, rows * step - step + cell, label)
    figure.text(0.15 / WIDTH, 0.1 / figure.get_figheight(), CAVEAT, fontsize=8.5, color=MUTED)
    return figure


def attention_word(image: Any, words: Sequence[str], index: int, weights: np.ndarray, vmax: float, strength: float = 1.0,
                   title: str = "") -> Picture:
    """One word's map (h, w) large over the image, the caption beside it with that word picked out."""
    figure = _picture(4.4, title, f"{title}: map of the word {words[index]}.", layout=None)
    drawn = _overlay(_inches(figure, 0.15, 0.5, 3.5, 3.5), image, np.asarray(weights, dtype=float), vmax, strength)
    _scale(figure, drawn, 3.75, 0.5, 3.5, "attention weight")
    left, top = 4.9, 0.75
    for i, word in enumerate(words):
        width = 0.1 + sum(0.24 if unicodedata.east_asian_width(c) in "WF" else 0.13 for c in word)
        if left + width > WIDTH - 0.15:
            left, top = 4.9, top + 0.42
        style = {"facecolor": TEXT, "edgecolor": "none", "boxstyle": "round,pad=0.2"} if i == index else None
        figure.text((left + width / 2) / WIDTH, 1 - top / 4.4, word, ha="center", va="center", fontsize=15, bbox=style,
                    color="white" if i == index else INK)
        left += width
    figure.text(0.15 / WIDTH, 0.1 / 4.4, CAVEAT, fontsize=8.5, color=MUTED)
    return figure
