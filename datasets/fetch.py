"""``codec fetch``: download data sets with progress, resume after a cut, and checksums."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..container.errors import UsageError
from .registry import (
    Dataset,
    DatasetError,
    Source,
    by_hand,
    check_bytes,
    check_pixels,
    file_digest,
    get,
    names,
    pixel_hash,
    root,
)  # fmt: skip

CHUNK = 1 << 18
ATTEMPTS = 4
TIMEOUT = 30.0
Progress = Callable[[int, int], None]


class ChecksumError(DatasetError):
    """What arrived is not what was expected."""


class _Cut(Exception):
    """The connection ended early; another attempt may go on."""


def download(url: str, target: Path, checksum: str | None = None, *, progress: Progress | None = None,
             attempts: int = ATTEMPTS, wait: float = 1.0) -> None:  # fmt: skip
    """Fetch ``url`` (http or https) to ``target``; what arrived of it so far lies in ``<target>.partial``.

    An interrupted download goes on where it stopped, in the same call (``attempts``, with growing pauses of ``wait``
    seconds) or a later one, unless the server says that the file has changed. ``checksum`` is 'algorithm:hex'.
    DatasetError without an answer, ChecksumError for wrong content, which is not kept. """
    if not url.startswith(("http://", "https://")):
        raise DatasetError(f"{url}: only http and https addresses are fetched")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, tag = target.with_name(target.name + ".partial"), target.with_name(target.name + ".partial-tag")
    for attempt in range(attempts):
        try:
            _receive(url, partial, tag, bool(checksum), progress)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 or attempt == attempts - 1:
                raise DatasetError(f"{url}: the server answers {error.code} {error.reason}") from None
        except (_Cut, OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename:
                raise  # a matter of the disk, not of the network
            if attempt == attempts - 1:
                reason = getattr(error, "reason", None) or error
                raise DatasetError(f"{url}: no whole answer ({reason or type(error).__name__})") from None
        time.sleep(wait * 2**attempt)
    if checksum:
        algorithm, _, expected = checksum.partition(":")
        if (found := file_digest(partial, algorithm)) != expected:
            partial.unlink()
            tag.unlink(missing_ok=True)
            raise ChecksumError(f"{url}: wrong {algorithm}: {found} arrived where {expected} was expected")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    tag.unlink(missing_ok=True)


def _receive(url: str, partial: Path, tag: Path, checked: bool, progress: Progress | None) -> None:
    """One attempt: append to ``partial`` until it is whole. ``tag`` keeps the server's name of this version."""
    have = partial.stat().st_size if partial.exists() else 0
    version = tag.read_text() if tag.exists() else ""
    headers = {"User-Agent": "neuralcodec", "Accept-Encoding": "identity"}
    if have and (version or checked):  # without either nobody could tell whether both halves fit
        headers["Range"] = f"bytes={have}-"
        if version:
            headers["If-Range"] = version
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # it was whole already
        partial.unlink()
        raise _Cut("the partial file does not fit; starting again") from None
    with answer:
        resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:
            if answer.status == 206:
                partial.unlink(missing_ok=True)
                raise _Cut("the server sends another part than asked for")
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else 0
        free = shutil.disk_usage(partial.parent).free
        if total - have > free:
            raise DatasetError(f"{url}: {total - have:,} bytes to come, but only {free:,} are free in {partial.parent}")
        etag = answer.headers.get("ETag", "")
        version = answer.headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag
        if version:
            tag.write_text(version)
        else:
            tag.unlink(missing_ok=True)
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress:
                    progress(have, total)
        if total and have < total:
            raise _Cut(f"{have:,} of {total:,} bytes")


