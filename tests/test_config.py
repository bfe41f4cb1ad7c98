import json
import pathlib

import pytest

from keras_compress.algorithms import Algorithm, FilterPruning, MovementSparsity, Quantization
from keras_compress.config import Config
from keras_compress.options import ConfigError, Options, Problem, dotted

ROOT = pathlib.Path(__file__).parent.parent
BUDGET = {"maximal_relative_accuracy_degradation": 1}


def load(*algorithms, **keys):
    return Config.load({"compression": list(algorithms), **keys})


def quantization(**keys):
    return {"algorithm": "quantization", **keys}


def option_classes(base=Options):
    for model in base.__subclasses__():
        if model.__module__.startswith("keras_compress."):
            yield model
            yield from option_classes(model)


@pytest.fixture
def registry():
    before = dict(Algorithm.registry)
    yield Algorithm.registry
    Algorithm.registry.clear()
    Algorithm.registry.update(before)


# Loading


def test_load_takes_config_dict_and_path(tmp_path):
    source = {"compression": quantization(preset="mixed"), "target_device": "CPU"}
    config = Config(algorithms=[Quantization(preset="mixed")], target_device="CPU")
    path = tmp_path / "config.json"
    path.write_text("// comment\n" + json.dumps(source))
    assert Config.load(config) is config
    assert Config.load(source) == config
    assert Config.load(path) == config
    assert Config.load(str(path)) == config


def test_one_algorithm_needs_no_list():
    algorithm = Quantization()
    assert Config(algorithms=algorithm) == Config(algorithms=(algorithm,))
    assert load(quantization()) == Config.load({"compression": quantization()})


