"""Training the flow: rendered pairs with exact flow, any motion predicted nearly right, any light."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlstm_vo.geometry import se3
from convlstm_vo.models.flow import FlowNet
from convlstm_vo.models.scene import (
    canyon_inverse_depth,
    cell_rays,
    flow_of,
    road_inverse_depth,
    road_slopes,
    seen_after,
)
from convlstm_vo.training.ema import WeightAverage
from convlstm_vo.training.rendered import RenderedDrive

_STEPS = (1, 1, 1, 1, 1, 1, 1, 2, -1, -1)  # frames from the first image of a pair to the second


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
    precision: str = "bf16"
    """bf16 or fp32, of the convolutions; warping and Lucas-Kanade are always fp32."""


@dataclasses.dataclass(frozen=True)
class FlowBatch:
    """Pairs with their true and predicted flow; lengths in camera heights.

    Attributes:
        prev, curr: (batch, 1, height, width) grey levels. predicted, target: (batch, 2, rows, columns) pixels.
        valid, road: (batch, rows, columns) bool: known and in view; on the road.
    """

    prev: Tensor
    curr: Tensor
    predicted: Tensor
    target: Tensor
    valid: Tensor
    road: Tensor


def make_pair(
    drive: RenderedDrive, index: int, other: int, rng: np.random.Generator, *, crop: int | None, clean: bool = False
) -> FlowBatch:
    """One pair of frames as a batch of one.

    Args:
        drive, index, other: the frames. rng: noise of the prediction and of the light.
        crop: width of a random window, None for the whole. clean: no change of light, a good prediction.
    """
    rho = cell_values(drive.inverse_depth(index)) * drive.height_m
    still = ~cell_values(drive.moving_mask(index)).astype(bool)
    intrinsics = torch.tensor(drive.intrinsics[None], dtype=torch.float32)
    truth = se3.relative(drive.T_world_camera[index], drive.T_world_camera[other])
    truth[:3, 3] /= drive.height_m
    rays = cell_rays(intrinsics, *rho.shape)
    slopes = road_slopes(torch.tensor(drive.road_plane[index : index + 1, :3], dtype=torch.float32))
    target = flow_of(rays, torch.from_numpy(rho)[None], _as_motion(truth), intrinsics)
    guess = perturbed(truth, rng, small=clean)
    noisy = slopes + torch.from_numpy(rng.normal(0, 0.004 if clean else 0.008, (1, 2)).astype(np.float32))
    predicted = flow_of(rays, canyon_inverse_depth(rays, noisy), _as_motion(guess), intrinsics).clamp(-400, 400)
    prev, curr = drive.images[index], drive.images[other]
    if not clean:
        prev, curr = change_light(prev, curr, rng)
    valid = torch.from_numpy(still)[None] & _in_view(rays, target, intrinsics, rho, truth, drive.images.shape[1:])
    plane = road_inverse_depth(rays, slopes)
    road = ((torch.from_numpy(rho)[None] - plane).abs() < 0.03 * plane) & (plane > 0.02)
    batch = FlowBatch(_image(prev), _image(curr), predicted, target, valid, road)
    return batch if crop is None else _cropped(batch, crop, rng)


def cell_values(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Mean of the four middle pixels of each cell of 4x4: (height / 4, width / 4)."""
    mean = sum(values[y::4, x::4].astype(np.float32) for y in (1, 2) for x in (1, 2)) / 4
    return np.asarray(mean, np.float32)


def perturbed(T: NDArray[np.float64], rng: np.random.Generator, *, small: bool) -> NDArray[np.float64]:
    """A motion nearly like the true one: as the last motion predicts it, or as a search at the start finds it."""
    kind = 0.0 if small else rng.random()
    turn, share, shift = (
        (0.002, 0.04, 0.01) if kind < 0.5 else (0.005, 0.12, 0.03) if kind < 0.85 else (0.012, 0.3, 0.15)
    )
    noise = np.eye(4)
    noise[:3, :3] = se3.so3_exp(rng.normal(0, turn, 3) * [0.7, 1.2, 0.7])
    out = T @ noise
    out[:3, 3] = T[:3, 3] * (1 + rng.normal(0, share)) + rng.normal(0, shift, 3) * [0.3, 0.2, 1.0]
    return out


