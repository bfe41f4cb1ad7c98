"""Trains a compressed network on scikit-learn's digits by two replicas, and by one device alone.

    python examples/distributed.py --engine mirrored
    python examples/distributed.py --engine multi-worker
    python examples/distributed.py --engine data-parallel
    python examples/distributed.py --engine model-parallel
    python examples/distributed.py --engine ddp

Both trainings see the same batches; the table says how far apart they end. Two devices are made of
the processor, two workers are two processes. Needs no download; `data-parallel` and
`model-parallel` need JAX, `ddp` needs torch. Keras must not have been imported before.
"""

import contextlib
import enum
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

BATCH = 64  # of both replicas together
CONFIG = {
    "compression": [
        {
            "algorithm": "filter_pruning",
            "params": {"pruning_target": 0.4, "pruning_steps": 2, "prune_first_conv": True},
        },
        {
            "algorithm": "magnitude_sparsity",
            "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 2},
        },
        {"algorithm": "quantization"},
    ]
}


class Engine(enum.StrEnum):
    """What computes on several devices."""

    mirrored = "mirrored"
    multi_worker = "multi-worker"
    data_parallel = "data-parallel"
    model_parallel = "model-parallel"
    ddp = "ddp"


def network():
    """Returns a small network; its batch normalization is over the whole batch."""
    import keras
    from keras import layers

    # On JAX that is so anyway. On TensorFlow, each replica would take statistics of its own.
    options = {"synchronized": True} if keras.backend.backend() == "tensorflow" else {}
    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(16, 3, use_bias=False, name="first")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm", **options)(x))
    x = layers.Conv2D(32, 3, activation="relu", name="second")(x)
    x = layers.Flatten(name="flat")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x), name="digits")


