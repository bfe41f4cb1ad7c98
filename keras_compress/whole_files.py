"""Output files appear whole or not at all: written beside their place, then renamed."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile

try:
    import fcntl
except ImportError:  # on Windows, where what a killed process leaves behind is not removed
    fcntl = None

ENDING = ".keras_compress"  # of the names of temporary folders
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no more for this user, for one file
NEARLY_FULL = 1 << 16  # bytes that are free


@contextlib.contextmanager
def replacing(path, *suffixes):
    """Give a temporary folder; what is made in it under the target's name takes the target's place.

    A file is renamed over the one that stands there, in one step. A directory, and files that
    belong together, take more than one: a process that is killed between them leaves the target
    missing, and never one that is half of two outputs.

    What processes that were killed had begun for the same target is removed first.

    Args:
        path: the target.
        *suffixes: suffixes of the files that belong together, the one that is opened first by
            readers last, e.g. `".bin", ".xml"`. None: the target itself, file or directory.

    Yields:
        The path to write to, of the target's name.

    Raises:
        PermissionError: the target's folder cannot be written to.
        OSError: the disk is full, by whatever error it was that a library said so.
    """
    path = pathlib.Path(path)
    with temporary_folder(path) as folder, _full_disk_told(path):
        yield folder / path.name
        targets = [path.with_suffix(suffix) for suffix in suffixes] or [path]
        _put_in_place([(folder / target.name, target) for target in targets])


@contextlib.contextmanager
def replacing_if_local(path, overwrite=True, size=0):
    """Give the path to write to, for `replacing`; the target itself where it cannot be replaced.

    Args:
        path: path of a file or directory, address, or open file.
        overwrite: whether what stands there may go without asking.
        size: bytes that will be written at least. HDF5 takes a process down at its end that had
            begun a file on a disk which is too small.

    Raises:
        OSError: the disk is full.
    """
    is_path = isinstance(path, (str, os.PathLike)) and "://" not in str(path)
    target = pathlib.Path(path) if is_path else None
    if target is None or not target.parent.is_dir() or (target.exists() and not overwrite):
        yield path
        return
    with replacing(target) as temporary:
        if shutil.disk_usage(target.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield temporary


@contextlib.contextmanager
def _full_disk_told(path):
    """Turn the errors by which libraries say that a disk is full into one."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(path.parent).free
        reason = _why_full(error, free)
        if reason is None:
            raise
        raise OSError(
            errno.ENOSPC,
            f"Expected room on the disk for '{path}' and, while it is made, for what it is made "
            f"from. Received: {reason} ({free} bytes of the disk are free now). What stood under "
            "that name is as it was",
        ) from error


def _why_full(error, free):
    """Return the system's words for what an error says about the room on a disk, or None."""
    for code in FULL:
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            return os.strerror(code)
    if free < NEARLY_FULL and "iostream error" in str(error):  # is all that OpenVINO says
        return os.strerror(errno.ENOSPC)
    return None


@contextlib.contextmanager
def temporary_folder(path):
    """Give a folder beside a target that is removed afterwards, whatever happens.

    Args:
        path: the target, a `pathlib.Path`.

    Raises:
        PermissionError: the target's folder cannot be written to.
    """
    _remove_abandoned(path)
    try:
        folder = tempfile.mkdtemp(prefix=f".{path.stem}-", suffix=ENDING, dir=path.parent)
    except OSError as error:
        raise PermissionError(
            f"Expected a folder that can be written to. Received: path={str(path)!r} ({error})"
        ) from error
    try:
        with _held(folder):
            yield pathlib.Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder):
    """Lock a folder; the system lets go of it when the process ends, however it does.

    Yields whether nobody else holds it.
    """
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        yield handle is not None and _locked(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _locked(handle):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or the file system has no locks
        return False
    return True


def _remove_abandoned(path):
    """Remove the temporary folders of a target that no living process holds."""
    start = f".{path.stem}-"
    for folder in path.parent.glob(f".*{ENDING}"):
        if folder.name.startswith(start):
            with contextlib.suppress(OSError), _held(folder) as is_free:
                if is_free:
                    shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(pairs):
    """Rename each of `(new, target)`; all of them, or none where one cannot be.

    What stands at the targets steps aside first, the last target's before all others.
    """
    (new, target), *others = pairs
    if not others and not target.is_dir():
        os.replace(new, target)
        return
    aside = [(old, new.with_name(f"{new.name}.old")) for new, old in reversed(pairs)]
    renamed = []
    try:
        for source, destination in [*((a, b) for a, b in aside if a.exists()), *pairs]:
            os.replace(source, destination)
            renamed.append((source, destination))
    except OSError:
        for source, destination in reversed(renamed):
            os.replace(destination, source)
        raise
