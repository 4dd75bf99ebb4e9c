"""Setting things along a road: houses and gardens, trees and lamps, parked cars, fences, woods."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from convlstm_vo.world import meshes
from convlstm_vo.world.bank import bank, halved
from convlstm_vo.world.ground import Hills, Shadows
from convlstm_vo.world.meshes import Mesh
from convlstm_vo.world.plan import Plan
from convlstm_vo.world.scene import SceneBuilder

Array = NDArray[np.float64]
CORNERS = ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


class Planter:
    """Places bodies along a leg, with their shadows, and keeps them off other roads."""

    def __init__(self, builder: SceneBuilder, plan: Plan, hills: Hills, rng: np.random.Generator) -> None:
        self.builder, self.plan, self.hills, self.rng = builder, plan, hills, rng
        self.shadows: Shadows | None = None
        self.leg = plan.legs[0]
        bank_ = bank()
        self.stamps = []
        for name in ("leaf0_mask", "leaf1_mask", "leaf2_mask"):
            offset, log_w, log_h = bank_.textures[bank_.names[name]]
            block = bank_.atlas[offset : offset + (4 << (log_w + log_h))].reshape(2 << log_h, 2 << log_w)
            self.stamps.append(halved(block, 2))

    def free(self, s: float, d: float, half_s: float, half_d: float, gap: float) -> bool:
        """Whether a rectangle keeps ``gap`` metres from every carriageway."""
        corners = [self.leg.line.place(s + a * half_s, d + b * half_d) for a, b in CORNERS]
        return bool(
            (
                self.plan.clearance_m(np.array([c[0] for c in corners]), np.array([c[2] for c in corners])) > gap
            ).all()
        )

    def put(
        self, mesh: Mesh, s: float, d: float, turn: float = 0.0, sink: float = 0.0, *, on_road: bool = False
    ) -> None:
        x, y, z, psi = self.leg.line.place(s, d)
        if not on_road and abs(d) > self.leg.half_width_m + 6:
            y = float(self.hills.level(np.array([x]), np.array([z]))[0])
        self.builder.put(mesh, psi + turn, x, y + sink, z)

    def shade_box(self, s: float, d: float, half_s: float, half_d: float, height: float, soft: float) -> None:
        if self.shadows is not None:
            along, aside = self.shadows.offset(s, height)
            base = np.array([[s + a * half_s, d + b * half_d] for a in (-1, 1) for b in (-1, 1)])
            self.shadows.polygon(np.concatenate([base, base + [along, aside]]), soft)

    def shade_crown(self, s: float, d: float, height: float, radius: float, count: int) -> None:
        if self.shadows is not None:
            along, aside = self.shadows.offset(s, height)
            stamp = self.stamps[int(self.rng.integers(3))]
            self.shadows.leaves(self.rng, stamp, s + along, d + aside, radius, count)

    # --- single things -----------------------------------------------------------------------------------------

    def tree(self, s: float, d: float, height: float, *, slim: bool = False) -> None:
        if self.free(s, d, 0.3, 0.3, 0.5):
            leaf = f"leaf{self.rng.integers(3)}" if self.rng.random() < 0.93 else "twigs"
            self.put(meshes.tree(self.rng, height, leaf, slim=slim), s, d, float(self.rng.uniform(0, 6.28)), 0.1)
            self.shade_crown(s, d, height * 0.62, height * (0.18 if slim else 0.34), 5)

    def car(self, s: float, d: float, turn: float) -> None:
        van = self.rng.random() < 0.15
        self.put(meshes.car(self.rng, van=bool(van)), s, d, turn, on_road=True)
        self.shade_box(s, d, 2.1, 0.9, 1.2, 0.3)

    def lamp(self, s: float, d: float) -> None:
        if not self.free(s, d, 0.2, 0.2, 0.3):
            return
        mesh, height = Mesh(), float(self.rng.uniform(4.5, 8.5))
        meshes.pole(mesh, 0.07, height, "metal", 0.22)
        mesh.add(meshes.box(1.2, 0.08, 0.08, x=-0.5, low=height - 0.1), "metal", 0.22)
        mesh.add(meshes.box(0.5, 0.12, 0.2, x=-1.1, low=height - 0.05), "metal", 0.3)
        self.put(mesh, s, d, 0.0 if d > 0 else math.pi)
        self.shade_box(s, d, 0.06, 0.06, height, 0.1)

    def sign(self, s: float, d: float) -> None:
        if not self.free(s, d, 0.3, 0.3, 0.3):
            return
        mesh, size, low = Mesh(), float(self.rng.uniform(0.3, 0.6)), float(self.rng.uniform(1.6, 2.4))
        meshes.pole(mesh, 0.04, low + size, "metal", 0.3, z=0.06)
        board = np.array([meshes.wall(-size, 0.0, size, 0.0, low, low + 1.5 * size)])
        mesh.add(board, "sign", 0.7, uvs=np.array([[0, 0], [1, 0], [1, 1.0]]))
        self.put(mesh, s, d)

    def house(self, s: float, front_d: float, w: float, depth: float, floors: int) -> bool:
        side = 1.0 if front_d > 0 else -1.0
        d = front_d + side * depth / 2
        if not self.free(s, d, w / 2, depth / 2, 2.0):
            return False
        mesh = meshes.house(self.rng, w, depth, floors, bool(self.rng.random() < 0.35))
        self.put(mesh, s, d, math.pi if side > 0 else 0.0, 0.3)
        self.shade_box(s, d, w / 2, depth / 2, floors * 3.1 + 1.5, 0.25)
        return True

    def barrier(self, s0: float, s1: float, d: float, kind: str) -> None:
        """A fence, hedge or wall along the road."""
        height = {"hedge": 1.3, "stone": 1.1, "planks": 1.3, "pickets": 1.0, "lattice": 1.8}[
            kind
        ] * self.rng.uniform(0.8, 1.2)
        thick = {"hedge": 0.8, "stone": 0.3}.get(kind, 0.0)
        albedo = float(self.rng.uniform(0.14, 0.24) if kind == "hedge" else self.rng.uniform(0.15, 0.5))
        for s in np.arange(s0, s1 - 3.9, 4.0):
            if not self.free(s + 2, d, 2.0, 0.5, 0.6):
                continue
            (ax, ay, az, _), (bx, _, bz, _) = self.leg.line.place(s, d), self.leg.line.place(s + 4.0, d)
            mesh = Mesh()
            if thick:
                psi = self.leg.line.place(s + 2, d)
                mesh.add(meshes.box(thick, height + 0.3, 4.03, low=-0.3), kind, albedo)
                if kind == "hedge":
                    self._ragged(mesh, height, albedo)
                self.builder.put(mesh, psi[3], psi[0], psi[1], psi[2])
            else:
                panel = np.array([meshes.wall(ax, az, bx, bz, -0.1, height)]) + [0.0, ay, 0.0]
                self.builder.put(mesh.add(panel, kind, albedo))
            if kind != "lattice":
                self.shade_box(s + 2, d, 2.0, 0.2, height, 0.12)

    def _ragged(self, mesh: Mesh, height: float, albedo: float) -> None:
        n = 14
        at = np.stack(
            [self.rng.uniform(-0.4, 0.4, n), -height + self.rng.uniform(-0.1, 0.5, n), self.rng.uniform(-2, 2, n)],
            -1,
        )
        facing = meshes.unit_vectors(self.rng, n)
        quads = meshes.cards(at, facing, np.full(n, 0.35), meshes.unit_vectors(self.rng, n))
        up = np.array([0.0, -1.0, 0.0])
        mesh.add(quads, "leaf1", albedo * self.rng.uniform(0.7, 1.5, n), uvs=meshes.CARD_UV, normals=up)

    # --- stretches ---------------------------------------------------------------------------------------------

    def town_side(self, side: float, walk: float) -> None:
        """Houses, gardens, shops and small parks along one side of the leg."""
        rng, line, edge = self.rng, self.leg.line, self.leg.half_width_m + 0.15 + walk
        s, dense = float(line.s[0]) + 3, rng.random()
        setback = float(rng.uniform(0.3, 6.0))
        while s < line.s[-1] - 4:
            choice = rng.random()
            if choice < 0.72:
                w, floors = float(rng.uniform(7, 17)), int(rng.integers(1, 3 + 3 * (dense > 0.6)))
                self.house(s + w / 2, side * (edge + setback), w, float(rng.uniform(8, 13)), floors)
                if setback > 1.6 and rng.random() < 0.8:
                    kind = ("hedge", "stone", "planks", "pickets", "lattice")[int(rng.integers(5))]
                    self.barrier(s, s + w, side * (edge + 0.3), kind)
                    self._garden(s, w, side, edge, setback)
                s += w + (0.0 if dense > 0.75 else float(rng.uniform(0.5, 9.0)))
            else:
                w = float(rng.uniform(8, 26))
                for _ in range(int(w / 2.2)):
                    self.tree(
                        s + rng.uniform(0, w), side * (edge + rng.uniform(1.0, 16.0)), float(rng.uniform(4, 14))
                    )
                if rng.random() < 0.5:
                    kind = ("hedge", "lattice", "stone")[int(rng.integers(3))]
                    self.barrier(s, s + w, side * (edge + 0.4), kind)
                s += w

    def _garden(self, s: float, w: float, side: float, edge: float, setback: float) -> None:
        for _ in range(int(self.rng.integers(0, 4))):
            at, d = s + self.rng.uniform(0, w), side * (edge + self.rng.uniform(0.7, max(0.8, setback - 0.5)))
            if self.free(at, d, 0.4, 0.4, 0.8):
                self.put(
                    meshes.bush(self.rng, float(self.rng.uniform(0.4, 1.1)), f"leaf{self.rng.integers(3)}"), at, d
                )

    def street_furniture(self, side: float) -> None:
        """Street trees, lamps, signs and parked cars."""
        rng, line, hw = self.rng, self.leg.line, self.leg.half_width_m
        if rng.random() < 0.6:
            height, gap = float(rng.uniform(4, 12)), float(rng.uniform(7, 16))
            for s in np.arange(line.s[0], line.s[-1], gap):
                if rng.random() < 0.8:
                    self.tree(
                        float(s + rng.uniform(-1, 1)),
                        side * (hw + 0.8),
                        height * rng.uniform(0.7, 1.3),
                        slim=height < 6,
                    )
        for s in np.arange(line.s[0] + rng.uniform(0, 30), line.s[-1], rng.uniform(22, 40)):
            self.lamp(float(s), side * (hw + 0.5))
        for s in np.arange(line.s[0], line.s[-1], 23.0):
            if rng.random() < 0.5:
                self.sign(float(s + rng.uniform(0, 20)), side * (hw + 0.6))
        if hw > self.plan.lane_m + 3.45:  # else they would stand in our way
            self._parked(side)

    def _parked(self, side: float) -> None:
        rng, line, share = self.rng, self.leg.line, self.rng.uniform(0.15, 0.95)
        s = float(line.s[0])
        while s < line.s[-1]:
            x, _, z, _ = line.place(s, 0.0)
            far = all((x - j[0]) ** 2 + (z - j[2]) ** 2 > (j[3] + 6) ** 2 for j in self.plan.junctions)
            if rng.random() < share and far:
                d = side * (self.leg.half_width_m - 1.02 + rng.uniform(-0.1, 0.1))
                self.car(s, d, math.pi if side < 0 and rng.random() < 0.85 else 0.0)
            s += float(rng.uniform(5.0, 6.6))

    def country_side(self, side: float) -> None:
        """Fields, woods, rows of trees, hedges, now and then a farm."""
        rng, line, hw = self.rng, self.leg.line, self.leg.half_width_m
        s = float(line.s[0])
        while s < line.s[-1]:
            run, choice = float(rng.uniform(25, 110)), rng.random()
            if choice < 0.3:
                self._thickets(s, run, side)
            elif choice < 0.45:
                for _ in range(int(run * rng.uniform(0.15, 0.5))):
                    self.tree(
                        s + rng.uniform(0, run),
                        side * (hw + 2.5 + 22 * rng.random() ** 1.5),
                        float(rng.uniform(5, 17)),
                    )
                for _ in range(int(run * 0.25)):
                    at, d = s + rng.uniform(0, run), side * (hw + rng.uniform(1.8, 5))
                    if self.free(at, d, 0.5, 0.5, 0.8):
                        self.put(meshes.bush(rng, float(rng.uniform(0.5, 1.8)), f"leaf{rng.integers(3)}"), at, d)
            elif choice < 0.6:
                for at in np.arange(s, s + run, rng.uniform(8, 18)):
                    self.tree(float(at), side * (hw + 2.2), float(rng.uniform(6, 13)))
            elif choice < 0.7:
                self.barrier(s, s + run, side * (hw + 2.5), ("hedge", "lattice", "pickets")[int(rng.integers(3))])
            elif choice < 0.78:
                self.house(
                    s + 10,
                    side * (hw + rng.uniform(6, 20)),
                    float(rng.uniform(9, 20)),
                    10.0,
                    int(rng.integers(1, 3)),
                )
            s += run
        for at in np.arange(line.s[0], line.s[-1], 50.0):
            self.post(float(at), side * (hw + 0.6))

    def _thickets(self, s: float, run: float, side: float) -> None:
        """An edge of dense shrubs, trees behind it."""
        rng, hw = self.rng, self.leg.half_width_m
        near, tall = float(rng.uniform(2.2, 7.0)), float(rng.uniform(2.0, 6.5))
        leaf = f"leaf{rng.integers(3)}"
        for at in np.arange(s, s + run, 0.46 * tall):
            d, height = side * (hw + near + rng.uniform(0.3, 0.6) * tall), tall * float(rng.uniform(0.6, 1.3))
            if self.free(float(at), d, 0.42 * height, 0.42 * height, 0.4):
                self.put(meshes.thicket(rng, height, leaf), float(at), d)
                self.shade_crown(float(at), d, height * 0.5, height * 0.4, 4)
        for _ in range(int(run / 7)):
            self.tree(
                s + rng.uniform(0, run), side * (hw + near + rng.uniform(0.7, 3) * tall), float(rng.uniform(8, 18))
            )

    def avenue(self) -> None:
        """Tall trees on both sides whose crowns meet over the road: a tunnel of trees."""
        rng, line, hw = self.rng, self.leg.line, self.leg.half_width_m
        gap, height = float(rng.uniform(6, 10)), float(rng.uniform(12, 17))
        begin = float(rng.uniform(line.s[0], line.s[-1] - 60))
        for s in np.arange(begin, min(begin + rng.uniform(80, 250), line.s[-1]), gap):
            for side in (-1.0, 1.0):
                self.tree(float(s + rng.uniform(-1, 1)), side * (hw + 1.4), height * float(rng.uniform(0.85, 1.15)))

    def bollards(self, side: float) -> None:
        """Short posts, bins and boxes on the pavement."""
        rng, line, hw = self.rng, self.leg.line, self.leg.half_width_m
        for s in np.arange(line.s[0] + 5, line.s[-1] - 5, 14.0):
            at, d = float(s + rng.uniform(0, 12)), side * (hw + float(rng.uniform(0.4, 1.2)))
            if not self.free(at, d, 0.4, 0.4, 0.25):
                continue
            kind, mesh = rng.random(), Mesh()
            if kind < 0.5:
                for k in range(int(rng.integers(1, 5))):
                    meshes.pole(mesh, 0.05, 0.9, "metal", 0.2, z=1.4 * k)
            else:
                size = rng.uniform(0.3, 1.1, 3)
                mesh.add(meshes.box(size[0] * 0.7, size[1] + 0.4, size[2]), "rough", float(rng.uniform(0.05, 0.6)))
            self.put(mesh, at, d)

    def post(self, s: float, d: float) -> None:
        """A white delineator post."""
        if self.free(s, d, 0.1, 0.1, 0.3):
            mesh = meshes.pole(Mesh(), 0.06, 0.7, "paint", 0.6, sides=4)
            meshes.pole(mesh, 0.063, 0.2, "paint", 0.03, low=0.7, sides=4)
            self.put(meshes.pole(mesh, 0.06, 0.1, "paint", 0.6, low=0.9, sides=4), s, d)

    def rail(self, d: float) -> None:
        """A crash barrier along the whole leg."""
        line = self.leg.line
        places = np.arange(line.s[0], line.s[-1] - 4.0, 4.0)
        for s in places:
            (ax, ay, az, psi), (bx, by, bz, _) = line.place(float(s), d), line.place(float(s) + 4.0, d)
            mesh = Mesh()
            corners = [[ax, ay - 0.42, az], [bx, by - 0.42, bz], [bx, by - 0.75, bz], [ax, ay - 0.75, az]]
            mesh.add(np.array([corners]), "rail", 0.35)
            self.builder.put(mesh)
            self.builder.put(meshes.pole(Mesh(), 0.06, 0.7, "rail", 0.25, sides=4), psi, ax, ay, az)
