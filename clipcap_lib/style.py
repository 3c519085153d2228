"""The house style of all figures: a font with Chinese glyphs, safe colours, and a figure that shows itself.

A figure here is a `Picture`: a matplotlib Figure without a window, which a notebook shows once, with alt text, in few bytes.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL.PngImagePlugin import PngInfo

WIDTH = 9.0  # inches; at 100 dots an inch the width at which a code host shows a figure
INK, MUTED, FAINT = "#1f2933", "#65717e", "#e4e8ec"
IMAGE, TEXT, JOINT = "#0072B2", "#D55E00", "#009E73"  # one colour each for what is image, text and both, everywhere
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#4d4d4d")  # Okabe and Ito (2008)
SEQUENTIAL, DIVERGING, HEAT = "YlGnBu", "RdBu_r", "inferno"


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

def new_picture(height: float, title: str, alt: str, subtitle: str = "", layout: str | None = "constrained") -> Picture:
    figure = Picture(figsize=(WIDTH, height), layout=layout)
    figure.alt = alt
    if layout:  # the engine keeps room for a suptitle, not for free text
        figure.suptitle(title + (f"\n{subtitle}" if subtitle else ""), x=0.012, ha="left", fontsize=12.5,
                        linespacing=1.35)
    else:
        figure.text(0.15 / WIDTH, 1 - 0.12 / height, title, fontsize=12.5, va="top")
        figure.text(0.15 / WIDTH, 1 - 0.40 / height, subtitle, fontsize=9, va="top", color=MUTED)
    return figure


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Any:
    """Axes placed in inches from the top left corner."""
    w, h = figure.get_sizeplace()
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


def show_image(axes: Any, image: Any, edge: str = "#c5ccd3") -> None:
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


def contrast(colour: Sequence[float]) -> str:
    return "white" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55 else INK


def arrows(text: str) -> str:
    return text.replace("->", " → ")
