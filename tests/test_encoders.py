"""Encoders: sizes, matching, cameras, and weights published for FlowNet-S."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convlstm_vo.models.config import ModelError
from convlstm_vo.models.correlation import correlate, expected_displacement
from convlstm_vo.models.encoders import ENCODERS, CorrelationEncoder, FlowNetS, load_flownet_weights
from convlstm_vo.models.heads import AttentionHead, LinearHead

SMALL = (2, 3, 4, 5, 6, 7)
INTRINSICS = torch.tensor([[100.0, 100.0, 40.0, 20.0]])


def small_flownets(**options) -> FlowNetS:
    return FlowNetS(3, SMALL, **options)


def clip_of(channels: int, *, time: int = 2, height: int = 70, width: int = 129, seed: int = 0) -> Tensor:
    return torch.randn(1, time + 1, channels, height, width, generator=torch.Generator().manual_seed(seed))


def published_file(path: Path, encoder: FlowNetS, *, prefix: str = "", drop: str = "") -> Path:
    """A file as FlowNetPytorch writes it: the contracting layers and some that come after them."""
    state = {prefix + name: torch.randn_like(tensor.float()) for name, tensor in encoder.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not drop or drop not in name}
    state[f"{prefix}predict_flow6.weight"] = torch.randn(2, 8, 3, 3)
    torch.save({"epoch": 1, "arch": "flownets", "best_EPE": 2.459, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("same_padding", [False, True])
@pytest.mark.parametrize("size", [(64, 128), (70, 129), (1, 65), (184, 608)])
def test_flownets_output_shape_is_predicted(size: tuple[int, int], same_padding: bool) -> None:
    encoder = small_flownets(same_padding=same_padding)
    features = encoder(clip_of(3, height=size[0], width=size[1]), INTRINSICS)
    assert features.shape == (1, 2, *encoder.output_shape(*size))


def test_flownets_of_the_original_has_its_sizes() -> None:
    with torch.device("meta"):
        encoder = FlowNetS(3, (64, 128, 256, 512, 512, 1024))
    assert encoder.output_shape(384, 1280) == (1024, 6, 20)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 14_612_544


def test_same_padding_is_that_of_tensorflow() -> None:
    """With stride 2, an even size and a 7x7 kernel: 2 before, 3 after, so that output i is centred on 2i + 1."""
    encoder = small_flownets(same_padding=True)
    conv = encoder.conv1[0]
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 3, 3] = 1
        conv.bias.zero_()
    x = torch.arange(8.0).expand(1, 6, 8, 8)
    torch.testing.assert_close(conv(x)[0, 0, 0], torch.tensor([1.0, 3.0, 5.0, 7.0]))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_flownets_pairs_neighbours(batch_norm: bool) -> None:
    encoder = small_flownets(batch_norm=batch_norm, activation="leaky_relu", dropout=(0.2,)).eval()
    clip = clip_of(3, time=3)
    features = encoder(clip, INTRINSICS)
    for t in range(3):
        torch.testing.assert_close(encoder(clip[:, t : t + 2], INTRINSICS)[:, 0], features[:, t])


def test_last_activation_is_an_option() -> None:
    clip = clip_of(3)
    assert small_flownets(activate_last=True)(clip, INTRINSICS).min() >= 0
    assert small_flownets(activate_last=False)(clip, INTRINSICS).min() < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (1, 2)}, "6 numbers"),
        ({"channels": SMALL, "dropout": (0.1, 0.2)}, "none, one or 9"),
        ({"channels": SMALL, "activation": "gelu"}, "unknown activation 'gelu'"),
    ],
)
def test_impossible_flownets_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        FlowNetS(3, **options)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_load(tmp_path: Path, batch_norm: bool, prefix: str) -> None:
    encoder = small_flownets(batch_norm=batch_norm)
    path = published_file(tmp_path / "flownets.pth.tar", encoder, prefix=prefix)
    load_flownet_weights(encoder, path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, saved[prefix + name].to(tensor.dtype), rtol=0, atol=0)


def test_old_files_without_batch_counts_load(tmp_path: Path) -> None:
    encoder = small_flownets(batch_norm=True)
    path = published_file(tmp_path / "old.pth.tar", encoder, drop="num_batches_tracked")
    load_flownet_weights(encoder, path)
    assert encoder.conv1[1].num_batches_tracked == 0


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    with_norm = published_file(tmp_path / "bn.pth", small_flownets(batch_norm=True))
    without = published_file(tmp_path / "plain.pth", small_flownets())
    short = published_file(tmp_path / "short.pth", small_flownets(), drop="conv4_1.0.weight")
    with pytest.raises(ModelError, match=r"bn.pth: weights with batch norm.*set batch_norm=True"):
        load_flownet_weights(small_flownets(), with_norm)
    with pytest.raises(ModelError, match=r"plain.pth: weights without batch norm.*set batch_norm=False"):
        load_flownet_weights(small_flownets(batch_norm=True), without)
    with pytest.raises(ModelError, match=r"short.pth: no 'conv4_1.0.weight'"):
        load_flownet_weights(small_flownets(), short)
    with pytest.raises(ModelError, match=r"'conv1.0.weight' has shape \(2, 6, 7, 7\).*image_channels=3"):
        load_flownet_weights(FlowNetS(1, SMALL), without)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    encoder = small_flownets()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    whole = published_file(tmp_path / "whole.pth", encoder).read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in {
        "short.pth": "damaged",
        "empty.pth": "damaged",
        "text.pth": "damaged",
        "list.pth": "no 'state_dict'",
        "missing.pth": "no such file",
    }.items():
        with pytest.raises(ModelError, match=rf"{name}: .*{message}"):
            load_flownet_weights(encoder, tmp_path / name)
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(8, 8), (6, 20), (9, 17), (1, 3)])
@pytest.mark.parametrize("radius", [1, 3])
def test_correlation_is_the_product_at_each_displacement(size: tuple[int, int], radius: int) -> None:
    prev, curr = torch.randn(2, 2, 5, *size)
    padded = F.pad(curr, [radius] * 4)
    expected = [
        (prev * padded[:, :, y : y + size[0], x : x + size[1]]).sum(1)
        for y in range(2 * radius + 1)
        for x in range(2 * radius + 1)
    ]
    torch.testing.assert_close(correlate(prev, curr, radius), torch.stack(expected, 1))


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (2, -1), (-3, 3)])
def test_expected_displacement_finds_a_shift(dx: int, dy: int) -> None:
    prev = F.normalize(torch.randn(1, 64, 16, 24))
    curr = prev.roll((dy, dx), (2, 3))
    flow, confidence = expected_displacement(correlate(prev, curr, 3), torch.tensor(100.0))
    inside = flow[0, :, 4:-4, 4:-4]
    torch.testing.assert_close(inside, torch.tensor([dx, dy])[:, None, None].expand_as(inside).float())
    assert confidence[0, :, 4:-4, 4:-4].min() > 0.99


def test_correlation_encoder_output_shape_is_predicted() -> None:
    encoder = CorrelationEncoder(1, (4, 6, 8, 8, 10), radius=2)
    for height, width in [(96, 320), (100, 131), (33, 64)]:
        clip = clip_of(1, height=height, width=width)
        assert encoder(clip, INTRINSICS).shape == (1, 2, *encoder.output_shape(height, width))


def test_correlation_encoder_sees_the_camera() -> None:
    encoder, clip = CorrelationEncoder(1, (4, 6, 8, 8, 10)), clip_of(1)
    assert (encoder(clip, INTRINSICS) - encoder(clip, INTRINSICS * 1.3)).abs().max() > 1e-4


def test_correlation_encoder_pairs_neighbours() -> None:
    encoder, clip = CorrelationEncoder(1, (4, 6, 8, 8, 10)), clip_of(1, time=3)
    features = encoder(clip, INTRINSICS)
    for t in range(3):
        torch.testing.assert_close(encoder(clip[:, t : t + 2], INTRINSICS)[:, 0], features[:, t])


def test_correlation_encoder_wants_five_channel_numbers() -> None:
    with pytest.raises(ModelError, match="5 numbers"):
        CorrelationEncoder(1, (4, 6))


def test_attention_head_takes_any_size_and_linear_head_does_not() -> None:
    head = AttentionHead(5, 16)
    assert head(torch.randn(2, 5, 3, 4)).shape == head(torch.randn(2, 5, 7, 1)).shape == (2, 6)
    with pytest.raises(ModelError, match=r"\(5, 3, 5\).*built for \(5, 3, 4\)"):
        LinearHead((5, 3, 4))(torch.randn(2, 5, 3, 5))
    with pytest.raises(ModelError, match="multiple of 8"):
        AttentionHead(5, 12)


def test_every_encoder_is_registered() -> None:
    assert set(ENCODERS) == {"flownets", "correlation"}


def test_gradient_of_the_correlation() -> None:
    prev, curr = (torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: correlate(a, b, 2), (prev, curr), fast_mode=True)


def test_descriptors_do_not_see_a_uniform_image() -> None:
    encoder = CorrelationEncoder(1, (4, 6, 8, 8, 10))
    assert encoder.descriptors(torch.ones(1, 6, 9, 9))[:, :, 1:-1, 1:-1].abs().max() < 1e-6
