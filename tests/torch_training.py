"""A torch module and its Keras twin, and short trainings of it."""

import keras
import pytest
from backend_helpers import BACKEND

if BACKEND != "torch":
    pytest.skip("keras_compress.torch needs Keras' torch backend", allow_module_level=True)

import torch

import keras_compress.torch as kct
from keras_compress.layers import FakeQuantize

SAMPLES, CLASSES = 16, 4
NO_ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}
QUANTIZATION = {"algorithm": "quantization", "initializer": NO_ADAPTATION}
LOW_BITS = QUANTIZATION | {"preset": "mixed", "weights": {"bits": 4}, "activations": {"bits": 4}}
PRUNING = {
    "algorithm": "filter_pruning",
    "params": {
        "pruning_target": 0.5,
        "round_to": 1,
        "schedule": "baseline",
        "num_init_steps": 1,
        "prune_first_conv": True,
    },
}
TAYLOR = PRUNING | {"params": PRUNING["params"] | {"filter_importance": "taylor"}}
MAGNITUDE = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.1,
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 3},
}
RB = {"algorithm": "rb_sparsity", "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 2}}
DISTILLATION = {"algorithm": "knowledge_distillation", "type": "softmax", "temperature": 3.0}


class Block(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(channels)
        self.relu = torch.nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


class Network(torch.nn.Module):
    """Residual, depthwise, pooled; `keras_network` is the same in Keras."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.first = torch.nn.ReLU()
        self.block = Block(8)
        self.pool = torch.nn.MaxPool2d(2)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = torch.nn.ReLU()
        self.wide = torch.nn.Conv2d(8, 12, 1)
        self.third = torch.nn.ReLU()
        self.average = torch.nn.AdaptiveAvgPool2d(1)
        self.flatten = torch.nn.Flatten()
        self.head = torch.nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.pool(self.block(self.first(self.stem(x))))
        x = self.third(self.wide(self.second(self.depthwise(x))))
        return self.head(self.flatten(self.average(x)))


def keras_network():
    layers = keras.layers
    inputs = keras.Input((8, 8, 3), name="x")
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    x = shortcut = layers.ReLU(name="first")(x)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="block-conv")(x)
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name="block-norm")(x)
    x = layers.ReLU(name="block-relu")(layers.Add(name="add")([x, shortcut]))
    x = layers.MaxPooling2D(2, name="pool")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.ReLU(name="second")(x)
    x = layers.Conv2D(12, 1, name="wide")(x)
    x = layers.ReLU(name="third")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name="network")


def copy_to_keras(module, model):
    """Give a Keras network the weights of the torch one, by the rules of both libraries."""
    orders = {"depthwise": (2, 3, 0, 1), "head": (1, 0)}
    for layer in model.layers:
        if not layer.weights:
            continue
        twin = module.get_submodule(layer.name.replace("-", "."))
        if layer.name == "block-norm":
            values = [twin.weight, twin.bias, twin.running_mean, twin.running_var]
            layer.set_weights([value.detach().numpy() for value in values])
            continue
        kernel = twin.weight.detach().permute(orders.get(layer.name, (2, 3, 1, 0)))
        bias = [] if twin.bias is None else [twin.bias.detach().numpy()]
        layer.set_weights([kernel.numpy(), *bias])
    return model


def network():
    torch.manual_seed(0)
    return Network()


def images(samples=SAMPLES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 8, 8, generator=generator)


def labels(samples=SAMPLES):
    return torch.arange(samples) % CLASSES


def config_of(*algorithms):
    return {"target_device": "CPU", "compression": list(algorithms)}


def compressed(module, *algorithms, data=True):
    data = [images()] if data else None
    return kct.compress_model(module, config_of(*algorithms), images(), data=data)


def train(module, compression, optimizer, steps):
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = module(images())
        loss = torch.nn.functional.cross_entropy(outputs, labels())
        (loss + compression.loss(images(), outputs)).backward()
        optimizer.step()
        compression.step()


def trained(module, *algorithms, steps=8, steps_per_epoch=2, data=True):
    module = compressed(module, *algorithms, data=data)
    compression = kct.Compression(module, steps_per_epoch)
    train(module, compression, torch.optim.SGD(module.parameters(), lr=0.05), steps)
    return module, compression


def in_evaluation(module, inputs=None):
    with torch.no_grad():
        return module.eval()(images(seed=5) if inputs is None else inputs)


def states(model):
    """Return {layer and variable: values} of the quantizers and masks of a compressed model."""
    found = {}
    for layer in model.layers:
        transforms = [layer.quantizer] if isinstance(layer, FakeQuantize) else []
        for name in getattr(layer, "weight_names", ()):
            transforms += layer.transforms_of(name)
        for index, transform in enumerate(transforms):
            for variable in transform.weights:
                key = f"{layer.name}/{index}/{variable.name}"
                found[key] = keras.ops.convert_to_numpy(variable)
    return found


CONFIGURATIONS = {
    "int8": (QUANTIZATION,),
    "4 bits": (LOW_BITS,),
    "pruning": (PRUNING, QUANTIZATION),
    "taylor": (TAYLOR,),
    "sparsity": (MAGNITUDE, QUANTIZATION),
    "distillation": (QUANTIZATION, DISTILLATION),
}
