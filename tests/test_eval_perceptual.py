"""Metrics through networks: the offline feature distance, and what is said where weights are missing."""

from __future__ import annotations

import urllib.error

import numpy as np
import pytest
import torch
from conftest import scene
from neuralcodec.container.errors import UsageError
from neuralcodec.eval import perceptual, run
from neuralcodec.eval.kinds import KINDS
from neuralcodec.eval.metrics import METRICS


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A SqueezeNet of random weights, in the layout that is documented."""
    models = pytest.importorskip("torchvision.models")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file({k: v.half() for k, v in models.squeezenet1_1(weights=None).state_dict().items()}, path)
    return str(path)


def test_feature_distance_grows_with_the_damage(weights, monkeypatch):
    monkeypatch.setenv(perceptual.SQUEEZENET, weights)
    a = scene(96, 128)
    rng = np.random.default_rng(0)
    noisy = [np.clip(a + rng.normal(0, s, a.shape), 0, 255).astype(np.uint8) for s in (3, 12, 40)]
    values = [METRICS["feature_distance"](a, b, 255) for b in (a, *noisy)]
    assert values[0] == 0 and values == sorted(values) and values[1] > 0
    assert METRICS["feature_distance"](noisy[0], a, 255) == pytest.approx(values[1], rel=1e-5)


def test_feature_distance_reads_bgr_in_the_caffe_range(weights, monkeypatch):
    monkeypatch.setenv(perceptual.SQUEEZENET, weights)
    seen = []
    hook = perceptual.squeezenet(weights)[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[..., 0] = 255  # red
    perceptual.feature_distance(picture, picture)
    hook.remove()
    assert seen[0][0, :, 0, 0].tolist() == [-104, -117, 132]


def test_missing_or_wrong_weights_are_one_line(tmp_path, monkeypatch, weights):
    a = scene(64, 64)
    monkeypatch.delenv(perceptual.SQUEEZENET, raising=False)
    with pytest.raises(UsageError, match="NEURALCODEC_SQUEEZENET"):
        perceptual.feature_distance(a, a)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for path in (tmp_path / "x.safetensors", tmp_path / "none.safetensors"):
        monkeypatch.setenv(perceptual.SQUEEZENET, str(path))
        with pytest.raises(UsageError, match=f"feature_distance: {path}"):
            perceptual.feature_distance(a, a)


@pytest.mark.parametrize("name", ["lpips", "dists"])
def test_without_a_network_the_missing_weights_are_named(name, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    pytest.importorskip("torchvision")

    def offline(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    getattr(perceptual, f"_{name}").cache_clear()
    a = scene(64, 64)
    with pytest.raises(UsageError, match=f"{name}: its weights cannot be loaded .no network here.*{tmp_path}"):
        getattr(perceptual, name)(a, a)


def test_an_unusable_metric_is_listed_once_and_left_out(monkeypatch):
    monkeypatch.delenv(perceptual.SQUEEZENET, raising=False)
    failures: list[str] = []
    assert run.usable(KINDS["image"], ["psnr", "feature_distance"], failures) == ("psnr",)
    assert len(failures) == 1 and "feature_distance" in failures[0]


class Pooled(torch.nn.Module):
    """Stands in for InceptionV3: mean colours of a 4x4 grid."""

    num_features = 48

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 4).flatten(1)


def test_patch_distances():
    pytest.importorskip("torchmetrics.image.fid")
    pytest.importorskip("torch_fidelity")
    a = [scene(128, 160, s) for s in range(4)]
    rng = np.random.default_rng(0)
    b = [np.clip(x * 0.7 + rng.normal(0, 20, x.shape), 0, 255).astype(np.uint8) for x in a]
    same = perceptual.patch_distances(zip(a, a), side=32, feature=Pooled())
    other = perceptual.patch_distances(zip(a, b), side=32, feature=Pooled())
    assert same["fid"] == pytest.approx(0, abs=0.5) and other["fid"] > 50 and other["kid"] > same["kid"]
    with pytest.raises(UsageError, match="at least two patches of 299"):
        perceptual.patch_distances(zip(a, a), feature=Pooled())


def test_patches_are_spread_evenly():
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[32:, 64:] = 200
    cut = perceptual.patches(picture, 32)
    assert cut.shape == (6, 3, 32, 32) and cut[5].float().mean() == 200 and cut[:5].sum() == 0
    assert perceptual.patches(picture, 32, limit=2).shape[0] == 2 and perceptual.patches(picture, 65).shape[0] == 0
