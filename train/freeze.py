"""Turn a training checkpoint into a weights file and its card.

    codec freeze runs/light/last.pt --codec hyperprior:light -o weights/

The card (JSON) keeps what the run's log and recipe say, and what ``codec eval`` measures later:
codec, preset, model_id, parameters, kmac_per_pixel, bytes, training, measured.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..codecs import registry
from ..codecs.base import Codec, count_parameters
from ..codecs.weights import save_weights


def write_card(path: Path, card: dict[str, Any]) -> None:
    """Write JSON atomically."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(card, indent=1) + "\n")
    os.replace(partial, path)


def freeze_codec(codec: Codec, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Write ``codec``, trained, as a weights file and card into ``folder``; the card."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{codec.name}-{codec.preset}.safetensors"
    card: dict[str, Any] = {
        "codec": codec.name,
        "preset": codec.preset,
        "kind": codec.kind,
        "parameters": count_parameters(codec),
        "kmac_per_pixel": codec.kmac_per_pixel(),
    }
    partial = path.with_suffix(".partial")
    card["model_id"] = save_weights(codec.cpu().eval(), partial).hex()
    os.chmod(partial, 0o644)  # safetensors writes private files
    os.replace(partial, path)
    card |= {"bytes": path.stat().st_size, "training": training, "measured": {}}
    write_card(path.with_suffix(".json"), card)
    return card


def freeze_checkpoint(checkpoint: Path, model: str, folder: Path, note: str = "") -> dict[str, Any]:
    """Freeze the averaged weights of ``checkpoint`` (``last.pt`` of a run)."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    name, preset = registry.split(model)
    codec = registry.codec_class(name).from_preset(preset)
    codec.load_state_dict(state["ema"])
    training = {"steps": state["step"], "hours": round(state["seconds"] / 3600, 3), "recipe": state["recipe"]}
    if note:
        training["note"] = note
    return freeze_codec(codec, folder, training)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec freeze``."""
    parser.add_argument("checkpoint", type=Path, help="last.pt of a training run")
    parser.add_argument("--codec", default="hyperprior:light", help="codec and preset that were trained")
    parser.add_argument("-o", "--out", type=Path, default=Path("weights"), help="folder for the weights file and its card")
    parser.add_argument("--note", default="", help="a sentence for the card: data, hardware")


def main(argv: list[str] | argparse.Namespace | None = None) -> int:
    """``codec freeze``."""
    args = argv
    if not isinstance(argv, argparse.Namespace):
        parser = argparse.ArgumentParser(prog="codec freeze", description="Freeze a checkpoint into coding form.")
        add_arguments(parser)
        args = parser.parse_args(argv)
    card = freeze_checkpoint(args.checkpoint, args.codec, args.out, args.note)
    print(json.dumps({k: card[k] for k in ("codec", "preset", "model_id", "parameters", "bytes")}))
    return 0
