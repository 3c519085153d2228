"""Painting the backgrounds of drawn scenes: each a gradient, a ground and a few marks that tell it from the others."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
_RAMP = Image.linear_gradient("L")


def _vary(random: Random, colour: RGB, by: int = 10) -> RGB:
    """The colour, a little lighter or darker: no two pictures have the same sky."""
    shift = random.randint(-by, by)
    return tuple(min(255, max(0, c + shift + random.randint(-4, 4))) for c in colour)


def _gradient(canvas: Image.Image, box: tuple[int, int, int, int], upper: RGB, lower: RGB) -> None:
    size = (box[2] - box[0], box[3] - box[1])
    column = (1, size[1])
    ramp = Image.composite(Image.new("RGB", column, lower), Image.new("RGB", column, upper), _RAMP.resize(column))
    canvas.paste(ramp.resize(size, Image.Resampling.NEAREST), box[:2])


def _sky_and_ground(canvas: Image.Image, random: Random, sky: tuple[RGB, RGB], ground: tuple[RGB, RGB],
                    horizon: float) -> int:
    """Paint both halves; returns the horizon in pixels."""
    width, height = canvas.size
    y = round(height * (horizon + random.uniform(-0.06, 0.06)))
    _gradient(canvas, (0, 0, width, y), _vary(random, sky[0]), _vary(random, sky[1]))
    _gradient(canvas, (0, y, width, height), _vary(random, ground[0]), _vary(random, ground[1]))
    return y


def _clouds(draw: ImageDraw.ImageDraw, random: Random, width: int, horizon: int) -> None:
    for _ in range(random.randint(1, 3)):
        x, y, size = random.randint(0, width), random.randint(5, max(6, horizon // 2)), random.randint(12, 26)
        for shift, scale in ((-1.0, 0.7), (0.0, 1.0), (1.0, 0.75)):
            r = size * scale
            draw.ellipse([x + shift * size - r, y - r * 0.55, x + shift * size + r, y + r * 0.55], (250, 252, 255))


def _grass(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((140, 204, 246), (214, 238, 250)), ((150, 214, 104), (104, 178, 72)), 0.48)
    width, height = canvas.size
    _clouds(draw, random, width, y)
    for _ in range(60):
        x, base = random.randint(0, width), random.randint(y + 8, height)
        draw.line([x - 3, base - 7, x, base, x + 3, base - 8], (84, 156, 60), 2)


def _beach(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    width, height = canvas.size
    y = _sky_and_ground(canvas, random, ((158, 216, 248), (226, 242, 250)), ((250, 230, 172), (238, 208, 138)), 0.52)
    _gradient(canvas, (0, y - height // 7, width, y), _vary(random, (70, 164, 214)), _vary(random, (120, 204, 226)))
    for x in range(-20, width, 40):
        draw.ellipse([x, y - 6, x + 44, y + 6], (250, 252, 252))
    for _ in range(70):
        x, dot = random.randint(0, width), random.randint(y + 10, height)
        draw.ellipse([x, dot, x + 2, dot + 2], (208, 176, 110))


def _snow(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((168, 188, 210), (214, 226, 238)), ((246, 250, 255), (222, 232, 246)), 0.45)
    width, height = canvas.size
    for x in range(-30, width, 90):
        peak = random.randint(20, 46)
        draw.polygon([(x, y + 2), (x + 60, y - peak), (x + 120, y + 2)], (196, 210, 226))
    for _ in range(60):
        x, dot, r = random.randint(0, width), random.randint(0, height), random.randint(2, 4)
        draw.ellipse([x - r, dot - r, x + r, dot + r], (255, 255, 255))


def _street(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((190, 212, 232), (224, 232, 238)), ((140, 142, 148), (112, 114, 120)), 0.58)
    width, height = canvas.size
    x = -random.randint(0, 30)
    while x < width:  # a row of grey-brown blocks with windows
        wide, tall = random.randint(40, 70), random.randint(y // 3, y - 12)
        draw.rectangle([x, y - tall, x + wide, y], _vary(random, (186, 172, 164), 16))
        for wx in range(x + 8, x + wide - 8, 16):
            for wy in range(y - tall + 8, y - 12, 20):
                draw.rectangle([wx, wy, wx + 7, wy + 10], (226, 224, 206))
        x += wide + 2
    draw.rectangle([0, y - 2, width, y + 8], (206, 204, 200))
    middle = (y + height) // 2 + 6
    for x in range(-random.randint(0, 40), width, 60):
        draw.rectangle([x, middle, x + 34, middle + 6], (246, 246, 240))


def _night(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((18, 24, 66), (58, 68, 128)), ((44, 60, 70), (30, 42, 50)), 0.72)
    width, _ = canvas.size
    for _ in range(45):
        x, dot, r = random.randint(0, width), random.randint(0, y - 6), random.choice((1, 1, 2, 3))
        draw.ellipse([x - r, dot - r, x + r, dot + r], (255, 250, 214))
    x = random.randint(20, width - 60)
    draw.ellipse([x, 12, x + 40, 52], (255, 244, 190))
    draw.ellipse([x + 14, 6, x + 50, 44], (24, 30, 74))


def _room(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((244, 222, 200), (238, 210, 186)), ((190, 136, 92), (160, 108, 70)), 0.66)
    width, height = canvas.size
    for x in range(random.randint(0, 20), width, 34):
        draw.line([x, 0, x, y], (232, 200, 172), 6)
    x = random.randint(20, width - 110)
    draw.rectangle([x, 18, x + 88, y - 40], (255, 255, 252), (150, 110, 80), 5)
    draw.rectangle([x + 6, 24, x + 82, y - 46], (182, 222, 246))
    draw.line([x + 44, 20, x + 44, y - 42], (150, 110, 80), 5)
    for line in range(y + 18, height, 22):
        draw.line([0, line, width, line], (146, 98, 62), 2)
    draw.rectangle([0, y - 4, width, y + 5], (250, 244, 236))


def _sea(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((150, 212, 248), (232, 244, 250)), ((60, 150, 206), (24, 92, 164)), 0.36)
    width, height = canvas.size
    _clouds(draw, random, width, y)
    for line in range(y + 14, height, 26):
        start = -random.randint(0, 36)
        for x in range(start, width, 36):
            draw.arc([x, line, x + 36, line + 14], 200, 340, (168, 216, 240), 3)


def _desert(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((250, 214, 160), (252, 236, 200)), ((226, 160, 92), (206, 134, 66)), 0.50)
    width = canvas.width
    for base, tone in ((0, (218, 150, 82)), (24, (208, 140, 74))):
        x = random.randint(-60, width // 2)
        draw.pieslice([x, y + base - 26, x + width * 3 // 4, y + base + 60], 180, 360, tone)
    x, foot = random.choice((random.randint(4, 40), width - random.randint(24, 60))), y + 20
    draw.rounded_rectangle([x, foot - 56, x + 12, foot], 6, (96, 140, 84))
    draw.rounded_rectangle([x - 12, foot - 40, x + 4, foot - 31], 4, (96, 140, 84))
    draw.rounded_rectangle([x + 9, foot - 32, x + 26, foot - 23], 4, (96, 140, 84))


def _kitchen(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((222, 240, 236), (206, 230, 226)), ((238, 236, 230), (218, 214, 206)), 0.60)
    width, height = canvas.size
    for x in range(0, width, 24):
        draw.line([x, 0, x, y], (180, 208, 204), 2)
    for line in range(y % 24, y, 24):
        draw.line([0, line, width, line], (180, 208, 204), 2)
    draw.rectangle([0, y - 6, width, y + 10], (126, 88, 66))
    for x in range(-random.randint(0, 60), width, 90):
        draw.rectangle([x, y + 16, x + 82, height], (206, 196, 180), (150, 136, 120), 3)
        draw.ellipse([x + 68, y + 40, x + 75, y + 47], (120, 104, 90))
    x = random.randint(10, width - 70)
    draw.rectangle([x, 8, x + 60, 34], (128, 132, 140))  # extractor hood
    draw.polygon([(x - 14, 54), (x + 12, 30), (x + 48, 30), (x + 74, 54)], (110, 114, 122))


def _court(canvas: Image.Image, draw: ImageDraw.ImageDraw, random: Random) -> None:
    y = _sky_and_ground(canvas, random, ((176, 216, 240), (220, 236, 244)), ((196, 96, 72), (178, 80, 60)), 0.42)
    width, height = canvas.size
    for x in range(-40, width + 40, 14):  # a wire fence
        draw.line([x, y - 36, x + 30, y], (150, 164, 170), 2)
        draw.line([x + 30, y - 36, x, y], (150, 164, 170), 2)
    draw.rectangle([0, y - 4, width, y + 2], (84, 120, 96))
    left = random.randint(10, 60)
    draw.line([left + 40, y + 16, width - left - 20, y + 16], (250, 250, 246), 5)
    draw.line([left + 40, y + 16, left - 50, height], (250, 250, 246), 6)
    draw.line([width - left - 20, y + 16, width - left + 60, height], (250, 250, 246), 6)
    draw.line([width // 2, y + 16, width // 2, height], (250, 250, 246), 5)


BACKDROPS: dict[str, Callable[[Image.Image, ImageDraw.ImageDraw, Random], None]] = {
    "grass": _grass, "beach": _beach, "snow": _snow, "street": _street, "night": _night, "room": _room, "sea": _sea,
    "desert": _desert, "kitchen": _kitchen, "court": _court,
}


def paint_background(background: str, size: tuple[int, int], random: Random) -> Image.Image:
    """An RGB image of the background; size is (width, height) in pixels, twice a finished picture's."""
    canvas = Image.new("RGB", size)
    BACKDROPS[background](canvas, ImageDraw.Draw(canvas), random)
    return canvas
