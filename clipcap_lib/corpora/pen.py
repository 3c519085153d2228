"""A pen that draws outlined shapes in the coordinates of an object's box, and the colours it is filled with."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageDraw

RGB = tuple[int, int, int]
PAINT: dict[str, RGB] = {"red": (216, 42, 46), "blue": (42, 98, 214), "green": (52, 158, 66), "yellow": (252, 212, 48),
                         "white": (250, 250, 248), "black": (44, 44, 50), "purple": (142, 66, 182),
                         "orange": (246, 132, 30)}
DARK, CREAM, TYRE = (34, 32, 38), (255, 250, 235), (40, 40, 46)


def shade(colour: RGB, factor: float) -> RGB:
    """A darker (factor < 1) or lighter (factor > 1, towards white) version of a colour."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)
    return tuple(round(255 - (255 - c) * (2 - factor)) for c in colour)


class Pen:
    """Draws shapes in box coordinates, filled with the main colour unless told, outlined in a dark shade of it."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: int, y: int, width: int, height: int, colour: RGB):
        self.draw, self.x, self.y, self.width, self.height = draw, x, y, width, height
        self.main = colour
        dark = max(colour) < 80
        self.edge = (14, 14, 18) if dark else shade(colour, 0.5)
        self.soft = shade(colour, 1.25) if dark else shade(colour, 0.78)  # second tone: stripes, folds, ears
        self.contrast = CREAM if dark else DARK  # eyes and smiles
        self.stroke = max(2, round(0.022 * (width + height) / 2))

    def at(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(self.x + px * self.width, self.y + py * self.height) for px, py in points]

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None, edge: bool = True) -> None:
        self.draw.ellipse(self.at([(x0, y0), (x1, y1)]), fill or self.main, self.edge if edge else None,
                          self.stroke if edge else 0)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None, radius: float = 0.0,
            edge: bool = True) -> None:
        self.draw.rounded_rectangle(self.at([(x0, y0), (x1, y1)]), radius * min(self.width, self.height),
                                    fill or self.main, self.edge if edge else None, self.stroke if edge else 0)

    def polygon(self, *points: tuple[float, float], fill: RGB | None = None, edge: bool = True) -> None:
        placed = self.at(points)
        self.draw.polygon(placed, fill or self.main)
        if edge:
            self.draw.line([*placed, placed[0], placed[1]], self.edge, self.stroke, joint="curve")

    def line(self, *points: tuple[float, float], fill: RGB | None = None, thick: float = 1.0) -> None:
        self.draw.line(self.at(points), fill or self.edge, max(1, round(self.stroke * thick)), joint="curve")

    def arc(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, fill: RGB | None = None,
            thick: float = 1.0) -> None:
        self.draw.arc(self.at([(x0, y0), (x1, y1)]), start, end, fill or self.edge,
                      max(1, round(self.stroke * thick)))

    def pie(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, fill: RGB | None = None,
            edge: bool = True) -> None:
        self.draw.pieslice(self.at([(x0, y0), (x1, y1)]), start, end, fill or self.main, self.edge if edge else None,
                           self.stroke if edge else 0)

    def dot(self, x: float, y: float, radius: float, fill: RGB | None = None) -> None:
        """A filled circle; radius as a share of the shorter side of the box."""
        r = radius * min(self.width, self.height)
        (cx, cy), = self.at([(x, y)])
        self.draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill or self.contrast)

    def wheel(self, x: float, y: float, radius: float) -> None:
        self.dot(x, y, radius, TYRE)
        self.dot(x, y, radius * 0.5, (200, 204, 210))
