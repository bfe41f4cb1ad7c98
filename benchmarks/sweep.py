"""Every architecture through the whole way: trace, compress, train, save, strip, export, verify.

    python benchmarks/sweep.py [--only ResNet50,MobileNet] [--write docs/coverage.md]

Each architecture of `keras.applications` (random weights, small images) and some backbones of
keras-hub run in a process of their own; `zoo.py` makes them. Results are kept beside the page, in
a JSON file, so that `--only` replaces single rows.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib
import tempfile
import time

import typer
import zoo
from rich.console import Console
from rich.progress import track

CONFIG = {
    "target_device": "CPU",
    "compression": {
        "algorithm": "quantization",
        "initializer": {
            "range": {"num_init_samples": 8},
            "batchnorm_adaptation": {"num_bn_adaptation_samples": 8},
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured on one architecture.

    Attributes:
        name: of the architecture.
        trace: largest difference of the traced model's output from the original's, of its size.
        quantizers: activation quantizers.
        loss: of the one training step.
        save, strip: largest difference of the output after save and load, and after `strip`.
        ir: largest difference of the IR's output from the trained model's, as a share of its range.
        moved: the same between the trained model and itself, its float inputs (or, where it has
            none, its biases and normalizations) moved by 1e-6.
        layers, nncf_layers: (operations that run in 8 bits, all weighted) of our IR and of NNCF's.
        share, nncf_share: share of their FLOPs that runs in 8 bits.
        untouched: {reason: share of the FLOPs} of what the plan leaves in float.
        seconds: of plan and compression, without calibration.
        error: why there is no result, where there is none.
    """

    name: str
    trace: float = float("nan")
    quantizers: int = 0
    loss: float = float("nan")
    save: float = float("nan")
    strip: float = float("nan")
    ir: float = float("nan")
    moved: float = float("nan")
    layers: tuple = (0, 0)
    nncf_layers: tuple = (0, 0)
    share: float = 0.0
    nncf_share: float = 0.0
    untouched: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""


def measure(name):
    """Return the `Row` of one architecture."""
    import keras

    import keras_compress as kc
    from keras_compress.graph.rebuild import rebuild
    from keras_compress.graph.trace import trace

    model, data = zoo.make(name)
    expected = outputs(model, data)
    start = time.perf_counter()
    compressed = kc.compress_model(model, CONFIG, verbose=False)
    seconds = time.perf_counter() - start
    row = {
        "name": name,
        "seconds": seconds,
        "trace": difference(expected, outputs(rebuild(trace(model)), data)),
        "quantizers": len(compressed.plan["edges"]),
        "untouched": reasons(compressed.plan["untouched"]),
    }
    compressed = kc.compress_model(model, CONFIG, data=data, verbose=False)
    compressed.compile(keras.optimizers.SGD(1e-4), "mse")
    logs = compressed.train_on_batch(data, targets(expected, compressed), return_dict=True)
    row["loss"] = float(logs["loss"])
    trained = outputs(compressed, data)
    row["moved"] = difference(trained, moved_outputs(compressed, data), ranges=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        compressed.save(folder / "saved.keras")
        loaded = keras.models.load_model(folder / "saved.keras")
        row["save"] = difference(trained, outputs(loaded, data))
        stripped = kc.strip(compressed)
        row["strip"] = difference(trained, outputs(stripped, data))
        del loaded, stripped
        kc.export(compressed, folder / "int8.xml", verify=False)
        report = kc.verify(compressed, folder / "int8.xml", data=data)
        row |= {"ir": report.relative, "layers": counted(report.layers)}
        row["share"] = report.eight_bit_share
        kc.export(model, folder / "float.xml", verify=False)
        row |= post_training(folder, data)
    return Row(**row)


def post_training(folder, data):
    """Return the counts of the IR that NNCF makes of the float IR."""
    import keras
    import nncf
    import numpy as np
    import openvino as ov

    from keras_compress.export.precisions import eight_bit_share, layer_precisions
    from keras_compress.export.verify import compile_on_cpu

    float_ir = ov.Core().read_model(folder / "float.xml")
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(data)]
    samples = [[leaf[i : i + 1] for leaf in leaves] for i in range(len(leaves[0]))]
    dataset = nncf.Dataset(samples, lambda sample: dict(enumerate(sample)))
    ov.save_model(nncf.quantize(float_ir, dataset, subset_size=2), folder / "nncf.xml")
    layers = layer_precisions(compile_on_cpu(ov.Core(), folder / "nncf.xml"))
    return {"nncf_layers": counted(layers), "nncf_share": eight_bit_share(layers)}


