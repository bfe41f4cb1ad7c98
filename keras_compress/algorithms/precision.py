"""Mixed precision as a choice: layers, the widths each can have, and what those cost.

The loss that a width is predicted to add is HAWQ's: with the average trace t of the Hessian of the
training loss with respect to a weight W, and Q_b the quantizer of b bits,

    loss(b) = 1/2 * sum over the layer's weights of max(t, 0) * ||Q_b(W) - W||^2

Reference: Dong et al., "HAWQ-V2" (arXiv:1911.03852), section 3; Yao et al., "HAWQ-V3"
(arXiv:2011.10680), section 3.3 for the integer program.
"""

import dataclasses

import keras
import numpy as np

from keras_compress.algorithms.calibration import make_observer
from keras_compress.algorithms.precision_options import OUTPUT, WEIGHT
from keras_compress.algorithms.quantizer_plan import (
    FAKE_QUANTIZE,
    input_edges,
    quantization_plan,
    widths_of,
)
from keras_compress.bit_search import Budget, Infeasible, Link, choose, pareto
from keras_compress.compressed_layer import layer_spec, set_range_from
from keras_compress.graph.flops import flops
from keras_compress.options import ConfigError
from keras_compress.plan import PrecisionEntry, SizeOfChoice
from keras_compress.quantizers import stored_bytes

CODE = 8  # bits of the complexity that compression ratios compare with
WIDTHS = range(2, 9)
PREFERENCE = 1e-10  # for narrow activations among choices of one loss, of the largest loss


@dataclasses.dataclass(frozen=True)
class SearchedLayer:
    """A layer whose width is to be chosen.

    Attributes:
        name: of the layer.
        weights: attributes of its quantized weights.
        parameters: how many numbers these hold.
        steps: how many quantization steps go with them.
        products: multiplications for one sample.
        tensors: names of the rounded tensors that it multiplies by.
        options: the choices: pairs (bits of the weights, bits of the tensors).
        stored: {bits of the weights: width of the numbers that hold them in the IR}.
    """

    name: str
    weights: tuple
    parameters: int
    steps: int
    products: int
    tensors: tuple
    options: tuple
    stored: dict

    def bytes(self, bits):
        """Return the bytes of the weights in the IR, and of their steps unless they are floats."""
        return stored_bytes(self.parameters, self.stored[bits], self.steps)


def _stored_bits(entries):
    """Return {bits: width in the IR} of quantizers as the `WeightEntry`s of a layer have them."""
    other = {"half_range": False, "narrow_range": False}  # of the grid: they cost no byte
    return {
        bits: max(entry.transforms[-1](bits=bits, **other).stored_bits for entry in entries)
        for bits in WIDTHS
    }


