"""Scopes: lists of node names and patterns that choose parts of a model.

An entry is a node name, matched exactly, or `{re}` followed by a regular expression that may match
anywhere in the name.
"""

import re
import warnings
from collections.abc import Iterable
from typing import Annotated, Any

import pydantic

from keras_compress.options import ConfigError, Problem, Text, nearest, shown

REGEX_PREFIX = "{re}"


def matches(patterns: str | Iterable[str], name: str) -> bool:
    """Says whether one of the entries matches a node name.

    Args:
        patterns: One entry or several.
        name: The name of a layer or node.

    Example:
    >>> matches(["stem", "{re}^block[12]_"], "block2_conv")
    True
    >>> matches("block", "block2_conv")
    False
    """
    return any(_matches(pattern, name) for pattern in as_tuple(patterns))


def unmatched(patterns: str | Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """Returns the entries that match none of the names, in their order.

    Example:
    >>> unmatched(["stem", "haed"], ["stem", "head"])
    ('haed',)
    """
    names = list(names)
    return tuple(
        pattern
        for pattern in as_tuple(patterns)
        if not any(_matches(pattern, name) for name in names)
    )


def check(patterns: str | Iterable[str], names: Iterable[str], what: str) -> None:
    """Makes sure that every entry matches something.

    Args:
        patterns: One entry or several.
        names: All names that an entry may match.
        what: Where the entries were written, e.g. `"ignored_scopes"`: it starts the message.

    Raises:
        ConfigError: If entries match nothing; it lists them, each with the nearest names.
    """
    names = list(dict.fromkeys(names))
    problems = [
        Problem((), f"{what}: {shown(pattern)} matches no node.{_suggestion(pattern, names)}")
        for pattern in unmatched(patterns, names)
    ]
    if problems:
        raise ConfigError(problems)


def as_tuple(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Returns the entries as a tuple; a single text is one entry."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith(REGEX_PREFIX):
        return re.search(pattern.removeprefix(REGEX_PREFIX), name) is not None
    return pattern == name


def _suggestion(pattern: str, names: list[str]) -> str:
    hint = nearest(pattern.removeprefix(REGEX_PREFIX), names)
    if hint:
        return hint
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f" The {len(names)} names are: {shown}."


def _compiles(pattern: str) -> str:
    if pattern.startswith(REGEX_PREFIX):
        try:
            # Python warns of what a later version may read in another way.
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern.removeprefix(REGEX_PREFIX))
        except (re.error, Warning, OverflowError, RecursionError) as error:
            message = f"expected a regular expression after {REGEX_PREFIX}: {error}."
            raise ValueError(message) from None
    return pattern


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Pattern = Annotated[Text, pydantic.AfterValidator(_compiles)]
"""Type of one scope entry in an option object."""

Scopes = Annotated[
    tuple[Pattern, ...],
    pydantic.BeforeValidator(_listed),
    pydantic.WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    ),
]
"""Type of a scope key in an option object: one entry or a list of entries."""
