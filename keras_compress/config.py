"""The configuration: which algorithms, for which device, in NNCF's layout.

{"target_device": "CPU", "compression": [{"algorithm": "quantization", "preset": "mixed"}]}
"""

import difflib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import json5
import pydantic
import pydantic_core
from pydantic.json_schema import models_json_schema

from keras_compress.accuracy_aware import AccuracyAwareTraining
from keras_compress.algorithms import Algorithm, Quantization
from keras_compress.options import (
    ConfigError,
    Flag,
    KeyStatus,
    Options,
    Path,
    Problem,
    Text,
    build_each,
    nearest,
    number,
    one_or_many,
    option,
    received,
)

_SHARED_FILE = "not a key of compression; training scripts may keep theirs in the same file"
_KNOWN_INPUTS = "a Keras model knows its inputs"
_NO_SEARCH = "not built yet: searching for an architecture is planned for a later release"


class InputInfo(Options):
    """One input of the model, as frameworks need it that cannot ask the model."""

    sample_size: tuple[number(), ...] | None = option(None, "Shape, with the batch axis.")
    type: Text | None = option(None, "Data type.")
    filler: Text | None = option(None, "What to fill a sample with.")
    keyword: Text | None = option(None, "Argument name.")


def _build_algorithms(value: Any) -> tuple[Algorithm, ...]:
    if isinstance(value, (list, tuple)):
        return build_each(_build_algorithm, value)
    return (_build_algorithm(value),)


def _build_algorithm(entry: Any) -> Algorithm:
    if isinstance(entry, Algorithm):
        return entry
    if not isinstance(entry, Mapping):
        raise ConfigError(
            "expected an object such as {'algorithm': 'quantization'} or an Algorithm. "
            + received("value", entry)
        )
    known = sorted(Algorithm.registry)
    if "algorithm" not in entry:
        text = f"this key is required. Expected one of: {', '.join(known)}."
        raise ConfigError([Problem(("algorithm",), text)])
    name = entry["algorithm"]
    if name not in known:
        text = f"unknown algorithm.{nearest(name, known)} Expected one of: {', '.join(known)}."
        raise ConfigError([Problem(("algorithm",), f"{text} {received('algorithm', name)}")])
    keys = {key: value for key, value in entry.items() if key != "algorithm"}
    return Algorithm.registry[name].build(keys)


