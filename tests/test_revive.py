"""Dead hidden channels of residual blocks: found, revived, and able to learn again."""

from __future__ import annotations

import torch
from contract import as_tensor, photo
from neuralcodec.codecs import registry
from neuralcodec.train.revive import activity, dead_share, revive


def killed():
    """An untrained codec whose block at H/8 of the analysis passes nothing, and pictures."""
    torch.manual_seed(0)
    codec = registry.codec_class("hyperprior").from_preset("test").eval()
    with torch.no_grad():
        codec.g_a.at8[0].a.bias.fill_(-100)
        codec.g_s.at4[0].a.bias[:4] = -100
    return codec, as_tensor(photo())[:, :, :128, :128].repeat(2, 1, 1, 1), torch.tensor([200.0, 700.0])


def test_what_is_dead_learns_again():
    codec, x, level = killed()
    before = codec.g_s(codec.g_a(x, level).round(), level)
    share = dead_share(codec, x, level)
    counts = revive(codec, x, level)
    assert counts["g_a.at8.0"] == (16, 16) and counts["g_s.at4.0"][0] >= 4
    dead, channels = (sum(n) for n in zip(*counts.values()))
    assert share == dead / channels
    assert torch.equal(codec.g_s(codec.g_a(x, level).round(), level), before)  # it computes what it did
    assert dead_share(codec, x, level) == 0
    active, _ = activity(codec, x, level)["g_a.at8.0"]
    assert active.min() > 0.2 and active.max() < 0.8
    codec.g_a(x, level).square().mean().backward()
    assert (codec.g_a.at8[0].b.weight.grad.flatten(2).abs().amax((0, 2)) > 0).all()


def test_what_lives_is_left_alone():
    codec, x, level = killed()
    state = {k: v.clone() for k, v in codec.state_dict().items()}
    counts = revive(codec, x, level)
    alive = [name for name, (dead, _) in counts.items() if not dead]
    assert alive
    for name, value in codec.state_dict().items():
        if not name.startswith(tuple(f"{block}." for block in counts if block not in alive)):
            assert torch.equal(value, state[name]), name
    kept = codec.g_s.at4[0].a.weight[4:]
    assert torch.equal(kept, state["g_s.at4.0.a.weight"][4:])
