"""Which way is better: the one place that decides it for a metric by its name."""

MODES = ("auto", "max", "min")
# Ends of the names of quantities that are better the lower they are.
LOWER_IS_BETTER = (
    *("loss", "error", "mse", "mae", "mape", "msle"),
    *("crossentropy", "divergence", "poisson", "hinge", "logcosh"),
)


def lower_is_better(name, mode="auto"):
    """Say whether less of a quantity is better.

    Args:
        name: of a metric or a logged quantity, such as `"val_accuracy"`.
        mode: `"max"`, `"min"`, or `"auto"`: by the name, `min` for losses and errors (what ends
            like one of `LOWER_IS_BETTER`), `max` for all others.

    Raises:
        ValueError: unknown mode.

    Example:

    >>> lower_is_better("val_loss"), lower_is_better("accuracy"), lower_is_better("score", "min")
    (True, False, True)
    """
    check_mode(mode)
    return mode == "min" or (mode == "auto" and name.lower().endswith(LOWER_IS_BETTER))


def check_mode(mode):
    """Raise a `ValueError` unless a mode is one of `MODES`."""
    if mode not in MODES:
        raise ValueError(f"Expected mode 'auto', 'min' or 'max'. Received: mode={mode!r}")
