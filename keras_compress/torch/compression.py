"""Compression of a `torch.nn.Module`: by a Keras model that shares its weights."""

import copy

import keras
import torch

from keras_compress import compress
from keras_compress.algorithms.base import Algorithm
from keras_compress.compressed_model import CompressedModel
from keras_compress.config import Config
from keras_compress.layers import CompressedLayer
from keras_compress.masks import ChannelMask
from keras_compress.model_facts import quantizers_of, transforms_of
from keras_compress.options import ConfigError
from keras_compress.report import report as keras_report
from keras_compress.stepping import Stepper
from keras_compress.strip import STATISTICS
from keras_compress.torch.attach import FLAGS, Shadow
from keras_compress.torch.convert import convert
from keras_compress.torch.export import compressed


def plan(module, config, example_inputs):
    """Say what `compress_model` would do, without doing it.

    Args:
        module: as for `compress_model`, and so are the others.
        config: see there.
        example_inputs: see there.

    Returns:
        A `Plan`. Its layers are called as in the module, with "-" for ".".
    """
    return compress.plan(convert(module, example_inputs).model, config)


def compress_model(module, config, example_inputs, data=None, loss=None, optimizer="sgd"):
    """Return a copy of a torch module that computes with masked and rounded weights and edges.

    Weights with transforms are parametrized: the trained tensor of `conv.weight` is
    `conv.parametrizations.weight.original`. Ranges of quantizers and scores of masks are parameters
    too, so the optimizer is made from the new module; `state_dict` holds all of them.

    Args:
        module: `torch.nn.Module` that `torch.fx` can trace. It is left untouched.
        config: dict, path of a JSON file, or `Config`, as for Keras.
        example_inputs: tensor, or tuple of them, that the module can be called on.
        data: iterable of batches to calibrate ranges with: tensors, or pairs whose first element
            goes into the module, such as those of a `DataLoader`. None: activation ranges come
            from the first training batches. Searches that need labels take pairs.
        loss: function of (outputs, targets) that returns a scalar tensor, such as
            `torch.nn.functional.cross_entropy`: for the traces of HAWQ and for LeGR.
        optimizer: what trains the candidates of LeGR: as for `keras.Model.compile`.

    Returns:
        A `torch.fx.GraphModule`. `Compression` moves it along in training.

    Raises:
        TypeError, ValueError: not such a module, bad configuration or data.

    Example:

    ```python
    module = kct.compress_model(module, "config.json", torch.randn(1, 3, 32, 32), data=loader)
    compression = kct.Compression(module, steps_per_epoch=len(loader))
    optimizer = torch.optim.SGD(kct.parameter_groups(module, 1e-4), lr=0.01)
    for x, y in loader:
        optimizer.zero_grad()
        outputs = module(x)
        (loss(outputs, y) + compression.loss(x, outputs)).backward()
        optimizer.step()
        compression.step()
    ```
    """
    if hasattr(module, "shadow"):
        raise ValueError(
            "Expected a module that is not compressed yet. Received: what `compress_model` "
            "returned. Compress the float module"
        )
    config = Config.load(config)
    converted = convert(module, example_inputs)
    if loss is not None:
        converted.model.compile(optimizer, _Loss(loss))
    data = data if data is None or hasattr(data, "shape") else _Batches(data)
    model = compress.compress_model(converted.model, config, data=data, verbose=False)
    _require_supported(model)
    model.take_teacher_of(CompressedModel)  # none: `original` teaches
    examples = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    original = copy.deepcopy(converted.graph)
    twin = copy.deepcopy(original)
    names = converted.weights, converted.tensors, converted.nodes
    return Shadow(model, original.eval(), original, *names, examples).attach(twin)


class _Loss(keras.losses.Loss):
    """A loss as PyTorch has it; Keras' own would make whole numbers of the targets floats."""

    def __init__(self, function):
        super().__init__()
        self._function = function

    def __call__(self, y_true, y_pred, sample_weight=None):
        return self._function(y_pred, torch.as_tensor(y_true, device=y_pred.device))


class _Batches:
    """Batches with tuples where a `DataLoader` gives lists; read anew every time."""

    def __init__(self, data):
        self._data = data

    def __iter__(self):
        return (tuple(each) if isinstance(each, list) else each for each in self._data)


def _require_supported(model):
    if any(algorithm.feature_names(model) for algorithm in model.config.algorithms):
        raise ConfigError(
            "Expected `knowledge_distillation` of outputs alone: inner tensors of a torch module "
            "are not distilled. Received: `features`. Leave the key out"
        )
    masked = [
        layer.name
        for layer in model.layers
        if isinstance(layer, STATISTICS) and isinstance(layer, CompressedLayer)
        for name in layer.weight_names
        if any(isinstance(transform, ChannelMask) for transform in layer.transforms_of(name))
    ]
    if masked:
        raise ConfigError(
            "Expected no filter pruning of channels that a layer normalizes over, whose statistics "
            f"a torch layer takes over all of them. Received: {sorted(set(masked))}. Add the "
            "layers before them to `ignored_scopes`"
        )


def report(module, **options):
    """Return the `Report` of a compressed module, as `keras_compress.report` makes it.

    Args:
        module: the compressed module.
        **options: as for `keras_compress.report`.
    """
    module, shadow = compressed(module)
    shadow.share(module)
    return keras_report(shadow.model, **options)


def parameter_groups(module, weight_decay):
    """Return two groups of parameters for a torch optimizer: ranges and scores do not decay.

    Args:
        module: the compressed module.
        weight_decay: that of all other parameters.
    """
    module, shadow = compressed(module)
    kept = {id(v.value) for each in transforms_of(shadow.model) for v in each.undecayed_variables}
    kept |= {id(variable.value) for variable in _scores(shadow.model)}
    groups = {True: [], False: []}
    for parameter in module.parameters():
        groups[id(parameter) in kept].append(parameter)
    return [
        {"params": groups[False], "weight_decay": weight_decay},
        {"params": groups[True], "weight_decay": 0.0},
    ]


