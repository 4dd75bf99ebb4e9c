"""Recurrent cells as pure steps: ``output, state = cell(input, state)``; no cell keeps a state of its own.

A state is a tuple of tensors, each with the batch first. It stays in float32 (or float64, where weights are) also
under autocast or with bfloat16 weights: small updates of a long memory would be rounded away otherwise.

A new cell is a class with `from_config`, `output_shape`, `zero_state` and `forward`, and a line in `CELLS`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo.models.config import ModelConfig, ModelError

State = tuple[Tensor, ...]
Shape = tuple[int, ...]

_LAYER_NORM_EPSILON = 1e-12  # of tf.contrib.layers.layer_norm


def state_dtype(weight: Tensor) -> torch.dtype:
    """The type that a state is kept in, for weights of the given type."""
    return torch.promote_types(weight.dtype, torch.float32)


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, bias: bool) -> nn.Conv2d:
    """A convolution that keeps the size, with Glorot's initialisation, as recurrent kernels usually have."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class _LayerNorm(nn.GroupNorm):
    """Normalisation over all axes but the batch, gain and offset a channel: a group norm of one group."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, eps=_LAYER_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        # In the state's own type, whatever that of the weights.
        return F.group_norm(x, 1, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _norm(channels: int, layer_norm: bool) -> nn.Module:
    return _LayerNorm(channels) if layer_norm else nn.Identity()


class ConvLSTMCell(nn.Module):
    """An LSTM whose products are convolutions.

    Shi et al. 2015, "Convolutional LSTM network", https://arxiv.org/abs/1506.04214, eq. 3, with the details of the
    TensorFlow cell that the field uses: layer normalisation of all gates and of the new cell state, forget bias 1,
    gates in the kernel in the order candidate, input, forget, output.

    Args:
        in_channels: channels of the input.
        hidden_channels: channels of output and state.
        kernel_size: odd.
        peepholes: input and forget gate see the previous cell state, the output gate the new one; elementwise, so
            that the cell is bound to ``image_size``.
        layer_norm: normalise gates and cell state; replaces the bias.
        image_size: (height, width) of the feature map; needed for peepholes only.

    Raises:
        ModelError: peepholes without a size, or an input of another size than theirs.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        kernel_size: int = 3,
        peepholes: bool = False,
        layer_norm: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.conv = _conv(in_channels + hidden_channels, 4 * hidden_channels, kernel_size, bias=not layer_norm)
        self.norm_j, self.norm_i, self.norm_f, self.norm_o, self.norm_c = (
            _norm(hidden_channels, layer_norm) for _ in range(5)
        )
        self.peepholes: nn.Parameter | None = None
        if peepholes:
            if image_size is None:
                raise ModelError("peepholes have one weight a pixel: give the cell its image_size (height, width)")
            # Of the input, forget and output gate; at zero the cell starts as one without peepholes.
            self.peepholes = nn.Parameter(torch.zeros(3, hidden_channels, *image_size))

    @classmethod
    def from_config(cls, config: ModelConfig, in_shape: Shape) -> ConvLSTMCell:
        """The cell of a network, for feature maps ``in_shape`` = (channels, height, width)."""
        channels, height, width = in_shape
        return cls(
            channels,
            config.hidden_channels,
            kernel_size=config.cell_kernel,
            peepholes=config.peepholes,
            layer_norm=config.layer_norm,
            image_size=(height, width),
        )

    def output_shape(self, in_shape: Shape) -> Shape:
        """Shape of the output for one of the input, both (channels, height, width)."""
        return (self.hidden_channels, *in_shape[1:])

    def zero_state(self, x: Tensor) -> State:
        """The state before the first step, for inputs like ``x`` (batch, channels, height, width)."""
        zeros = x.new_zeros((x.shape[0], self.hidden_channels, *x.shape[2:]), dtype=state_dtype(self.conv.weight))
        return zeros, zeros.clone()

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            x: (batch, in_channels, height, width).
            state: cell state c and output h of the previous step, each (batch, hidden_channels, height, width).

        Returns:
            The output h (batch, hidden_channels, height, width) and the new state (c, h).
        """
        c, h = state
        self._check_size(x)
        y = self.conv(torch.cat([x, h.to(x.dtype)], 1)).to(c.dtype)  # (batch, 4 * hidden, height, width)
        j, i, f, o = y.chunk(4, 1)
        if self.peepholes is not None:
            i = i + self.peepholes[0] * c
            f = f + self.peepholes[1] * c
        j, i, f = self.norm_j(j), self.norm_i(i), self.norm_f(f)
        c = c * torch.sigmoid(f + 1) + torch.sigmoid(i) * torch.tanh(
            j
        )  # 1: remember, until something else is learned
        if self.peepholes is not None:
            o = o + self.peepholes[2] * c
        c = self.norm_c(c)
        h = torch.sigmoid(self.norm_o(o)) * torch.tanh(c)
        return h, (c, h)

    def _check_size(self, x: Tensor) -> None:
        if self.peepholes is not None and x.shape[2:] != self.peepholes.shape[2:]:
            raise ModelError(
                f"features of {x.shape[2]}x{x.shape[3]} (height x width), but the ConvLSTM's peepholes are for "
                f"{self.peepholes.shape[2]}x{self.peepholes.shape[3]}: resize frames to the network's image size, "
                "or build it with peepholes=False"
            )


class ConvGRUCell(nn.Module):
    """A GRU whose products are convolutions.

    Ballas et al. 2016, https://arxiv.org/abs/1511.06432, with the details of the field's TensorFlow cell: gates in
    the kernel in the order reset, update; gate biases start at 1; the update gate keeps the *old* state.

    Args:
        in_channels: channels of the input.
        hidden_channels: channels of output and state.
        kernel_size: odd.
        layer_norm: normalise gates and candidate; replaces the bias.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, *, kernel_size: int = 3, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.gates = _conv(in_channels + hidden_channels, 2 * hidden_channels, kernel_size, bias=not layer_norm)
        self.candidate = _conv(in_channels + hidden_channels, hidden_channels, kernel_size, bias=not layer_norm)
        self.norm_r, self.norm_u, self.norm_candidate = (_norm(hidden_channels, layer_norm) for _ in range(3))
        if self.gates.bias is not None:
            nn.init.ones_(self.gates.bias)

    @classmethod
    def from_config(cls, config: ModelConfig, in_shape: Shape) -> ConvGRUCell:
        """The cell of a network, for feature maps ``in_shape`` = (channels, height, width)."""
        if config.peepholes:
            raise ModelError(
                "a ConvGRU has no cell state for peepholes to see: set peepholes=False or cell=convlstm"
            )
        return cls(
            in_shape[0], config.hidden_channels, kernel_size=config.cell_kernel, layer_norm=config.layer_norm
        )

    def output_shape(self, in_shape: Shape) -> Shape:
        """Shape of the output for one of the input, both (channels, height, width)."""
        return (self.hidden_channels, *in_shape[1:])

    def zero_state(self, x: Tensor) -> State:
        """The state before the first step, for inputs like ``x`` (batch, channels, height, width)."""
        shape = (x.shape[0], self.hidden_channels, *x.shape[2:])
        return (x.new_zeros(shape, dtype=state_dtype(self.gates.weight)),)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            x: (batch, in_channels, height, width).
            state: the output h of the previous step, (batch, hidden_channels, height, width), as a tuple of one.

        Returns:
            The output h (batch, hidden_channels, height, width) and the new state (h,).
        """
        (h,) = state
        r, u = self.gates(torch.cat([x, h.to(x.dtype)], 1)).to(h.dtype).chunk(2, 1)
        r, u = torch.sigmoid(self.norm_r(r)), torch.sigmoid(self.norm_u(u))
        y = self.candidate(torch.cat([x, (r * h).to(x.dtype)], 1)).to(h.dtype)
        h = u * h + (1 - u) * torch.tanh(self.norm_candidate(y))
        return h, (h,)


class StackedLSTM(nn.Module):
    """Layers of LSTM over vectors; feature maps are flattened.

    Hochreiter and Schmidhuber 1997, with forget gates of bias 1 and gates in the order input, candidate, forget,
    output. Each layer's two kernels are one matrix over input and previous output.

    Args:
        in_size: numbers in an input.
        hidden_size: numbers in the output and in each layer's state.
        layers: how many; each one reads the output of the one before.
        dropout: between layers, in training.

    Raises:
        ModelError: an input of another size than ``in_size``.
    """

    def __init__(self, in_size: int, hidden_size: int, *, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_size, self.hidden_size = in_size, hidden_size
        self.dropout = dropout
        sizes = [in_size, *[hidden_size] * (layers - 1)]
        self.weights = nn.ParameterList(torch.empty(4 * hidden_size, size + hidden_size) for size in sizes)
        self.biases = nn.ParameterList(torch.zeros(4 * hidden_size) for _ in sizes)
        for weight in self.weights:
            nn.init.xavier_uniform_(weight)

    @classmethod
    def from_config(cls, config: ModelConfig, in_shape: Shape) -> StackedLSTM:
        """The cell of a network, for features of any shape."""
        size = int(torch.Size(in_shape).numel())
        return cls(size, config.hidden_channels, layers=config.cell_layers, dropout=config.cell_dropout)

    def output_shape(self, in_shape: Shape) -> Shape:
        """Shape of the output, (hidden_size,), for any shape of the input."""
        return (self.hidden_size,)

    def zero_state(self, x: Tensor) -> State:
        """The state before the first step, for inputs like ``x`` (batch, ...)."""
        dtype = state_dtype(self.biases[0])
        return tuple(x.new_zeros((x.shape[0], self.hidden_size), dtype=dtype) for _ in range(2 * len(self.weights)))

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One step.

        Args:
            x: (batch, ...) with ``in_size`` numbers a row.
            state: c and h of the first layer, then of the second, ...; each (batch, hidden_size).

        Returns:
            The last layer's h (batch, hidden_size) and the new state in the same order.
        """
        x = self._flatten(x)
        new_state: list[Tensor] = []
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            c, h = state[2 * layer : 2 * layer + 2]
            i, j, f, o = self._gates(x, h, weight, bias).chunk(4, 1)
            c = c * torch.sigmoid(f + 1) + torch.sigmoid(i) * torch.tanh(j)
            x = torch.sigmoid(o) * torch.tanh(c)
            new_state += [c, x]
        return x, tuple(new_state)

    def _gates(self, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = weight.dtype
        return F.linear(torch.cat([x.to(dtype), h.to(dtype)], 1), weight, bias).to(h.dtype)

    def _flatten(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)  # (batch, in_size)
        if flat.shape[1] != self.in_size:
            raise ModelError(
                f"features {tuple(x.shape[1:])} have {flat.shape[1]} numbers, but the LSTM was built for "
                f"{self.in_size}: resize frames to the network's image size"
            )
        return flat


CELLS: dict[str, type[nn.Module]] = {
    "convlstm": ConvLSTMCell,
    "convgru": ConvGRUCell,
    "lstm": StackedLSTM,
}
