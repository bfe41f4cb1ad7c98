"""A report as one HTML page: sections made ready in Python, drawn by the templates.

The page needs no network, no script and no other file. Everything that came from outside, such as
names of layers, is escaped by the templates.
"""

import functools
import importlib.resources
import math
import pathlib

import jinja2

from keras_compress.report.charts import SPACE, bundle, histogram_chart, number, panel, percent
from keras_compress.report.figures import BINS_BESIDE

OPEN_HISTOGRAMS = 12  # of a kind that are seen at once; the others unfold
MANY = 4  # curves of one quantity, from which on they share a panel
LARGE = 0.02  # share of FLOPs or latency from which on a layer without a kernel is seen at once
OPEN_BARS = 20  # of a sensitivity analysis
WIDEST = 8  # bits that fill the bar of a width
SHARES = ("acc", "auc", "precision", "recall", "f1", "iou", "dice")  # names of metrics in [0, 1]
SUFFIXES = (".html", ".htm")


def checked_page_path(path):
    """Return the path of a page as a `pathlib.Path`, checked before any work is done.

    Raises:
        ValueError: it does not end in `.html` or `.htm`.
        OSError: its folder is missing, or a folder is in its place.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"Expected a path that ends in .html or .htm. Received: path={str(path)!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected an existing folder to save the page in. Received: path={str(path)!r}"
        )
    if path.is_dir():
        raise FileExistsError(f"A folder of that name is in the way. Received: path={str(path)!r}")
    return path


def page(report):
    """Return the HTML of a `Report`."""
    from keras_compress import __version__

    return _environment().get_template("report.html").render(
        title=report.model,
        version=__version__,
        lead=_lead(report),
        notes=report.notes,
        tiles=_tiles(report),
        figures=_figure_rows(report),
        layers=_layer_section(report),
        ranges=_range_sections(report),
        panels=_panels(report.history),
        constants=_constants(report.history),
        sensitivity=_sensitivity(report.sensitivity),
        left_alone=_left_alone(report),
        keys=_keys(report.keys),
    )  # fmt: skip


@functools.cache
def _environment():
    folder = importlib.resources.files("keras_compress.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    return environment


def _lead(report):
    """Return the sentence under the title."""
    forms = {each.name: each for each in report.figures}
    count = f"{len(report.layers)} layer{'s' if len(report.layers) != 1 else ''}"
    if "compressed" not in forms:
        text = f"{count}, {number(report.parameters)} parameters, {number(report.flops)} FLOPs"
        return f"{text} per sample."
    text = f"{count}. The weights take {number(forms['compressed'].bytes)}B in OpenVINO IR, "
    ratio = forms["compressed"].bytes / max(forms["float"].bytes, 1)
    return f"{text}{percent(ratio)} of the {number(forms['float'].bytes)}B in float32."


UNITS = {
    "steps": "steps between two levels",
    "codes": "codes, steps above the lowest level",
    "scales": "scales, the magnitude of a rounded value",
}
QUANTITIES = (
    ("parameters", "Parameters", "", "fewer"),
    ("flops", "FLOPs per sample", "", "fewer"),
    ("bytes", "Size of the weights", "B", "smaller"),
    ("file_bytes", "Size of the IR's files", "B", "smaller"),
    ("latency", "Latency", f"{SPACE}ms", "faster"),
)
SOFT = ("Weight bits", "Input bits", "Filters kept")  # columns of a fainter colour
TILES = ("bytes", "latency", "flops", "parameters")


def _metric_names(figures):
    names = dict.fromkeys(name for each in figures for name in each.metrics)
    return sorted(names, key=lambda name: name == "loss")


def _metric_text(name, value):
    return percent(value, 2) if _is_share(name) and math.isfinite(value) else number(value)


def _is_share(name):
    return any(word in name.lower() for word in SHARES)


def _tiles(report):
    """Return the figures that matter most: a headline each, and a bar per form of the model."""
    figures = report.figures
    if len(figures) < 2:
        return []
    tiles = []
    for name in _metric_names(figures)[:1]:
        values = {each.name: each.metrics[name] for each in figures if name in each.metrics}
        tiles.append(_metric_tile(name, values))
    quantities = {key: rest for key, *rest in QUANTITIES}
    for key in TILES:
        values = {e.name: getattr(e, key) for e in figures if getattr(e, key) is not None}
        if len(values) > 1 and (key == "bytes" or len(set(values.values())) > 1):
            tiles.append(_cost_tile(*quantities[key], values))
    return tiles


def _metric_tile(name, values):
    last = list(values)[-1]
    headline, note = _metric_text(name, values[last]), ""
    if "float" in values and len(values) > 1:
        change = values[last] - values["float"]
        note = f"{_signed(100 * change)} points" if _is_share(name) else _signed(change)
        note = f"{note} to float"
    largest = 1.0 if _is_share(name) else max(map(abs, values.values())) or 1.0
    bars = [
        {"name": each, "text": _metric_text(name, value), "share": _share(value, largest)}
        for each, value in values.items()
    ]
    return {"title": _title(name), "headline": headline, "note": note, "bars": bars}


def _cost_tile(title, unit, word, values):
    (first, before), *_, (_, after) = values.items()
    ratio = before / after if after else math.inf
    headline = f"{_times(ratio)} {word}"
    if abs(ratio - 1) < 0.005:
        headline = "unchanged"
    elif ratio < 1:
        opposite = {"fewer": "more", "smaller": "larger", "faster": "slower"}[word]
        headline = f"{_times(1 / ratio if ratio else math.inf)} {opposite}"
    largest = max(values.values()) or 1
    bars = [
        {"name": each, "text": f"{number(value)}{unit}", "share": _share(value, largest)}
        for each, value in values.items()
    ]
    note = f"as {first}" if headline == "unchanged" else f"than {first}"
    return {"title": title, "headline": headline, "note": note, "bars": bars}


def _times(ratio):
    digits = 2 if ratio < 2 else 1 if ratio < 20 else 0
    return f"{ratio:,.{digits}f}×" if math.isfinite(ratio) else "∞×"


def _title(name):
    name = name.replace("_", " ")
    return name[:1].upper() + name[1:]


def _share(value, largest):
    """Return the length of a bar in percent, as text that CSS reads."""
    share = value / largest if largest > 0 and math.isfinite(value) else 0.0
    return f"{100 * min(max(share, 0.0), 1.0):.1f}"


def _signed(value):
    text = number(round(value, 2) if abs(value) >= 0.1 else value)
    return text if text.startswith("−") or text == "0" else f"+{text}"


def _figure_rows(report):
    """Return (names of the forms, rows of the table of all figures)."""
    figures = report.figures
    if len(figures) < 2:
        return None
    rows = []
    for name in _metric_names(figures):
        values = [each.metrics.get(name) for each in figures]
        cells = [("" if v is None else _metric_text(name, v), "") for v in values]
        rows.append((_title(name), cells, _difference(name, figures, values)))
    for key, title, unit, _ in QUANTITIES:
        values = [getattr(each, key) for each in figures]
        if any(value is not None for value in values):
            cells = [(_exact(value, unit), "") for value in values]
            if key == "latency":
                cells = [_with_spread(each) for each in figures]
            rows.append((title, cells, _ratio(figures, values)))
    return [each.name for each in figures], rows


def _exact(value, unit):
    return "" if value is None else f"{value:,}{SPACE + unit if unit else ''}"


def _with_spread(figures):
    if figures.latency is None:
        return "", ""
    return f"{figures.latency:.3f}{SPACE}ms", f"quartiles {figures.spread:.3f}{SPACE}ms apart"


def _difference(name, figures, values):
    known = [value for value in values if value is not None]
    if figures[0].name != "float" or values[0] is None or len(known) < 2:
        return ""
    change = known[-1] - known[0]
    return f"{_signed(100 * change)} points" if _is_share(name) else _signed(change)


def _ratio(figures, values):
    known = [value for value in values if value is not None]
    if figures[0].name != "float" or values[0] in (None, 0) or len(known) < 2:
        return ""
    return percent(known[-1] / known[0])


def _layer_section(report):
    """Return the columns and the rows of the table of layers; each cell has a text and a bar."""
    layers = report.layers
    has = {
        "sparsity": report.is_sparse,
        "filters": report.is_pruned,
        "latency": any(each.latency_share is not None for each in layers),
        "bits": any(each.weight_bits is not None for each in layers),
        "input": any(each.activation_bits is not None for each in layers),
    }
    most = max((report.share(each) for each in layers), default=0) or 1
    slowest = max((each.latency_share or 0 for each in layers), default=0) or 1
    columns = [
        ("Weight bits", has["bits"], lambda each: _bits(each.weight_bits, each.parameters)),
        ("Input bits", has["input"], lambda each: _bits(each.activation_bits, each.weight_bits)),
        ("Zeros", has["sparsity"], lambda each: _shared(each.sparsity, 1)),
        ("Filters kept", has["filters"], _filters),
        ("Share of FLOPs", True, lambda each: _shared(report.share(each), most)),
        ("Share of latency", has["latency"], lambda each: _shared(each.latency_share, slowest)),
    ]
    columns = [(title, cell) for title, shown, cell in columns if shown]
    rows = {True: [], False: []}
    for each in layers:
        cells = [(title, *cell(each)) for title, cell in columns]
        texts = {"layer": each.layer, "type": each.type, "parameters": f"{each.parameters:,}"}
        rows[_matters(report, each)].append(texts | {"cells": cells})
    if not rows[True]:
        rows = {True: rows[False], False: []}
    rest = 1 - sum(each.latency_share or 0 for each in layers) if has["latency"] else 0
    return {
        "columns": [title for title, _ in columns],
        "soft": SOFT,
        "shown": rows[True],
        "more": rows[False],
        "rest": percent(rest) if rest > 0.0005 else "",
    }


def _matters(report, layer):
    """Whether a layer is seen at once: it has a kernel, takes its share, or was left in float."""
    shares = (report.share(layer), layer.latency_share or 0.0)
    return layer.filters is not None or bool(layer.reason) or max(shares) >= LARGE


def _bits(bits, otherwise):
    if bits is None:
        return ("float" if otherwise else "", None)
    return str(bits), _share(bits, WIDEST)


def _shared(share, largest):
    return ("", None) if share is None else (percent(share), _share(share, largest))


def _filters(layer):
    if layer.filters is None:
        return "", None
    text = f"{layer.filters_kept:,} of {layer.filters:,}"
    return text, _share(layer.filters_kept, layer.filters)


def _range_sections(report):
    """Return the sections of histograms, activations first."""
    titles = {"activation": "Activations", "weight": "Weights"}
    sections = []
    for kind, title in titles.items():
        found = [_histogram(each) for each in report.histograms if each.kind == kind]
        if found:
            shown, more = found[:OPEN_HISTOGRAMS], found[OPEN_HISTOGRAMS:]
            units = sorted({each.unit for each in report.histograms if each.kind == kind} - {""})
            section = {"kind": kind, "title": title, "shown": shown, "more": more}
            sections.append(section | {"units": [UNITS[unit] for unit in units]})
    return sections


def _histogram(each):
    ends = f"{number(each.low)} to {number(each.high)}"
    unit = f" {each.unit}" if each.unit else ""
    outside = [
        f"{percent(share)}{SPACE}{word}"
        for share, word in ((each.below, "below"), (each.above, "above"))
        if share
    ]
    clipped = ", ".join(outside) if outside else "nothing clipped" if each.below is not None else ""
    zeros = f"{percent(each.zeros)}{SPACE}zeros" if each.zeros >= 0.0005 else ""
    facts = [fact for fact in (clipped, zeros) if fact]
    kind = each.kind.capitalize()
    label = f"{kind} histogram of {each.name}: {each.bits} bits, range {ends}{unit}"
    return {
        "name": each.name,
        "bits": f"{each.bits} bit{'s' if each.bits > 1 else ''}",
        "facts": " · ".join(facts),
        "label": "; ".join([label, *facts]) + ".",
        "chart": histogram_chart(each, BINS_BESIDE),
    }


def _grouped(history):
    """Return {quantity: {"training" or "validation": values}}, the loss first."""
    groups = {}
    for name, values in history.items():
        base = name.removeprefix("val_")
        is_validation = base != name and not base.startswith("compression/")
        if any(math.isfinite(value) for value in values):
            groups.setdefault(base, {})["validation" if is_validation else "training"] = values
    order = {"loss": 0, "learning_rate": 2}
    ranked = sorted(groups, key=lambda b: 3 if b.startswith("compression/") else order.get(b, 1))
    return {base: dict(sorted(groups[base].items())) for base in ranked}


def _quantity(base):
    """Return a logged name as words: `compression/level/filter_pruning` is a level."""
    return base.removeprefix("compression/").replace("/", ", ").replace("_", " ")


def _is_constant(series):
    return len({value for values in series.values() for value in values}) == 1


def _panels(history):
    """Return the `Panel`s of all quantities that changed, or that one epoch alone has."""
    found = []
    groups = _grouped(history)
    families = _families(groups)
    for base, series in groups.items():
        if base.rpartition("/")[0] in families:
            continue
        if base.startswith("compression/") and _is_constant(series):
            continue
        title = _quantity(base)
        if list(series) == ["training"] and base.startswith("compression/"):
            series = {"": series["training"]}
        found.append(panel(title, series))
    for name, series in families.items():
        found.append(bundle(f"{_quantity(name)} of each layer", series))
    return found


def _families(groups):
    """Return {common part: {last part: values}} of figures that are logged for every layer."""
    families = {}
    for base, series in groups.items():
        common, _, last = base.rpartition("/")
        if common.startswith("compression/"):
            families.setdefault(common, {})[last] = series["training"]
    return {name: found for name, found in families.items() if len(found) >= MANY}


def _constants(history):
    """Return texts of compression figures that stayed the same in all epochs."""
    groups = _grouped(history)
    families = _families(groups)
    return [
        f"{_quantity(base)} {number(series['training'][0])}"
        for base, series in groups.items()
        if base.startswith("compression/") and _is_constant(series)
        if base.rpartition("/")[0] not in families
    ]


def _sensitivity(found):
    """Return the bars of a sensitivity analysis, the costliest layer first."""
    if found is None:
        return None
    rows = sorted(found.layers, key=lambda each: -each.drop)
    largest = max((each.drop for each in rows if math.isfinite(each.drop)), default=0)
    is_share = _is_share(found.metric)

    def cost(drop):
        return f"{number(round(100 * drop, 2))} points" if is_share else number(drop)

    bars = [
        {
            "layer": _members_text(each),
            "value": _metric_text(found.metric, each.value),
            "drop": cost(each.drop),
            "share": _share(each.drop, largest) if math.isfinite(each.drop) else "100",
        }
        for each in rows
    ]
    tip = found.suggestion
    return {
        "metric": found.metric,
        "loses": f"{found.metric} lost" if is_share else f"{found.metric}, worse by",
        "baseline": _metric_text(found.metric, found.baseline),
        "compressed": _metric_text(found.metric, found.compressed),
        "shown": bars[:OPEN_BARS],
        "more": bars[OPEN_BARS:],
        "scopes": [] if tip is None else list(tip.ignored_scopes),
        "value": "" if tip is None else _metric_text(found.metric, tip.value),
        "note": getattr(found, "note", ""),
    }


def _members_text(entry):
    """Return the name of a row; layers that were compressed together are one row."""
    others = len(getattr(entry, "members", ())) - 1
    return f"{entry.layer} and {others} more" if others > 0 else entry.layer


def _left_alone(report):
    rows = report.left_alone
    most = max((report.share(each) for each in rows), default=0) or 1
    return {
        "share": percent(report.float_share, 2),
        "rows": [
            {
                "layer": each.layer,
                "type": each.type,
                "reason": each.reason,
                "text": percent(report.share(each), 2),
                "share": _share(report.share(each), most),
            }
            for each in rows
        ],
    }


def _keys(keys):
    """Return the configuration's keys: those that were not simply honoured, and the others."""
    return {
        "other": [key for key in keys if key["status"] != "honoured"],
        "honoured": [key for key in keys if key["status"] == "honoured"],
    }
