import pytest

from keras_compress import scopes
from keras_compress.options import ConfigError

NAMES = ["stem", "block1_conv", "block2_conv", "head"]


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        ("stem", "stem", True),
        ("stem", "stem_bn", False),
        (["head", "stem"], "stem", True),
        ("{re}conv", "block1_conv", True),
        ("{re}^conv", "block1_conv", False),
        ("{re}block[12]_", "block2_conv", True),
        (["block."], "block1", False),
        ([], "stem", False),
    ],
)
def test_matches(patterns, name, expected):
    assert scopes.matches(patterns, name) is expected


def test_unmatched_keeps_order_and_accepts_iterators():
    assert scopes.unmatched(["zzz", "stem", "{re}^bl", "aaa"], iter(NAMES)) == ("zzz", "aaa")
    assert scopes.unmatched("stem", NAMES) == ()


def test_check_accepts_what_matches():
    scopes.check(["stem", "{re}conv$"], NAMES, "ignored_scopes")
    scopes.check([], [], "ignored_scopes")


def test_check_lists_every_entry_with_the_nearest_names():
    with pytest.raises(ConfigError) as caught:
        scopes.check(["stme", "head", "{re}^block1_cnv"], NAMES, "ignored_scopes")
    text = str(caught.value)
    assert "ignored_scopes: 'stme' matches no node. Did you mean 'stem'?" in text
    assert "'{re}^block1_cnv' matches no node. Did you mean 'block1_conv'" in text
    assert "'head'" not in text


def test_check_lists_names_when_none_is_near():
    with pytest.raises(ConfigError, match="The 12 names are: n0, n1, .*n9, \\.\\.\\.\\."):
        scopes.check("conv", [f"n{i}" for i in range(12)], "target_scopes")


def test_as_tuple():
    assert scopes.as_tuple("a") == ("a",)
    assert scopes.as_tuple(["a", "b"]) == ("a", "b")
