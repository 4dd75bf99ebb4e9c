"""What a network is built from: one frozen dataclass, and the presets that reproduce the field."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from convlstm_vo import config as plain
from convlstm_vo.errors import ConvlstmVoError


class ModelError(ConvlstmVoError):
    """A network that cannot be built, or input that it cannot take."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a network is built from; the fields are its command-line options and its ``config.json``.

    An option of one part is ignored by parts that do not have it: ``correlation_radius`` by the FlowNet-S encoder.
    """

    preset: str = "tiny"
    """The preset it came from: a name only; train's --preset chooses."""

    # Input: frames of 0..255 become (value - mean) / pixel_std.
    image_height: int = 96
    """Rows of a frame as the network sees it."""
    image_width: int = 320
    """Columns of a frame as the network sees it."""
    image_channels: int = 1
    """1 (gray) or 3 (RGB); gray frames are repeated to 3 where a network wants RGB."""
    center_frames: bool = True
    """Subtract each frame's own mean, so that exposure drops out; otherwise ``pixel_mean``."""
    pixel_mean: float = 0.0
    """What is subtracted from pixel values of 0..255 when frames are not centred."""
    pixel_std: float = 64.0
    """What pixel values are divided by."""

    # Encoder: frames to one feature map for each pair.
    encoder: str = "correlation"
    """A name in `convlstm_vo.models.encoders.ENCODERS`: flownets, correlation; or flow, of the default network."""
    encoder_channels: tuple[int, ...] = (16, 32, 48, 64, 96)
    """Channels of its stages; their number belongs to the encoder."""
    activation: str = "leaky_relu"
    """Between layers: relu, or leaky_relu of slope 0.1."""
    activate_last: bool = True
    """Whether an activation follows the encoder's last layer."""
    batch_norm: bool = False
    """Batch normalisation after each convolution (flownets)."""
    encoder_dropout: tuple[float, ...] = ()
    """Dropout after each convolution (flownets): none, one for all nine, or nine numbers."""
    same_padding: bool = False
    """Pad as TensorFlow's SAME does, for weights trained there (flownets); symmetric padding is faster."""
    correlation_radius: int = 4
    """Largest displacement that is looked for, in cells of 4 pixels (correlation)."""

    # Cell: memory.
    cell: str = "convlstm"
    """A name in `convlstm_vo.models.cells.CELLS`: convlstm, convgru, lstm."""
    hidden_channels: int = 48
    """Channels (or hidden size) of the state."""
    cell_kernel: int = 3
    """Kernel size of a convolutional cell; odd."""
    cell_layers: int = 1
    """Layers of an LSTM."""
    cell_dropout: float = 0.0
    """Dropout between the layers of an LSTM."""
    peepholes: bool = False
    """Gates that see the cell state (convlstm); binds the network to its image size."""
    layer_norm: bool = False
    """Layer normalisation inside a convolutional cell."""

    # Head: the cell's output to a motion.
    head: str = "attention"
    """A name in `convlstm_vo.models.heads.HEADS`: linear, attention; or solver, of the default network."""
    rotation: Literal["rotvec", "matrix"] = "rotvec"
    """What the head's numbers for the rotation are: a rotation vector, or a 3x3 matrix that is orthogonalised;
    use matrix for large rotations. The network's motions have a rotation vector either way. ONNX knows no SVD."""
    head_sees_features: bool = False
    """Whether the head sees the encoder's features beside the cell's output (convolutional cells)."""
    head_channels: int = 128
    """Hidden size of the head (attention)."""
    head_dropout: float = 0.0
    """Dropout before the head."""
    motion_scale: tuple[float, float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    """The head's six numbers are multiplied by these, to be of the size of real motions from the start."""

    # Geometric network.
    camera_height: float = 1.65
    """Metres of the camera above the road, which give the scale (encoder "flow"); KITTI's by default."""

    def __post_init__(self) -> None:
        if not 0 < self.camera_height < float("inf"):
            raise ModelError(f"camera_height is {self.camera_height}, but must be positive metres above the road")
        if self.image_channels not in (1, 3):
            raise ModelError(f"image_channels is {self.image_channels}, but must be 1 (gray) or 3 (RGB)")
        if self.cell_kernel < 1 or self.cell_kernel % 2 == 0:
            raise ModelError(
                f"cell_kernel is {self.cell_kernel}, but must be odd and positive, to keep the size of a state"
            )
        if not 0 < self.pixel_std < math.inf:
            raise ModelError(f"pixel_std is {self.pixel_std}, but must be positive")
        sizes = ("image_height", "image_width", "hidden_channels", "cell_layers", "head_channels")
        for key in (*sizes, "correlation_radius"):
            if getattr(self, key) < 1:
                raise ModelError(f"{key} is {getattr(self, key)}, but must be at least 1")
        if min(self.encoder_channels, default=1) < 1:
            raise ModelError(f"encoder_channels is {self.encoder_channels}, but each must be at least 1")
        if self.rotation == "matrix" and 0.0 in self.motion_scale[3:]:
            raise ModelError(f"motion_scale is {self.motion_scale}, but rotation=matrix needs angles other than 0")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return plain.to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "model config") -> ModelConfig:
        """The configuration that `to_dict` wrote; missing keys take their defaults.

        Raises:
            ModelError: an unknown key (the nearest known one is named) or a value of another type.
        """
        try:
            return plain.update(cls(), dict(values), source)
        except plain.ConfigError as error:
            raise ModelError(str(error)) from None


