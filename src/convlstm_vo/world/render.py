"""From a street and a ride to pictures: gathers what is in view and hands it to the compiled kernels."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from numpy.typing import NDArray

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.world.drives import Drive
from convlstm_vo.world.lens import Lens
from convlstm_vo.world.streets import Street

Array = NDArray[np.float64]
VIEW_M = 420.0
LEAST_PX = 0.8  # smaller things are left out
FAR_SHARE = 0.08  # of the focal length: from there on, in metres, a leaf card of half a metre is 4 pixels


@dataclasses.dataclass(frozen=True)
class Labels:
    """What is exactly known of a frame.

    Attributes:
        depth: (height, width) float32, metres along the optical axis; inf for sky.
        flow: (height, width, 2) float32, motion in pixels (x, y) to the next frame of the surface seen here.
        moving: (height, width) bool, surfaces that move on their own.
    """

    depth: NDArray[np.float32]
    flow: NDArray[np.float32]
    moving: NDArray[np.bool_]


def _inverse(T: Array) -> Array:
    R = np.swapaxes(T[..., :3, :3], -1, -2)
    out = np.zeros_like(T)
    out[..., :3, :3], out[..., 3, 3] = R, 1.0
    out[..., :3, 3] = -(R @ T[..., :3, 3:])[..., 0]
    return out


class Renderer:
    """Renders frames of one drive; holds buffers, so use one for each thread.

    Args:
        street: what there is. drive: where the camera is, by frame. lens: the camera.
        sharpness: levels of detail that textures are sharpened by (0: as the sampling theorem asks).
    """

    def __init__(self, street: Street, drive: Drive, lens: Lens, *, sharpness: float = 0.5) -> None:
        from convlstm_vo.world.raster import COLUMNS, SAMPLES, TILE_H, TILE_W

        camera = lens.pinhole
        self.street, self.drive, self.lens, self.camera, self.sharpness = street, drive, lens, camera, sharpness
        shape = (camera.height, camera.width, SAMPLES)
        self._inverse_depth, self._seen = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
        self._table = np.zeros((60_000, COLUMNS))
        self._light = np.zeros(shape[:2], np.float32)
        tiles = np.empty((-(-camera.height // TILE_H), -(-camera.width // TILE_W)), np.float32)
        self._scratch = tiles, np.empty((4, 3)), np.empty((6, 6)), np.empty(SAMPLES), np.empty(SAMPLES)
        self._camera = np.array([*camera.intrinsics, camera.height, camera.width])
        movers = drive.T_street_mover.shape[1]
        scene = street.scene
        self._frames = np.concatenate([np.zeros(scene.movers_from, np.int64), 1 + np.arange(movers)])
        self._cone = _view_cone(camera)

    def light(self, index: int) -> NDArray[np.float32]:
        """Light that reaches each pixel of a frame: (height, width) float32, 1 about as bright as the horizon."""
        from convlstm_vo.world.shade import shade

        self._see(index)
        street, scene = self.street, self.street.scene
        weather, R = street.weather, np.ascontiguousarray(self.drive.T_street_camera[index, :3, :3])
        shade(self._seen, self._table, scene.material_table, scene.marks, scene.bank.atlas, scene.bank.textures,
              weather.haze, -self.sharpness, self._camera, R, weather.sky, self._light)  # fmt: skip
        if self.lens.bends:
            places = self.lens.places_xy.astype(np.float32)
            return cv2.remap(self._light, places[..., 0], places[..., 1], cv2.INTER_CUBIC)  # type: ignore[return-value]
        return self._light

    def labels(self, index: int) -> Labels:
        """Depth, flow and movers of a frame; of the last one the flow is NaN."""
        self._see(index)
        return self.labels_of_last(index)

    def labels_of_last(self, index: int) -> Labels:
        """Labels of the frame whose light was asked for last, without looking again."""
        labels = self._labels(index, min(index + 1, len(self.drive.timestamps_s) - 1))
        if index + 1 == len(self.drive.timestamps_s):
            labels.flow[:] = np.nan
        return labels

    def velocity_of_last(self, index: int) -> NDArray[np.float32]:
        """(height, width, 2) pixels a frame, of the frame whose light was asked for last; also of the last one."""
        if index + 1 < len(self.drive.timestamps_s):
            return self._labels(index, index + 1).flow
        return -self._labels(index, max(index - 1, 0)).flow

    def _labels(self, index: int, after: int) -> Labels:
        from convlstm_vo.world.shade import label

        places = self.lens.places_xy
        shape = places.shape[:2]
        depth, flow = np.empty(shape, np.float32), np.empty((*shape, 2), np.float32)
        moving = np.empty(shape, np.bool_)
        label(self._seen, self._table, self._camera, self._motions(index, after), places, depth, flow, moving)
        if self.lens.bends:
            ys, xs = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
            flow = (self.lens.seen_at(places + flow) - np.stack([xs, ys], -1)).astype(np.float32)
        return Labels(depth, flow, moving)

    def _see(self, index: int) -> None:
        from convlstm_vo.world.raster import rasterise

        scene = self.street.scene
        T_camera_street = _inverse(self.drive.T_street_camera[index])
        transforms = np.concatenate([T_camera_street[None], T_camera_street @ self.drive.T_street_mover[index]])[
            :, :3
        ]
        order, ranges, spheres = self._in_view(transforms)
        rasterise(order, ranges, spheres, self._frames, scene.quads, scene.uvs, scene.tones, scene.materials,
                  np.ascontiguousarray(transforms), scene.masks, scene.bank.atlas, scene.bank.textures,
                  self._camera, self._inverse_depth, self._seen, self._table, *self._scratch)  # fmt: skip

    def _in_view(self, transforms: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        """Objects whose sphere touches the view, nearest first; their ranges of quads (n, 2); spheres (n, 4)."""
        scene = self.street.scene
        M = transforms[self._frames]
        at = (M[:, :, :3] * scene.middles[:, None, :]).sum(-1) + M[:, :, 3]
        inside = (at @ self._cone.T >= -scene.radii[:, None]).all(1)
        distance = np.sqrt((at * at).sum(-1)) - scene.radii
        visible = inside & (distance < VIEW_M) & (scene.radii * self.camera.fx > LEAST_PX * distance)
        found = np.flatnonzero(visible)
        order = found[np.argsort(distance[found], kind="stable")]
        far = distance[order] > FAR_SHARE * self.camera.fx
        spheres = np.concatenate([at[order], scene.radii[order, None]], 1)
        return order, np.where(far[:, None], scene.ranges[order, 2:], scene.ranges[order, :2]), spheres

    def _motions(self, index: int, after: int) -> Array:
        """(movers + 2, 3, 4): from one camera to another, for standing things, movers and the sky."""
        T_after_street = _inverse(self.drive.T_street_camera[after])
        T_street_camera = self.drive.T_street_camera[index]
        still = (T_after_street @ T_street_camera)[None]
        now, then = self.drive.T_street_mover[index], self.drive.T_street_mover[after]
        moved = T_after_street @ then @ _inverse(now) @ T_street_camera
        motions = np.concatenate([still, moved, still])[:, :3].copy()
        motions[-1, :, 3] = 0.0
        return motions


def _view_cone(camera: Camera) -> Array:
    """Inward unit normals (5, 3) of the planes that bound what a camera sees."""
    left, right = (-0.5 - camera.cx) / camera.fx, (camera.width - 0.5 - camera.cx) / camera.fx
    top, bottom = (-0.5 - camera.cy) / camera.fy, (camera.height - 0.5 - camera.cy) / camera.fy
    planes = np.array([[1, 0, -left], [-1, 0, right], [0, 1, -top], [0, -1, bottom], [0, 0, 1.0]])
    return planes / np.sqrt((planes * planes).sum(1, keepdims=True))
