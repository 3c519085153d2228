"""The house style of all figures: a font with Chinese glyphs, safe colours, and a figure that shows itself.

A figure here is a `Picture`: a matplotlib Figure without a window, which a notebook shows once, with alt text, in few bytes.
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as MatplotlibPath
from matplotlib.textpath import TextPath, text_to_path
from PIL.PngImagePlugin import PngInfo
from scipy.spatial import cKDTree

from clipcap_lib.images import as_seen

LIGHT = 30_000  # bytes of a figure in a notebook; one with more is shown in 64 colours, so that notebooks stay small
WIDTH = 9.0  # inches; at 100 dots an inch the width at which a code host shows a figure
INK, MUTED, FAINT = "#1f2933", "#65717e", "#e4e8ec"
IMAGE, TEXT, JOINT = "#0072B2", "#D55E00", "#009E73"  # one colour each for what is image, text and both, everywhere
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#4d4d4d")  # Okabe and Ito (2008)
SEQUENTIAL, DIVERGING = "YlGnBu", "RdBu_r"
HEAT = LinearSegmentedColormap.from_list("heat", ["#fff6dc", "#f7b32b", "#d9480f", "#7a0c2e"])  # light to dark: safe


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
    moving: Sequence[Any] = ()  # artists that a widget moves over the rest, which is then drawn once
    still: tuple[float, Any] = (0, None)  # resolution and pixels of that rest
    scale: Any = None  # the colour map of its colour bar, if it has one

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        data = png_bytes(self)
        if len(data) > LIGHT:
            data = png_bytes(self, colours=64)
        shown = {"image/png": base64.b64encode(data).decode("ascii"), "text/plain": self.alt}
        return shown, {"image/png": {"alt": self.alt}}


def png_bytes(*figures: Figure, dpi: float = 86, alt: str = "", small: bool = True, colours: int = 256) -> bytes:
    """The figure as PNG, the same bytes each time; several stand one below the other.

    `small` uses a palette of so many `colours`, at most 256: a third of the bytes.
    """
    image = PIL.Image.fromarray(np.concatenate([_draw(figure, dpi) for figure in figures]))
    information, buffer = PngInfo(), io.BytesIO()
    if alt:
        information.add_text("Description", alt)
    scales = [figure.scale for figure in figures if getattr(figure, "scale", None)]
    image = _to_palette(image, colours, scales) if small else image
    image.save(buffer, "png", pnginfo=information, **({"optimize": True} if small else {"compress_level": 1}))
    return buffer.getvalue()


def _draw(figure: Figure, dpi: float) -> np.ndarray:
    """The figure's pixels (H, W, 3) uint8."""
    before, figure.dpi = figure.dpi, dpi
    canvas, moving = FigureCanvasAgg(figure), getattr(figure, "moving", ())
    if moving and figure.still[0] == dpi:
        canvas.restore_region(figure.still[1])
    else:
        for artist in moving:
            artist.set_animated(True)  # left out by draw()
        canvas.draw()
        if moving:
            figure.still = dpi, canvas.copy_from_bbox(figure.bbox)
    for artist in moving:
        artist.draw(canvas.get_renderer())
    figure.dpi = before
    return np.asarray(canvas.buffer_rgba())[..., :3]


def show(figure: Picture, folder: Path | None, name: str, alt: str = "") -> Picture:
    """`save` the figure (if there is a folder) and hand it back, so that it is a notebook cell's last value."""
    figure.alt = alt or figure.alt
    if folder is not None:
        save(figure, folder, name, figure.alt)
    return figure


