"""The default network: a ConvLSTM that weighs the evidence, a solver that measures.

One frame's way, from top to bottom of `GeometricNet.track`:

1. the last motion and the road as it was predict where everything will be seen;
2. a learned flow measures the rest, to a tenth of a pixel, and says how sure it is of each cell;
3. Gauss-Newton finds motion and road from all cells alike, robustly;
4. a ConvLSTM, who remembers earlier frames, looks at what does not fit and says which cells to trust, and for what;
5. Gauss-Newton again with these weights, and depths that frames before have told: motion and covariance;
6. the road's tilt, the camera's mounting, the motion and how far away all is go into the state for the next frame.

Everything inside counts lengths in camera heights, so any camera height gives metres by one factor.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_vo.geometry import se3
from convlstm_vo.models import carried, cell_kernels, fixed, kernels
from convlstm_vo.models.cells import CELLS, State
from convlstm_vo.models.config import ModelConfig, ModelError, choose
from convlstm_vo.models.flow import FlowField, FlowNet
from convlstm_vo.models.mounting import (
    LARGEST_ASIDE,
    Memory,
    direction,
    facing_ahead,
    looking_ahead,
    turned_points,
)
from convlstm_vo.models.network import seeded
from convlstm_vo.models.scene import (
    FAR,
    STRIDE,
    WALL,
    canyon_inverse_depth,
    cell_rays,
    flow_of,
    flow_to_rays,
    road_inverse_depth,
    road_normal,
    road_slopes,
    seen_after,
)
from convlstm_vo.models.solver import Carried, Priors, Residuals, Solution, residuals, road_misfit, solve
from convlstm_vo.models.solver_kernels import STILL

_FEATURES = 10  # of a cell, for the ConvLSTM
_SURE_ROAD = 0.8  # half width, in camera heights, of what is taken for road before it is looked at: no pavement
# Share of the corridor's width that counts where the lane is seen near and well. Slopes under the horizon at which
# it is seen far and near, 7.4 and 6.2 camera heights ahead: KITTI and most streets have 0.16 to 0.22, cameras over
# a bonnet or that look up 0.10 to 0.15. Standard deviations of the way by its cells, in camera heights, at which it
# is seen well and next to not: KITTI and most streets have less than 0.003, blank asphalt more than 0.004.
_NARROW, _SEEN_FAR, _SEEN_NEAR, _SEEN_WELL, _HARDLY_SEEN = 0.65, 0.135, 0.16, 0.004, 0.008
# (z, yaw) that a search tries, camera heights and radians a frame: each reaches 30 pixels around. The fastest are
# 260 km/h of a camera 1.65 m high at 10 Hz, or 130 km/h at 5 Hz; a camera that looks back moves backwards.
_SEARCHED = (
    *((speed, 0.0) for speed in (0.0, 0.6, 1.2, 1.7, 2.2, 2.8, 3.5, 4.4, -1.0)),
    *((0.4, turn) for turn in (-0.08, 0.08)),
    *((1.2, turn) for turn in (-0.12, 0.12)),  # a bend at a third of the frames: 8 degrees, 3 m
)
_TAKEN_FURTHER = 3  # of these, the likeliest
_PATIENCE = 0.1  # of `Memory.known` a frame: where a search has found no road, the next one waits for 10 frames
_STANDING, _LEAST_AGREEMENT = 0.1, 0.9  # camera heights a frame; what less than that agrees with is asked again
_BACKWARDS = 0.5  # by which a search believes less that the camera, of which nothing is known, moves backwards
_REACH_AT_REST = 1e-2  # `Priors.still` of a car that stood
# Differences of two agreements: one that says nothing, one that says enough, one that leaves no doubt.
_LIKE, _CONTRADICTED, _OBVIOUS = 0.02, 0.1, 0.2
_SEEN_ON_ROAD = 2  # cells of a column that move with us, for all above them to do so
_LEAST_LEFT = 0.3  # of all that is sure: what of it has to be left to stand
LEAST_EVIDENCE = 0.04  # of the image; a covered lens has less than 0.01, real streets 0.2 to 0.6
LEAST_CONTRAST = 2.0  # standard deviation of an image's grey levels; an even image shows no motion
_NEAR = 0.08  # slope under the horizon of the road that a search looks at: within 12 camera heights
# Of the way that is expected, what is too short whatever happens (frames may be left out), and so many standard
# deviations of its change.
_LEAST_SHARE, _STOPPED = 0.4, 3.0
_BEHIND_ROAD, _PLAIN = 0.3, 3.0  # inverse depth, of the road's; the road's flow in standard deviations, to tell
_CLEAR_AHEAD, _CLEAR_ASIDE = 3.0, 0.5  # camera heights around the camera in which nothing stands but the road
LEAST_ROAD = 0.006  # standard deviation of the way by the road alone, camera heights; streets have 0.0002 to 0.004
# Asphalt that shows next to nothing: cells there err alike, toward what was predicted, and their number is no help.
# On unseen streets and junctions the way is wrong by some 15 times that standard deviation, and by more than a
# tenth where it is also as large as this: in camera heights, and as a share of the way.
_ROAD_ERROR, _VAGUE_ROAD, _VAGUE_SHARE = 15.0, 0.0004, 0.0015
# Share of the way by which a scale that depths carry on drifts in a frame; standard deviations from 0 of an inverse
# depth that tells of it. With vaguer ones, which are hundreds, ways grow (195 % too long on one street of 16).
_SCALE_DRIFT, _CLEAR_DEPTH = 0.005, 2.0
# By what the rules on traffic, loss and search judge: the flow's error across and along, in units of what it says
# itself, and how much the way changes in a frame (and by a share of it). The solver's own, learned values are near
# these, but a longer training moves them, and a rule must not hang on that.
_OFF_ACROSS, _OFF_ALONG = 2.0, 3.2
_CHANGE, _CHANGE_SHARE = 0.08, 0.5
_ANY_CHANGE = 3.0  # camera heights: of a way of which nothing is known
_GUESS_OFF = 0.3  # by which a search's guess of it may be short
# Of a leap ahead: standard deviations of the way's change; times the way before.
_LEAP, _LEFT_OUT = 4.0, 2.5
# A camera that looks so far above or below where it seems to drive is asked again where that is; and where else if
# what it says cannot be.
_TILTED, _ELSEWHERE, _AS_GOOD = 0.03, 0.12, 0.7


@dataclasses.dataclass
class Cells:
    """The flow of a frame, a choice of its cells: what the solver and the ConvLSTM see.

    Attributes:
        rays: (batch, 3, rows, columns) in the previous frame. seen: (batch, 2, rows, columns) in the current one.
        sigma: (batch, rows, columns) standard deviation of ``seen``; 10, which tells nothing, outside the image.
        texture: (batch, rows, columns), contrast of the image there.
        depth: (batch, 2, rows, columns), inverse depth in the previous frame and information on it, from the frames
            before; None if they are not asked.
    """

    rays: Tensor
    seen: Tensor
    sigma: Tensor
    texture: Tensor
    depth: Tensor | None = None

    def without(self, blocks: Tensor | None) -> Cells:
        """The same cells, of which some, (batch, rows, columns), tell nothing."""
        return self if blocks is None else dataclasses.replace(self, sigma=torch.where(blocks, 10.0, self.sigma))

    def turned(self, rotation: Tensor) -> Cells:
        """The same cells in other axes, to which the rotation (batch, 3, 3) takes points."""
        seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1])], 1)
        depth = self.depth
        if depth is not None:
            points = torch.cat([self.rays[:, :2], depth], 1).flatten(2)
            depth = carried.turned(points, rotation)[:, 2:].unflatten(2, depth.shape[2:])
        rays, seen = turned_points(self.rays, rotation), turned_points(seen, rotation)[:, :2]
        return dataclasses.replace(self, rays=rays, seen=seen, depth=depth)


class Weigher(nn.Module):
    """Looks at the misfits of a first solution and says, for each cell, how much to trust it across and along.

    Args:
        config: cell, hidden_channels, cell_kernel, ... as of the other networks.
        rows, columns: of the grid of cells; only cells with peepholes need them.
    """

    def __init__(self, config: ModelConfig, rows: int, columns: int) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.look = nn.Sequential(nn.Conv2d(_FEATURES, 32, 3, padding=1), nn.LeakyReLU(0.1))
        self.down = nn.Sequential(
            nn.Conv2d(32, hidden, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
            nn.LeakyReLU(0.1),
        )
        shape = (hidden, -(-rows // 4), -(-columns // 4))
        self.cell = choose(CELLS, config.cell, "cell").from_config(config, shape)
        self.up = nn.Sequential(nn.Conv2d(2 * hidden, 32, 3, padding=1), nn.LeakyReLU(0.1))
        self.trust = nn.Sequential(
            nn.Conv2d(64, 32, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(32, 2, 3, padding=1)
        )
        self.whole = nn.Linear(2 * hidden, 2)
        for layer in (self.trust[-1], self.whole):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """Logarithms of trust (batch, 2, rows, columns) and of the covariance's factors (batch, 2); the state."""
        near = self.look(features)
        far = self.down(near)
        state = self.cell.zero_state(far) if state is None else state
        output, state = self.cell(far, state)
        context = torch.cat([output, far], 1)
        wide = F.interpolate(self.up(context), size=near.shape[-2:], mode="bilinear", align_corners=False)
        if wide.requires_grad:  # its gradient is a slice, with which interpolation would take ten times as long
            wide.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return self.trust(torch.cat([wide, near], 1)), self.whole(context.mean((2, 3))), state


