"""Figures that are drawings: the system's two architectures, with tensor shapes from a live config, and a tree of beams.

N images, T text tokens, P prefix tokens, as in `model`. Blue is image, red text, green both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from clipcap_lib.config import ModelConfig
from clipcap_lib.style import IMAGE, INK, JOINT, MUTED, SEQUENTIAL, TEXT, WIDTH, Picture, contrast, new_picture, place


class _Canvas:
    """Axes in inches, y upwards, with the few shapes that both figures are made of."""

    def __init__(self, height: float, title: str, subtitle: str, alt: str, bottom: float = 0.0):
        self.figure: Picture = new_picture(height, title, alt, subtitle, layout=None)
        self.axes = place(self.figure, 0, 0, WIDTH, height)
        self.axes.set(xlim=(0, WIDTH), ylim=(bottom, bottom + height))
        self.axes.set_axis_off()
        self.axes.set_zorder(-1)  # the title lies on the figure, above these axes

    def text(self, x: float, y: float, text: str, size: float = 8.5, colour: str = INK, **options: Any) -> None:
        options = {"ha": "center", "va": "center", "linespacing": 1.3} | options
        self.axes.text(x, y, text, fontsize=size, color=colour, **options)

    def box(self, x: float, y: float, width: float, height: float, name: str, detail: str, colour: str) -> None:
        """A part of the model around the centre (x, y)."""
        self.axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=colour,
                                           edgecolor="none", boxstyle="round,pad=0,rounding_size=0.1"))
        self.text(x, y + (0.06 + 0.085 * (detail.count("\n") + 1) if detail else 0), name, 11, "white")
        if detail:
            self.text(x, y - 0.14, detail, 8.5, "white")

    def lane(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=colour, alpha=0.07, edgecolor="none",
                                           boxstyle="round,pad=0,rounding_size=0.14"))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], label: str = "", colour: str = MUTED,
              dashed: bool = False, bend: str = "arc3", above: float = 0.05) -> None:
        self.axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.5,
                                            linestyle=(0, (3, 2)) if dashed else "solid", shrinkA=2, shrinkB=2,
                                            connectionstyle=bend))
        if label:
            self.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above, label, 8.5, INK, va="bottom")

    def token(self, x: float, y: float, text: str, colour: str, width: float = 0.34, lit: bool = True) -> None:
        self.axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.16), width, 0.32, edgecolor=colour, linewidth=1.2,
                                           facecolor=colour if lit else "white", boxstyle="round,pad=0,rounding_size=0.05"))
        self.text(x, y - 0.01, text, 10 if len(text) < 3 else 7.5, "white" if lit else colour)

    def photo(self, x: float, y: float, size: float, copies: int = 1) -> None:
        """A small landscape with a dog-brown dot, as a stack of `copies`, its lower left corner at (x, y)."""
        for back in reversed(range(copies)):
            left, low = x + 0.07 * back, y + 0.07 * back
            frame = Rectangle((left, low), size, size, facecolor="#cfe6f5", edgecolor="white", linewidth=2)
            self.axes.add_patch(frame)
            parts = [Circle((left + 0.76 * size, low + 0.76 * size), 0.1 * size, color="#f2c14e"),
                     Polygon([(left - 0.1 * size, low), (left + 0.35 * size, low + 0.72 * size), (left + 0.8 * size, low)],
                             color="#9db8a0"),
                     Rectangle((left, low), size, 0.36 * size, color="#7fb069"),
                     Ellipse((left + 0.52 * size, low + 0.26 * size), 0.36 * size, 0.18 * size, color="#8a5a2b"),
                     Circle((left + 0.71 * size, low + 0.36 * size), 0.085 * size, color="#8a5a2b"),
                     *(Rectangle((left + leg * size, low + 0.1 * size), 0.05 * size, 0.14 * size, color="#8a5a2b")
                       for leg in (0.39, 0.6))]
            for part in parts:
                self.axes.add_patch(part)
                part.set_clip_path(frame)


def _millions(parameters: Mapping[str, int] | None, *names: str) -> str:
    if not parameters or not any(name in parameters for name in names):
        return ""
    count = sum(parameters.get(name, 0) for name in names)
    return f"{count / 1e6:.1f} M parameters" if count >= 1e5 else f"{count / 1e3:.0f} K parameters"


def _lines(*lines: str) -> str:
    return "\n".join(line for line in lines if line)


def _encoder_name(model: ModelConfig) -> str:
    """As much of it as a box holds; an encoder with layers or channels of its own is but a small one of its kind."""
    name = {"res2next50": "Res2Next50", "resnet10t": "ResNet-10-t"}.get(model.encoder, model.encoder)
    name = f"small {name}" if {"layers", "channels"} & set(model.encoder_options) else name
    return name if len(name) <= 18 else f"{name[:17]}…"


def clip_architecture(model: ModelConfig, grid: tuple[int, int] | None, image_width: int,
                      parameters: Mapping[str, int] | None = None) -> Picture:
    """Stage one. grid (H, W) of the encoder's feature map, if it has one; image_width its channels; parameters by part."""
    side, width = model.image_size, model.width
    canvas = _Canvas(5.6, "Stage one: image and caption find each other",
                     "Both encoders are trained so that the N pairs of a batch are more alike than the N² − N wrong pairs.",
                     f"CLIP pretraining: N images of 3 x {side} x {side} go through {_encoder_name(model)} to "
                     f"{image_width} numbers and a head to {width}; captions go through a GPT to {width}; their N x N "
                     "similarities have a lit diagonal.")
    image_y, text_y = 4.12, 2.3
    canvas.lane(0.12, 3.38, 6.0, 1.48, IMAGE)
    canvas.lane(0.12, 1.06, 6.0, 2.02, TEXT)
    # images
    canvas.photo(0.3, image_y - 0.42, 0.78, copies=3)
    canvas.text(0.76, image_y - 0.6, "N images", colour=IMAGE)
    canvas.arrow((1.3, image_y), (2.2, image_y), f"N × 3 ×\n{side} × {side}")
    canvas.box(2.95, image_y, 1.46, 1.0, _encoder_name(model),
               _lines("image encoder", _millions(parameters, "image_encoder")), IMAGE)
    canvas.arrow((3.7, image_y), (4.55, image_y), f"N × {image_width}")
    canvas.text(4.12, image_y - 0.09, f"mean over\n{grid[0]} × {grid[1]} cells" if grid else "pooled", 7.5, MUTED, va="top")
    canvas.box(5.25, image_y, 1.36, 1.0, "MLP head", _lines("to the joint space", _millions(parameters, "image_head")),
               IMAGE)
    # captions
    for i in reversed(range(3)):
        canvas.axes.add_patch(FancyBboxPatch((0.28 + 0.07 * i, text_y - 0.3 + 0.07 * i), 0.86, 0.5, facecolor="white",
                                             edgecolor=TEXT, boxstyle="round,pad=0,rounding_size=0.05", linewidth=1))
    canvas.text(0.71, text_y - 0.05, "[CLS] 一只\n狗 … [SEP]", 8)
    canvas.text(0.76, text_y - 0.5, "N captions", colour=TEXT)
    canvas.arrow((1.3, text_y), (2.2, text_y), f"N × T\nT ≤ {model.context}")
    canvas.box(2.95, text_y, 1.46, 1.2, "GPT", _lines(f"{model.layers} layers × {width}", f"{model.heads} heads",
                                                      _millions(parameters, "gpt")), TEXT)
    for i, name in enumerate(("[CLS]", "一", "只", "…", "[SEP]")):
        canvas.token(2.17 + 0.39 * i, text_y - 0.93, name, TEXT, 0.35, lit=i == 4)
    canvas.text(4.05, text_y - 0.93, "the hidden state at [SEP]\nstands for the caption", 8, MUTED, ha="left")
    canvas.arrow((3.7, text_y), (4.55, text_y), f"N × {width}")
    canvas.box(5.25, text_y, 1.36, 1.0, "MLP head", _lines("to the joint space", _millions(parameters, "text_head")), TEXT)
    # the matrix: columns are images, rows captions, as in `similarity_matrix`
    left, low, count, cell = 7.05, 1.42, 5, 0.34
    top, middle = low + count * cell, left + count * cell / 2
    canvas.arrow((5.95, image_y), (middle, top + 0.3), "", IMAGE, bend="angle,angleA=0,angleB=90,rad=8")
    canvas.arrow((5.95, text_y), (left - 0.3, text_y), "", TEXT)
    for x, y in ((6.95, image_y), (6.46, text_y)):
        canvas.text(x, y + 0.05, f"N × {width}", va="bottom")
        canvas.text(x, y - 0.06, "length 1", 7.5, MUTED, va="top")
    for r in range(count):
        index = ("₁", "₂", "₃", "…", "ₙ")[r]
        canvas.text(left - 0.16, top - (r + 0.5) * cell, index if r == 3 else f"t{index}", 9.5, TEXT)
        canvas.text(left + (r + 0.5) * cell, top + 0.14, index if r == 3 else f"i{index}", 9.5, IMAGE)
        for c in range(count):
            shade = 0.95 if r == c else 0.08 + 0.1 * ((3 * r + 5 * c) % 4) / 3  # a fixed pattern: some are a little alike
            canvas.axes.add_patch(Rectangle((left + c * cell, top - (r + 1) * cell), cell, cell, facecolor=JOINT,
                                            alpha=shade, edgecolor="white", linewidth=1.5))
    canvas.text(middle, low - 0.15, "N × N cosine similarities", colour=JOINT)
    canvas.text(middle, low - 0.36, "÷ temperature τ, which is learned", 8, MUTED)
    canvas.lane(0.12, 0.25, 8.76, 0.46, JOINT)
    canvas.text(4.5, 0.48, "loss = ½ ( cross-entropy of each column: which caption?  +  of each row: which image? )", 9.5,
                JOINT)
    return canvas.figure


