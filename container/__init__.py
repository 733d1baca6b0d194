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
from .format import MAGIC, Entry, Head, Limits, Segment, Stream, dumps, loads, read_head, sniff

__all__ = [
    "MAGIC", "CodecError", "CorruptStream", "Entry", "Head", "LimitExceeded", "Limits", "ModelMismatch", "ModelMissing",
    "Segment", "Stream", "UnknownCodec", "UnsupportedInput", "UsageError", "dumps", "loads", "read_head", "sniff",
]  # fmt: skip
