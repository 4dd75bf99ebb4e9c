"""The default network's learned flow as one ONNX file, for runtimes without torch.

Only `FlowNet` goes out: two frames and a predicted flow in, the flow and its uncertainty out. Prediction, solver,
ConvLSTM and search stay in Python: they loop until done and branch on what they find, and the solver is what makes
metres of pixels.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo import __version__
from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.geometry.files import replacing
from convlstm_vo.models.checkpoint import Network, weights_sha256
from convlstm_vo.models.flow import STRIDE, FlowNet
from convlstm_vo.models.geometric import GeometricNet

if TYPE_CHECKING:
    from onnx import ModelProto

INPUTS, OUTPUTS = ("prev", "curr", "predicted"), ("flow", "log_scale")
MOST_DIFFERENCE = 1e-3  # pixels for the flow, and the same number for log_scale
_DIVISOR = 8  # the coarsest cells are 8x8 pixels
_OPSET = 18  # the oldest that torch writes without converting; GridSample came with 16
_MEANING = {
    "title": "Learned optical flow of convlstm-vo: where each cell of the previous frame is in the current one",
    "prev": "previous frame: grey levels 0..255, float32 (1, 1, height, width), without lens distortion",
    "curr": "current frame, as prev",
    "predicted": "flow that is expected, pixels (x, y), float32 (1, 2, height/4, width/4), from -1000 to 1000; "
    "zeros where nothing is known, and then displacements of up to some 30 pixels are found",
    "flow": "pixels (x, y) at the size of the input: what is at p in prev is at p + flow in curr",
    "log_scale": "natural logarithm of the Laplace scale of the error in pixels, for x as for y, as flow",
    "grid": f"stride {STRIDE}: the cell of row r and column c is about pixel x = {STRIDE} c + {(STRIDE - 1) / 2}, "
    f"y = {STRIDE} r + {(STRIDE - 1) / 2} of prev; (0, 0) is the middle of the first pixel",
    "frames": "x right, y down, z forward (OpenCV, KITTI)",
    "not_included": "prediction, solver, ConvLSTM, search: a motion needs the Python package",
}


class ExportError(ConvlstmVoError):
    """A network that cannot be exported, at this size or on this machine."""


class _Flow(nn.Module):
    """`FlowNet` with what inference needs, as plain tensors: an exporter knows no `FlowField`."""

    def __init__(self, flow: FlowNet) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, prev: Tensor, curr: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        field = self.flow(prev, curr, predicted)
        return field.flow, field.log_scale


def export_flow(net: Network, path: Path, *, height: int, width: int) -> float | None:
    """Write the learned flow of the default network as ONNX, and compare the file with torch.

    The file has the inputs `INPUTS` and the outputs `OUTPUTS`, float32, of fixed size; units and coordinates stand
    in its ``metadata_props``, with the SHA-256 of the weights (that of the checkpoint's ``model.safetensors``).

    Args:
        net: the default network; it is not changed.
        path: file to write, in one piece; what stood there is replaced if all went well.
        height, width: of the frames, in pixels, divisible by 8.

    Returns:
        The largest difference from torch on a random textured pair, in pixels; None where onnxruntime is missing.

    Raises:
        ExportError: another network, a size that it cannot take, onnx or onnxscript missing, or a file whose
            figures differ from torch by more than `MOST_DIFFERENCE`; no file is left behind.
        WriteError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(net, GeometricNet):
        raise ExportError(
            f"preset '{net.config.preset}' has no learned flow: only the default network (preset geometric) can be "
            "exported to ONNX; leave --checkpoint out, or give one of `convlstm-vo train-geometric`"
        )
    for name, value in (("height", height), ("width", width)):
        if value < _DIVISOR or value % _DIVISOR:
            near = max(_DIVISOR, round(value / _DIVISOR) * _DIVISOR)
            raise ExportError(f"{name} {value}: must be positive and divisible by {_DIVISOR}; {near} is nearest")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder, but the export is one file; add a name, such as flow.onnx")
    _need_onnx()
    with replacing(path) as temporary:
        module = _Flow(copy.deepcopy(net.flow)).cpu().float().eval()
        model = _exported(module, height, width)
        identity = {"convlstm_vo": __version__, "preset": net.config.preset, "weights_sha256": weights_sha256(net)}
        for key, text in (_MEANING | identity).items():
            model.metadata_props.add(key=key, value=text)
        with temporary.open("wb") as stream:
            stream.write(model.SerializeToString())
            stream.flush()
            os.fsync(stream.fileno())
        difference = _difference(module, temporary, height, width)
        if difference is not None and not difference <= MOST_DIFFERENCE:  # so that NaN is refused
            raise ExportError(
                f"{path}: not written: onnxruntime differs from torch by {difference:.2g} px there, more than "
                f"{MOST_DIFFERENCE:g}; try other versions of torch and onnxruntime"
            )
    return difference


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"export needs {error.name}: pip install 'convlstm-vo[onnx]'") from None


def _exported(module: nn.Module, height: int, width: int) -> ModelProto:
    """The graph with its weights."""
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            _textured_pair(height, width),
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    # torch notes the line of source that each operation comes from: a third of the file, and paths of this machine.
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, *model.graph.input):
        part.ClearField("metadata_props")
    for output in model.graph.output:
        output.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what a user can do nothing about: torchvision, which is not needed, and torch's own old calls."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch.export copies its own tree specifications with a class that torch deprecates (2.13).
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        log.setLevel(before)


def _difference(module: nn.Module, path: Path, height: int, width: int) -> float | None:
    """Largest difference between torch and the file in onnxruntime; None where that is missing."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    pair = _textured_pair(height, width)
    found = session.run(list(OUTPUTS), {name: x.numpy() for name, x in zip(INPUTS, pair, strict=True)})
    with torch.inference_mode():
        expected = module(*pair)
    differences = [(torch.from_numpy(a) - b).abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(differences).max())


def _textured_pair(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of many sizes, moved by 2.25 and -1.5 pixels, and a prediction that is wrong by a pixel or so."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 1, height, width)
    for size in (2, 4, 16):
        cells = torch.randn(1, 1, -(-height // size) + 1, -(-width // size) + 1, generator=generator)
        image = image + F.interpolate(cells, size=(height, width), mode="bicubic", align_corners=False)
    image = (110 + 30 * image).clamp(0, 255)
    y, x = torch.meshgrid(torch.arange(height) + 1.5, torch.arange(width) - 2.25, indexing="ij")
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)[None]
    moved = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    predicted = torch.tensor([2.0, -1.0])[None, :, None, None]
    return image, moved, predicted + torch.randn(1, 2, height // STRIDE, width // STRIDE, generator=generator)
