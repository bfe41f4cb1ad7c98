"""Which channels filter pruning may take from a graph, which it takes, and what is left."""

import collections
import dataclasses
import functools
import zlib

import keras
import numpy as np

from keras_compress import importance
from keras_compress.algorithms.legr import IDENTITY, read_ranking
from keras_compress.compressed_layer import CompressedLayer, layer_spec, require_finite
from keras_compress.graph.channel_labels import FOLLOWING, PRODUCED
from keras_compress.graph.channels import couple
from keras_compress.graph.narrow import Narrowing
from keras_compress.graph.walk import first_layers
from keras_compress.layer_specs import CONVOLUTIONS
from keras_compress.masks import ChannelMask, TaylorMask
from keras_compress.options import ConfigError
from keras_compress.plan import GroupEntry, Plan, SizeEntry, WeightEntry

HIGHEST_LEVEL = 0.999
GOLDEN = (5**0.5 - 1) / 2  # whose multiples are spread evenly over [0, 1)
QUANTITIES = ("filters", "prunable channels", "parameters", "FLOPs")


class Prunable:
    """A graph as filter pruning sees it: groups of channels, their scores, and what to keep.

    Args:
        params: the `FilterPruningParams`.
        selects: function `layer name -> bool`: what the scopes of the configuration choose.
        graph: the `Graph`: of a plain model, or of a compressed one with masks.
        full: {name of a quantity: its value before anything was pruned}; None: that of `graph`.
        ranking: {layer: (scale, shift)} of its scores, see `legr`; None: the identity.
    """

    def __init__(self, params, selects, graph, full=None, ranking=None):
        self.params = params
        self.graph = graph
        self.coupling = couple(graph)
        first = () if params.prunes("prune_first_conv") else first_layers(graph)
        self.reasons = {
            group.name: _why_not(params, selects, graph, self.coupling, group, first)
            for group in self.coupling.groups
        }
        self.groups = [g for g in self.coupling.groups if not self.reasons[g.name]]
        self.everything = np.ones(self.coupling.count, bool)
        self.ranking = ranking or {}
        self.full = full or {what: self.count(what, self.everything) for what in QUANTITIES}

    def require_groups(self):
        """Raise a `ConfigError` unless something can be pruned."""
        if self.groups:
            return
        named = "; ".join(f"'{name}': {reason}" for name, reason in self.reasons.items())
        raise ConfigError(
            "Expected a model with channels that can be removed, and scopes (`ignored_scopes`, "
            "`target_scopes`) that leave some. Received: model "
            f"'{self.graph.name}' with {len(self.reasons)} groups of channels, none of which can "
            f"be ({named or 'no layer with weights was found'})."
        )

    def scores(self):
        """Return one array of scores per group, from the weights as they are trained."""
        return self.ranked(self.scored_slices(), self.ranking)

    def scored_slices(self):
        """Return pairs `(Slice, its scores)`: of every slice that has scores."""
        criterion = self.params.filter_importance
        layers = self.graph.layer_nodes()
        pairs = [
            (each, self._slice_scores(criterion, layers[each.layer].op, each))
            for each in self.coupling.slices
        ]
        return [(each, scores) for each, scores in pairs if scores is not None]

    def ranked(self, scored_slices, ranking):
        """Return one array of scores per group: the sums over slices of `scale * score + shift`."""
        total = np.zeros(self.coupling.count)
        for each, scores in scored_slices:
            scale, shift = ranking.get(each.layer, IDENTITY)
            scores = scale * scores + shift
            total += importance.channel_scores(scores, each.channels, len(total))
        return [total[group.channels] for group in self.groups]

    def spreads(self, scored_slices):
        """Return {layer: standard deviation of its scores}, of the layers that can be pruned."""
        may_go = self.may_go()
        by_layer = {}
        for each, scores in scored_slices:
            if may_go[each.channels].any():
                by_layer.setdefault(each.layer, []).append(scores)
        return {layer: float(np.std(np.concatenate(all_))) for layer, all_ in by_layer.items()}

    def load_ranking(self):
        """Take the ranking from the file that the configuration names, if it names one."""
        path = self.params.load_ranking_coeffs_path
        if path is not None:
            self.ranking = read_ranking(path, self.spreads(self.scored_slices()))

    def may_go(self):
        """Return a bool array over all channels: those that can be pruned."""
        channels = np.zeros(self.coupling.count, bool)
        for group in self.groups:
            channels[group.channels] = True
        return channels

    def _slice_scores(self, criterion, layer, each):
        if criterion == "batch_norm_scale":
            scored = each.weight == "gamma" and isinstance(layer, keras.layers.BatchNormalization)
            return importance.batch_norm_scale(_raw(layer, each.weight)) if scored else None
        if criterion == "taylor":
            if each.role not in (PRODUCED, FOLLOWING):
                return None
            masks = [m for m in masks_of(layer, each.weight) if isinstance(m, TaylorMask)]
            masks = [mask for mask in masks if mask.scored_axis == each.axis]
            if not masks:
                return None
            scores = np.array(masks[0].score.numpy())
            require_finite(layer, each.weight, scores)
            return scores
        if each.role != PRODUCED:
            return None
        if criterion == "random":
            seed = zlib.crc32(f"{each.layer} {each.weight}".encode()) + self.params.random_seed
            return importance.random_scores(len(each.channels), seed)
        weight = _raw(layer, each.weight)
        if self.params.is_global and not self.params.is_learned:
            weight = importance.normalized(weight)
        return importance.IMPORTANCE[criterion](weight, each.axis)

    def keep(self, level, scores):
        """Return which channels stay at a level: the fraction of the channels that may go.

        Args:
            level: in [0, 1), of the channels that there were before anything was pruned.
            scores: one array per group.

        Returns:
            Bool array over all channels of the graph.
        """
        keep = self.everything.copy()
        now = sum(group.size for group in self.groups)
        full = self.full["prunable channels"]
        if self.params.is_global:
            level = max(0.0, 1 - (1 - level) * full / now)
            kept = importance.global_keep(scores, level, self.params.round_to)
        else:
            kept = []
            # Where all groups took their steps at the same levels, latency would jump.
            spread = GOLDEN if self.params.quantity == "latency" else 0.0
            for index, (group, ranking) in enumerate(zip(self.groups, scores, strict=True)):
                before = self.full.get(f"channels of {group.name}", group.size)
                shift = spread * index % 1
                count = importance.kept_count(before, level, self.params.round_to, shift)
                kept.append(importance.keep_highest(ranking, min(count, group.size)))
        for group, mask in zip(self.groups, kept, strict=True):
            keep[group.channels] = mask
        return keep

    def reach(self, wanted, scores):
        """Return which channels stay so that the fraction `wanted` of the target quantity goes.

        The quantity is that of the configuration: channels, FLOPs or parameters. For the last two
        the level is found by bisection, and rounded to the side of more pruning. So it is for
        channels in a learned ranking, which must not win by losing fewer channels.

        Raises:
            ConfigError: the fraction cannot be reached.
        """
        quantity = self.params.quantity
        if wanted == 0 or (quantity == "prunable channels" and not self.params.is_learned):
            return self.keep(wanted, scores)
        if quantity == "latency" and "latency level" in self.full:
            return self.keep(wanted / self.params.target * self.full["latency level"], scores)
        low, high = 0.0, HIGHEST_LEVEL
        best = self.keep(high, scores)
        if self.removed(best) < wanted:
            if quantity == "latency":  # only estimated here, and measured later
                return best
            raise ConfigError(
                f"Expected a target that can be reached: without the channels that can go, the "
                f"model has {self.removed(best):.1%} fewer {quantity}. Received: "
                f"{self.params.target_key}={self.params.target}"
            )
        while high - low > 1e-3:
            middle = (low + high) / 2
            keep = self.keep(middle, scores)
            low, high, best = (
                (low, middle, keep) if self.removed(keep) >= wanted else (middle, high, best)
            )
        return best

    def removed(self, keep):
        """Return the fraction of the target quantity that is gone, of what there was at first."""
        quantity = self.measured_quantity
        return 1 - self.count(quantity, keep) / max(self.full[quantity], 1)

    @property
    def measured_quantity(self):
        """What can be counted on a graph: FLOPs stand in for latency until that was measured."""
        return "FLOPs" if self.params.quantity == "latency" else self.params.quantity

    def narrowing(self, keep):
        """Return the `Narrowing` of the graph to the channels that stay."""
        return Narrowing(self.graph, self.coupling, keep)

    def count(self, what, keep):
        """Return how much of a quantity there is with the channels that stay.

        Args:
            what: one of `QUANTITIES`.
            keep: bool array over all channels.
        """
        if what == "filters":
            return sum(int(keep[each.channels].sum()) for each in _first_slices(self.coupling))
        if what == "prunable channels":
            return sum(int(keep[group.channels].sum()) for group in self.groups)
        narrow = self.narrowing(keep)
        return narrow.parameters() if what == "parameters" else narrow.flops()

    def sizes(self, keep):
        """Return a list of `SizeEntry`: what there was, and what is left without some channels."""
        return [SizeEntry(what, self.full[what], self.count(what, keep)) for what in QUANTITIES]


