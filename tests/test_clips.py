"""Clips: every label true, every lane without gaps, every epoch the same again from its seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convlstm_vo.geometry import se3
from convlstm_vo.geometry.trajectory import Trajectory
from convlstm_vo.training.cache import DecodedSequence
from convlstm_vo.training.clips import (
    NO_AUGMENTATION,
    AugmentConfig,
    Batch,
    Clip,
    ClipError,
    EpochPlan,
    augment_photometric,
    collate,
    photometric_draws,
    sequential_clips,
)

ALL = AugmentConfig(mirror=0.5, reverse=0.5, skip=(1, 2))


def make_sequence(frames: int, seed: int = 0) -> DecodedSequence:
    """Frames whose pixels tell their number, on a random path."""
    rng = np.random.default_rng(seed)
    images = np.zeros((frames, 2, 4, 1), np.uint8)
    images[..., 0] = np.arange(frames)[:, None, None] * 4 + np.arange(4)
    motions = np.concatenate([rng.normal(size=(frames - 1, 3)), 0.1 * rng.normal(size=(frames - 1, 3))], 1)
    return DecodedSequence(
        "test", images, np.array([2.0, 3.0, 1.2, 0.5]), Trajectory.from_motions(motions).T_world_camera
    )


plans = st.builds(
    EpochPlan,
    lengths=st.lists(st.integers(15, 60), min_size=1, max_size=4).map(tuple),
    time_steps=st.integers(1, 6),
    batch_size=st.integers(1, 7),
    carry_clips=st.integers(0, 4),
    augment=st.sampled_from([NO_AUGMENTATION, AugmentConfig(), ALL]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60)
@given(plans, st.integers(0, 3))
def test_lanes_have_no_gaps(plan: EpochPlan, epoch: int) -> None:
    previous: list[Clip | None] = [None] * plan.batch_size
    carried = [0] * plan.batch_size
    for step in plan(epoch):
        assert len(step) == plan.batch_size
        for lane, clip in enumerate(step):
            assert len(clip.frames) == plan.time_steps + 1
            assert min(clip.frames) >= 0 and max(clip.frames) < plan.lengths[clip.sequence]
            strides = set(np.diff(clip.frames).tolist())
            assert len(strides) == 1 and abs(strides.pop()) in plan.augment.skip
            before = previous[lane]
            carried[lane] = 1 if clip.fresh else carried[lane] + 1
            if not clip.fresh:
                assert before is not None and before.frames[-1] == clip.frames[0]
                assert (before.sequence, before.mirror) == (clip.sequence, clip.mirror)
                assert np.diff(before.frames)[0] == np.diff(clip.frames)[0]
            assert not plan.carry_clips or carried[lane] <= plan.carry_clips
            previous[lane] = clip


@settings(max_examples=20)
@given(plans)
def test_epochs_are_functions_of_the_seed(plan: EpochPlan) -> None:
    assert list(plan(1)) == list(plan(1))
    assert len(list(plan(0))) == plan.steps


def test_epochs_differ_and_show_nearly_every_motion() -> None:
    plan = EpochPlan((101, 201), 5, 4, 3, NO_AUGMENTATION, seed=1)
    first, second = list(plan(0)), list(plan(1))
    assert first != second
    shown = {(clip.sequence, frame) for step in first for clip in step for frame in clip.frames[1:]}
    assert len(shown) >= 0.9 * 300


def test_weights_say_how_often_a_sequence_is_shown() -> None:
    plan = EpochPlan((61, 61, 61), 3, 2, 2, NO_AUGMENTATION, seed=0, weights=(1.0, 3.0, 0.5))
    clips = [clip.sequence for epoch in range(8) for step in plan(epoch) for clip in step]
    shares = np.bincount(clips) / len(clips)
    np.testing.assert_allclose(shares, np.array([1, 3, 0.5]) / 4.5, atol=0.06)
    assert plan.steps == 4.5 * 20 // 2
    once = dataclasses.replace(plan, weights=())
    assert once.steps == 30
    with pytest.raises(ClipError, match="2 weights for 3 sequences"):
        dataclasses.replace(plan, weights=(1.0, 2.0))


def test_a_reset_every_clip_when_nothing_is_carried() -> None:
    plan = EpochPlan((50,), 5, 2, 1, NO_AUGMENTATION, seed=0)
    assert all(clip.fresh for step in plan(0) for clip in step)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.booleans(), st.booleans(), st.sampled_from([1, 2, 3]))
def test_labels_are_true_under_augmentation(seed: int, mirror: bool, reverse: bool, skip: int) -> None:
    """Chained labels must lead where the poses say, seen through the mirror where there is one."""
    sequence = make_sequence(13, seed)
    frames = np.arange(0, 13, skip)[:4]
    frames = frames[::-1] if reverse else frames
    batch = collate([sequence], (Clip(0, tuple(frames.tolist()), mirror, True),))
    chained = Trajectory.from_motions(batch.motions[0].double().numpy()).T_world_camera[-1]
    expected = se3.relative(sequence.T_world_camera[frames[0]], sequence.T_world_camera[frames[-1]])
    flip = np.diag([-1.0, 1, 1, 1]) if mirror else np.eye(4)
    np.testing.assert_allclose(chained, flip @ expected @ flip, atol=1e-5)
    numbers = batch.images[0, :, 0, 0, 3 if mirror else 0].numpy() // 4
    np.testing.assert_array_equal(numbers, frames)


def test_mirrored_clips_have_mirrored_images_and_intrinsics() -> None:
    sequence = make_sequence(4)
    plain, mirrored = (collate([sequence], (Clip(0, (0, 1, 2), flag, True),)) for flag in (False, True))
    torch.testing.assert_close(mirrored.images.flip(-1), plain.images)
    assert mirrored.images.shape == (1, 3, 1, 2, 4) and mirrored.images.dtype == torch.uint8
    torch.testing.assert_close(mirrored.intrinsics, torch.tensor([[2.0, 3.0, 4 - 1 - 1.2, 0.5]]))


def test_sequential_clips_show_every_motion_once_and_in_order() -> None:
    for length in range(2, 30):
        clips = sequential_clips(length, 5)
        pairs = [pair for clip in clips for pair in zip(clip.frames, clip.frames[1:], strict=False)]
        assert pairs == [(i, i + 1) for i in range(length - 1)]
        assert [clip.fresh for clip in clips] == [True] + [False] * (len(clips) - 1)


def test_photometric_changes_are_one_a_clip_and_the_same_from_a_seed() -> None:
    images = torch.randint(0, 256, (6, 3, 1, 4, 5), dtype=torch.uint8)
    images[:, 1] = images[:, 0]
    first, second = (augment_photometric(images, AugmentConfig(), photometric_draws(6, seed=3)) for _ in range(2))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first[:, 1], first[:, 0])
    assert first.min() >= 0 and first.max() <= 255
    change = (first - images.float()).abs().mean((1, 2, 3, 4))
    assert change.min() > 0.5 and change.std() > 0.5
    unchanged = augment_photometric(images, NO_AUGMENTATION, photometric_draws(6, seed=0))
    torch.testing.assert_close(unchanged, images.float(), atol=0.3, rtol=0)
    lanes = slice(1, None, 2)  # of one of two processes
    part = augment_photometric(images[lanes], AugmentConfig(), photometric_draws(6, seed=3)[:, lanes])
    torch.testing.assert_close(part, first[lanes])


def test_batches_move_with_all_their_parts() -> None:
    batch = collate([make_sequence(4)], (Clip(0, (0, 1, 2), False, True),)).to(torch.device("meta"))
    tensors = [getattr(batch, field.name) for field in dataclasses.fields(Batch) if field.name != "clips"]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_sequences_too_short_for_a_clip() -> None:
    with pytest.raises(ClipError, match=r"sequences of \[4, 5\] frames give no clip: one needs 5 motions, so 6"):
        EpochPlan((4, 5), 5, 1, 1, NO_AUGMENTATION, 0)


@pytest.mark.parametrize("values", [{"mirror": 1.5}, {"skip": ()}, {"skip": (0,)}, {"contrast": -0.1}])
def test_impossible_augmentation(values: dict[str, object]) -> None:
    with pytest.raises(ClipError, match=next(iter(values))):
        AugmentConfig(**values)  # type: ignore[arg-type]
