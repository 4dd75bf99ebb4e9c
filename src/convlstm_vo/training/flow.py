"""Training the flow: rendered pairs with exact flow, any motion predicted nearly right, any light."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convlstm_vo.environment import bfloat16_pays
from convlstm_vo.models.flow import FlowNet
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.flow_data import FlowBatch, FlowData
from convlstm_vo.training.rendered import RenderedDrive


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How the flow is trained."""

    steps: int = 5000
    """Updates."""
    batch_size: int = 8
    """Crops in a batch."""
    crop_width: int = 320
    """Columns of a crop; rows are kept."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW; it falls to zero along a cosine."""
    seed: int = 0
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
    """Train from the seed; what an interrupted run left in ``out`` is continued.

    Returns:
        The averaged network, on the CPU.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    net = FlowNet().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    data, apart = FlowData(drives, device), FlowData(unseen, device)
    optimizer = torch.optim.AdamW(net.parameters(), config.lr, weight_decay=1e-4)
    average, start = WeightAverage(net, 0.998), 0
    latest = out / "flow-last.pt"
    if latest.exists():
        saved = torch.load(latest, weights_only=True, map_location=device)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
        start = saved["step"]
    began, losses = time.perf_counter(), []
    for step in range(start, config.steps):
        batch = data.random_batch(config.batch_size, config.crop_width, (config.seed, step))
        warm, fall = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warm * fall
        with config.autocast(data.device):
            loss = flow_loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
        average.update(net)
        losses.append(loss.detach())
        if (step + 1) % 50 == 0:
            mean = torch.stack(losses).mean().item()
            row = {"step": step + 1, "loss": mean, "seconds": time.perf_counter() - began}
            losses = []
            if (step + 1) % 500 == 0:
                with average.applied_to(net):
                    row |= flow_errors(net, apart, 48, config)
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state | {"average": average.state_dict()}, out / "flow-last.tmp")
                (out / "flow-last.tmp").replace(latest)
            with (out / "flow.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
    net.load_state_dict(average.average)
    return net.cpu()
