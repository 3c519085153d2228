"""Controls above a picture: what all widgets are made of. ipywidgets is imported where it is used."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from clipcap_lib.style import WIDTH, png_bytes

DPI = 100  # of the pictures: each dot is a pixel of the page
WIDE = ("<style>.clipcap-panel .widget-readout {width: auto !important; max-width: none !important; min-width: 4em; "
        "flex: none !important; overflow: visible; white-space: nowrap}</style>")


def panel(controls: Mapping[str, Any], draw: Callable[..., Any], note: str = "",
          settle: Callable[[], None] | None = None) -> Any:
    """Controls above the figure, or the figures one below the other, that `draw(**values)` gives; drawn again on a change.

    settle: fits the controls to each other (the last record of a split, say) before it is drawn. The box has `.controls`
    by name, `.picture`, `.redraw()`, and `.together()`: what is set inside it is drawn once, at its end. A figure that is
    the one drawn before is not drawn again.
    """
    import ipywidgets

    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width=f"{WIDTH * DPI:.0f}px", max_width="100%"))
    waiting, drawn = False, None

    @contextmanager
    def together() -> Iterator[None]:
        nonlocal waiting
        if waiting:
            yield
            return
        waiting = True
        try:
            yield
            if settle:
                settle()
        finally:
            waiting = False
        show()

    def show() -> None:
        nonlocal drawn
        figures = draw(**{name: control.value for name, control in controls.items()})
        if figures is drawn:
            return
        drawn, figures = figures, figures if isinstance(figures, Sequence) else [figures]
        picture.value = png_bytes(*figures, dpi=DPI, small=False)
        picture.alt = " ".join(figure.alt for figure in figures)
        # alt is not its tooltip: ipywidgets 8 looks for a description then, and draws no picture

    def redraw(_: Any = None) -> None:
        if not waiting:
            with together():
                pass

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    row = ipywidgets.HBox(list(controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
    box = ipywidgets.VBox([row, picture, ipywidgets.HTML(f"{WIDE}<small>{html.escape(note)}</small>")])
    box.add_class("clipcap-panel")  # names of choices are longer than the numbers that ipywidgets makes room for
    box.controls, box.picture, box.redraw, box.together = dict(controls), picture, redraw, together
    return box


def add(box: Any, **controls: Any) -> Any:
    """Further controls at the end of the row, which choose nothing themselves (buttons) -> the box."""
    box.children[0].children = (*box.children[0].children, *controls.values())
    box.controls.update(controls)
    return box


def slider(name: str, last: int, value: int = 1, first: int = 1) -> Any:
    """A slider over whole numbers that draws once it is let go."""
    import ipywidgets

    last = max(first, last)
    return ipywidgets.IntSlider(value=min(value, last), min=first, max=last, description=name, continuous_update=False)


def menu(name: str, options: Sequence[Any]) -> Any:
    """A choice among a few; each option is a value, or a pair of what is shown and the value.

    It is a slider with names: JupyterLab takes the arrow keys away from drop-down menus, to move between cells.
    """
    import ipywidgets

    return ipywidgets.SelectionSlider(options=list(options) or ["-"], description=name, continuous_update=False)


def button(name: str, action: Callable[[], None], hint: str, width: str = "auto") -> Any:
    """A button that does something. hint: what, in a few words."""
    import ipywidgets

    made = ipywidgets.Button(description=name, tooltip=hint, layout=ipywidgets.Layout(width=width))
    made.on_click(lambda _: action())
    return made
