"""What a compressed model holds: transforms, quantizers, and their facts that are no weights."""

from keras_compress.graph.walk import all_layers
from keras_compress.quantizers import Quantizer
from keras_compress.records import json_copy
from keras_compress.transforms import Transform

# What quantizers hold beside variables, and what changes with their range or width.
ATTRIBUTES = ("calibrated", "signed", "bits", "narrow_range", "half_range", "gradient_scale")


def transforms_of(model):
    """Return every `Transform` inside a model, each once: quantizers and masks."""
    found = {id(x): x for x in all_layers(model) if isinstance(x, Transform)}
    return list(found.values())


def quantizers_of(model):
    """Return every `Quantizer` inside a model, each once."""
    return [transform for transform in transforms_of(model) if isinstance(transform, Quantizer)]


def facts_of(model):
    """Return what a compressed model holds beside variables, as JSON-able data."""
    return json_copy(
        {
            "progress": model.progress,
            "quantizers": [_attributes(quantizer) for quantizer in quantizers_of(model)],
            "config": model.config.to_dict(),
            "plan": model.plan,
        }
    )


def set_facts(model, facts):
    """Give a compressed model what `facts_of` returned.

    Returns:
        Whether compiled functions have to be made anew.

    Raises:
        ValueError: it has another number of quantizers. Nothing has been changed then.
    """
    quantizers = quantizers_of(model)
    if len(quantizers) != len(facts["quantizers"]):
        raise ValueError(
            f"Expected the state of a model with {len(quantizers)} quantizers, as '{model.name}' "
            f"has. Received: that of one with {len(facts['quantizers'])}. Compress with the "
            "configuration that the file was saved with."
        )
    before = [_attributes(quantizer) for quantizer in quantizers]
    for quantizer, attributes in zip(quantizers, facts["quantizers"], strict=True):
        for name in _attributes(quantizer):
            setattr(quantizer, name, attributes[name])
        if quantizer.calibrated:
            quantizer.observer = None
    model.progress.clear()
    model.progress.update(json_copy(facts["progress"]))
    if [each["bits"] for each in before] != [each["bits"] for each in facts["quantizers"]]:
        held = model.get_config()["compression"]  # widths are in both
        held.update(json_copy({part: facts[part] for part in ("config", "plan")}))
    return before != [_attributes(quantizer) for quantizer in quantizers]


def _attributes(quantizer):
    return {name: getattr(quantizer, name) for name in ATTRIBUTES if hasattr(quantizer, name)}


def seeds_of(model):
    """Return the variables that are neither weights nor metrics: seeds of random layers."""
    others = {id(variable) for variable in (*model.weights, *model.metrics_variables)}
    return [variable for variable in model.variables if id(variable) not in others]


def require_ready(model):
    """Raise when a model still lacks what only training with the `Compress` callback gives."""
    waiting = [quantizer.name for quantizer in quantizers_of(model) if not quantizer.calibrated]
    if waiting:
        raise ValueError(
            f"Model '{model.name}' has {len(waiting)} quantizers without a range: it was "
            "compressed without `data`. Train it with "
            "`callbacks=[keras_compress.callbacks.Compress()]`, or call "
            "`compress_model(model, config, data=...)`."
        )