# The convolutions of FlowNet-S up to conv6 (Dosovitskiy et al. 2015, https://arxiv.org/abs/1504.06852): channels
# of conv1, conv2, conv3 = conv3_1, conv4 = conv4_1, conv5 = conv5_1, conv6.
_FLOWNETS_CHANNELS = (64, 128, 256, 512, 512, 1024)

_ASCEND = ModelConfig(
    preset="ascend",  # Ascend model zoo, ConvLSTM_ID2358
    image_height=384,
    image_width=1280,
    image_channels=3,
    center_frames=True,
    pixel_std=255.0,
    encoder="flownets",
    encoder_channels=_FLOWNETS_CHANNELS,
    activation="relu",
    activate_last=False,
    cell="convlstm",
    hidden_channels=12,
    peepholes=True,
    layer_norm=True,
    head="linear",
)

PRESETS: dict[str, ModelConfig] = {
    "ascend": _ASCEND,
    # https://github.com/Kallaf/Visual-Odometry: the same encoder, two LSTM layers of 550.
    "kallaf": dataclasses.replace(
        _ASCEND, preset="kallaf", cell="lstm", hidden_channels=550, cell_layers=2, peepholes=False, layer_norm=False
    ),
    # DeepVO (Wang et al. 2017, https://arxiv.org/abs/1709.08429) with the batch normalisation, dropout and pixel
    # statistics of its most used implementation, https://github.com/ChiWeiHsiao/DeepVO-pytorch.
    "deepvo": dataclasses.replace(
        _ASCEND,
        preset="deepvo",
        center_frames=False,
        pixel_mean=91.5,
        pixel_std=81.0,
        activation="leaky_relu",
        activate_last=True,
        batch_norm=True,
        encoder_dropout=(0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.5),
        cell="lstm",
        hidden_channels=1000,
        cell_layers=2,
        peepholes=False,
        layer_norm=False,
        head_dropout=0.5,
    ),
    # Ours: small enough to learn on a CPU in minutes. A car at 10 Hz moves about a metre and turns about 0.02 rad.
    "tiny": ModelConfig(preset="tiny", head_sees_features=True, motion_scale=(0.1, 0.1, 1.0, 0.01, 0.03, 0.01)),
    # Ours: a learned flow, a ConvLSTM that weighs it, a differentiable solver (`geometric.py`).
    "geometric": ModelConfig(
        preset="geometric", image_height=192, image_width=640, encoder="flow", encoder_channels=(), head="solver"
    ),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """A preset by name, with some of its fields changed.

    Raises:
        ModelError: an unknown preset or field, or a value that no network takes.
    """
    if name not in PRESETS:
        raise ModelError(f"unknown preset '{name}'; the presets are {', '.join(PRESETS)}")
    try:
        return plain.update(PRESETS[name], changes, f"preset {name}")
    except plain.ConfigError as error:
        raise ModelError(str(error)) from None


def choose(registry: Mapping[str, Any], name: str, kind: str) -> Any:
    """The entry of a registry of parts.

    Raises:
        ModelError: an unknown name; the nearest one, or all, are named.
    """
    if name in registry:
        return registry[name]
    close = difflib.get_close_matches(name, registry, n=1)
    hint = f"did you mean '{close[0]}'? Known: " if close else "known: "
    raise ModelError(f"unknown {kind} '{name}'; {hint}{', '.join(registry)}")
