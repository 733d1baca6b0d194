"""The known data sets (``sets.json``) and where they lie on this machine.

The root of all sets is ``$NEURALCODEC_DATA``, else ``~/.cache/neuralcodec/data``; each set has a folder of its name
there. A folder given by hand works in place of a name, everywhere. """

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..container.errors import CodecError, UsageError

PICTURES = {".png", ".webp", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff"}
VIDEOS = {".y4m", ".yuv", ".mp4", ".mkv", ".mov", ".avi", ".webm"}
GRIDS = {".nc", ".nc4", ".grib", ".grb", ".grib2"}
ALIASES = {"clic": "clic2020-professional"}


class DatasetError(CodecError):
    """A data set is not there, not whole, or not what it should be."""


@dataclass(frozen=True)
class Source:
    """A file to download: where from, its place in the folder of the set, 'algorithm:hex' where its digest is known."""

    url: str
    to: str
    unpack: bool = False
    into: str = ""  # where to unpack, below the folder of the set
    checksum: str | None = None


@dataclass(frozen=True)
class Dataset:
    """A named set. ``content`` has the sha256 of what belongs to it: of files, or of pixels by picture name."""

    name: str
    title: str
    kind: str  # image, video, bytes, grid
    home: str
    licence: str
    files: tuple[Source, ...]
    splits: dict[str, list[str]]  # patterns of the files of each split; the first split is the usual one
    count: dict[str, int]
    note: str
    checked: str | None = None  # what ``content`` is about: "pixels" or "bytes"
    content: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return root() / self.name


def root() -> Path:
    """Folder of all data sets."""
    return Path(os.environ.get("NEURALCODEC_DATA") or Path.home() / ".cache" / "neuralcodec" / "data").expanduser()


@cache
def _sets() -> dict[str, Dataset]:
    raw: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("sets.json").read_text(encoding="utf-8"))
    return {
        name: Dataset(name, files=tuple(Source(**f) for f in entry.pop("files")), **entry)
        for name, entry in raw.items()
    }


def names() -> list[str]:
    """All data sets."""
    return list(_sets())


def get(name: str) -> Dataset:
    """A data set by name. UsageError with the known names."""
    name = ALIASES.get(name, name)
    if name not in _sets():
        raise UsageError(f"there is no data set {name!r}; known are {', '.join(names())}; a folder will do as well")
    return _sets()[name]


@dataclass(frozen=True)
class Found:
    """Files (of sequences also: folders of frames) to measure on. ``dataset`` is None for a folder given by hand."""

    label: str
    folder: Path
    paths: list[Path]
    dataset: Dataset | None
    split: str | None
    kind: str


def find(spec: str | Path, kind: str | None = None) -> Found:
    """The files of a set, 'name' or 'name:split', or those of a folder, in the order of their names.

    ``kind`` (image, video, grid, bytes) is that of the set, or what lies in the folder: only ``bytes`` must be asked for.
    DatasetError when there are none: it says where they belong. UsageError when the set is of another kind.
    """
    text = str(spec)
    name, _, split = text.partition(":")
    if ALIASES.get(name, name) in _sets() and not _is_path(text):
        found = _find_set(get(name), split)
        if kind not in (None, "bytes", found.kind):  # any files are bytes
            raise UsageError(f"{name} holds {found.kind}, not {kind}")
        return replace(found, kind=kind or found.kind)
    folder = Path(text)
    if not folder.is_dir():
        hint = f"data sets are {', '.join(names())}"
        raise DatasetError(f"{text}: no such folder or data set; {hint}")
    for some in (kind,) if kind else ("image", "grid", "video"):
        if paths := sorted(_of_kind(folder, some)):
            return Found(folder.resolve().name, folder, paths, None, None, some)
    what = {None: "pictures, fields or sequences", "image": "pictures", "video": "sequences", "grid": "fields"}
    hint = "" if kind else "; --kind bytes measures files of any sort"
    raise DatasetError(f"{text}: no {what.get(kind, 'files')} in this folder{hint}")


