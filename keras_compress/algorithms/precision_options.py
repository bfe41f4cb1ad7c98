"""Options of mixed precision: which width every quantizer gets, by hand or by search."""

from collections.abc import Iterator
from typing import Any, Literal

import pydantic

from keras_compress import scopes
from keras_compress.options import Flag, KeyStatus, Options, Path, Text, integer, number, option
from keras_compress.scopes import Pattern

Bits = integer(2, 8)

WEIGHT = "|WEIGHT"  # ends the full name of the quantizers of a layer's weights
OUTPUT = "|OUTPUT"  # ends that of the quantizer of a layer's output
_SUFFIXES = {"weights": WEIGHT, "activations": OUTPUT}

RATIO = 1.5  # of HAWQ, where no budget is written

_AUTOQ = (
    "the search by reinforcement learning is not built: type 'hawq' with a `budget` searches under "
    "bounds on bytes, bit-operations or latency, and finds the optimum of its measure"
)
_AUTOQ_ONLY = "only type 'autoq' reads it"


class PrecisionBudget(Options):
    """What a search for widths must keep within; all bounds that are given hold together."""

    bytes: integer(1) | None = option(
        None, "Bytes of the quantized weights in the IR: codes and steps. Extension."
    )
    bit_operations: number(0) | None = option(
        None, "Multiplications of one sample, each times both its widths. Extension."
    )
    latency: number(0) | None = option(
        None, "Milliseconds per call of the IR, as measured on this machine. Extension."
    )


class PrecisionInitializer(Options):
    """How every quantizer finds its own width.

    Example:

    >>> precision = PrecisionInitializer(
    ...     type="manual", bitwidth_per_scope=[[4, "conv"], [2, "relu|OUTPUT"]]
    ... )
    >>> precision.bits_of("weights", "conv"), precision.bits_of("activations", "conv")
    (4, None)
    >>> precision.bits_of("activations", "relu")
    2
    """

    type: Literal["hawq", "autoq", "manual"] | None = option(None, "The method.")
    bits: tuple[Bits, ...] = option((2, 4, 8), "Candidate widths.")
    num_data_points: integer(1) = option(100, "Samples for the trace of the Hessian.")
    iter_number: integer(0) | None = option(None, "Iteration cap: 200 for HAWQ, 0 for AutoQ.")
    tolerance: number(0) = option(1e-4, "Relative change at which the trace has converged.")
    compression_ratio: number(0) | None = option(
        None,
        "HAWQ: bit complexity at 8 bits over mixed, at least (1.5 without a budget). "
        "AutoQ: size over float size, at most (0.15).",
    )
    budget: PrecisionBudget = option(PrecisionBudget(), "Further bounds for the search. Extension.")
    eval_subset_ratio: number(0, 1) = option(
        1.0, "AutoQ: fraction of the evaluation data to use.", status="ignored", reason=_AUTOQ_ONLY
    )
    warmup_iter_number: integer(0) = option(
        20, "AutoQ: random policies to begin with.", status="ignored", reason=_AUTOQ_ONLY
    )
    bitwidth_per_scope: tuple[tuple[Bits, Pattern], ...] | None = option(
        None, "Widths chosen by hand, as pairs of bits and scope."
    )
    traces_per_layer_path: Text | None = option(
        None, "File with traces: read where it is there, else written."
    )
    dump_init_precision_data: Flag = option(
        False, "Whether `precision.json` is written into `log_dir`: traces, perturbations, widths."
    )
    bitwidth_assignment_mode: Literal["strict", "liberal"] = option(
        "liberal", "strict: quantizers that feed one consumer get equal widths."
    )

    @pydantic.model_validator(mode="after")
    def _check_type(self):
        if (self.type == "manual") != (self.bitwidth_per_scope is not None):
            raise ValueError(
                "expected `bitwidth_per_scope` with type 'manual', and only then. "
                f"Received: type={self.type!r}, bitwidth_per_scope={self.bitwidth_per_scope!r}"
            )
        return self

    @property
    def draws(self) -> int:
        """Random vectors that a trace is estimated from, at most."""
        return 200 if self.iter_number is None else self.iter_number

    @property
    def least_ratio(self) -> float | None:
        """The bit complexity at 8 bits over the mixed one, at least; None where none is asked."""
        if self.compression_ratio is None and not self.budget.written:
            return RATIO
        return self.compression_ratio

    def bits_of(self, group: str, name: str) -> int | None:
        """Returns the width that was chosen by hand, or None; the last entry that matches counts.

        Args:
            group: `"weights"` or `"activations"`.
            name: Of the layer, or of the tensor that the quantizer rounds.
        """
        found = None
        for bits, pattern in self.bitwidth_per_scope or ():
            full = name + _SUFFIXES[group]
            is_plain = group == "weights" and scopes.matches(pattern, name)
            if is_plain or (_names_a_quantizer(pattern) and scopes.matches(pattern, full)):
                found = bits
        return found

    def scope_lists(self, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields where scopes were written, and the scopes."""
        if self.bitwidth_per_scope is not None:
            patterns = tuple(pattern for _, pattern in self.bitwidth_per_scope)
            yield f"{prefix}bitwidth_per_scope", patterns

    def key_statuses(self, path: Path = (), parent: KeyStatus | None = None) -> Iterator[KeyStatus]:
        """Yields the status of every key; all are refused with type 'autoq'."""
        if parent is None and self.type == "autoq":
            parent = KeyStatus("", "refused", _AUTOQ)
        yield from super().key_statuses(path, parent)


def full_names(weights: Any, activations: Any) -> list[str]:
    """Returns all names that an entry of `bitwidth_per_scope` may match."""
    weights, activations = list(weights), list(activations)
    return [
        *weights,
        *(name + WEIGHT for name in weights),
        *(name + OUTPUT for name in activations),
    ]


def _names_a_quantizer(pattern: str) -> bool:
    """Whether a pattern looks at the ends of full names, rather than at names of layers."""
    return any(suffix.removeprefix("|") in pattern for suffix in _SUFFIXES.values())
