"""Cost of a quantized training step of a PyTorch module, as a ratio to its float step.

    python benchmarks/torch_step_time.py [--blocks 15] [--steps 2] [--threads 1]

Beside `keras_compress.torch` run the quantization-aware training of torchao and of NNCF, where they
are installed (`pip install torchao nncf`; NNCF compiles an extension on first use). All begin with
the same module and live in one process; blocks of steps alternate between them, and CPU time (all
threads of the process) and wall time are compared block by block.

They do not do the same. keras_compress and NNCF round convolutions, linear layers and attention,
and train the ranges. torchao's exported graph (PT2E, with its quantizer for x86) rounds
convolutions and linear layers, to ranges that are moving averages; it multiplies a weight by the
factor of the batch norm behind it, and divides by it after the convolution. torchao's `QATConfig`
rounds `torch.nn.Linear` alone, with new ranges for every token in every step: on ResNet-18, whose
only linear layer is the last, it says little. "rounded" counts the tensors.
"""

import copy
import functools
import importlib.util
import pathlib
import statistics
import sys
import time

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

from torch_networks import ResNet18, VisionTransformer

BATCH, SIZE, CLASSES = 32, 64, 10
NETWORKS = {
    "ResNet-18, 64x64": lambda: ResNet18(64, CLASSES),
    "ViT, 4 blocks of 128, 64x64": lambda: VisionTransformer(
        128, heads=4, depth=4, image=SIZE, patch=8, classes=CLASSES, fused=True
    ),
}
# The classes, one instance for each rounded tensor, of keras_compress, NNCF, PT2E and `QATConfig`.
ROUNDING = {
    "Transformed",
    "SymmetricQuantizer",
    "AsymmetricQuantizer",
    "FusedMovingAvgObsFakeQuantize",
    "IntxFakeQuantizer",
}


def in_float(module, data):
    """Return the module as it is, with nothing to do after a step."""
    return module, module.parameters(), None


def with_keras_compress(module, data):
    """Return the module compressed to int8, with its `Compression`."""
    import keras_compress.torch as kct

    config = {"compression": [{"algorithm": "quantization"}]}
    module = kct.compress_model(module, config, data, data=[data])
    compression = kct.Compression(module, steps_per_epoch=100)
    return module, kct.parameter_groups(module, weight_decay=0.0), compression


def with_nncf(module, data):
    """Return the module with NNCF's quantizers, whose ranges are parameters."""
    import nncf

    module = nncf.quantize(module.eval(), nncf.Dataset([data]), subset_size=1)
    return module, module.parameters(), None


def with_torchao_export(module, data):
    """Return the exported graph of the module, with torchao's quantizers for x86."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    quantizer = x86.X86InductorQuantizer().set_global(config)
    exported = torch.export.export(called_once(module).train(), (data,)).module()
    module = prepare_qat_pt2e(exported, quantizer)
    return module, module.parameters(), None


def with_torchao_linear(module, data):
    """Return the module with torchao's `FakeQuantizedLinear` for each `Linear`."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(module, QATConfig(activation_config=activations, weight_config=weights))
    return module, module.parameters(), None


# name: (package that it needs beside this one, function of a module and a batch)
VARIANTS = {
    "float": (None, in_float),
    "keras_compress": (None, with_keras_compress),
    "NNCF": ("nncf", with_nncf),
    "torchao, PT2E": ("torchao", with_torchao_export),
    "torchao, QATConfig": ("torchao", with_torchao_linear),
}


def called_once(module):
    """Return a module without parts that are called twice, which torchao's quantizer refuses."""
    traced, called = torch.fx.symbolic_trace(module), set()
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.target in called:
            part = copy.deepcopy(traced.get_submodule(node.target))
            node.target = f"{node.target}_{node.name}"
            traced.add_submodule(node.target, part)
            node.meta.pop("nn_module_stack", None)  # the name that it was called by before
        called.add(node.target)
    traced.recompile()
    return traced


def training(variant, module, data, labels):
    """Return (function that makes a training step, number of rounded tensors)."""
    module, parameters, compression = VARIANTS[variant][1](copy.deepcopy(module), data)
    if variant != "torchao, PT2E":  # which was exported in training mode, and has no other
        module.train()
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    rounded = sum(type(each).__name__ in ROUNDING for each in module.modules())
    return functools.partial(step, module, optimizer, compression, data, labels), rounded


def step(module, optimizer, compression, data, labels):
    """Make a training step."""
    optimizer.zero_grad()
    outputs = module(data)
    loss = torch.nn.functional.cross_entropy(outputs, labels)
    if compression:
        loss = loss + compression.loss(data, outputs)
    loss.backward()
    optimizer.step()
    if compression:
        compression.step()


def block(step, steps):
    """Return (CPU seconds, wall seconds) per step of a block."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    return (time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps


def measure(network, names, blocks, steps):
    """Return {name: (CPU, wall, rounded)}: seconds of "float", ratios to it of the others.

    Ratios are medians over blocks in turn.
    """
    torch.manual_seed(0)
    data = torch.randn(BATCH, 3, SIZE, SIZE)
    labels = torch.randint(0, CLASSES, (BATCH,))
    module = NETWORKS[network]()
    trained = {name: training(name, module, data, labels) for name in names}
    for one_step, _ in trained.values():
        block(one_step, 2)  # kernels are chosen, memory is taken
    turns = [
        {name: block(one_step, steps) for name, (one_step, _) in trained.items()}
        for _ in range(blocks)
    ]

    def median(name, i):
        base = [1.0 if name == "float" else turn["float"][i] for turn in turns]
        return statistics.median(turn[name][i] / b for turn, b in zip(turns, base, strict=True))

    return {name: (median(name, 0), median(name, 1), trained[name][1]) for name in names}


def main(blocks: int = 15, steps: int = 2, threads: int = 0):
    """Measure and print."""
    if threads:
        torch.set_num_threads(threads)
    missing = {
        name
        for name, (package, _) in VARIANTS.items()
        if package and importlib.util.find_spec(package) is None
    }
    table = Table("network", "training", "rounded", "CPU time", "wall time")
    for network in NETWORKS:
        names = [name for name in VARIANTS if name not in missing]
        measured = measure(network, names, blocks, steps)
        for name in VARIANTS:
            if name in missing:
                table.add_row(network, name, "", "not installed", "")
                continue
            cpu, wall, rounded = measured[name]
            unit = " s" if name == "float" else ""
            table.add_row(network, name, str(rounded), f"{cpu:.3f}{unit}", f"{wall:.3f}{unit}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
