"""The report's page: its structure by a parser, its charts by hand, its looks in a browser."""

import html.parser
import importlib
import math
import os
import pathlib
import re
import shutil
import types

import keras
import numpy as np
import pytest
from backend_helpers import BACKEND
from keras import layers

import keras_compress as kc
from keras_compress.report import charts as report_charts
from keras_compress.report import page as report_page
from keras_compress.report.charts import histogram_chart, nice_ticks, number, panel, percent
from keras_compress.report.figures import Histogram

EVIL = "<script>alert('x')</script>"
SETTINGS = {
    "wide": (1280, 900, "light"),
    "narrow": (360, 800, "light"),
    "dark": (1280, 900, "dark"),
}
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
VOID = {"meta", "link", "br", "img", "rect", "path", "circle"}


class Page(html.parser.HTMLParser):
    """The elements of a page: `found` holds (tag, attributes, text inside) in order of closing."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.unbalanced = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag in VOID:
            self.found.append((tag, dict(attrs), ""))
        else:
            self.open.append((tag, dict(attrs), []))

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), ""))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def handle_endtag(self, tag):
        name, attributes, text = self.open.pop()
        if name != tag:
            self.unbalanced.append((name, tag))
        self.found.append((name, attributes, "".join(text)))

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def network(name="tiny"):
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="stem")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = shortcut = layers.ReLU(name="relu")(x)
    for index in range(3):
        label = f"a_rather_long_name_of_a_convolution_number_{index}"
        x = layers.Conv2D(16, 3, padding="same", activation="relu", name=label)(x)
    x = layers.Add(name="add")([x, shortcut])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(8, activation="gelu", name="left_alone")(x)
    return keras.Model(inputs, layers.Dense(4, name="scores")(x), name=name)


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def stub(layer_names, metric="accuracy"):
    random = np.random.default_rng(0)
    drops = [*random.exponential(0.01, len(layer_names) - 1), math.inf]
    rows = [
        types.SimpleNamespace(layer=name, value=0.9 - drop, drop=drop, members=(name, "another"))
        for name, drop in zip(layer_names, drops, strict=True)
    ]
    tip = types.SimpleNamespace(ignored_scopes=("stem",), value=0.88)
    return types.SimpleNamespace(
        metric=metric, baseline=0.9, compressed=0.85, layers=tuple(rows), suggestion=tip
    )


@pytest.fixture(scope="module")
def rich():
    """A report with everything in it; on other backends without what needs an export."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 8, 8, 3)).astype("float32")
    y = random.integers(0, 4, 64)
    model = compiled(network())
    pruning = {"schedule": "baseline", "pruning_target": 0.3, "round_to": 4}
    config = {
        "compression": [
            {"algorithm": "filter_pruning", "pruning_init": 0.3, "params": pruning},
            {
                "algorithm": "quantization",
                "ignored_scopes": ["left_alone"],
                "export_to_onnx_standard_ops": False,
                "scope_overrides": {"weights": {"scores": {"bits": 4}}},
            },
        ]
    }
    small = compiled(kc.compress_model(model, config, data=x, verbose=False))
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics()]
    history = small.fit(x, y, epochs=3, validation_split=0.25, verbose=0, callbacks=callbacks)
    deployed = BACKEND == "tensorflow"
    return kc.report(
        small,
        original=model,
        data=(x, y) if deployed else x,
        history=history,
        sensitivity=stub([f"layer_{index}" for index in range(25)]),
        latency=deployed,
    )


@pytest.fixture(scope="module")
def text(rich):
    return report_page.page(rich)


# Structure


def test_elements_are_closed_and_ids_are_unique(text):
    page = Page(text)
    assert not page.open and not page.unbalanced
    ids = [attributes["id"] for _, attributes, _ in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for attributes, _ in page.all("a")}
    assert targets <= set(ids)
    assert len(page.all("h1")) == 1


def test_the_page_needs_nothing_else(text):
    page = Page(text)
    tags = {tag for tag, *_ in page.found}
    assert not tags & {"script", "img", "iframe", "object"}
    assert [a["href"] for a, _ in page.all("link")] == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|\bsrc=", text)


