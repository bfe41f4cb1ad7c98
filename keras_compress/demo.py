"""The demo: a small network on scikit-learn's digits, from float training to a verified int8 IR."""

import pathlib
import time

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_compress.callbacks import Compress, ExportIR, Statistics
from keras_compress.compress import compress_model
from keras_compress.export import benchmark, export, verify
from keras_compress.export.verify import compile_on_cpu

CONFIG = {"target_device": "CPU", "compression": {"algorithm": "quantization"}}
BATCH = 64


def load_digits():
    """Return (images `(n, 8, 8, 1)` in [0, 1], classes `(n,)`) to train, validate and test with.

    The validation images choose the epoch that is exported; the test images choose nothing.
    """
    from sklearn.datasets import load_digits as read

    digits = read()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype("float32")
    parts = [slice(0, 1200), slice(1200, 1350), slice(1350, None)]
    return tuple((images[part], digits.target[order][part]) for part in parts)


def digits_network():
    """Return a convolutional network with batch norm and a residual add, ten logits."""

    def block(x, filters, strides=1, activation=True):
        x = keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        return keras.layers.ReLU()(x) if activation else x

    inputs = keras.Input((8, 8, 1), name="image")
    x = shortcut = block(inputs, 64)
    x = block(block(x, 64), 64, activation=False)
    x = keras.layers.ReLU()(keras.layers.Add()([x, shortcut]))
    x = block(x, 128, strides=2)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="digit")(x), name="digits")


def train(model, data, validation, epochs, rate, callbacks=()):
    """Compile and fit with Adam and a cosine schedule."""
    steps = epochs * -(-len(data[0]) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        *data, BATCH, epochs, verbose=0, validation_data=validation, callbacks=list(callbacks)
    )


def ir_classes(path, images):
    """Return the classes an IR predicts."""
    import openvino as ov

    return compile_on_cpu(ov.Core(), path)(images)[0].argmax(axis=1)


def run_demo(out, epochs=8, fine_tuning=3, console=None):
    """Run the whole path, print one table, and return what did not come out as promised.

    Args:
        out: folder for the IRs; it is made.
        epochs: epochs of training in float.
        fine_tuning: epochs of training in int8.
        console: where to print.

    Returns:
        List of sentences, empty when every check passed: the int8 IR predicts the trained model's
        class on every test image, accuracy is within 0.5 points of float, the int8 `.bin` is at
        most 0.30 of the float one, and every layer with weights runs in 8 bits.
    """
    console = console or Console()
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    seconds = {}

    def timed(stage, function, *arguments, **options):
        start = time.perf_counter()
        with console.status(stage):
            result = function(*arguments, **options)
        seconds[stage] = time.perf_counter() - start
        return result

    fit_on, validation, test = load_digits()
    model = digits_network()
    timed("train float", train, model, fit_on, validation, epochs, 2e-3)
    float_ir, int8_ir = out / "float.xml", out / "int8.xml"
    timed("export float", export, model, float_ir, verify=False)
    compressed = timed("compress", compress_model, model, CONFIG, data=fit_on[0], verbose=False)
    best = out / "int8.keras"
    callbacks = [
        Compress(),
        Statistics(),
        ExportIR(int8_ir, monitor="val_accuracy", verify=False),
        keras.callbacks.ModelCheckpoint(best, monitor="val_accuracy", save_best_only=True),
    ]
    timed("fine-tune", train, compressed, fit_on, validation, fine_tuning, 2e-4, callbacks)
    trained = keras.models.load_model(best, compile=False)
    report = timed("verify", verify, trained, int8_ir, data=test[0], samples=len(test[0]))
    latencies = timed("measure latency", benchmark, [float_ir, int8_ir], calls=500).latencies

    classes = {
        "float": model.predict(test[0], verbose=0).argmax(axis=1),
        "trained int8": trained.predict(test[0], verbose=0).argmax(axis=1),
        "IR float": ir_classes(float_ir, test[0]),
        "IR int8": ir_classes(int8_ir, test[0]),
    }
    accuracy = {name: float(np.mean(found == test[1])) for name, found in classes.items()}
    sizes = [_sizes(path) for path in (float_ir, int8_ir)]
    console.print(_table(accuracy, sizes, latencies, report, seconds))
    console.print(f"In {out}: float.xml and int8.xml (OpenVINO IR), int8.keras (to train on)")
    same = int(np.sum(classes["trained int8"] == classes["IR int8"]))
    return _problems(accuracy, sizes, report, same, len(test[1]))


def _sizes(path):
    """Return the bytes of (.xml, .bin)."""
    return tuple(path.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))


def _table(accuracy, sizes, latencies, report, seconds):
    table = Table("", "float", "int8", "int8 / float", title="digits", title_justify="left")
    trained, deployed = ("float", "trained int8"), ("IR float", "IR int8")
    table.add_row("accuracy, trained model", *(f"{accuracy[name]:.2%}" for name in trained))
    table.add_row("accuracy, IR", *(f"{accuracy[name]:.2%}" for name in deployed))
    for index, suffix in enumerate((".xml", ".bin")):
        plain, small = (size[index] for size in sizes)
        table.add_row(f"{suffix}, bytes", f"{plain:,}", f"{small:,}", f"{small / plain:.3f}")
    plain, small = (latency.median for latency in latencies)
    table.add_row("latency, ms per image", f"{plain:.3f}", f"{small:.3f}", f"{small / plain:.2f}")
    bits = f"{report.eight_bit_layers} of {len(report.layers)}"
    table.add_row("layers in 8 bits", "", bits)
    table.add_row("largest IR difference", "", f"{report.relative:.1e} of range", end_section=True)
    for stage, duration in seconds.items():
        table.add_row(f"seconds: {stage}", "", "", f"{duration:.1f}")
    table.add_row("seconds: all stages", "", "", f"{sum(seconds.values()):.1f}")
    return table


def _problems(accuracy, sizes, report, same, total):
    """Return a sentence for every promise that was not kept."""
    drop = accuracy["float"] - accuracy["IR int8"]
    ratio = sizes[1][1] / sizes[0][1]
    checks = {
        f"the int8 IR and the trained model agree on {same} of {total} images": same == total,
        f"the int8 IR loses {drop:.2%} accuracy, more than 0.5 points": drop <= 0.005,
        f"the int8 .bin is {ratio:.3f} of the float one, more than 0.30": ratio <= 0.30,
        f"{report.eight_bit_layers} of {len(report.layers)} layers run in 8 bits": (
            report.eight_bit_layers == len(report.layers)
        ),
    }
    return [sentence for sentence, kept in checks.items() if not kept]
