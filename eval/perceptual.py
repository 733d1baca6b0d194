"""Distances through networks: LPIPS and DISTS by torchmetrics, a feature distance of our own, FID and KID over patches.

Weights are never part of this package. torchmetrics' networks take theirs from PyTorch's cache (``$TORCH_HOME``), or
download them once; where neither works the error says which file is missing. """

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..container.errors import UsageError

SQUEEZENET = "NEURALCODEC_SQUEEZENET"
"""Environment variable with the weights file of ``feature_distance``."""
TAPS = (1, 4, 7, 9, 10, 11, 12)  # of SqueezeNet 1.1: the first ReLU and the fire modules before each change of width
MEAN_BGR = (104.0, 117.0, 123.0)  # of the original Caffe release
PATCH = 299
PER_FILE = 25  # patches of a picture at most; FID wants many pictures, not many patches of one


def _batch(pixels: np.ndarray, peak: int) -> Tensor:
    """(H, W, 3) -> (1, 3, H, W) in 0..1."""
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / peak


@contextmanager
def _weights_of(metric: str):
    """Turns the many ways in which weights can be missing into one line."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a network that swallows packets must not stop a measurement for minutes
    try:
        yield
    except ImportError as error:
        package = "torch-fidelity" if "fidelity" in str(error).lower() else "torchmetrics"
        raise UsageError(f"{metric}: needs the package {package}: pip install 'neuralcodec[peers]'") from None
    except (OSError, RuntimeError) as error:
        where = Path(torch.hub.get_dir()) / "checkpoints"
        reason = getattr(error, "reason", None) or str(error).splitlines()[0]
        raise UsageError(f"{metric}: its weights cannot be loaded ({reason}); they belong into {where}") from None
    finally:
        socket.setdefaulttimeout(before)


@cache
def _lpips() -> Any:
    with _weights_of("lpips"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex").eval()


def lpips(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float:
    """LPIPS 0.1, AlexNet (Zhang et al. 2018), lower is better. UsageError where its weights cannot be had."""
    with torch.inference_mode():
        value = _lpips()(_batch(a, peak) * 2 - 1, _batch(b, peak) * 2 - 1)
    _lpips().reset()  # it would keep a running mean
    return float(value)


@cache
def _dists() -> Any:
    with _weights_of("dists"):
        from torchmetrics.image.dists import DeepImageStructureAndTextureSimilarity

        metric = DeepImageStructureAndTextureSimilarity().eval()
        metric(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))  # it loads its weights only now
        metric.reset()
        return metric


def dists(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float:
    """DISTS, VGG16 (Ding et al. 2020), lower is better. UsageError where its weights cannot be had."""
    with torch.inference_mode():
        value = _dists()(_batch(a, peak), _batch(b, peak))
    _dists().reset()
    return float(value)


@cache
def squeezenet(path: str) -> torch.nn.Module:
    """The convolutions of SqueezeNet 1.1 with the Caffe release's weights. UsageError when the file does not hold them.

    ``path``: safetensors with torchvision's names, input BGR 0..255 less ``MEAN_BGR``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torchvision.models import squeezenet1_1

    net = squeezenet1_1(weights=None)
    try:
        net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"feature_distance: {path}: {str(error).splitlines()[0]}") from None
    return net.features.eval().requires_grad_(False)


def feature_distance(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float:
    """Distance of SqueezeNet 1.1's features, 0 for equal pictures; needs no network, lower is better.

    At each of ``TAPS`` the features are scaled to length 1 at every position (as Zhang et al. 2018 do) and the squared
    difference is averaged over positions and summed over channels; the distance is the mean of the taps. There
    are no learned channel weights: this is NOT LPIPS and must not be reported under that name. The weights file is
    named by $NEURALCODEC_SQUEEZENET. UsageError without it. """
    path = os.environ.get(SQUEEZENET)
    if not path:
        raise UsageError(f"feature_distance: {SQUEEZENET} (or --squeezenet) must name the weights of SqueezeNet 1.1")
    net = squeezenet(path)
    x = torch.cat([_batch(a, peak), _batch(b, peak)]).flip(1) * 255 - torch.tensor(MEAN_BGR).view(1, 3, 1, 1)
    total = []
    with torch.inference_mode():
        for index, layer in enumerate(net[: TAPS[-1] + 1]):
            x = layer(x)
            if index in TAPS:
                unit = x / x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)
                total.append(float((unit[:1] - unit[1:]).square().sum(1).mean()))
    return float(np.mean(total))


def patches(pixels: np.ndarray, side: int = PATCH, limit: int = PER_FILE) -> Tensor:
    """Patches (n, 3, side, side) uint8 of a picture in a regular grid without overlap, at most ``limit``, spread evenly.

    A picture smaller than a patch gives none."""
    h, w = (n // side for n in pixels.shape[:2])
    cut = pixels[: h * side, : w * side].reshape(h, side, w, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    chosen = np.unique(np.linspace(0, len(cut) - 1, min(limit, len(cut))).astype(int)) if len(cut) else []
    return torch.from_numpy(np.ascontiguousarray(cut[chosen]))


def patch_distances(pairs: Iterable[tuple[np.ndarray, np.ndarray]], which: Iterable[str] = ("fid", "kid"), *,
                    side: int = PATCH, feature: Any = 2048) -> dict[str, float]:  # fmt: skip
    """FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) between the patches of originals and of decoded pictures.

    ``feature`` is torchmetrics': the width of InceptionV3's features, or a network of one's own. KID takes subsets of
    at most 50 patches. Biased for few patches, so only comparable at equal sets. UsageError without weights or with
    fewer than two patches. """
    made: dict[str, Any] = {}
    with _weights_of("fid and kid"):
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        kinds: dict[str, Callable] = {"fid": FrechetInceptionDistance, "kid": KernelInceptionDistance}
        made = {name: kinds[name](feature=feature) for name in which}
    count = 0
    for original, decoded in pairs:
        real, fake = patches(original, side), patches(decoded, side)
        count += len(real)
        for metric in made.values() if len(real) else ():
            metric.update(real, real=True)
            metric.update(fake, real=False)
    if count < 2:
        raise UsageError(f"fid and kid need at least two patches of {side} pixels a side; there are {count}")
    results = {}
    for name, metric in made.items():
        if name == "kid":
            metric.subset_size = min(50, count)
            torch.manual_seed(0)  # it draws its subsets
        value = metric.compute()
        results[name] = float(value[0] if name == "kid" else value)
    return results
