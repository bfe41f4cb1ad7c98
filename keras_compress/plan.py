"""The plan: which weight and which edge gets which transform, and why the rest is left alone.

A plan is plain data made by algorithms from a graph, before anything is changed. It prints as
tables and turns into a dictionary.
"""

import dataclasses

from rich import box
from rich.console import Group
from rich.table import Table

from keras_compress.rendering import Rendered


@dataclasses.dataclass(frozen=True)
class WeightEntry:
    """One weight of one layer and the transforms it will be read through, in order."""

    layer: str
    weight: str
    transforms: tuple
    description: str


@dataclasses.dataclass(frozen=True)
class EdgeEntry:
    """Edges that share one activation quantizer; `group` is the `QuantizedEdge` of the graph."""

    name: str
    group: object
    transform: object
    description: str

    @property
    def edges(self):
        return tuple(edge.name for edge in self.group.edges)

    @property
    def readers(self):
        names = {node.name if node else "model output" for node, _ in self.group.readers}
        return tuple(sorted(names))


@dataclasses.dataclass(frozen=True)
class GroupEntry:
    """Channels that are removed together, or why they are not.

    Attributes:
        name: the first layer that produces them.
        layers: names of all layers that produce them.
        channels: how many there are.
        kept: how many stay.
        reason: why none can be removed; empty where they can.
    """

    name: str
    layers: tuple
    channels: int
    kept: int
    reason: str


@dataclasses.dataclass(frozen=True)
class SizeEntry:
    """One quantity of a model: before anything was pruned, and now."""

    what: str
    full: int
    now: int

    @property
    def level(self):
        """The fraction that is gone, in [0, 1]."""
        return 1 - self.now / max(self.full, 1)


@dataclasses.dataclass(frozen=True)
class PrecisionEntry:
    """The width that a search chose for a layer, and why.

    Attributes:
        layer: its name.
        parameters: how many weights it has.
        trace: average trace of the loss's Hessian with respect to them.
        perturbations: {bits: squared norm of what rounding to so many bits changes}.
        bits: width of its weights.
        bytes: of its weights in the IR at that width, steps included.
        loss: that is predicted to come from it.
        activation_bits: width of the tensor that it multiplies by; None where that is not rounded.
    """

    layer: str
    parameters: int
    trace: float
    perturbations: dict
    bits: int
    bytes: int
    loss: float
    activation_bits: int | None


@dataclasses.dataclass(frozen=True)
class SizeOfChoice:
    """A best choice of widths: bytes of the quantized weights, and the loss predicted to come."""

    bytes: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Untouched:
    """An operation left in float: why, its FLOPs per sample and their share of the model's."""

    layer: str
    type: str
    reason: str
    flops: int
    share: float


