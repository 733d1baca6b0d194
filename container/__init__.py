"""The ``.nlc`` container: format, limits, typed errors. Knows nothing of codecs and imports neither torch nor numpy."""

from .errors import (
    CodecError,
    CorruptStream,
    LimitExceeded,
    ModelMismatch,
    ModelMissing,
    UnknownCodec,
    UnsupportedInput,
    UsageError,
)
from .format import MAGIC, Entry, Head, Limits, Segment, Spool, Stream, dumps, loads, read_head, read_segment, sniff

__all__ = [
    "MAGIC", "CodecError", "CorruptStream", "Entry", "Head", "LimitExceeded", "Limits", "ModelMismatch", "ModelMissing",
    "Segment", "Spool", "Stream", "UnknownCodec", "UnsupportedInput", "UsageError", "dumps", "loads", "read_head",
    "read_segment", "sniff",
]  # fmt: skip
