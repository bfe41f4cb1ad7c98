"""Quantization of networks with real ImageNet weights: how far do the logits move?

    python benchmarks/real_weights.py --images DIR MODEL.keras=torch OTHER.keras=tf

`DIR` holds labelled photographs named `*_LABEL.jpg` (`pip download foolbox==3.3.4` and unzip
`foolbox/data/imagenet_*.jpg`). After `=` comes the preprocessing: `torch` (mean and standard
deviation of ImageNet) or `tf` ((x - 127) / 128).

For each model, after calibration alone and after a few steps against the float logits, it prints
the classes that agree with the labels and with the float model and the signal-to-noise ratio of
the logits, `10 log10(sum float^2 / sum (float - quantized)^2)` in dB, of the trained model and of
its IR. Twenty photographs prove that a deployment is right; they are no accuracy figure.
"""

import pathlib
import re
import tempfile

import keras
import numpy as np
import openvino as ov
import typer
from rich.console import Console
from rich.table import Table

import keras_compress as kc

CONFIG = {
    "target_device": "CPU",
    "compression": {
        "algorithm": "quantization",
        "initializer": {
            "range": {"num_init_samples": 20},
            "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
        },
    },
}
PREPROCESSING = {
    "torch": lambda x: (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
    "tf": lambda x: (x - 127.0) / 128.0,
}


def photographs(folder, size):
    """Return (images in 0..255 of shape (n, size, size, 3), labels)."""
    paths = sorted(pathlib.Path(folder).glob("*_*.jpg"))
    if not paths:
        raise typer.BadParameter(f"no photographs named '*_LABEL.jpg' in {folder}")
    images = [keras.utils.load_img(path, target_size=(size, size)) for path in paths]
    labels = [int(re.findall(r"\d+", path.stem)[-1]) for path in paths]
    return np.stack([keras.utils.img_to_array(image) for image in images]), np.array(labels)


def decibels(reference, values):
    """Return the signal-to-noise ratio of `values` in dB."""
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - values) ** 2))


def ir_logits(path, images):
    """Run an IR in float32 precision hint, one batch."""
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(images)[0]


def fine_tune(model, images, logits, steps):
    """Train against the float logits on shifted and mirrored copies of the photographs."""
    model.compile(keras.optimizers.Adam(1e-5), "mse")
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = images if rng.random() < 0.5 else images[:, :, ::-1]
        targets = logits(batch)
        model.train_on_batch(batch, targets)


def main(
    models: list[str],
    images: str = typer.Option(..., help="Folder of photographs."),
    steps: int = 10,
):
    """Measure and print."""
    table = Table("model", "stage", "right", "as float", "SNR, dB", "IR as trained", "IR SNR, dB")
    for entry in models:
        path, _, kind = entry.partition("=")
        model = keras.models.load_model(path, compile=False)
        model.layers[-1].activation = keras.activations.linear
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False  # twenty photographs are no statistics
        pixels, labels = photographs(images, model.input_shape[1])
        inputs = PREPROCESSING[kind](pixels).astype("float32")

        def logits(x, model=model):
            return model.predict(x, verbose=0)

        reference = logits(inputs)
        name = pathlib.Path(path).stem
        right = np.sum(reference.argmax(-1) == labels)
        table.add_row(name, "float", f"{right}/{len(labels)}", "", "", "", "")
        compressed = kc.compress_model(model, CONFIG, data=inputs)
        for stage in ("calibrated", f"after {steps} steps"):
            if stage != "calibrated":
                fine_tune(compressed, inputs, logits, steps)
            trained = compressed.predict(inputs, verbose=0)
            with tempfile.TemporaryDirectory() as folder:
                ir_path = pathlib.Path(folder) / "model.xml"
                kc.export(compressed, ir_path, verify=False)
                deployed = ir_logits(ir_path, inputs)
            classes = trained.argmax(-1)
            table.add_row(
                name,
                stage,
                f"{np.sum(classes == labels)}/{len(labels)}",
                f"{np.sum(classes == reference.argmax(-1))}/{len(labels)}",
                f"{decibels(reference, trained):.1f}",
                f"{np.sum(deployed.argmax(-1) == classes)}/{len(labels)}",
                f"{decibels(reference, deployed):.1f}",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
