"""Option objects: frozen, validated pieces of a configuration that report on their own keys.

An option object is a pydantic model with three habits of its own: a wrong value raises one
`ConfigError` that names the key by its path, every key carries its status beside its definition,
and `to_dict` gives back exactly the keys that were written.
"""

import dataclasses
import difflib
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic

Path = tuple[str | int, ...]
Status = Literal["honoured", "approximated", "refused", "ignored"]

DEEPEST = 100  # levels; no option lies as deep

Flag = pydantic.StrictBool
Text = pydantic.StrictStr


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration.

    Args:
        path: Keys and list positions leading to the place, e.g. `("compression", 0, "preset")`.
        message: What was expected there and what was received.
    """

    path: Path
    message: str

    def __str__(self) -> str:
        return f"`{dotted(self.path)}`: {self.message}" if self.path else self.message


class ConfigError(ValueError):
    """A configuration that cannot be used, with all its problems at once.

    Args:
        problems: The `Problem`s found, or a text when there is one without a path.

    Example:
    >>> str(ConfigError([Problem(("weights", "bits"), "expected an integer from 2 to 8.")]))
    '`weights.bits`: expected an integer from 2 to 8.'
    """

    def __init__(self, problems: str | Sequence[Problem]):
        super().__init__(problems)
        self.problems = (Problem((), problems),) if isinstance(problems, str) else tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "".join(f"\n- {problem}" for problem in self.problems)
        return f"The configuration has {len(self.problems)} problems:{lines}"

    def below(self, *path: str | int) -> list[Problem]:
        """Returns the problems as seen from further up: their paths start with `path`."""
        return [Problem(path + problem.path, problem.message) for problem in self.problems]


@dataclasses.dataclass(frozen=True)
class KeyStatus:
    """What becomes of one key of a configuration.

    Args:
        key: Path of the key, e.g. `"compression[0].weights.bits"`.
        status: `"honoured"`, `"approximated"` (acted on, with a difference that `reason` states),
            `"refused"` (understood, not acted on) or `"ignored"` (nothing to act on).
        reason: Why it is not simply honoured; empty otherwise.
    """

    key: str
    status: Status
    reason: str = ""


def dotted(path: Path) -> str:
    """Returns a path as text: names joined by dots, positions and odd names in brackets.

    Example:
    >>> dotted(("compression", 0, "scope_overrides", "weights", "{re}conv.*", "bits"))
    "compression[0].scope_overrides.weights['{re}conv.*'].bits"
    """
    text = ""
    for part in path:
        if isinstance(part, str) and part.isidentifier():
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text


def nearest(name: Any, valid: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the valid names closest to a text, or nothing."""
    written = name if isinstance(name, str) else ""
    close = difflib.get_close_matches(written, list(valid), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def received(name: str | int, value: Any) -> str:
    """Returns `"Received: name=value"`, with a long value cut short."""
    return f"Received: {name}={shown(value)}"


def shown(value: Any) -> str:
    """Returns a value as Python writes it, cut short where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits; too many levels
        return f"<{type(value).__name__}, too large to be shown>"
    return text if len(text) <= 80 else text[:77] + "..."


def option(
    default: Any,
    description: str,
    *,
    status: Status = "honoured",
    reason: str = "",
    neutral: Sequence[Any] = (),
    **constraints: Any,
) -> Any:
    """Defines one key of an option object.

    Args:
        default: Its default, `...` when the key is required.
        description: One sentence for the published schema.
        status: What becomes of the key, and of every key below it.
        reason: Why it is not simply honoured.
        neutral: Values that ask for nothing, so that writing them is honoured all the same.
        **constraints: Further arguments of `pydantic.Field`.
    """
    extra = {}
    if status != "honoured":
        extra = {"x-status": status, "x-reason": reason}
    if neutral:
        extra["x-neutral"] = list(neutral)
    return pydantic.Field(
        default, description=description, json_schema_extra=extra or None, **constraints
    )


def integer(low: int | None = None, high: int | None = None) -> Any:
    """Type of a whole number from `low` to `high`, both included; 8.0 is read as 8."""
    expected = f"expected an integer{_bounds(low, high)}."

    def check(value):
        whole = _is_number(value) and value == int(value)
        if not whole or not _within(value, low, high):
            raise ValueError(expected)
        return int(value)

    return Annotated[int, pydantic.Field(ge=low, le=high), pydantic.BeforeValidator(check)]


def number(low: float | None = None, high: float | None = None, below: float | None = None) -> Any:
    """Type of a finite number from `low` to `high`, both included, or less than `below`."""
    expected = f"expected a number{_bounds(low, high)}"
    expected += "." if below is None else f" and less than {below}."

    def check(value):
        inside = _is_number(value) and _within(value, low, high)
        if not inside or (below is not None and value >= below):
            raise ValueError(expected)
        return value

    limits = pydantic.Field(ge=low, le=high, lt=below)
    return Annotated[float, limits, pydantic.BeforeValidator(check)]


def one_or_many(model: type["Options"]) -> Any:
    """Type of a key that takes one object of class `model` or a list of them."""

    def build(value):
        if isinstance(value, (list, tuple)):
            return build_each(model.build, value)
        return model.build(value)

    return Annotated[model | tuple[model, ...], pydantic.BeforeValidator(build)]


def build_each(build: Callable[[Any], Any], entries: Iterable[Any]) -> tuple:
    """Builds every entry of a list, and reports the problems of all of them together."""
    built, problems = [], []
    for index, entry in enumerate(entries):
        try:
            built.append(build(entry))
        except ConfigError as error:
            problems += error.below(index)
    if problems:
        raise ConfigError(problems)
    return tuple(built)


class Options(pydantic.BaseModel):
    """A frozen group of configuration keys. Unknown keys are errors.

    Raises:
        ConfigError: If a value or a key is wrong; the paths start at this object.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**_with_text_keys(values))
        except pydantic.ValidationError as error:
            problems = [p for item in error.errors() for p in _problems(type(self), item)]
            raise ConfigError(problems) from None

    @classmethod
    def build(cls, value: Any) -> "Options":
        """Returns `value` if it is such an object already, else the object a mapping describes."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"expected an object. {received('value', value)}")
        return cls(**_with_text_keys(value))

    @property
    def written(self) -> bool:
        """Whether the object appears with any key in `to_dict`."""
        return bool(self.model_fields_set)

    def to_dict(self) -> dict[str, Any]:
        """Returns the keys that were written, as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def key_statuses(self, path: Path = (), parent: KeyStatus | None = None) -> Iterator[KeyStatus]:
        """Yields the status of every key that was written, in the order of definition.

        Args:
            path: Where this object stands in the configuration.
            parent: The status handed down from above: what is refused is refused with all its keys.
        """
        for name, field in type(self).model_fields.items():
            if name in self.model_fields_set:
                below = (*path, field.alias or name)
                yield from _statuses(field, getattr(self, name), below, parent)