def _of_kind(folder: Path, kind: str) -> list[Path]:
    """What a folder holds of a kind; a folder of pictures in it is a sequence."""
    entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if kind == "bytes":
        return [p for p in entries if p.is_file()]
    suffixes = {"image": PICTURES, "video": VIDEOS, "grid": GRIDS}[kind]
    found = [p for p in entries if p.is_file() and p.suffix.lower() in suffixes]
    if kind == "video":
        found += [p for p in entries if p.is_dir() and any(f.suffix.lower() in PICTURES for f in p.iterdir())]
    return found


def _is_path(text: str) -> bool:
    return os.sep in text or text.startswith(".")


def _find_set(dataset: Dataset, split: str) -> Found:
    split = split or next(iter(dataset.splits))
    if split not in dataset.splits:
        raise UsageError(f"{dataset.name} has no split {split!r}; it has {', '.join(dataset.splits)}")
    folder = dataset.folder
    if not folder.is_dir():
        raise DatasetError(f"{dataset.name} is not here: `codec fetch {dataset.name}`, or {by_hand(dataset)}")
    found = {p for pattern in dataset.splits[split] for p in folder.glob(pattern) if p.is_file()}
    if dataset.kind == "image":
        found = {p for p in found if p.suffix.lower() in PICTURES}
    elif dataset.checked == "bytes":
        found = {p for p in found if p.name in dataset.content}
    paths = sorted(found)
    if len(paths) != dataset.count[split]:
        raise DatasetError(
            f"{dataset.name}: {len(paths)} files where the split {split!r} has {dataset.count[split]}; "
            f"`codec fetch {dataset.name}`, or {by_hand(dataset)}"
        )
    label = dataset.name if split == next(iter(dataset.splits)) else f"{dataset.name}:{split}"
    return Found(label, folder, paths, dataset, split, dataset.kind)


def by_hand(dataset: Dataset) -> str:
    """How to go on without a network: one clause."""
    return (
        f"get it from {dataset.home} and put its files into {dataset.folder} "
        "(NEURALCODEC_DATA names another root), or give a folder"
    )


def pixel_hash(pixels: np.ndarray) -> str:
    """sha256 over shape and pixels: the same for every lossless file of a picture."""
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def set_hash(hashes: list[str]) -> str:
    """One sha256 for a set of pictures, whatever their order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def identify(hashes: list[str]) -> Dataset | None:
    """The known set that consists of exactly these pictures."""
    known = (d for d in _sets().values() if d.checked == "pixels")
    return next((d for d in known if sorted(d.content.values()) == sorted(hashes)), None)


def check_pixels(dataset: Dataset, hashes: dict[str, str]) -> None:
    """Compare pixel hashes by file name with what the set should hold. DatasetError names the first wrong picture."""
    if dataset.checked != "pixels":
        return
    for name, found in hashes.items():
        expected = dataset.content.get(Path(name).stem)
        if expected != found:
            wrong = "does not belong to the set" if expected is None else "has other pixels than the set's picture"
            raise DatasetError(f"{dataset.name}: {name} {wrong}; remove it and `codec fetch {dataset.name}`")
    missing = sorted(set(dataset.content) - {Path(n).stem for n in hashes})
    if missing:
        raise DatasetError(f"{dataset.name}: {missing[0]} is missing; `codec fetch {dataset.name}`")


def check_bytes(dataset: Dataset) -> None:
    """Compare the files of a set with their sha256. DatasetError names the first that is missing or wrong."""
    for name, expected in dataset.content.items() if dataset.checked == "bytes" else ():
        path = dataset.folder / name
        if not path.is_file():
            raise DatasetError(f"{dataset.name}: {path} is missing; {by_hand(dataset)}")
        if file_digest(path, "sha256") != expected:
            raise DatasetError(f"{dataset.name}: {path} has a wrong sha256; remove it and get it again")


def file_digest(path: Path, algorithm: str) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