def _scores(model):
    """Return the variables whose gradient is their new value: sums over steps, of Taylor masks."""
    variables = [v for each in transforms_of(model) for v in each.trainable_variables]
    return [v for v in variables if getattr(v, "overwrite_with_gradient", False)]


class _Student:
    """A shadow as a loss of an algorithm sees it: the torch module before compression teaches."""

    def __init__(self, shadow):
        self._shadow = shadow

    def __getattr__(self, name):
        return getattr(self._shadow.model, name)

    def lesson(self, inputs):
        """Return what `CompressedModel.lesson` does."""
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        teacher = self._shadow.teacher.to(inputs[0].device)
        with torch.no_grad():
            return teacher(*inputs), {}, {}


class Compression:
    """Moves the algorithms of a compressed module along with its training.

    The course is that of `keras_compress.callbacks.Compress`: an epoch begins with the first
    training batch in it. What is set then, such as masks, is set right before that batch.

    Args:
        module: what `compress_model` returned, also within `DistributedDataParallel`.
        steps_per_epoch: optimizer's steps in an epoch. None: call `epoch_end` after the first
            epoch, from which the number is taken.

    Attributes:
        steps: optimizer's steps so far.

    Raises:
        TypeError: not a compressed module.
        ValueError: not such a number.
    """

    def __init__(self, module, steps_per_epoch=None):
        is_whole = isinstance(steps_per_epoch, int) and not isinstance(steps_per_epoch, bool)
        if steps_per_epoch is not None and (not is_whole or steps_per_epoch < 1):
            raise ValueError(
                f"Expected None or a whole number of at least 1. Received: {steps_per_epoch=}"
            )
        self._module, self._shadow = compressed(module)
        is_parallel = isinstance(module, torch.nn.parallel.DistributedDataParallel)
        self._group = module.process_group if is_parallel else None
        self._model = self._shadow.model
        self.steps_per_epoch = steps_per_epoch
        self.steps = 0
        self._restart()
        for hook in self._shadow.hooks:
            hook.remove()
        self._shadow.hooks[:] = [self._module.register_forward_pre_hook(self._begin)]

    def _restart(self):
        self._stepper = Stepper(self._model)
        self._agreed = self._group is None
        self._update()

    def _update(self):
        if self._stepper.moving:
            self._shadow.share(self._module)
            self._stepper.update(self._model, self.steps, self.steps_per_epoch)
        self._agree()

    def _agree(self):
        """Let all processes round as the first one does, once that one has all ranges."""
        if self._agreed:
            return
        quantizers = quantizers_of(self._model)
        states = [[{n: getattr(q, n) for n in FLAGS if hasattr(q, n)} for q in quantizers]]
        first = torch.distributed.get_global_rank(self._group, 0)
        torch.distributed.broadcast_object_list(states, first, self._group)
        self._agreed = all(state["calibrated"] for state in states[0])
        if not self._agreed:
            return
        for quantizer, state in zip(quantizers, states[0], strict=True):
            for variable in quantizer.range_variables:
                torch.distributed.broadcast(variable.value.data, first, self._group)
            for name, value in state.items():
                setattr(quantizer, name, value)
            quantizer.observer = None

    def _begin(self, module, inputs):
        """Begin the epoch that the next step is in, before its first training batch."""
        epoch = self.steps // self.steps_per_epoch if self.steps_per_epoch else 0
        if module.training and self._model.progress.get("epoch") != epoch:
            self._shadow.share(module)
            self._stepper.begin_epoch(self._model, epoch)

    def step(self):
        """Move along by a step: called after each step of the optimizer."""
        self.steps += 1
        for score in _scores(self._model):
            if score.value.grad is not None:
                score.value.data.copy_(score.value.grad)
        self._update()

    def epoch_end(self):
        """Tell how long an epoch is, after the first one, where `steps_per_epoch` was not given."""
        if self.steps_per_epoch is None and self.steps:
            self.steps_per_epoch = self.steps

    def finish(self):
        """End the training: ranges are set from what was seen so far, masks that were due fixed."""
        self._shadow.share(self._module)
        self._stepper.finish(self._model)
        self._agree()

    def loss(self, inputs, outputs):
        """Return what the algorithms add to the loss of a step, a scalar tensor.

        Args:
            inputs: the batch: a tensor, or a tuple of them.
            outputs: what the module made of it in training mode.
        """
        student = _Student(self._shadow)
        algorithms = self._model.config.algorithms
        with_loss = [each for each in algorithms if type(each).loss is not Algorithm.loss]
        added = [each.loss(student, inputs, outputs) for each in with_loss]
        return sum((each for each in added if each is not None), torch.zeros(()))

    def statistics(self):
        """Return figures about the module, {name: number}, as the algorithms give them."""
        self._shadow.share(self._module)
        algorithms = self._model.config.algorithms
        return {k: v for each in algorithms for k, v in each.statistics(self._model).items()}

    def state_dict(self):
        """Return how far training is, as plain data; weights and masks are the module's."""
        return {
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "progress": copy.deepcopy(dict(self._model.progress)),
        }

    def load_state_dict(self, state):
        """Take up what `state_dict` returned, after the module's own state was loaded."""
        self.steps, self.steps_per_epoch = state["steps"], state["steps_per_epoch"]
        self._model.progress.clear()
        self._model.progress.update(copy.deepcopy(state["progress"]))
        self._restart()
