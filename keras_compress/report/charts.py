"""The geometry of a report's charts: from numbers to coordinates, ticks and labels.

Templates draw what is computed here; sizes are units of an SVG's `viewBox`.
"""

import dataclasses
import math

SPACE = "\u00a0"  # between a number and its unit: it breaks no line
BIN_WIDTH = 4
HISTOGRAM_HEIGHT = 52
HISTOGRAM_TOP = 6

CURVE_WIDTH, CURVE_HEIGHT = 340, 176
LEFT, RIGHT, TOP, BOTTOM = 46, 66, 10, 28
LABEL_DISTANCE = 12
MOST_MARKERS = 24  # points of a curve that are marked one by one


def number(value):
    """Return a number as short text of three digits, which no line breaks.

    Example:

    >>> ", ".join(map(number, (0, 0.01234, 12.3456, -5120, 1_230_000))).replace(SPACE, " ")
    '0, 0.0123, 12.3, −5.12 k, 1.23 M'
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "no number"
    size, unit = abs(value), ""
    for factor, name in ((1e9, f"{SPACE}G"), (1e6, f"{SPACE}M"), (1e3, f"{SPACE}k")):
        if size >= factor * 0.9995:
            size, unit = size / factor, name
            break
    text = f"{size:.3g}"
    if "e" not in text and "." in text:
        text = text.rstrip("0").rstrip(".")
    sign = "−" if value < 0 and text != "0" else ""
    return f"{sign}{text}{unit}"


def percent(share, digits=1):
    """Return a share in [0, 1] as text; what is more than nothing does not become zero.

    Example:

    >>> ", ".join(map(percent, (0, 0.0001, 0.1234, 1))).replace(SPACE, " ")
    '0 %, < 0.1 %, 12.3 %, 100 %'
    """
    least = 10.0**-digits
    if 0 < 100 * share < least / 2:
        return f"<{SPACE}{least:g}{SPACE}%"
    text = f"{100 * share:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text.replace('-', '−')}{SPACE}%"


@dataclasses.dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it is, and what it says."""

    position: float
    label: str


@dataclasses.dataclass(frozen=True)
class HistogramChart:
    """A `Histogram` ready to be drawn.

    Attributes:
        below, inside, above: SVG paths of the bins under, in and over the range; "" without any.
        width, base: of the plot; the height at which bars stand.
        low, high: where the range begins and ends.
        ticks: tuple of `Tick`.
    """

    below: str
    inside: str
    above: str
    width: int
    base: int
    low: int
    high: int
    ticks: tuple


def histogram_chart(histogram, beside):
    """Return the `HistogramChart` of a `Histogram`.

    Args:
        histogram: the `Histogram`.
        beside: how many of its bins lie at either side of the range.
    """
    counts = histogram.counts
    count = len(counts)
    base = HISTOGRAM_TOP + HISTOGRAM_HEIGHT
    tallest = max(max(counts), 1)
    heights = [base - HISTOGRAM_HEIGHT * each / tallest for each in counts]
    low, high = beside * BIN_WIDTH, (count - beside) * BIN_WIDTH
    ends = [number(end) for end in (histogram.low, histogram.high)]
    if histogram.unit:
        ends[1] += f"{SPACE}{histogram.unit}"
    ticks = [Tick(low, ends[0]), Tick(high, ends[1])]
    if histogram.low < 0 < histogram.high:
        zero = low - histogram.low / (histogram.high - histogram.low) * (high - low)
        if min(zero - low, high - zero) > 30:  # else its label would touch another
            ticks.insert(1, Tick(round(zero, 1), "0"))
    return HistogramChart(
        _steps(heights, 0, beside, base),
        _steps(heights, beside, count - beside, base),
        _steps(heights, count - beside, count, base),
        count * BIN_WIDTH,
        base,
        low,
        high,
        tuple(ticks),
    )


def _steps(heights, start, stop, base):
    """Return the outline of some bars as an SVG path; empty where all are."""
    if all(height == base for height in heights[start:stop]):
        return ""
    parts = [f"M{start * BIN_WIDTH} {base}"]
    last = None
    for index in range(start, stop):
        height = f"{heights[index]:.1f}".removesuffix(".0")
        parts.append(f"V{height}" if height != last else "")
        parts.append(f"H{(index + 1) * BIN_WIDTH}")
        last = height
    return "".join(parts) + f"V{base}Z"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        name: `"training"`, `"validation"`, `"bundle"` or `""`.
        path: SVG path.
        points: tuple of (x, y), where they are few enough to be marked.
        end: (x, y) of its label, or None without one.
        label: what it says: the last value.
    """

    name: str
    path: str
    points: tuple
    end: tuple
    label: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart of one quantity over the epochs of training.

    Attributes:
        title: the quantity.
        curves: tuple of `Curve`.
        x_ticks, y_ticks: tuples of `Tick`.
        summary: the content in words.
    """

    title: str
    curves: tuple
    x_ticks: tuple
    y_ticks: tuple
    summary: str

    width = CURVE_WIDTH
    height = CURVE_HEIGHT
    left = LEFT
    right = CURVE_WIDTH - RIGHT
    top = TOP
    base = CURVE_HEIGHT - BOTTOM


