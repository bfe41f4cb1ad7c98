"""Do sparse weights run faster on OpenVINO's CPU plugin, and are their files smaller?

    python benchmarks/sparse_latency.py

A model of Dense layers is exported in float and in int8, dense and with the smallest weights set to
zero. The plugin keeps the weights of a fully connected layer packed, and unpacks them as it
computes, where their share of zeros reaches CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE; 1 switches that
off. The plugin's source asks for AMX too. One call of each compiled model is timed in turn, by the
CPU time of the process too, which other work on the machine disturbs less.
"""

import pathlib
import re
import tempfile
import time
import zipfile
from typing import Annotated

import keras
import numpy as np
import openvino as ov
import typer
from rich import box, print
from rich.table import Table

import keras_compress as kc
from keras_compress import sparsity
from keras_compress.export.benchmark import prepared_request

RATE = "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8")
QUANTIZED = {"compression": {"algorithm": "quantization"}}


def dense_model(units, depth, level):
    """Return a model of Dense layers whose smallest weights, `level` of each kernel, are zero."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((units,))
    for _ in range(depth):
        x = keras.layers.Dense(units, activation="relu")(x)
    model = keras.Model(inputs, x)
    for layer in model.layers[1:]:
        kernel = layer.kernel.numpy()
        (mask,) = sparsity.smallest([kernel], level, "abs")
        layer.kernel.assign(kernel * mask)
    return model


def export(units, depth, level, int8, folder):
    """Return the path of an exported model."""
    model = dense_model(units, depth, level)
    if int8:
        data = np.random.default_rng(0).normal(size=(64, units)).astype("float32")
        model = kc.strip(kc.compress_model(model, QUANTIZED, data=data, verbose=False))
    path = pathlib.Path(folder, f"{'int8' if int8 else 'float'}_{level}.xml")
    kc.export(model, path, verify=False)
    return path


def zipped_bytes(path):
    """Return the bytes of an IR, both files, in a zip archive, which is left beside them."""
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for part in (path, path.with_suffix(".bin")):
            files.write(part, part.name)
    return archive.stat().st_size


def primitives(compiled):
    """Return the names of what computes the fully connected layers, each once."""
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    names = {
        str(info["primitiveType"].value)
        for info in infos
        if str(info["layerType"].value) in ("FullyConnected", "MatMul")
    }
    return ", ".join(sorted(names))


def interleaved(models, batch_size, calls, warm_up=10):
    """Return milliseconds, wall and CPU `(2, calls, models)`: one call of each in turn."""
    runs = [prepared_request(model, batch_size).infer for model in models]
    times = np.empty((2, calls, len(runs)))
    for call in range(-warm_up, calls):
        for index, run in enumerate(runs):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if call >= 0:
                seconds = time.perf_counter() - wall, time.process_time() - cpu
                times[:, call, index] = 1e3 * np.array(seconds)
    return times


def processor():
    """Return the name of the processor, and which of the features in question it has."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)[1].split())
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)[1]
    has = ", ".join(feature for feature in FEATURES if feature in flags)
    lacks = ", ".join(feature for feature in FEATURES if feature not in flags)
    return f"{name}; has {has or 'none'}; lacks {lacks or 'none'}"


def main(
    units: Annotated[int, typer.Option(help="Inputs and outputs of every layer.")] = 2048,
    depth: Annotated[int, typer.Option(help="Number of layers.")] = 3,
    levels: Annotated[list[float] | None, typer.Option("--level", help="Sparsity.")] = None,
    rates: Annotated[list[float] | None, typer.Option("--rate", help=RATE)] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per call.")] = 1,
    calls: Annotated[int, typer.Option(help="Measured calls of each model.")] = 100,
    threads: Annotated[int, typer.Option(help="Threads per call; 0: the runtime chooses.")] = 1,
):
    """Export, compile with every rate, time in turn and print."""
    levels, rates = levels or [0.0, 0.8, 0.9, 0.95], rates or [1.0, 0.8, 0.5]
    core = ov.Core()
    print(f"OpenVINO {ov.__version__} on {processor()}")
    columns = ("model", "rate", "primitive", "median ms", "shortest ms", "CPU ms", "CPU / dense")
    with tempfile.TemporaryDirectory() as folder:
        for int8 in (False, True):
            paths = [export(units, depth, level, int8, folder) for level in levels]
            zipped = {path: zipped_bytes(path) for path in paths}
            cases = [(path, rate) for path in paths for rate in rates]
            options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
            models = [core.compile_model(p, "CPU", options | {RATE: r}) for p, r in cases]
            wall, cpu = interleaved(models, batch_size, calls)
            middle = np.median(cpu, axis=0)
            table = Table(*columns, ".bin, MB", "zipped, MB", box=box.SIMPLE)
            for index, ((path, _), model) in enumerate(zip(cases, models, strict=True)):
                table.add_row(
                    path.stem,
                    f"{model.get_property(RATE):g}",
                    primitives(model),
                    f"{np.median(wall[:, index]):.3f}",
                    f"{wall[:, index].min():.3f}",
                    f"{middle[index]:.3f}",
                    f"{middle[index] / middle[0]:.3f}",
                    f"{path.with_suffix('.bin').stat().st_size / 1e6:.2f}",
                    f"{zipped[path] / 1e6:.2f}",
                )
            size = f"{depth} layers of {units} x {units}, batch {batch_size}"
            print(f"{size}, {calls} calls of each, threads: {threads or 'auto'}")
            print(table)


if __name__ == "__main__":
    typer.run(main)
