"""Pairs of values as SVG text: a ring, a disc and a stroke between them, a row each."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from fastrdm.report.svg.axes import Axis, Scale
from fastrdm.report.svg.line_chart import GRID, LETTER, WIDTH, shorten, text

ROW, NEXT = 18.0, 5.0  # height of a row, and of a further pair in it
TOP, BELOW = 44.0, 8.0


class Pair(NamedTuple):
    """Two values of one thing."""

    label: str  # empty: one more pair of the row above
    ring: float
    disc: float
    color: str


def dumbbells(pairs: Sequence[Pair], axis: Axis, *, title: str) -> str:
    """A whole SVG; what cannot be drawn on the axis is left out."""
    left = 18 + LETTER * max((len(shorten(pair.label)) for pair in pairs), default=0)
    scale = Scale(axis, (v for pair in pairs for v in (pair.ring, pair.disc)), left, WIDTH - 24)
    y, rows = TOP - ROW, []
    for pair in pairs:
        y += ROW if pair.label else NEXT
        rows.append((y, pair))
    height = y + ROW / 2 + BELOW
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11"><title>{escape(title)}</title>',
        text(4, 12, axis.label),
    ]
    for value in scale.ticks:
        out.append(f'<path d="M{scale(value):.1f} {TOP - 12:.0f}V{height - BELOW:.1f}" stroke="{GRID}"/>')
        out.append(text(scale(value), TOP - 16, scale.text(value), "middle"))
    for y, pair in rows:
        if pair.label:
            out.append(text(left - 10, y + 4, shorten(pair.label), "end"))
        if not (scale.holds(pair.ring) and scale.holds(pair.disc)):
            continue
        a, b, color = scale(pair.ring), scale(pair.disc), pair.color
        out.append(f'<path d="M{a:.1f} {y:.1f}H{b:.1f}" stroke="{color}" stroke-width="1.5"/>')
        out.append(f'<circle cx="{a:.1f}" cy="{y:.1f}" r="3" fill="#fff" stroke="{color}" stroke-width="1.5"/>')
        out.append(f'<circle cx="{b:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    return "\n".join([*out, "</svg>"])