def panel(title, series):
    """Return the `Panel` of some series of numbers, one per epoch.

    Args:
        title: the quantity.
        series: {name: list of floats}; numbers that are none leave a gap, and at least one is one.
    """
    placed, x_ticks, y_ticks = _placed(series)
    ends = _apart([[p for p in points if p][-1:] for points in placed.values()])
    curves = []
    for (name, points), end in zip(placed.items(), ends, strict=True):
        known = _finite(series[name])
        if known:
            marked = tuple(p for p in points if p) if len(points) <= MOST_MARKERS else ()
            curves.append(Curve(name, _line(points), marked, end, number(known[-1])))
    return Panel(title, tuple(curves), x_ticks, y_ticks, _summary(title, series))


def bundle(title, series):
    """Return the `Panel` of one quantity of many layers: only the outermost curves are labelled.

    Args:
        title: the quantity.
        series: {layer: list of floats}, as for `panel`.
    """
    series = {name: values for name, values in series.items() if _finite(values)}
    placed, x_ticks, y_ticks = _placed(series)
    last = {name: _finite(values)[-1] for name, values in series.items()}
    lowest, highest = min(last, key=last.get), max(last, key=last.get)
    outer = dict.fromkeys((highest, lowest))
    ends = _apart([[p for p in placed[name] if p][-1:] for name in outer])
    labels = dict(zip(outer, ends, strict=True))
    curves = tuple(
        Curve("bundle", _line(points), (), labels.get(name), number(last[name]))
        for name, points in placed.items()
    )
    summary = (
        f"{title}, {len(series)} layers over {_epochs(series)} epochs: in the end from "
        f"{number(last[lowest])} ({lowest}) to {number(last[highest])} ({highest})."
    )
    return Panel(title, curves, x_ticks, y_ticks, summary)


def _placed(series):
    """Return ({name: points, None for gaps}, ticks of the epochs, ticks of the values)."""
    epochs = _epochs(series)
    finite = [value for values in series.values() for value in _finite(values)]
    y_values = nice_ticks(min(finite), max(finite), 4)
    low, high = min(*finite, *y_values), max(*finite, *y_values)

    def x(epoch):
        share = 0.5 if epochs == 1 else (epoch - 1) / (epochs - 1)
        return round(LEFT + share * (CURVE_WIDTH - RIGHT - LEFT), 1)

    def y(value):
        return round(TOP + (high - value) / (high - low) * (CURVE_HEIGHT - BOTTOM - TOP), 1)

    placed = {}
    for name, values in series.items():
        step = epochs / max(len(values), 1)  # validation may have been done every few epochs only
        placed[name] = [
            (x((i + 1) * step), y(value)) if math.isfinite(value) else None
            for i, value in enumerate(values)
        ]
    x_ticks = tuple(Tick(x(epoch), str(epoch)) for epoch in _epoch_ticks(epochs))
    return placed, x_ticks, tuple(Tick(y(value), number(value)) for value in y_values)


def _epochs(series):
    return max(len(values) for values in series.values())


def _finite(values):
    return [value for value in values if math.isfinite(value)]


def nice_ticks(low, high, count):
    """Return about `count` round numbers that span a range of values, rising.

    Example:

    >>> nice_ticks(0.12, 0.93, 4)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _epoch_ticks(epochs):
    if epochs <= 6:
        return range(1, epochs + 1)
    step = next(s for s in (2, 5, 10, 20, 50, 100, 200, 500, 1000, epochs) if epochs / s <= 5)
    ticks = [1, *range(step, epochs, step), epochs]
    if len(ticks) > 2 and epochs - ticks[-2] < step / 2:
        del ticks[-2]
    return ticks


def _line(points):
    """Return an SVG path through points; None leaves a gap."""
    parts, is_on = [], False
    for point in points:
        if point is not None:
            parts.append(f"{'L' if is_on else 'M'}{point[0]:g} {point[1]:g}")
        is_on = point is not None
    return "".join(parts)


def _apart(ends):
    """Return the places of labels at the ends of curves, moved so that none covers another."""
    order = sorted((i for i, end in enumerate(ends) if end), key=lambda i: ends[i][0][1])
    heights = {i: ends[i][0][1] for i in order}
    for before, after in zip(order, order[1:], strict=False):
        gap = LABEL_DISTANCE - (heights[after] - heights[before])
        if gap > 0:
            heights[before] -= gap / 2
            heights[after] += gap / 2
    low = max(0, max(heights.values(), default=0) - (CURVE_HEIGHT - BOTTOM - 4))
    high = max(0, TOP - min(heights.values(), default=TOP))
    return [
        (ends[i][0][0], round(heights[i] - low + high, 1)) if end else None
        for i, end in enumerate(ends)
    ]


def _summary(title, series):
    parts, epochs = [], _epochs(series)
    for name, values in series.items():
        known = _finite(values)
        if known:
            course = f"from {number(known[0])} to {number(known[-1])}"
            spread = f"lowest {number(min(known))}, highest {number(max(known))}"
            parts.append(f"{name} {course} ({spread})".strip())
    return f"{title} over {epochs} epoch{'s' if epochs > 1 else ''}: {'; '.join(parts)}."