class GeometricNet(nn.Module):
    """See the head of this file. The contract is that of `OdometryNet`: ``motion, state = step(pair, K, state)``.

    Args:
        config: ``encoder="flow"``; ``camera_height`` gives the scale.
        seed: of the initial weights.

    Raises:
        ModelError: options that this network does not have.
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.mixed = False  # set it where the processor multiplies bfloat16 faster
        if config.cell == "lstm" or config.peepholes or config.image_channels != 1:
            raise ModelError(
                f"cell={config.cell}, peepholes={config.peepholes}, image_channels={config.image_channels}: the "
                "default network sees gray frames of any size, by a convlstm or convgru without peepholes"
            )
        with seeded(seed):
            self.flow = FlowNet()
            self.weigher = Weigher(config, config.image_height // 8, config.image_width // 8)
        # Standard deviations, learned as logarithms. Slopes are radians, lengths camera heights.
        self.log_flow_sd = nn.Parameter(torch.tensor([0.7, 1.2]))  # across and along; on top of the flow's own
        self.log_common = nn.Parameter(torch.tensor([5e-5, 5e-5]).log())  # of an error that all cells have, in rays
        self.log_alike = nn.Parameter(torch.tensor([0.03, 0.1]).log())  # share of their own errors that is the same
        self.log_corridor = nn.Parameter(torch.tensor(1.2).log())  # half width of the road that the ConvLSTM weighs
        self.log_slope_drift = nn.Parameter(torch.tensor([0.002, 0.0015]).log())  # from one frame to the next
        self.log_slope_spread = nn.Parameter(torch.tensor([0.006, 0.006]).log())  # about the mounting
        self.log_mounting = nn.Parameter(torch.tensor([0.02, 0.02]).log())  # of mountings, before the first frame
        self.log_bend = nn.Parameter(torch.tensor([0.03, 0.1]).log())  # spread; share of it renewed in a frame
        self.log_sides = nn.Parameter(torch.tensor([0.02, 0.1]).log())  # of the road's, left and right: as the bend
        self.log_climb = nn.Parameter(torch.tensor([0.002, 0.004]).log())  # heaving: fixed, and a share of the way
        self.log_motion = nn.Parameter(
            torch.tensor([0.02, 0.02, 0.04, 0.005, 0.01, 0.005]).log()
        )  # change of the motion
        self.log_covariance = nn.Parameter(torch.zeros(2))  # calibration of translation and rotation

    # --- the contract -------------------------------------------------------------------------------------------

    def step(self, pair: Tensor, intrinsics: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The motion between two frames, in metres, as `OdometryNet.step`."""
        estimate, state = self.track(pair, intrinsics, state)
        return estimate.motion, state

    def track(self, pair: Tensor, intrinsics: Tensor, state: State | None = None) -> tuple[Estimate, State]:
        """The motion between two frames with all that is known about it.

        Args:
            pair: previous and current frame, grey 0..255, (batch, 2, 1, height, width), sides divisible by 8.
            intrinsics: fx, fy, cx, cy in pixels, (batch, 4).
            state: what the last call returned; None to start afresh.

        Raises:
            ModelError: a pair of another shape.
        """
        if pair.dim() != 5 or pair.shape[1:3] != (2, 1) or pair.shape[3] % 8 or pair.shape[4] % 8:
            raise ModelError(
                f"a pair of shape {tuple(pair.shape)}, but it must be (batch, 2, 1, height, width), two gray "
                "frames with sides divisible by 8"
            )
        memory, share, depth, hidden = self._recall(state, pair)
        known_fixed = fixed.hidden(share)
        view = View(pair[:, 0].float(), pair[:, 1].float(), intrinsics.float(), known_fixed, depth)
        blocks = block_rays(view)
        stays, moves = fixed.unmoved(view.prev, view.curr, blocks[:, :2])
        cells = self.look(view, memory)
        found = self.conclude(cells, memory, hidden)
        weak, doubtful = self._weak(cells, found[0], memory)
        if bool(weak.any()):
            weak = weak & view.shows_something()  # under a covered lens there is nothing to search
        if bool(weak.any()):
            bonnet = fixed.at_the_edge(stays, moves)
            view = dataclasses.replace(view, fixed=known_fixed | fixed.beside(bonnet), depth=None)
            found = self._asked_again(
                weak, doubtful, view, cells.without(fixed.beside(bonnet)), found, memory, hidden
            )
            share = torch.where(weak[:, None, None], fixed.suspected(share, bonnet), share)
        estimate, state = found
        lost = (estimate.evidence < LEAST_EVIDENCE) | leaps(memory, estimate)
        if bool(lost.any()):
            estimate, state = self._dead_reckoning(lost, estimate, state, memory)
        after = Memory.unpack(state[-1])  # in its axes is the solution: a search may have found a pitch
        if fixed.worth_learning(share, stays, blocks):
            road = road_flow(blocks, view.intrinsics, after, estimate.solution)
            share = fixed.learned(share, stays, moves, road)
        back = looking_ahead(after).transpose(1, 2)
        depth = carried.mapped(estimate.points, back, view.intrinsics, *depth.shape[-2:])
        return in_camera_axes(estimate, after), (*state[:-1], depth, share, facing_ahead(after, lost).pack())

    def _weak(self, cells: Cells, estimate: Estimate, memory: Memory) -> tuple[Tensor, Tensor]:
        """Which motions, (batch,), call for a search; and which of them because too little agrees with them."""
        settled = memory.known > 1 - _PATIENCE / 2
        # Houses and clouds alone fit many a speed: a motion under which no road is seen may be a wrong one.
        no_road = (estimate.road_sd > LEAST_ROAD) & settled
        # A lorry ahead and cars beside that go as we do look as if we stood, and the houses went; and a road that
        # shows next to nothing does not say what is wrong.
        stands = estimate.solution.motion[:, :3].norm(dim=1) < _STANDING
        doubtful = (stands | ~estimate.metric) & settled
        if bool(doubtful.any()):
            _, stand = self.open_road(cells, memory, self.priors(memory))
            doubtful = doubtful & (self.agreement(cells, estimate, stand) < _LEAST_AGREEMENT)
        return (memory.known == 0) | (estimate.evidence < LEAST_EVIDENCE) | no_road | doubtful, doubtful

    def _asked_again(
        self,
        weak: Tensor,
        doubtful: Tensor,
        view: View,
        cells: Cells,
        found: tuple[Estimate, State],
        memory: Memory,
        hidden: State | None,
    ) -> tuple[Estimate, State]:
        """What was found, or where that is weak and a search finds better, the latter."""
        again = self._from_nothing(view, memory)
        again.scale_variance = torch.full_like(again.scale_variance, torch.inf)  # a guess
        there = self.look(view, again)
        other = self.conclude(there, again, hidden)
        _, stand = self.open_road(cells, memory, self.priors(memory))
        more = self.plausibility(there, other[0], stand) > self.plausibility(cells, found[0], stand)
        gained = self.agreement(there, other[0], stand) - self.agreement(cells, found[0], stand)
        # A known motion is given up only for one that brings the road back, or with which much more of all that
        # stands agrees: clouds alone prefer to stand still, and on blank asphalt what moves with us looks most like
        # a road. And since that always agrees with a slower motion, this alone is no reason to take one.
        way, other_way = (e.solution.motion[:, :3].norm(dim=1) for e in (found[0], other[0]))
        not_slower = other_way > _LEAST_SHARE * way
        clear = (found[0].evidence < LEAST_EVIDENCE) | torch.where(
            doubtful & not_slower, gained > _LIKE, other[0].road_sd < 0.5 * found[0].road_sd
        )
        # No car stops from one frame to the next: while some road is still seen, that it stood has to be plain.
        stopped = (other_way < implausible_share(memory)[:, 0] * way) & (found[0].road_sd < LEAST_ROAD)
        clear = clear & (gained > torch.where(stopped, _OBVIOUS, -_LIKE)) & (other[0].road_sd < LEAST_ROAD)
        clear = clear | (not_slower & (gained > _CONTRADICTED))
        # A lorry that drives off agrees with driving backwards, and houses agree with anything; the road does not.
        vaguer = found[0].metric & ~other[0].metric
        better = (memory.known == 0) | (more & clear & ~vaguer)
        other[0].points[:, 3] = 0  # a guess: what it says of depths is not passed on
        estimate, state = _select(weak & better, other, found)
        rests = weak & (doubtful | ~estimate.metric)
        state[-1][:, 0] = torch.where(rests, _PATIENCE, state[-1][:, 0])
        return estimate, state

    def _from_nothing(self, view: View, memory: Memory) -> Memory:
        """Memory with the motion of a `search`, and with the camera's pitch if nothing is known of that yet.

        With a horizon that is 5 degrees off, houses are taken for road, and what a search finds is too slow or far
        off. But the car drives along its road, so the motion's direction tells where the horizon is, and a motion
        need not be quite right for that.
        """
        best, most = self.search(view, memory)
        again = dataclasses.replace(memory, motion=best)
        unknown = (memory.known == 0) & (memory.aside_precision[:, 1] == 0)
        down = direction(best)[:, 1]
        moves = best[:, :3].norm(dim=1) > _STANDING
        tilted = unknown & moves & (down.abs() > _TILTED)
        if not bool(tilted.any()):
            return again
        possible = down.abs() < LARGEST_ASIDE
        for elsewhere in (-_ELSEWHERE, _ELSEWHERE):
            pitch = torch.where(possible, down, elsewhere)
            aside = torch.stack([torch.zeros_like(pitch), pitch], 1)
            other = dataclasses.replace(memory, aside=memory.aside + aside)
            found, score = self.search(view, other)
            # A motion that says the same of the horizon, if asked with that, need not fit better for it.
            same = possible & (direction(found)[:, 1].abs() < down.abs() / 2)
            more = tilted & (score > torch.where(same, _AS_GOOD * most, most))
            other = dataclasses.replace(other, motion=found)
            packed = torch.where(more[:, None], other.pack(), again.pack())
            again, most = Memory.unpack(packed), torch.where(more, score, most)
            if bool((possible | ~tilted).all()):
                break
        return again

    def look(self, view: View, memory: Memory) -> Cells:
        """Measure the flow between two frames, on top of what memory predicts."""
        rays = cell_rays(view.intrinsics, view.prev.shape[-2] // 4, view.prev.shape[-1] // 4)
        field = self.measure(view.prev, view.curr, expected_flow(rays, view.intrinsics, memory))
        cells = choose_cells(rays, field, view.intrinsics, view.prev).without(view.fixed)
        if view.depth is not None:
            cells.depth = carried.at_cells(view.depth, cells.rays, view.intrinsics)
        return cells.turned(looking_ahead(memory))

    def search(self, view: View, memory: Memory) -> tuple[Tensor, Tensor]:
        """A motion (batch, 6) to start from where nothing is known or all is lost, the best of some; and how
        plausible it is, (batch,).

        The likeliest are taken further: flow that is measured on top of the right motion says it again, on top of a
        wrong one it goes on to creep away from it.
        """
        # A fresh start remembers none: standing still is among those tried anyway.
        guesses = [memory.motion] if bool(memory.motion.any()) else []
        for speed, turn in _SEARCHED:
            guesses.append(torch.zeros_like(memory.motion))
            guesses[-1][:, 2], guesses[-1][:, 4] = speed, turn
        motions, scores, _ = zip(*(self._from(guess, view, memory) for guess in guesses), strict=True)
        likeliest = torch.stack(scores).topk(_TAKEN_FURTHER, 0).indices  # (few, batch)
        best, most = memory.motion, torch.full_like(scores[0], -torch.inf)
        for first in torch.stack(motions).gather(0, likeliest[..., None].expand(-1, -1, 6)):
            before, _, _ = self._from(first, view, memory)
            motion, score, metric = self._from(before, view, memory)
            crept = (motion - before)[:, :3].norm(dim=1) / (0.03 + 0.05 * motion[:, :3].norm(dim=1))
            score = score / (1 + crept.square())
            # Where a lorry hides all but its marks, the road fits that too: each mark on the next one ahead.
            backwards = (motion[:, 2] < -_STANDING) & (memory.motion[:, 2] >= -_STANDING)
            score = torch.where(backwards, _BACKWARDS * score, score)
            # Where the road shows little, each round says a little less than the one before: then the first counts.
            less = motion[:, :3].norm(dim=1) < first[:, :3].norm(dim=1)
            chosen = torch.where((less & ~metric)[:, None], first, motion)
            best = torch.where((score > most)[:, None], chosen, best)
            most = torch.maximum(most, score)
        return best, most

    def _from(self, motion: Tensor, view: View, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """The motion (batch, 6) that is found where another one is expected, its `plausibility`, and whether the
        road gave its length."""
        fresh = dataclasses.replace(memory, known=torch.zeros_like(memory.known), motion=motion)
        cells = self.look(view, fresh)
        estimate, _ = self.conclude(cells, fresh, None, before=memory)
        return estimate.solution.motion, self.plausibility(cells, estimate), estimate.metric

    def plausibility(self, cells: Cells, estimate: Estimate, among: Tensor | float = 1.0) -> Tensor:
        """By which a search compares motions, (batch,): the share of what is in sight that fits across, times the
        root of the share of the road ahead that fits along, times the eighth power of `agreement`.

        Shares of the whole image would prefer slow motions: clouds and far houses fit any speed, and the faster it
        is, the more of the rest leaves the image. A lorry ahead and cars beside that go as we do fit standing
        still, all over the road; but then all that really stands, and moves, speaks against it. And what shows next
        to no flow where the road has much is behind the road, if it stands, so it must move with us: it is no road
        that would have to fit. (The powers are among those that find most motions on 364 pairs, nearly all of
        rendered streets with usual and heavy traffic; others near them find as many.)
        """
        r, sigma, sure, fit = self._fit_across(cells, estimate)
        in_sight, along = sigma < 1.0, _OFF_ALONG * sigma
        x, y = cells.rays[:, 0].flatten(1), cells.rays[:, 1].flatten(1)
        ahead = (y > _NEAR) & (x.abs() < 1.2 * y)
        misfit = road_misfit(cells.rays.flatten(2), r, estimate.solution.shape, along.square().reciprocal())
        on_road = (sure / (1 + (misfit / along).square()) * ahead).sum(1)
        open_road = torch.maximum(
            (ahead & in_sight & ~self.moves_with_us(cells, r)).sum(1), 0.15 * ahead.sum(1)
        ).clamp_min(1.0)
        fits = fit.mean(1) / in_sight.float().mean(1).clamp_min(0.1)
        return fits * _agreeing(fit * among, sure * among) ** 8 * (on_road / open_road).sqrt()

    def agreement(self, cells: Cells, estimate: Estimate, among: Tensor | float = 1.0) -> Tensor:
        """(batch,) the share of what is measured surely that fits across: what does not moves by itself, or the
        motion is another one.

        Args:
            among: (batch, cells) 1 for cells that are asked.
        """
        _, _, sure, fit = self._fit_across(cells, estimate)
        return _agreeing(fit * among, sure * among)

    def _fit_across(self, cells: Cells, estimate: Estimate) -> tuple[Residuals, Tensor, Tensor, Tensor]:
        """Residuals of all cells, (batch, cells) sigma, how sure each is, and how far it fits across, of that.

        A motion too slow fits across too, if only all is near enough: what would then be inside the car does not,
        and what would stand beside or before it fits the less, the closer. Else houses to both sides, an arm's
        length away, speak for a fifth of the true motion.
        """
        solution = estimate.solution
        r = residuals(cells.rays.flatten(2), cells.seen.flatten(2), solution.motion, solution.slopes)
        sigma = cells.sigma.flatten(1)
        sure = _sure(sigma)
        across, along = _OFF_ACROSS * sigma, _OFF_ALONG * sigma
        nearest = torch.maximum(1.2 * r.road, cells.rays[:, 0].flatten(1).abs() / _CLEAR_ASIDE)
        nearest = nearest.clamp_min(1 / _CLEAR_AHEAD)
        closest = (r.inverse_depth - _PLAIN * along / r.parallax).clamp_min(0.0)
        room = (cells.rays[:, 0].flatten(1) / _CLEAR_ASIDE).square() + _CLEAR_AHEAD**-2
        close = (closest * (r.inverse_depth > 1.2 * r.road)).square() / room
        return r, sigma, sure, sure / (1 + (r.across / across).square()) / (1 + close) * (closest <= nearest)

    def _dead_reckoning(
        self, lost: Tensor, estimate: Estimate, state: State, memory: Memory
    ) -> tuple[Estimate, State]:
        """Where all is lost the camera is taken to move on as before, with a wide covariance."""
        height = torch.where(memory.height > 0, memory.height, self.config.camera_height)
        ahead = torch.cat([memory.motion[:, :3] * height[:, None], memory.motion[:, 3:]], 1)
        wide = torch.diag_embed(
            torch.cat([(0.5 + ahead[:, 2:3].abs()).expand(-1, 3), torch.full_like(ahead[:, 3:], 0.1)], 1).square()
        )
        kept = dataclasses.replace(memory, known=torch.zeros_like(memory.known))
        packed = torch.where(lost[:, None], kept.pack(), state[-1])
        points = estimate.points.clone()
        points[:, 3] *= ~lost[:, None]
        pick = dataclasses.replace(
            estimate,
            points=points,
            motion=torch.where(lost[:, None], ahead, estimate.motion),
            evidence=torch.where(lost, 0.0, estimate.evidence),  # of a leap, none holds
            covariance=torch.where(lost[:, None, None], wide, estimate.covariance),
        )
        return pick, (*state[:-1], packed)

    def measure(self, prev: Tensor, curr: Tensor, predicted: Tensor) -> FlowField:
        """The flow, on top of the predicted one."""
        with self.half_precision(prev):
            return self.flow(prev, curr, predicted.clamp(-1000.0, 1000.0))

    def conclude(
        self, cells: Cells, memory: Memory, hidden: State | None, before: Memory | None = None
    ) -> tuple[Estimate, State]:
        """From the flow of a frame to its motion, and the state for the next one.

        Args:
            before: what was known before ``memory`` was given a guess's motion, by default the same. What stood
                still, or drove, is not taken for cars that move with us because a guess would have it so.
        """
        rays, seen = cells.rays.flatten(2), cells.seen.flatten(2)
        priors = self.priors(memory)
        share = implausible_share(memory)
        if before is not None:
            priors.still = reach_at_rest(before)
            share = torch.where(before.known[:, None] > 0, 0.0, share)
        start = (memory.motion, priors.slopes, priors.shape)
        with torch.no_grad():
            open_road, stands = self.open_road(cells, memory, priors, share)
            across, along = self.trusted_weights(cells, memory)
            weights = self.shared(across * stands, along * open_road)
            first, misfits = solve(rays, seen, *weights, priors, start, steps=3)
            features = describe(cells, misfits)
        with self.half_precision(features):
            trust, whole, hidden = self.weigher(features, hidden)
        trust = trust.float().clamp(-8.0, 5.0)
        across, along = self.trusted_weights(cells, memory, trust)
        weights = self.shared(across * stands, along * open_road)
        vague = vagueness(road_sd(rays, misfits, first.shape, weights[1]), memory)
        heard = weights[1] * share_heard(vague)
        at = (first.motion, first.slopes, first.shape)
        told = (across * stands).detach()
        depths = depths_before(cells, told, memory, vague)
        second, misfits = solve(rays, seen, weights[0], heard, priors, at, steps=3, carried=depths)
        covariance = inverse_scaled(second.information)
        # How much the road alone, without yesterday's speed, says about the length of the way.
        way_sd = road_sd(rays, misfits, second.shape, weights[1])
        of_scale = scale_variance(way_sd, second.motion, covariance, memory)
        estimate = self.estimate(cells, second, covariance, misfits, way_sd, of_scale, memory, trust, whole)
        with torch.no_grad():
            estimate.points = carried.passed_on(rays, seen, second, misfits, told)
        return estimate, (*hidden, self.remember(memory, second, covariance, of_scale).pack())

    def initial_state(self, batch: int, size: tuple[int, int] | None = None) -> State:
        """The state before the first frame: all zero.

        Args:
            size: (height, width) of the frames, by default as configured.
        """
        height, width = size or (self.config.image_height, self.config.image_width)
        rows, columns = height // 8, width // 8
        like = next(self.parameters()).new_zeros(
            batch, self.config.hidden_channels, -(-rows // 4), -(-columns // 4)
        )
        depth = like.new_zeros(batch, 2, height // STRIDE, width // STRIDE)
        share, packed = like.new_zeros(batch, rows, columns), like.new_zeros(batch, Memory.SIZE)
        return (*self.weigher.cell.zero_state(like), depth, share, packed)

    # --- its parts ----------------------------------------------------------------------------------------------

    def priors(self, memory: Memory) -> Priors:
        """What memory says about motion and road before this frame is looked at."""
        known = memory.known[:, None]
        sd = self.log_motion.exp() * (1 + 0.5 * memory.motion[:, 2:3].abs())
        loose = torch.where(known > 0, sd, sd.new_tensor([1.0, 1.0, 3.0, 0.3, 0.3, 0.3]))
        # Two sources for the slopes: how they were, and how the camera is mounted.
        mounting_variance = 1 / (torch.exp(-2 * self.log_mounting) + memory.mounting_precision)
        from_mounting = 1 / ((2 * self.log_slope_spread).exp() + mounting_variance)  # (batch, 2)
        spread, renewed = torch.stack(
            [self.log_bend, self.log_sides, self.log_sides], 1
        ).exp()  # (3,), of the shape
        keep = 1 - renewed.clamp_max(0.99)  # of each, which are autoregressive processes
        kept = torch.cat([torch.ones_like(keep[:2]), keep])
        drift = torch.cat([(2 * self.log_slope_drift).exp(), (1 - keep**2) * spread**2])
        last = kept[:, None] * memory.variance * kept + torch.diag(drift)
        from_last = torch.linalg.inv(torch.where(known[..., None] > 0, last, torch.eye(5, device=last.device)))
        fresh = torch.diag(F.pad(spread**-2, (2, 0)))
        from_last = torch.where(known[..., None] > 0, from_last, fresh)
        information = from_last + torch.diag_embed(F.pad(from_mounting, (0, 3)))
        was = torch.cat([memory.slopes, keep * memory.shape], 1)
        mean = (from_last @ was[..., None])[..., 0] + F.pad(from_mounting * memory.mounting, (0, 3))
        road = torch.linalg.solve(information, mean[..., None])[..., 0]
        climb, share = self.log_climb.exp()
        climb_sd = climb + share * memory.motion[:, :3].norm(dim=1)
        climb_sd = torch.where(memory.known > 0, climb_sd, climb_sd + _GUESS_OFF * share)
        loose = loose.square().reciprocal()
        still = reach_at_rest(memory)
        return Priors(memory.motion, loose, road[:, :2], road[:, 2:], information, climb_sd, still)

    def trusted_weights(self, cells: Cells, memory: Memory, trust: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inverse variances (batch, cells) across and along: by the flow's own certainty, where a road should be.

        Kerbs and verges beside the lane rise, and err the same way in each frame, which adds up. So a corridor is
        narrower than the one that training finds on its short clips, but where the lane is seen far away alone (a
        bonnet, a camera that looks up), since there all is needed for the road's tilt, or shows next to nothing.

        Args:
            trust: logarithms of factors on both, (batch, 2, rows, columns), from the ConvLSTM.
        """
        certain = cells.sigma.square().reciprocal().flatten(1)
        scale = torch.exp(-2 * self.log_flow_sd)
        x, y = cells.rays[:, 0].flatten(1), cells.rays[:, 1].flatten(1)
        # The horizon is that of the mounting: one that follows the solution can run away with it, up the houses.
        height = y - memory.mounting[:, :1] * x - memory.mounting[:, 1:]
        beside = (x / height.clamp_min(0.02)).square()
        across, along = certain * scale[0], certain * scale[1] * (height > 0.06)
        if trust is None:
            return across, along * torch.exp(-beside / _SURE_ROAD**2)
        factor = trust.flatten(2).exp()
        across, along = across * factor[:, 0], along * factor[:, 1]
        width = self.log_corridor.exp()
        if not self.training:  # a clip of some frames does not see what adds up
            width = width * self._narrowed(along * torch.exp(-beside / (_NARROW * width) ** 2), x, y, height)
        return across, along * torch.exp(-beside / width.square())

    def _narrowed(self, lane: Tensor, x: Tensor, y: Tensor, height: Tensor) -> Tensor:
        """(batch, 1), by which the corridor is narrower: by how much the cells of the lane, with weights ``lane``,
        tell of the way, and by their mean slope under the horizon, of ``height``."""
        told = lane * (height * height * (x * x + y * y))  # the square of a cell's flow, for a unit of the way
        total = told.sum(1, True).clamp_min(1e-6)
        near = ((told * height).sum(1, True) / total - _SEEN_FAR) / (_SEEN_NEAR - _SEEN_FAR)
        well = (_HARDLY_SEEN - total.rsqrt()) / (_HARDLY_SEEN - _SEEN_WELL)
        return 1 - (1 - _NARROW) * near.clamp(0.0, 1.0) * well.clamp(0.0, 1.0)

    def moves_with_us(self, cells: Cells, r: Residuals, share: Tensor | float = _BEHIND_ROAD) -> Tensor:
        """(batch, cells) whether a cell shows so much less flow than the road would there that it stands behind the
        road, if it stands at all. So it is a car ahead, or its shadow: no road, however well it is seen.

        Left in as an outlier, each of them slows the motion down by what does not depend on how far off it is; on
        blank asphalt a few of them outweigh the road.

        Args:
            r: at the motion that is expected. share: (batch, 1), of the road's flow, that is too little for it.
        """
        along = _OFF_ALONG * cells.sigma.flatten(1)
        return (r.inverse_depth < share * r.road) & (r.parallax * r.road > _PLAIN * along)

    def open_road(
        self, cells: Cells, memory: Memory, priors: Priors, share: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(batch, cells) what may be road, by `moves_with_us` if we cannot have braked so hard; and what may stand.

        Where a lorry is before the road, all above is the lorry too, or hidden by it: before the sky it shows no
        flow either, as houses far off would, and round a bend it would say that we do not turn. If next to nothing
        is left by that, it is the motion that is wrong.
        """
        r = residuals(cells.rays.flatten(2), cells.seen.flatten(2), memory.motion, priors.slopes)
        with_us = self.moves_with_us(cells, r, implausible_share(memory) if share is None else share)
        below = with_us.unflatten(1, cells.sigma.shape[-2:]).flip(1).cumsum(1).flip(1).flatten(1)
        stands = below < _SEEN_ON_ROAD
        sure = _sure(cells.sigma.flatten(1))
        left = (sure * stands).sum(1, True) / sure.sum(1, True).clamp_min(1e-6)
        return ~with_us, stands | (left < _LEAST_LEFT)

    def shared(self, across: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """`trusted_weights` less what cells have in common: a thousand cells do not average out all of their error.

        An error that all of n cells share counts like one of n times its variance that each has for itself. One of
        them is the same for all (a lens, a shutter), one the larger, the less a cell sees (what was predicted).
        """
        weights = torch.stack([across, along], 1)
        variances, alike = ((2 * log_sd).exp()[:, None] for log_sd in (self.log_common, self.log_alike))
        cells = weights.sum(2, True).square() / weights.square().sum(2, True).clamp_min(1e-12)
        across, along = (weights / (1 + cells * (weights * variances + alike))).unbind(1)
        return across, along

    def half_precision(self, like: Tensor) -> torch.autocast:
        """bfloat16 for convolutions where it pays; coordinates, sampling and solver never leave float32."""
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.mixed)

    def estimate(
        self,
        cells: Cells,
        solution: Solution,
        covariance: Tensor,
        misfits: Residuals,
        way_sd: Tensor,
        of_scale: Tensor,
        memory: Memory,
        trust: Tensor,
        whole: Tensor,
    ) -> Estimate:
        """In metres, with its covariance, and how far it can be trusted."""
        height = torch.where(memory.height > 0, memory.height, self.config.camera_height)
        sd = torch.exp(self.log_covariance[None] + whole.clamp(-2, 2))  # (batch, 2)
        factor = torch.cat([(sd[:, :1] * height[:, None]).expand(-1, 3), sd[:, 1:].expand(-1, 3)], 1)
        covariance = covariance[:, :6, :6] * factor[:, :, None] * factor[:, None, :]
        sigma = cells.sigma.flatten(1)  # what the ConvLSTM makes of a cell is no measure of what is seen
        fit = _sure(sigma) / (1 + (misfits.across / (_OFF_ACROSS * sigma)).square())
        motion = torch.cat([solution.motion[:, :3] * height[:, None], solution.motion[:, 3:]], 1)
        ahead = F.normalize(solution.motion[:, :3].detach(), dim=1, eps=0.02)
        unsure = of_scale.sqrt() * solution.motion[:, :3].detach().norm(dim=1).clamp_min(_STANDING) * height
        off = F.pad(ahead * unsure[:, None], (0, 3))
        covariance = covariance + off[:, :, None] * off[:, None, :]
        nothing = cells.rays.new_zeros(len(motion), 4, 0)
        return Estimate(motion, covariance, solution, fit.mean(1), way_sd, trust, nothing)

    def remember(self, memory: Memory, solution: Solution, covariance: Tensor, of_scale: Tensor) -> Memory:
        """The state after a frame: the road as the current camera sees it, the mounting a little better known."""
        slopes = road_slopes(se3.rotated(road_normal(solution.slopes), -solution.motion[:, 3:]))
        variance = covariance[:, 6:, 6:]
        # Neighbouring frames lean alike (springs, hills): ten of them count as one.
        spread = variance.diagonal(dim1=1, dim2=2)[:, :2] + (2 * self.log_slope_spread).exp()
        gained = 1 / (10 * spread)
        prior = torch.exp(-2 * self.log_mounting)
        precision = memory.mounting_precision * 0.998
        total = precision + prior + gained
        mounting = memory.mounting + gained / total * (solution.slopes - memory.mounting)
        return Memory(
            torch.where(memory.known > 0, memory.known + _PATIENCE, 1.0).clamp_max(1.0),
            solution.motion,
            slopes,
            solution.shape,
            variance,
            mounting,
            precision + gained,
            memory.height,
            memory.aside,
            memory.aside_precision,
            of_scale,
        )

    def _recall(self, state: State | None, pair: Tensor) -> tuple[Memory, Tensor, Tensor, State]:
        """Memory, what share of each block is `fixed`, a map of depths, and the ConvLSTM's state."""
        if state is None:
            state = self.initial_state(len(pair), (pair.shape[-2], pair.shape[-1]))
        return Memory.unpack(state[-1]), state[-2], state[-3], state[:-3]


@dataclasses.dataclass
class Estimate:
    """What is known after a frame.

    Attributes:
        motion: (batch, 6) ``T_prev_curr``: metres, radians. covariance: (batch, 6, 6) of these numbers.
        solution: the same in camera heights, with the road.
        evidence: (batch,) share of the image that was measured well and fits; under `LEAST_EVIDENCE` all is lost.
        road_sd: (batch,) standard deviation of the way's length by the road alone, in camera heights; above
            `LEAST_ROAD` no road is seen.
        trust: (batch, 2, rows, columns), logarithms, across and along.
        points: (batch, 4, cells), where all is in the newer frame (`carried.passed_on`).
    """

    motion: Tensor
    covariance: Tensor
    solution: Solution
    evidence: Tensor
    road_sd: Tensor
    trust: Tensor
    points: Tensor

    @property
    def metric(self) -> Tensor:
        """(batch,) whether the road gave the length of the motion; otherwise it is a guess."""
        way = self.solution.motion[:, :3].norm(dim=1)
        vague = (self.road_sd > _VAGUE_ROAD) & (self.road_sd > _VAGUE_SHARE * way)
        return (self.road_sd < LEAST_ROAD) & ~vague


@dataclasses.dataclass
class View:
    """Two frames: (batch, 1, height, width) grey levels, and fx, fy, cx, cy (batch, 4).

    ``fixed``: (batch, height / 8, width / 8), which cells show what is fixed to the camera. ``depth``: a map of
    what the frames before say of depths (`carried.spread`).
    """

    prev: Tensor
    curr: Tensor
    intrinsics: Tensor
    fixed: Tensor | None = None
    depth: Tensor | None = None

    def shows_something(self) -> Tensor:
        """(batch,) whether neither image is even."""
        return torch.minimum(self.prev.flatten(1).std(1), self.curr.flatten(1).std(1)) > LEAST_CONTRAST


def _select(which: Tensor, a: tuple[Estimate, State], b: tuple[Estimate, State]) -> tuple[Estimate, State]:
    """Rows of a where which is true, of b elsewhere."""

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(which.reshape(-1, *[1] * (x.dim() - 1)), x, y)

    (ea, sa), (eb, sb) = a, b

    def picked(x: Any, y: Any) -> dict[str, Tensor]:
        parts = ((field.name, getattr(x, field.name), getattr(y, field.name)) for field in dataclasses.fields(x))
        return {name: pick(a, b) for name, a, b in parts if isinstance(a, Tensor)}

    solution = dataclasses.replace(ea.solution, **picked(ea.solution, eb.solution))
    estimate = dataclasses.replace(ea, solution=solution, **picked(ea, eb))
    return estimate, tuple(pick(x, y) for x, y in zip(sa, sb, strict=True))


def _agreeing(fit: Tensor, sure: Tensor) -> Tensor:
    """(batch,) the share of all that is sure, (batch, cells), that fits."""
    return fit.sum(1) / sure.sum(1).clamp_min(1.0)


def _sure(sigma: Tensor) -> Tensor:
    """How far a cell was measured well at all: half at a third of a pixel."""
    return 1 / (1 + (sigma * 1000.0).square())


def choose_cells(rays: Tensor, field: FlowField, intrinsics: Tensor, image: Tensor) -> Cells:
    """Of each 2x2 cells, whose windows overlap anyway, the one whose flow is surest."""
    if kernels.usable(rays, field.flow, field.log_scale, intrinsics, image):
        best = cell_kernels.chosen(rays, field.flow, field.log_scale[:, 0], intrinsics, image[:, 0])
        return Cells(best[:, :3], best[:, 3:5], best[:, 5], best[:, 6])
    seen = flow_to_rays(field.flow, rays, intrinsics)
    focal = (intrinsics[:, 0] * intrinsics[:, 1]).sqrt()[:, None, None]
    sigma = (field.log_scale[:, 0].exp() * math.sqrt(2.0) + 0.03) / focal
    height, width = image.shape[-2:]
    at = seen * intrinsics[:, :2, None, None] + intrinsics[:, 2:, None, None]
    inside = (at[:, 0] > 1) & (at[:, 0] < width - 2) & (at[:, 1] > 1) & (at[:, 1] < height - 2)
    sigma = torch.where(inside, sigma, 10.0)
    mean = F.avg_pool2d(image, 4)
    texture = (F.avg_pool2d(image * image, 4) - mean * mean).clamp_min(0).sqrt()
    stacked = torch.cat([rays, seen, sigma[:, None], texture], 1)  # (batch, 7, rows, columns)
    blocks = F.pixel_unshuffle(stacked, 2).unflatten(1, (7, 4))  # (batch, 7, 4, rows / 2, columns / 2)
    best = blocks[:, 5:6].argmin(2, keepdim=True).expand(-1, 7, -1, -1, -1)
    picked = blocks.gather(2, best)[:, :, 0]
    return Cells(picked[:, :3], picked[:, 3:5], picked[:, 5], picked[:, 6])


def expected_flow(rays: Tensor, intrinsics: Tensor, memory: Memory) -> Tensor:
    """The flow in pixels (batch, 2, rows, columns) that memory predicts at a camera's rays (batch, 3, ...)."""
    ahead = looking_ahead(memory)
    T_prev_curr = se3.matrix_from_motion(memory.motion)
    if kernels.usable(rays, intrinsics, ahead, T_prev_curr):
        normal = road_normal(memory.mounting)
        return cell_kernels.predicted_flow(rays, intrinsics, ahead, normal, T_prev_curr, WALL, FAR)
    there = turned_points(rays, ahead)
    seen = seen_after(there, canyon_inverse_depth(there, memory.mounting), T_prev_curr)
    back = turned_points(seen, ahead.transpose(1, 2))
    return (back[:, :2] - rays[:, :2]) * intrinsics[:, :2, None, None]


def in_camera_axes(estimate: Estimate, memory: Memory) -> Estimate:
    """Motion and covariance as the camera sees them, which need not look ahead. The solution stays as it is."""
    back = looking_ahead(memory).transpose(1, 2)
    both = torch.zeros_like(estimate.covariance)
    both[:, :3, :3] = both[:, 3:, 3:] = back
    return dataclasses.replace(
        estimate,
        motion=(both @ estimate.motion[..., None])[..., 0],
        covariance=both @ estimate.covariance @ both.transpose(1, 2),
    )


def block_rays(view: View) -> Tensor:
    """(batch, 3, rows, columns) of the middles of blocks of 8x8 pixels."""
    height, width = view.prev.shape[-2:]
    return F.avg_pool2d(cell_rays(view.intrinsics, height // STRIDE, width // STRIDE), fixed.BLOCK // STRIDE)


def road_flow(rays: Tensor, intrinsics: Tensor, memory: Memory, solution: Solution) -> Tensor:
    """Pixels (batch, rows, columns) by which the road moves at a camera's rays; 0 over its horizon."""
    there = turned_points(rays, looking_ahead(memory))
    road = road_inverse_depth(there, solution.slopes)
    return flow_of(there, road, solution.motion, intrinsics).norm(dim=1) * (road > fixed.BELOW_HORIZON)


def vagueness(road_sd: Tensor, memory: Memory) -> Tensor:
    """(batch,) from 0 to 1: how little the road says of the way's length, beside yesterday's speed; a little
    less where that is a guess of a search (`Memory.known`)."""
    error = (_ROAD_ERROR * road_sd.detach() / change_sd(memory)).square()
    # Less, and guesses creep away too; more, and a wrong one stays for a dozen frames after a covered lens.
    error = error * (0.7 + 0.3 * memory.known)
    return error.square() / (1 + error.square())


def share_heard(vagueness: Tensor) -> Tensor:
    """(batch, 1) by which what the road says counts, beside yesterday's speed.

    A road that shows next to nothing is wrong by many times its standard deviation, toward what was predicted:
    heard in full, it lets the speed creep away within a few frames. All but the vaguest count in full.
    """
    return (1 / (1 + _ROAD_ERROR**2 * vagueness))[:, None]


def depths_before(cells: Cells, told: Tensor, memory: Memory, vague: Tensor) -> Carried | None:
    """What the frames before say of cells' depths; nothing where they were lost or a search goes on.

    How long the way before was is held to, the more, the less the road says of this one. Not more than that: a
    road's errors stay for many frames, and so would those of its first ones.

    Args:
        told: (batch, cells), information of the flow across, and so along.
    """
    if cells.depth is None:
        return None
    inverse_depth, known = cells.depth.flatten(2).unbind(1)
    clear = (memory.known[:, None] > 0) & (inverse_depth.square() * known > _CLEAR_DEPTH**2)
    known = torch.where(clear, known, 0.0)
    way = memory.motion[:, :3].norm(dim=1)
    ahead = F.pad(F.normalize(memory.motion[:, :3], dim=1), (0, 3))
    held = vague / (_SCALE_DRIFT * way).square().clamp_min(1e-6)
    of_motion = held[:, None, None] * ahead[:, :, None] * ahead[:, None]
    of_motion = of_motion + 1e-3 * torch.eye(6, device=ahead.device)
    return Carried(inverse_depth, known, told, memory.motion, of_motion)


def scale_variance(way_sd: Tensor, motion: Tensor, covariance: Tensor, memory: Memory) -> Tensor:
    """(batch,) variance of the logarithm of a way's length: by the road, or by what was known of the last one and
    how surely this one is as long as that, or longer; whichever is less.

    Args:
        way_sd: (batch,) of the road alone. motion: (batch, 6). covariance: (batch, 11, 11), the solver's.
    """
    way = motion[:, :3].detach()
    length = way.norm(dim=1).clamp_min(_STANDING)
    # More than any way there is says no more, and in float32 leaves no positive definite matrix.
    by_road = ((_ROAD_ERROR * way_sd.detach()).clamp_max(_ANY_CHANGE) / length).square()
    changed = ((way[:, None] @ covariance[:, :3, :3].detach()) @ way[..., None])[:, 0, 0] / length**4
    by_last = memory.scale_variance + changed
    return torch.where(memory.known > 0, torch.minimum(by_road, by_last), by_road)


def change_sd(memory: Memory) -> Tensor:
    """(batch,) standard deviation of the way's change from the last frame, camera heights; wide after a loss."""
    usual = _CHANGE * (1 + _CHANGE_SHARE * memory.motion[:, 2].abs())
    return torch.where(memory.known > 0, usual, _ANY_CHANGE)


def leaps(memory: Memory, estimate: Estimate) -> Tensor:
    """(batch,) whether a motion is one that no car can have made since the last one, and no road confirms it: after
    a jump in the video there is nothing to be measured. A frame that was left out doubles the way.
    """
    before, way = (m[:, :3].norm(dim=1) for m in (memory.motion, estimate.solution.motion))
    faster = (way - before > _LEAP * change_sd(memory)) & (way > _LEFT_OUT * before)
    return faster & (memory.known > 0) & ~estimate.metric


def reach_at_rest(memory: Memory) -> Tensor:
    """(batch,) `Priors.still`: a car that stood is held by all it sees, or a lorry that drives off draws it on."""
    stood = (memory.known > 0) & (memory.motion[:, :3].norm(dim=1) < _STANDING)
    return torch.where(stood, _REACH_AT_REST, STILL)


def implausible_share(memory: Memory) -> Tensor:
    """(batch, 1) share of the expected way that would be too short for it, less than `_LEAST_SHARE`.

    From one frame to the next a car that stands may pass for one that creeps, and one that creeps may stop. Where
    nothing is known, each guess of a search is taken at its word: on blank asphalt the cars around would else draw
    any of them down to their own speed.
    """
    way = memory.motion[:, :3].norm(dim=1)
    braked = (1 - _STOPPED * change_sd(memory) / way.clamp_min(1e-6)).clamp_max(_LEAST_SHARE)
    return torch.where(memory.known > 0, braked, _BEHIND_ROAD)[:, None]


def road_sd(rays: Tensor, r: Residuals, shape: Tensor, along: Tensor) -> Tensor:
    """(batch,) standard deviation of the way's length by the road alone, whose cells have weights ``along``."""
    misfit = road_misfit(rays, r, shape, along)
    seen = along / (1 + misfit.square() * along / 4)  # a lorry where the road should be is no road
    return (seen[:, None] * r.J_along[:, :3].square()).sum((1, 2)).clamp_min(1e-12).rsqrt()


def describe(cells: Cells, r: Residuals) -> Tensor:
    """What the ConvLSTM sees of each cell: (batch, 10, rows, columns), all of order one."""
    grid = cells.sigma.shape[-2:]
    sigma = cells.sigma.flatten(1)
    across = (r.across / sigma).asinh() / 2
    rows = [
        2 * cells.rays[:, 0],
        6 * cells.rays[:, 1],
        across.unflatten(1, grid),
        across.abs().unflatten(1, grid),
        torch.asinh(r.along / sigma).unflatten(1, grid) / 3,
        (cells.sigma * 363.6).log() / 2,
        (r.parallax.clamp_min(1e-4).log() / 3).unflatten(1, grid),
        (r.road * 4).clamp(-1, 2).unflatten(1, grid),
        (4 * (r.inverse_depth - r.road.clamp_min(0.0))).clamp(-2, 2).unflatten(1, grid),
        (cells.texture + 1).log() / 3,
    ]
    return torch.stack(rows, 1)


def inverse_scaled(information: Tensor) -> Tensor:
    """Inverse of positive definite matrices (batch, n, n), scaled to a unit diagonal first."""
    scale = information.diagonal(dim1=1, dim2=2).clamp_min(1e-12).rsqrt()
    scaled = information * scale[:, :, None] * scale[:, None, :]
    scaled = scaled + 1e-6 * torch.eye(information.shape[1], dtype=information.dtype, device=information.device)
    return torch.linalg.inv(scaled) * scale[:, :, None] * scale[:, None, :]
