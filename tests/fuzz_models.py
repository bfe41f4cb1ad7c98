"""Random models with random configurations, taken all the way: train, save, load, strip, export.

A `Trial` is drawn from a seed. `go` takes it through every stage and says how it ended.
"""

import contextlib
import dataclasses
import random
import re
import warnings

import keras
import models
import numpy as np
from fuzz_networks import image_model, sequence_model, wrapped
from keras import ops

import keras_compress as kc
from keras_compress.layers import FakeQuantize

CLOSE = 1e-5  # of the range of an output: the order of sums
EXPORTED = 1e-3  # of the range of an output: an IR


def random_algorithms(draw):
    """Return the entries under `compression`."""
    found = [draw.choice([quantization, low_bits, magnitude, rb, pruning, binarization])(draw)]
    others = [quantization, low_bits, magnitude, rb, pruning, distillation, constant, movement]
    for other in draw.sample(others, draw.choice([0, 0, 1, 1, 2])):
        found.append(other(draw))
    names = [entry["algorithm"] for entry in found]
    return [entry for i, entry in enumerate(found) if entry["algorithm"] not in names[:i]]


def quantization(draw):
    entry = {"algorithm": "quantization", "preset": draw.choice(["performance", "mixed"])}
    if draw.random() < 0.3:
        entry["quantize_outputs"] = True
    if draw.random() < 0.2:
        entry["quantize_inputs"] = False
    if draw.random() < 0.3:
        entry["activations"] = {"per_channel": draw.random() < 0.5}
    if draw.random() < 0.3:
        entry["initializer"] = {"range": {"type": draw.choice(["min_max", "percentile", "mse"])}}
    if draw.random() < 0.1:
        entry["params"] = {"weights_quant_start_epoch": 0, "activations_quant_start_epoch": 0}
    return entry


def low_bits(draw):
    bits = draw.choice([2, 3, 4, 5])
    entry = quantization(draw)
    entry["weights"] = {"bits": bits, "mode": draw.choice(["symmetric", "asymmetric"])}
    entry["activations"] = {"bits": draw.choice([2, 4, 6, 8])}
    return entry


def magnitude(draw):
    params = {"sparsity_target": draw.choice([0.3, 0.9]), "sparsity_target_epoch": 1}
    pattern = draw.choice(["unstructured", "unstructured", "block", "2:4"])
    params["sparsity_pattern"] = pattern
    if pattern == "block":
        params["block_shape"] = [2, 2]
    if pattern == "2:4":
        del params["sparsity_target"]
    return {"algorithm": "magnitude_sparsity", "sparsity_init": 0.2, "params": params}


def rb(draw):
    return {"algorithm": "rb_sparsity", "params": {"sparsity_target": draw.choice([0.3, 0.7])}}


def constant(draw):
    return {"algorithm": "const_sparsity"}


def movement(draw):
    params = {
        "warmup_start_epoch": 0,
        "warmup_end_epoch": 1,
        "importance_regularization_factor": 0.1,
        "enable_structured_masking": False,
    }
    return {"algorithm": "movement_sparsity", "params": params}


def pruning(draw):
    level = draw.choice([0.3, 0.5, 0.8])
    params = {
        "pruning_target": level,
        "schedule": "baseline",
        "round_to": draw.choice([1, 2]),
        "prune_first_conv": True,
        "prune_downsample_convs": True,
        "all_weights": draw.random() < 0.5,
        "filter_importance": draw.choice(["L2", "L1", "geometric_median", "random"]),
    }
    return {"algorithm": "filter_pruning", "pruning_init": level, "params": params}


def binarization(draw):
    return {
        "algorithm": "binarization",
        "mode": draw.choice(["xnor", "dorefa", "ternary"]),
        "binarize_first_and_last": draw.random() < 0.5,
    }


def distillation(draw):
    return {"algorithm": "knowledge_distillation", "type": draw.choice(["softmax", "mse"])}


class Trial:
    """A model, a configuration and data, drawn from a seed.

    Attributes:
        what: where the model comes from, for a reader.
        model: built Keras model.
        config: dict.
        data: inputs of 8 samples, in the structure of the model's inputs.
        with_data: whether ranges are calibrated by `compress_model`.
    """

    def __init__(self, seed):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras says which layers drop a mask
            self._draw(random.Random(seed), seed)

    def _draw(self, draw, seed):
        family = draw.choice(["image", "image", "sequence", "sequence", "sequence", "collected"])
        if family == "collected":
            family = draw.choice(sorted(models.MODELS))
            self.model = models.make(family)
        else:
            make = image_model if family == "image" else sequence_model
            self.model = wrapped(make(draw), draw)
        self.what = f"{family} ({type(self.model).__name__})"
        self.config = {
            "compression": random_algorithms(draw),
            "target_device": draw.choice(["ANY", "CPU", "NPU", "TRIAL"]),
        }
        self.data = models.inputs_for(self.model, samples=8, seed=seed)
        self.with_data = draw.random() < 0.7
        self.eagerly = draw.random() < 0.8


@dataclasses.dataclass
class Outcome:
    """How a trial ended.

    Attributes:
        verdict: "done", "refused", or "crashed".
        stage: the last stage that was begun.
        remark: what was said, or what differs.
        flips: stages whose outputs differ because a value falls between two levels.
    """

    verdict: str
    stage: str
    remark: str = ""
    flips: tuple = ()


