"""Weights of the original's TensorFlow cells in ours.

TensorFlow keeps channels last: kernels are (height, width, in, out), peepholes (height, width, channels). PyTorch
has channels first. The order of gates in the kernels is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.models.cells import ConvGRUCell, ConvLSTMCell
from convlstm_vo.models.config import ModelError

_LSTM_NORMS = (
    "norm_j",
    "norm_i",
    "norm_f",
    "norm_o",
    "norm_c",
)  # in the order in which the TensorFlow cell made them
_PEEPHOLES = ("W_ci", "W_cf", "W_co")


def load_tensorflow_weights(cell: ConvLSTMCell | ConvGRUCell, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Load variables of a TensorFlow ConvLSTM or ConvGRU cell, as the original and its source made them.

    Args:
        cell: with the same options: kernel size, channels, peepholes, layer norm.
        weights: variables by name, e.g. ``rnn/conv_lstm_cell/kernel``; what stands before the cell's own scope
            (``rnn/conv_lstm_cell/``) does not matter. All must belong to this one cell.

    Raises:
        ModelError: a variable that is missing, left over, or of another shape.
    """
    ours = _lstm_tensors if isinstance(cell, ConvLSTMCell) else _gru_tensors
    own = cell.state_dict()
    theirs: dict[str, Tensor] = {}
    for name, value in weights.items():
        if _own_name(name) in theirs:
            raise ModelError(f"TensorFlow weights for '{_own_name(name)}' are there twice; give those of one cell")
        theirs[_own_name(name)] = torch.from_numpy(np.array(value))
    tensors = ours(theirs)  # takes out what it knows
    if theirs:
        raise ModelError(
            f"TensorFlow weights {', '.join(theirs)} are not of such a cell; leave them out, or build it with the "
            "options (peepholes, layer norm) that the weights were made with"
        )
    for name in [*own, *tensors]:
        found, wanted = _shape(tensors.get(name)), _shape(own.get(name))
        if found != wanted:
            raise ModelError(
                f"TensorFlow weights for '{name}': found {found}, but the cell has {wanted}; build it with the "
                "options (channels, kernel size, peepholes, layer norm, image size) that the weights were made with"
            )
    cell.load_state_dict(tensors)


def _own_name(name: str) -> str:
    """The name within the cell's scope."""
    for scope in ("conv_lstm_cell/", "conv_gru_cell/"):
        _, found, rest = name.rpartition(scope)
        if found:
            return rest
    return name


def _lstm_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = _conv_tensors(weights, "", "conv", _LSTM_NORMS)
    if all(name in weights for name in _PEEPHOLES):
        tensors["peepholes"] = torch.stack([weights.pop(name).permute(2, 0, 1) for name in _PEEPHOLES])
    return tensors


def _gru_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    gates = _conv_tensors(weights, "gates/", "gates", ("norm_r", "norm_u"))
    return gates | _conv_tensors(weights, "candidate/", "candidate", ("norm_candidate",))


def _conv_tensors(weights: dict[str, Tensor], scope: str, conv: str, norms: tuple[str, ...]) -> dict[str, Tensor]:
    """A convolution and the layer norms of its outputs, which TensorFlow numbers: LayerNorm, LayerNorm_1, ..."""
    tensors = {}
    if f"{scope}kernel" in weights:
        tensors[f"{conv}.weight"] = weights.pop(f"{scope}kernel").permute(3, 2, 0, 1)
    if f"{scope}bias" in weights:
        tensors[f"{conv}.bias"] = weights.pop(f"{scope}bias")
    for number, norm in enumerate(norms):
        layer = f"{scope}LayerNorm_{number}" if number else f"{scope}LayerNorm"
        for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
            if f"{layer}/{theirs}" in weights:
                tensors[f"{norm}.{ours}"] = weights.pop(f"{layer}/{theirs}")
    return tensors


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
