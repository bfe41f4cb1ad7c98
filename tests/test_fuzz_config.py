"""Changed configurations are accepted, or refused with one error that names the key at fault."""

import collections
import pathlib
import random
import warnings

import fuzz_config
import hypothesis
import pytest
from fuzz_valid import VALID
from hypothesis import strategies as st

import keras_compress as kc
from keras_compress.algorithms import FilterPruning, Quantization
from keras_compress.options import ConfigError

CASES = 500


@pytest.fixture(scope="module")
def tiny():
    return fuzz_config.tiny_model()


@pytest.fixture(autouse=True)
def inside_a_folder(tmp_path, monkeypatch):
    """Configurations name files, which are written beside the tests otherwise."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("source", VALID, ids=str)
def test_what_is_changed_was_valid(source, tiny):
    assert kc.plan(tiny, source).to_dict()


def test_fuzzed_configurations(tiny, tmp_path):
    counts = collections.Counter()
    for seed in range(CASES):
        case = fuzz_config.Case(random.Random(seed))
        verdict, remark = fuzz_config.judge(case, tiny, tmp_path, compress=seed % 25 == 0)
        assert verdict in ("accepted", "refused"), (seed, case.changes, remark)
        counts[verdict] += 1
    assert counts["accepted"] > CASES / 5 and counts["refused"] > CASES / 5


@hypothesis.settings(max_examples=100, derandomize=True, deadline=None, database=None)
@hypothesis.given(st.randoms(use_true_random=False))
def test_configurations_that_hypothesis_draws(source):
    case = fuzz_config.Case(source)
    model, folder = _shared()
    verdict, remark = fuzz_config.judge(case, model, folder)
    assert verdict in ("accepted", "refused"), (case.changes, remark)


def _shared(made=[]):  # noqa: B006 - made once
    if not made:
        made.append(fuzz_config.tiny_model())
    return made[0], pathlib.Path.cwd()


# What fuzzing found, each as a case of its own


def refused(source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError) as caught:
            kc.Config.load(source)
    return str(caught.value)


def quantization():
    return {"compression": {"algorithm": "quantization"}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"self": 1}, "`compression.self`: unknown key"),
        ({"weights": {"self": 1}}, "`compression.weights.self`: unknown key"),
        ({1: 2}, "`compression['1']`: unknown key"),
        ({"weights": {None: 2}}, "`compression.weights.None`: unknown key"),
        ({"\ud800": 1}, "`compression['\\ud800']`: expected a key of Unicode text"),
        ({"weights": [{"\ud800": 1}]}, "`compression.weights[0]['\\ud800']`: expected a key of"),
        ({"weights": {"bits": 10**400}}, "expected an integer from 2 to 8. Received: bits=1000"),
        ({"range_decay": 10**400}, "expected a number of at least 0. Received: range_decay=1000"),
        ({"range_decay": 10**5000}, "Received: range_decay=<int, too large to be shown>"),
        ({"preset": fuzz_config.nested(3000)}, "preset=<list, too large to be shown>"),
        ({"ignored_scopes": "{re}[[a]"}, "{re}: Possible nested set at position"),
        ({"ignored_scopes": "{re}a{99999999999}"}, "{re}: the repetition number is too large"),
        ({"ignored_scopes": "{re}" + "(" * 3000 + ")" * 3000}, "{re}: maximum recursion depth"),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, str) else "keys",
)
def test_odd_keys_and_values_are_refused(keys, message):
    assert message in refused({"compression": {**keys, "algorithm": "quantization"}})


def test_keys_that_are_no_text_are_read_as_text():
    config = kc.Config.load(quantization() | {1: {2: 3}})
    assert config.to_dict()["1"] == {"2": 3}
    assert Quantization(scope_overrides={"weights": {1: {"bits": 4}}}).to_dict()["scope_overrides"]


@pytest.mark.parametrize(
    "value",
    [object(), b"\xff", fuzz_config.nested(3000), 10**5000],
    ids=["object", "bytes", "deep", "long"],
)
@pytest.mark.parametrize("key", ["model", "bootstrapNAS"])
def test_what_a_saved_model_cannot_hold_is_refused(key, value):
    value = {"a": value} if key == "bootstrapNAS" else value
    assert f"`{key}`: expected data as JSON has it. Received" in refused(
        quantization() | {key: value}
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": "\xff"}', "can be read: 'utf-8' codec can't decode byte 0xff in position 7"),
        (b"[" * 5000, "expected JSON (comments allowed). Received: maximum recursion depth"),
    ],
)
def test_files_that_cannot_be_read(data, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    assert message in refused(path) and "config.json" in refused(path)


def test_a_path_with_a_null_character():
    assert "can be read: embedded null byte" in refused("a\0b")


def test_a_target_of_null_is_not_given():
    pruning = FilterPruning(pruning_init=0.2, params={"pruning_flops_target": None})
    assert pruning.params.target_key == "pruning_target" and pruning.params.target == 0.5
    both = FilterPruning(params={"pruning_target": 0.3, "pruning_flops_target": None})
    assert both.params.target == 0.3


def test_what_a_plan_refuses_names_its_entry(tiny):
    source = {"compression": [{"algorithm": "const_sparsity"}, {"algorithm": "quantization"}]}
    source["compression"][1]["ignored_scopes"] = "x" * 500
    with pytest.raises(ConfigError) as caught:
        kc.plan(tiny, source)
    assert str(caught.value).startswith("`compression[1]`: ignored_scopes: 'xxx")
    assert len(str(caught.value)) < 300
    nothing = {"algorithm": "magnitude_sparsity", "ignored_scopes": "{re}"}
    with pytest.raises(ConfigError, match=r"`compression\[0\]`: .*`ignored_scopes`"):
        kc.plan(tiny, {"compression": nothing})
