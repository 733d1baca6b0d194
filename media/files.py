"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` only when the block ends well.

    It is written as ``<name>.<random>.partial`` in the same folder, flushed to the disk and renamed; a crash leaves at most
    the partial file. FileExistsError, before anything is written, if ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path}: exists already; use -f to overwrite it")
    handle, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(partial, 0o666 & ~umask)  # mkstemp is private by default; the result is an ordinary file
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path, overwrite)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def publish(partial: str, path: Path, overwrite: bool) -> None:
    """Give a whole file that is on the disk its name."""
    if overwrite:
        os.replace(partial, path)
    else:
        _rename(partial, path)
    _sync_folder(path.parent)


def _rename(partial: str, path: Path) -> None:
    """Rename without overwriting what another process may have put there meanwhile."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise FileExistsError(f"{path}: another program wrote it meanwhile; use -f to overwrite it") from None
    except OSError:  # a file system without hard links
        os.replace(partial, path)
    else:
        os.unlink(partial)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system allows it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
