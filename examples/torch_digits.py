"""Compresses a PyTorch network on scikit-learn's digits: float, int8, pruned and int8.

    python examples/torch_digits.py

Every row is trained by an ordinary PyTorch loop, exported to OpenVINO IR and measured on the test
images in OpenVINO. Needs no download.
"""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras_compress.torch as kct  # isort: skip  (first: it selects Keras' torch backend)

import torch
import typer
from rich.console import Console
from rich.table import Table

from keras_compress.demo import ir_classes, load_digits

FLOAT_EPOCHS = 15
BATCH = 32
INT8 = {"algorithm": "quantization"}
PRUNED = {
    "algorithm": "filter_pruning",
    "params": {"pruning_target": 0.5, "pruning_steps": 4, "prune_first_conv": True},
}
VARIANTS = {"int8": [INT8], "pruned, int8": [PRUNED, INT8]}


class Digits(torch.nn.Module):
    """Two convolutions, a residual block, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 32, 3, padding=1)
        self.conv = torch.nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(32)
        self.wide = torch.nn.Conv2d(32, 64, 3)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.max_pool2d(torch.relu(self.norm(self.conv(x)) + x), 2)
        x = torch.relu(self.wide(x))
        return self.head(torch.flatten(torch.nn.functional.adaptive_avg_pool2d(x, 1), 1))


def tensors(images, classes):
    """Return images with their channel first, and classes."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(classes).long()


def train(module, data, epochs, rate, compressed=False):
    """Train a module by Adam with a cosine schedule, compressed or not."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data), batch_size=BATCH, shuffle=True
    )
    compression = kct.Compression(module, len(loader)) if compressed else None
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    module.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            outputs = module(x)
            loss = torch.nn.functional.cross_entropy(outputs, y)
            if compressed:
                loss = loss + compression.loss(x, outputs)
            loss.backward()
            optimizer.step()
            schedule.step()
            if compressed:
                compression.step()
    return module.eval()


def main(
    epochs: Annotated[int, typer.Option(help="Epochs of compressed training.", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the IRs.")] = Path("demo"),
):
    """Train every variant and print one table."""
    console = Console()
    out.mkdir(exist_ok=True)
    fit_on, _, test = (tensors(*part) for part in load_digits())
    example = fit_on[0][:2]
    table = Table("variant", "accuracy", "IR accuracy", "IR - module", "8-bit layers", ".bin bytes")

    def row(name, module):
        path = out / f"torch_{name.replace(', ', '_')}.xml"
        report = kct.export(module, path, example)
        with torch.no_grad():
            accuracy = (module(test[0]).argmax(1) == test[1]).float().mean().item()
        in_ir = (torch.tensor(ir_classes(path, test[0].numpy())) == test[1]).float().mean().item()
        size = f"{path.with_suffix('.bin').stat().st_size:,}"
        compared = ("", "")
        if report is not None:
            compared = (
                f"{report.relative:.1e}",
                f"{report.eight_bit_layers} of {len(report.layers)}",
            )
        table.add_row(name, f"{accuracy:.2%}", f"{in_ir:.2%}", *compared, size)

    torch.manual_seed(0)
    plain = Digits()
    with console.status("float module"):
        train(plain, fit_on, FLOAT_EPOCHS, 2e-3)
    row("float", plain)
    for name, algorithms in VARIANTS.items():
        with console.status(name):
            torch.manual_seed(0)
            config = {"compression": algorithms}
            module = kct.compress_model(plain, config, example, data=fit_on[0])
            train(module, fit_on, epochs, 1e-3, compressed=True)
            prunes = PRUNED in algorithms
            row(name, kct.shrink(module).eval() if prunes else module)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
