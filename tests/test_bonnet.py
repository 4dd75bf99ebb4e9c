"""A car's own bonnet over rendered frames."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from convlstm_vo.world.bonnet import Bonnet


def bonnet(seed: int, height: int = 96, width: int = 320) -> Bonnet:
    return Bonnet(height, width, np.random.default_rng(seed))


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (96, 320), dtype=np.uint8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_it_hides_the_lower_edge_and_leaves_the_street(seed):
    own, street = bonnet(seed), noise(seed)
    seen = own.over(street)
    assert seen.dtype == np.uint8
    assert np.array_equal(seen[~own.under], street[~own.under])
    assert own.under[-1].mean() > 0.3
    assert not own.under[: round(0.78 * 96)].any()
    assert (own.under[:-1] <= own.under[1:]).all()  # and reaches down to it


def test_one_is_as_its_seed_says():
    street = noise(0)
    assert np.array_equal(bonnet(3).over(street), bonnet(3).over(street))
    assert not np.array_equal(bonnet(3).over(street), bonnet(4).over(street))


def test_most_mirror_the_street_and_others_stay_as_they_are():
    changes = []
    for seed in range(60):
        own = bonnet(seed)
        changes.append(np.array_equal(own.over(noise(1))[own.under], own.over(noise(2))[own.under]))
    assert 0.2 < np.mean(changes) < 0.5


def test_a_polished_one_mirrors_what_is_over_it():
    own = next(b for b in map(bonnet, range(20)) if b._shine)
    dark, bright = np.zeros((96, 320), np.uint8), np.zeros((96, 320), np.uint8)
    bright[50:60] = 200
    changed = own.over(bright).astype(int) - own.over(dark)
    assert (changed[own.under] >= 0).all()
    assert changed[own.under].max() > 30
    assert (changed[50:60] == 200)[~own.under[50:60]].all()