def compressed(samples):
    """Returns a compressed model, compiled."""
    import keras

    import keras_compress as kc

    keras.utils.set_random_seed(0)
    model = kc.compress_model(network(), CONFIG, data=samples, verbose=False)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def fit(model, data, epochs):
    """Trains by `fit`."""
    import keras_compress as kc

    options = {"batch_size": BATCH, "epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(*data, callbacks=[kc.callbacks.Compress()], **options)


# --8<-- [start:loop]
def step_by_hand(model, strategy):
    """Returns a function of a distributed batch that trains on it and returns the loss."""
    import tensorflow as tf

    def of_one_replica(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    def train_step(x, y):
        losses = strategy.run(of_one_replica, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    return train_step


def train_by_hand(model, strategy, batches, steps_per_epoch):
    """Trains without `fit`, which Keras 3 lacks for `MultiWorkerMirroredStrategy`.

    `batches` is a distributed dataset of pairs. Returns the loss of every step.
    """
    import tensorflow as tf

    import keras_compress as kc

    train_step = step_by_hand(model, strategy)
    compiled_step = tf.function(train_step)
    history = []
    with strategy.scope():
        for step, (x, y) in enumerate(batches):
            observing = kc.step(model, step, steps_per_epoch)
            loss = train_step(x, y) if observing else compiled_step(x, y)
            history.append(float(loss))
        kc.finish(model, len(history))
    return history


# --8<-- [end:loop]


def mirrored(data, epochs):
    """Trains by `MirroredStrategy`, on two logical devices."""
    import tensorflow as tf

    processor = tf.config.list_physical_devices("CPU")[0]
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(processor, [device, device])
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = compressed(data[0])
    fit(model, data, epochs)
    return model


def multi_worker(data, epochs):
    """Trains by `MultiWorkerMirroredStrategy`; the environment says which worker this is."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # before anything is computed
    with strategy.scope():
        model = compressed(data[0])
    batches = tf.data.Dataset.from_tensor_slices(data).batch(BATCH).repeat(epochs)
    batches = strategy.experimental_distribute_dataset(batches)
    train_by_hand(model, strategy, batches, steps_per_epoch=-(-len(data[0]) // BATCH))
    return model


def parallel(data, epochs, splits_model):
    """Trains by `keras.distribution` on two devices: the batch is split, or the weights."""
    import keras

    library = keras.distribution
    devices = library.list_devices("cpu")
    if splits_model:
        layouts = library.LayoutMap(library.DeviceMesh((1, 2), ["batch", "model"], devices))
        layouts["second/kernel"] = (None, None, None, "model")
        layouts["head/kernel"] = ("model", None)
        distribution = library.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    else:
        distribution = library.DataParallel(devices=devices)
    library.set_distribution(distribution)
    model = compressed(data[0])
    fit(model, data, epochs)
    return model


def distributed_module(data, epochs, replicas):
    """Trains a torch module by `DistributedDataParallel`, or with one replica by itself."""
    import keras_compress.torch as kct  # isort: skip  (first: it selects Keras' torch backend)
    import torch

    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(1, 16, 3), torch.nn.Conv2d(16, 32, 3)
    between, behind = torch.nn.ReLU(), torch.nn.ReLU()
    head = torch.nn.Linear(32 * 16, 10)
    layers = [first, between, second, behind, torch.nn.Flatten(), head]
    x, y = torch.tensor(data[0]).permute(0, 3, 1, 2).contiguous(), torch.tensor(data[1]).long()
    module = kct.compress_model(torch.nn.Sequential(*layers), CONFIG, x[:2], data=x)
    trained, rank = module.train(), 0
    if replicas > 1:
        torch.distributed.init_process_group("gloo")
        rank, trained = (
            torch.distributed.get_rank(),
            torch.nn.parallel.DistributedDataParallel(module),
        )
    compression = kct.Compression(trained, steps_per_epoch=-(-len(x) // BATCH))
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    for batch_x, batch_y in list(zip(x.split(BATCH), y.split(BATCH), strict=True)) * epochs:
        optimizer.zero_grad()
        outputs = trained(batch_x[rank::replicas])
        loss = torch.nn.functional.cross_entropy(outputs, batch_y[rank::replicas])
        (loss + compression.loss(batch_x[rank::replicas], outputs)).backward()
        optimizer.step()
        compression.step()
    return module.eval()


def weights_of(model):
    """Returns {name: array} of a Keras model, or of a torch module."""
    if hasattr(model, "state_dict"):
        tensors = {k: v for k, v in model.state_dict().items() if hasattr(v, "numpy")}
        return {name: value.numpy() for name, value in tensors.items()}
    import keras

    return {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in model.weights}


def exported(model, path):
    """Exports a model or a module; returns the report, None where nothing was compared."""
    if hasattr(model, "state_dict"):
        import keras_compress.torch as kct  # isort: skip
        import torch

        return kct.export(model, path, torch.zeros(2, 1, 8, 8))
    import keras_compress as kc

    return kc.export(model, path)


def run(engine, data, epochs, folder):
    """Trains by an engine and alone; returns {row of the table: text}."""
    rank = int(os.environ.get("RANK", 0))
    if engine is Engine.ddp:
        model = distributed_module(data, epochs, replicas=2)
        alone = None if rank else distributed_module(data, epochs, replicas=1)
    else:
        trainings = {
            Engine.mirrored: mirrored,
            Engine.multi_worker: multi_worker,
            Engine.data_parallel: lambda *args: parallel(*args, splits_model=False),
            Engine.model_parallel: lambda *args: parallel(*args, splits_model=True),
        }
        model = trainings[engine](data, epochs)
    np.savez(folder / f"replica{rank}.npz", **weights_of(model))
    if rank:
        return
    report = exported(model, folder / "model.xml")
    if engine is not Engine.ddp:
        import keras

        keras.distribution.set_distribution(None)
        keras.backend.clear_session()  # names are counted from the beginning again
        alone = compressed(data[0])
        fit(alone, data, epochs)
    np.savez(folder / "alone.npz", **weights_of(alone))
    if report is not None:
        told = {"IR and model, largest difference of range": report.relative}
        (folder / "told.json").write_text(json.dumps(told))


def compared(folder):
    """Returns {row: text} from what the processes of an engine wrote."""
    alone = dict(np.load(folder / "alone.npz"))
    files = sorted(folder.glob("replica*.npz"))
    ranks = [dict(np.load(file)) for file in files]

    def is_mask(name):
        return "mask" in name

    def largest(names):
        pairs = ((ranks[0][n].astype("float64"), alone[n].astype("float64")) for n in names)
        return max(float(np.abs(one - other).max(initial=0.0)) for one, other in pairs)

    ranges = [n for n in alone if n.endswith("scale")]
    weights = [n for n in alone if not is_mask(n) and n not in ranges]
    masks = [n for n in alone if is_mask(n) and alone[n].ndim]
    off = sum(int((ranks[0][n] != alone[n]).sum()) for n in masks)
    rows = {
        "values of masks that differ": f"{off} of {sum(alone[n].size for n in masks)}",
        "weights, largest difference": f"{largest(weights):.1e}",
        "ranges, largest difference": f"{largest(ranges):.1e}",
    }
    if len(ranks) > 1:
        differ = [n for n in ranks[0] if not np.array_equal(ranks[0][n], ranks[1][n])]
        rows["variables that differ between processes"] = f"{len(differ)} of {len(ranks[0])}"
    told = folder / "told.json"
    if told.exists():
        rows |= {key: f"{value:.1e}" for key, value in json.loads(told.read_text()).items()}
    return rows


def environments(engine):
    """Returns what the environment of every process of an engine needs."""
    if engine is Engine.multi_worker:
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
        tasks = ({"type": "worker", "index": rank} for rank in (0, 1))
        tasks = [json.dumps({"cluster": cluster, "task": task}) for task in tasks]
        return [{"TF_CONFIG": task, "RANK": str(rank)} for rank, task in enumerate(tasks)]
    if engine is Engine.ddp:
        (port,) = free_ports(1)
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        return [meet | {"RANK": str(rank)} for rank in (0, 1)]
    if engine is Engine.mirrored:
        return [{}]
    return [{"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}]


def free_ports(count):
    """Returns numbers of ports that nothing listens on."""
    with contextlib.ExitStack() as sockets:
        found = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


def main(
    engine: Annotated[Engine, typer.Option(help="What computes on two devices.")],
    epochs: Annotated[int, typer.Option(help="Epochs of training.", min=1)] = 1,
    samples: Annotated[int, typer.Option(help="Images to train on.", min=2)] = 256,
    process_of: Annotated[Path | None, typer.Option(hidden=True)] = None,
):
    """Train by an engine and alone, and print how far apart they end."""
    if process_of is not None:
        from keras_compress.demo import load_digits

        (images, classes), _, _ = load_digits()
        run(engine, (images[:samples], classes[:samples]), epochs, process_of)
        return
    on_jax = engine in (Engine.data_parallel, Engine.model_parallel)
    backend = "jax" if on_jax else "torch" if engine is Engine.ddp else "tensorflow"
    common = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--engine", engine, "--epochs", str(epochs)]
        command += ["--samples", str(samples), "--process-of", folder]
        processes = [
            subprocess.Popen(command, env=os.environ | common | own) for own in environments(engine)
        ]
        if sum(process.wait() for process in processes):
            raise typer.Exit(1)
        for row, text in compared(Path(folder)).items():
            print(f"{row}: {text}")


if __name__ == "__main__":
    typer.run(main)