def change_light(
    prev: NDArray[np.uint8], curr: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Contrast, exposure and noise as other cameras have them; exposure differs a little between the frames."""
    contrast = 1.0 if rng.random() < 0.4 else float(rng.uniform(0.2, 1.3))
    noise = 0.0 if rng.random() < 0.5 else float(rng.uniform(0, 2.0))
    out = []
    for image in (prev, curr):
        light = image.astype(np.float32)
        light = (light - 100) * (contrast * float(np.exp(rng.normal(0, 0.05)))) + 100 + rng.normal(0, 4)
        if noise:
            light += rng.standard_normal(light.shape, dtype=np.float32) * np.float32(noise)
        out.append(np.clip(np.round(light), 0, 255))
    return out[0], out[1]


def _in_view(
    rays: Tensor,
    flow: Tensor,
    intrinsics: Tensor,
    rho: NDArray[np.float32],
    truth: NDArray[np.float64],
    size: tuple[int, ...],
) -> Tensor:
    height, width = size
    focal, middle = intrinsics[:, :2, None, None], intrinsics[:, 2:, None, None]
    at = rays[:, :2] * focal + middle + flow
    T = torch.tensor(truth[None], dtype=torch.float32)
    in_front = seen_after(rays, torch.from_numpy(rho)[None], T)[:, 2] > 0.1
    return in_front & (at[:, 0] > 0) & (at[:, 0] < width - 1) & (at[:, 1] > 0) & (at[:, 1] < height - 1)


def _cropped(batch: FlowBatch, crop: int, rng: np.random.Generator) -> FlowBatch:
    """A random window; mirrored half of the time."""
    cells = crop // 4
    left = int(rng.integers(0, (batch.target.shape[-1] - cells) // 2 + 1)) * 2
    mirror = rng.random() < 0.5
    out = []
    for field in dataclasses.fields(batch):
        value: Tensor = getattr(batch, field.name)
        scale = 4 if field.name in ("prev", "curr") else 1
        value = value[..., left * scale : (left + cells) * scale]
        if mirror:
            value = value.flip(-1)
            if field.name in ("predicted", "target"):
                value = value * torch.tensor([-1.0, 1.0])[:, None, None]
        out.append(value)
    return FlowBatch(*out)


def _image(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))[None, None]


def _as_motion(T: NDArray[np.float64]) -> Tensor:
    return torch.tensor(se3.motion_from_matrix(T)[None], dtype=torch.float32)


def batches(drives: Sequence[RenderedDrive], config: FlowConfig, start: int = 0) -> Iterator[FlowBatch]:
    """Endless batches; each follows from the seed and its number alone."""
    step = start
    while True:
        rng = np.random.Generator(np.random.PCG64([config.seed, step]))
        pairs: list[FlowBatch] = []
        while len(pairs) < config.batch_size:
            drive = drives[int(rng.integers(len(drives)))]
            index, hop = int(rng.integers(len(drive))), _STEPS[int(rng.integers(len(_STEPS)))]
            if 0 <= index + hop < len(drive):
                pairs.append(make_pair(drive, index, index + hop, rng, crop=config.crop_width))
        yield FlowBatch(*(torch.cat([getattr(p, f.name) for p in pairs]) for f in dataclasses.fields(FlowBatch)))
        step += 1


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
def flow_errors(
    net: FlowNet, drives: Sequence[RenderedDrive], pairs: int, *, precision: str = "bf16"
) -> dict[str, float]:
    """End-point errors in pixels on whole frames of drives: mean, median and calibration, on and off the road."""
    parts: dict[str, list[Tensor]] = {"road": [], "other": [], "z": []}
    for number in range(pairs):
        rng = np.random.Generator(np.random.PCG64([1, number]))
        drive = drives[number % len(drives)]
        index = int(rng.integers(len(drive) - 1))
        batch = make_pair(drive, index, index + 1, rng, crop=None, clean=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
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
    config: FlowConfig, drives: Sequence[RenderedDrive], unseen: Sequence[RenderedDrive], out: Path
) -> FlowNet:
    """Train from the seed; what an interrupted run left in ``out`` is continued. Returns the averaged network."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    net = FlowNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), config.lr, weight_decay=1e-4)
    average, start = WeightAverage(net, 0.998), 0
    latest = out / "flow-last.pt"
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
        start = saved["step"]
    began, losses = time.perf_counter(), []
    for step, batch in enumerate(batches(drives, config, start), start):
        if step >= config.steps:
            break
        warm, fall = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warm * fall
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            loss = flow_loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
        average.update(net)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - began}
            losses = []
            if (step + 1) % 500 == 0:
                with average.applied_to(net):
                    row |= flow_errors(net, unseen, 48)
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state | {"average": average.state_dict()}, out / "flow-last.tmp")
                (out / "flow-last.tmp").replace(latest)
            with (out / "flow.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
    net.load_state_dict(average.average)
    return net