def unpack(archive: Path, folder: Path) -> None:
    """Extract the plain files of a zip or tar archive. DatasetError for names that lead out of the folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for item in packed.infolist():
                if not item.is_dir():
                    with packed.open(item) as source:
                        _extract(source, item.filename, folder, archive)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and (source := tar.extractfile(member)):
                    _extract(source, member.name, folder, archive)
    else:
        raise DatasetError(f"{archive}: neither a zip nor a tar archive")


def _extract(source: BinaryIO, name: str, folder: Path, archive: Path) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
        raise DatasetError(f"{archive}: the name {name!r} in it leads out of the folder; nothing is unpacked there")
    if parts[0] == "__MACOSX" or parts[-1].startswith("._"):
        return
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK)
    os.replace(partial, target)


def fetch(dataset: Dataset, *, progress: Callable[[str], contextlib.AbstractContextManager] | None = None,
          keep: bool = False, wait: float = 1.0) -> Path:  # fmt: skip
    """Bring a set into its folder, skipping what is there; the folder. ``keep`` leaves unpacked archives in place.

    ``progress(title)`` gives a context that yields a ``Progress`` or None. DatasetError, ChecksumError.
    """
    folder = dataset.folder
    if not dataset.files:
        with contextlib.suppress(DatasetError):
            if dataset.checked == "bytes":
                check_bytes(dataset)
                return folder
        raise DatasetError(f"{dataset.name} cannot be downloaded: {dataset.note} Then {by_hand(dataset)}")
    try:
        for source in dataset.files:
            if not _there(folder, source):
                with (progress or _silent)(source.to) as bar:
                    download(source.url, folder / source.to, source.checksum, progress=bar, wait=wait)
                if source.unpack:
                    unpack(folder / source.to, folder / source.into)
                    _mark(folder, source).touch()
                    if not keep:
                        (folder / source.to).unlink()
    except ChecksumError:
        raise
    except DatasetError as error:
        raise DatasetError(f"{error}; try again later, or {by_hand(dataset)}") from None
    verify(dataset)
    return folder


def verify(dataset: Dataset) -> None:
    """Check what lies in the folder of a set against what is known of it. DatasetError."""
    check_bytes(dataset)
    if dataset.checked == "pixels":
        from ..media.image import read_picture

        paths = [p for s in dataset.files if (p := dataset.folder / s.to).is_file()]
        check_pixels(dataset, {p.name: pixel_hash(read_picture(p).pixels) for p in paths})


def _mark(folder: Path, source: Source) -> Path:
    """An empty file that says that an archive was unpacked."""
    return folder / f".{source.to}.unpacked"


def _there(folder: Path, source: Source) -> bool:
    return _mark(folder, source).exists() if source.unpack else (folder / source.to).exists()


@contextlib.contextmanager
def _silent(_: str) -> Iterator[None]:
    yield None


def show(dataset: Dataset) -> None:
    """What is known of a set, for a person."""
    here = "here" if dataset.folder.is_dir() else "not here"
    known = sum(bool(s.checksum) for s in dataset.files)
    sums = f"{known} of {len(dataset.files)} downloads"
    if dataset.content:
        sums += f", {dataset.checked} of {len(dataset.content)} files"
    print(f"{dataset.name} ({dataset.kind}, {here}): {dataset.title}")
    print(f"  splits {', '.join(f'{k} ({dataset.count[k]})' for k in dataset.splits)}; checksums known: {sums}")
    print(f"  licence: {dataset.licence}; home: {dataset.home}")
    if dataset.note:
        print(f"  {dataset.note}")


def main(args: argparse.Namespace) -> int:
    """``codec fetch``."""
    from ..cli import progress_bar

    if args.root:
        os.environ["NEURALCODEC_DATA"] = args.root
    if not args.names:
        for name in names():
            show(get(name))
        print(f"root: {root()}")
        return 0
    for dataset in [get(name) for name in args.names]:
        if not (dataset.files or dataset.content) and args.verify:
            raise UsageError(f"{dataset.name}: nothing is known to verify it with")
        if args.verify:
            verify(dataset)
        else:
            fetch(dataset, progress=lambda title: progress_bar(args, title), keep=args.keep_archives)
        if not args.quiet:
            print(f"{dataset.name}: {dataset.folder}; licence: {dataset.licence}", file=sys.stderr)
    return 0