def test_load_refuses_other_types():
    with pytest.raises(TypeError, match="Received: source=3"):
        Config.load(3)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="can be read: No such file.*nothing.json"):
        Config.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', 'Unexpected "}" at line 2, column 7'),
        ("[1", "at line 1, column 3"),
        ("", "Empty strings are not legal"),
        ("  ", "Unexpected end of input at line 1, column 3"),
        ('{"a": 1, "a": 2}', 'Duplicate key "a"'),
        ("[1]", "expected an object"),
    ],
)
def test_malformed_file(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


# Errors


@pytest.mark.parametrize(
    ("keys", "path", "message"),
    [
        ({"initializer": {"range": {"tpye": 1}}}, "initializer.range.tpye", "mean 'type'?"),
        (
            {"initializer": {"range": [{}, {"type": "min"}]}},
            "initializer.range[1].type",
            "Received",
        ),
        ({"initializer": {"range": 3}}, "initializer.range", "expected an object"),
        ({"preset": "mixd"}, "preset", "Did you mean 'mixed'? Received: preset='mixd'"),
        (
            {"weights": {"bits": 1}},
            "weights.bits",
            "an integer from 2 to 8. Received: bits=1",
        ),
        ({"activations": {"bits": 9}}, "activations.bits", "from 2 to 8. Received: bits=9"),
        ({"weights": {"bits": 7.5}}, "weights.bits", "Received: bits=7.5"),
        ({"weights": {"bits": True}}, "weights.bits", "Received: bits=True"),
        ({"weights": {"bits": "8"}}, "weights.bits", "Received: bits='8'"),
        ({"weights": 3}, "weights", "expected an object. Received: weights=3"),
        ({"quantize_inputs": 1}, "quantize_inputs", "expected true or false."),
        ({"ignored_scopes": [1]}, "ignored_scopes[0]", "expected a string."),
        ({"ignored_scopes": 1}, "ignored_scopes", "expected a list."),
        ({"ignored_scopes": "{re}("}, "ignored_scopes[0]", "expected a regular expression"),
        ({"compression_lr_multiplier": -1}, "compression_lr_multiplier", "a number of at least 0."),
        ({"compression_lr_multiplier": float("nan")}, "compression_lr_multiplier", "=nan"),
        (
            {"scope_overrides": {"weights": {"{re}a.b": {"bits": 1}}}},
            "scope_overrides.weights['{re}a.b'].bits",
            "from 2 to 8",
        ),
        (
            {"scope_overrides": {"weights": {"{re}(": {}}}},
            "scope_overrides.weights['{re}(']",
            "expected a regular expression",
        ),
        (
            {"initializer": {"range": {"params": {"min_percentile": 50, "max_percentile": 50}}}},
            "initializer.range.params",
            "min_percentile below max_percentile",
        ),
    ],
)
def test_wrong_key_or_value_is_named_by_its_path(keys, path, message):
    with pytest.raises(ConfigError) as caught:
        load(quantization(**keys))
    assert str(caught.value).startswith(f"`compression[0].{path}`: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "path", "message"),
    [
        ({"algorithm": "quantisation"}, "compression[0].algorithm", "Did you mean 'quantization'?"),
        ({"algorithm": ["x"]}, "compression[0].algorithm", "unknown algorithm."),
        ({}, "compression[0].algorithm", "this key is required. Expected one of: binarization"),
        (3, "compression[0]", "expected an object such as"),
    ],
)
def test_wrong_entry(entry, path, message):
    with pytest.raises(ConfigError) as caught:
        load(entry)
    assert str(caught.value).startswith(f"`{path}`: ")
    assert message in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        load(quantization(preset="x", wieghts={}), {"algorithm": "nothing"}, target_device="TPU")
    assert [dotted(problem.path) for problem in caught.value.problems] == [
        "compression[0].preset",
        "compression[0].wieghts",
        "compression[1].algorithm",
        "target_device",
    ]
    assert str(caught.value).startswith("The configuration has 4 problems:\n- `compression[0]")


def test_python_objects_raise_the_same_error():
    with pytest.raises(ConfigError, match="`weights.bits`: expected an integer from 2 to 8"):
        Quantization(weights={"bits": 12})


def test_long_values_are_cut_short():
    with pytest.raises(ConfigError, match=r"Received: preset='x{70,78}\.\.\.$"):
        Quantization(preset="x" * 500)


def test_algorithm_twice():
    with pytest.raises(ConfigError, match=r"`compression\[1\].algorithm`: expected every"):
        load(quantization(), {"algorithm": "experimental_quantization"})


def test_misspelt_top_level_key_is_an_error():
    with pytest.raises(ConfigError, match="`compresion`: unknown key. Did you mean 'compression'"):
        Config.load({"compresion": []})
    with pytest.raises(ConfigError, match="Did you mean 'algorithms'"):
        Config(algoritms=[])


def test_algorithms_by_both_names():
    with pytest.raises(ConfigError, match="either `algorithms` or `compression`"):
        Config(algorithms=[], compression=[])


def test_number_range_texts():
    with pytest.raises(ConfigError, match="a number of at least 0 and less than 1"):
        FilterPruning(params={"pruning_target": 1.0})
    with pytest.raises(ConfigError, match="`params.warmup_start_epoch`: this key is required"):
        MovementSparsity(params={})


def test_pruning_has_one_target():
    assert FilterPruning(params={"pruning_flops_target": 0.3}).params.pruning_flops_target == 0.3
    with pytest.raises(ConfigError, match="either pruning_target or pruning_flops_target"):
        FilterPruning(params={"pruning_target": 0.5, "pruning_flops_target": 0.3})


def test_multistep_levels_are_one_longer():
    with pytest.raises(ConfigError, match="one more entry in multistep_sparsity_levels"):
        load({"algorithm": "magnitude_sparsity", "params": {"multistep_steps": [1, 2]}})


@pytest.mark.parametrize(
    ("mode", "params", "message"),
    [
        ("early_exit", {}, "expected exactly one of maximal_relative"),
        ("early_exit", {**BUDGET, "maximal_absolute_accuracy_degradation": 1}, "exactly one of"),
        ("early_exit", BUDGET, "params.maximal_total_epochs`: this key is required"),
        (
            "early_exit",
            {**BUDGET, "maximal_total_epochs": 2, "patience_epochs": 1},
            "params.patience_epochs`: expected only with mode='adaptive_compression_level'",
        ),
        ("adaptive_compression_level", BUDGET, "initial_training_phase_epochs`: this key is"),
        (
            "adaptive_compression_level",
            {**BUDGET, "initial_training_phase_epochs": 1, "patience_epochs": 1},
            "expected exactly one algorithm with a rate to adapt",
        ),
    ],
)
def test_accuracy_aware_training(mode, params, message):
    with pytest.raises(ConfigError) as caught:
        load(quantization(), accuracy_aware_training={"mode": mode, "params": params})
    assert message in str(caught.value)


def test_widths_count_where_nothing_else_has_a_rate():
    params = {**BUDGET, "initial_training_phase_epochs": 1, "patience_epochs": 1}
    training = {"mode": "adaptive_compression_level", "params": params}
    searching = quantization(initializer={"precision": {"type": "hawq"}})
    config = load(searching, accuracy_aware_training=training)
    assert [each.name for each in config.adjustable] == ["quantization"]
    pruning = load(searching, {"algorithm": "filter_pruning"}, accuracy_aware_training=training)
    assert [each.name for each in pruning.adjustable] == ["filter_pruning"]
    assert load(quantization()).adjustable == ()
    assert Quantization().final_rate == 0.0


def test_accuracy_aware_training_with_one_rate():
    params = {**BUDGET, "initial_training_phase_epochs": 1, "patience_epochs": 1}
    training = {"mode": "adaptive_compression_level", "params": params}
    config = load(quantization(), {"algorithm": "filter_pruning"}, accuracy_aware_training=training)
    assert config.accuracy_aware_training.params.lr_reduction_factor == 0.5


def test_config_error_forms():
    assert str(ConfigError("text")) == "text"
    assert ConfigError([Problem(("a",), "b")]).below("c", 0) == [Problem(("c", 0, "a"), "b")]


# Values


def test_integral_floats_are_integers():
    bits = Quantization(weights={"bits": 4.0}).weights.bits
    assert bits == 4
    assert isinstance(bits, int)


def test_options_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Quantization().preset = "mixed"


def test_defaults_of_the_format():
    quantizing = Quantization()
    assert quantizing.preset == "performance"
    assert quantizing.weights.bits == quantizing.activations.bits == 8
    assert quantizing.initializer.batchnorm_adaptation.num_bn_adaptation_samples == 2000
    assert Config().target_device == "ANY"


ROUND_TRIPS = [
    {},
    {"compression": []},
    {"compression": [quantization()], "target_device": "NPU", "log_dir": "logs"},
    {
        "compression": quantization(
            ignored_scopes="stem", initializer={"range": {"type": "min_max"}}
        )
    },
    {"compression": [quantization(initializer={"range": [{"target_scopes": ["a"]}]})]},
    {
        "compression": [
            quantization(
                scope_overrides={"weights": {"{re}a": {"bits": 4}}},
                activations={"unified_scale_ops": [["a", "b"]]},
                initializer={"precision": {"type": "manual", "bitwidth_per_scope": [[4, "a"]]}},
            ),
            {"algorithm": "filter_pruning", "params": {"legr_params": {"generations": 3}}},
            {"algorithm": "knowledge_distillation", "type": "mse"},
            {"algorithm": "const_sparsity"},
        ],
        "model": "resnet",
        "optimizer": {"type": "sgd", "steps": [1, 2]},
        "input_info": [{"sample_size": [1, 224, 224, 3]}],
        "bootstrapNAS": {"training": {"algorithm": "progressive_shrinking"}},
    },
]


@pytest.mark.parametrize("source", ROUND_TRIPS)
def test_round_trip(source):
    config = Config.load(source)
    written = json.loads(json.dumps(config.to_dict()))
    assert Config.load(written) == config
    assert set(written) == set(source)


# Key report


def statuses(config):
    return {key.key: key.status for key in config.key_report()}


def test_key_report_names_every_written_key():
    config = load(
        quantization(
            preset="mixed",
            weights={"bits": 4, "logarithm_scale": True},
            activations={"logarithm_scale": False},
            scope_overrides={"weights": {"{re}a": {"bits": 4}}, "activations": {}},
            initializer={"range": [{"type": "min_max"}, {}], "precision": {"type": "hawq"}},
            params={"base_lr": 0.1},
            export_to_onnx_standard_ops=False,
        ),
        {"algorithm": "binarization", "params": {"base_wd": 2}},
        target_device="CPU",
        input_info={"sample_size": [1, 2]},
        bootstrapNAS={},
        model="resnet",
    )
    assert statuses(config) == {
        "compression[0].algorithm": "honoured",
        "compression[0].preset": "honoured",
        "compression[0].export_to_onnx_standard_ops": "ignored",
        "compression[0].weights.bits": "honoured",
        "compression[0].weights.logarithm_scale": "refused",
        "compression[0].activations.logarithm_scale": "honoured",
        "compression[0].scope_overrides.weights['{re}a'].bits": "honoured",
        "compression[0].scope_overrides.activations": "honoured",
        "compression[0].initializer.range[0].type": "honoured",
        "compression[0].initializer.range[1]": "honoured",
        "compression[0].initializer.precision.type": "honoured",
        "compression[0].params.base_lr": "ignored",
        "compression[1].algorithm": "honoured",
        "compression[1].params.base_wd": "ignored",
        "target_device": "honoured",
        "bootstrapNAS": "refused",
        "input_info.sample_size": "ignored",
        "model": "ignored",
    }


def test_everything_not_honoured_has_a_reason():
    config = load({"algorithm": "quantization"}, log_dir="x", bootstrapNAS={}, seed=1)
    left = [key for key in config.key_report() if key.status != "honoured"]
    assert [key.key for key in left] == ["bootstrapNAS", "log_dir", "seed"]
    assert all(key.reason for key in left)


def test_status_of_an_algorithm_without_keys():
    assert statuses(Config(algorithms=[Quantization()])) == {"compression[0].algorithm": "honoured"}


# Registry


def test_algorithms_register_by_subclassing(registry):
    class Rounding(Algorithm):
        name = "rounding"
        aliases = ("round",)

    (algorithm,) = load({"algorithm": "round"}).algorithms
    assert isinstance(algorithm, Rounding)
    assert algorithm.to_dict() == {"algorithm": "rounding"}
    assert algorithm.start(None, None) is None
    assert algorithm.update(None, 0, None) is False
    assert algorithm.loss(None, None, None) is None and algorithm.masks_are_final(None)
    assert algorithm.statistics(None) == {}
    with pytest.raises(NotImplementedError, match="Rounding has no rate"):
        algorithm.set_rate(None, 0.5)
    with pytest.raises(NotImplementedError, match="Rounding has no rate"):
        _ = algorithm.final_rate
    with pytest.raises(NotImplementedError, match="Rounding must say what it does"):
        algorithm.plan(None, None, False)


def test_registered_name_is_taken(registry):
    with pytest.raises(
        ValueError, match="not taken by Quantization. Received: name='quantization'"
    ):
        type("Other", (Algorithm,), {"name": "quantization", "__module__": __name__})


def test_helper_classes_without_a_name_do_not_register(registry):
    before = dict(registry)
    type("Half", (Algorithm,), {"__module__": __name__})
    assert registry == before


@pytest.mark.parametrize("name", sorted(Algorithm.registry))
def test_every_algorithm_loads(name):
    required = {
        "knowledge_distillation": {"type": "softmax"},
        "movement_sparsity": {
            "params": {
                "warmup_start_epoch": 0,
                "warmup_end_epoch": 2,
                "importance_regularization_factor": 0.1,
            }
        },
    }
    config = load({"algorithm": name, **required.get(name, {})})
    assert Config.load(config.to_dict()) == config


# What is published


def test_schema_file_is_up_to_date():
    published = json.loads((ROOT / "docs" / "config.schema.json").read_text())
    assert published == json.loads(json.dumps(Config.json_schema()))


def test_schema_has_every_algorithm():
    schema = Config.json_schema()
    entry, many = schema["properties"]["compression"]["anyOf"]
    assert many["items"] == entry
    names = [
        name
        for reference in entry["oneOf"]
        for name in schema["$defs"][reference["$ref"].rpartition("/")[2]]["properties"][
            "algorithm"
        ]["enum"]
    ]
    assert sorted(names) == sorted(Algorithm.registry)
    bits = schema["$defs"]["QuantizerGroup"]["properties"]["bits"]
    assert (bits["minimum"], bits["maximum"], bits["default"]) == (2, 8, 8)


@pytest.mark.parametrize("model", sorted(set(option_classes()), key=lambda model: model.__name__))
def test_every_key_is_described_and_on_the_page(model):
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name, field in model.model_fields.items():
        assert field.description
        rows = [line for line in page.splitlines() if line.startswith(f"| `{field.alias or name}`")]
        assert rows, name
        if isinstance(field.default, (bool, int, float, str)):
            assert any(f"`{json.dumps(field.default)}`" in row for row in rows), name
        reason = (field.json_schema_extra or {}).get("x-reason", "")
        assert any(reason in row for row in rows), name


def test_example_loads_and_is_honoured():
    config = Config.load(ROOT / "examples" / "quantization.json")
    assert {key.status for key in config.key_report()} == {"honoured"}
    (quantizing,) = config.algorithms
    assert quantizing.weight_spec("block1_conv").bits == 4
    assert quantizing.weight_spec("stem").range.type == "min_max"
