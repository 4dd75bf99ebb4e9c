"""Recurrent cells: the figures of the original, gradients, sizes, and what memory means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convlstm_vo.models.cells import CELLS, ConvGRUCell, ConvLSTMCell, StackedLSTM
from convlstm_vo.models.config import ModelError, preset
from convlstm_vo.models.tensorflow_weights import load_tensorflow_weights

CHANNELS, HEIGHT, WIDTH = 3, 4, 5
MAKE = {
    "convlstm": lambda: ConvLSTMCell(CHANNELS, 2),
    "convlstm with all options": lambda: ConvLSTMCell(
        CHANNELS, 2, peepholes=True, layer_norm=True, image_size=(HEIGHT, WIDTH)
    ),
    "convgru": lambda: ConvGRUCell(CHANNELS, 2),
    "convgru with layer norm": lambda: ConvGRUCell(CHANNELS, 2, layer_norm=True),
    "lstm": lambda: StackedLSTM(CHANNELS * HEIGHT * WIDTH, 4, layers=2),
}
every_cell = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def random_input(batch: int = 2, size: tuple[int, int] = (HEIGHT, WIDTH), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, *size, generator=generator)


def reference(shared: Path, variant: str) -> tuple[dict[str, np.ndarray], Tensor, dict[str, Tensor]]:
    """Weights of a variant, its input (batch, time, channels, height, width), and its results, channels first."""
    with np.load(shared / "reference" / "convlstm_reference.npz") as file:
        arrays = {name.removeprefix(f"{variant}/"): file[name] for name in file if name.startswith(f"{variant}/")}
        frames = torch.from_numpy(file["input"]).movedim(-1, 2)
    results = {
        name: torch.from_numpy(arrays.pop(name)).movedim(-1, -3)
        for name in ("output", "final_c", "final_h")
        if name in arrays
    }
    return arrays, frames, results


def run(cell: nn.Module, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs (batch, time, ...) over a sequence of inputs, and the last state."""
    state = cell.zero_state(frames[:, 0])
    outputs = []
    for x in frames.unbind(1):
        output, state = cell(x, state)
        outputs.append(output)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("variant", ["peephole_layernorm", "peephole", "layernorm", "plain"])
