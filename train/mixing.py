"""Where the context mixing of a codec's latents starts (``entropy/latent_mixing.py``), learned by coding training pictures.

    python -m neuralcodec.train.mixing hyperprior:light --data photos/ --weights weights/

gives the weights file of a frozen codec (back) its context mixing; ``codec freeze --mixing photos/`` does so at once. The taps
of the prediction are least squares over symbols, each divided by the variance that its row promises; counts and mixing weights
are those that are left after coding all pictures at five qualities each, in random order. The rows of z are those of the
scale table that would take the fewest bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codecs import registry
from ..codecs.base import LEVELS, LatentCodec
from ..entropy.gaussian import SCALES
from ..entropy.hyperprior import ContextHyperprior
from ..entropy.latent_mixing import HYPER_UNIT, NEIGHBOURS, ROWS, SKIPPED, TAPS, HyperStart, Start, learn
from .data import load_folder
from .freeze import write_weights

PICTURES, QUALITIES = 64, 5
SIDE = 512  # of the part of a picture that is used
RIDGE = 100.0
HYPER_KNOTS = 5  # of the rows of z over the quality range
HYPER_REACH = 30  # larger values of z count as these when rows are chosen
Tile = tuple[np.ndarray, np.ndarray]
"""Symbols q (C, h, w) int32 and their rows (C, h, w) uint8."""


@torch.no_grad()
def observe(latent: ContextHyperprior, y: Tensor, z: Tensor, level: int) -> Tile:
    """The symbols that a frozen entropy model codes for y (1, M, h, w) and its z."""
    q, rows = (np.zeros((y.shape[1], y.shape[2] * y.shape[3]), t) for t in (np.int32, np.uint8))

    def put(mine: slice, where: Tensor, symbols: Tensor, index: Tensor, coded: Tensor | None) -> None:
        q[mine, where.numpy()] = symbols[0].numpy()
        rows[mine, where.numpy()] = index[0].numpy() if coded is None else np.where(coded[0].numpy(), index[0].numpy(), SKIPPED)

    latent.passes(y, z, level, put)
    return q.reshape(y.shape[1:]), rows.reshape(y.shape[1:])


def fit_taps(tiles: list[Tile]) -> np.ndarray:
    """int16 (C, 2, TAPS), 1/4096: the symbol expected from its neighbours in the channel, for anchors and for the others."""
    channels = len(tiles[0][0])
    weight = np.zeros(256, np.float32)
    weight[:ROWS] = 1 / (np.square(SCALES) + 1 / 12)
    taps = np.zeros((channels, 2, TAPS))
    reach = int(np.abs(NEIGHBOURS).max())
    for half in (0, 1):
        cov, rhs = np.zeros((channels, TAPS, TAPS)), np.zeros((channels, TAPS))
        for q, rows in tiles:
            h, w = q.shape[1:]
            padded = np.pad(q, ((0, 0), (reach, reach), (reach, reach))).astype(np.float32)
            chosen = np.add.outer(np.arange(h), np.arange(w)) % 2 == half
            around = [padded[:, reach + r : reach + r + h, reach + c : reach + c + w][:, chosen] for r, c in NEIGHBOURS[half]]
            x, y = np.stack(around, -1), q[:, chosen].astype(np.float32)
            weighted = x * weight[rows[:, chosen]][..., None]
            cov += np.matmul(weighted.transpose(0, 2, 1), x)
            rhs += np.matmul(weighted.transpose(0, 2, 1), y[..., None])[..., 0]
        taps[:, half] = np.linalg.solve(cov + RIDGE * np.eye(TAPS), rhs[..., None])[..., 0]
    return np.clip(np.rint(taps * 4096), -32767, 32767).astype(np.int16)


@torch.no_grad()
def fit_mixing(codec: LatentCodec, pictures: list[Tensor], count: int = PICTURES, seed: int = 0) -> dict[str, Any]:
    """Give a frozen codec of pictures its context mixing, from ``count`` of ``pictures``, (3, h, w) uint8. What the card
    should say of it."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(pictures))[:count]
    tiles, hyper = [], []
    for number in chosen:
        h, w = (min(n, SIDE) // 64 * 64 for n in pictures[number].shape[1:])
        x = pictures[number][None, :, :h, :w].float() / 255
        levels = (np.arange(QUALITIES) + rng.random(QUALITIES)) * LEVELS / QUALITIES
        for level in levels.astype(int).tolist():
            y = codec.analyse(x, level)
            z = codec.latent.analyse_hyper(y, level)
            tiles.append(observe(codec.latent, y, z, level))
            hyper.append((z[0].numpy().astype(np.int32), level))
    order = rng.permutation(len(tiles))
    return {"pictures": len(chosen), "qualities": QUALITIES,
            "y_bytes_over_tables": fit(codec.latent, [tiles[i] for i in order]),
            "z_bytes_over_tables": fit_hyper(codec.latent, [hyper[i] for i in order])}  # fmt: skip


def fit(latent: ContextHyperprior, tiles: list[Tile]) -> float:
    """Let a frozen entropy model mix, from what these tiles leave; the bytes of y that they took over those by tables alone."""
    plain = sum(latent.y_tables.bits(q[rows != SKIPPED], rows[rows != SKIPPED]).sum() for q, rows in tiles) / 8
    latent.mixing, taken = learn(Start.plain(fit_taps(tiles)), latent.y_tables, tiles, tuple(latent.cfg.slices))
    return round(taken / plain, 4)


def fit_hyper(latent: ContextHyperprior, seen: list[tuple[np.ndarray, int]]) -> float:
    """Let a frozen entropy model mix z too, from what these z (C, h, w) at levels leave; its bytes over those by tables."""
    channels, levels = latent.cfg.hyper, latent.cfg.levels
    counts = np.zeros((HYPER_KNOTS, channels, 2 * HYPER_REACH + 1))
    counts[:, :, HYPER_REACH] = 1e-3  # a knot that no picture is near
    plain = 0.0
    for z, level in seen:
        flat = z.reshape(channels, -1)
        plain += latent.z_tables.bits(flat.reshape(-1), np.repeat(np.arange(channels), flat.shape[1])).sum() / 8
        near = np.maximum(1 - np.abs(level * (HYPER_KNOTS - 1) / levels - np.arange(HYPER_KNOTS)), 0)
        own = np.clip(flat, -HYPER_REACH, HYPER_REACH) + HYPER_REACH
        counts += near[:, None, None] * np.stack([np.bincount(row, minlength=counts.shape[2]) for row in own])
    values = np.arange(-HYPER_REACH, HYPER_REACH + 1)
    offsets = np.rint((counts * values).sum(2) / counts.sum(2)).astype(int)
    shifted = values[None, :] - np.arange(-HYPER_REACH, HYPER_REACH + 1)[:, None]  # [offset, value]
    cost = np.stack([latent.y_tables.bits(shifted.reshape(-1), np.full(shifted.size, row)).reshape(shifted.shape)
                     for row in range(ROWS)])  # fmt: skip
    rows = np.einsum("rkcv,kcv->kcr", cost[:, offsets + HYPER_REACH], counts).argmin(2)
    begin = HyperStart((rows * HYPER_UNIT).astype(np.int16), (offsets * HYPER_UNIT).astype(np.int16),
                       Start.plain(np.zeros((channels, 2, TAPS), np.int16)))  # fmt: skip
    tiles = []
    for z, level in seen:
        row, offset = begin.at(level, levels)
        tiles.append((z - offset[:, None, None], np.broadcast_to(row[:, None, None].astype(np.uint8), z.shape)))
    start, taken = learn(Start.plain(fit_taps(tiles)), latent.y_tables, tiles, (channels,))
    latent.hyper_mixing = HyperStart(begin.rows, begin.offsets, start)
    return round(taken / plain, 4)


def training_pictures(folder: Path, cache: Path | None = None) -> list[Tensor]:
    """All pictures of a folder that are at least 64 pixels wide and high."""
    return [p for stack in load_folder(folder, cache) for p in stack if min(p.shape[1:]) >= 64]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neuralcodec.train.mixing", description=__doc__.splitlines()[0])
    parser.add_argument("codec", help="codec and preset whose weights file is there")
    parser.add_argument("--data", type=Path, required=True, help="folder of training pictures")
    parser.add_argument("--cache", type=Path, help=".npz file that keeps the decoded pictures")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="how many of them (default %(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("weights"), help="folder of the weights file and its card, both "
                        "of which are written anew")  # fmt: skip
    args = parser.parse_args(argv)
    name, preset = registry.split(args.codec)
    codec = registry.codec_class(name).from_preset(preset)
    path = args.weights / f"{name}-{preset}.safetensors"
    from ..codecs.weights import load_weights

    load_weights(codec, path)
    codec.latent.mixing = codec.latent.hyper_mixing = None
    card = json.loads(path.with_suffix(".json").read_text())
    about = fit_mixing(codec, training_pictures(args.data, args.cache), args.pictures)
    card = write_weights(codec, args.weights, card | {"training": card["training"] | {"mixing": about}})
    print(json.dumps({k: card[k] for k in ("codec", "preset", "model_id", "bytes")} | about))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
