"""The verbs `plan` and `compress_model`: trace, decide, rebuild, and prepare for training."""

import contextlib
import dataclasses
import itertools
import logging

from rich.console import Console
from rich.progress import Progress, track

from keras_compress.algorithms import Algorithm
from keras_compress.compressed_layer import layer_spec
from keras_compress.compressed_model import compressed_by
from keras_compress.config import Config
from keras_compress.data import input_batches
from keras_compress.graph.trace import trace
from keras_compress.layers import PACKAGE, CompressedLayer, FakeQuantize
from keras_compress.options import ConfigError
from keras_compress.plan import Plan
from keras_compress.replicas import (
    is_one_of_many_workers,
    of_all_workers,
    scope_of,
    take_weights_of_first_worker,
)
from keras_compress.training.batch_norm import adapt_to_batches
from keras_compress.training.latency import find_latency_level
from keras_compress.training.legr import RankingSearch
from keras_compress.training.precision import Found, PrecisionSearch

logger = logging.getLogger(PACKAGE)

_WIDTHS_UNKNOWN = (
    "Widths are searched for when there are labelled data: `plan(model, config, data=...)`."
)


def plan(model, config, data=None):
    """Say what `compress_model` would do, without doing it.

    Args:
        model: any built Keras 3 model.
        config: dict, path of a JSON file, or `Config`.
        data: labelled samples for a search for widths (HAWQ), as `compress_model` takes them. None:
            widths are searched for only where a file with traces is there.

    Returns:
        A `Plan`: printable, and a dictionary through `.to_dict()`.
    """
    config = _loaded(config)
    graph = _checked_graph(model)
    if not PrecisionSearch.is_possible(config, data):
        return _plan(graph, config).merge(Plan(graph.name, notes=(_WIDTHS_UNKNOWN,)))
    found = _find_widths(config, graph, model, data, verbose=False)
    return _with_widths(_plan(graph, found.config), config, found)


def compress_model(model, config, data=None, verbose=True):
    """Clone a Keras model with compressed layers in place of its own.

    The user's model is left untouched; weights are copied and layer names stay.

    Args:
        model: any built Keras 3 model.
        config: dict, path of a JSON file (comments allowed), or `Config`. NNCF's format is
            accepted as it stands.
        data: samples to calibrate activation ranges and adapt batch-norm statistics with:
            `tf.data.Dataset`, `keras.utils.PyDataset`, NumPy arrays or a generator of batches,
            labelled or not. None: activation ranges come from the first training batches. A
            learned ranking (LeGR) needs labels, and a `model` that is compiled. Where several
            workers train together, batches are joined from those of each.
        verbose: whether long work shows a progress bar.

    Returns:
        An uncompiled `CompressedModel`, on the devices of `model`.

    Raises:
        TypeError, ValueError: not a Keras model, unbuilt, already compressed, bad configuration or
            data; nothing has been changed then.
    """
    config = _loaded(config)
    graph = _checked_graph(model)
    with scope_of(model):
        return _compressed(model, graph, config, data, verbose)


def _compressed(model, graph, config, data, verbose):
    _require_one_answer(config, graph, model, data)
    found = _find_widths(config, graph, model, data, verbose)
    asked, config = config, found.config
    decided = _with_widths(_plan(graph, config, with_data=data is not None), asked, found)
    search = RankingSearch.of(config, model, data, graph.inputs)
    batches = None if data is None else of_all_workers(_read(data, graph, config))
    compressed = compressed_by(graph, decided, config)
    compressed.dtype_policy = model.dtype_policy  # `compile` asks it whether losses are scaled
    take_weights_of_first_worker(compressed)
    if any(algorithm.needs_teacher for algorithm in config.algorithms):
        compressed.set_teacher(graph)
    for status in decided.keys:
        level = logging.INFO if status.status == "honoured" else logging.WARNING
        logger.log(level, "%s: %s (%s)", status.key, status.status, status.reason)
    if search is not None:
        _learn_ranking(compressed, search, graph, config, verbose)
    _find_level(compressed, model, config, verbose)
    _prepare(compressed, config, batches, verbose)
    return compressed


def _require_one_answer(config, graph, model, data):
    """Raise where each of several workers would search by itself, and find something else."""
    if not is_one_of_many_workers():
        return
    searched = [algorithm.name for algorithm in config.algorithms if algorithm.has_latency_target]
    if PrecisionSearch.of(config, graph, model, data) is not None:
        searched.append("initializer.precision")
    if RankingSearch.of(config, model, data, graph.inputs) is not None:
        searched.append("interlayer_ranking_type")
    if searched:
        raise ValueError(
            "Expected a configuration without a search under MultiWorkerMirroredStrategy, where "
            "every worker would search by itself and end with a model of its own. "
            f"Received: a search for {', '.join(searched)}. Compress the model in one process, "
            "save it, and call `keras.models.load_model` in every worker's `strategy.scope()`."
        )