class Different(Exception):
    """Outputs that should be equal are not."""


def go(trial, folder, export=False):
    """Take a trial through every stage; returns its `Outcome`."""
    course = Course(trial, folder, export)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message, category in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message, category)
            course.run()
    except ValueError as error:
        clear = re.search(r"expected .*(Received|required)", str(error), re.DOTALL | re.IGNORECASE)
        verdict = "refused" if clear else "crashed"
        return Outcome(verdict, course.stage, f"{type(error).__name__}: {error}")
    except Exception as error:  # what a crash is
        return Outcome("crashed", course.stage, f"{type(error).__name__}: {error}")
    return Outcome("done", course.stage, flips=tuple(course.flips))


EXPECTED_WARNINGS = [  # as in setup.cfg
    ("__array__ implementation", DeprecationWarning),
    (".shuffle=True. was passed", UserWarning),
    ("Layer '.*was passed an input with a mask", UserWarning),
    ("os.fork", RuntimeWarning),
]


class Course:
    """The stages of a trial; see `go`."""

    def __init__(self, trial, folder, export):
        self.trial, self.folder, self.export = trial, folder, export
        self.stage = "plan"
        self.flips = []

    def run(self):
        trial = self.trial
        str(kc.plan(trial.model, trial.config))
        self.stage = "compress"
        data = trial.data if trial.with_data else None
        model = kc.compress_model(trial.model, trial.config, data=data, verbose=False)
        self.stage = "train"
        self.train(model)
        trained = self.outputs(model)
        self.stage = "save"
        path = self.folder / "model.keras"
        model.save(path)
        self.stage = "load"
        loaded = keras.models.load_model(path)
        for one, other in zip(trained, self.outputs(loaded), strict=True):
            if not np.array_equal(one, other, equal_nan=True):
                raise Different("loaded")
        self.stage = "strip"
        plain = kc.strip(model)
        pruned = any(each.name == "filter_pruning" for each in model.config.algorithms)
        # torch sums in another order where a weight lies in memory by columns.
        exact = not pruned and keras.backend.backend() != "torch"
        self.compare(model, trained, plain, 0.0 if exact else CLOSE)
        if pruned:
            self.stage = "shrink"
            self.compare(model, trained, kc.shrink(model), CLOSE)
        self.stage = "report"
        str(kc.report(model))
        if self.export:
            self.stage = "export"
            report = kc.export(plain, self.folder / "model.xml", data=trial.data)
            if not report.relative <= EXPORTED:
                self.require_flip(model, trained, report.relative)

    def train(self, model):
        outputs = self.outputs(model)
        values = np.random.default_rng(0)
        targets = [values.random(y.shape).astype("float32") for y in outputs]
        targets = keras.tree.pack_sequence_as(model.output, targets)
        optimizer = keras.optimizers.Adam(1e-3)
        model.compile(optimizer, "mse", run_eagerly=self.trial.eagerly, jit_compile=False)
        callbacks = [kc.callbacks.Compress()]
        model.fit(self.trial.data, targets, batch_size=4, epochs=1, callbacks=callbacks, verbose=0)

    def outputs(self, model):
        found = model(self.trial.data, training=False)
        return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(found)]

    def compare(self, model, expected, other, tolerance):
        """Raise unless another model has the outputs of this one."""
        worst = 0.0
        for one, two in zip(expected, self.outputs(other), strict=True):
            worst = max(worst, relative_difference(one, two))
        if worst > tolerance:
            if tolerance == 0.0:
                raise Different(f"{self.stage}: by {worst:.3g}, expected equal")
            self.require_flip(model, expected, worst)

    def require_flip(self, model, expected, difference):
        """Raise unless errors of float32 before every rounding change the outputs as much.

        A value between two levels falls to either side: the difference is a step then, however
        small the cause.
        """
        widest = 0.0
        with shaken():
            for _ in range(30):
                for one, two in zip(expected, self.outputs(model), strict=True):
                    widest = max(widest, relative_difference(one, two))
        if widest < difference / 4:
            raise Different(f"{self.stage}: by {difference:.3g}; rounding explains {widest:.3g}")
        self.flips.append(self.stage)


@contextlib.contextmanager
def shaken(size=3e-6):
    """Add random errors, relative to the largest value, to everything that is rounded."""
    values = np.random.default_rng(0)
    call = FakeQuantize.call

    def shaking(self, inputs, *arguments, **keys):
        noise = ops.convert_to_tensor(values.choice([-size, size], inputs.shape), inputs.dtype)
        return call(self, inputs + noise * ops.max(ops.abs(inputs)), *arguments, **keys)

    FakeQuantize.call = shaking
    try:
        yield
    finally:
        FakeQuantize.call = call


def relative_difference(one, two):
    """Return the largest difference over the range of the first; 0 where both are NaN."""
    if not one.size or np.array_equal(one, two, equal_nan=True):
        return 0.0
    span = max(np.nanmax(one) - np.nanmin(one), np.nanmax(np.abs(one)), 1e-6)
    difference = np.max(np.abs(one.astype("float64") - two.astype("float64"))) / span
    return float(difference) if np.isfinite(difference) else np.inf
