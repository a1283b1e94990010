"""Line charts as SVG text: axes with round ticks, bands, labels at the lines' ends, marks; no library needed."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from fastrdm.report.svg.axes import POINTS, Axis, Scale, spread, thin

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#000000")  # Okabe and Ito, 2008
DASHES = ("", "7 3", "2 3")  # after the last color the first one comes again, dashed
TIME = ((94, 201, 98), (33, 145, 140), (59, 82, 139), (68, 1, 84))  # viridis, light to dark: early to late
HALO = ' paint-order="stroke" stroke="#fff" stroke-width="3"'  # keeps words readable on lines
GRAY, INK, GRID = "#666666", "#222222", "#e4e4e4"
WIDTH, HEIGHT = 640, 320  # units of the drawing; the page scales it
LEFT, TOP, BOTTOM = 62, 30, 44
LINE, LETTER = 13, 5.9  # height of a line of text, mean width of a letter at 11 units
LONGEST = 30  # letters of a label at a line's end


class Line(NamedTuple):
    """One curve; a value that is not finite is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dash: str = ""
    low: Sequence[float] = ()  # of a band around it, or empty
    high: Sequence[float] = ()


class Level(NamedTuple):
    """A horizontal line to compare with."""

    y: float
    label: str
    color: str = GRAY


class Mark(NamedTuple):
    """A vertical line with a short text on top."""

    x: float
    label: str
    color: str
    title: str = ""  # shown when pointed at


def color_of(index: int) -> tuple[str, str]:
    """Color and dash of the run of that number."""
    return PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]


