"""Training the flow: rendered pairs with exact flow, any motion predicted nearly right, any light."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.models.flow import FlowNet
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.flow_data import FlowBatch, FlowData
from convlstm_vo.training.rendered import RenderedDrive
from convlstm_vo.training.stage_state import StateFile, forget_rows_after


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How the flow is trained."""

    steps: int = 28000
    """Updates."""
    batch_size: int = 4
    """Crops in a batch."""
    crop_width: int = 320
    """Columns of a crop; rows are kept."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW (`FlowOptimizer`); it falls to zero along a cosine."""
    lr_between: float = 3e-3
    """The same, of Muon."""
    seed: int = 0
    save_steps: int = 25
    """Updates between writes of the state from which an interrupted run goes on."""
    precision: str = "auto"
    """bf16 or fp32, of the convolutions; auto: as is faster. Warping and Lucas-Kanade are always fp32."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision, on a device."""
        bf16 = bfloat16_pays(device.type) if self.precision == "auto" else self.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def flow_loss(net: FlowNet, batch: FlowBatch) -> Tensor:
    """Negative log-likelihood of the last flow (Laplace), and robust errors of the stages before."""
    field = net(batch.prev, batch.curr, batch.predicted)
    valid = batch.valid.float()
    count = valid.sum().clamp_min(1)
    error = (field.flow - batch.target).abs().sum(1).clamp_max(60)
    log_scale = field.log_scale[:, 0]
    loss = ((error * (-log_scale).exp() + 2 * log_scale) * valid).sum() / count
    for stage, soft in zip(field.stages, (1.0, 0.4, 0.15), strict=True):
        distance = (stage - batch.target).abs().sum(1).clamp_max(60)
        loss = loss + 0.3 * (torch.log1p(distance / soft) * valid).sum() / count
    return loss


@torch.inference_mode()
def flow_errors(net: FlowNet, data: FlowData, pairs: int, config: FlowConfig) -> dict[str, float]:
    """End-point errors in pixels on whole frames of drives: mean, median and calibration, on and off the road."""
    parts: dict[str, list[Tensor]] = {"road": [], "other": [], "z": []}
    for number in range(pairs):
        chance = np.random.Generator(np.random.PCG64([1, number]))
        drive = torch.tensor([number % len(data.lengths)])
        index = torch.from_numpy(chance.integers(data.lengths[drive].numpy() - 1))
        batch = data.pairs(drive, index, index + 1, torch.Generator(data.device).manual_seed(number), good=True)
        with config.autocast(data.device):
            field = net(batch.prev, batch.curr, batch.predicted)
        error = (field.flow - batch.target).norm(dim=1)
        known = batch.valid & (batch.target.norm(dim=1) > 0)
        parts["road"].append(error[known & batch.road])
        parts["other"].append(error[known & ~batch.road])
        parts["z"].append((error * (-field.log_scale[:, 0]).exp())[known])
    out: dict[str, float] = {}
    for name in ("road", "other"):
        values = torch.cat(parts[name])
        out |= {f"{name}_mean": values.mean().item(), f"{name}_median": values.median().item()}
    return out | {"scaled_median": torch.cat(parts["z"]).median().item()}


