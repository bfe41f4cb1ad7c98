"""Records of trainings: JSON files that say what is kept in a folder, and of which training."""

import json

from keras_compress.whole_files import replacing

VERSION = 1
ADVICE = "Give another folder, or remove this one to begin again."


def json_copy(data):
    """Return a copy in lists, dictionaries and numbers of Python's own, as JSON gives it back."""
    return json.loads(json.dumps(data, default=float))


def write_record(path, run, content):
    """Write a record, which takes the place of the one before.

    Args:
        path: path of the file, a `pathlib.Path`.
        run: dict of what makes a training another one, {what: JSON-able value}.
        content: dict of JSON-able values.
    """
    record = {"version": VERSION, "run": run, **content}
    with replacing(path) as temporary:
        text = json.dumps(record, default=float, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_record(path, run, keys, what):
    """Return what `write_record` wrote for the same training; None where there is no file.

    Args:
        path: path of the file, a `pathlib.Path`.
        run: as for `write_record`.
        keys: names in the content that must be there.
        what: what the folder holds, for errors, such as `"backup"`.

    Raises:
        ValueError: the file cannot be read, lacks a key, has another version or is of another run.
    """
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version, found = stored["version"], stored["run"]
        missing = [key for key in keys if key not in stored]
        expected = json_copy(run)
        differing = [each for each in expected if found.get(each) != expected[each]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected the {what} in '{path}'. Received: {type(error).__name__}: {error}. {ADVICE}"
        ) from None
    if version != VERSION or missing:
        differing = ["format"]
    if differing:
        raise ValueError(
            f"Expected a folder that is empty or holds the {what} of this run. Received: "
            f"folder='{path.parent}', which differs in: {', '.join(differing)}. {ADVICE}"
        )
    return stored