def caption_architecture(model: ModelConfig, grid: tuple[int, int] | None, image_width: int,
                         parameters: Mapping[str, int] | None = None) -> Picture:
    """Stage two. Arguments as for `clip_architecture`; with `grid` image tokens the cells join the prefix."""
    side, width = model.image_size, model.width
    cells = grid[0] * grid[1] if model.image_tokens == "grid" else 0
    prefix = 1 + cells
    canvas = _Canvas(5.9, "Stage two: the same GPT describes what the encoder sees",
                     "The image becomes a prefix; behind it, the GPT predicts the caption character by character.",
                     f"Caption fine-tuning: an image of 3 x {side} x {side} goes through {_encoder_name(model)} from stage "
                     f"one and becomes {prefix} prefix tokens of {width}; the GPT with the text encoder's weights predicts "
                     "each next character.", bottom=0.3)
    # stage one, small: what is carried over
    canvas.lane(0.12, 2.95, 2.95, 1.62, JOINT)
    canvas.text(0.72, 3.76, "trained in\nstage one", 9.5, JOINT)
    canvas.box(2.2, 4.1, 1.5, 0.5, "text encoder", "", TEXT)
    canvas.box(2.2, 3.42, 1.5, 0.5, "image encoder", "", IMAGE)
    canvas.arrow((2.97, 4.1), (3.83, 4.1), "weights", JOINT, dashed=True)
    canvas.arrow((2.2, 3.15), (2.2, 1.98), "", JOINT, dashed=True)
    canvas.text(2.28, 2.58, "weights", ha="left")
    # the image becomes the prefix
    encoder_y, token_y = 1.45, 2.78
    canvas.lane(0.12, 0.5, 5.0, 1.83, IMAGE)
    canvas.photo(0.27, encoder_y - 0.38, 0.8, copies=2)
    canvas.text(0.72, encoder_y - 0.56, f"N × 3 × {side} × {side}", 8)
    canvas.arrow((1.16, encoder_y), (1.55, encoder_y))
    canvas.box(2.2, encoder_y, 1.28, 1.05, _encoder_name(model),
               _lines("image encoder", _millions(parameters, "image_encoder")), IMAGE)
    first = (4.08 if cells else 4.4, token_y)
    head_y = encoder_y + 0.38 if cells else encoder_y
    canvas.arrow((2.86, head_y), (3.82, head_y), f"N × {image_width}")
    canvas.box(4.4, head_y, 1.14, 0.5, "MLP head", "", IMAGE)
    canvas.arrow((first[0], head_y + 0.26), (first[0], token_y - 0.18), "", IMAGE)
    canvas.text(first[0] - 0.07, 2.19, f"N × 1 × {width}", 8, ha="right")
    canvas.token(*first, "image", IMAGE, 0.35)
    if cells:
        grid_y = encoder_y - 0.5
        canvas.arrow((2.86, grid_y + 0.2), (3.82, grid_y + 0.2), f"N × {image_width} ×\n{grid[0]} × {grid[1]}")
        canvas.box(4.4, grid_y + 0.1, 1.14, 0.5, "grid head", "", IMAGE)
        canvas.arrow((4.98, grid_y + 0.1), (5.28, token_y - 0.18), "", IMAGE, bend="angle,angleA=0,angleB=90,rad=6")
        canvas.text(5.36, 2.24, f"N × {cells} × {width}", 8, ha="left")
        for i, name in enumerate(("cell 1", "…", f"cell {cells}")):
            canvas.token(4.48 + 0.4 * i, token_y, name, IMAGE, 0.35)
    # the GPT reads and predicts
    low, high, start = 3.3, 4.45, 5.86 if cells else 5.4
    canvas.box(6.36, (low + high) / 2, 4.96, high - low, "GPT", _lines(
        f"{model.layers} layers × {width}, {model.heads} heads, each token sees itself and those before it",
        _millions(parameters, "gpt")), TEXT)
    step = (8.52 - start) / 5
    prefix_x = [first[0], *([4.48, 4.88, 5.28] if cells else [])]
    for x in prefix_x:
        canvas.arrow((x, token_y + 0.16), (x, low), "", IMAGE)
    characters = ["[CLS]", *"一只狗在跑", "[SEP]"]
    for i in range(6):
        x = start + i * step
        canvas.token(x, token_y, characters[i], TEXT, 0.4, lit=False)
        canvas.text(x, token_y - 0.27, str(prefix + i), 8, MUTED)
        canvas.arrow((x, token_y + 0.16), (x, low), "", TEXT)
        canvas.arrow((x, high), (x, 4.74), "", TEXT)
        canvas.token(x, 4.9, characters[i + 1], TEXT, 0.4)
    canvas.text(start - 0.4, 4.9, "next\ncharacter", 8.5, MUTED, ha="right")
    canvas.lane(3.88, 5.14, 5.0, 0.38, JOINT)
    canvas.text(6.38, 5.33, "loss = sum of −log p( next character | image, characters before )", 9.5, JOINT)
    # in words
    notes = (f"prefix: P = {prefix} " + (f"tokens, 1 pooled + {grid[0]} × {grid[1]} cells" if cells else "token, the image"),
             f"into the GPT: N × (P + T) × {width}",
             f"out of it: N × T × {model.vocab_size or 'V'}, " + ("characters" if model.vocab_size else "V characters"),
             "text token t has position P + t, as in stage one")
    for i, note in enumerate(notes):
        canvas.text(5.5, 1.75 - 0.3 * i, note, 9, INK if i < 3 else MUTED, ha="left")
    canvas.text((start + 8.52) / 2, token_y - 0.47, "position", 8, MUTED)
    return canvas.figure