def _find_widths(config, graph, model, data, verbose):
    """Return the configuration with every width written out, where it asks for a search."""
    search = PrecisionSearch.of(config, graph, model, data)
    if search is None:
        return Found(config, (), ())
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not verbose) as bar:
        task = bar.add_task("traces of the Hessian", total=search.precision.draws)
        return search.run(lambda draw, _: bar.update(task, completed=draw))


def _with_widths(decided, asked, found):
    """Return a plan that shows what was searched for, and the keys that were asked for."""
    return dataclasses.replace(
        decided, precision=found.entries, front=found.front, keys=asked.key_report()
    )


def _loaded(config):
    """Load a configuration and make sure that it asks for something that can be done."""
    config = Config.load(config)
    if not config.algorithms:
        known = sorted({each.name for each in Algorithm.registry.values()})
        raise ConfigError(
            f"Expected a configuration with at least one algorithm of {known} under `compression`. "
            "Received: none."
        )
    return config


def _checked_graph(model):
    graph = trace(model)
    for node in graph.nodes:
        if isinstance(node.op, (CompressedLayer, FakeQuantize)):
            raise ValueError(
                f"Expected a model that is not compressed yet. Received: model '{model.name}', "
                f"whose layer '{node.name}' is a {type(node.op).__name__}. Compress the float "
                "model, or what `keras_compress.strip(model, like=original)` gives back."
            )
        spec = layer_spec(node.op)
        for weight in spec.names if spec is not None else ():
            value = spec.read(node.op, weight)
            if value is not None and 0 in value.shape:
                raise ValueError(
                    "Expected layers whose weights hold numbers. Received: layer "
                    f"'{node.name}', whose '{weight}' has the shape {tuple(value.shape)}: its "
                    "input is empty. Leave the layer out."
                )
    return graph


def _plan(graph, config, with_data=False):
    decided = Plan(graph.name, keys=config.key_report())
    for algorithm in _in_order(config):
        try:
            found = algorithm.plan(graph, config, with_data=with_data)
        except ConfigError as error:
            place = ("compression", config.algorithms.index(algorithm))
            raise ConfigError(error.below(*place)) from None
        decided = decided.merge(found)
    return decided


def _in_order(config):
    """Return the algorithms of a configuration, those of an earlier stage first."""
    return sorted(config.algorithms, key=lambda algorithm: algorithm.stage)


def _read(data, graph, config):
    """Read and check the samples that calibration and batch-norm adaptation need."""
    samples = max((algorithm.samples_needed for algorithm in config.algorithms), default=0)
    return list(input_batches(data, graph.inputs, samples)) if samples else []


def _learn_ranking(model, search, graph, config, verbose):
    """Let LeGR find the ranking of the filters, on a model that has masks and nothing else."""
    pruning = search.pruning
    masked = pruning.plan(graph, config, with_data=True)
    candidate = compressed_by(graph, masked, Config(algorithms=[pruning]))
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not verbose) as bar:
        task = bar.add_task("learning the ranking", total=search.options.generations)

        def report(generation, fitness, highest):
            loss = f"learning the ranking: loss {-highest:.4g}"
            bar.update(task, advance=1, description=loss)

        pruning.set_ranking(model, search.run(candidate, report))


def _find_level(model, original, config, verbose):
    """Find out by measuring how far to prune, where a latency is the target."""
    for algorithm in config.algorithms:
        if not algorithm.has_latency_target:
            continue
        console = Console(stderr=True)
        with console.status("measuring latency") if verbose else contextlib.nullcontext():
            found = find_latency_level(model, original, algorithm)
        algorithm.set_latency(model, dataclasses.asdict(found))
        logger.info(
            "%s: at level %.3f the IR takes %.3g ms (median %.3g, quartiles %.2g apart), %.1f%% "
            "less than the float model's %.3g ms.",
            algorithm.name,
            found.level,
            found.ms,
            found.median,
            found.spread,
            100 * found.removed,
            found.float_ms,
        )


def _prepare(model, config, batches, verbose):
    """Start every algorithm on the new model, then adapt its batch-norm statistics."""

    def progress(items, description):
        console = Console(stderr=True)
        return track(items, description, console=console, transient=True, disable=not verbose)

    algorithms = _in_order(config)
    for algorithm in algorithms:
        algorithm.start(model, batches and progress(batches, f"{algorithm.name}: calibrating"))
    samples = max((algorithm.adaptation_samples for algorithm in algorithms), default=0)
    if batches and samples:
        seen = itertools.accumulate((len(inputs[0]) for inputs in batches), initial=0)
        chosen = [inputs for inputs, before in zip(batches, seen, strict=False) if before < samples]
        adapt_to_batches(model, progress(chosen, "adapting batch normalization"))
