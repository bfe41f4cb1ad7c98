"""The base of all algorithms, and the keys that several of them share."""

from collections.abc import Iterator
from typing import Any, ClassVar

from keras_compress import scopes
from keras_compress.options import (
    ConfigError,
    Flag,
    KeyStatus,
    Options,
    Path,
    dotted,
    integer,
    option,
)
from keras_compress.scopes import Scopes


class ScopedOptions(Options):
    """Keys that choose the nodes something applies to."""

    ignored_scopes: Scopes | None = option(None, "Nodes to leave alone.")
    target_scopes: Scopes | None = option(None, "The only nodes to touch; all when not given.")

    def selects(self, name: str) -> bool:
        """Says whether a node is chosen: matched by the targets, if any, and not ignored.

        `selects(n) == (target_scopes is None or n in target_scopes) and n not in ignored_scopes`
        """
        if self.ignored_scopes is not None and scopes.matches(self.ignored_scopes, name):
            return False
        return self.target_scopes is None or scopes.matches(self.target_scopes, name)

    def scope_lists(self, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields `(where it was written, entries)` for every scope key that was given."""
        for name in ("ignored_scopes", "target_scopes"):
            if getattr(self, name) is not None:
                yield prefix + name, getattr(self, name)


class ValidatedScopes(ScopedOptions):
    """Scope keys whose entries must match something."""

    validate_scopes: Flag = option(True, "Whether an entry that matches nothing is an error.")


class BatchnormAdaptation(Options):
    """How batch normalization statistics are computed anew for the compressed model."""

    num_bn_adaptation_samples: integer(0) = option(
        2000, "Samples to run, rounded to whole batches; 0 leaves the statistics as they are."
    )


class Initializer(Options):
    """What happens once, right after an algorithm has been applied."""

    batchnorm_adaptation: BatchnormAdaptation = option(
        BatchnormAdaptation(), "Computes batch normalization statistics anew."
    )


class Algorithm(ValidatedScopes):
    """One way of compressing a model: its options, and what it does with a model.

    A subclass names itself and is known to `Config` from then on. It overrides any of `plan`,
    `start` and `update`; none knows of other algorithms.

    Class attributes:
        name: What the key `algorithm` says in a configuration.
        aliases: Other names that mean the same.
        stage: Transforms and `start` of a lower stage come first: masks before quantizers.
        needs_teacher: Whether the original model takes part in training.
        adjustable: Whether it has a rate that can be raised and lowered: see `set_rate`.
        registry: Every algorithm by name and alias.

    Example:
    >>> class Rounding(Algorithm):
    ...     name = "rounding"
    >>> Algorithm.registry["rounding"] is Rounding
    True
    >>> del Algorithm.registry["rounding"]
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    stage: ClassVar[int] = 0
    needs_teacher: ClassVar[bool] = False
    adjustable: ClassVar[bool] = False
    registry: ClassVar[dict[str, type["Algorithm"]]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        for name in (cls.name, *cls.aliases):
            known = Algorithm.registry.get(name, cls)
            # The same class defined again (a notebook cell run twice) replaces itself.
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"Expected an algorithm name that is not taken by {known.__qualname__}. "
                    f"Received: name={name!r} on {cls.__qualname__}"
                )
            Algorithm.registry[name] = cls

    @property
    def samples_needed(self) -> int:
        """How many samples `start` would like to see."""
        return 0

    @property
    def adaptation_samples(self) -> int:
        """How many samples batch normalization adapts to after `start`."""
        return 0

    def gradient_factor(self, config: Any) -> float:
        """Returns the factor on the gradient of what it trains: its own, else the top-level one."""
        own = getattr(self, "compression_lr_multiplier", None)
        factor = config.compression_lr_multiplier if own is None else own
        return 1.0 if factor is None else factor

    @property
    def has_latency_target(self) -> bool:
        """Whether how far it goes is to be found out by measuring the exported model."""
        return False

    def claims(self, graph: Any) -> tuple[frozenset[str], frozenset[str]]:
        """Returns (weights, inputs): names of layers whose weights, whose inputs it rounds itself.

        Quantization leaves them alone.
        """
        return frozenset(), frozenset()

    def plan(self, graph: Any, config: Any, with_data: bool) -> Any:
        """Returns the `Plan`: what goes where on the graph. Required."""
        raise NotImplementedError(f"{type(self).__name__} must say what it does: override `plan`.")

    def start(self, model: Any, batches: Any) -> None:
        """Prepares the compressed model before training.

        Args:
            model: The compressed model.
            batches: Iterable of flat lists of input arrays, or None without data.
        """

    def update(self, model: Any, step: int, epoch: float | None) -> bool:
        """Moves along with training.

        Args:
            model: The compressed model.
            step: `optimizer.iterations`.
            epoch: That in epochs, with a fraction; None where their length is not known yet.

        Returns whether it wants to be called after the next step too.
        """
        return False

    def loss(self, model: Any, inputs: Any, outputs: Any) -> Any:
        """Returns what is added to the loss of every training step: a scalar tensor, or None.

        Args:
            model: The compressed model.
            inputs: The batch, in the structure that the model was called with.
            outputs: What the model made of it in training mode.
        """
        return None

    def feature_names(self, model: Any) -> tuple[str, ...]:
        """Returns the names of the operations whose outputs `loss` asks `model.lesson` for."""
        return ()

    def cut(self, progress: dict[str, Any], narrowing: Any) -> None:
        """Takes up that channels are about to be removed.

        Args:
            progress: What the smaller model will have as its `progress`; it is changed in place.
            narrowing: The `Narrowing` from the model to the smaller one.
        """

    def begin_epoch(self, model: Any, epoch: int) -> None:
        """Called once at the start of every epoch, counted from 0 by the optimizer's steps."""

    def masks_are_final(self, model: Any) -> bool:
        """Says whether the masks stay as they are from now on; True where there are none."""
        return True

    @property
    def final_rate(self) -> float:
        """The rate that its course ends at, in [0, 1). Required of an adjustable algorithm."""
        raise NotImplementedError(f"{type(self).__name__} has no rate: it is not adjustable.")

    def set_level(self, model: Any, level: float) -> None:
        """Takes away as much as a rate says, now. Required of an adjustable algorithm."""
        raise NotImplementedError(f"{type(self).__name__} has no rate: it is not adjustable.")

    def rate(self, model: Any) -> float:
        """Returns the rate that holds: what was asked for."""
        return model.progress.get(self.name, {}).get("level", 0.0)

    def set_rate(self, model: Any, rate: float) -> None:
        """Makes a rate hold, in the place of what its course says from now on.

        Lower ones than before give back what was taken.

        Raises:
            ConfigError: If it cannot be reached. The model is as it was then.
        """
        self.set_level(model, rate)
        held = {"level": rate, "held": True, "frozen": False}
        model.progress[self.name] = model.progress.get(self.name, {}) | held

    def finish(self, model: Any) -> None:
        """Called at the end of training while `update` still asked for more."""

    def statistics(self, model: Any) -> dict[str, float]:
        """Returns figures about the model for the epoch's logs."""
        return {}

    @property
    def written(self) -> bool:
        """True: the key `algorithm` is always there."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Returns the algorithm's entry under `compression`."""
        return {"algorithm": self.name, **super().to_dict()}

    def key_statuses(self, path: Path = (), parent: KeyStatus | None = None) -> Iterator[KeyStatus]:
        """Yields the status of every key."""
        status = parent or KeyStatus("", "honoured")
        yield KeyStatus(dotted((*path, "algorithm")), status.status, status.reason)
        yield from super().key_statuses(path, parent)


def check_scopes(entries: Any, names: Any) -> None:
    """Checks several scope keys against the node names and raises one error for all.

    Args:
        entries: Pairs `(where it was written, scope entries)`.
        names: The node names they may match.

    Raises:
        ConfigError: If an entry matches nothing.
    """
    problems, names = [], list(names)
    for what, patterns in entries:
        try:
            scopes.check(patterns, names, what)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
