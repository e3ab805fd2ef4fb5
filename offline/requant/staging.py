"""A folder or a file that appears whole or not at all: written under a hidden sibling name, renamed when complete.

For a folder OUT the siblings are ``.OUT.partial`` (being written) and ``.OUT.replaced`` (the old OUT, for the instant
of a swap). The writer holds a lock on the folder itself; the kernel releases it when a run dies however it dies, so
what a dead run left is recognised and cleared by the next one.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from requant.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_folder(path: Path) -> None:
    """Raises InputError where the folder that the file ``path`` is to be written into does not exist."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: its folder does not exist")


def write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


@contextmanager
def staged(out: Path, *, overwrite: bool = False, source: Path | None = None) -> Iterator[Path]:
    """Yields the folder to write into; it becomes ``out`` if the body succeeds and vanishes if it fails.

    Raises InputError where ``out`` exists and must not be replaced, overlaps ``source``, is being written, or does not
    fit on the disk.
    """
    out = Path(os.path.abspath(out))
    partial, replaced = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.replaced")
    if source is not None:
        _refuse_overlap(out, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = _acquire(partial, out)
    try:
        _recover(out, replaced)
        _refuse_existing(out, overwrite)
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield partial
        _publish(partial, out, replaced)
    except BaseException as error:
        if _same(lock, partial):  # once it is renamed, another run may have made its own
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise InputError(f"{out}: can not be written ({error.strerror})") from None
        raise
    finally:
        os.close(lock)


def _refuse_overlap(out: Path, source: Path) -> None:
    target, origin = out.resolve(), source.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise InputError(f"{out}: overlaps the model itself ({source}); choose a place outside it")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if Path.cwd().is_relative_to(out.resolve()):  # whoever stands there would be left in a folder that is gone
        raise InputError(f"{out}: is the current folder, or holds it; name a folder to make")
    if not overwrite:
        raise InputError(f"{out}: exists; use --overwrite to replace it")
    # --overwrite replaces a model, never a home directory
    if out.is_symlink() or not out.is_dir() or not ((out / "config.json").is_file() or not any(out.iterdir())):
        raise InputError(f"{out}: exists and is no model folder; remove it yourself or choose another name")


def _recover(out: Path, replaced: Path) -> None:
    """Finishes a swap that a killed run left half done; without the lock it might be that of a run that is alive."""
    if replaced.exists():
        if out.exists():
            with suppress(FileNotFoundError):  # a run that has just published may be removing it too
                shutil.rmtree(replaced)
        else:
            replaced.rename(out)


def _acquire(partial: Path, out: Path) -> int:
    """Makes and locks ``partial``; returns the descriptor that holds the lock."""
    while True:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"{out}: another run is writing it") from None
        if _same(descriptor, partial):
            return descriptor
        os.close(descriptor)  # its owner renamed or removed it between our two steps


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _publish(partial: Path, out: Path, replaced: Path) -> None:
    if out.exists():
        out.rename(replaced)
        try:
            partial.rename(out)
        except OSError:
            replaced.rename(out)
            raise
        shutil.rmtree(replaced, ignore_errors=True)  # what stays of it is cleared by the next run
    else:
        partial.rename(out)
