"""Is the exported file the trained model? Equal inputs through both, and what ran in 8 bits.

The file runs on OpenVINO's CPU plugin with `INFERENCE_PRECISION_HINT=f32`: processors with bfloat16
arithmetic would otherwise compute the float parts of any model with 8 bits of mantissa, and the
difference would be the processor's, not the export's.
"""

import dataclasses
import json
import math
import pathlib

import keras
import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from keras_compress.data import input_batches
from keras_compress.export.files import stored_files, zipped_size
from keras_compress.export.openvino import read_saved_model
from keras_compress.export.precisions import eight_bit_share, layer_precisions
from keras_compress.export.saved_model import signature_names
from keras_compress.graph.trace import trace
from keras_compress.layers import FakeQuantize
from keras_compress.rendering import Rendered
from keras_compress.replicas import predict_here
from keras_compress.whole_files import replacing

UNKNOWN_SIZE = 32  # stands in for an axis of unknown length, other than the batch
NOTHING = 1e-20  # difference from an output that never changes which is none


@dataclasses.dataclass(frozen=True)
class OutputAgreement:
    """One output of the exported model against the trained one.

    Attributes:
        name: name of the output.
        largest: largest absolute difference.
        relative: that, divided by the range (max - min) of the trained model's output.
        top1: share of samples with the same largest class, in [0, 1]; None unless 2-D.
    """

    name: str
    largest: float
    relative: float
    top1: float | None


@dataclasses.dataclass(frozen=True)
class VerifyReport(Rendered):
    """How an exported file compares with the trained model.

    Attributes:
        path: the exported file.
        samples: number of samples compared.
        outputs: tuple of `OutputAgreement`.
        layers: tuple of `LayerPrecision`: operations with weights, as executed on this machine.
        device: name of the processor.
    """

    path: str
    samples: int
    outputs: tuple
    layers: tuple
    device: str

    @property
    def relative(self):
        """The largest relative difference over all outputs."""
        return max(output.relative for output in self.outputs)

    @property
    def eight_bit_layers(self):
        """Number of weighted operations that run in 8 bits."""
        return sum(layer.eight_bit for layer in self.layers)

    @property
    def eight_bit_share(self):
        """Share of the FLOPs of weighted operations that runs in 8 bits, in [0, 1]."""
        return eight_bit_share(self.layers)

    @property
    def stored_bytes(self):
        """Size of the exported files now, in bytes."""
        return sum(file.stat().st_size for file in stored_files(self.path))

    @property
    def zipped_bytes(self):
        """The same when they are deflated, as in a `.zip`: where sparsity shows. Reads them."""
        return zipped_size(stored_files(self.path))

    def to_dict(self):
        """Return the report as JSON-able data; a difference that is no number becomes None."""
        data = dataclasses.asdict(self) | {
            "relative": self.relative,
            "layers_8_bit": self.eight_bit_layers,
            "layers_total": len(self.layers),
            "flops_8_bit": self.eight_bit_share,
        }
        return keras.tree.map_structure(_finite_or_none, data)

    def renderable(self):
        outputs = Table(
            "output", "largest difference", "of its range", "same top-1", box=box.SIMPLE
        )
        for output in self.outputs:
            top1 = "" if output.top1 is None else f"{output.top1:.2%}"
            outputs.add_row(output.name, f"{output.largest:.3g}", f"{output.relative:.2e}", top1)
        layers = Table("layer", "type", "precision", box=box.SIMPLE)
        for layer in self.layers:
            layers.add_row(layer.layer, layer.type, layer.precision)
        return Group(
            f"{self.path} against the trained model, {self.samples} samples; "
            f"{self.stored_bytes:,} bytes, {self.zipped_bytes:,} zipped",
            outputs,
            f"{self.eight_bit_layers} of {len(self.layers)} weighted operations run in 8 bits "
            f"({self.eight_bit_share:.1%} of their FLOPs) on {self.device}",
            layers,
        )


