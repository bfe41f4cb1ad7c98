"""From a compressed torch module to a smaller one, to a plain one, and to OpenVINO IR or ONNX."""

import copy
import dataclasses
import json
import warnings

import keras
import numpy as np
import torch

from keras_compress.algorithms.pruning_plan import MaskedGraph
from keras_compress.export.files import checked_target
from keras_compress.export.onnx import rename_ports
from keras_compress.export.onnx import use_integer_weights as use_integer_weights_in_onnx
from keras_compress.export.openvino import fold_constants, name_layers, run_in_integers
from keras_compress.export.saved_model import signature_names
from keras_compress.export.verify import verify as verified
from keras_compress.model_facts import require_ready
from keras_compress.shrink import shrink as shrink_keras
from keras_compress.shrink import variable_cuts
from keras_compress.torch.attach import (
    copy_effective,
    fixed_quantizer,
    insert_quantizers,
    raw_tensor,
)
from keras_compress.torch.fake_quantize import FakeQuantize
from keras_compress.whole_files import replacing


def strip(module):
    """Return a plain `torch.fx.GraphModule`: weights baked in, ranges of activations fixed.

    It holds classes of `torch.nn` and of the user alone, and a `FakeQuantize` on each rounded edge;
    no parametrization, and nothing of Keras computes in it. Filters that masks switch off are
    zero: `shrink` takes them out.

    It computes what the compressed module does in evaluation mode, bit for bit.

    Args:
        module: what `keras_compress.torch.compress_model` returned, also within
            `DistributedDataParallel`. It is left untouched.

    Raises:
        TypeError: not a compressed module.
        ValueError: a quantizer has no range yet, or a grid that torch has no operation for.
    """
    module, shadow = compressed(module)
    require_ready(shadow.model)
    plain = copy.deepcopy(shadow.original)
    copy_effective(module, plain)

    insert_quantizers(
        plain, shadow, lambda node: fixed_quantizer(node) or FakeQuantize(node.op.quantizer)
    )
    return plain.to(shadow.device(module)).eval()


def shrink(module):
    """Return a smaller compressed module, without the channels that masks switch off.

    Weights, masks and ranges are cut alike, so that training goes on where it was, with a new
    optimizer and a new `Compression`. The output stays, up to the order of sums.

    Args:
        module: a compressed module with filter pruning. It is left untouched.

    Raises:
        TypeError: not a compressed module.
        ValueError: it has no masks, or a step of it whose sizes are fixed cannot be made smaller.
    """
    module, shadow = compressed(module)
    shadow.share(module)
    small = shrink_keras(shadow.model)
    plain = copy.deepcopy(shadow.original)
    cuts = variable_cuts(MaskedGraph.of(shadow.model.graph()))
    weights = {}
    for (name, attribute), weight in shadow.present():
        variable, tensor = shadow.variable(name, attribute), raw_tensor(module, weight).detach()
        kept = _kept(weight, tensor.shape, cuts.get(id(variable), {}))
        owner, layer = plain.get_submodule(weight.path), small.get_layer(name)
        cut = tensor[np.ix_(*kept)].clone()
        if isinstance(getattr(owner, weight.name), torch.nn.Parameter):
            cut = torch.nn.Parameter(cut, requires_grad=raw_tensor(module, weight).requires_grad)
        setattr(owner, weight.name, cut)
        _set_sizes(owner, layer)
        if weight.shape is not None:
            shape = list(weight.shape)
            for axis, positions in cuts.get(id(variable), {}).items():
                shape[axis] = len(positions)
            weight = dataclasses.replace(weight, shape=tuple(shape))
        weights[name, attribute] = weight
    _set_fixed_shapes(plain, shadow, small)
    _require_calls(plain, shadow.examples)
    twin = copy.deepcopy(plain).to(shadow.device(module)).train(module.training)
    return dataclasses.replace(
        shadow, model=small, original=plain, weights=weights, hooks=[]
    ).attach(twin)


def _kept(weight, shape, cut):
    """Return the positions of each axis of a torch tensor that stay, from those of Keras'."""
    numbers = torch.arange(int(np.prod(shape))).reshape(tuple(shape))
    numbers = weight.to_keras(numbers).numpy()
    for axis, positions in cut.items():
        numbers = np.take(numbers, positions, axis)
    return [np.unique(axis) for axis in np.unravel_index(numbers, shape)]


def _set_sizes(module, layer):
    """Let the attributes of a module say the sizes that its weights have."""
    own = getattr(module, "weight", None)
    own = getattr(module, "running_mean", None) if own is None else own
    sizes = () if own is None else tuple(own.shape)
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = sizes
    elif isinstance(module, torch.nn.Embedding):
        module.embedding_dim = sizes[1]
    elif hasattr(module, "num_features"):
        module.num_features = sizes[0]
    elif hasattr(module, "transposed"):
        of_channels = getattr(layer, "depth_multiplier", None)  # depthwise: a group per channel
        groups = sizes[0] // of_channels if of_channels else getattr(layer, "groups", 1)
        first, second = sizes[0], sizes[1] * groups
        ins, outs = (first, second) if module.transposed else (second, first)
        module.in_channels, module.out_channels, module.groups = ins, outs, groups


