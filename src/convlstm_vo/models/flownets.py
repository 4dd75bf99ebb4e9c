"""The FlowNet-S encoder, and the weights that are published for it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo.models.config import ModelConfig, ModelError

_LEAK = 0.1


def activation_layer(name: str) -> nn.Module:
    """The layer of an activation's name."""
    if name == "relu":
        return nn.ReLU()
    if name == "leaky_relu":
        return nn.LeakyReLU(_LEAK)
    raise ModelError(f"unknown activation '{name}'; known: relu, leaky_relu")


def kaiming(conv: nn.Conv2d, activation: str) -> None:
    """He et al. 2015, https://arxiv.org/abs/1502.01852, for the activation that follows; biases at zero."""
    nn.init.kaiming_normal_(conv.weight, a=_LEAK, nonlinearity=activation)  # type: ignore[arg-type]
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def strided(size: int, stride: int) -> int:
    """Length after a convolution of odd kernel with padding k // 2, or TensorFlow's SAME."""
    return (size + stride - 1) // stride


class _SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: with stride 2 an even image gets more on the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        top_bottom, left_right = (
            max((strided(size, stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        )
        left, top = left_right // 2, top_bottom // 2
        return super().forward(F.pad(x, (left, left_right - left, top, top_bottom - top)))


class FlowNetS(nn.Module):
    """The contracting part of FlowNet-S on the two frames stacked: nine convolutions, 1/64 of the size.

    Dosovitskiy et al. 2015, https://arxiv.org/abs/1504.06852, fig. 2; as DeepVO and the original use it. Modules
    have the names of FlowNetPytorch, whose weights it takes (`load_flownet_weights`).

    Args:
        frame_channels: channels of one frame.
        channels: of conv1, conv2, conv3 = conv3_1, conv4 = conv4_1, conv5 = conv5_1 and conv6.
        activation: relu or leaky_relu (slope 0.1).
        activate_last: whether an activation follows conv6.
        batch_norm: after each convolution, in place of its bias.
        dropout: after each of the nine; empty for none.
        same_padding: TensorFlow's asymmetric padding.

    Raises:
        ModelError: other than six channel numbers, or other than 0, 1 or 9 dropout rates.
    """

    # name, index into channels, kernel size, stride
    LAYERS = (
        ("conv1", 0, 7, 2),
        ("conv2", 1, 5, 2),
        ("conv3", 2, 5, 2),
        ("conv3_1", 2, 3, 1),
        ("conv4", 3, 3, 2),
        ("conv4_1", 3, 3, 1),
        ("conv5", 4, 3, 2),
        ("conv5_1", 4, 3, 1),
        ("conv6", 5, 3, 2),
    )

    def __init__(
        self,
        frame_channels: int,
        channels: tuple[int, ...],
        *,
        activation: str = "relu",
        activate_last: bool = True,
        batch_norm: bool = False,
        dropout: tuple[float, ...] = (),
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != 6:
            raise ModelError(f"encoder_channels of flownets are 6 numbers (conv1 to conv6), not {channels}")
        rates = self._dropout_rates(dropout)
        self.channels = channels
        in_channels = 2 * frame_channels
        for (name, stage, kernel, stride), rate in zip(self.LAYERS, rates, strict=True):
            conv_class = _SameConv2d if same_padding else nn.Conv2d
            padding = 0 if same_padding else kernel // 2
            conv = conv_class(in_channels, channels[stage], kernel, stride, padding, bias=not batch_norm)
            active = activation_layer(activation)
            kaiming(conv, activation)
            block: list[nn.Module] = [conv]
            if batch_norm:
                block.append(nn.BatchNorm2d(channels[stage]))
            if activate_last or name != "conv6":
                block.append(active)
            if rate > 0:
                block.append(nn.Dropout(rate))
            self.add_module(name, nn.Sequential(*block))
            in_channels = channels[stage]

    @classmethod
    def from_config(cls, config: ModelConfig) -> FlowNetS:
        """The encoder of a network."""
        return cls(
            config.image_channels,
            config.encoder_channels,
            activation=config.activation,
            activate_last=config.activate_last,
            batch_norm=config.batch_norm,
            dropout=config.encoder_dropout,
            same_padding=config.same_padding,
        )

    def _dropout_rates(self, dropout: tuple[float, ...]) -> tuple[float, ...]:
        count = len(self.LAYERS)
        if len(dropout) not in (0, 1, count):
            raise ModelError(f"encoder_dropout has {len(dropout)} numbers, but must have none, one or {count}")
        return dropout if len(dropout) == count else (dropout or (0.0,)) * count

    def output_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the features of frames of the given size."""
        for _, _, _, stride in self.LAYERS:
            height, width = strided(height, stride), strided(width, stride)
        return self.channels[-1], height, width

    def forward(self, clip: Tensor, intrinsics: Tensor) -> Tensor:
        """Features of each pair of neighbours.

        Args:
            clip: normalised frames (batch, time + 1, channels, height, width).
            intrinsics: not used: this encoder learns the camera it is trained on.

        Returns:
            (batch, time, features, height / 64, width / 64).
        """
        x = torch.cat([clip[:, :-1], clip[:, 1:]], 2).flatten(0, 1)  # (batch * time, 2 * channels, height, width)
        for name, _, _, _ in self.LAYERS:
            x = self.get_submodule(name)(x)
        return x.unflatten(0, (clip.shape[0], -1))


def load_flownet_weights(encoder: FlowNetS, path: Path) -> None:
    """Start from weights that learned optical flow: ``flownets_bn_EPE2.459.pth.tar`` and its like.

    They belong to https://github.com/ClementPinard/FlowNetPytorch: a file with a ``state_dict`` whose keys are
    ``conv1.0.weight``, ... Its layers after conv6 (refinement and flow) have no place in the encoder.

    Args:
        encoder: six input channels (RGB pairs) and the default channels, with or without batch normalisation.
        path: the file.

    Raises:
        ModelError: a missing or damaged file, or one whose layers are not those of the encoder.
    """
    saved = _read_flownet(Path(path))
    has_norm = any(name.endswith("running_mean") for name in saved)
    wants_norm = any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    if has_norm != wants_norm:
        raise ModelError(
            f"{path}: weights {'with' if has_norm else 'without'} batch normalisation, but the network has "
            f"batch_norm={wants_norm}: set batch_norm={has_norm}, or use the other file"
        )
    own = encoder.state_dict()
    encoder.load_state_dict({name: _match(name, tensor, saved, path) for name, tensor in own.items()})


def _match(name: str, own: Tensor, saved: dict[str, Tensor], path: Path) -> Tensor:
    """The saved tensor of the given name, if it fits."""
    if name not in saved and name.endswith("num_batches_tracked"):
        return own  # files from before PyTorch 0.4.1 do not count batches, and nothing here reads the count
    if name not in saved:
        raise ModelError(f"{path}: no '{name}'; a FlowNet-S file of FlowNetPytorch has it")
    if saved[name].shape != own.shape:
        raise ModelError(
            f"{path}: '{name}' has shape {tuple(saved[name].shape)}, but the encoder's has {tuple(own.shape)}: "
            "build it with image_channels=3 and the default encoder_channels"
        )
    return saved[name]


def _read_flownet(path: Path) -> dict[str, Tensor]:
    """Tensors by name, without running code that a pickle may carry."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file of FlowNet weights") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path}: damaged, or not a file of weights ({reason[0]})") from None
    tensors = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(tensors, dict):
        raise ModelError(f"{path}: holds no 'state_dict'; a FlowNet-S file of FlowNetPytorch has one")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