def test_sections_hold_what_was_given(rich, text):
    page = Page(text)
    sections = {attributes["id"]: body for attributes, body in page.all("section")}
    assert list(sections) == [
        *("figures", "layers", "activations", "weights", "training", "sensitivity", "float"),
        "configuration",
    ]
    for layer in rich.layers:
        assert layer.layer in sections["layers"]
    assert "left_alone" in sections["float"] and "excluded by the scopes" in sections["float"]
    assert "compression[1].export_to_onnx_standard_ops" in sections["configuration"]
    assert "stem" in sections["sensitivity"] and "∞" in sections["sensitivity"]
    assert "layer_0 and 1 more" in sections["sensitivity"]
    titles = [body for attributes, body in page.all("h3")]
    assert titles.count("loss") == titles.count("accuracy") == 1  # training and validation in one
    assert "The same in all epochs: filters left" in sections["training"]
    float_bytes = f"{4 * network().count_params():,}\xa0B"
    assert float_bytes in sections["figures"]
    kept = next(each for each in rich.layers if each.layer.endswith("number_0"))
    assert (kept.filters_kept, kept.filters) == (12, 16) and "12 of 16" in sections["layers"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its export would start a process")
def test_three_forms_stand_side_by_side(rich, text):
    columns = [body for attributes, body in Page(text).all("th") if attributes["scope"] == "col"]
    assert columns[:5] == ["Quantity", "float", "compressed", "IR", "to float"]
    accuracy = {each.name: each.metrics["accuracy"] for each in rich.figures}
    figures = next(body for a, body in Page(text).all("section") if a["id"] == "figures")
    for value in accuracy.values():
        assert percent(value, 2) in figures
    assert "64 samples" in figures and "Latency" in figures
    assert "Share of latency" in columns


def test_sections_without_content_are_left_out():
    page = Page(report_page.page(kc.report(network())))
    assert [attributes["id"] for attributes, _ in page.all("section")] == ["layers"]
    assert not page.all("svg")
    titles = [body for attributes, body in page.all("th") if attributes["scope"] == "col"]
    assert titles == ["Layer", "Parameters", "Share of FLOPs"] * (len(titles) // 3)


def test_alternatives_to_what_is_seen(rich, text):
    page = Page(text)
    tiles = sum(attributes.get("class") == "tile" for attributes, _ in page.all("div"))
    charts = page.all("svg")
    assert len(charts) == len(rich.histograms) + len(page.all("h3")) - tiles
    for attributes, body in charts:
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
        assert re.search(r"\d", attributes["aria-label"]) and attributes["aria-label"] in body
    names = [attributes["aria-label"] for attributes, _ in charts]
    assert any("8 bits, range" in name and "Weight histogram" in name for name in names)
    assert any("loss over 3 epochs: training from" in name for name in names)
    assert len(page.all("caption")) == len(page.all("table")) > 4
    for attributes, _ in page.all("th"):
        assert attributes["scope"] in ("row", "col")
    (language,) = page.all("html")
    assert language[0]["lang"] == "en"


def test_names_are_escaped(rich):
    sensitivity = stub([EVIL, "other"])
    layer = rich.layers[0].__class__(EVIL, EVIL, 1, 1, None, None, 4, 4, EVIL)
    key = {"key": EVIL, "status": "refused", "reason": EVIL}
    history = {EVIL: [1.0, 2.0], f"compression/{EVIL}": [1.0, 1.0]}
    histogram = Histogram("weight", EVIL, 8, -1.0, 1.0, "", (1,) * 64, 0.0, 0.0, 0.0)
    report = kc.Report(
        EVIL, (layer,), (), rich.figures, (histogram,), history, sensitivity, (key,), (EVIL,)
    )
    text = report_page.page(report)
    assert not Page(text).all("script")
    assert "<script" not in text and text.count("&lt;script&gt;") > 10


def test_many_layers_fold_and_stay_small():
    inputs = x = keras.Input((8,), name="features")
    for index in range(60):
        x = layers.Dense(8, activation="relu", name=f"dense_{index}")(x)
    data = np.random.default_rng(0).normal(size=(8, 8)).astype("float32")
    config = {"compression": {"algorithm": "quantization"}}
    model = kc.compress_model(keras.Model(inputs, x), config, data=data, verbose=False)
    text = report_page.page(kc.report(model, data=data))
    page = Page(text)
    assert len(text) < 1e6 and len(page.all("svg")) == 120
    summaries = [body for _, body in page.all("summary")]
    assert summaries[:2] == ["48 more activations", "48 more weights"]


# The file


def test_saving_is_whole_or_not_at_all(rich, text, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    rich.save(path)
    assert path.read_text(encoding="utf-8") == text
    rich.save(str(tmp_path / "other.HTM"))

    def fail(report):
        raise RuntimeError("in the midst")

    monkeypatch.setattr(importlib.import_module("keras_compress.report.report"), "page", fail)
    with pytest.raises(RuntimeError, match="in the midst"):
        rich.save(path)
    assert path.read_text(encoding="utf-8") == text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other.HTM", "report.html"]


def test_paths_are_checked_first(rich, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.html or \.htm\. Received: path='report.txt'"):
        rich.save("report.txt")
    with pytest.raises(FileNotFoundError, match="existing folder"):
        rich.save(tmp_path / "missing" / "report.html")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(FileExistsError, match="in the way"):
        rich.save(tmp_path / "taken.html")


# Charts


def test_numbers_are_short():
    texts = {0: "0", 0.5: "0.5", -0.00012345: "−0.000123", 999.6: "1\xa0k", 2.5e9: "2.5\xa0G"}
    assert {value: number(value) for value in texts} == texts
    assert [number(v) for v in (math.inf, -math.inf, math.nan)] == ["∞", "−∞", "no number"]
    assert [percent(v) for v in (0.5, 0.00049, 0.0005, -0.25)] == [
        "50\xa0%", "<\xa00.1\xa0%", "0.1\xa0%", "−25\xa0%"
    ]  # fmt: skip


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.9), (5, 5), (0, 0), (1e-9, 3e-9), (-2, -1)])
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = nice_ticks(low, high, 4)
    steps = np.diff(ticks)
    assert 2 <= len(ticks) <= 7 and np.allclose(steps, steps[0]) and steps[0] > 0
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    mantissa = steps[0] / 10.0 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - each) for each in (1, 2, 2.5, 5, 10)) < 1e-6