def verify(model, path, data=None, samples=32, seed=0):
    """Compare an exported file with the trained model and write the result beside the file.

    Args:
        model: the Keras model that was exported.
        path: the exported `.xml`, `.onnx` or SavedModel directory.
        data: samples to compare on, in any form that `fit` takes. None: random inputs within
            the range of the model's input quantizers, else standard normal.
        samples: how many samples to compare.
        seed: of the random inputs.

    Returns:
        A `VerifyReport`, also written to `<name>.verify.json`.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: `data` does not fit the model.
    """
    import openvino as ov

    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"Expected an exported model to verify. Received: path={str(path)!r}"
        )
    graph = trace(model)
    if data is None:
        inputs = random_inputs(graph, samples, seed)
    else:
        batches = list(input_batches(data, graph.inputs, samples))
        inputs = [np.concatenate(parts)[:samples] for parts in zip(*batches, strict=True)]
    names, output_names = signature_names(model)
    packed = keras.tree.pack_sequence_as(graph.input_structure, inputs)
    expected = keras.tree.flatten(predict_here(model, packed))

    core = ov.Core()
    compiled = compile_on_cpu(core, path)
    results = compiled(dict(zip(names, inputs, strict=True)))
    agreements = tuple(
        agreement(name, wanted, results[compiled.output(name)])
        for name, wanted in zip(output_names, expected, strict=True)
    )
    report = VerifyReport(
        path=str(path),
        samples=len(inputs[0]),
        outputs=agreements,
        layers=layer_precisions(compiled, [node.name for node in graph.nodes]),
        device=core.get_property("CPU", "FULL_DEVICE_NAME"),
    )
    target = path.with_suffix(".verify.json")
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def compile_on_cpu(core, path, **properties):
    """Return an exported model compiled for the CPU, its float parts in float32."""
    try:
        ov_model = read_saved_model(path) if path.is_dir() else core.read_model(str(path))
    except RuntimeError as error:
        raise RuntimeError(f"OpenVINO cannot read '{path}', so it was not run: {error}") from error
    return core.compile_model(ov_model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"} | properties)


def agreement(name, expected, received):
    """Compare one output, arrays `(batch, ...)`."""
    expected, received = (np.asarray(a, dtype="float64") for a in (expected, received))
    largest = float(np.abs(expected - received).max())
    spread = float(np.ptp(expected))
    # What never changes has no range; the plugin's integer kernels may leave 1e-30 in a zero.
    relative = largest / spread if spread else (0.0 if largest < NOTHING else math.inf)
    top1 = None
    if expected.ndim == 2 and expected.shape[1] > 1:
        top1 = float((expected.argmax(axis=1) == received.argmax(axis=1)).mean())
    return OutputAgreement(name, largest, relative, top1)


def random_inputs(graph, samples, seed=0):
    """Return random arrays for the inputs of a graph, `(samples, ...)` each.

    Floats are uniform over the range of the quantizer that reads the input, else standard normal;
    integers are valid indices of every `Embedding` in the model; booleans are coin flips.
    """
    random = np.random.default_rng(seed)
    sizes = [n.op.input_dim for n in graph.nodes if isinstance(n.op, keras.layers.Embedding)]
    arrays = []
    for edge in graph.inputs:
        shape = (samples, *(UNKNOWN_SIZE if size is None else size for size in edge.shape[1:]))
        ranges = [n.op.quantizer for n in edge.consumers if isinstance(n.op, FakeQuantize)]
        if edge.dtype == "bool":
            array = random.integers(0, 2, shape)
        elif not edge.dtype.startswith(("float", "bfloat")):
            array = random.integers(0, min(sizes, default=2), shape)
        elif ranges:
            low, high = ranges[0].effective_range()
            array = random.uniform(low.min(), high.max(), shape)
        else:
            array = random.standard_normal(shape)
        arrays.append(array.astype("float32" if edge.dtype == "bfloat16" else edge.dtype))
    return arrays


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
