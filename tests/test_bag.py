"""ROS bags, written by rosbags: all three containers, all encodings, intrinsics and what can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore

from convlstm_vo import cli
from convlstm_vo.geometry.camera import Camera
from convlstm_vo.geometry.trajectory import read_tum
from convlstm_vo.models.checkpoint import DEFAULT_CHECKPOINT, load_checkpoint
from convlstm_vo.odometer import estimate_trajectory
from convlstm_vo.sequences import open_stream
from convlstm_vo.sequences.bag import BagStream
from convlstm_vo.sequences.base import SequenceError
from convlstm_vo.world import WorldSequence

HEIGHT, WIDTH = 96, 160
ROS1, ROS2 = get_typestore(Stores.ROS1_NOETIC), get_typestore(Stores.ROS2_HUMBLE)
Messages = list[tuple[str, int, Any]]  # topic, nanoseconds, message


def header(store: Any, nanoseconds: int) -> Any:
    time = store.types["builtin_interfaces/msg/Time"](*divmod(nanoseconds, 10**9))
    extra = {"seq": 0} if "seq" in store.types["std_msgs/msg/Header"].__dataclass_fields__ else {}
    return store.types["std_msgs/msg/Header"](**extra, stamp=time, frame_id="camera")


def image(
    store: Any, pixels: NDArray[Any], encoding: str, stamp: int = 0, *, padding: int = 0, big_endian: bool = False
) -> Any:
    rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(len(pixels), -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    shape = {"height": pixels.shape[0], "width": pixels.shape[1], "step": rows.shape[1]}
    kind = store.types["sensor_msgs/msg/Image"]
    return kind(
        header=header(store, stamp),
        encoding=encoding,
        is_bigendian=int(big_endian),
        data=rows.ravel(),
        **shape,
    )


def compressed(store: Any, pixels: NDArray[np.uint8], stamp: int = 0) -> Any:
    data = cv2.imencode(".png", pixels)[1].ravel()
    return store.types["sensor_msgs/msg/CompressedImage"](header=header(store, stamp), format="png", data=data)


def info(store: Any, K: list[float], D: list[float], P: list[float] | None = None, model: str = "plumb_bob") -> Any:
    kind = store.types["sensor_msgs/msg/CameraInfo"]
    capital = "K" in kind.__dataclass_fields__
    arrays = {
        "D": np.array(D, dtype=float),
        "K": np.array(K, dtype=float),
        "R": np.eye(3).ravel(),
        "P": np.array(P if P is not None else [0.0] * 12),
    }
    region = store.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    return kind(
        header=header(store, 0),
        height=HEIGHT,
        width=WIDTH,
        distortion_model=model,
        binning_x=0,
        binning_y=0,
        roi=region,
        **{name if capital else name.lower(): value for name, value in arrays.items()},
    )


def write(path: Path, make: Callable[[Any], Messages], kind: str = "mcap") -> Path:
    """A bag of the messages; the path to give to BagStream."""
    if kind == "bag":
        store, writer, serialize = ROS1, Writer1(path.with_suffix(".bag")), ROS1.serialize_ros1
    else:
        plugin = StoragePlugin.MCAP if kind == "mcap" else StoragePlugin.SQLITE3
        store, writer, serialize = ROS2, Writer2(path, version=9, storage_plugin=plugin), ROS2.serialize_cdr
    with writer:
        connections: dict[str, Any] = {}
        for topic, nanoseconds, message in make(store):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=store)
            writer.write(connections[topic], nanoseconds, serialize(message, message.__msgtype__))
    return path.with_suffix(".bag") if kind == "bag" else path


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def field_of_view(height: int, width: int) -> Camera:
    return Camera.from_fov(80, height=height, width=width)


@pytest.mark.parametrize("kind", ["bag", "mcap", "db3"])
def test_images_of_each_container(tmp_path: Path, kind: str) -> None:
    pixels = noise(4, HEIGHT, WIDTH)

    def make(store: Any) -> Messages:
        stamps = [10**9 * 5 + 10**8 * number for number in range(4)]
        return [
            ("/cam/image_raw", 10**9 + i, image(store, pixels[i], "mono8", stamps[i], padding=8)) for i in range(4)
        ]

    path = write(tmp_path / "drive", make, kind)
    stream = open_stream(str(path), field_of_view)
    assert isinstance(stream, BagStream) and stream.approximate_length == 4 and stream.name == "drive"
    for _ in range(2):  # read as often as one likes
        frames = list(stream)
        assert [frame.index for frame in frames] == [0, 1, 2, 3]
        np.testing.assert_allclose([frame.timestamp_s for frame in frames], [5.0, 5.1, 5.2, 5.3])
        np.testing.assert_array_equal([frame.image for frame in frames], pixels)
    if kind != "bag":
        file = next(path.glob(f"*.{kind}"))
        assert len(list(BagStream(file, field_of_view))) == 4  # the file inside the folder alone


def test_all_encodings(tmp_path: Path) -> None:
    rgb = cv2.resize(noise(12, 20, 3), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    gray = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))
    bgr, alpha = rgb[..., ::-1], np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    deep = gray.astype(np.uint16) * 257
    mosaic = np.where(np.indices(gray.shape).sum(0) % 2 == 0, rgb[..., 1], 0)  # green at even places
    mosaic[0::2, 1::2], mosaic[1::2, 0::2] = rgb[0::2, 1::2, 0], rgb[1::2, 0::2, 2]  # grbg
    uyvy = np.asarray(cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2YUV_UYVY))
    cases: list[tuple[str, Callable[[Any], Any], NDArray[np.uint8], float]] = [
        ("mono8", lambda s: image(s, gray, "mono8"), gray, 0),
        ("rgb8", lambda s: image(s, rgb, "rgb8"), rgb, 0),
        ("bgr8", lambda s: image(s, bgr, "bgr8", padding=3), rgb, 0),
        ("rgba8", lambda s: image(s, np.concatenate([rgb, alpha], -1), "rgba8"), rgb, 0),
        ("bgra8", lambda s: image(s, np.concatenate([bgr, alpha], -1), "bgra8"), rgb, 0),
        ("mono16", lambda s: image(s, deep, "mono16"), gray, 0),
        ("big", lambda s: image(s, deep.astype(">u2"), "16UC1", big_endian=True), gray, 0),
        ("bayer", lambda s: image(s, mosaic.astype(np.uint8), "bayer_grbg8"), rgb, 8),
        ("uyvy", lambda s: image(s, uyvy, "yuv422"), rgb, 20),
        ("yuyv", lambda s: image(s, uyvy[..., ::-1], "yuv422_yuy2"), rgb, 20),
        ("png", lambda s: compressed(s, bgr), rgb, 0),
        ("png gray", lambda s: compressed(s, gray), gray, 0),
    ]
    path = write(
        tmp_path / "bag",
        lambda s: [(f"/{name.split()[0]}{i}", i, make(s)) for i, (name, make, *_) in enumerate(cases)],
    )
    for i, (name, _, wanted, tolerance) in enumerate(cases):
        (frame,) = BagStream(path, field_of_view, topic=f"/{name.split()[0]}{i}")
        assert frame.image.shape == wanted.shape, name
        off = np.abs(frame.image.astype(float) - wanted)[4:-4, 4:-4]
        assert off.mean() <= tolerance / 4 and off.max() <= 8 * tolerance, (name, off.mean(), off.max())


K = [120.0, 0, 79.0, 0, 121.0, 47.0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["bag", "mcap"])
def test_intrinsics_come_from_the_bag(tmp_path: Path, kind: str) -> None:
    def make(distortion: list[float], topic: str) -> Callable[[Any], Messages]:
        P = [110.0, 0, 78.0, 0, 0, 111.0, 46.0, 0, 0, 0, 1, 0]
        return lambda store: [
            ("/cam/camera_info", 0, info(store, K, distortion, P)),
            (f"/cam/{topic}", 1, image(store, noise(HEIGHT, WIDTH), "mono8")),
        ]

    straight = BagStream(write(tmp_path / "a", make([0.0] * 5, "image_raw"), kind))
    assert straight.camera == Camera(120, 121, 79, 47, height=HEIGHT, width=WIDTH) and straight.lens is None
    bent = BagStream(write(tmp_path / "b", make([-0.2, 0.03, 0, 0, 0], "image_raw"), kind))
    assert bent.lens is not None and bent.camera == bent.lens.rectified != bent.lens.camera
    np.testing.assert_array_equal(next(iter(bent)).image, bent.lens.undistort(noise(HEIGHT, WIDTH)))
    rectified = BagStream(write(tmp_path / "c", make([-0.2, 0.03, 0, 0, 0], "image_rect"), kind))
    assert rectified.camera == Camera(110, 111, 78, 46, height=HEIGHT, width=WIDTH) and rectified.lens is None


def test_times_increase_whatever_the_stamps(tmp_path: Path) -> None:
    stamps = [int(1e9 * t) for t in (5.0, 5.0, 5.2, 4.9, 5.1)]  # twice the same; and a clock that is set back
    pixels = noise(5, HEIGHT, WIDTH)
    path = write(
        tmp_path / "odd",
        lambda s: [("/image", 10**9 + i, image(s, pixels[i], "mono8", stamps[i])) for i in range(5)],
    )
    stream = BagStream(path, field_of_view)
    for _ in range(2):
        np.testing.assert_allclose([frame.timestamp_s for frame in stream], [5.0, 5.1, 5.3, 5.5, 5.7])
        assert stream.restamped == 2


def test_a_bag_s_lens_bends_the_mask_too_and_names_are_no_sign_of_rectification(tmp_path: Path) -> None:
    def make(topic: str, model: str, distortion: list[float]) -> Callable[[Any], Messages]:
        P = [110.0, 0, 78.0, 0, 0, 111.0, 46.0, 0, 0, 0, 1, 0]
        return lambda store: [
            (f"{topic}/camera_info", 0, info(store, K, distortion, P, model=model)),
            (f"{topic}/image_raw", 1, image(store, noise(HEIGHT, WIDTH), "mono8")),
        ]

    bent = BagStream(write(tmp_path / "direct", make("/direct", "plumb_bob", [-0.2, 0.03, 0, 0, 0])))
    assert bent.lens is not None and bent.lens.camera.fx == 120
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[60:, :] = 0
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    found = cli._mask(tmp_path / "mask.png", bent)
    np.testing.assert_array_equal(found, bent.lens.undistort(mask))
    assert (found != mask).any()
    fisheye = BagStream(write(tmp_path / "fisheye", make("/wide", "equidistant", [0.0] * 4)))
    assert fisheye.lens is not None and fisheye.lens.model == "equidistant"


def test_mistakes(tmp_path: Path) -> None:
    gray = noise(HEIGHT, WIDTH)
    two = write(
        tmp_path / "two", lambda s: [(f"/{c}/image", 1, image(s, gray, "mono8")) for c in ("left", "right")]
    )
    with pytest.raises(SequenceError, match=r"choose one with --topic \(/left/image, /right/image\)"):
        BagStream(two, field_of_view)
    with pytest.raises(SequenceError, match=r"no images in topic '/up'; topics with images: /left/image"):
        BagStream(two, field_of_view, topic="/up")
    with pytest.raises(
        SequenceError, match=r"no /left/camera_info with the intrinsics of /left/image; give --calib"
    ):
        BagStream(two, topic="/left/image")
    depth = write(tmp_path / "depth", lambda s: [("/d", 1, image(s, gray.astype(np.float32), "32FC1"))])
    with pytest.raises(SequenceError, match=r"/d, image 0: encoding '32FC1' is not one of a camera"):
        BagStream(depth, field_of_view)
    none = write(tmp_path / "none", lambda s: [("/cam/camera_info", 0, info(s, K, [0.0] * 5))])
    with pytest.raises(SequenceError, match="no topic of images"):
        BagStream(none, field_of_view)
    sizes = write(
        tmp_path / "sizes", lambda s: [("/i", k, image(s, noise(HEIGHT - k, WIDTH), "mono8")) for k in range(2)]
    )
    with pytest.raises(SequenceError, match=r"/i, image 1: the image has another size"):
        list(BagStream(sizes, field_of_view))
    odd = write(
        tmp_path / "odd",
        lambda s: [
            ("/camera_info", 0, info(s, K, [0.1] * 5, model="moon")),
            ("/image", 1, image(s, gray, "mono8")),
        ],
    )
    with pytest.raises(SequenceError, match="distortion_model 'moon' is not known; it may be plumb_bob"):
        BagStream(odd)
    (tmp_path / "broken.bag").write_bytes(b"#ROSBAG V2.0\nbut no more")
    (tmp_path / "broken.mcap").write_bytes(b"nothing")
    for name in ("broken.bag", "broken.mcap"):
        with pytest.raises(SequenceError, match=rf"{name}: cannot be read as a bag .* reindex"):
            BagStream(tmp_path / name, field_of_view)
    with pytest.raises(SequenceError, match=r"missing\.bag: no such file"):
        BagStream(tmp_path / "missing.bag", field_of_view)


def test_from_a_bag_to_a_trajectory(tmp_path: Path) -> None:
    """One command, intrinsics from the bag: what the frames themselves give, to the last digit."""
    camera = Camera(110, 111, 79, 47, height=HEIGHT, width=WIDTH)
    drive = WorldSequence(5_000_010, frames=6, camera=camera, kind="town")
    matrix = [camera.fx, 0, camera.cx, 0, camera.fy, camera.cy, 0, 0, 1]

    def make(store: Any) -> Messages:
        frames = [compressed(store, drive[i].image, 10**8 * i) for i in range(6)]
        images = [("/cam/image_raw/compressed", 10**8 * i, frame) for i, frame in enumerate(frames)]
        return [("/cam/camera_info", 0, info(store, matrix, [])), *images]

    bag, out = write(tmp_path / "drive", make), tmp_path / "out"
    cli.main(["run", str(bag), "--out", str(out), "--format", "tum"])
    found = read_tum(out / "trajectory.txt")
    wanted = estimate_trajectory(load_checkpoint(DEFAULT_CHECKPOINT), drive)
    np.testing.assert_allclose(found.T_world_camera, wanted.T_world_camera, atol=1e-5)
    np.testing.assert_allclose(found.timestamps_s, np.arange(6) / 10)
    with pytest.raises(SystemExit):
        cli.main(["run", str(bag), "--topic", "/other", "--out", str(out)])