def test_a_histogram_is_drawn_to_scale():
    counts = [0] * 64
    counts[3], counts[8], counts[55], counts[60] = 1, 2, 4, 1
    chart = histogram_chart(
        Histogram("weight", "w", 8, -1.0, 3.0, "steps", tuple(counts), 0.1, 0.1, 0.1), 8
    )
    base, unit = chart.base, report_charts.HISTOGRAM_HEIGHT / 4
    assert (chart.low, chart.high, chart.width) == (32, 224, 256)
    assert chart.below.startswith(f"M0 {base}V{base}H4H8H12V{base - unit:g}H16V{base}")
    assert f"M32 {base}V{base - 2 * unit:g}H36" in chart.inside
    assert chart.inside.endswith(f"H220V{base - 4 * unit:g}H224V{base}Z")
    assert [(t.position, t.label) for t in chart.ticks] == [
        (32, "−1"), (80.0, "0"), (224, "3\xa0steps")
    ]  # fmt: skip
    empty = histogram_chart(Histogram("weight", "w", 8, 0.0, 1.0, "", (0,) * 64, 1.0, 0, 0), 8)
    assert empty.below == empty.inside == empty.above == ""


def test_curves_are_drawn_to_scale():
    series = {"training": [0.0, 1.0, math.nan, 0.5], "validation": [0.5, 1.0]}
    chart = panel("loss", series)
    left, right, top, base = chart.left, chart.right, chart.top, chart.base
    training, validation = chart.curves
    assert training.points[:2] == ((left, base), (round(left + (right - left) / 3, 1), top))
    assert training.path.count("M") == 2  # what is no number leaves a gap
    assert [x for x, _ in validation.points] == [round(left + (right - left) / 3, 1), right]
    assert (training.label, validation.label) == ("0.5", "1")
    assert abs(training.end[1] - validation.end[1]) >= report_charts.LABEL_DISTANCE
    assert chart.summary == (
        "loss over 4 epochs: training from 0 to 0.5 (lowest 0, highest 1); "
        "validation from 0.5 to 1 (lowest 0.5, highest 1)."
    )
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "3", "4"]
    alone = panel("loss", {"training": [2.0], "validation": [math.nan]})
    assert len(alone.curves) == 1 and alone.curves[0].points[0][0] == (left + right) / 2
    same = panel("loss", {"training": [1.0] * 30, "validation": [1.0] * 30})
    assert not same.curves[0].points  # too many to mark each
    heights = sorted(curve.end[1] for curve in same.curves)
    assert heights[1] - heights[0] >= report_charts.LABEL_DISTANCE
    assert [tick.label for tick in same.x_ticks] == ["1", "10", "20", "30"]
    low = panel("loss", {"a": [0.0, 0.0], "b": [5.0, 0.0]})
    assert max(curve.end[1] for curve in low.curves) < low.base