def pruning_plan(options, graph, config, with_data):
    """Return the `Plan` of a `FilterPruning` for a graph: masks, groups, and what will be left."""
    params = options.params
    options.check_scopes(graph)
    prunable = Prunable(params, options.selects, graph)
    prunable.require_groups()
    prunable.load_ranking()
    scores = prunable.scores()
    if params.filter_importance == "taylor":  # known after training steps only
        scores = [np.arange(group.size, dtype="float64") for group in prunable.groups]
    prunable.reach(options.level(0), scores)
    keep = prunable.reach(params.target, scores)
    groups = tuple(
        GroupEntry(
            group.name,
            group.layers,
            group.size,
            int(keep[group.channels].sum()),
            prunable.reasons[group.name],
        )
        for group in prunable.coupling.groups
    )
    estimate = " (an estimate by FLOPs: `compress_model` measures)"
    note = f"Sizes are those at the target{estimate if params.quantity == 'latency' else ''}" + (
        "; which channels go is decided while training."
        if not params.is_global
        else ", with channels as important as they are now."
        if prunable.ranking or not params.is_learned
        else ", with the ranking that is there before one is learned."
    )
    return Plan(
        graph.name,
        weights=tuple(_mask_entries(options, prunable)),
        groups=groups,
        sizes=tuple(prunable.sizes(keep)),
        notes=(note,),
    )


