"""How much memory training takes, how to take less, and what to say when there is not enough."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convlstm_vo.models.network import OdometryNet
from convlstm_vo.training.config import TrainConfig, TrainError

_GIB = 2**30
_BYTES_A_WEIGHT = 4 + 4 + 8  # itself, its gradient, Adam's two moments
_PARTS = ("weights", "activations", "images", "libraries")
_REMEDIES = (
    "lower --batch-size (and raise --accumulate by as much, for the same updates), --time-steps or the size of "
    "images (--model.image-height, --model.image-width), or add --checkpoint-activations"
)


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs at the peak of a step."""

    weights: int
    """Weights, gradients, Adam's moments, the moving average."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    images: int
    """Batches: one in use as float32, the next one waiting as uint8."""
    libraries: int = int(0.7 * _GIB)
    """Python, libraries and their work space; 0.5 to 0.65 GiB were measured (benchmarks/memory.py)."""

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.images + self.libraries

    def __str__(self) -> str:
        parts = (f"{name} {getattr(self, name) / _GIB:.2f}" for name in _PARTS)
        return f"{self.total / _GIB:.2f} GiB ({', '.join(parts)})"


def estimate_memory(config: TrainConfig, lanes: int, device: torch.device, precision: str) -> MemoryEstimate:
    """What a step will need, from a forward pass of one clip with tensors that have shapes but no contents.

    Args:
        lanes: clips that one process sees in a step.
        device: where it will run.
        precision: fp32, bf16 or fp16.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = config.model
    shape = (1, config.time_steps + 1, model.image_channels, model.image_height, model.image_width)
    with FakeTensorMode():
        net = OdometryNet(model)
        clip, intrinsics = torch.zeros(shape), torch.ones(1, 4)
        whole = _kept(net, clip, intrinsics, precision)
        encoder = _kept(net.encoder, clip.expand(-1, -1, net.config.image_channels, -1, -1), intrinsics, precision)
    size = sum(weight.numel() for weight in net.parameters())
    recomputed = encoder * (lanes - 1) if config.checkpoint_activations else 0
    return MemoryEstimate(
        weights=size * (_BYTES_A_WEIGHT + (4 if config.ema else 0)),
        activations=whole * lanes - recomputed,
        images=lanes * torch.Size(shape).numel() * (4 + 1),
    )


def _kept(module: nn.Module, clip: Tensor, intrinsics: Tensor, precision: str) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights excluded."""
    own = {id(part.untyped_storage()) for part in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # held, so that no other storage takes its id
        return tensor

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), cast:
        outputs = module(clip, intrinsics)
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device now; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def describe_memory(config: TrainConfig, lanes: int, device: torch.device, precision: str) -> str:
    """The estimate as a line for the terminal, with a warning where there is less than that."""
    estimate, free = estimate_memory(config, lanes, device, precision), free_memory(device)
    line = f"Memory: about {estimate} a process"
    if free is None:
        return line
    line += f", {free / _GIB:.1f} GiB free on {device.type}"
    return line if estimate.total < free else f"{line}\nWarning: that may not suffice: {_REMEDIES}"


def checkpoint_encoder(net: OdometryNet) -> None:
    """Keep no activations of the encoder but its input and output: they are computed again, one clip at a time.

    The encoder has the largest maps by far. Chen et al. 2016, https://arxiv.org/abs/1604.06174. Weights keep their
    names; nothing changes where no gradients are wanted.
    """
    encode = net.encoder.forward

    def forward(clip: Tensor, intrinsics: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return encode(clip, intrinsics)
        lanes = zip(clip.split(1), intrinsics.split(1), strict=True)
        return torch.cat([checkpoint(encode, *lane, use_reentrant=False) for lane in lanes])

    net.encoder.forward = forward


@contextlib.contextmanager
def explaining_lack_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turn out-of-memory errors of torch and numpy into one that names what to change.

    Raises:
        TrainError: when memory runs out within the block.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        raise TrainError(
            f"out of memory with --batch-size {config.batch_size}, --time-steps {config.time_steps} and images of "
            f"{config.model.image_height}x{config.model.image_width}: {_REMEDIES}"
        ) from error


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(sign in text for sign in ("not enough memory", "can't allocate memory", "out of memory"))