class Config(Options):
    """What `compress_model` shall do: algorithms, and what holds for all of them.

    Top-level keys that are not known are kept and reported as ignored, because training scripts
    share the file; one that is nearly a known key is an error.

    Invariant: `Config.load(config.to_dict()) == config`.

    Raises:
        ConfigError: If a key or value is wrong, with the path of each.

    Example:
    >>> from keras_compress.algorithms import Quantization
    >>> config = Config(algorithms=[Quantization(preset="mixed")], target_device="CPU")
    >>> config.to_dict()["compression"]
    [{'algorithm': 'quantization', 'preset': 'mixed'}]
    """

    model_config = pydantic.ConfigDict(extra="allow")

    algorithms: Annotated[tuple[Algorithm, ...], pydantic.BeforeValidator(_build_algorithms)] = (
        option((), "The algorithms, each at most once.", alias="compression")
    )
    target_device: Literal["ANY", "CPU", "GPU", "NPU", "TRIAL", "CPU_SPR"] = option(
        "ANY", "The device to compress for; TRIAL sets no constraints."
    )
    compression_lr_multiplier: number(0) | None = option(
        None, "Factor on the gradient of what algorithms train; their own key is stronger."
    )
    accuracy_aware_training: AccuracyAwareTraining | None = option(
        None, "Training within an accuracy budget: `accuracy_aware_fit`."
    )
    bootstrapNAS: dict[str, Any] | None = option(
        None, "Search for an architecture.", status="refused", reason=_NO_SEARCH
    )
    input_info: one_or_many(InputInfo) | None = option(
        None, "Inputs of the model.", status="ignored", reason=_KNOWN_INPUTS
    )
    disable_shape_matching: Flag = option(
        False, "Deprecated.", status="ignored", reason="shapes are never matched"
    )
    log_dir: Text | None = option(
        None, "Directory of logs.", status="ignored", reason="callbacks take their own directory"
    )

    @classmethod
    def load(cls, source: "Config | Mapping[str, Any] | str | os.PathLike") -> "Config":
        """Returns the configuration that a source describes.

        Args:
            source: A `Config` (returned as it is), a mapping in NNCF's layout, or the path of a
                JSON file in that layout, which may have comments.

        Raises:
            ConfigError: If the file is missing or not JSON, or its content is wrong.
            TypeError: If the source is something else.

        Example:
        >>> Config.load({"compression": {"algorithm": "quantization"}}).algorithms[0].preset
        'performance'
        """
        if isinstance(source, Config):
            return source
        if isinstance(source, (str, os.PathLike)):
            source = _read(pathlib.Path(source))
        if not isinstance(source, Mapping):
            raise TypeError(
                "Expected a Config, a mapping or the path of a JSON file. "
                + received("source", source)
            )
        return cls.build(source)

    def key_report(self) -> tuple[KeyStatus, ...]:
        """Returns what becomes of every key that was written.

        Example:
        >>> for key in Config.load({"model": "resnet", "compression": []}).key_report():
        ...     print(key.key, key.status)
        compression honoured
        model ignored
        """
        return tuple(self.key_statuses())

    def key_statuses(self, path: Path = (), parent: KeyStatus | None = None) -> Iterator[KeyStatus]:
        """Yields what `key_report` returns."""
        yield from super().key_statuses(path, parent)
        for name in self.model_extra:
            yield KeyStatus(name, "ignored", _SHARED_FILE)

    @property
    def adjustable(self) -> tuple[Algorithm, ...]:
        """The algorithms whose rate can move in training.

        Where none prunes or makes sparse, the widths of a quantization can, if each quantizer has
        its own.
        """
        found = tuple(algorithm for algorithm in self.algorithms if algorithm.adjustable)
        widths = (each for each in self.algorithms if isinstance(each, Quantization))
        return found or tuple(each for each in widths if each.has_widths)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Returns the JSON schema of configuration files, from the classes that read them.

        Keys that are not simply honoured carry `x-status` and `x-reason`.
        """
        classes = list(dict.fromkeys(Algorithm.registry.values()))
        _, schema = models_json_schema([(model, "validation") for model in (*classes, cls)])
        definitions = schema["$defs"]
        for definition in definitions.values():
            if "description" in definition:
                summary = definition["description"].split("\n\n")[0]
                definition["description"] = summary.replace("\n", " ")
        for model in classes:
            definition = definitions[model.__name__]
            names = {"enum": [model.name, *model.aliases]}
            definition["properties"] = {"algorithm": names, **definition["properties"]}
            definition["required"] = ["algorithm", *definition.get("required", ())]
        del definitions[Algorithm.__name__]
        top = definitions.pop(cls.__name__)
        entry = {"oneOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in classes]}
        top["properties"]["compression"] = {
            "description": cls.model_fields["algorithms"].description,
            "anyOf": [entry, {"type": "array", "items": entry}],
        }
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **top,
            "title": "keras_compress configuration",
            "$defs": definitions,
        }

    @pydantic.field_serializer("algorithms")
    def _serialize_algorithms(self, algorithms):
        return [algorithm.to_dict() for algorithm in algorithms]

    @pydantic.model_validator(mode="after")
    def _check_together(self):
        if "algorithms" in self.model_extra:
            raise ConfigError("expected either `algorithms` or `compression`. Received: both.")
        problems = [*self._not_data(), *self._misspelt(), *self._repeated()]
        problems += self._not_adjustable()
        if problems:
            raise ConfigError(problems)
        return self

    def _not_data(self) -> Iterator[Problem]:
        """Yields what a saved model could not hold, of the keys that others may read."""
        for name, value in (("bootstrapNAS", self.bootstrapNAS), *self.model_extra.items()):
            try:
                json.dumps(pydantic_core.to_jsonable_python(value))
            except (ValueError, TypeError, RecursionError):
                yield Problem((name,), f"expected data as JSON has it. {received(name, value)}")

    def _misspelt(self) -> Iterator[Problem]:
        fields = type(self).model_fields
        unwritten = [key for key in fields if key not in self.model_fields_set]
        unwritten += [fields[key].alias for key in unwritten if fields[key].alias]
        for name, value in self.model_extra.items():
            close = difflib.get_close_matches(name, unwritten, n=1, cutoff=0.85)
            if close:
                text = f"unknown key. Did you mean {close[0]!r}? {received(name, value)}"
                yield Problem((name,), text)

    def _repeated(self) -> Iterator[Problem]:
        names = [algorithm.name for algorithm in self.algorithms]
        for index, name in enumerate(names):
            if name in names[:index]:
                text = f"expected every algorithm once. {received('algorithm', name)}"
                yield Problem(("compression", index, "algorithm"), text)

    def _not_adjustable(self) -> Iterator[Problem]:
        training = self.accuracy_aware_training
        if training is None or training.mode != "adaptive_compression_level":
            return
        names = [algorithm.name for algorithm in self.adjustable]
        if len(names) != 1:
            text = (
                "expected exactly one algorithm with a rate to adapt (pruning or sparsity), or "
                "none and a quantization whose widths are searched for "
                "(`initializer.precision.type` 'hawq')."
            )
            yield Problem(
                ("accuracy_aware_training", "mode"), f"{text} {received('algorithms', names)}"
            )


def _read(path: pathlib.Path) -> Any:
    """Reads a JSON file that may have comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8; a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"Expected the path of a JSON file that can be read: {reason}. "
            f"Received: source={str(path)!r}"  # in full: its end is the file's name
        ) from None
    try:
        content = json5.loads(text, allow_duplicate_keys=False)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON (comments allowed). {_where(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object. {received('content', content)}")
    return content


def _where(error: ValueError) -> str:
    """Returns what the JSON reader found wrong, with line and column where it says so."""
    found = re.fullmatch(r"<string>:(\d+) (.*) at column (\d+)", str(error), re.DOTALL)
    if found:
        line, message, column = found.groups()
        return f"Received: {message} at line {line}, column {column}"
    return f"Received: {error}"
