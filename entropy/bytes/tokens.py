"""Byte-pair tokens in which every byte is a token, so that any data is legal and joining the tokens gives it back.

Ids are ranks in the sorted order of the tokens' byte strings: the tokens below a node of the binary tree over ids share a
range of strings, which is what lets a coder make a token out of log2 V binary decisions with useful statistics on each.
Merges never cross the borders of pre-tokens: a word with the space before it, a digit, a run of punctuation (the capital flags
of ``transform`` count as such), a run of line ends, a run of spaces. Method: Gage 1994, in the form of Sennrich et al. 2016.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

PRE_TOKEN = re.compile(
    rb"'(?:s|t|d|m|re|ll|ve)(?![a-z])| ?[A-Za-z\x80-\xff]{1,32}| ?[0-9]| ?[^\sA-Za-z0-9\x80-\xff]{1,32}"
    rb"|\n{1,32}| {1,64}(?= )|[\s\S]"
)
"""Cuts bytes into pieces of at most 65 bytes; every byte is in one."""

MAX_TOKEN_BYTES = 65
_CACHE = 1 << 17


def learn_merges(counts: dict[bytes, int], vocabulary: int) -> list[tuple[bytes, bytes]]:
    """Merges of a vocabulary of this size (256 bytes included) from pre-tokens and how often they occur.

    The most frequent pair is merged first, ties by byte order, so the result depends on ``counts`` alone.
    """
    words = [[bytes([b]) for b in word] for word in sorted(counts)]
    weights = [counts[word] for word in sorted(counts)]
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    where: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weights[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    known = {bytes([b]) for b in range(256)}
    while len(known) < vocabulary and heap:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n:  # stale: the count has changed since
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if n == 0:
            break
        merges.append(pair)
        known.add(pair[0] + pair[1])
        changed = set()
        for i in where.pop(pair):
            word = words[i]
            for p in zip(word, word[1:]):
                pairs[p] -= weights[i]
                changed.add(p)
            word = _merge(word, pair)
            for p in zip(word, word[1:]):
                pairs[p] += weights[i]
                where[p].add(i)
                changed.add(p)
            words[i] = word
        for p in changed:
            if pairs[p] > 0:
                heapq.heappush(heap, (-pairs[p], p))
    return merges


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


class Tokens:
    """A vocabulary: ``strings[id]`` sorted, and the merges that make tokens of bytes. Two merges may give the same string."""

    def __init__(self, merges: Iterable[tuple[bytes, bytes]]):
        """ValueError when a merge uses a string that no earlier merge has made."""
        self.merges = list(merges)
        known = {bytes([b]) for b in range(256)}
        for left, right in self.merges:
            if left not in known or right not in known:
                raise ValueError("a merge of tokens that do not exist")
            known.add(left + right)
        if max(map(len, known)) > MAX_TOKEN_BYTES:
            raise ValueError("a token is too long")
        self.strings = sorted(known)
        self.ids = {s: i for i, s in enumerate(self.strings)}
        self._rank = {pair: n for n, pair in reversed(list(enumerate(self.merges)))}
        self._cache: dict[bytes, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.strings)

    def _split(self, piece: bytes) -> tuple[int, ...]:
        word = [bytes([b]) for b in piece]
        last = len(self.merges)
        while len(word) > 1:
            best = min(zip(word, word[1:]), key=lambda pair: self._rank.get(pair, last))
            if best not in self._rank:
                break
            word = _merge(word, best)
        return tuple(self.ids[s] for s in word)

    def encode(self, data: bytes) -> np.ndarray:
        """Ids (n,) uint16 of any bytes."""
        ids: list[int] = []
        cache = self._cache
        for piece in PRE_TOKEN.findall(data):
            if (found := cache.get(piece)) is None:
                if len(cache) >= _CACHE:
                    cache.clear()
                found = cache[piece] = self._split(piece)
            ids.extend(found)
        return np.array(ids, np.uint16)

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of ids; IndexError for an id outside of the vocabulary."""
        strings = self.strings
        return b"".join([strings[i] for i in ids.tolist()])

    def to_array(self) -> np.ndarray:
        """Merges as ids of their two parts, (n, 2) uint16 in order: what a weights file keeps."""
        return np.array([[self.ids[a], self.ids[b]] for a, b in self.merges], np.uint16).reshape(-1, 2)

    @classmethod
    def from_array(cls, strings: list[bytes], merges: np.ndarray) -> Tokens:
        """Back from ``strings`` and ``to_array``. ValueError when they do not fit."""
        try:
            tokens = cls((strings[a], strings[b]) for a, b in merges.tolist())
        except IndexError:
            raise ValueError("a merge of tokens that do not exist") from None
        if tokens.strings != strings:
            raise ValueError("merges and strings of a vocabulary do not fit")
        return tokens
