"""Cost of magnitude masks: of setting them, and of training between two updates.

    python benchmarks/sparse_masks.py [--millions 100] [--blocks 9] [--steps 2]

Time and memory of an update are measured in a process of its own. The memory is the peak above what
was resident before, over the bytes of the weights (Linux). The step is that of ResNet50, masked
against float, in blocks that alternate in one process as in `step_time.py`.
"""

import concurrent.futures
import multiprocessing
import pathlib
import re
import statistics
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from step_time import block

LEVEL = 0.8
LAYERS = 4  # that the weights are spread over
IMAGE, CLASSES = 96, 10
STATUS = pathlib.Path("/proc/self/status")


def resident(key):
    """Return VmRSS or VmHWM, the peak, of this process in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", STATUS.read_text()).group(1))


def measured(function, size):
    """Return (wall seconds, CPU seconds, peak memory on top / size) of one call."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return *seconds, (resident("VmHWM") - before) / size


def selection(millions):
    """Measure `sparsity.smallest` on arrays."""
    import numpy as np

    from keras_compress import sparsity

    random = np.random.default_rng(0)
    count = int(millions * 1e6 / LAYERS)
    weights = [random.standard_normal(count, "float32") for _ in range(LAYERS)]
    size = sum(weight.nbytes for weight in weights)
    return measured(lambda: sparsity.smallest(weights, LEVEL, "normed_abs"), size)


def update(millions):
    """Measure `set_magnitude_masks` on the weights of a compressed Keras model."""
    import keras

    import keras_compress as kc
    from keras_compress.algorithms.magnitude_sparsity import set_magnitude_masks

    units = int((millions * 1e6 / LAYERS) ** 0.5)
    x = inputs = keras.Input((units,))
    for _ in range(LAYERS):
        x = keras.layers.Dense(units, use_bias=False)(x)
    model = keras.Model(inputs, x)
    config = {"compression": masks_at_once()}
    model = kc.compress_model(model, config, verbose=False)
    (algorithm,) = model.config.algorithms
    masked = algorithm.masked(model)
    size = 4 * sum(entry.mask.mask_values().size for entry in masked)
    return measured(lambda: set_magnitude_masks(algorithm.params, masked, LEVEL), size)


def masks_at_once():
    """Return the algorithm with its final masks from the start."""
    return {
        "algorithm": "magnitude_sparsity",
        "sparsity_init": LEVEL,
        "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}},
        "params": {"sparsity_target": LEVEL, "sparsity_target_epoch": 1},
    }


def in_own_process(function, *arguments):
    """Return what a function returns in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def compiled(masked, batch):
    """Return (ResNet50 ready to train, inputs, labels)."""
    import keras
    import numpy as np

    import keras_compress as kc

    random = np.random.default_rng(0)
    data = random.normal(size=(batch, IMAGE, IMAGE, 3)).astype("float32")
    shape = (IMAGE, IMAGE, 3)
    model = keras.applications.ResNet50(weights=None, input_shape=shape, classes=CLASSES)
    if masked:
        model = kc.compress_model(model, {"compression": masks_at_once()}, verbose=False)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "sparse_categorical_crossentropy")
    return model, data, random.integers(0, CLASSES, batch)


def step_ratios(blocks, steps, batch):
    """Return the ratios (CPU, wall) masked / float: medians over pairs of blocks, and all pairs."""
    models = [compiled(masked, batch) for masked in (False, True)]
    for model in models:
        block(*model, 2)  # traces
    times = [[block(*model, steps) for model in models] for _ in range(blocks)]
    ratios = [[masked[i] / plain[i] for plain, masked in times] for i in (0, 1)]
    return [(statistics.median(r), min(r), max(r)) for r in ratios]


def main(
    millions: Annotated[float, typer.Option(help="Weights that are masked, in millions.")] = 100,
    repeats: Annotated[int, typer.Option(help="Fresh processes per update.")] = 3,
    blocks: Annotated[int, typer.Option(help="Pairs of blocks of training steps.")] = 9,
    steps: Annotated[int, typer.Option(help="Steps in a block.")] = 2,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 16,
):
    """Measure and print."""
    console = Console()
    table = Table("update", "wall, s", "CPU, s", "memory on top / weights")
    for function in (selection, update):
        runs = [in_own_process(function, millions) for _ in range(repeats)]
        wall, cpu, memory = (statistics.median(values) for values in zip(*runs, strict=True))
        what = function.__doc__.split("`")[1]
        table.add_row(what, f"{wall:.2f}", f"{cpu:.2f}", f"{memory:.2f}")
    console.print(f"{millions:g} million weights, level {LEVEL}, medians of {repeats}")
    console.print(table)
    table = Table("masked / float", "median", "smallest", "largest")
    for name, ratios in zip(("CPU", "wall"), step_ratios(blocks, steps, batch), strict=True):
        table.add_row(f"{name} time of a step", *(f"{ratio:.3f}" for ratio in ratios))
    console.print(f"ResNet50, {IMAGE}x{IMAGE}, batch {batch}, {blocks} pairs of {steps} steps")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
