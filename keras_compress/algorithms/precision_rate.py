"""The widths of quantized weights as a rate: how many bytes they save against 8 bits.

With N layers whose widths were searched for, and bytes(b) of a layer at width b in OpenVINO IR,

    rate = 1 - sum bytes(b) / sum bytes(8)

A rate asks for the widths of least predicted loss among those that save at least so much. The
measure is that of the search that `compress_model` made, which is in the plan: see `precision`.
"""

import math

import numpy as np

from keras_compress.algorithms.calibration import make_observer
from keras_compress.algorithms.precision import CODE
from keras_compress.algorithms.precision_options import OUTPUT, WEIGHT
from keras_compress.algorithms.quantizer_plan import FAKE_QUANTIZE, input_edges, widths_of
from keras_compress.bit_search import Budget, Link, choose
from keras_compress.graph.placement import PRODUCTS
from keras_compress.graph.walk import Role, first_layers
from keras_compress.options import ConfigError
from keras_compress.quantizers import AsymmetricQuantizer, UniformQuantizer, stored_bytes

LEVELS = " (7-bit levels)"  # ends the description of a quantizer of half the range


class Widths:
    """The widths of a compressed model's weights, and what others would cost.

    Args:
        model: a compressed model whose widths were searched for.

    Attributes:
        entries: list of the plan's `PrecisionEntry`s, as dictionaries.
        options_of: the widths that each can have, rising.
        full: bytes of all at 8 bits.
        followers: names of the tensors whose width follows that of the weights.

    Raises:
        ConfigError: they were not, or other widths would need another kind of quantizer.
    """

    def __init__(self, model):
        self.model = model
        self.options = next(a for a in model.config.algorithms if a.name == "quantization")
        self.entries = list(model.plan.get("precision", ()))
        if not self.entries:
            raise ConfigError(
                "Expected a model whose widths were searched for, to move them: "
                "`initializer.precision.type` 'hawq'. Received: widths chosen by hand, of which "
                "nothing is known."
            )
        self.options_of = [sorted(map(int, entry["perturbations"])) for entry in self.entries]
        self.full = sum(self._bytes(entry, CODE) for entry in self.entries)
        self.followers = self._followers()
        self._require_fitting_kinds()

    @property
    def bits(self):
        """The widths that hold, one per layer."""
        return [entry["bits"] for entry in self.entries]

    def rate(self, bits):
        """Return the fraction of bytes that widths save, one per layer."""
        used = sum(self._bytes(entry, b) for entry, b in zip(self.entries, bits, strict=True))
        return 1 - used / self.full

    def _bytes(self, entry, bits):
        """Return the bytes of a layer of the plan at a width, as `SearchedLayer` counts them."""
        quantizers = _quantizers_of(self.model.get_layer(entry["layer"]))
        other = {"bits": bits, "half_range": False, "narrow_range": False}
        twins = (type(q).from_config(q.get_config() | other) for q in quantizers)
        stored = max(twin.stored_bits for twin in twins)
        steps = sum(math.prod(q.range_variables[0].shape) for q in quantizers)
        return stored_bytes(entry["parameters"], stored, steps)

    def at(self, rate):
        """Return the widths of least predicted loss that save at least a fraction of the bytes.

        Raises:
            ConfigError: the narrowest widths save less.
        """
        most = self.rate([min(options) for options in self.options_of])
        if rate > most:
            raise ConfigError(
                f"Expected a rate that can be reached: at widths of at least "
                f"{min(map(min, self.options_of))} bits weights take {most:.1%} fewer bytes than "
                f"at 8. Received: rate={rate}"
            )
        costs = self._of_options(self._bytes)
        budget = Budget("bytes", costs, (1 - rate) * self.full + 1e-6)
        chosen = choose(self._of_options(_loss), [budget], self._links())
        return [options[i] for options, i in zip(self.options_of, chosen, strict=True)]

    def _of_options(self, measure):
        """Return one array per layer: `measure(entry, bits)` of each width."""
        pairs = zip(self.entries, self.options_of, strict=True)
        return [np.array([measure(entry, b) for b in each], "float64") for entry, each in pairs]

    def _links(self):
        """Return the `Link`s: with `strict`, layers that read one tensor have one width."""
        precision = self.options.initializer.precision
        if precision.bitwidth_assignment_mode != "strict" or not self.followers:
            return []
        place = {entry["layer"]: index for index, entry in enumerate(self.entries)}
        groups = [[place[r] for r in readers if r in place] for readers in self._readers().values()]
        free = [[i for i in group if len(self.options_of[i]) > 1] for group in groups]
        labels = [np.array(options) for options in self.options_of]
        return [Link(group, [labels[i] for i in group]) for group in free if len(group) > 1]

    def _readers(self):
        """Return {tensor: names of what reads it}, of the tensors that are rounded."""
        edges = self.model.plan["edges"]
        return {edge["name"].removesuffix(FAKE_QUANTIZE): edge["readers"] for edge in edges}

    def _followers(self):
        """Return the names of the tensors whose width follows that of the weights."""
        by_hand = self.options.initializer.precision.bitwidth_per_scope or ()
        named = {name.removesuffix(OUTPUT) for _, name in by_hand if name.endswith(OUTPUT)}
        if not named:
            return named
        graph = self.model.graph()
        fixed = {edge.name for edge in input_edges(graph)}
        fixed |= {t for t in named if self.options.overridden_bits("activations", t) is not None}
        return named - fixed

    def _require_fitting_kinds(self):
        """Raise a `ConfigError` where a tensor would need another kind of quantizer.

        Where the device calls for half the range, the second operand of a product is symmetric at
        8 bits, and as configured below.
        """
        if not self.followers:
            return
        followers = {tensor + FAKE_QUANTIZE for tensor in self.followers}
        seconds = _second_operands(self.model.graph()) & followers
        wrong = [
            name
            for name in sorted(seconds)
            if self.options.activation_spec(name.removesuffix(FAKE_QUANTIZE)).mode == "asymmetric"
        ]
        if wrong:
            raise ConfigError(
                f"Expected symmetric quantizers, or a fixed width in `scope_overrides`, for second "
                f"operands of products whose width is to move. Received: {wrong} with preset "
                f"{self.options.preset!r}"
            )

    def apply(self, bits):
        """Give the model other widths, one per layer; the configuration and the plan say so.

        Variables stay the same ones: weights, masks, statistics and the optimizer's slots. Ranges
        of weights whose width changed are set anew. Compiled functions are made anew.
        """
        chosen = {e["layer"]: b for e, b in zip(self.entries, bits, strict=True)}
        tensors = self._tensor_widths(chosen)
        self._set_quantizers(chosen, tensors)
        self._write_down(chosen, tensors)
        self.model.forget_compiled()

    def _tensor_widths(self, chosen):
        """Return {tensor: width}, of those that follow: that of the widest weights that read it."""
        if not self.followers:
            return {}
        device = self.model.config.target_device
        known = sorted({CODE, *(b for options in self.options_of for b in options)})
        fitting = widths_of("activations", device, known)
        found = {}
        for tensor, readers in self._readers().items():
            widest = max((chosen[r] for r in readers if r in chosen), default=CODE)
            if tensor in self.followers:
                found[tensor] = min((b for b in fitting if b >= widest), default=max(fitting))
        return found

    def _set_quantizers(self, chosen, tensors):
        device, graph = self.model.config.target_device, self.model.graph()
        first, seconds = first_layers(graph), _second_operands(graph)
        products = {node.name for node in graph.nodes if node.is_integer_product}
        for node in graph.layer_nodes().values():
            tensor = node.name.removesuffix(FAKE_QUANTIZE)
            if node.role is Role.FAKE_QUANTIZE and tensor in tensors:
                width, quantizer = tensors[tensor], node.op.quantizer
                half = node.name in seconds and self.options.overflow_fix_applies(device, width)
                if quantizer.bits != width:
                    _change(self.options, quantizer, width, half_range=half)
            elif node.name in chosen:
                width, is_first = chosen[node.name], node.name in first
                half = self.options.overflow_fix_applies(device, width, is_first)
                _change_weights(self.options, node.op, width, half and node.name in products)

    def _write_down(self, chosen, tensors):
        """Update configuration and plan."""
        model = self.model
        followed = {entry["layer"]: entry.get("activation_bits") for entry in self.entries}
        for tensor, readers in self._readers().items():
            followed |= {r: tensors[tensor] for r in readers if tensor in tensors and r in chosen}
        precision = [
            dict(entry)
            | {
                "bits": chosen[entry["layer"]],
                "bytes": self._bytes(entry, chosen[entry["layer"]]),
                "loss": _loss(entry, chosen[entry["layer"]]),
                "activation_bits": followed[entry["layer"]],
            }
            for entry in self.entries
        ]
        widths = {layer + WEIGHT: b for layer, b in chosen.items()}
        by_hand = self.options.initializer.precision.bitwidth_per_scope or ()
        widths |= {name: b for b, name in by_hand if name.endswith(OUTPUT)}
        widths |= {tensor + OUTPUT: b for tensor, b in tensors.items()}
        config = model.config
        algorithms = tuple(
            self.options.with_widths(widths) if each.name == "quantization" else each
            for each in config.algorithms
        )
        written = {name: getattr(config, name) for name in config.model_fields_set}
        config = type(config)(**written | {"algorithms": algorithms})
        remembered = model.get_config()["compression"]
        remembered["config"] = config.to_dict()
        remembered["plan"] = dict(model.plan) | {
            "precision": precision,
            "weights": [_described(model, entry) for entry in model.plan["weights"]],
            "edges": [_described_edge(model, entry) for entry in model.plan["edges"]],
        }