def _with_text_keys(value: Any, path: Path = ()) -> Any:
    """Returns the same with texts for keys: a dictionary of Python may have others."""
    if len(path) == DEEPEST:
        return value
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
        for key, _ in items:
            if any(0xD800 <= ord(letter) < 0xE000 for letter in key):
                text = f"expected a key of Unicode text. {received('key', key)}"
                raise ConfigError([Problem((*path, key), text)])
        return {key: _with_text_keys(item, (*path, key)) for key, item in items}
    if type(value) in (list, tuple):
        return type(value)(_with_text_keys(v, (*path, i)) for i, v in enumerate(value))
    return value


def _statuses(field, value, path, parent):
    extra = field.json_schema_extra or {}
    # A list is not hashable and True == 1, so compare type and value one by one.
    neutral = any(type(value) is type(v) and value == v for v in extra.get("x-neutral", ()))
    if parent is None and "x-status" in extra and not neutral:
        parent = KeyStatus("", extra["x-status"], extra["x-reason"])
    yield from _walk(value, path, parent)


def _walk(value, path, parent):
    """Yields statuses of the leaves below `value`; an object without keys counts as a leaf."""
    if isinstance(value, Options) and value.written:
        yield from value.key_statuses(path, parent)
    elif isinstance(value, dict) and any(isinstance(v, Options) for v in value.values()):
        for name, item in value.items():
            yield from _walk(item, (*path, name), parent)
    elif isinstance(value, tuple) and any(isinstance(v, Options) for v in value):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index), parent)
    else:
        status = parent or KeyStatus("", "honoured")
        yield KeyStatus(dotted(path), status.status, status.reason)


_EXPECTED = {
    "bool_type": "expected true or false.",
    "string_type": "expected a string.",
    "dict_type": "expected an object.",
    "model_type": "expected an object.",
    "tuple_type": "expected a list.",
    "missing": "this key is required.",
}


def _problems(model: type[Options], item: Mapping[str, Any]) -> list[Problem]:
    """Translates one error of pydantic."""
    kind, value = item["type"], item["input"]
    path = tuple(part for part in item["loc"] if part != "[key]")
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.below(*path)
    name = next((part for part in reversed(path) if isinstance(part, str)), "value")
    if kind == "extra_forbidden":
        valid = [field.alias or key for key, field in model.model_fields.items()]
        text = f"unknown key.{nearest(str(name), valid)} Expected one of: {', '.join(valid)}."
        return [Problem(path, f"{text} {received(name, value)}")]
    if kind == "literal_error":
        expected = item["ctx"]["expected"]
        choices = expected.replace("' or '", "', '").strip("'").split("', '")
        text = f"expected {expected}.{nearest(value, choices)}"
    elif kind == "value_error":
        text = str(cause)
    else:
        text = _EXPECTED.get(kind, f"{item['msg']}.")
    return [
        Problem(path, text if kind == "missing" or not path else f"{text} {received(name, value)}")
    ]


def check_file_path(path: Any, key: str) -> None:
    """Raises a `ConfigError` unless a path names a file, there or not, in an existing folder.

    Args:
        path: The path.
        key: The key that it was written under.
    """
    target = pathlib.Path(path)
    if target.is_dir() or not target.parent.is_dir():
        what = "it is a folder" if target.is_dir() else "there is no such folder"
        raise ConfigError(
            f"Expected `{key}` to name a file in an existing folder. "
            f"Received: {key}={str(path)!r}; {what}."
        )


def _is_number(value) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer may be too large for a float.
    return is_number and abs(value) <= sys.float_info.max


def _within(value, low, high) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _bounds(low, high) -> str:
    if low is None:
        return "" if high is None else f" up to {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"