def test_convlstm_gives_the_figures_of_the_original(shared: Path, variant: str) -> None:
    weights, frames, expected = reference(shared, variant)
    cell = ConvLSTMCell(
        16, 12, peepholes="peephole" in variant, layer_norm="layernorm" in variant, image_size=(6, 20)
    )
    load_tensorflow_weights(cell, weights)
    outputs, (c, h) = run(cell, frames)
    torch.testing.assert_close(outputs, expected["output"], atol=1e-5, rtol=0)
    torch.testing.assert_close(c, expected["final_c"], atol=1e-5, rtol=0)
    torch.testing.assert_close(h, expected["final_h"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["gru_layernorm", "gru"])
def test_convgru_gives_the_figures_of_the_original(shared: Path, variant: str) -> None:
    weights, frames, expected = reference(shared, variant)
    cell = ConvGRUCell(16, 12, layer_norm="layernorm" in variant)
    load_tensorflow_weights(cell, weights)
    outputs, (h,) = run(cell, frames)
    torch.testing.assert_close(outputs, expected["output"], atol=1e-5, rtol=0)
    torch.testing.assert_close(h, expected["final_h"], atol=1e-5, rtol=0)


def test_tensorflow_weights_of_other_options_are_refused(shared: Path) -> None:
    weights, _, _ = reference(shared, "peephole")
    with pytest.raises(ModelError, match=r"'conv.bias'.*nothing|'norm_j|peepholes"):
        load_tensorflow_weights(ConvLSTMCell(16, 12, layer_norm=True), weights)
    with pytest.raises(ModelError, match=r"conv.weight.*shape \(48, 28, 3, 3\)"):
        load_tensorflow_weights(ConvLSTMCell(8, 12, peepholes=True, image_size=(6, 20)), weights)


def test_tensorflow_weights_of_another_cell_beside_are_refused(shared: Path) -> None:
    weights, _, _ = reference(shared, "gru")
    cell = ConvGRUCell(16, 12)
    name = next(iter(weights))
    with pytest.raises(ModelError, match="TensorFlow weights foo are not of such a cell"):
        load_tensorflow_weights(cell, {**weights, "foo": weights[name]})
    with pytest.raises(ModelError, match="are there twice; give those of one cell"):
        load_tensorflow_weights(cell, {**weights, f"cell_1/{name}": weights[name]})


def test_stacked_lstm_equals_torch_lstm() -> None:
    cell, theirs = StackedLSTM(7, 5, layers=2), nn.LSTM(7, 5, num_layers=2, batch_first=True)
    order = [0, 2, 1, 3]  # ours i, j, f, o; torch's i, f, g, o
    with torch.no_grad():
        for layer, (weight, bias) in enumerate(zip(cell.weights, cell.biases, strict=True)):
            bias.normal_()
            gates = [weight.chunk(4)[i] for i in order]
            offsets = [bias.chunk(4)[i] + (1 if i == 2 else 0) for i in order]
            kernel = torch.cat(gates)
            getattr(theirs, f"weight_ih_l{layer}").copy_(kernel[:, :-5])
            getattr(theirs, f"weight_hh_l{layer}").copy_(kernel[:, -5:])
            getattr(theirs, f"bias_ih_l{layer}").copy_(torch.cat(offsets))
            getattr(theirs, f"bias_hh_l{layer}").zero_()
    x = torch.randn(3, 4, 7)
    outputs, state = run(cell, x)
    expected, (h, c) = theirs(x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(torch.stack(state[0::2]), c)
    torch.testing.assert_close(torch.stack(state[1::2]), h)


@every_cell
def test_gradients_are_those_of_finite_differences(make) -> None:
    cell = make().double()
    x = random_input(1).double().requires_grad_()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_(0, 0.3)
        state = tuple(torch.randn_like(part) for part in cell.zero_state(x))
    names, parameters = zip(*cell.named_parameters(), strict=True)

    def step(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        weights, parts = dict(zip(names, values, strict=False)), values[len(names) :]
        output, new = torch.func.functional_call(cell, weights, (x, parts))
        return (output, *new)

    inputs = (x, *parameters, *(part.requires_grad_() for part in state))
    assert torch.autograd.gradcheck(step, inputs, fast_mode=True)


@every_cell
def test_rows_of_a_batch_do_not_see_each_other(make) -> None:
    cell = make()
    x = torch.stack([random_input(seed=seed) for seed in range(3)], 1)
    together, _ = run(cell, x)
    alone, _ = run(cell, x[1:])
    torch.testing.assert_close(together[1:], alone)


@every_cell
def test_state_carries_the_past(make) -> None:
    cell = make()
    past, _ = run(cell, torch.stack([random_input(seed=1), random_input(seed=0)], 1))
    fresh, _ = run(cell, random_input(seed=0)[:, None])
    assert (past[:, 1] - fresh[:, 0]).abs().max() > 1e-3


@every_cell
def test_step_leaves_the_given_state_alone(make) -> None:
    cell = make()
    state = cell.zero_state(random_input())
    copies = [part.clone() for part in state]
    cell(random_input(), state)
    for part, copy in zip(state, copies, strict=True):
        torch.testing.assert_close(part, copy, rtol=0, atol=0)


@every_cell
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 weights"])
def test_state_stays_in_float32(make, weights: torch.dtype) -> None:
    cell = make().to(weights)
    frames = torch.stack([random_input(seed=seed) for seed in range(3)], 1).to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        _, state = run(cell, frames)
    assert {part.dtype for part in state} == {torch.float32}


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 4)])
@pytest.mark.parametrize("make", [MAKE["convlstm"], MAKE["convgru"], MAKE["convgru with layer norm"]])
def test_convolutional_cells_take_any_size(make, size: tuple[int, int]) -> None:
    cell = make()
    output, _ = run(cell, random_input(size=size)[:, None])
    assert output.shape == (2, 1, 2, *size)
    assert cell.output_shape((CHANNELS, *size)) == (2, *size)


def test_peepholes_bind_the_size() -> None:
    with pytest.raises(ModelError, match="image_size"):
        ConvLSTMCell(3, 2, peepholes=True)
    cell, x = MAKE["convlstm with all options"](), random_input(size=(4, 6))
    with pytest.raises(ModelError, match=r"4x6.*peepholes are for 4x5"):
        cell(x, cell.zero_state(x))


def test_lstm_refuses_another_size() -> None:
    cell, x = MAKE["lstm"](), random_input(size=(4, 6))
    with pytest.raises(ModelError, match=r"72 numbers.*built for 60"):
        cell(x, cell.zero_state(x))


def test_gru_has_no_peepholes() -> None:
    config = preset("tiny", cell="convgru", peepholes=True)
    with pytest.raises(ModelError, match="no cell state for peepholes"):
        ConvGRUCell.from_config(config, (3, 4, 5))


def test_dropout_between_layers_is_for_training_only() -> None:
    cell, x = StackedLSTM(6, 8, layers=2, dropout=0.5), torch.randn(2, 6)
    state = cell.zero_state(x)
    trained = [cell(x, state)[0] for _ in range(4)]
    assert any((trained[0] != other).any() for other in trained[1:])
    cell.eval()
    torch.testing.assert_close(cell(x, state)[0], cell(x, state)[0], rtol=0, atol=0)


def test_registry_builds_from_a_config() -> None:
    for name, cell_class in CELLS.items():
        cell = cell_class.from_config(preset("tiny", cell=name, hidden_channels=4), (CHANNELS, HEIGHT, WIDTH))
        output, _ = run(cell, random_input()[:, None])
        assert output.shape[2:] == cell.output_shape((CHANNELS, HEIGHT, WIDTH))
