"""Forecast bouncing digits: the ConvLSTM cell on the task that it was made for, against a fully connected LSTM.

The encoder-forecaster of Shi et al. 2015 (https://arxiv.org/abs/1506.04214): three layers read 10 frames, three
more start from their states and go on for 10 frames without any input. Two digits bounce in 64x64 pixels and are
drawn on the spot. The table gives the cross-entropy a frame on sequences of digits that were never trained on.

python examples/nowcasting.py --out nowcasting              # two networks of equal size, 4 minutes each
python examples/nowcasting.py --out wide --lstm-width 256   # a fully connected one with many more parameters
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from convlstm_vo.models.cells import ConvLSTMCell, StackedLSTM
from convlstm_vo.progress import progress
from convlstm_vo.training.config import TrainConfig
from convlstm_vo.training.devices import resolve_precision

SIZE, GLYPH, PATCH = 64, 28, 4  # pixels: of a frame, a digit, and the patches that become channels
SEEN, AHEAD = 10, 10  # frames
WARMUP, CLIP = 20, 1000.0  # updates; nats a frame
DARK = -3.0  # logit of a pixel before anything is learned: most are dark
MAP = (PATCH * PATCH, SIZE // PATCH, SIZE // PATCH)  # a frame as networks see it: (channels, height, width)


@dataclasses.dataclass(frozen=True)
class Options:
    """Train both networks, print the table, write nowcasting.png and results.json."""

    out: Path = Path("runs/nowcasting")
    """Folder to write."""
    minutes: float = 4.0
    """Training time of each network."""
    updates: int = 0
    """Train for so many updates instead, however long they take: the same seed then gives the same figures."""
    widths: tuple[int, int, int] = (32, 16, 16)
    """Channels of the ConvLSTM's layers (the paper: 128, 64, 64)."""
    lstm_width: int = 0
    """Units of each layer of the fully connected LSTM; 0: as many as give it the ConvLSTM's parameters."""
    batch_size: int = 4
    """Sequences in an update."""
    lr: float = 1e-2
    """Peak learning rate of Adam for the ConvLSTM; it falls to zero along a cosine."""
    lstm_lr: float = 3e-3
    """The same for the fully connected LSTM, which learns worse at 1e-3 and 1e-2."""
    test_sequences: int = 200
    """Sequences to measure on."""
    seed: int = 0


# --- Digits -----------------------------------------------------------------------------------------------------


def draw_glyphs(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Digits in OpenCV's pen fonts, each slanted and turned a little: (count, 28, 28), 0..1."""
    fonts = [cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX]
    glyphs = np.zeros((count, GLYPH, GLYPH), np.float32)
    for i in range(count):
        large = np.zeros((4 * GLYPH, 4 * GLYPH), np.uint8)
        font, thickness = fonts[rng.integers(len(fonts))], int(rng.integers(6, 12))
        cv2.putText(large, str(i % 10), (26, 92), font, 3.3, 255, thickness, cv2.LINE_AA)
        slant, turn = rng.uniform(-0.2, 0.2, 2)
        A = np.array([[math.cos(turn), slant - math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        centre = np.full(2, 2.0 * GLYPH)
        large = cv2.warpAffine(large, np.c_[A, centre - A @ centre], large.shape)
        glyphs[i] = cv2.resize(large, (GLYPH, GLYPH), interpolation=cv2.INTER_AREA) / 255.0
    return glyphs


def bounce(rng: np.random.Generator, frames: int) -> NDArray[np.int64]:
    """A straight way at 3 to 5 pixels a frame, reflected by the walls: (frames, 2), upper left corners."""
    angle, speed, room = rng.uniform(0, 2 * math.pi), rng.uniform(3, 5), SIZE - GLYPH
    step = speed * np.array([math.cos(angle), math.sin(angle)])
    free = rng.uniform(0, room, 2) + np.arange(frames)[:, None] * step
    return (room - np.abs(free % (2 * room) - room)).round().astype(np.int64)


def draw_sequences(count: int, glyphs: NDArray[np.float32], rng: np.random.Generator) -> Tensor:
    """Two digits each, the brighter one in front: (count, 20, 16, 16, 16), patches of 4x4 pixels as channels."""
    out = np.zeros((count, SEEN + AHEAD, SIZE, SIZE), np.float32)
    for sequence in out:
        for glyph in glyphs[rng.integers(len(glyphs), size=2)]:
            for frame, (x, y) in zip(sequence, bounce(rng, len(sequence)), strict=True):
                region = frame[y : y + GLYPH, x : x + GLYPH]
                np.maximum(region, glyph, out=region)
    return F.pixel_unshuffle(torch.from_numpy(out)[:, :, None], PATCH)


# --- Networks ---------------------------------------------------------------------------------------------------


class EncoderForecaster(nn.Module):
    """Layers that read, and layers that start from their states and go on alone.

    Args:
        encoder: cells from the lowest to the highest.
        forecaster: for each of them the cell that takes its state over; the highest one gets no input.
        readout: all outputs of the forecaster together to the logits of a frame.
    """

    def __init__(self, encoder: list[nn.Module], forecaster: list[nn.Module], readout: nn.Module) -> None:
        super().__init__()
        self.encoder, self.forecaster = nn.ModuleList(encoder), nn.ModuleList(forecaster)
        self.readout = readout
        nn.init.constant_(readout.bias, DARK)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (batch, 10, *MAP) to the logits of the next ones, (batch, 10, *MAP)."""
        states = [cell.zero_state(frames[:, 0]) for cell in self.encoder]
        for x in frames.unbind(1):
            for k, cell in enumerate(self.encoder):
                x, states[k] = cell(x, states[k])
        logits = []
        for _ in range(AHEAD):
            x, outputs = frames[:, 0, :0], []  # no channels: the future is unseen
            for k in reversed(range(len(states))):
                x, states[k] = self.forecaster[k](x, states[k])
                outputs.append(x)
            logits.append(self.readout(torch.cat(outputs, 1)).view(-1, *MAP))
        return torch.stack(logits, 1).float()


def convlstm(widths: tuple[int, ...]) -> EncoderForecaster:
    """The paper's network: 5x5 kernels, peepholes, and a 1x1 convolution over all states."""

    def cell(in_channels: int, width: int) -> nn.Module:
        return ConvLSTMCell(in_channels, width, kernel_size=5, peepholes=True, image_size=MAP[1:])

    below, above = (MAP[0], *widths[:-1]), (*widths[1:], 0)
    return EncoderForecaster(
        [cell(*pair) for pair in zip(below, widths, strict=True)],
        [cell(*pair) for pair in zip(above, widths, strict=True)],
        nn.Conv2d(sum(widths), MAP[0], 1),
    )


def lstm(width: int, layers: int) -> EncoderForecaster:
    """The same over frames as vectors: every unit sees every pixel."""
    size = math.prod(MAP)
    return EncoderForecaster(
        [StackedLSTM(size if k == 0 else width, width) for k in range(layers)],
        [StackedLSTM(0 if k == layers - 1 else width, width) for k in range(layers)],
        nn.Linear(layers * width, size),
    )


def parameters(net: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(weight.numel() for weight in net.parameters())


def width_of_size(size: int, layers: int) -> int:
    """Units a layer that give the fully connected network at least so many parameters."""
    return next(width for width in range(1, 10_000) if parameters(lstm(width, layers)) >= size)


# --- Learning and measuring -------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Nats a frame: summed over its pixels, mean over frames."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / truth.shape[:2].numel()


def autocast() -> torch.autocast:
    """bf16 where the processor has units for it."""
    bf16 = resolve_precision(TrainConfig(device="cpu")) == "bf16"
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


@torch.no_grad()
def forecast(net: EncoderForecaster, sequences: Tensor) -> Tensor:
    """Logits (count, 10, *MAP) of the last 10 frames of sequences (count, 20, *MAP)."""
    with autocast():
        return torch.cat([net(part[:, :SEEN]) for part in sequences.split(20)])


def train(name: str, net: EncoderForecaster, lr: float, glyphs: NDArray[np.float32], options: Options) -> int:
    """Learn from fresh sequences until time or updates are used up; the number of updates."""
    optimizer = torch.optim.Adam(net.parameters(), lr)
    rng = np.random.default_rng([options.seed, 1])
    updates, shown, started = 0, 0, time.perf_counter()
    total = options.updates or 60 * options.minutes
    with progress(name, math.ceil(total), unit="updates" if options.updates else "") as advance:
        while (done := updates if options.updates else time.perf_counter() - started) < total:
            rate = lr * min(1.0, (updates + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * done / total))
            update(net, optimizer, rate, draw_sequences(options.batch_size, glyphs, rng))
            updates += 1
            advance(int(done) - shown)
            shown = int(done)
    return updates


def update(net: EncoderForecaster, optimizer: torch.optim.Optimizer, rate: float, sequences: Tensor) -> None:
    """One step down the gradient."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with autocast():
        logits = net(sequences[:, :SEEN])
    optimizer.zero_grad()
    cross_entropy(logits, sequences[:, SEEN:]).backward()
    nn.utils.clip_grad_norm_(net.parameters(), CLIP)
    optimizer.step()


@dataclasses.dataclass(frozen=True)
class Result:
    """What one network learned; cross-entropies in nats a frame."""

    name: str
    parameters: int
    updates: int
    minutes: float
    untrained: float
    cross_entropy: float


def learn(
    name: str, net: EncoderForecaster, lr: float, glyphs: NDArray[np.float32], tests: Tensor, options: Options
) -> tuple[Result, Tensor]:
    """Train a network and measure it: the result, and its forecasts as logits."""
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    untrained = cross_entropy(forecast(net, tests), tests[:, SEEN:]).item()
    started = time.perf_counter()
    updates = train(name, net, lr, glyphs, options)
    minutes = (time.perf_counter() - started) / 60
    logits = forecast(net, tests)
    measured = cross_entropy(logits, tests[:, SEEN:]).item()
    return Result(name, parameters(net), updates, minutes, untrained, measured), logits


def without_learning(training: Tensor, tests: Tensor) -> dict[str, float]:
    """Cross-entropy of forecasts that need no network.

    A copied pixel is not certain to stay: "lit" and "dark" get the probabilities that training sequences give them,
    which is the best that copying can do (certainty would cost several times more).
    """
    truth, last = training[:, SEEN:], training[:, SEEN - 1 : SEEN].expand(-1, AHEAD, *MAP)
    lit, dark = truth[last >= 0.5].mean(), truth[last < 0.5].mean()
    copied = (dark + (lit - dark) * tests[:, SEEN - 1 : SEEN]).expand(-1, AHEAD, *MAP)
    mean = truth.mean((0, 1)).clamp(1e-4, 1 - 1e-4).expand_as(copied)
    forecasts = {"copy the last frame": copied, "the mean of all frames": mean}
    return {name: cross_entropy(p.logit(), tests[:, SEEN:]).item() for name, p in forecasts.items()}


# --- Telling ----------------------------------------------------------------------------------------------------


def table(results: list[Result], trivial: dict[str, float]) -> Table:
    """As table 1 of the paper."""
    shown = Table(title=f"{SEEN} frames seen, {AHEAD} forecast, two digits in {SIZE}x{SIZE} pixels")
    for heading in ("", "parameters", "updates", "minutes", "cross-entropy a frame (nats)"):
        shown.add_column(heading, justify="right" if heading else "left")
    for r in results:
        shown.add_row(r.name, f"{r.parameters:,}", f"{r.updates:,}", f"{r.minutes:.1f}", f"{r.cross_entropy:.1f}")
    for name, value in trivial.items():
        shown.add_row(name, "", "", "", f"{value:.1f}")
    return shown


def picture(path: Path, sequences: Tensor, forecasts: dict[str, Tensor]) -> None:
    """Of each sequence (20, *MAP) a block of rows: what was seen, the truth, the forecasts (logits, (10, *MAP))."""
    from matplotlib.figure import Figure

    rows = [
        (label, frames)
        for k, sequence in enumerate(sequences)
        for label, frames in [
            ("seen", sequence[:SEEN]),
            ("truth", sequence[SEEN:]),
            *((name, logits[k].sigmoid()) for name, logits in forecasts.items()),
        ]
    ]
    figure = Figure(figsize=(AHEAD, 1.02 * len(rows)), dpi=64)
    axes = figure.subplots(len(rows), AHEAD, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    figure.subplots_adjust(0.11, 0.01, 0.99, 0.99)
    for row, (label, frames) in zip(axes, rows, strict=True):
        for axis, frame in zip(row, F.pixel_shuffle(frames, PATCH)[:, 0], strict=True):
            axis.imshow(frame.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path)


def main(options: Options) -> None:
    """Both networks in turn, then the table and the picture."""
    torch.manual_seed(options.seed)
    glyphs, unseen = (draw_glyphs(500, np.random.default_rng([options.seed, part])) for part in (2, 3))
    tests = draw_sequences(options.test_sequences, unseen, np.random.default_rng([options.seed, 4]))
    training = draw_sequences(options.test_sequences, glyphs, np.random.default_rng([options.seed, 5]))
    nets = {"ConvLSTM": (convlstm(options.widths), options.lr)}
    width = options.lstm_width or width_of_size(parameters(nets["ConvLSTM"][0]), len(options.widths))
    nets["FC-LSTM"] = lstm(width, len(options.widths)), options.lstm_lr
    learned = {name: learn(name, net, lr, glyphs, tests, options) for name, (net, lr) in nets.items()}
    results = [result for result, _ in learned.values()]
    trivial = without_learning(training, tests)
    Console().print(table(results, trivial))
    options.out.mkdir(parents=True, exist_ok=True)
    picture(options.out / "nowcasting.png", tests[:2], {name: logits[:2] for name, (_, logits) in learned.items()})
    figures = {"networks": [dataclasses.asdict(result) for result in results], "trivial": trivial}
    (options.out / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"Picture and figures: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
