import pytest

from keras_compress.algorithms import Quantization
from keras_compress.options import ConfigError


def test_presets():
    for preset, mode in (("performance", "symmetric"), ("mixed", "asymmetric")):
        quantizing = Quantization(preset=preset)
        assert quantizing.weight_spec("a").mode == "symmetric"
        assert quantizing.activation_spec("a").mode == mode


def test_default_specs():
    weight, activation = Quantization().weight_spec("a"), Quantization().activation_spec("a")
    assert (weight.bits, weight.signed, weight.per_channel) == (8, None, True)
    assert (activation.bits, activation.signed, activation.per_channel) == (8, None, False)
    assert weight.range.estimator(8) == "mixed_min_max" and weight.range.estimator(4) == "mse"
    assert (weight.range.min_percentile, weight.range.max_percentile) == (0.1, 99.9)


def test_group_is_stronger_than_preset():
    group = {"mode": "symmetric", "bits": 4, "signed": True, "per_channel": True}
    spec = Quantization(preset="mixed", activations=group).activation_spec("a")
    assert (spec.mode, spec.bits, spec.signed, spec.per_channel) == ("symmetric", 4, True, True)


def test_overrides_are_stronger_than_group_and_later_ones_strongest():
    quantizing = Quantization(
        weights={"bits": 6, "signed": False},
        scope_overrides={
            "weights": {"{re}a": {"bits": 4, "mode": "asymmetric"}, "ab": {"bits": 2}},
            "activations": {"a": {"signed": True}},
        },
    )
    spec = quantizing.weight_spec("ab")
    assert (spec.bits, spec.mode, spec.signed) == (2, "asymmetric", False)
    assert quantizing.weight_spec("a").bits == 4
    assert quantizing.weight_spec("b").bits == 6
    assert quantizing.activation_spec("a").signed is True
    assert quantizing.activation_spec("ab").signed is None


def test_range_as_one_object_holds_for_all():
    quantizing = Quantization(
        initializer={"range": {"type": "percentile", "params": {"min_percentile": 1}}}
    )
    for spec in (quantizing.weight_spec("a"), quantizing.activation_spec("a")):
        assert (spec.range.type, spec.range.min_percentile) == ("percentile", 1)


def test_first_range_that_covers_a_quantizer_counts():
    quantizing = Quantization(
        initializer={
            "range": [
                {"type": "min_max", "target_quantizer_group": "weights", "ignored_scopes": "b"},
                {"type": "threesigma", "target_scopes": "{re}[ab]", "num_init_samples": 7},
            ]
        },
        scope_overrides={"weights": {"o": {"initializer": {"range": {"type": "percentile"}}}}},
    )
    assert quantizing.weight_spec("a").range.type == "min_max"
    assert quantizing.weight_spec("b").range.type == "threesigma"
    assert quantizing.activation_spec("a").range.num_init_samples == 7
    assert quantizing.activation_spec("c").range.type is None
    assert quantizing.weight_spec("o").range.type == "percentile"


def test_scopes_of_algorithm_and_group_both_count():
    quantizing = Quantization(
        ignored_scopes=["head"],
        weights={"target_scopes": "{re}conv"},
        activations={"ignored_scopes": "conv1"},
    )
    assert quantizing.selects_weight("conv1")
    assert not quantizing.selects_weight("head")
    assert not quantizing.selects_weight("dense")
    assert quantizing.selects_activation("dense")
    assert not quantizing.selects_activation("conv1")
    assert not quantizing.selects_activation("head")


@pytest.mark.parametrize(
    ("fix", "device", "bits", "first", "expected"),
    [
        ("enable", "CPU", 8, False, True),
        ("enable", "ANY", 8, False, True),
        ("enable", "CPU_SPR", 8, False, False),
        ("enable", "GPU", 8, False, False),
        ("enable", "CPU", 4, False, False),
        ("disable", "CPU", 8, True, False),
        ("first_layer_only", "CPU", 8, True, True),
        ("first_layer_only", "CPU", 8, False, False),
    ],
)
def test_overflow_fix(fix, device, bits, first, expected):
    quantizing = Quantization(overflow_fix=fix)
    assert quantizing.overflow_fix_applies(device, bits, first) is expected


CHECKED = {
    "ignored_scopes": ["act"],
    "weights": {"ignored_scopes": "{re}conv"},
    "activations": {"target_scopes": "act", "unified_scale_ops": [["act", "add"]]},
    "scope_overrides": {"weights": {"conv": {}}},
    "initializer": {"range": {"target_scopes": "act"}},
}


def test_scopes_that_match():
    Quantization(**CHECKED).check_scopes(["conv"], ["act", "add"])


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"ignored_scopes": ["atc"]}, "ignored_scopes"),
        ({"weights": {"ignored_scopes": "act"}}, "weights.ignored_scopes"),
        ({"activations": {"target_scopes": "conv"}}, "activations.target_scopes"),
        ({"activations": {"unified_scale_ops": [["conv"]]}}, "activations.unified_scale_ops"),
        ({"scope_overrides": {"weights": {"act": {}}}}, "scope_overrides.weights"),
        ({"initializer": {"range": [{"target_scopes": "x"}]}}, "initializer.range.target_scopes"),
    ],
)
def test_scopes_that_match_nothing(keys, what):
    with pytest.raises(ConfigError) as caught:
        Quantization(**{**CHECKED, **keys}).check_scopes(["conv"], ["act", "add"])
    assert str(caught.value).startswith(f"{what}: ")


def test_scopes_are_not_checked_when_told_so():
    quantizing = Quantization(
        validate_scopes=False,
        ignored_scopes="x",
        weights={"ignored_scopes": "x", "validate_scopes": False},
        scope_overrides={"weights": {"x": {}}},
    )
    quantizing.check_scopes(["conv"], ["act"])
