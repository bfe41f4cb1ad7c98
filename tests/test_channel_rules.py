"""How channels move through each operation: groups derived by hand, and removed equals masked."""

import pytest
from channel_cases import CASES, made
from pruning_helpers import assert_removed_is_masked, groups_of, pruning_config

import keras_compress as kc
from keras_compress.options import ConfigError

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_groups_sizes_and_reasons(name):
    assert groups_of(made(name)) == CASES[name].expected


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].prunes])
def test_removed_is_masked(name):
    result = assert_removed_is_masked(made(name))
    assert result.change > 1e-2


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].prunes])
def test_what_cannot_be_pruned_is_said(name):
    with pytest.raises(ConfigError, match="channels that can be removed"):
        kc.plan(made(name), pruning_config())
