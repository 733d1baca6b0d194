"""Reversible transforms that make text look like what a language model has learnt: one line per paragraph, few capitals.

Capitals: ``The`` -> ``\\x01the``, ``THE`` -> ``\\x02the``; with one space before the word the flag goes before the space, so
that `` the`` stays one token. The word I stays, capitals inside of a word stay, and the bytes 1, 2, 3 themselves get a 3 in
front.

Line ends: a newline between two printing characters that stands where a writer with a line width would have broken the
line is turned into a space: where the next word would have reached beyond a margin. Which of the spaces that do so were line
ends is coded after the text (``text.py``), when all words are known.
"""

from __future__ import annotations

import re

import numpy as np
from numba import njit

CAPITAL, UPPER, ESCAPE = b"\x01", b"\x02", b"\x03"

_CAPITALS = re.compile(rb"( ?)(?<![A-Za-z])([A-Z][A-Za-z]*)|[\x01-\x03]")
_FLAGS = re.compile(rb"\x03([\x01-\x03])|\x01( ?[a-z])|\x02( ?[a-z]+)")


def _flag(match: re.Match[bytes]) -> bytes:
    word = match[2]
    if word is None:
        return ESCAPE + match[0]
    if word == b"I":
        return match[0]
    if len(word) > 1 and word.isupper():
        return UPPER + match[0].lower()
    return CAPITAL + match[1] + word[:1].lower() + word[1:]


def _unflag(match: re.Match[bytes]) -> bytes:
    return match[1] or (match[2] or match[3]).upper()


def flag_capitals(data: bytes) -> bytes:
    """Capitals to flags; the inverse is ``restore_capitals``."""
    return _CAPITALS.sub(_flag, data)


def restore_capitals(data: bytes) -> bytes:
    """Undo ``flag_capitals``. Of what it has not made, stray flags stay as they are."""
    return _FLAGS.sub(_unflag, data)


# --- line ends --------------------------------------------------------------------------------------------------------

WIDEST = 255
"""Reach of a place: what stands beyond this column is all the same. As a margin it means that no line end is soft."""


@njit(cache=True)
def _blank(c):
    return c == 32 or c == 10 or c == 9 or c == 13


@njit(cache=True)
def reach(text, at, start):
    """Column at which the word after the blank at ``at`` ends in a line that began at ``start``, at most WIDEST.

    -1 where the blank is not a single one between two words: no soft line end can be there.
    """
    if at == 0 or at + 1 >= len(text) or _blank(text[at - 1]) or _blank(text[at + 1]):
        return -1
    end = at + 1
    while end < len(text) and not _blank(text[end]) and end - start < WIDEST:
        end += 1
    return min(end - start, WIDEST)


@njit(cache=True)
def _reaches(text, breaks, spaces):
    """Histograms (256,) of the reach of single newlines and of single spaces."""
    start = 0
    for i in range(len(text)):
        if text[i] == 10 or text[i] == 32:
            r = reach(text, i, start)
            if r >= 0:
                if text[i] == 10:
                    breaks[r] += 1
                else:
                    spaces[r] += 1
            if text[i] == 10:
                start = i + 1


@njit(cache=True)
def join_lines(text, margin):
    """Turn single newlines that reach beyond ``margin`` into spaces, in place; how many."""
    start, count = 0, 0
    for i in range(len(text)):
        if text[i] == 10:
            if reach(text, i, start) > margin:
                text[i] = 32
                count += 1
            start = i + 1
    return count


def best_margin(text: np.ndarray) -> int:
    """The margin with which line ends cost least: those beyond it as flags of spaces, the others within the text."""
    breaks, spaces = np.zeros(WIDEST + 1, np.int64), np.zeros(WIDEST + 1, np.int64)
    _reaches(text, breaks, spaces)
    both = np.maximum(breaks + spaces, 1)
    share = np.clip(breaks / both, 1e-9, 1 - 1e-9)
    flags = both * -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) + 1.5 * (breaks + spaces > 0)
    # cost[m]: flags of all reaches above m, line ends in the text of those up to m
    beyond = flags.sum() - np.cumsum(flags)
    cost = beyond + _BITS_OF_A_LINE_END * np.cumsum(breaks)
    margin = int(np.argmin(np.round(cost, 3)))  # rounded, so that the last digits of a logarithm decide nothing
    soft = breaks[margin + 1 :].sum()
    return margin if soft >= _WORTH_IT and beyond[margin] < soft * _MOST_BITS else WIDEST


_BITS_OF_A_LINE_END = 3.0
_MOST_BITS = 1.5  # lines of a page cost less than one bit each; lines of verse or code two and more
_WORTH_IT = 8