def color_at(share: float) -> str:
    """Color of a moment: share 0 is the start, 1 the end."""
    place = min(max(share, 0.0), 1.0) * (len(TIME) - 1)
    i = min(int(place), len(TIME) - 2)
    mixed = (round(a + (b - a) * (place - i)) for a, b in zip(TIME[i], TIME[i + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def shorten(text: str, most: int = LONGEST) -> str:
    """At most so many letters, both ends kept."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def text(x: float, y: float, words: str, anchor: str = "start", color: str = INK) -> str:
    """A line of text as an SVG element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{HALO}>{escape(words)}</text>'


def chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    title: str,
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
    key: tuple[str, str] | None = None,
    points: int = POINTS,
) -> str:
    """A whole SVG of the lines, each of at most so many points; `key`: texts for both ends of a scale of time, in
    place of names at the lines' ends."""
    labeled = [] if key else [line for line in lines if line.label]
    letters = max((len(shorten(line.label)) for line in labeled), default=0)
    right = WIDTH - (24 + LETTER * letters if letters else 16)
    across = Scale(x, (v for line in lines for v in line.x), LEFT, right)
    values = (v for line in lines for series in (line.y, line.low, line.high) for v in series)
    up = Scale(y, (*values, *(level.y for level in levels)), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11"><title>{escape(title)}</title>',
        *_frame(across, up),
        *_marks(marks, across),
        *(_line(line, across, up, points) for line in lines),
        *_levels([level for level in levels if up.holds(level.y)], across, up),
        *_labels(labeled, across, up),
        *(_key(key, right) if key else ()),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def _frame(across: Scale, up: Scale) -> list[str]:
    """Grid, ticks and the axes' labels."""
    out = []
    for value in up.ticks:
        place = up(value)
        out.append(f'<path d="M{across.start} {place:.1f}H{across.end:.1f}" stroke="{GRID}"/>')
        out.append(text(across.start - 6, place + 4, up.text(value), "end"))
    for value in (v for v in across.ticks if across.low <= v <= across.high):
        place = across(value)
        out.append(f'<path d="M{place:.1f} {up.start}v4" stroke="{INK}"/>')
        out.append(text(place, up.start + 17, across.text(value), "middle"))
    out.append(f'<path d="M{across.start} {up.start}H{across.end:.1f}" stroke="{INK}"/>')
    out.append(text((across.start + across.end) / 2, HEIGHT - 8, across.axis.label, "middle"))
    out.append(text(4, 12, up.axis.label))
    return out


def _levels(levels: Sequence[Level], across: Scale, up: Scale) -> list[str]:
    """Dashed horizontal lines, their names above them at the left."""
    places = [up(level.y) for level in levels]
    out = []
    for level, place, label in zip(levels, places, spread(places, LINE, TOP + LINE, HEIGHT - BOTTOM), strict=True):
        out.append(
            f'<path d="M{across.start} {place:.1f}H{across.end:.1f}" stroke="{level.color}" stroke-dasharray="4 4"/>'
        )
        out.append(text(across.start + 6, label - 4, level.label, color=level.color))
    return out


def _marks(marks: Sequence[Mark], across: Scale) -> list[str]:
    """Vertical lines, their texts side by side."""
    shown = sorted((m for m in marks if across.holds(m.x) and across.low <= m.x <= across.high), key=lambda m: m.x)
    places = [across(m.x) for m in shown]
    out = []
    for mark, place, label in zip(shown, places, spread(places, 20, across.start, across.end), strict=True):
        out.append(
            f'<g><title>{escape(mark.title)}</title><path d="M{place:.1f} {HEIGHT - BOTTOM}V{TOP}" '
            f'stroke="{mark.color}" stroke-dasharray="1 3" stroke-width="1.5"/>'
        )
        out.append(text(label, TOP - 5, mark.label, "middle", mark.color) + "</g>")
    return out


def _runs_of(points: Iterable[tuple[float, ...] | None]) -> list[list[tuple[float, ...]]]:
    """The stretches between gaps."""
    stretches: list[list[tuple[float, ...]]] = [[]]
    for point in points:
        if point is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    return [s for s in stretches if s]


def _line(line: Line, across: Scale, up: Scale, points: int) -> str:
    """The band, the curve, and a dot for each of few points."""
    kept = thin(line.y, points)
    scales = (across, up, up, up) if line.low else (across, up)
    columns = (line.x, line.y, line.low, line.high) if line.low else (line.x, line.y)
    rows = [tuple(column[i] for column in columns) for i in kept]

    def drawn(row: tuple[float, ...], count: int) -> tuple[float, ...] | None:
        pairs = list(zip(scales, row, strict=True))[:count]
        return tuple(s(v) for s, v in pairs) if all(s.holds(v) for s, v in pairs) else None

    out = []
    for stretch in _runs_of(drawn(row, 4) for row in rows) if line.low else []:
        edge = [(p[0], p[3]) for p in stretch] + [(p[0], p[2]) for p in reversed(stretch)]
        out.append(f'<path d="{_path(edge)}Z" fill="{line.color}" fill-opacity="0.18"/>')
    stretches = _runs_of(drawn(row, 2) for row in rows)
    path = "".join(_path(s) for s in stretches)
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    out.append(f'<path d="{path}" fill="none" stroke="{line.color}" stroke-width="1.8"{dash}/>' if path else "")
    dots = [p for s in stretches if len(kept) <= 12 or len(s) == 1 for p in s]
    out += [f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.2" fill="{line.color}"/>' for p in dots]
    return f"<g><title>{escape(line.label)}</title>{''.join(out)}</g>"


def _path(points: Sequence[tuple[float, ...]]) -> str:
    return "M" + "L".join(f"{p[0]:.1f} {p[1]:.1f}" for p in points)


def _labels(lines: Sequence[Line], across: Scale, up: Scale) -> list[str]:
    """Names at the lines' last points, moved apart, a thin stroke from the one to the other."""
    ends = []
    for line in lines:
        last = [(a, b) for a, b in zip(line.x, line.y, strict=True) if across.holds(a) and up.holds(b)]
        if last:
            ends.append((line, across(last[-1][0]), up(last[-1][1])))
    places = spread([y for _, _, y in ends], LINE, TOP + 4, HEIGHT - BOTTOM)
    out = []
    for (line, x, y), place in zip(ends, places, strict=True):
        out.append(
            f'<path d="M{x + 3:.1f} {y:.1f}L{across.end + 9:.1f} {place:.1f}" stroke="{line.color}" opacity="0.4"/>'
        )
        out.append(text(across.end + 12, place + 4, shorten(line.label), color=line.color))
    return out


def _key(key: tuple[str, str], right: float) -> list[str]:
    """A strip of the colors of time, at the top right."""
    left = right - LETTER * len(key[1]) - 6 - 100
    strip = [
        f'<rect x="{left + 5 * i:.1f}" y="4" width="5.2" height="9" fill="{color_at(i / 19)}"/>' for i in range(20)
    ]
    return [text(left - 5, 12, key[0], "end"), *strip, text(right, 12, key[1], "end")]