def _mask_entries(options, prunable):
    """Yield the `WeightEntry` of every weight that holds channels which may go."""
    graph, coupling, may_go = prunable.graph, prunable.coupling, prunable.may_go()
    layers = graph.layer_nodes()
    scored = {}
    for each in coupling.slices if options.params.filter_importance == "taylor" else ():
        normalizes = isinstance(layers[each.layer].op, keras.layers.BatchNormalization)
        has_score = each.role == PRODUCED or (each.role == FOLLOWING and normalizes)
        if has_score and may_go[each.channels].any():
            scored.setdefault((each.layer, each.weight), each.axis)
    calls = collections.Counter(node.name for node in graph.nodes)
    can_be_masked = functools.partial(_can_be_masked, options)
    for key, axes, text in masked_axes(graph, coupling, may_go, can_be_masked):
        make = functools.partial(ChannelMask, axes=axes)
        if key in scored:
            own = {"scored_axis": scored[key], "calls": calls[key[0]]}
            make = functools.partial(TaylorMask, axes=axes, **own)
        yield WeightEntry(*key, (make,), text)


def masked_axes(graph, coupling, may_go, can_be_masked):
    """Return `((layer, weight), axes, description)` of the weights that hold channels to mask.

    Args:
        graph: the `Graph` of a plain model.
        coupling: its `Coupling`.
        may_go: bool array over all channels.
        can_be_masked: function `(layer, weight) -> bool`.
    """
    layers, found = graph.layer_nodes(), {}
    for each in coupling.slices:
        count = int(may_go[each.channels].sum())
        if count and can_be_masked(layers[each.layer].op, each.weight):
            found.setdefault((each.layer, each.weight), {})[each.axis] = count
    return [
        (
            key,
            tuple(sorted(counts)),
            f"mask of {' x '.join(str(counts[a]) for a in sorted(counts))} channels",
        )
        for key, counts in found.items()
    ]


def holds_mask(op, weight):
    """Whether a weight of a plain layer is there and can be read through a mask."""
    spec = layer_spec(op)
    return spec is not None and weight in spec.names and spec.read(op, weight) is not None


def _can_be_masked(options, op, weight):
    params = options.params
    is_silent = (
        params.prune_batch_norms or params.filter_importance == "taylor"
    )  # masks hold scores
    if isinstance(op, keras.layers.BatchNormalization) and not is_silent:
        return False
    return holds_mask(op, weight)


