"""Binary arithmetic coding of mixed chances, in integers: what the coders of fields and of latents are made of.

Chances to be 1 have 16 bits (1..65535) where they are coded and 22 bits where they adapt; logits are in 1/256. A coder is int64
(4,): low, high, code word of the decoder, position. Byte-level descriptions: ``SPEC.md`` here and in ``grid/``. The coder of
any bytes (``bytes/``) codes its bits here too, and has its own tables and ends (``bytes/mixing.py``).
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
from numba import njit

# tables of the logistic domain, the same on every machine: decimals and integers, no libm
REACH = 3071  # of logits, in 1/256


def _squash_table() -> np.ndarray:
    """65536 / (1 + exp(-x / 256)) for x = -REACH..REACH."""
    with localcontext() as context:
        context.prec = 40
        step, power, upper = (Decimal(-1) / 256).exp(), Decimal(1), []
        for _ in range(REACH + 1):
            upper.append(min(65535, int((65536 / (1 + power)).to_integral_value())))
            power *= step
    return np.array([65536 - p for p in upper[:0:-1]] + upper, np.int32)


SQUASH = _squash_table()
# logit of (i + 1/2) / 16384: the x whose squash is nearest from below
STRETCH = (np.searchsorted(SQUASH, np.arange(16384) * 4 + 2, side="right") - 1 - REACH).clip(-REACH, REACH).astype(np.int16)


def start(data: bytes | np.ndarray | None = None) -> np.ndarray:
    """A coder at its start; with the ``data`` that a decoder will read."""
    coder = np.array([0, 0xFFFFFFFF, 0, 0], np.int64)
    if data is not None:
        coder[2:] = int.from_bytes(bytes(data[:4]).ljust(4, b"\0"), "big"), 4
    return coder


def ending(coder: np.ndarray) -> bytes:
    """The fewest bytes that, followed by zeros, lie in the interval: what an encoder writes last."""
    low, high = int(coder[0]), int(coder[1])
    for n in range(1, 5):
        value = high >> (32 - 8 * n) << (32 - 8 * n)
        if value >= low:
            return value.to_bytes(4, "big")[:n]
    raise AssertionError("the interval of the coder is empty")


@njit(cache=True, nogil=True, error_model="numpy")
def code_bit(bit, p, coder, buf, decode):
    """One bit whose chance to be 1 is p / 65536, 1 <= p <= 65535; the bit.

    The position runs on when the buffer is full (the encoder must look) or at its end (zeros are read).
    """
    low, high = coder[0], coder[1]
    span = high - low
    middle = low + (span >> 16) * p + (((span & 0xFFFF) * p) >> 16)
    if decode:
        bit = 1 if coder[2] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) & 0xFF000000 == 0:
        at = coder[3]
        if decode:
            byte = np.int64(buf[at]) if at < len(buf) else 0
            coder[2] = ((coder[2] << 8) & 0xFFFFFFFF) | byte
        elif at < len(buf):
            buf[at] = high >> 24
        coder[3] = at + 1
        low = (low << 8) & 0xFFFFFFFF
        high = ((high << 8) & 0xFFFFFFFF) | 255
    coder[0], coder[1] = low, high
    return bit


@njit(cache=True, nogil=True, error_model="numpy")
def raw_bits(value, bits, coder, buf, decode):
    """``bits`` equiprobable bits, high ones first."""
    out = 0
    for i in range(bits - 1, -1, -1):
        out = out << 1 | code_bit(value >> i & 1, 32768, coder, buf, decode)
    return out


@njit(cache=True, nogil=True, error_model="numpy")
def code_tail(value, octaves, coder, buf, decode):
    """value >= 1 by an Exp-Golomb code of equiprobable bits: a one for each octave, a zero unless that was the last of
    ``octaves``, then the bits below the highest."""
    octave = 0
    while not decode and value >> (octave + 1):
        octave += 1
    j = 0
    while j < octaves and code_bit(1 if octave > j else 0, 32768, coder, buf, decode):
        j += 1
    return (1 << j) | raw_bits(value, j, coder, buf, decode)


@njit(cache=True, nogil=True, error_model="numpy")
def learned(place, bit, rates):
    """``place``, 22 bits of chance above 10 of count, after a bit; the chance moves by rates[count] / 65536 of the way, and the
    count ends with the rates."""
    count, chance = place & 1023, place >> 10
    chance = min(chance + ((((bit << 22) - chance) * rates[count]) >> 16), (1 << 22) - 1)
    return chance << 10 | min(count + 1, len(rates) - 1)