def test_figures_of_many_layers_share_a_panel():
    names = [f"compression/sparsity/layer_{index}" for index in range(6)]
    history = {name: [0.0, 0.1 * index] for index, name in enumerate(names)}
    history |= {"compression/sparsity": [0.0, 0.25], "compression/level/magnitude": [0.5, 0.5]}
    (whole, layers) = report_page._panels(history)
    assert (whole.title, layers.title) == ("sparsity", "sparsity of each layer")
    assert len(layers.curves) == 6
    assert [curve.label for curve in layers.curves if curve.end] == ["0", "0.5"]
    assert "6 layers over 2 epochs: in the end from 0 (layer_0) to 0.5 (layer_5)" in layers.summary
    assert report_page._constants(history) == ["level, magnitude 0.5"]
    same = {name: [0.5] for name in names}
    assert len(report_page._panels(same)) == 1 and not report_page._constants(same)


def test_what_became_worse_is_said():
    tile = report_page._cost_tile("Latency", " ms", "faster", {"float": 1.0, "IR": 2.0})
    assert tile["headline"] == "2.0× slower" and [b["share"] for b in tile["bars"]] == [
        "50.0", "100.0"
    ]  # fmt: skip
    tile = report_page._cost_tile("FLOPs", "", "fewer", {"float": 30.0, "compressed": 1.0})
    assert tile["headline"] == "30× fewer"
    tile = report_page._metric_tile("mae", {"float": 2.0, "compressed": 2.5})
    assert (tile["headline"], tile["note"]) == ("2.5", "+0.5 to float")
    tile = report_page._metric_tile("accuracy", {"float": 0.9, "IR": 0.875})
    assert (tile["headline"], tile["note"]) == ("87.5\xa0%", "−2.5 points to float")


# In a browser


def browser_path():
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


@pytest.fixture(scope="module")
def browser():
    """A running Chromium, or a skip that says what to install."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("needs playwright: pip install playwright")
    path = browser_path()
    if path is None:
        pytest.skip("needs Chromium or Chrome on PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


# Contrast of every text with what is behind it, and the luminance of the page itself.
CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => {
    const [r, g, b] = channels(color).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if ((channels(color)[3] ?? 1) === 1) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("title")) continue;
    const style = getComputedStyle(element);
    const front = luminance(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
    const back = luminance(behind(element));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    found.push([ratio, element.className.toString() + " " + walker.currentNode.data.slice(0, 40)]);
  }
  return {texts: found, page: luminance(behind(document.body))};
}"""


def opened(browser, path, setting):
    """Return (page, messages of the console, requests) of a file opened without a network."""
    width, height, scheme = SETTINGS[setting]
    size = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
    page = context.new_page()
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    return page, messages, requests


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_a_browser(browser, rich, tmp_path, setting):
    path = tmp_path / "report.html"
    rich.save(path)
    page, messages, requests = opened(browser, path, setting)
    assert (messages, requests) == ([], [path.as_uri()])
    shots = pathlib.Path(os.environ.get("KERAS_COMPRESS_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=shots / f"report-{setting}.png", full_page=True)
    page.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    too_wide = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('thead') && "
        "e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert too_wide == 0
    measured = page.evaluate(CONTRASTS)
    assert len(measured["texts"]) > 200
    assert not [each for each in measured["texts"] if each[0] < 4.5]
    assert measured["page"] < 0.05 if setting == "dark" else measured["page"] > 0.8
    images = page.get_by_role("img").all()
    assert len(images) == page.locator("svg").count() > len(rich.histograms)
    assert all(image.get_attribute("aria-label") for image in images)


def test_tables_are_tables_and_focus_is_seen_on_a_phone(browser, rich, tmp_path):
    """Cards are still rows of a table to assistive technology."""
    path = tmp_path / "report.html"
    rich.save(path)
    page, *_ = opened(browser, path, "narrow")
    stem = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="stem"))
    assert stem.first.get_by_role("cell").count() >= 5
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert outline == "3px"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"


def test_all_is_printed_on_white(browser, rich, tmp_path):
    path = tmp_path / "report.html"
    rich.save(path)
    page, *_ = opened(browser, path, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(CONTRASTS)["page"] > 0.8
    assert page.locator("nav").is_hidden()
    folded = page.locator("details tbody tr").first
    assert folded.bounding_box()["height"] > 0 and folded.is_visible()


def test_the_page_says_why_nothing_is_suggested(tmp_path):
    found = stub(["stem", "scores"])
    found.suggestion, found.note = None, "Nothing to suggest: <all> is needed."
    kc.report(network(), sensitivity=found).save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Nothing to suggest: &lt;all&gt; is needed." in text
