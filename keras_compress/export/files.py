"""Where an export goes, and what it consists of."""

import pathlib
import zlib

from keras_compress.whole_files import temporary_folder

SUFFIXES = {".xml": "OpenVINO IR", ".onnx": "ONNX", "": "SavedModel directory"}


def checked_target(path):
    """Return `path` as a `pathlib.Path` that can be written, before any work is done.

    Raises:
        ValueError: unknown suffix.
        OSError: the folder is missing or not writable, or something else is in the way.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES or not path.name:
        known = ", ".join(f"'{suffix}' ({kind})" for suffix, kind in SUFFIXES.items())
        raise ValueError(
            f"The suffix of the path decides the format. Expected one of {known}. "
            f"Received: path={str(path)!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected an existing folder to export into. Received: path={str(path)!r}"
        )
    if path.exists() and path.is_dir() != (path.suffix == ""):
        kind = "folder" if path.is_dir() else "file"
        raise FileExistsError(f"A {kind} of that name is in the way. Received: path={str(path)!r}")
    with temporary_folder(path):
        pass
    return path


def stored_files(path):
    """Return the files of an exported model: `.xml` and `.bin`, `.onnx`, or all in a directory."""
    path = pathlib.Path(path)
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    names = (path.with_suffix(".bin"), path) if path.suffix == ".xml" else (path,)
    return [each for each in names if each.is_file()]


def zipped_size(files):
    """Return the bytes of files when each is deflated, as in a `.zip` (without its directory)."""
    total = 0
    for file in files:
        compressor = zlib.compressobj()
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                total += len(compressor.compress(piece))
        total += len(compressor.flush())
    return total
