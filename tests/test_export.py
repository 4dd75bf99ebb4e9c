"""The learned flow as ONNX: the same figures, a file that explains itself, and one clear error for each mistake."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from convlstm_vo import cli, export
from convlstm_vo.errors import ConvlstmVoError
from convlstm_vo.export import ExportError, export_flow
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint, save_checkpoint
from convlstm_vo.models.config import preset
from convlstm_vo.models.correlation import correlate
from convlstm_vo.models.geometric import GeometricNet
from convlstm_vo.models.network import OdometryNet
from tests.test_cli import fails
from tests.test_flow import texture

DOCS = (Path(__file__).parents[1] / "docs/onnx.md").read_text(encoding="utf-8")
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def net() -> GeometricNet:
    loaded = load_checkpoint()
    assert isinstance(loaded, GeometricNet)
    return loaded


@pytest.fixture(scope="module")
def small(net: GeometricNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "new" / "flow.onnx"
    difference = export_flow(net, path, height=HEIGHT, width=WIDTH)
    assert difference is not None and difference < 1e-3
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the command, of the size of most use; other sides of the grid than whole blocks of the correlation."""
    path = tmp_path_factory.mktemp("onnx") / "flow.onnx"
    cli.main(["export", "--out", str(path), "--height", "184", "--width", "632"])
    return path


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, small: Path) -> onnx.ModelProto:
    """A graph that is exported already, for tests of what comes after."""
    model = onnx.load(small)
    model.ClearField("metadata_props")
    monkeypatch.setattr(export, "_exported", lambda *arguments: model)
    return model


def by_onnxruntime(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["prev", "curr", "predicted"]
    assert [x.name for x in session.get_outputs()] == ["flow", "log_scale"]
    feed = dict(zip(("prev", "curr", "predicted"), (x.numpy() for x in inputs), strict=True))
    return [torch.from_numpy(x) for x in session.run(None, feed)]


@pytest.mark.parametrize(("name", "height", "width"), [("small", 64, 96), ("wide", 184, 632)])
def test_onnxruntime_gives_the_figures_of_torch(
    name: str, height: int, width: int, net: GeometricNet, request: pytest.FixtureRequest
) -> None:
    prev = texture(height, width, seed=1)
    shift = np.array([[1.01, 0.01, 3.3], [-0.01, 1.01, -2.2]], np.float32)
    moved = cv2.warpAffine(prev[0, 0].numpy(), shift, (width, height), borderMode=cv2.BORDER_REFLECT)
    predicted = torch.randn(1, 2, height // 4, width // 4, generator=torch.Generator().manual_seed(2))
    inputs = (prev, torch.from_numpy(moved)[None, None], predicted)
    flow, log_scale = by_onnxruntime(request.getfixturevalue(name), *inputs)
    with torch.inference_mode():
        expected = net.flow(*inputs)
    assert flow.std() > 0.5
    torch.testing.assert_close(flow, expected.flow, atol=1e-3, rtol=0)
    torch.testing.assert_close(log_scale, expected.log_scale, atol=1e-3, rtol=0)


def test_export_leaves_the_network_as_it_was(small: Path, net: GeometricNet) -> None:
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.flow.parameters())
    assert not net.training


@pytest.mark.parametrize("radius", [2, 4])
def test_correlation_is_the_same_to_the_last_bit_while_exporting(
    monkeypatch: pytest.MonkeyPatch, radius: int
) -> None:
    prev, curr = torch.randn(2, 2, 5, 9, 17)
    expected = correlate(prev, curr, radius)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(correlate(prev, curr, radius), expected)


def test_the_file_explains_itself(small: Path) -> None:
    model = onnx.load(small)
    onnx.checker.check_model(model, full_check=True)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert "0..255" in told["prev"] and "pixels (x, y)" in told["flow"] and "solver" in told["not_included"]
    assert "x = 4 c + 1.5" in told["grid"]
    weights = (DEFAULT_CHECKPOINT / "model.safetensors").read_bytes()
    assert told["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert [path.name for path in small.parent.iterdir()] == ["flow.onnx"]  # no side file
    assert str(Path(export.__file__).parent).encode() not in small.read_bytes()
    assert small.stat().st_size < 1_500_000


def test_the_example_in_the_documentation_runs(small: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    (tmp_path / "flow.onnx").write_bytes(small.read_bytes())
    image = texture(128, 256)[0, 0].numpy().astype(np.uint8)
    cv2.imwrite(str(tmp_path / "000000.png"), image)
    cv2.imwrite(str(tmp_path / "000001.png"), np.roll(image, 5, 1))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x, y = map(float, re.findall(r"-?\d+\.\d+", done.stdout)[:2])
    assert abs(x - 5 * WIDTH / 256) < 0.2 and abs(y) < 0.2


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(190, 640, "height 190: .* divisible by 8; 192"), (192, 636, "width 636"), (0, 640, "height 0: .*; 8 is"),
     (-8, 640, "height -8")],
)  # fmt: skip
def test_sizes_that_it_cannot_take(
    net: GeometricNet, tmp_path: Path, height: int, width: int, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_flow(net, tmp_path / "flow.onnx", height=height, width=width)
    assert not list(tmp_path.iterdir())


def test_other_figures_than_those_of_torch_are_refused(
    net: GeometricNet, ready: onnx.ModelProto, tmp_path: Path
) -> None:
    (tmp_path / "flow.onnx").write_bytes(b"from before")
    (bias,) = [x for x in ready.graph.initializer if x.name == "flow.fine_flow.bias"]
    for wrong in (0.01, np.nan):
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(2, wrong, np.float32), bias.name))
        with pytest.raises(ExportError, match=r"flow.onnx: not written: onnxruntime differs from torch by"):
            export_flow(net, tmp_path / "flow.onnx", height=HEIGHT, width=WIDTH)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"from before"]


def test_what_is_not_installed(
    tmp_path: Path, ready: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "flow.onnx"
    arguments = ["export", "--out", str(out), "--height", str(HEIGHT), "--width", str(WIDTH)]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "export needs onnxscript: pip install 'convlstm-vo[onnx]'" in fails(arguments, capsys)
        assert not out.exists()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cli.main(arguments)
    assert "not compared with torch: onnxruntime is missing" in capsys.readouterr().out
    assert out.exists()


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "flow.onnx")]
    assert "no checkpoint there" in fails(["export", *out, "--checkpoint", str(tmp_path)], capsys)
    other = tmp_path / "tiny"
    save_checkpoint(other, OdometryNet(preset("tiny"), seed=0))
    message = fails(["export", *out, "--checkpoint", str(other)], capsys)
    assert "preset 'tiny' has no learned flow: only the default network" in message
    assert "is a folder, but the export is one file" in fails(["export", "--out", str(tmp_path)], capsys)
    (tmp_path / "file").touch()
    message = fails(["export", "--out", str(tmp_path / "file" / "flow.onnx")], capsys)
    assert "flow.onnx: cannot be written" in message
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "file"}


def test_errors_are_the_project_s() -> None:
    assert issubclass(ExportError, ConvlstmVoError)