def _to_palette(image: PIL.Image.Image, size: int = 256, scales: Sequence[Any] = ()) -> PIL.Image.Image:
    """An RGB image in `size` colours: a quarter are those of its colour bar, if it has one, the commonest as they are, the
    rest near enough.

    Pillow's own choice goes by area alone, which leaves a colour bar, narrow as it is, with a few false steps.
    """
    steps = np.linspace(0, 1, size // 4 // max(1, len(scales)))
    bars = np.zeros((0, 3), np.uint8)
    for scale in scales:
        bars = np.concatenate([bars, (255 * scale(steps)[:, :3]).round().astype(np.uint8)])
    size -= len(bars)
    codes = np.asarray(image).astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    unique, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colours = np.stack([unique >> 16, unique >> 8 & 255, unique & 255], axis=-1).astype(np.uint8)
    weighted = np.repeat(colours, np.sqrt(counts).astype(int), axis=0)
    weighted = weighted[::len(weighted) // 20_000 + 1]  # sorted by colour, so that each kind keeps its share
    mixed = PIL.Image.fromarray(weighted[None]).quantize(size // 2, kmeans=1, dither=PIL.Image.Dither.NONE)
    common = colours[np.argsort(-counts, kind="stable")[:size // 2]]
    palette = np.concatenate([bars, common, np.array(mixed.getpalette(), dtype=np.uint8).reshape(-1, 3)[:size // 2]])
    nearest = cKDTree(palette).query(colours)[1]  # a photo has 50,000 colours: all distances would take a second
    result = PIL.Image.fromarray(nearest.astype(np.uint8)[inverse].reshape(codes.shape), "P")
    result.putpalette(palette.ravel().tolist())
    return result


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
    head = 0.66 if subtitle else 0.44
    if layout == "constrained":
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06, wspace=0.03, hspace=0.05, rect=(0, 0, 1, 1 - head / height))
    figure.text(0.15 / WIDTH, 1 - 0.12 / height, title, fontsize=12.5, va="top")
    figure.text(0.15 / WIDTH, 1 - 0.40 / height, subtitle, fontsize=9, va="top", color=MUTED)
    return figure


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Any:
    """Axes without a grid, placed in inches from the top left corner."""
    w, h = figure.get_size_inches()
    grid, matplotlib.rcParams["axes.grid"] = matplotlib.rcParams["axes.grid"], False  # half the time of taking it away
    try:
        return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
    finally:
        matplotlib.rcParams["axes.grid"] = grid


def pixels(image: Any) -> np.ndarray:
    """A PIL image as models see it, or an array, channels first or last, uint8 or floats in [0, 1] -> (H, W, 3) uint8."""
    array = np.asarray(as_seen(image) if isinstance(image, PIL.Image.Image) else image)
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
    """Break text after `width` columns; a Chinese character takes two, Latin words stay whole if they
    fit a line, "，" never leads one."""
    closing = "，。、；：！？）】》”’,.;:!?)"
    words = re.findall(rf"\n|[^\S\n]+|[!-~]{{1,{max(1, width)}}}[{closing}]*|.[{closing}]*", str(text))
    rows, row, used = [], "", 0
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


def write_words(figure: Figure, words: Sequence[str], index: int, left: float, top: float, step: float = 0.42,
                size: float = 15) -> None:
    """Write words in a row, and on in further ones, to the right edge; the one at `index` stands out. Inches, points."""
    x, wide = left, size * 0.016
    for i, word in enumerate(words):
        width = 0.1 + sum(wide if unicodedata.east_asian_width(c) in "WF" else 0.54 * wide for c in word)
        if x + width > WIDTH - 0.15:
            x, top = left, top + step
        style = {"facecolor": TEXT, "edgecolor": "none", "boxstyle": "round,pad=0.2"} if i == index else None
        figure.text((x + width / 2) / WIDTH, 1 - top / figure.get_figheight(), word, ha="center", va="center", fontsize=size,
                    bbox=style, color="white" if i == index else INK)
        x += width


@lru_cache
def _outline(character: str) -> tuple[np.ndarray, np.ndarray, float]:
    """A glyph of the house font at one point: vertices and codes of its path, and its advance."""
    font = font_manager.FontProperties(family=matplotlib.rcParams["font.family"])
    path = TextPath((0, 0), character, size=100, prop=font)
    advance = text_to_path.get_text_width_height_descent(character, font, False)[0] / font.get_size()
    return path.vertices / 100, path.codes, advance


def write_numbers(figure: Figure, numbers: Sequence[tuple[str, float, float]], size: float, colour: str) -> Any:
    """Many short texts at once, each centred at (x, y) inches from the top left: twenty times as fast as single ones."""
    vertices, codes = [], []
    for text, x, y in numbers:
        glyphs = [_outline(character) for character in text]
        starts = np.cumsum([0, *(advance for _, _, advance in glyphs)])
        placed = [np.add(points, (start, 0)) for (points, _, _), start in zip(glyphs, starts, strict=False)]
        middle = starts[-1] / 2, max(points[:, 1].max() for points in placed) / 2
        vertices += [(points - middle) * size / 72 + (x, figure.get_figheight() - y) for points in placed]
        codes += [code for _, code, _ in glyphs]
    outlines = MatplotlibPath(np.concatenate(vertices), np.concatenate(codes))
    return figure.add_artist(PathPatch(outlines, facecolor=colour, linewidth=0, transform=figure.dpi_scale_trans))


def colour_scale(figure: Figure, drawn: Any, left: float, top: float, height: float, label: str) -> None:
    """A colour bar. Drawn as an image: matplotlib's own takes twice as long."""
    low, high = drawn.get_clim()
    figure.scale = drawn.cmap
    axes = place(figure, left, top, 0.14, height)
    axes.imshow(np.linspace(high, low, 256)[:, None], cmap=drawn.cmap, norm=drawn.norm, aspect="auto",
                extent=(0, 1, low, high), interpolation="bilinear")
    axes.set(xticks=[], ylabel=label)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.spines[:].set_visible(False)


def contrast(colour: Sequence[float]) -> str:
    return "white" if np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55 else INK


def arrows(text: str) -> str:
    return text.replace("->", " → ")