def train_flow(
    config: FlowConfig,
    drives: Sequence[RenderedDrive],
    unseen: Sequence[RenderedDrive],
    out: Path,
    device: torch.device | str = "cpu",
) -> FlowNet:
    """Train from the seed; an interrupted run in ``out`` is continued, to the same weights.

    Returns:
        The averaged network, on the CPU.

    Raises:
        TrainError: ``out`` holds a run of other settings or drives, or a damaged state.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = FlowRun(config, drives, out, device)
    apart: FlowData | None = None
    began = time.perf_counter()
    while run.step < config.steps:
        run.update()
        if run.step % 50 == 0:
            mean = torch.stack(run.losses).mean().item()
            row = {"step": run.step, "loss": mean, "seconds": time.perf_counter() - began}
            run.losses.clear()
            if run.step % 500 == 0:
                apart = apart or FlowData(unseen, device)
                with run.average.applied_to(run.net):
                    row |= flow_errors(run.net, apart, 48, config)
            with (out / "flow.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
        if run.step % config.save_steps == 0 or run.step == config.steps:
            run.save()
    run.net.load_state_dict(run.average.average)
    return run.net.cpu()


class FlowOptimizer:
    """Muon for the convolutions between features, AdamW for first and last layers, biases and scalars.

    Muon (K. Jordan et al. 2024; here with steps as long as AdamW's) makes an update of a matrix orthogonal, so that
    directions whose gradients are small are learned too; a convolution is a matrix with a row for each output.
    """

    def __init__(self, net: FlowNet, config: FlowConfig) -> None:
        ends = (net.images, net.to2, net.coarse_flow, net.fine_flow, net.judge[-1])
        apart = {id(layer.weight) for layer in ends}
        self._net = net
        self._between = [p for p in net.parameters() if p.dim() == 4 and id(p) not in apart]
        rest = [p for p in net.parameters() if p.dim() != 4 or id(p) in apart]
        # Matrices that share their memory with the weights: what changes them changes the network.
        self._matrices = [nn.Parameter(p.detach().permute(0, 2, 3, 1).view(len(p), -1)) for p in self._between]
        muon = torch.optim.Muon(self._matrices, config.lr_between, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self._parts = [torch.optim.AdamW(rest, config.lr, weight_decay=1e-4), muon]
        self._peaks = [config.lr, config.lr_between]

    def step(self, loss: Tensor, share: float) -> None:
        """One step down the gradient of a loss, with so large a share of the peak rates."""
        self._net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._net.parameters(), 2.0)
        for matrix, weight in zip(self._matrices, self._between, strict=True):
            assert weight.grad is not None
            matrix.grad = weight.grad.permute(0, 2, 3, 1).reshape(matrix.shape)
        for part, peak in zip(self._parts, self._peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * share
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """What the parts remember of earlier steps; the rates are the caller's."""
        return {"parts": [part.state_dict()["state"] for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(part.state_dict() | {"state": saved})


class FlowRun:
    """A run of `train_flow`: all that changes from one update to the next, and its file ``out/flow-last.pt``.

    Raises:
        TrainError: see `train_flow`.
    """

    def __init__(
        self, config: FlowConfig, drives: Sequence[RenderedDrive], out: Path, device: torch.device | str = "cpu"
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data = config, FlowData(drives, device)
        self.net = FlowNet().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = FlowOptimizer(self.net, config)
        self.average = WeightAverage(self.net, 0.998)
        self.step, self.losses = 0, list[Tensor]()
        truth = 0
        for drive in drives:
            truth = zlib.crc32(f"{drive.images.shape}".encode() + drive.T_world_camera.tobytes(), truth)
        settings = dataclasses.asdict(config) | {"drives": truth}
        del settings["save_steps"]
        self._file = StateFile(out / "flow-last.pt", settings)
        if (saved := self._file.read()) is not None:
            self.net.load_state_dict(saved["net"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average.load_state_dict(saved["average"])
            self.step, self.losses = saved["step"], list(saved["losses"])
        forget_rows_after(out / "flow.jsonl", step=self.step)

    def update(self) -> None:
        """One step down the gradient."""
        config = self.config
        batch = self.data.random_batch(config.batch_size, config.crop_width, (config.seed, self.step))
        warm, fall = min(1.0, (self.step + 1) / 100), 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        with config.autocast(self.data.device):
            loss = flow_loss(self.net, batch)
        self.optimizer.step(loss, warm * fall)
        self.average.update(self.net)
        self.losses.append(loss.detach().cpu())
        self.step += 1

    def save(self) -> None:
        """Write all of it aside, and rename."""
        parts = {"net": self.net, "optimizer": self.optimizer, "average": self.average}
        states = {name: part.state_dict() for name, part in parts.items()}
        self._file.write(states | {"step": self.step, "losses": self.losses})
