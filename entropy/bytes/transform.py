"""Reversible transforms that make text look like what a language model has learnt: one line per paragraph, few capitals.

Capitals: ``The`` -> ``\\x01the``, ``THE`` -> ``\\x02the``; with one space before the word the flag goes before the space, so that
`` the`` stays one token. The word I stays, capitals inside of a word stay, and the bytes 1, 2, 3 themselves get a 3 in front.

Line ends: a newline between two printing characters that stands where a writer with a line width would have broken the
line is turned into a space. Which spaces were line ends is coded after the text, by ``breaks_of`` and ``restore``.
"""

from __future__ import annotations

import re

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
