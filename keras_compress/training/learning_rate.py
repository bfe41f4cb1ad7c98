"""A factor on an optimizer's learning rate, be that a number or a schedule."""

import contextlib

import keras

from keras_compress.layers import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule times a factor: `scaled(step) == factor * schedule(step)`.

    Args:
        schedule: a Keras `LearningRateSchedule`.
        factor: the factor.

    Example:

    >>> schedule = keras.optimizers.schedules.PiecewiseConstantDecay([10], [0.5, 0.25])
    >>> float(ScaledSchedule(schedule, 0.5)(11))
    0.125
    """

    def __init__(self, schedule, factor):
        super().__init__()
        self.schedule = schedule
        self.factor = factor

    def __call__(self, step):
        return self.factor * self.schedule(step)

    def get_config(self):
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "factor": self.factor}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        schedule = keras.optimizers.schedules.deserialize(config["schedule"], custom_objects)
        return cls(schedule, config["factor"])


class LearningRate:
    """The learning rate of an optimizer, with a factor on what the user set.

    A number is multiplied in place. A schedule gets a `ScaledSchedule` around it; the compiled
    training step holds it, and has to be made anew.

    Args:
        optimizer: a Keras optimizer, wrapped in a `LossScaleOptimizer` or not.
        factor: the factor that its learning rate has already.

    Raises:
        ValueError: the learning rate is a function.
    """

    def __init__(self, optimizer, factor=1.0):
        self.optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self.factor = factor
        kind = keras.optimizers.schedules.LearningRateSchedule
        held = (value for value in vars(self.optimizer).values() if isinstance(value, kind))
        self.schedule = next(held, None)
        if isinstance(self.schedule, ScaledSchedule):
            self.schedule = self.schedule.schedule
        held = self.optimizer.learning_rate
        if self.schedule is None and not isinstance(held, keras.Variable):
            raise ValueError(
                "Expected an optimizer whose learning rate is a number or a "
                f"`LearningRateSchedule`, which can be scaled. Received: "
                f"{type(self.optimizer).__name__} with a function for it"
            )

    @property
    def value(self):
        """The learning rate of the next step, a float."""
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))

    def loaded(self, factor):
        """Take notice of a state that was loaded, whose number has a factor already.

        Returns whether the training step must be made anew.
        """
        if self.schedule is not None:
            return self.scale(factor)
        self.factor = factor
        return False

    def without_factor(self):
        """Return a context in which the optimizer shows a number as the user set it, no factor.

        What a callback makes of the number in there is multiplied by the factor again.
        """
        return contextlib.nullcontext() if self.schedule is not None else self._at(1.0)

    @contextlib.contextmanager
    def _at(self, factor):
        before = self.factor
        self.scale(factor)
        yield
        self.scale(before)

    def scale(self, factor):
        """Set the factor; return whether the training step must be made anew."""
        before, self.factor = self.factor, factor
        if before == factor:
            return False
        if self.schedule is not None:
            self.optimizer.learning_rate = ScaledSchedule(self.schedule, factor)
            return True
        # A factor of 0 leaves nothing to go back from: the state that is loaded brings a number.
        self.optimizer.learning_rate = self.value / before * factor if before else 0.0
        return False