def _why_not(params, selects, graph, coupling, group, first):
    """Return why a group of channels is left alone, or an empty string.

    Args:
        params: the `FilterPruningParams`.
        selects: function `layer name -> bool`.
        graph: the `Graph`.
        coupling: its `Coupling`.
        group: the `ChannelGroup`.
        first: names of the layers of which the convolutions stay, as the first ones.
    """
    if group.reason:
        return group.reason
    layers = graph.layer_nodes()
    excluded = [name for name in group.layers if not selects(name)]
    if excluded:
        return f"'{excluded[0]}' is excluded by the scopes of the configuration"
    producers = [layers[name] for name in group.layers]
    for node in producers:
        if node.name in first and isinstance(node.op, CONVOLUTIONS):
            return f"'{node.name}' is a first convolution (`prune_first_conv`)"
        strides = getattr(node.op, "strides", 1)
        strided = isinstance(node.op, CONVOLUTIONS) and max(np.atleast_1d(strides)) > 1
        if strided and not params.prunes("prune_downsample_convs"):
            return f"'{node.name}' is strided (`prune_downsample_convs`)"
    if group.size <= params.round_to:
        return f"{group.size} channels are not more than `round_to`={params.round_to}"
    if params.filter_importance == "batch_norm_scale" and not _has_scale(layers, coupling, group):
        return "no batch normalization follows, whose scale is the importance"
    return ""


def _has_scale(layers, coupling, group):
    channels = set(group.channels.tolist())
    return any(
        each.weight == "gamma"
        and each.role == FOLLOWING
        and isinstance(layers[each.layer].op, keras.layers.BatchNormalization)
        and not channels.isdisjoint(each.channels.tolist())
        for each in coupling.slices
    )


def _first_slices(coupling):
    """Return the first slice that each layer produces channels with: its filters, counted once."""
    found = {}
    for each in coupling.slices:
        if each.role == PRODUCED:
            found.setdefault(each.layer, each)
    return list(found.values())


def _raw(layer, weight):
    """Return a weight as it is trained, before masks and quantizers, as a NumPy array."""
    if isinstance(layer, CompressedLayer) and weight in layer.weight_names:
        values = layer.raw_weight(weight).numpy()
    else:
        values = keras.ops.convert_to_numpy(layer_spec(layer).read(layer, weight))
    require_finite(layer, weight, values)
    return values


def masks_of(layer, weight):
    """Return the `ChannelMask`s that a weight of a layer is read through."""
    if not isinstance(layer, CompressedLayer) or weight not in layer.weight_names:
        return []
    return [mask for mask in layer.transforms_of(weight) if isinstance(mask, ChannelMask)]


def set_masks(graph, coupling, keep):
    """Set the masks of a compressed model's graph to the channels that stay."""
    layers = graph.layer_nodes()
    for each in coupling.slices:
        for mask in masks_of(layers[each.layer].op, each.weight):
            if each.axis in mask.axes:
                mask.set_mask(each.axis, keep[each.channels])


def kept_by_masks(graph, coupling):
    """Return which channels the masks of a compressed model's graph leave on: bool array.

    Raises:
        ValueError: masks disagree about a channel.
    """
    layers = graph.layer_nodes()
    on, off = np.zeros(coupling.count, bool), np.zeros(coupling.count, bool)
    for each in coupling.slices:
        for mask in masks_of(layers[each.layer].op, each.weight):
            if each.axis in mask.axes:
                values = mask.mask(each.axis) > 0
                on[each.channels[values]] = True
                off[each.channels[~values]] = True
    torn = np.flatnonzero(on & off)
    if len(torn):
        names = sorted({s.layer for s in coupling.slices if np.isin(s.channels, torn).any()})
        raise ValueError(
            f"Expected masks that agree about each channel. Received: {len(torn)} channels that "
            f"are on in one weight and off in another, among those of {names}. Masks are set by "
            "the `Compress` callback, or all of a group together."
        )
    return ~off


@dataclasses.dataclass(frozen=True)
class MaskedGraph:
    """The graph of a compressed model, its channels, and which of them its masks leave on."""

    graph: object
    coupling: object
    keep: np.ndarray

    @classmethod
    def of(cls, graph):
        """Return that of a `Graph`, or None where the graph has no masks."""
        nodes = graph.layer_nodes().values()
        if not any(
            masks_of(node.op, weight)
            for node in nodes
            if isinstance(node.op, CompressedLayer)
            for weight in node.op.weight_names
        ):
            return None
        coupling = couple(graph)
        return cls(graph, coupling, kept_by_masks(graph, coupling))

    @property
    def narrowing(self):
        """The `Narrowing` of the graph to what the masks leave on."""
        return Narrowing(self.graph, self.coupling, self.keep)
