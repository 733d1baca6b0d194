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


_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF87a", b"GIF89a", b"qoif")
_BMP_HEADERS = {12, 40, 52, 56, 108, 124}


def looks_like_picture(start: bytes) -> bool:
    """Whether a file that begins so (18 bytes are enough) has the signature of a format that ``media.image`` reads."""
    if start.startswith(_SIGNATURES) or start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return True
    if start[4:12] in (b"ftypavif", b"ftypavis"):
        return True
    if start[:2] == b"BM":
        return start[6:10] == bytes(4) and int.from_bytes(start[14:18], "little") in _BMP_HEADERS
    return start[:1] == b"P" and start[1:2] in tuple(b"%d" % n for n in range(1, 7)) and start[2:3].isspace() and (
        start[3:4].isdigit() or start[3:4] == b"#"
    )  # fmt: skip