def _set_fixed_shapes(plain, shadow, small):
    """Change the sizes that a reshape of the graph names, where they have."""
    before = {edge.name: edge.shape for edge in shadow.model.graph().edges}
    after = {edge.name: edge.shape for edge in small.graph().edges}
    nodes = {node.name: node for node in plain.graph.nodes}
    for name, made in shadow.tensors.items():
        node = nodes.get(made)
        target = getattr(node, "target", None)
        if before.get(name) == after.get(name) or target not in ("view", "reshape", torch.reshape):
            continue
        is_flat = len(node.args) > 2 or not isinstance(node.args[1], (tuple, list))
        sizes = list(node.args[1:] if is_flat else node.args[1])
        for axis, (old, new) in enumerate(zip(before[name], after[name], strict=True)):
            if sizes[axis] == old:
                sizes[axis] = new
        node.args = (node.args[0], *sizes) if is_flat else (node.args[0], sizes)
    plain.recompile()


def _require_calls(plain, examples):
    try:
        with torch.no_grad():
            plain.to(examples[0].device)(*examples)
    except RuntimeError as error:
        raise ValueError(
            "Expected a module whose steps take their sizes from the tensors they get, so that "
            "channels can be removed. Write -1 for sizes that depend on the number of channels. "
            f"Received: {error}"
        ) from error


def compressed(module):
    """Return (compressed module, its `Shadow`); the module may be inside a wrapper.

    Raises:
        TypeError: it is none.
    """
    inner = getattr(module, "module", module)
    if not hasattr(inner, "shadow"):
        raise TypeError(
            "Expected a module made by `keras_compress.torch.compress_model`. "
            f"Received: module of type {type(module).__name__}"
        )
    return inner, inner.shadow


def export(module, path, example_inputs=None, *, verify=True):
    """Write a module for deployment; the suffix of the path decides the format.

    `.xml` is OpenVINO IR with integer weights and `FakeQuantize` on activations, which the CPU runs
    in 8 bits, and a `.bin`. `.onnx` has integer weights of convolutions and Q/DQ pairs. The number
    of samples stays open. The output appears whole or not at all.

    Args:
        module: a compressed, stripped or plain module. A compressed one is stripped first.
        path: where to write, in a folder that exists.
        example_inputs: tensor, or tuple of them, to trace with. None: those that a compressed
            module was traced with.
        verify: whether what was made of a compressed module is run on this machine's CPU and
            compared with it: see `keras_compress.verify`.

    Returns:
        A `VerifyReport` for a compressed module, else None.

    Raises:
        ValueError: unknown suffix; no example inputs; what `strip` raises.
        OSError: the output cannot be written.
    """
    target = checked_target(path)
    if target.suffix not in WRITERS:
        raise ValueError(
            "Expected a path that ends in '.xml' (OpenVINO IR) or '.onnx'. "
            f"Received: path={str(target)!r}"
        )
    shadow = getattr(getattr(module, "module", module), "shadow", None)
    if shadow is None and example_inputs is None:
        raise ValueError(
            "Expected `example_inputs` for a module that is not compressed. "
            "Received: example_inputs=None"
        )
    examples = shadow.examples if example_inputs is None else example_inputs
    examples = examples if isinstance(examples, tuple) else (examples,)
    plain = copy.deepcopy(module).eval() if shadow is None else strip(module)
    plain = plain.to(examples[0].device)
    if shadow is not None:
        shadow.share(getattr(module, "module", module))
    suffixes = (".bin", ".xml") if target.suffix == ".xml" else ()
    with replacing(target, *suffixes) as temporary, torch.no_grad(), warnings.catch_warnings():
        # Both converters trace modules as torch no longer recommends; its newer ways need packages
        # beside torch, or lack operations.
        warnings.simplefilter("ignore", DeprecationWarning)
        WRITERS[target.suffix](plain, temporary, examples, shadow and shadow.model)
    return verified(shadow.model, target) if shadow is not None and verify else None


def _write_ir(module, path, examples, model):
    """Write `path` (.xml) and the .bin beside it; `model` is the shadow's, or None."""
    import openvino as ov
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(module, example_input=examples)
    ov_model = frontend.convert(frontend.load(decoder))
    shapes = [ov.PartialShape([-1, *example.shape[1:]]) for example in examples]
    ov_model.reshape(dict(zip(ov_model.inputs, shapes, strict=True)))
    fold_constants(ov_model)
    if model is not None:
        name_layers(ov_model, model)
        ports = (ov_model.inputs, ov_model.outputs)
        for port, name in zip(sum(ports, []), sum(signature_names(model), []), strict=True):
            port.get_tensor().set_names({name})
        ov_model.set_rt_info(json.dumps(model.config.to_dict()), ["keras_compress", "config"])
    run_in_integers(ov_model)
    ov.save_model(ov_model, str(path), compress_to_fp16=False)


def _write_onnx(module, path, examples, model):
    import onnx

    inputs = [f"input_{index}" for index in range(len(examples))]
    results = keras.tree.flatten(module(*examples))
    outputs = [f"output_{index}" for index in range(len(results))]
    axes = {name: {0: "batch"} for name in inputs + outputs}
    options = {"input_names": inputs, "output_names": outputs, "dynamic_axes": axes}
    torch.onnx.export(module, examples, str(path), dynamo=False, **options)
    proto = onnx.load(str(path))
    if model is not None:
        rename_ports(proto.graph, *signature_names(model))
    use_integer_weights_in_onnx(proto.graph)
    onnx.save(proto, str(path))


WRITERS = {".xml": _write_ir, ".onnx": _write_onnx}