@dataclasses.dataclass(frozen=True)
class Plan(Rendered):
    """What `compress_model` will do.

    Attributes:
        model: name of the model.
        weights: tuple of `WeightEntry`.
        edges: tuple of `EdgeEntry`.
        groups: tuple of `GroupEntry`: channels that can only be removed together.
        sizes: tuple of `SizeEntry`: what pruning leaves.
        precision: tuple of `PrecisionEntry`: widths that were searched for.
        front: tuple of `SizeOfChoice`, by rising size: no other choice is better in both.
        untouched: tuple of `Untouched`, largest share of FLOPs first.
        keys: what became of each configuration key (`KeyStatus`).
        notes: remarks on the whole, e.g. where ranges will come from.
    """

    model: str
    weights: tuple = ()
    edges: tuple = ()
    groups: tuple = ()
    sizes: tuple = ()
    precision: tuple = ()
    front: tuple = ()
    untouched: tuple = ()
    keys: tuple = ()
    notes: tuple = ()

    def merge(self, other):
        """Return a plan with the entries of both; transforms of one weight are joined in order."""
        joined = {(entry.layer, entry.weight): entry for entry in self.weights}
        for entry in other.weights:
            before = joined.get((entry.layer, entry.weight))
            if before is not None:
                entry = dataclasses.replace(
                    entry,
                    transforms=before.transforms + entry.transforms,
                    description=f"{before.description}, {entry.description}",
                )
            joined[entry.layer, entry.weight] = entry
        return dataclasses.replace(
            self,
            weights=tuple(joined.values()),
            edges=self.edges + other.edges,
            groups=self.groups + other.groups,
            sizes=self.sizes + other.sizes,
            precision=self.precision + other.precision,
            front=self.front + other.front,
            untouched=self.untouched + other.untouched,
            keys=self.keys + other.keys,
            notes=self.notes + other.notes,
        )

    @property
    def float_share(self):
        """Share of the model's FLOPs that stay in float, in [0, 1]."""
        return sum(entry.share for entry in self.untouched)

    def to_dict(self):
        """Return the plan as JSON-able data."""
        return {
            "model": self.model,
            "weights": [
                {"layer": e.layer, "weight": e.weight, "transforms": e.description}
                for e in self.weights
            ],
            "edges": [
                {
                    "name": e.name,
                    "tensors": list(e.edges),
                    "readers": list(e.readers),
                    "transform": e.description,
                }
                for e in self.edges
            ],
            "groups": [dataclasses.asdict(entry) for entry in self.groups],
            "sizes": [dataclasses.asdict(entry) | {"level": entry.level} for entry in self.sizes],
            "precision": [dataclasses.asdict(entry) for entry in self.precision],
            "front": [dataclasses.asdict(entry) for entry in self.front],
            "untouched": [dataclasses.asdict(entry) for entry in self.untouched],
            "float_share": self.float_share,
            "keys": [dataclasses.asdict(entry) for entry in self.keys],
            "notes": list(self.notes),
        }

    def renderable(self):
        parts = [_table("Weights", ("layer", "weight", "transforms"), self._weight_rows())]
        if self.edges:
            columns = ("tensor", "read by", "transform")
            parts.append(_table("Activations", columns, self._edge_rows()))
        if self.groups:
            columns = ("group", "layers", "channels", "kept", "why all are kept")
            parts.append(_table("Channels", columns, self._group_rows()))
            parts.append(size_table(self.sizes))
        if self.precision:
            widths = sorted({bits for e in self.precision for bits in e.perturbations})
            errors = [f"error, {bits} bits" for bits in widths]
            columns = ("layer", "weights", "trace", *errors, "bits", "of its input")
            parts.append(_table("Precision", columns, self._precision_rows(widths)))
        if self.untouched:
            title = f"Left in float ({self.float_share:.2%} of the FLOPs)"
            rows = [(e.layer, e.type, f"{e.share:.2%}", e.reason) for e in self.untouched]
            parts.append(_table(title, ("operation", "type", "FLOPs", "why"), rows))
        if self.keys:
            rows = [(e.key, e.status, e.reason) for e in self.keys]
            parts.append(_table("Configuration", ("key", "status", "reason"), rows))
        return Group(*parts, *self.notes)

    def _weight_rows(self):
        return [(e.layer, e.weight, e.description) for e in self.weights]

    def _precision_rows(self, widths):
        rows = []
        for e in self.precision:
            errors = (
                f"{e.perturbations[bits]:.3g}" if bits in e.perturbations else "" for bits in widths
            )
            rows.append(
                (
                    e.layer,
                    f"{e.parameters:,}",
                    f"{e.trace:.3g}",
                    *errors,
                    e.bits,
                    e.activation_bits or "float",
                )
            )
        return rows

    def _group_rows(self):
        return [(e.name, len(e.layers), e.channels, e.kept, e.reason) for e in self.groups]

    def _edge_rows(self):
        return [(", ".join(e.edges), ", ".join(e.readers), e.description) for e in self.edges]


def size_table(sizes):
    """Return the table of `SizeEntry`s: full, current, level."""
    rows = [(size.what, f"{size.full:,}", f"{size.now:,}", f"{size.level:.1%}") for size in sizes]
    return _table("Size", ("quantity", "full", "current", "level"), rows)


def _table(title, columns, rows):
    table = Table(*columns, title=f"{title}: {len(rows)}", title_justify="left", box=box.SIMPLE)
    for row in rows:
        table.add_row(*map(str, row))
    return table
