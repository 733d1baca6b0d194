"""Turn a training checkpoint into a weights file and its card.

    codec freeze runs/light/last.pt --codec hyperprior:light -o weights/

The card (JSON) keeps what the run's log and recipe say, and what ``codec eval`` measures later:
codec, preset, model_id, parameters, kmac_per_pixel, bytes, training, measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs import registry
from ..codecs.base import Codec, count_parameters
from ..codecs.weights import save_weights
from ..entropy.exact import freeze
from ..entropy.gaussian import gaussian_tables
from .data import load_folder


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Write JSON atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(card, indent=1) + "\n")
    os.replace(partial, path)


def freeze_codec(codec: Codec, folder: Path, training: dict[str, Any],
                 mixing: Callable[[Any], dict[str, Any]] | None = None) -> dict[str, Any]:  # fmt: skip
    """Write ``codec``, trained, as a weights file and card into ``folder``; the card.

    ``mixing``: gives the frozen codec its context mixing, and says what ``training`` on the card should hold of that.
    """
    card: dict[str, Any] = {
        "codec": codec.name,
        "preset": codec.preset,
        "kind": codec.kind,
        "parameters": count_parameters(codec),
        "kmac_per_pixel": codec.kmac_per_pixel(),
    }
    freeze(codec.cpu().eval())
    if mixing is not None:
        training = training | {"mixing": mixing(codec)}
    return write_weights(codec, folder, card | {"training": training})


def write_weights(codec: Codec, folder: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Write the weights file of a frozen ``codec``, and this card with its id and size and without measurements; the card."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{codec.name}-{codec.preset}.safetensors"
    partial = path.with_suffix(".partial")
    model_id = save_weights(codec, partial).hex()
    os.chmod(partial, 0o644)  # safetensors writes private files
    os.replace(partial, path)
    fresh = {"model_id": model_id, "bytes": path.stat().st_size, "training": card["training"], "measured": {}}
    card = {k: v for k, v in card.items() if k not in fresh} | fresh
    write_card(path.with_suffix(".json"), card)
    return card


@torch.no_grad()
def freezing_cost(codec: Any, pictures: list[Tensor], levels: tuple[int, ...] = (100, 300, 500, 700, 900)) -> dict[str, float]:
    """What integers cost: rates of the frozen ``codec`` (a LatentCodec with float weights) over those of the float model.

    Both code the rounded symbols of the same latents of ``pictures`` (1, 3, h, w) in [0, 1], sides multiples of 64. Fractions:
    ``gaussian`` with tables of the density that the float model is trained with; ``shipped`` with the tables that are stored.
    The float model charges no symbol more than 30 bits, a table charges an escape: where ``gaussian`` is above 0.1 %, look for
    outliers (in a barely trained hcfssnet:light, 217 escapes were 1.1 % of one picture, and all of what freezing cost).
    """
    codec = deepcopy(codec).cpu().eval()
    frozen = deepcopy(codec)
    freeze(frozen)
    shipped, latent = frozen.latent.y_tables, frozen.latent
    codec.latent.rounded_rate = True
    bits = dict.fromkeys(("float", "gaussian", "shipped"), 0.0)
    for x in pictures:
        for level in levels:
            y = codec.analyse(x, level)
            _, y_bits, z_bits = codec.latent(y, torch.tensor([float(level)]))
            bits["float"] += float(y_bits + z_bits)
            for name, tables in (("gaussian", gaussian_tables()), ("shipped", shipped)):
                latent.set_tables(latent.z_tables, tables)
                bits[name] += latent.ideal_bits(y, latent.analyse_hyper(y, level), level)
    return {name: bits[name] / bits["float"] - 1 for name in ("gaussian", "shipped")}


def _pictures(folder: Path) -> list[Tensor]:
    """The pictures of a folder, cut to multiples of 64."""
    x = [p for stack in load_folder(folder) for p in stack.float() / 255]
    return [p[None, :, : p.shape[1] // 64 * 64, : p.shape[2] // 64 * 64] for p in x]


def freeze_checkpoint(checkpoint: Path, model: str, folder: Path, note: str = "", check: Path | None = None,
                      mixing: list[Tensor] | None = None) -> dict[str, Any]:  # fmt: skip
    """Freeze the averaged weights of ``checkpoint`` (``last.pt`` of a run). ``check``: pictures to measure its cost on.

    ``mixing``: training pictures (3, h, w) uint8 from which the context mixing starts; without them there is none.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    name, preset = registry.split(model)
    codec = registry.codec_class(name).from_preset(preset)
    codec.load_state_dict(state["ema"])
    training = {"steps": state["step"], "hours": round(state["seconds"] / 3600, 3), "recipe": state["recipe"]}
    if note:
        training["note"] = note
    cost = freezing_cost(codec, _pictures(check)) if check else {}
    fit = None
    if mixing:
        from .mixing import fit_mixing

        fit = partial(fit_mixing, pictures=mixing)
    card = freeze_codec(codec, folder, training, fit)
    if cost:
        card["measured"]["freezing"] = {k: round(v, 6) for k, v in cost.items()} | {"pictures": check.name}
        write_card(folder / f"{name}-{preset}.json", card)
        by, stored = cost["gaussian"], cost["shipped"]
        print(f"rate against the float model: {by:+.3%} by freezing, {stored:+.3%} with the stored tables")
    return card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec freeze``."""
    parser.add_argument("checkpoint", type=Path, help="last.pt of a training run")
    parser.add_argument("--codec", default="hyperprior:light", help="codec and preset that were trained")
    parser.add_argument("-o", "--out", type=Path, default=Path("weights"), help="folder for the weights file and its card")
    parser.add_argument("--check", type=Path, help="folder of pictures on which to measure what freezing costs")
    parser.add_argument("--mixing", type=Path, help="folder of training pictures: code latents by context mixing, which starts "
                        "at what these leave (see train/mixing.py)")  # fmt: skip
    parser.add_argument("--cache", type=Path, help=".npz file that keeps these pictures decoded")
    parser.add_argument("--note", default="", help="a sentence for the card: data, hardware")


def main(argv: list[str] | argparse.Namespace | None = None) -> int:
    """``codec freeze``."""
    args = argv
    if not isinstance(argv, argparse.Namespace):
        parser = argparse.ArgumentParser(prog="codec freeze", description="Freeze a checkpoint into coding form.")
        add_arguments(parser)
        args = parser.parse_args(argv)
    name, preset = registry.split(args.codec)
    if registry.codec_class(name).kind == "bytes":
        from .language import freeze as freeze_language_model

        card = freeze_language_model(args.checkpoint, preset, args.out, args.note)
    else:
        pictures = None
        if args.mixing:
            from .mixing import training_pictures

            pictures = training_pictures(args.mixing, args.cache)
        card = freeze_checkpoint(args.checkpoint, args.codec, args.out, args.note, args.check, pictures)
    print(json.dumps({k: card[k] for k in ("codec", "preset", "model_id", "parameters", "bytes")}))
    return 0
