"""Typed errors. Each has the exit code of the command line (DESIGN 6); messages are one line: what, where, how to go on."""

from __future__ import annotations


class CodecError(Exception):
    """Anything that this suite refuses on purpose."""

    exit_code = 1


class UsageError(CodecError):
    """The call itself is wrong."""

    exit_code = 2


class UnsupportedInput(CodecError):
    """The input is not something that can be coded."""


class CorruptStream(CodecError):
    """The stream is damaged or was never ours."""

    exit_code = 3


class UnknownCodec(CodecError):
    """The stream names a codec that this installation does not have."""

    exit_code = 4


class ModelMissing(CodecError):
    """The codec is known, its weights are not here."""

    exit_code = 4


class ModelMismatch(CodecError):
    """The weights here are not those that made the stream."""

    exit_code = 4


class LimitExceeded(CodecError):
    """The stream or picture is larger than the limits allow."""

    exit_code = 5