def _loss(entry, bits):
    """Return the loss that a layer of the plan is predicted to add at a width."""
    found = {int(b): error for b, error in entry["perturbations"].items()}
    return max(entry["trace"], 0.0) * found[bits] / 2


def _quantizers_of(layer):
    """Return the quantizers of a layer's weights that have equal steps."""
    transforms = (each for name in layer.weight_names for each in layer.transforms_of(name))
    return [each for each in transforms if isinstance(each, UniformQuantizer)]


def _change_weights(options, layer, width, half_range):
    """Give the quantizers of a layer another width, and a range for it."""
    changed = [quantizer for quantizer in _quantizers_of(layer) if quantizer.bits != width]
    for quantizer in changed:
        symmetric = not isinstance(quantizer, AsymmetricQuantizer)
        half = half_range and symmetric
        narrow = symmetric and width == CODE and not half
        _change(options, quantizer, width, half_range=half, narrow_range=narrow)
    if changed:
        spec = options.weight_spec(layer.name).range
        layer.initialize_ranges(make_observer(spec), force=True)


def _change(options, quantizer, width, **attributes):
    quantizer.bits = width
    quantizer.gradient_scale = options.gradient_scale_at(width)
    for name, value in attributes.items():
        setattr(quantizer, name, value)


def _second_operands(graph):
    """Return the names of the layers that round the second operand of a product of two tensors."""
    found = set()
    for node in graph.nodes:
        is_product = type(node.op).__name__ in PRODUCTS and len(node.inputs) == 2
        waiting = [node.inputs[1].producer] if is_product else []
        while waiting:
            producer = waiting.pop()
            if producer is not None and producer.role is Role.FAKE_QUANTIZE:
                found.add(producer.name)
            elif producer is not None and producer.role is Role.MOVEMENT:
                waiting.extend(edge.producer for edge in producer.carried)
    return found


def _described(model, entry):
    """Return an entry of the plan's weights that says the width that holds."""
    layer = model.get_layer(entry["layer"])
    text = _with_width(entry["transforms"], layer.transforms_of(entry["weight"]))
    return dict(entry) | {"transforms": text}


def _described_edge(model, entry):
    """Return an entry of the plan's edges that says the width that holds."""
    text = _with_width(entry["transform"], [model.get_layer(entry["name"]).quantizer])
    return dict(entry) | {"transform": text}


def _with_width(description, transforms):
    """Return a description such as `mask, 4 bits symmetric per channel` with another width."""
    parts = description.split(", ")
    for quantizer in transforms:
        if isinstance(quantizer, UniformQuantizer):
            place = next(i for i, part in enumerate(parts) if part[1:].startswith(" bits "))
            text = parts[place].removesuffix(LEVELS).split(" bits ", 1)[1]
            parts[place] = f"{quantizer.bits} bits {text}{LEVELS if quantizer.half_range else ''}"
    return ", ".join(parts)
