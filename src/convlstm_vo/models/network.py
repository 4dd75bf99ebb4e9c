"""The whole network: frames → encoder → recurrent cell → head → motions.

One network trains on clips, streams frame by frame and exports: `OdometryNet.step` is `OdometryNet.forward` on a
clip of two frames, and the state travels through arguments and results only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from convlstm_vo.models.cells import CELLS, State
from convlstm_vo.models.config import ModelConfig, ModelError, choose
from convlstm_vo.models.encoders import ENCODERS
from convlstm_vo.models.heads import HEADS


class OdometryNet(nn.Module):
    """Camera motion from consecutive frames.

    Args:
        config: what to build; see `convlstm_vo.models.config.PRESETS`.
        seed: of the initial weights; without one they come from torch's global generator.

    Raises:
        ModelError: parts that are unknown or do not fit each other.
    """

    motion_scale: Tensor

    def __init__(self, config: ModelConfig, *, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        with seeded(seed):
            self.encoder = choose(ENCODERS, config.encoder, "encoder").from_config(config)
            features = self.encoder.output_shape(config.image_height, config.image_width)
            self.cell = choose(CELLS, config.cell, "cell").from_config(config, features)
            outputs = self.cell.output_shape(features)
            if config.head_sees_features:
                outputs = self._with_features(outputs, features)
            self.head = choose(HEADS, config.head, "head").from_config(config, outputs)
        self.register_buffer("motion_scale", torch.tensor(config.motion_scale), persistent=False)

    def forward(self, clip: Tensor, intrinsics: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Motions between the neighbours of a clip.

        Args:
            clip: frames of values 0..255, uint8 or floating point, (batch, time + 1, channels, height, width).
            intrinsics: fx, fy, cx, cy in pixels of these frames, (batch, 4).
            state: what the last call returned, to carry memory on; None to start afresh.

        Returns:
            Motions (batch, time, 6): ``T_prev_curr`` as translation x, y, z in metres and rotation vector in
            radians; and the state after the last of them.

        Raises:
            ModelError: frames of another shape than the network takes.
        """
        frames = self._normalise(clip)  # (batch, time + 1, channels, height, width)
        features = self.encoder(frames, intrinsics)  # (batch, time, features, height / s, width / s)
        state = self.cell.zero_state(features[:, 0]) if state is None else state
        outputs = []
        for x in features.unbind(1):
            output, state = self.cell(x, state)  # (batch, hidden, ...)
            outputs.append(torch.cat([output, x], 1) if self.config.head_sees_features else output)
        motions = self._motion(torch.stack(outputs, 1).flatten(0, 1))  # (batch * time, 6)
        return motions.unflatten(0, (clip.shape[0], -1)), state

    def step(self, pair: Tensor, intrinsics: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The motion between two frames.

        Args:
            pair: previous and current frame, (batch, 2, channels, height, width), as in `forward`.
            intrinsics: fx, fy, cx, cy in pixels of these frames, (batch, 4).
            state: what the last step returned; None to start afresh.

        Returns:
            The motion ``T_prev_curr`` (batch, 6), as in `forward`, and the new state.
        """
        motions, state = self(pair, intrinsics, state)
        return motions[:, 0], state

    def initial_state(self, batch: int) -> State:
        """The state before the first frame, for frames of the configured size: zeros on the network's device."""
        shape = self.encoder.output_shape(self.config.image_height, self.config.image_width)
        parameter = next(self.parameters())
        return self.cell.zero_state(parameter.new_zeros(()).expand(batch, *shape))

    def _with_features(self, output: tuple[int, ...], features: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the cell's output and the encoder's features side by side."""
        if output[1:] != features[1:]:
            raise ModelError(
                f"head_sees_features needs a cell that keeps the feature map, but cell={self.config.cell} gives a "
                "vector: set head_sees_features=False"
            )
        return (output[0] + features[0], *output[1:])

    def _normalise(self, clip: Tensor) -> Tensor:
        """Frames as floating point numbers around zero; gray frames are repeated where RGB is wanted."""
        self._check(clip)
        frames = clip.to(next(self.parameters()).dtype)
        # On the sum's own type: a mean of 10^5 values is beyond bfloat16.
        mean = frames.float().mean((2, 3, 4), keepdim=True) if self.config.center_frames else self.config.pixel_mean
        frames = ((frames - mean) / self.config.pixel_std).to(frames.dtype)
        return frames.expand(-1, -1, self.config.image_channels, -1, -1)

    def _check(self, clip: Tensor) -> None:
        expected = self.config.image_channels
        if clip.dim() != 5 or clip.shape[1] < 2:
            raise ModelError(
                f"frames of shape {tuple(clip.shape)}, but a clip is (batch, time + 1, channels, height, width) "
                "with at least two frames"
            )
        if clip.shape[2] not in (1, expected):
            raise ModelError(
                f"frames with {clip.shape[2]} channels, but the network was built for image_channels={expected}: "
                "convert them to gray"
                if expected == 1
                else "give RGB or gray frames"
            )

    def _motion(self, outputs: Tensor) -> Tensor:
        """Motions (rows, 6) of the cell's outputs (rows, hidden, ...), in full precision also under autocast."""
        with _full_precision(outputs.device.type):
            return self.head(outputs.to(next(self.head.parameters()).dtype)).to(outputs.dtype) * self.motion_scale


def reset_state(state: State, fresh: Tensor) -> State:
    """Forget the past of some rows of a batch, e.g. where a new sequence begins.

    Args:
        state: tensors (batch, ...).
        fresh: True where a row starts afresh, (batch,).

    Returns:
        The state with those rows zero; differentiable.
    """
    return tuple(part.masked_fill(fresh.reshape(-1, *[1] * (part.dim() - 1)), 0) for part in state)


def detach_state(state: State) -> State:
    """The same state without its history: where truncated back-propagation through time cuts."""
    return tuple(part.detach() for part in state)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Weights from a seed, leaving torch's global generator as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """No autocast: bfloat16's three digits are too few for a motion. (No context at all while exporting.)"""
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield
