"""Everything `convlstm-vo train` can be told."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.models.config import ModelConfig, preset
from convlstm_vo.training.clips import AugmentConfig
from convlstm_vo.training.losses import LossConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class TrainError(ConvlstmVoError):
    """Training that cannot start or go on."""


def _also(*names: str) -> object:
    """Names that the original (Ascend model zoo, ConvLSTM_ID2358) gave an option."""
    return tyro.conf.arg(aliases=names)


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Drives through built-in streets, rendered while the network learns: no disk, no street shown twice."""

    drives: int = 0
    """Drives in an epoch; 0: learn from --data."""
    frames: int = 240
    """Frames of each drive."""
    road: Literal["town", "country", "motorway", "mixed"] = "mixed"
    """Kind of road."""
    look: Literal["clean", "random"] = "random"
    """random: exposure, blur, noise, vignetting and JPEG are drawn for each drive."""
    mounting: Literal["fixed", "random"] = "fixed"
    """random: camera height (1 to 3 m) and angles are drawn for each drive."""
    fps: float = 10.0
    """Frames a second."""
    first_seed: int = 1_000_000
    """Street of the first drive; the others count up, far from those of `convlstm-vo simulate`."""

    def __post_init__(self) -> None:
        if self.drives < 0 or self.frames < 2:
            raise TrainError(f"--world.drives {self.drives}, --world.frames {self.frames}: at least 0 and 2")
        if not 0 < self.fps < math.inf:
            raise TrainError(f"--world.fps {self.fps}: must be positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a network on a KITTI-layout tree. Names in brackets are those of the original's scripts."""

    data: Annotated[Path | None, _also("--datapath")] = None
    """KITTI odometry tree: sequences/NAME/image_0, calib.txt, times.txt and poses/NAME.txt."""
    out: Annotated[Path, _also("--outputpath")] = Path("runs/train")
    """Folder for checkpoints, TensorBoard logs and history.jsonl."""
    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    shards: str | None = None
    """Learn from what `convlstm-vo shard` packed instead of --data: its folder, DIR/0000*.tar, or the folder's URL
    (https, s3, gs); for collections too large for --cache. --data is then for --validate only."""
    shard_window: int = 8
    """Shards in an epoch: they are in memory together, and their clips are mixed."""
    sequences: tuple[str, ...] = ()
    """Sequences to learn from; none named: all with ground truth that are not validated on."""
    weights: tuple[float, ...] = ()
    """How often each of --sequences is shown in an epoch, one number each (2: twice, 0.5: every other epoch); use
    it when a kind of driving is rare among the sequences or some labels are poor. None: once each."""
    validate: tuple[str, ...] = ()
    """Sequences to measure on after each epoch; they choose the best checkpoint and stop early."""
    max_sequences: Annotated[int, _also("--trajectory-length")] = 0
    """Use only the first so many training sequences; 0 for all."""
    camera: Literal[0, 1, 2, 3] = 0
    """Which image folder: 0 and 1 are gray, 2 and 3 colour."""
    model: ModelConfig = dataclasses.field(default_factory=lambda: preset("ascend"))
    """The network; --preset sets all of it at once."""
    init: Path | None = None
    """Checkpoint folder whose weights to start from (same architecture)."""
    flownet: Path | None = None
    """FlowNet-S weights in PyTorch form (flownets_bn_EPE2.459.pth.tar and its like) for the encoder."""

    batch_size: Annotated[int, _also("--bsize")] = 32
    """Clips in a step, over all processes together."""
    time_steps: int = 5
    """Motions in a clip: how far back gradients reach (truncated back-propagation through time)."""
    carry_clips: int = 4
    """Clips over which the recurrent state is carried before it is reset; 1: never carried, 0: whole sequences."""
    curriculum_epochs: int = 0
    """Epochs over which clips grow from 2 motions to --time-steps; use it when long clips do not start to learn, or
    to see more batches early on. 0: full length from the start."""
    epochs: Annotated[int, _also("--train-iter")] = 240
    """Times that each motion is shown."""
    dry_run: bool = False
    """Do not train: open all data, print the plan (sequences, frames, steps) and the memory that it will take."""
    find_lr: bool = False
    """Do not train: try learning rates from tiny to huge over some hundred steps, and suggest a --lr."""
    lr: float = 1e-4
    """Peak learning rate of Adam."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up: not at all, or to zero along a cosine."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_gradient: float = 10.0
    """Largest norm of the gradient; larger ones are scaled down. 0: no limit."""
    accumulate: int = 1
    """Steps whose gradients are averaged into one update."""
    ema: float = 0.999
    """Decay of the moving average of the weights that is validated and saved; 0: none."""
    patience: int = 0
    """Stop after so many epochs without a better validation loss; 0: never."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    precision: Precision = "auto"
    """auto: bf16 where the processor has units for it, otherwise fp32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: CUDA, Apple MPS or Ascend NPU (torch-npu) where there is one."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: each of several processes keeps a part of weights, gradients and Adam's moments instead of all; for
    networks that fill a device. Behind torchrun. Checkpoints are the same."""
    checkpoint_activations: bool = False
    """Recompute the encoder in the backward pass, clip by clip, instead of keeping its activations: a third
    more work, memory of one clip in place of the batch. For when memory runs out. Not with batch normalisation."""
    seed: int = 0
    resume: bool = False
    """Go on from the last checkpoint in --out."""
    other_processes: bool = False
    """With --resume: go on although another number of processes wrote the checkpoint. Data and states are dealt out
    anew and nothing is lost, but the run is no longer bit for bit the one that was interrupted."""
    save_steps: int = 1000
    """Steps between writes of the checkpoint `last` (also written after every epoch)."""
    keep_epochs: int = 40
    """Epochs between checkpoints that are kept for good; 0: none."""
    cache: Path | None = None
    """Folder for decoded frames, which can be deleted between runs; none named: ~/.cache/convlstm-vo/frames."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "time_steps", "epochs", "accumulate", "save_steps", "shard_window"):
            if getattr(self, name) < 1:
                raise TrainError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in (
            "carry_clips",
            "warmup_steps",
            "weight_decay",
            "clip_gradient",
            "patience",
            "max_sequences",
            "keep_epochs",
            "curriculum_epochs",
        ):
            if not getattr(self, name) >= 0:
                raise TrainError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be a number of at least 0"
                )
        if not self.lr > 0:
            raise TrainError(f"--lr {self.lr}: must be positive")
        if not 0 <= self.ema < 1:
            raise TrainError(f"--ema {self.ema}: must lie between 0 and 1 (1 excluded)")
        if overlap := set(self.sequences) & set(self.validate):
            raise TrainError(f"--validate {' '.join(sorted(overlap))}: also in --sequences; keep them apart")
        self._check_weights()
        self._check_parts()
        self._check_shards()

    def _check_shards(self) -> None:
        named = {"--sequences": self.sequences, "--max-sequences": self.max_sequences}
        if self.shards is not None:
            stream, others = "--shards", {"--world.drives": self.world.drives, **named}
        elif self.world.drives:
            stream, others = "--world.drives", named
        else:
            return
        if given := [name for name, value in others.items() if value]:
            raise TrainError(
                f"{given[0]}: not with {stream}, which are learnt from as a whole; leave one of them out"
            )

    def _check_weights(self) -> None:
        if not self.weights:
            return
        if len(self.weights) != len(self.sequences):
            raise TrainError(
                f"--weights: {len(self.weights)} numbers for {len(self.sequences)} --sequences; give one each"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise TrainError(f"--weights {' '.join(map(str, self.weights))}: each must be positive")

    def _check_parts(self) -> None:
        """Options of parts that contradict each other."""
        if too_long := [steps for steps in self.loss.drift_steps if steps > self.time_steps]:
            raise TrainError(
                f"--loss.drift-steps {too_long[0]}: longer than a clip; raise --time-steps {self.time_steps}"
            )
        if self.sharding == "fsdp" and self.precision == "fp16":
            raise TrainError(
                "--sharding fsdp: not with --precision fp16, whose scaler knows whole gradients; use bf16"
            )
        if self.checkpoint_activations and self.model.batch_norm:
            raise TrainError(
                "--checkpoint-activations: computes clip by clip, but --model.batch-norm averages over the batch; "
                "use one of them, or a smaller --batch-size with more --accumulate"
            )


def preset_config(name: str) -> TrainConfig:
    """What `train --preset NAME` starts from: the papers' loss and rate; for `tiny`, ours, what the ablation found.

    That is lengths of errors instead of squares, clips that grow, and no state carried from clip to clip: together
    they leave 13.2 +- 0.8 % and 5.6 +- 0.2 degrees in 100 m; the papers' way, 18.4 +- 3.3 and 12.9 +- 3.3
    (45 epochs, three seeds, `benchmarks/RESULTS.md`).

    Raises:
        ModelError: an unknown preset.
    """
    config = TrainConfig(model=preset(name))
    if name != "tiny":
        return config
    return dataclasses.replace(
        config,
        batch_size=4,
        time_steps=8,
        carry_clips=1,
        curriculum_epochs=22,
        epochs=45,
        lr=1.5e-3,
        warmup_steps=50,
        ema=0.99,
        loss=LossConfig(error="norm", rotation_weight=40.0),
    )