def counted(layers):
    """Return (operations in 8 bits, all weighted operations)."""
    return sum(layer.eight_bit for layer in layers), len(layers)


def outputs(model, data):
    """Return the model's outputs at inference as a flat list of NumPy arrays."""
    import keras

    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, data)
    return [
        keras.ops.convert_to_numpy(leaf)
        for leaf in keras.tree.flatten(model(tensors, training=False))
    ]


def targets(expected, model):
    """Return the float model's outputs in the structure that the compressed model trains on."""
    import keras

    return keras.tree.pack_sequence_as(model.output, expected)


def moved_outputs(model, data):
    """Return the outputs when float inputs, or else float vectors, move by a millionth."""
    import keras
    import numpy as np

    random = np.random.default_rng(1)

    def move(values):
        noise = random.uniform(-1e-6, 1e-6, values.shape) * np.abs(values).max()
        return (values + noise).astype(values.dtype)

    def is_float(values):
        return np.issubdtype(values.dtype, np.floating)

    if any(map(is_float, keras.tree.flatten(data))):
        moved = keras.tree.map_structure(lambda v: move(v) if is_float(v) else v, data)
        return outputs(model, moved)
    rounding = {id(v) for quantizer in model.quantizers() for v in quantizer.variables}
    vectors = [v for v in model.weights if len(v.shape) == 1 and id(v) not in rounding]
    before = [v.numpy() for v in vectors]
    for variable, values in zip(vectors, before, strict=True):
        variable.assign(move(values))
    result = outputs(model, data)
    for variable, values in zip(vectors, before, strict=True):
        variable.assign(values)
    return result


def difference(expected, received, ranges=False):
    """Return the largest difference over all outputs, of their largest magnitude or range."""
    import numpy as np

    sizes = [np.ptp(a) if ranges else np.abs(a).max() for a in expected]
    pairs = zip(expected, received, sizes, strict=True)
    return max(float(np.abs(a - b).max() / (size or 1.0)) for a, b, size in pairs)


def reasons(untouched):
    """Sum the shares of the plan's float operations by reason."""
    shares = {}
    for entry in untouched:
        shares[entry["reason"]] = shares.get(entry["reason"], 0.0) + entry["share"]
    return {reason: share for reason, share in shares.items() if share >= 5e-4}


def measured(name):
    """Return the row of an architecture as a dict, or what went wrong; runs in a child process."""
    try:
        return dataclasses.asdict(measure(name))
    except Exception as error:  # one architecture must not end the sweep
        text = str(error).strip().splitlines() or [""]
        return dataclasses.asdict(Row(name, error=f"{type(error).__name__}: {text[0][:200]}"))


def measure_in_child(name):
    """Return the `Row` of an architecture, measured in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return Row(**pool.submit(measured, name).result())


def page(rows):
    """Return docs/coverage.md."""
    head = pathlib.Path(__file__).with_name("sweep_head.md").read_text()
    lines = [
        "| architecture | traced | FLOPs in 8 bits | by NNCF | layers in 8 bits | by NNCF "
        "| activation quantizers | IR − trained | trained, moved by 1e-6 | seconds "
        "| left in float |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.name} | {row.error} |" + " |" * 9)
            continue
        left = "; ".join(f"{reason} ({share:.1%})" for reason, share in row.untouched.items())
        lines.append(
            f"| {row.name} | {row.trace:.0e} | {row.share:.2%} | {row.nncf_share:.2%} "
            f"| {row.layers[0]}/{row.layers[1]} | {row.nncf_layers[0]}/{row.nncf_layers[1]} "
            f"| {row.quantizers} | {row.ir:.1e} | {row.moved:.1e} | {row.seconds:.1f} | {left} |"
        )
    missing = [name for name in zoo.NAMES if name not in {row.name for row in rows}]
    note = f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""
    return head + "\n".join(lines) + "\n" + note


def main(only: str = "", write: pathlib.Path = pathlib.Path("docs/coverage.md")):
    """Measure and write the page."""
    kept = write.with_suffix(".json")
    known = json.loads(kept.read_text()) if kept.exists() else {}
    names = only.split(",") if only else list(zoo.NAMES)
    console = Console()
    for name in track(names, console=console):
        known[name] = dataclasses.asdict(measure_in_child(name))
        console.print(known[name])
        rows = [Row(**known[other]) for other in zoo.NAMES if other in known]
        kept.write_text(json.dumps({row.name: dataclasses.asdict(row) for row in rows}, indent=1))
        write.write_text(page(rows))


if __name__ == "__main__":
    typer.run(main)
