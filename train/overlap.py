"""Does training text hold passages of the files on which a codec is measured? Counts runs of eight words that both have.

    python -m neuralcodec.train.overlap --data text/train alice29.txt book1

Words are runs of letters and apostrophes, capitals ignored. For each measured file: its distinct runs of eight words, how many
of them the training files hold, and examples. Stock phrases and quotations give a few; a copy of the text gives nearly all. By
our rule a training text that shares ``LIMIT`` or more with a measured file, quotations and headers apart, is not trained on.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

RUN = 8
LIMIT = 20
_WORD = re.compile(rb"[a-z']+")
_PIECE = 1 << 22


class Words:
    """Numbers for words, and hashes (uint64) of runs of ``RUN`` words made of them."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def runs(self, words: list[bytes]) -> np.ndarray:
        """Hashes of the runs that begin at each word, (n - RUN + 1,)."""
        numbers = self._numbers
        ids = np.fromiter((numbers.setdefault(w, len(numbers) + 1) for w in words), np.uint64, len(words))
        if len(ids) < RUN:
            return np.zeros(0, np.uint64)
        h = np.zeros(len(ids) - RUN + 1, np.uint64)
        for k in range(RUN):  # the product wraps, as it should
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + ids[k : k + len(h)]
        return h


def pieces(data: bytes) -> Iterator[list[bytes]]:
    """The words of a long text in pieces; each begins with the last words of the piece before."""
    kept: list[bytes] = []
    for start in range(0, len(data), _PIECE):
        words = _WORD.findall(data[start : start + _PIECE].lower())
        yield kept + words
        kept = words[-RUN + 1 :]


def shared_runs(measured: dict[str, bytes], training: dict[str, bytes], examples: int = 3) -> dict[str, dict]:
    """For each measured text: ``runs`` (distinct), ``shared`` by training file, and ``examples`` (texts of shared runs)."""
    words = Words()
    own: dict[str, np.ndarray] = {}
    texts: dict[str, list[bytes]] = {}
    first: dict[str, np.ndarray] = {}
    for name, data in measured.items():
        texts[name] = _WORD.findall(data.lower())
        own[name], first[name] = np.unique(words.runs(texts[name]), return_index=True)
    found = {name: {t: np.zeros(len(h), bool) for t in training} for name, h in own.items()}
    everything = np.unique(np.concatenate([*own.values(), np.zeros(0, np.uint64)]))
    for file, data in training.items():
        for piece in pieces(data):
            hashes = words.runs(piece)
            hashes = np.unique(hashes[np.isin(hashes, everything)])
            for name, h in own.items():
                found[name][file] |= np.isin(h, hashes)
    result = {}
    for name, h in own.items():
        union = np.logical_or.reduce([*found[name].values(), np.zeros(len(h), bool)])
        places = np.sort(first[name][union])[:examples]
        result[name] = {
            "runs": len(h),
            "shared": {file: int(mask.sum()) for file, mask in found[name].items()},
            "examples": [b" ".join(texts[name][p : p + RUN]).decode("ascii") for p in places.tolist()],
        }
    return result


def main(argv: list[str] | None = None) -> int:
    """Print the counts; 1 where a file shares ``LIMIT`` runs or more with one training file, else 0."""
    from .language import read_texts

    parser = argparse.ArgumentParser(prog="python -m neuralcodec.train.overlap", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of training texts, *.txt or *.txt.xz")
    parser.add_argument("files", type=Path, nargs="+", help="the files that will be measured")
    args = parser.parse_args(argv)
    result = shared_runs({path.name: path.read_bytes() for path in args.files}, read_texts(args.data))
    for name, row in result.items():
        print(f"{name}: {row['runs']} runs of {RUN} words, shared: {', '.join(f'{f} {n}' for f, n in row['shared'].items())}")
        for example in row["examples"]:
            print(f"    {example}")
    return int(any(n >= LIMIT for row in result.values() for n in row["shared"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
