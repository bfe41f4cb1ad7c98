"""Trains small compressed models on one device and on two, in a process of its own.

As a program, `python distributed_training.py ENGINE FOLDER CASE ...`, it writes what came of both
into `FOLDER/CASE.npz` and `FOLDER/CASE.json`. Engines need a process that has made no other yet.
A worker is `multi-worker:RANK:PORT:PORT`; it writes into `FOLDER/RANK`.
"""
# ruff: noqa: E402

import contextlib
import json
import os
import pathlib
import sys

ENGINE, *WORKER = sys.argv[1].split(":")
os.environ["KERAS_BACKEND"] = "jax" if ENGINE.endswith("parallel") else "tensorflow"
if ENGINE.endswith("parallel"):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
if WORKER:
    rank, *ports = map(int, WORKER)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})

import keras
import numpy as np
from keras import layers, ops

TESTS = pathlib.Path(__file__).resolve().parent
sys.path.append(str(TESTS.parent / "examples"))

import keras_compress as kc

BATCH, SAMPLES, EPOCHS = 8, 32, 4
STEPS = SAMPLES // BATCH
SEED = 2  # with others, last bits may move a rounding, which Adam makes a whole step of
PRUNING = {"pruning_target": 0.5, "pruning_steps": 3, "round_to": 1, "prune_first_conv": True}
SPARSITY = {"sparsity_target": 0.6, "sparsity_target_epoch": 2}
# As many samples as two batches have; 24 are seen by no single replica in that time.
QUANTIZATION = {
    "algorithm": "quantization",
    "initializer": {"range": {"num_init_samples": 2 * BATCH}},
}
MASKED = [
    {"algorithm": "filter_pruning", "params": PRUNING},
    {"algorithm": "magnitude_sparsity", "params": SPARSITY},
    QUANTIZATION,
]
TAYLOR = {"algorithm": "filter_pruning", "params": PRUNING | {"filter_importance": "taylor"}}
CASES = {  # name -> (algorithms, whether calibration data are given)
    "masked": (MASKED, True),
    "first batches": (MASKED, False),
    "drawn": ([{"algorithm": "rb_sparsity", "params": SPARSITY}, QUANTIZATION], True),
    "taylor": ([TAYLOR, QUANTIZATION], True),
    "shrunk": (MASKED, True),
    "resumed": (MASKED, True),
    "batch norm": (MASKED, True),
}


def data():
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, 6, 6, 3)).astype("float32")
    # Each half of a batch has values of another size, so that ranges of one half are not the whole.
    x[np.arange(SAMPLES) % BATCH >= BATCH // 2] *= 3
    return x, random.integers(0, 4, SAMPLES)


def network(synchronized=True):
    """Return a network whose batch normalization is that of the whole batch, unless told not to."""
    on_tensorflow = keras.backend.backend() == "tensorflow"
    over_replicas = {"synchronized": synchronized} if on_tensorflow else {}
    inputs = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(8, 3, use_bias=False, name="first")(inputs)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(name="norm", **over_replicas)(x))
    x = layers.Flatten(name="flat")(layers.Conv2D(8, 3, activation="relu", name="second")(x))
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="network")


def compressed(case, scope):
    """Return a compiled model, made in a scope."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(SEED)
    algorithms, calibrates = CASES[case]
    with scope:
        original = network(synchronized=case != "batch norm")
        samples = data()[0] if calibrates else None
        config = {"compression": algorithms}
        model = kc.compress_model(original, config, data=samples, verbose=False)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # Adam hides the size of gradients, with weight decay that ranges must not take part in.
        adam = keras.optimizers.AdamW(1e-2, weight_decay=0.1)
        optimizer = adam if case == "drawn" else keras.optimizers.SGD(0.05, momentum=0.9)
        model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def shrunk(model, scope):
    """Return a smaller model with the optimizer of another, made in a scope, trained further."""
    small, optimizer = kc.shrink(model, optimizer=model.optimizer)
    with scope:
        small.compile(optimizer, model.loss, metrics=["accuracy"])
    fit(small)
    return small


def fit(model, *others):
    """Train a model by `fit`; returns what is logged."""
    callbacks = [kc.callbacks.Compress(), kc.callbacks.Statistics(), *others]
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "callbacks": callbacks}
    return model.fit(*data(), epochs=EPOCHS, **options).history


class Ends(keras.callbacks.Callback):
    """Ends a training in the midst of its third epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (2, 1):
            raise KeyboardInterrupt


def loop(model, strategy):
    """Train a model by the example's loop; returns the losses."""
    import distributed  # the example
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices(data()).batch(BATCH).repeat(EPOCHS)
    batches = strategy.experimental_distribute_dataset(batches)
    return {"loss": distributed.train_by_hand(model, strategy, batches, STEPS)}


def arrays_of(model):
    """Return {path: array} of all weights, as the first replica has them."""
    return {v.path: np.array(ops.convert_to_numpy(v)) for v in model.weights}


