"""Coding of fields on a grid within a bound on the error: what ``media/grid.py`` and the archives call, chunk by chunk.

    payload = encode_field(x, Bound(0.5), periodic=True)
    y = decode_field(payload)                 # same shape and dtype, |x - y| <= 0.5 wherever x is finite
    describe_field(payload)                   # {"shape", "dtype", "bound", "mode", ...} without decoding

``x`` is float32 or float64 with 1 to 4 axes, (T, L, H, W) or fewer: the last two are rows (latitude) and columns (longitude),
what comes before are times and levels, which are predicted from each other. A chunk is decoded as a whole: whoever wants a
time alone gives it a chunk of its own. Levels can be decoded alone in groups: ``encode_field(..., level_group=g)`` codes each
g consecutive levels apart from the others, and ``decode_field(payload, levels=[3, 5])`` decodes only the groups that it needs.

``Bound(value, kind)``: kind "absolute" (in the field's unit), "relative" (to the magnitude of each value; zeros and signs are
kept exactly) or "range" (a fraction of the chunk's largest minus smallest finite value); value 0, or no bound at all, is
lossless. ``Bound(array)`` with an array (H, W) of absolute bounds, at most 255 different ones, is a map of regions.

NaN and infinities stay where they are, bit for bit infinities, NaN as the canonical quiet NaN or, with ``nan_payloads=True``,
with their bits. ``periodic`` says that the last column is a neighbour of the first. ``base`` is a prediction of the whole field
that the decoder has too, the SAME bits on both sides (a neural decoder's, made exact); it is used as far as it helps.
``threads`` are used for parts that do not depend on each other; the bytes do not depend on their number. The payload is checked
with a CRC32C and decoded with the real decoder before ``encode_field`` returns: the bound is a promise.

Errors: ``encode_field`` raises ValueError for shapes, dtypes or bounds that make no sense; ``decode_field`` raises
CorruptStream for anything damaged and LimitExceeded for a payload that says it holds more than ``limit`` values.

``encode_rmse(x, 0.1)`` gives the smallest payload of a root mean square error, without a bound: by a transform
(``transform.py``), or None where that is of no use; ``decode_field`` decodes it. ``encode_field`` with ``goal="rmse"`` keeps
within the bound as well, but spends the bits for a small mean squared error (best effort).
Integers (8, 16 and signed 32 bits) are coded too, without loss.
"""

from .field import Bound, decode_field, describe_field, encode_field, encode_rmse

__all__ = ["Bound", "decode_field", "describe_field", "encode_field", "encode_rmse"]
