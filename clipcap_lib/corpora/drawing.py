"""Drawing the kinds of objects: `draw_object` paints one kind in one colour as a sticker with a pale rim.

Every kind is a small function over a `Pen`, in coordinates of its box: (0, 0) is the upper left corner, (1, 1) the
lower right. Its main colour covers most of it; details (wheels, windows, eyes) have colours of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from clipcap_lib.corpora.pen import CREAM, DARK, PAINT, Pen, shade

BROWN, GLASS, STEEL = (128, 84, 50), (190, 226, 246), (150, 154, 162)
RIM = 4  # pixels of pale rim, so that white stands out from snow and black from night


def _dog(p: Pen) -> None:
    p.line((0.12, 0.55), (0.03, 0.25), fill=p.edge, thick=4)
    p.line((0.12, 0.55), (0.035, 0.27), fill=p.main, thick=2.4)
    for x in (0.12, 0.27, 0.52, 0.66):
        p.box(x, 0.66, x + 0.11, 0.99, radius=0.04)
    p.box(0.07, 0.42, 0.78, 0.80, radius=0.17)
    p.ellipse(0.54, 0.06, 0.92, 0.54)
    p.ellipse(0.74, 0.25, 0.99, 0.50, fill=p.soft)  # muzzle
    p.ellipse(0.50, 0.08, 0.66, 0.50, fill=p.soft)  # hanging ear
    p.dot(0.95, 0.33, 0.045, DARK)
    p.dot(0.76, 0.22, 0.032)
    p.box(0.56, 0.50, 0.80, 0.57, fill=(210, 60, 60) if p.main != PAINT["red"] else (60, 110, 210), radius=0.03)


def _cat(p: Pen) -> None:
    p.arc(0.60, 0.45, 0.98, 0.97, 270, 90, fill=p.edge, thick=4)
    p.arc(0.61, 0.46, 0.97, 0.96, 270, 90, fill=p.main, thick=2)
    p.ellipse(0.14, 0.42, 0.80, 0.99)
    p.polygon((0.12, 0.32), (0.13, 0.02), (0.42, 0.14))
    p.polygon((0.82, 0.32), (0.81, 0.02), (0.52, 0.14))
    p.ellipse(0.08, 0.10, 0.86, 0.60)
    for x in (0.31, 0.63):
        p.ellipse(x - 0.075, 0.25, x + 0.075, 0.39, fill=(170, 220, 90) if p.main != PAINT["green"] else CREAM)
        p.dot(x, 0.32, 0.035, DARK)
    p.polygon((0.43, 0.42), (0.51, 0.42), (0.47, 0.47), fill=(240, 140, 150))
    for y in (0.44, 0.50):
        p.line((0.02, y - 0.03), (0.28, y), fill=p.contrast, thick=0.6)
        p.line((0.66, y), (0.93, y - 0.03), fill=p.contrast, thick=0.6)
    p.box(0.30, 0.84, 0.45, 0.99, radius=0.06)
    p.box(0.50, 0.84, 0.65, 0.99, radius=0.06)


def _bird(p: Pen) -> None:
    p.polygon((0.22, 0.55), (0.0, 0.42), (0.02, 0.72))
    p.ellipse(0.14, 0.34, 0.74, 0.82)
    p.polygon((0.84, 0.32), (1.0, 0.40), (0.84, 0.46), fill=(250, 180, 40))
    p.ellipse(0.56, 0.18, 0.90, 0.58)
    p.polygon((0.28, 0.55), (0.20, 0.02), (0.60, 0.48), fill=p.soft)  # raised wing
    p.dot(0.76, 0.33, 0.04)
    for x in (0.40, 0.50):
        p.line((x, 0.80), (x - 0.03, 0.98), fill=(230, 150, 30), thick=1.4)


def _fish(p: Pen) -> None:
    p.polygon((0.24, 0.50), (0.0, 0.14), (0.04, 0.88), fill=p.soft)
    p.polygon((0.40, 0.22), (0.58, 0.0), (0.70, 0.26), fill=p.soft)
    p.polygon((0.45, 0.78), (0.52, 1.0), (0.66, 0.78), fill=p.soft)
    p.ellipse(0.16, 0.14, 0.99, 0.86)
    for x in (0.34, 0.46):
        p.arc(x, 0.30, x + 0.16, 0.70, 270, 90, fill=p.edge)
    p.dot(0.82, 0.40, 0.085, CREAM)
    p.dot(0.83, 0.40, 0.05, DARK)
    p.arc(0.84, 0.50, 0.98, 0.66, 90, 190, fill=p.contrast)


def _butterfly(p: Pen) -> None:
    for flip in (False, True):
        def at(x: float, flip: bool = flip) -> float:
            return 1 - x if flip else x
        upper = sorted((at(0.02), at(0.48)))
        lower = sorted((at(0.10), at(0.48)))
        p.ellipse(lower[0], 0.46, lower[1], 0.98, fill=p.soft)
        p.ellipse(upper[0], 0.08, upper[1], 0.66)
        p.dot(at(0.22), 0.35, 0.09, CREAM if p.main != PAINT["white"] else (250, 190, 80))
        p.dot(at(0.29), 0.72, 0.06, CREAM if p.main != PAINT["white"] else (250, 190, 80))
        p.line((0.5, 0.28), (at(0.38), 0.02), fill=DARK)
    p.ellipse(0.46, 0.24, 0.54, 0.88, fill=(60, 50, 50))


def _car(p: Pen) -> None:
    p.polygon((0.18, 0.48), (0.30, 0.10), (0.68, 0.10), (0.84, 0.48))
    p.polygon((0.25, 0.45), (0.34, 0.18), (0.47, 0.18), (0.47, 0.45), fill=GLASS)
    p.polygon((0.52, 0.45), (0.52, 0.18), (0.65, 0.18), (0.76, 0.45), fill=GLASS)
    p.box(0.01, 0.42, 0.99, 0.82, radius=0.14)
    p.ellipse(0.92, 0.50, 0.99, 0.62, fill=(255, 240, 150))
    p.line((0.50, 0.46), (0.50, 0.78), thick=0.7)
    p.wheel(0.24, 0.81, 0.185)
    p.wheel(0.76, 0.81, 0.185)


def _boat(p: Pen) -> None:
    p.line((0.47, 0.02), (0.47, 0.72), fill=BROWN, thick=1.8)
    p.polygon((0.52, 0.04), (0.52, 0.64), (0.95, 0.64))
    p.polygon((0.42, 0.14), (0.42, 0.64), (0.10, 0.64), fill=p.soft)
    p.polygon((0.01, 0.70), (0.99, 0.70), (0.82, 0.98), (0.17, 0.98))
    p.line((0.06, 0.78), (0.94, 0.78), fill=CREAM, thick=1.4)


def _airplane(p: Pen) -> None:
    p.polygon((0.04, 0.48), (0.0, 0.08), (0.12, 0.08), (0.26, 0.45), fill=p.soft)
    p.polygon((0.44, 0.44), (0.34, 0.06), (0.46, 0.06), (0.66, 0.44), fill=p.soft)
    p.box(0.02, 0.36, 0.99, 0.68, radius=0.22)
    p.polygon((0.40, 0.58), (0.26, 0.98), (0.40, 0.98), (0.66, 0.58), fill=p.soft)
    for x in (0.24, 0.36, 0.48, 0.60, 0.72):
        p.dot(x, 0.47, 0.045, GLASS)
    p.pie(0.74, 0.38, 0.98, 0.66, 280, 360, fill=GLASS)


def _house(p: Pen) -> None:
    p.box(0.72, 0.06, 0.84, 0.36, fill=(170, 100, 80))
    p.box(0.10, 0.42, 0.90, 0.98)
    p.polygon((0.0, 0.46), (0.5, 0.02), (1.0, 0.46), fill=p.soft)
    p.box(0.42, 0.62, 0.60, 0.98, fill=BROWN)
    for x in (0.16, 0.68):
        p.box(x, 0.56, x + 0.18, 0.76, fill=GLASS)
        p.line((x + 0.09, 0.56), (x + 0.09, 0.76), thick=0.7)


def _tree(p: Pen) -> None:
    p.polygon((0.40, 0.60), (0.60, 0.60), (0.66, 0.99), (0.34, 0.99), fill=BROWN)
    for x0, y0, x1, y1 in ((0.01, 0.26, 0.56, 0.72), (0.44, 0.26, 0.99, 0.72), (0.16, 0.01, 0.84, 0.52)):
        p.ellipse(x0, y0, x1, y1)
    p.ellipse(0.22, 0.28, 0.78, 0.68, edge=False)
    for x, y in ((0.30, 0.22), (0.55, 0.14), (0.68, 0.40), (0.28, 0.48), (0.50, 0.36)):
        p.arc(x - 0.06, y - 0.03, x + 0.06, y + 0.05, 200, 340, fill=p.soft, thick=1.2)


def _flower(p: Pen) -> None:
    p.line((0.5, 0.45), (0.5, 0.99), fill=(40, 130, 60), thick=2.6)
    p.ellipse(0.06, 0.72, 0.50, 0.88, fill=(70, 165, 80))
    p.ellipse(0.50, 0.64, 0.94, 0.80, fill=(70, 165, 80))
    for x, y in ((0.5, 0.13), (0.82, 0.25), (0.71, 0.50), (0.29, 0.50), (0.18, 0.25)):
        p.ellipse(x - 0.18, y - 0.13, x + 0.18, y + 0.13)
    p.ellipse(0.33, 0.21, 0.67, 0.45, fill=(255, 205, 60) if p.main != PAINT["yellow"] else (190, 110, 40))


def _ball(p: Pen) -> None:
    p.ellipse(0.02, 0.02, 0.98, 0.98)
    pale = CREAM if p.main != PAINT["white"] else (206, 208, 218)
    p.ellipse(0.17, 0.03, 0.83, 0.97, fill=pale)  # the gores of a beach ball
    p.ellipse(0.35, 0.03, 0.65, 0.97)
    p.ellipse(0.40, 0.02, 0.60, 0.13)


def _umbrella(p: Pen) -> None:
    p.line((0.5, 0.05), (0.5, 0.88), fill=BROWN, thick=2.2)
    p.arc(0.50, 0.78, 0.68, 0.98, 0, 180, fill=BROWN, thick=2.2)
    p.pie(0.01, 0.04, 0.99, 1.0, 180, 360)
    for x0, x1 in ((0.01, 0.26), (0.26, 0.5), (0.5, 0.74), (0.74, 0.99)):
        p.pie(x0, 0.46, x1, 0.58, 180, 360, fill=p.soft)
    p.line((0.5, 0.06), (0.26, 0.50), thick=0.8)
    p.line((0.5, 0.06), (0.74, 0.50), thick=0.8)


def _balloon(p: Pen) -> None:
    p.line((0.5, 0.66), (0.44, 0.78), (0.56, 0.88), (0.48, 0.99), fill=(90, 90, 100))
    p.ellipse(0.02, 0.01, 0.98, 0.64)
    p.polygon((0.5, 0.62), (0.38, 0.70), (0.62, 0.70))
    p.ellipse(0.20, 0.10, 0.40, 0.26, fill=shade(p.main, 1.6) if p.main != PAINT["white"] else (222, 222, 230),
              edge=False)


def _cup(p: Pen) -> None:
    p.arc(0.62, 0.32, 0.98, 0.76, 270, 90, fill=p.edge, thick=5)
    p.arc(0.63, 0.34, 0.96, 0.74, 270, 90, fill=p.main, thick=3)
    p.polygon((0.04, 0.22), (0.78, 0.22), (0.70, 0.98), (0.12, 0.98))
    p.ellipse(0.04, 0.12, 0.78, 0.34, fill=(110, 66, 40))
    for x in (0.30, 0.50):
        p.arc(x - 0.06, 0.0, x + 0.06, 0.12, 90, 270, fill=STEEL)


def _chair(p: Pen) -> None:
    for x in (0.06, 0.82):
        p.box(x, 0.02, x + 0.12, 0.99, radius=0.03)
    for y in (0.06, 0.24):
        p.box(0.10, y, 0.90, y + 0.12, radius=0.03)
    p.box(0.16, 0.64, 0.26, 0.93, fill=p.soft)
    p.box(0.74, 0.64, 0.84, 0.93, fill=p.soft)
    p.polygon((0.02, 0.50), (0.98, 0.50), (0.98, 0.66), (0.02, 0.66))


def _giraffe(p: Pen) -> None:
    for x in (0.10, 0.24, 0.46, 0.60):
        p.box(x, 0.66, x + 0.10, 0.99)
    p.polygon((0.50, 0.62), (0.62, 0.12), (0.80, 0.12), (0.74, 0.66))
    p.ellipse(0.04, 0.50, 0.74, 0.78)
    p.line((0.68, 0.10), (0.66, 0.01), fill=p.edge, thick=1.6)
    p.line((0.76, 0.10), (0.78, 0.01), fill=p.edge, thick=1.6)
    p.ellipse(0.60, 0.07, 0.99, 0.21)
    p.dot(0.76, 0.12, 0.035)
    spot = p.soft if p.main in (PAINT["black"], PAINT["orange"]) else (150, 92, 46)
    for x, y in ((0.16, 0.60), (0.32, 0.57), (0.26, 0.69), (0.46, 0.67), (0.50, 0.57), (0.65, 0.50), (0.62, 0.62),
                 (0.66, 0.37), (0.72, 0.27)):
        p.dot(x, y, 0.062, spot)


def _elephant(p: Pen) -> None:
    for x in (0.10, 0.27, 0.46, 0.58):
        p.box(x, 0.62, x + 0.14, 0.99, radius=0.03)
    p.ellipse(0.02, 0.16, 0.74, 0.82)
    p.polygon((0.80, 0.42), (0.97, 0.42), (0.99, 0.90), (0.88, 0.98), (0.88, 0.86), (0.82, 0.70))
    p.ellipse(0.56, 0.06, 0.97, 0.58)
    p.ellipse(0.44, 0.10, 0.72, 0.62, fill=p.soft)  # ear
    p.polygon((0.80, 0.56), (0.72, 0.74), (0.76, 0.56), fill=CREAM)  # tusk
    p.dot(0.83, 0.26, 0.04)


def _pizza(p: Pen) -> None:
    p.polygon((0.03, 0.18), (0.97, 0.18), (0.50, 0.99))
    p.box(0.0, 0.02, 1.0, 0.22, fill=(206, 142, 70), radius=0.10)
    topping = (176, 40, 36) if p.main not in (PAINT["red"], PAINT["purple"]) else (255, 226, 130)
    for x, y in ((0.28, 0.36), (0.62, 0.34), (0.47, 0.56), (0.52, 0.78)):
        p.dot(x, y, 0.085, topping)
    for x, y in ((0.45, 0.32), (0.60, 0.52), (0.36, 0.50)):
        p.dot(x, y, 0.035, (70, 110, 40))


def _banana(p: Pen) -> None:
    p.polygon((0.02, 0.22), (0.12, 0.14), (0.26, 0.44), (0.46, 0.60), (0.70, 0.54), (0.88, 0.28), (0.88, 0.04), (0.97,
              0.02), (0.99, 0.30), (0.90, 0.66), (0.66, 0.92), (0.42, 0.98), (0.18, 0.80), (0.04, 0.48))
    p.line((0.10, 0.36), (0.24, 0.64), (0.46, 0.78), (0.72, 0.70), (0.92, 0.40), fill=p.soft, thick=1.5)
    p.polygon((0.88, 0.04), (0.97, 0.02), (0.98, 0.14), (0.88, 0.15), fill=BROWN)
    p.polygon((0.02, 0.22), (0.12, 0.14), (0.15, 0.22), (0.03, 0.32), fill=BROWN)


def _teddy_bear(p: Pen) -> None:
    pale = shade(p.main, 1.6) if p.main != PAINT["white"] else (222, 204, 180)
    for x in (0.10, 0.62):
        p.ellipse(x, 0.01, x + 0.28, 0.24)
        p.ellipse(x + 0.07, 0.06, x + 0.21, 0.18, fill=pale)
    p.ellipse(0.02, 0.50, 0.32, 0.76)
    p.ellipse(0.68, 0.50, 0.98, 0.76)
    p.ellipse(0.20, 0.46, 0.80, 0.96)
    p.ellipse(0.33, 0.58, 0.67, 0.86, fill=pale)
    for x in (0.08, 0.58):
        p.ellipse(x, 0.76, x + 0.34, 0.99)
        p.ellipse(x + 0.08, 0.81, x + 0.26, 0.95, fill=pale)
    p.ellipse(0.14, 0.06, 0.86, 0.54)
    p.ellipse(0.34, 0.28, 0.66, 0.50, fill=pale)
    p.dot(0.35, 0.24, 0.04)
    p.dot(0.65, 0.24, 0.04)
    p.dot(0.5, 0.34, 0.055, DARK)


def _traffic_light(p: Pen) -> None:
    p.box(0.42, 0.66, 0.58, 0.99, fill=STEEL)
    p.box(0.12, 0.01, 0.88, 0.72, radius=0.16)
    for y, lamp in ((0.14, (255, 60, 50)), (0.365, (255, 210, 40)), (0.59, (60, 210, 90))):
        p.dot(0.5, y, 0.25, DARK)
        p.dot(0.5, y, 0.20, lamp)
    p.box(0.26, 0.95, 0.74, 1.0, fill=STEEL)


PAINTERS: dict[str, Callable[[Pen], None]] = {
    "dog": _dog, "cat": _cat, "bird": _bird, "fish": _fish, "butterfly": _butterfly, "car": _car, "boat": _boat,
    "airplane": _airplane, "house": _house, "tree": _tree, "flower": _flower,
    "ball": _ball, "umbrella": _umbrella, "balloon": _balloon, "cup": _cup, "chair": _chair,
    "giraffe": _giraffe, "elephant": _elephant, "pizza": _pizza, "banana": _banana,
    "teddy bear": _teddy_bear, "traffic light": _traffic_light, }


def draw_object(canvas: Image.Image, kind: str, colour: str, box: tuple[int, int, int, int],
                mirrored: bool = False) -> None:
    """Paint a kind in a colour (a key of PAINT) onto an RGB canvas; box is (x0, y0, x1, y1) in its pixels."""
    width, height = box[2] - box[0], box[3] - box[1]
    layer = Image.new("RGBA", (width + 2 * RIM, height + 2 * RIM))
    PAINTERS[kind](Pen(ImageDraw.Draw(layer), RIM, RIM, width, height, PAINT[colour]))
    if mirrored:
        layer = ImageOps.mirror(layer)
    mask = layer.getchannel("A")
    rim = mask.filter(ImageFilter.BoxBlur(RIM - 1)).point(lambda value: min(225, value * 8))  # a cheap dilation
    light = Image.linear_gradient("L").resize((1, layer.height)).point(lambda value: 255 - value * 40 // 255)
    light = light.resize(layer.size, Image.Resampling.NEAREST)  # from above
    picture = ImageChops.multiply(layer.convert("RGB"), Image.merge("RGB", (light, light, light)))
    corner = (box[0] - RIM, box[1] - RIM)
    canvas.paste((255, 253, 246), (*corner, corner[0] + layer.width, corner[1] + layer.height), rim)
    canvas.paste(picture, corner, mask)