def placed(model, strategy):
    """Return {path: whether all replicas have the same} or, on JAX, {path: the axes it lies by}."""
    if strategy is None:
        return {v.path: list(v.value.sharding.spec) for v in model.weights}
    same = {}
    for variable in model.weights:
        first, *others = map(np.asarray, strategy.experimental_local_results(variable.value))
        same[variable.path] = all(np.array_equal(first, other) for other in others)
    return same


def told(model, history, strategy):
    """Return what a model says of itself, as JSON."""
    steps = int(ops.convert_to_numpy(model.optimizer.iterations))
    found = {"progress": model.progress, "history": history, "steps": steps}
    return json.loads(json.dumps(found | {"placed": placed(model, strategy)}, default=float))


def nested():
    """Return how a model inside of another lies, compressed: paths there are not the original's."""
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="inside")], name="inner")
    inputs = keras.Input((4,))
    config = {"compression": {"algorithm": "quantization"}}
    model = kc.compress_model(keras.Model(inputs, inner(inputs)), config, verbose=False)
    return placed(model, None)


def engine():
    """Return (strategy or None, function that gives the scope of the engine)."""
    if ENGINE == "mirrored":
        import tensorflow as tf

        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            device, [tf.config.LogicalDeviceConfiguration()] * 2
        )
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        return strategy, strategy.scope
    if ENGINE == "multi-worker":
        import tensorflow as tf

        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        return strategy, strategy.scope
    distribution = keras.distribution
    devices = distribution.list_devices("cpu")
    if ENGINE == "data-parallel":
        return None, distribution.DataParallel(devices=devices).scope
    mesh = distribution.DeviceMesh((1, 2), ["batch", "model"], devices)
    layouts = distribution.LayoutMap(mesh)
    layouts["second/kernel"] = (None, None, None, "model")
    layouts["second/bias"] = ("model",)
    layouts["hea.*kernel"] = ("model", None)
    layouts["inner/inside/kernel"] = (None, "model")
    parallel = distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    return None, parallel.scope


def run(case, folder, strategy, scope):
    """Train a case on one device and by the engine, and write what came of both."""
    alone = compressed(case, contextlib.nullcontext())
    stepwise = ENGINE == "multi-worker"
    expected = fit(alone)
    if case == "shrunk":
        alone = shrunk(alone, contextlib.nullcontext())
    others = [kc.callbacks.Backup(folder / "backup")] if case == "resumed" else []
    if case == "resumed":
        ended = compressed(case, scope())
        entered = contextlib.nullcontext() if strategy else scope()
        with entered, contextlib.suppress(KeyboardInterrupt):
            fit(ended, Ends(), *others)
    model = compressed(case, scope())
    start = arrays_of(model)
    with contextlib.nullcontext() if strategy else scope():
        history = loop(model, strategy) if stepwise else fit(model, *others)
        if case == "shrunk":
            model = shrunk(model, scope())
        # After `fit`, outside of any scope that it would need.
        small = kc.shrink(model) if case == "masked" else model
        x = data()[0]
        plain = kc.strip(model)
        outputs = [np.asarray(each(x)) for each in (plain, small)]
    arrays = {"plain": outputs[0], "shrunk": outputs[1]} | {
        f"{kind} {name}": value
        for kind, values in (
            ("expected", arrays_of(alone)),
            ("actual", arrays_of(model)),
            ("start", start),
        )
        for name, value in values.items()
    }
    arrays["outputs of one device"] = np.asarray(kc.strip(alone)(x))
    np.savez(folder / f"{case}.npz", **arrays)
    if case == "masked" and (not stepwise or WORKER[0] == "0"):
        with contextlib.nullcontext() if strategy else scope():
            kc.export(model, folder / "model.xml")
        kc.export(alone, folder / "expected.xml", verify=False)
    mine = told(model, history, strategy)
    if ENGINE == "model-parallel":
        with scope():
            mine["nested"] = nested()
    alone_told = {"progress": alone.progress, "history": expected}
    alone_told["steps"] = int(ops.convert_to_numpy(alone.optimizer.iterations))
    written = {"actual": mine, "expected": json.loads(json.dumps(alone_told, default=float))}
    (folder / f"{case}.json").write_text(json.dumps(written))


def refused(scope):
    """Return the errors of what an engine of TensorFlow cannot do, {what: message}."""
    model = compressed("masked", scope())
    params = {"pruning_latency_target": 0.3, "prune_first_conv": True}
    search = {"compression": {"algorithm": "filter_pruning", "params": params}}

    def searching():
        with scope():
            kc.compress_model(network(), search, verbose=False)

    if WORKER:
        attempts = {"fit": lambda: fit(model), "search": searching}
    else:
        attempts = {"shrink": lambda: kc.callbacks.Compress(shrink=True).set_model(model)}
    messages = {}
    for what, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[what] = str(error)
    return messages | {"steps": int(ops.convert_to_numpy(model.optimizer.iterations))}


def main():
    folder = pathlib.Path(sys.argv[2])
    if WORKER:
        folder = folder / WORKER[0]
        folder.mkdir()
    strategy, scope = engine()
    for case in sys.argv[3:]:
        run(case, folder, strategy, scope)
    if strategy is not None:
        (folder / "refused.json").write_text(json.dumps(refused(scope)))


if __name__ == "__main__":
    main()
