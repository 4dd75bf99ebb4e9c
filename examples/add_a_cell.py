"""A recurrent cell of your own: one class, one line in the registry, and every tool here works with it."""

import torch
from torch import Tensor, nn

from convlstm_vo.models.cells import CELLS, State
from convlstm_vo.models.config import ModelConfig, preset
from convlstm_vo.models.network import OdometryNet


class LeakyMemory(nn.Module):
    """A running mean of convolved features: the simplest memory there is."""

    def __init__(self, in_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.conv = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)

    @classmethod
    def from_config(cls, config: ModelConfig, in_shape: tuple[int, ...]) -> "LeakyMemory":
        return cls(in_shape[0], config.hidden_channels)

    def output_shape(self, in_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.hidden_channels, *in_shape[1:])

    def zero_state(self, x: Tensor) -> State:
        return (x.new_zeros((x.shape[0], self.hidden_channels, *x.shape[2:])),)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        h = 0.8 * state[0] + 0.2 * torch.relu(self.conv(x))  # (batch, hidden, height, width)
        return h, (h,)


CELLS["leaky"] = LeakyMemory
net = OdometryNet(preset("tiny", cell="leaky"))
motions, state = net(torch.zeros(1, 3, 1, 96, 320), torch.tensor([[180.0, 180, 160, 48]]))
print(motions.shape)  # (batch, time, 6)
