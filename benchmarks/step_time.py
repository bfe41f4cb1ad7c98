"""Cost of a quantized training step, alone and with a teacher, as ratios to the float step.

    python benchmarks/step_time.py [--blocks 15] [--steps 4]

The models live in one process; blocks of steps alternate between them, and CPU time (all threads
of the process) and wall time are compared block by block. Peak memory is that of a process of its
own per variant, after four steps (Linux).
"""

import concurrent.futures
import multiprocessing
import pathlib
import re
import statistics
import sys
import time

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

BATCH = 64
NETWORKS = {"ResNet-20, 32x32": 32, "MobileNetV2 0.5, 96x96": 96}
INT8 = {"algorithm": "quantization"}
TEACHER = {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 4}
VARIANTS = {"float": None, "int8": [INT8], "int8, distilled": [INT8, TEACHER]}


def compiled(network, variant):
    """Return (model ready to train, inputs, labels)."""
    import keras
    import numpy as np

    import keras_compress as kc

    size = NETWORKS[network]
    rng = np.random.default_rng(0)
    data = rng.normal(size=(BATCH, size, size, 3)).astype("float32")
    labels = rng.integers(0, 10, BATCH)
    if network.startswith("ResNet"):
        from cifar10_resnet20 import resnet20

        model = resnet20()
    else:
        model = keras.applications.MobileNetV2(
            (size, size, 3), alpha=0.5, weights=None, classes=10, classifier_activation=None
        )
    if VARIANTS[variant]:
        config = {"compression": VARIANTS[variant]}
        model = kc.compress_model(model, config, data=data, verbose=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss)
    return model, data, labels


def block(model, data, labels, steps):
    """Return (CPU seconds, wall seconds) per step of a block."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        model.train_on_batch(data, labels)
    return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps


def time_ratios(network, blocks, steps):
    """Return {variant: its ratios (CPU, wall) to float}: medians over blocks in turn."""
    models = {variant: compiled(network, variant) for variant in VARIANTS}
    for model in models.values():
        block(*model, 2)  # traces
    times = [{name: block(*model, steps) for name, model in models.items()} for _ in range(blocks)]
    return {
        name: [
            statistics.median(turn[name][i] / turn["float"][i] for turn in times) for i in (0, 1)
        ]
        for name in VARIANTS
        if name != "float"
    }


def peak_memory(network, variant):
    """Return the peak resident memory of this process after four steps, in KiB."""
    block(*compiled(network, variant), 4)
    # Not `getrusage`: its peak is inherited from the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1))


def memory_of(network, variant):
    """Return the peak memory of a variant, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(peak_memory, network, variant).result()


def main(blocks: int = 15, steps: int = 4, threads: int = 0):
    """Measure and print, on the backend that `KERAS_BACKEND` names; `threads` is TensorFlow's."""
    if threads:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    table = Table("network", "training", "CPU time", "wall time", "peak memory")
    for network in NETWORKS:
        plain = memory_of(network, "float")
        for variant, (cpu, wall) in time_ratios(network, blocks, steps).items():
            memory = memory_of(network, variant) / plain
            table.add_row(network, variant, f"{cpu:.3f}", f"{wall:.3f}", f"{memory:.3f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