class PrecisionProblem:
    """What a search chooses from: the layers of a graph and the widths they can have.

    Where complexity counts (a compression ratio, a bound on bit-operations), the width of an
    activation is that of the widest weights that read it (`liberal`), or of all of them (`strict`).
    Otherwise activations keep the width that is configured: on CPUs a narrower one gains nothing.
    Inputs of the model keep it in any case.

    Args:
        options: the `Quantization`.
        graph: the `Graph`.
        config: the whole `Config`.

    Raises:
        ConfigError: no candidate is a width that the device computes with.
    """

    def __init__(self, options, graph, config):
        self.options, self.graph, self.config = options, graph, config
        self.precision = options.initializer.precision
        self.follows = bool(
            self.precision.least_ratio is not None
            or self.precision.budget.bit_operations is not None
        )
        self.inputs = input_edges(graph)
        self.plan = quantization_plan(options, graph, config, True)
        self.layers = self._searched()

    def _searched(self):
        tensors = {}
        for entry in self.plan.edges:
            for node, _ in entry.group.readers:
                if node is not None:
                    tensors.setdefault(node.name, []).append(entry)
        weights = {}
        for entry in self.plan.weights:
            weights.setdefault(entry.layer, []).append(entry)
        return [
            self._layer(name, entries, tensors.get(name, ())) for name, entries in weights.items()
        ]

    def _layer(self, name, entries, tensors):
        op = self.graph.layer_nodes()[name].op
        quantizers = [entry.transforms[-1]() for entry in entries]
        shapes = [tuple(layer_spec(op).read(op, entry.weight).shape) for entry in entries]
        nodes = [node for node in self.graph.nodes if node.name == name]
        return SearchedLayer(
            name,
            tuple(entry.weight for entry in entries),
            sum(int(np.prod(shape)) for shape in shapes),
            sum(
                int(np.prod(quantizer.variable_shape(shape)))
                for quantizer, shape in zip(quantizers, shapes, strict=True)
            ),
            sum(flops(node) for node in nodes if node.is_integer_product) // 2,
            tuple(entry.name.removesuffix(FAKE_QUANTIZE) for entry in tensors),
            self._options(name, tensors),
            _stored_bits(entries),
        )

    def _options(self, name, tensors):
        candidates = widths_of("weights", self.config.target_device, self.precision.bits)
        fixed = self.options.overridden_bits("weights", name)
        of_weights = candidates if fixed is None else [fixed]
        of_tensors = [self._tensor_widths(entry) for entry in tensors]
        if not of_tensors or not self.follows:
            widest = max((max(each) for each in of_tensors), default=CODE)
            return tuple((bits, widest) for bits in of_weights)
        common = sorted(set.intersection(*map(set, of_tensors))) or [CODE]
        pairs = [(bits, other) for bits in of_weights for other in common]
        strict = self.precision.bitwidth_assignment_mode == "strict"
        fitting = [(a, b) for a, b in pairs if (a == b if strict else a <= b)]
        return tuple(fitting or pairs)  # what was fixed by hand need not fit together

    def _tensor_widths(self, entry):
        name = entry.group.edges[0].name
        fixed = self.options.overridden_bits("activations", name)
        if fixed is not None:
            return [fixed]
        if not self.follows or self.inputs.issuperset(entry.group.edges):
            return [self.options.activation_spec(name).bits]
        return widths_of("activations", self.config.target_device, self.precision.bits)

    @property
    def candidates(self):
        """The widths that weights can have, rising."""
        return sorted({bits for layer in self.layers for bits, _ in layer.options})

    def of_width(self, bits):
        """Return the `Quantization` with this width for all weights that are searched for."""
        return self.options.with_widths({layer.name + WEIGHT: bits for layer in self.layers})

    def links(self):
        """Return the `Link`s: all layers that read a tensor see one width of it."""
        readers = {}
        for index, layer in enumerate(self.layers):
            for tensor in layer.tensors:
                readers.setdefault(tensor, []).append(index)
        return [
            Link(indices, [np.array([b for _, b in self.layers[i].options]) for i in indices])
            for indices in readers.values()
            if len(indices) > 1
        ]

    def costs(self, cost):
        """Return one array per layer: `cost(layer, bits, activation bits)` of each option."""
        return [
            np.array([cost(layer, *option) for option in layer.options], "float64")
            for layer in self.layers
        ]

    def byte_costs(self):
        """Return the bytes of every option of every layer."""
        return self.costs(lambda layer, bits, _: layer.bytes(bits))

    def budgets(self, times=None):
        """Return the `Budget`s that the configuration asks for.

        Args:
            times: with a bound on latency, {bits: ({layer: milliseconds}, the rest)}.
        """
        bounds, ratio = self.precision.budget, self.precision.least_ratio
        found = []
        if ratio:
            complexity = self.costs(lambda layer, a, b: max(a, b) * layer.products)
            total = CODE * sum(layer.products for layer in self.layers)
            found.append(Budget("bit complexity", complexity, total / ratio))
        if bounds.bytes is not None:
            found.append(Budget("bytes", self.byte_costs(), bounds.bytes))
        if bounds.bit_operations is not None:
            operations = self.costs(lambda layer, a, b: a * b * layer.products)
            found.append(Budget("bit-operations", operations, bounds.bit_operations))
        if bounds.latency is not None:
            rest = max(each for _, each in times.values())
            milliseconds = self.costs(lambda layer, a, _: times[a][0].get(layer.name, 0.0))
            found.append(Budget("milliseconds", milliseconds, bounds.latency - rest))
        return found

    def losses(self, traces, perturbations):
        """Return the predicted loss of every option of every layer.

        Args:
            traces: {(layer, weight): average trace}.
            perturbations: {(layer, weight): {bits: squared norm of the error}}.
        """

        def loss(layer, bits, _):
            keys = [(layer.name, weight) for weight in layer.weights]
            return sum(max(traces[key], 0.0) * perturbations[key][bits] for key in keys) / 2

        return self.costs(loss)

    def perturbations(self):
        """Return {(layer, weight): {bits: squared norm of what rounding changes}}."""
        found = {}
        for bits in self.candidates:
            plan = quantization_plan(self.of_width(bits), self.graph, self.config, True)
            for entry in plan.weights:
                quantizer = entry.transforms[-1]()
                error = self._squared_error(entry, quantizer)
                found.setdefault((entry.layer, entry.weight), {})[quantizer.bits] = error
        return found

    def _squared_error(self, entry, quantizer):
        op = self.graph.layer_nodes()[entry.layer].op
        values = np.array(layer_spec(op).read(op, entry.weight).numpy(), "float32")
        quantizer.build(values.shape)
        quantizer.enable()  # one that is staged waits for its epoch
        observer = make_observer(self.options.weight_spec(entry.layer).range)(quantizer)
        set_range_from(quantizer, values, observer)
        rounded = np.asarray(keras.ops.convert_to_numpy(quantizer(values)), "float64")
        return float(np.square(rounded - values).sum())

    def solve(self, traces, perturbations, times=None):
        """Return the index of the best option of every layer.

        Raises:
            ConfigError: the bounds cannot be met; it says what could be.
        """
        losses, budgets, links = self.losses(traces, perturbations), self.budgets(times), []
        if self.follows:
            links = self.links()
            largest = max(float(each.max()) for each in losses) or 1.0
            preferred = self.costs(lambda layer, a, b: PREFERENCE * largest * b / CODE)
            losses = [a + b for a, b in zip(losses, preferred, strict=True)]
        try:
            return choose(losses, budgets, links)
        except Infeasible:
            raise ConfigError(self._impossible(budgets, links, times)) from None

    def _impossible(self, budgets, links, times):
        texts = []
        for budget in budgets:
            least = budget.total(choose(budget.costs, (), links))
            texts.append(f"{budget.name} of at least {least:,.6g}, received {budget.limit:,.6g}")
            if budget.name == "bit complexity" and least:
                most = CODE * sum(layer.products for layer in self.layers) / least
                texts[-1] = (
                    f"a compression_ratio of at most {most:.4g}, "
                    f"received {self.precision.least_ratio:.4g}"
                )
        rest = "" if times is None else " beside what no width changes"
        return (
            f"Expected bounds that widths of {self.candidates} can keep{rest}: {'; '.join(texts)}."
            + (" Each can be kept, but not all together." if len(budgets) > 1 else "")
        )

    def widths(self, chosen):
        """Return {full name of a quantizer: bits} of the options chosen."""
        found = {}
        for layer, index in zip(self.layers, chosen, strict=True):
            bits, others = layer.options[index]
            found[layer.name + WEIGHT] = bits
            if self.follows:
                found |= {tensor + OUTPUT: others for tensor in layer.tensors}
        return found

    def entries(self, chosen, traces, perturbations):
        """Return the `PrecisionEntry`s of the plan."""
        return tuple(
            PrecisionEntry(
                layer.name,
                layer.parameters,
                float(np.mean([traces[layer.name, weight] for weight in layer.weights])),
                {
                    bits: sum(perturbations[layer.name, weight][bits] for weight in layer.weights)
                    for bits in sorted({bits for bits, _ in layer.options})
                },
                layer.options[index][0],
                layer.bytes(layer.options[index][0]),
                float(loss[index]),
                layer.options[index][1] if layer.tensors else None,
            )
            for layer, index, loss in zip(
                self.layers, chosen, self.losses(traces, perturbations), strict=True
            )
        )

    def front(self, traces, perturbations):
        """Return the best choices for bytes, `SizeOfChoice`s by rising size."""
        losses = self.losses(traces, perturbations)
        found = pareto(losses, self.byte_costs(), self.links() if self.follows else ())
        return tuple(SizeOfChoice(int(cost), loss) for cost, loss, _ in found)
