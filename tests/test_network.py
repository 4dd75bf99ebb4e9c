"""The whole network: clips and streams agree, memory matters, configurations, precision, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from convlstm_vo.models.config import PRESETS, ModelConfig, ModelError, preset
from convlstm_vo.models.network import OdometryNet, detach_state, reset_state

BATCH, TIME = 2, 3
# Every regressor, small enough for a test: the parts are the same, with fewer channels and pixels.
_FLOWNETS = {"image_height": 64, "image_width": 128, "encoder_channels": [4, 4, 6, 6, 8, 8]}
SMALL = {
    "ascend": {**_FLOWNETS, "image_height": 128, "hidden_channels": 3},
    "kallaf": {**_FLOWNETS, "hidden_channels": 10},
    "deepvo": {**_FLOWNETS, "hidden_channels": 10},
    "tiny": {"image_height": 48, "image_width": 96},
}
every_preset = pytest.mark.parametrize("name", SMALL)  # the default network: test_geometric.py


def small_net(name: str, **changes) -> OdometryNet:
    return OdometryNet(preset(name, **{**SMALL[name], **changes}), seed=1).eval()


def clip_for(net: OdometryNet, *, time: int = TIME, seed: int = 0, **size: int) -> Tensor:
    config = net.config
    height, width = size.get("height", config.image_height), size.get("width", config.image_width)
    shape = (BATCH, time + 1, size.get("channels", config.image_channels), height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def camera(net: OdometryNet) -> Tensor:
    height, width = net.config.image_height, net.config.image_width
    return torch.tensor([0.6 * width, 0.6 * width, width / 2, height / 2]).expand(BATCH, 4)


def stream(net: OdometryNet, clip: Tensor, *, carry: bool = True) -> Tensor:
    """Motions (batch, time, 6), one step after the other."""
    state, motions = None, []
    for t in range(clip.shape[1] - 1):
        motion, state = net.step(clip[:, t : t + 2], camera(net), state if carry else None)
        motions.append(motion)
    return torch.stack(motions, 1)


@every_preset
def test_streaming_and_clips_give_the_same_numbers(name: str) -> None:
    net = small_net(name)
    clip = clip_for(net)
    motions, state = net(clip, camera(net))
    assert motions.shape == (BATCH, TIME, 6)
    assert motions.dtype == torch.float32
    scale = motions.abs().max()
    torch.testing.assert_close(stream(net, clip) / scale, motions / scale, atol=1e-5, rtol=0)
    first, middle = net(clip[:, :2], camera(net))
    rest, last = net(clip[:, 1:], camera(net), middle)
    torch.testing.assert_close(torch.cat([first, rest], 1) / scale, motions / scale, atol=1e-5, rtol=0)
    for part, other in zip(state, last, strict=True):
        torch.testing.assert_close(part, other, atol=1e-5, rtol=1e-5)


@every_preset
def test_memory_matters(name: str) -> None:
    net = small_net(name)
    clip = clip_for(net)
    carried, forgotten = stream(net, clip), stream(net, clip, carry=False)
    torch.testing.assert_close(carried[:, 0], forgotten[:, 0])
    assert (carried[:, 1:] != forgotten[:, 1:]).any(-1).all()


@every_preset
def test_initial_state_is_that_of_no_state(name: str) -> None:
    net = small_net(name)
    clip = clip_for(net, time=1)
    state = net.initial_state(BATCH)
    assert all((part == 0).all() and part.shape[0] == BATCH for part in state)
    given, _ = net(clip, camera(net), state)
    none, _ = net(clip, camera(net))
    torch.testing.assert_close(given, none, rtol=0, atol=0)


@every_preset
def test_every_parameter_learns(name: str) -> None:
    net = small_net(name).train()
    motions, _ = net(clip_for(net), camera(net))
    motions.square().sum().backward()
    still = [key for key, parameter in net.named_parameters() if not (parameter.grad != 0).any()]
    assert not still


@every_preset
def test_autocast_keeps_motions_and_state_in_float32(name: str) -> None:
    net = small_net(name)
    clip = clip_for(net)
    exact, _ = net(clip, camera(net))
    state = None
    for t in range(TIME):
        with torch.autocast("cpu", torch.bfloat16):
            motion, state = net.step(clip[:, t : t + 2], camera(net), state)
        assert {motion.dtype, *(part.dtype for part in state)} == {torch.float32}
    assert (motion - exact[:, -1]).abs().max() < 0.1 * exact.abs().max()


@every_preset
def test_bfloat16_weights_and_channels_last_stream(name: str) -> None:
    net = small_net(name)
    exact, _ = net(clip_for(net), camera(net))
    net = net.to(torch.bfloat16).to(memory_format=torch.channels_last)
    motions = stream(net, clip_for(net))
    assert (motions - exact).abs().max() < 0.1 * exact.abs().max()


@every_preset
def test_uint8_and_float_frames_are_the_same(name: str) -> None:
    net = small_net(name)
    clip = clip_for(net)
    torch.testing.assert_close(net(clip, camera(net))[0], net(clip.float(), camera(net))[0], rtol=0, atol=0)


@every_preset
def test_step_has_no_control_flow_on_data(name: str) -> None:
    net = small_net(name)
    pair, intrinsics, state = clip_for(net, time=1), camera(net), net.initial_state(BATCH)
    program = torch.export.export(_Step(net), (pair, intrinsics, state))
    expected, _ = net.step(pair, intrinsics, state)
    torch.testing.assert_close(program.module()(pair, intrinsics, state)[0], expected)


class _Step(torch.nn.Module):
    """`OdometryNet.step` as a forward, as exporters want it."""

    def __init__(self, net: OdometryNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, pair: Tensor, intrinsics: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple]:
        return self.net.step(pair, intrinsics, state)


def test_tiny_takes_any_size_and_any_camera() -> None:
    net = small_net("tiny")
    for height, width in [(48, 96), (64, 161), (37, 80)]:
        motions, _ = net(clip_for(net, height=height, width=width), camera(net))
        assert motions.shape == (BATCH, TIME, 6)
    clip = clip_for(net)
    assert (net(clip, camera(net))[0] != net(clip, 1.2 * camera(net))[0]).any()


def test_exposure_drops_out_of_centred_frames() -> None:
    net = small_net("tiny")
    clip = clip_for(net).float() / 2
    torch.testing.assert_close(net(clip, camera(net))[0], net(clip + 50, camera(net))[0], atol=1e-5, rtol=1e-3)


def test_gray_frames_are_repeated_for_a_network_of_colour() -> None:
    net = small_net("ascend")
    gray = clip_for(net, channels=1)
    repeated = gray.expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(net(gray, camera(net))[0], net(repeated, camera(net))[0])


@pytest.mark.parametrize(
    ("name", "millions"), [("ascend", 15.07), ("kallaf", 288.59), ("deepvo", 518.15), ("tiny", 0.39)]
)
def test_presets_have_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = OdometryNet(PRESETS[name])
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (OdometryNet(preset("tiny"), seed=seed) for seed in (1, 1, 2))
    assert (torch.random.get_rng_state() == before).all()
    weights = [net.encoder.features[0][0].weight for net in (first, same, other)]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()


def test_outputs_of_a_fresh_network_have_the_size_of_motions() -> None:
    net = OdometryNet(preset("tiny"), seed=0)
    motions, _ = net(clip_for(net), camera(net))
    assert motions[..., 3:].abs().max() < 0.1
    assert motions[..., :3].abs().max() < 3


def test_reset_state_forgets_rows_and_keeps_gradients() -> None:
    state = (torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, 4, 5))
    fresh = reset_state(state, torch.tensor([True, False, True]))
    for part in fresh:
        assert part.flatten(1).sum(1).tolist() == [0, part[0].numel(), 0]
    fresh[0].sum().backward()
    assert state[0].grad is not None
    assert state[0].grad.sum(1).tolist() == [0, 2, 0]
    assert not any(part.requires_grad for part in detach_state(fresh))


def test_reset_row_behaves_as_fresh() -> None:
    net = small_net("tiny")
    clip = clip_for(net)
    _, state = net(clip, camera(net))
    motions, _ = net(clip, camera(net), reset_state(state, torch.tensor([True, False])))
    fresh, _ = net(clip, camera(net))
    torch.testing.assert_close(motions[0], fresh[0])
    assert (motions[1] != fresh[1]).any()


@every_preset
def test_config_survives_json(name: str) -> None:
    config = preset(name, motion_scale=(1, 2, 3, 4, 5, 6))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_keys_take_their_defaults() -> None:
    assert ModelConfig.from_dict({"hidden_channels": 7}) == ModelConfig(hidden_channels=7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_channels": 7}, "unknown key 'hiden_channels'; did you mean 'hidden_channels'"),
        ({"hidden_channels": "many"}, "'hidden_channels' is 'many'"),
        ({"hidden_channels": 0}, "hidden_channels is 0, but must be at least 1"),
        ({"image_channels": 2}, "image_channels is 2"),
        ({"cell_kernel": 4}, "cell_kernel is 4, but must be odd"),
        ({"pixel_std": 0.0}, "pixel_std is 0.0"),
    ],
)
def test_impossible_configs_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_dict(values)
    with pytest.raises(ModelError, match=message):
        preset("tiny", **values)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match="unknown preset 'tinny'; the presets are ascend, kallaf, deepvo, tiny"):
        preset("tinny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "flownet"}, "unknown encoder 'flownet'; did you mean 'flownets'"),
        ({"cell": "transformer"}, "unknown cell 'transformer'; known: convlstm, convgru, lstm"),
        ({"head": "mlp"}, "unknown head 'mlp'"),
        ({"cell": "lstm"}, "head_sees_features needs a cell that keeps the feature map.*cell=lstm gives a vector"),
        (
            {"cell": "lstm", "head_sees_features": False},
            "head=attention needs a feature map, but cell=lstm gives a vector",
        ),
    ],
)
def test_impossible_networks_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        OdometryNet(preset("tiny", **changes))


@pytest.mark.parametrize(
    ("name", "message"),
    [("ascend", "peepholes are for 2x2"), ("kallaf", "LSTM was built for 16"), ("deepvo", "LSTM was built for 16")],
)
def test_networks_bound_to_a_size_say_so(name: str, message: str) -> None:
    net = small_net(name)
    with pytest.raises(ModelError, match=message):
        net(clip_for(net, height=192, width=192), camera(net))


def test_wrong_frames_are_refused() -> None:
    net = small_net("tiny")
    with pytest.raises(ModelError, match=r"3 channels.*image_channels=1.*convert them to gray"):
        net(clip_for(net, channels=3), camera(net))
    with pytest.raises(ModelError, match="at least two frames"):
        net(clip_for(net, time=0), camera(net))
    with pytest.raises(ModelError, match="a clip is"):
        net(torch.zeros(2, 1, 48, 96), camera(net))
