"""Smaller nets out of trained ones: what is left stands in for what goes, as far as it can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import as_tensor, photo
from neuralcodec.codecs.base import count_parameters
from neuralcodec.codecs.hyperprior import Hyperprior
from neuralcodec.nn.blocks import NormedBlock
from neuralcodec.train.loop import transfer
from neuralcodec.train.prune import drop, narrow, thin


@pytest.fixture
def large():
    """A codec of normed blocks that do something, and pictures."""
    torch.manual_seed(0)
    codec = Hyperprior(replace(Hyperprior.presets["test"], encoder_blocks=(2, 2, 0), kinds=("nnn", "nnn"))).eval()
    with torch.no_grad():
        for block in codec.modules():
            if isinstance(block, NormedBlock):
                block.scale.fill_(0.3)
    return codec, as_tensor(photo())[:, :, :128, :128].repeat(3, 1, 1, 1), torch.tensor([100.0, 500.0, 900.0])


def test_channels_that_others_make_up_for_go_first(large):
    """Copies, scaled or not, and channels that are never read cost nothing."""
    codec, x, level = large
    block = codec.g_a.at4[0]
    with torch.no_grad():
        block.a.weight[5], block.a.bias[5] = block.a.weight[2], block.a.bias[2]
        block.a.weight[9], block.a.bias[9] = 3 * block.a.weight[7], 3 * block.a.bias[7]
        block.b.weight[:, 11] = 0
        at = codec.g_a.patch(x - 0.5)
        before = block(at)
        lost = thin(block, [at], 13)
        assert lost < 1e-3 and block.a.out_channels == block.b.in_channels == 13
        assert torch.allclose(block(at), before, atol=2e-3 * float((before - at).abs().max()))


def test_least_squares_beats_leaving_out(large):
    codec, x, level = large
    block = codec.g_a.at4[0]
    with torch.no_grad():
        at = codec.g_a.patch(x - 0.5)
        wanted = block(at)
        crude = NormedBlock(16, 8)
        crude.load_state_dict({k: v[:, :8] if k == "b.weight" else v[:8] if k.startswith("a.") else v
                               for k, v in block.state_dict().items()})
        share = thin(block, [at], 8)
        energy = (wanted - at - (wanted - at).mean((0, 2, 3), keepdim=True)).square().sum()
        error = (block(at) - wanted).square().sum()
        assert 0 < share < 1 and float(error / energy) == pytest.approx(share, rel=0.1)
        assert error < 0.5 * (crude(at) - wanted).square().sum()


def test_the_result_fits_a_smaller_codec(large):
    codec, x, level = large
    blocks = list(codec.g_a.at8)
    drop(codec, ["g_a.at8.0"])
    assert codec.g_a.at8[0] is blocks[1] and len(codec.g_a.at8) == 2
    lost = narrow(codec, {"g_a.at4": 12, "g_s.at8": 8}, x, level, batch=2)
    assert set(lost) == {"g_a.at4.0", "g_a.at4.1", "g_s.at8.0"}
    small = Hyperprior(replace(codec.config, encoder_blocks=(2, 1, 0), hidden=((12, 0, 0), (0, 8, 0)))).eval()
    assert transfer(small, codec.state_dict()) == set()
    assert torch.equal(small.g_a(x, level), codec.g_a(x, level))
    y = codec.g_a(x, level).round()
    assert torch.equal(small.g_s(y, level), codec.g_s(y, level))
    assert count_parameters(small) == count_parameters(codec)


def test_only_normed_blocks_are_taken_out(large):
    codec, *_ = large
    with pytest.raises(ValueError, match="g_a.at8.2: is no normed block"):
        drop(codec, ["g_a.at8.2"])


def test_blocks_of_another_width_rest(large):
    """Without pruning nothing of a wider block fits: it is left out whole, not by the tensors whose shapes happen to agree."""
    codec, x, level = large
    small = Hyperprior(replace(codec.config, hidden=((12, 0, 0), (0, 8, 0)))).eval()
    transfer(small, codec.state_dict())
    assert all(not block.scale.any() for block in [*small.g_a.at4[:2], small.g_s.at8[0]])
    with torch.no_grad():
        for block in [*codec.g_a.at4[:2], codec.g_s.at8[0]]:
            block.scale.zero_()
    assert torch.equal(small.g_a(x, level), codec.g_a(x, level))
    y = codec.g_a(x, level).round()
    assert torch.equal(small.g_s(y, level), codec.g_s(y, level))