def beam_tree(hypotheses: Sequence[tuple[Sequence[str], Sequence[float], float]],
              title: str = "What else it might have said") -> Picture:
    """The best hypotheses of a beam search as a tree, best first: shared beginnings are drawn once.

    hypotheses: (characters, their probabilities from 0 to 1 each given those before, score in nats). A cell is a character,
    the darker the more probable; the number below it is its probability in percent.
    """
    deepest = max(len(words) for words, _, _ in hypotheses)
    cell = min(0.52, (WIDTH - 1.75) / (deepest + 1))
    step = 0.56 if cell > 0.33 else 0.46
    canvas = _Canvas(1.0 + step * len(hypotheses) + 0.1, title,
                     "a column a character, darker: more probable; below it: probability (%), given the image and what "
                     "stands before", f"{title}: a tree of {len(hypotheses)} hypotheses, the best "
                     f"{''.join(hypotheses[0][0])}.")
    top, colours = 0.1 + step * len(hypotheses) - step / 2, matplotlib.colormaps[SEQUENTIAL]
    rows: dict[tuple[str, ...], int] = {}  # beginning -> the row in which it is drawn

    def in_tree_order(indices: list[int], depth: int) -> list[int]:
        """Hypotheses so that those with a common beginning stand together, the best of each group first."""
        groups: dict[str, list[int]] = {}
        for i in indices:
            groups.setdefault(hypotheses[i][0][depth] if depth < len(hypotheses[i][0]) else "", []).append(i)
        if len(indices) == 1 or depth > deepest:
            return indices
        return [i for group in groups.values() for i in in_tree_order(group, depth + 1)]

    for row, index in enumerate(in_tree_order(list(range(len(hypotheses))), 0)):
        words, probabilities, score = hypotheses[index]
        y = top - row * step
        for depth, (word, probability) in enumerate(zip(words, probabilities, strict=True)):
            beginning = tuple(words[:depth + 1])
            if beginning in rows:
                continue
            rows[beginning] = row
            x, before = 0.3 + depth * cell, tuple(words[:depth])
            if depth and rows[before] != row:  # a branch: from the end of what is shared, down and to the right
                above = top - rows[before] * step
                canvas.axes.plot([x - cell * 0.5, x - cell * 0.5, x - cell * 0.4], [above - 0.15, y + 0.05, y + 0.05],
                                 color=MUTED, linewidth=1.2)
            canvas.axes.add_patch(FancyBboxPatch((x - cell * 0.44, y - 0.1), cell * 0.88, 0.3, edgecolor="none",
                                                 facecolor=colours(0.9 * probability),
                                                 boxstyle="round,pad=0,rounding_size=0.05"))
            ends = word == "[SEP]"
            canvas.text(x, y + 0.05, "end" if ends else word, 7.5 if ends else 11 if cell > 0.33 else 9,
                        contrast(colours(0.9 * probability)))
            canvas.text(x, y - 0.17, f"{100 * probability:.0f}", 6.5, MUTED)
        written = f"{score:.2f}".replace("-", "−") + (" nats a character" if index == 0 else "")
        canvas.text(WIDTH - 0.15, y + 0.05, written, 8.5, INK if index == 0 else MUTED, ha="right")
    return canvas.figure
