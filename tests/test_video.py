"""Folders, videos and where intrinsics come from."""

from __future__ import annotations

import struct
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from convlstm_vo.geometry.camera import Camera, CameraError
from convlstm_vo.sequences import open_stream
from convlstm_vo.sequences.base import SequenceError, Stream
from convlstm_vo.sequences.calibration import camera_from
from convlstm_vo.sequences.video import ImageFolder, VideoStream
from tests.trees import HEIGHT, WIDTH, write_tree


def field_of_view(height: int, width: int) -> Camera:
    return Camera.from_fov(80, height=height, width=width)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tree(tmp_path, {"00": 5}) / "sequences" / "00" / "image_0"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (64, 48))
    for i in range(6):
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, : 10 * i, 2] = 255  # red in OpenCV's order
        writer.write(image)
    writer.release()
    return path


def test_a_folder_of_images_takes_the_times_beside_it(folder: Path) -> None:
    (folder.parent / "times.txt").write_text("0\n1\n2\n3\n4.5\n")
    stream = open_stream(str(folder), field_of_view)
    assert isinstance(stream, ImageFolder) and isinstance(stream, Stream)
    assert [frame.timestamp_s for frame in stream] == [0, 1, 2, 3, 4.5]
    (folder.parent / "times.txt").unlink()
    assert ImageFolder(folder, field_of_view, fps=4)[2].timestamp_s == 0.5
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(SequenceError, match="must be positive frames a second"):
            ImageFolder(folder, field_of_view, fps=rate)


def test_a_video_gives_rgb_frames_at_its_rate(video: Path) -> None:
    stream = open_stream(str(video), field_of_view)
    assert isinstance(stream, VideoStream)
    frames = list(stream)
    assert len(frames) == 6 == stream.approximate_length
    assert [frame.timestamp_s for frame in frames] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25])
    red, green, _ = frames[5].image[20, 10].tolist()
    assert red > 200 and green < 60
    with pytest.raises(SequenceError, match="only once"):
        list(stream)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_phones_video_comes_frame_for_frame_with_its_times(tmp_path: Path, suffix: str) -> None:
    """H.264 of no constant rate, whose frames lie in the file in another order than they are shown in."""
    path, times_ms = tmp_path / f"drive.{suffix}", [0, 33, 67, 100, 167, 200, 233, 300, 333, 367, 400, 467]
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=30, options={"bf": "3", "b-adapt": "0", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64), 20 * number, np.uint8), format="gray")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        film.mux(packets)
    assert [p.pts for p in packets] != sorted(p.pts for p in packets)  # frames that look ahead
    frames = list(open_stream(str(path), field_of_view))
    assert [frame.timestamp_s for frame in frames] == pytest.approx(np.array(times_ms) / 1000, abs=1e-3)
    grey = [float(frame.image.mean()) for frame in frames]
    np.testing.assert_allclose(grey, 20 * np.arange(12), atol=6)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_phones_video_comes_as_it_was_held(tmp_path: Path, quarters: int) -> None:
    """How it was held is a matrix in the file's track header, which turns the frames clockwise."""
    path, image = tmp_path / "drive.mp4", np.zeros((48, 64), np.uint8)
    image[:16, :16] = 255
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        film.mux(stream.encode())
    data = bytearray(path.read_bytes())
    a, b, right, down = {1: (0, 1, 48, 0), 2: (-1, 0, 64, 48), 3: (0, -1, 0, 64)}[quarters]
    one, at = 1 << 16, data.index(b"tkhd") + 44
    rows = (a * one, b * one, 0, -b * one, a * one, 0, right * one, down * one, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *rows)
    path.write_bytes(data)
    video = open_stream(str(path), field_of_view)
    held = np.rot90(image, -quarters)
    assert (video.camera.height, video.camera.width) == held.shape
    np.testing.assert_allclose(next(iter(video)).image[..., 0], held, atol=60)


class FakeCapture:
    """A source of small images, whose number is their grey level, as OpenCV gives them."""

    def __init__(self, times_ms: list[float], length: int) -> None:
        self.times_ms, self.length, self.number = times_ms, length, -1
        self.may_give = threading.Semaphore(1)
        self.waits = threading.Event()
        self.released = threading.Event()

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        if not self.may_give.acquire(blocking=False):
            self.waits.set()
            self.may_give.acquire()
        self.number += 1
        if self.number >= len(self.times_ms):
            return False, None
        return True, np.full((48, 64, 3), self.number, np.uint8)

    def get(self, what: int) -> float:
        if what == cv2.CAP_PROP_POS_MSEC:
            return self.times_ms[min(self.number, len(self.times_ms) - 1)]
        return {cv2.CAP_PROP_FPS: 20.0, cv2.CAP_PROP_FRAME_COUNT: self.length}[what]

    def release(self) -> None:
        self.released.set()

    def give(self, count: int) -> None:
        """Let so many frames come, and wait until all of them were taken."""
        self.waits.clear()
        self.may_give.release(count)
        assert self.waits.wait(10)


@pytest.mark.parametrize(
    ("told_ms", "expected"),
    [
        ([0, 33, 100, 133, 300], [0, 0.033, 0.1, 0.133, 0.3]),  # a phone's, at no constant rate
        ([40, 73, 140], [0, 0.033, 0.1]),  # it need not begin at zero
        ([0, 0, 0, 0], [0, 0.05, 0.1, 0.15]),  # a format that tells nothing
        ([0, 50, 50, 0], [0, 0.05, 0.1, 0.15]),  # and one that stops telling
    ],
)
def test_times_of_a_video_are_those_of_its_frames(monkeypatch, told_ms, expected) -> None:
    capture = FakeCapture(told_ms, len(told_ms))
    capture.may_give.release(100)
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: capture)
    stream = VideoStream("drive.mp4", field_of_view)
    frames = list(stream)
    assert [frame.timestamp_s for frame in frames] == pytest.approx(expected) and not stream.live
    assert capture.released.is_set()


@pytest.mark.parametrize("source", [0, "rtsp://camera.local/stream"])
def test_a_live_source_gives_its_newest_frame_with_the_time_it_came(monkeypatch, source) -> None:
    capture = FakeCapture([0.0] * 12, 0)
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: capture)
    monkeypatch.setattr(time, "monotonic", lambda: 7 + capture.number / 10)
    stream = VideoStream(source, field_of_view)
    assert stream.approximate_length is None and stream.live
    assert capture.waits.wait(10)
    capture.give(3)  # 1, 2 and 3, while the odometer warms up
    frames = iter(stream)
    seen = [next(frames)]
    for count in (1, 4, 2):  # 4; 5 to 8, of which the last is seen; 9 and 10
        capture.give(count)
        seen.append(next(frames))
    assert [int(frame.image[0, 0, 0]) for frame in seen] == [3, 4, 8, 10]
    assert [frame.index for frame in seen] == [0, 1, 5, 7]
    assert [frame.timestamp_s for frame in seen] == pytest.approx([0, 0.1, 0.5, 0.7])
    assert stream.dropped == 4
    capture.may_give.release(2)  # 11, and the end
    assert [frame.index for frame in frames] == [8]
    assert capture.released.wait(10)
    with pytest.raises(SequenceError, match="only once"):
        next(iter(stream))


def test_who_has_seen_enough_of_a_camera_leaves_no_thread_behind(monkeypatch) -> None:
    capture = FakeCapture([0.0] * 1000, 0)
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: capture)
    frames = iter(VideoStream(0, field_of_view))
    capture.may_give.release(2)
    next(frames)
    frames.close()
    capture.may_give.release(100)
    assert capture.released.wait(10)


def test_a_camera_that_fails_after_its_first_frame_ends(monkeypatch) -> None:
    def fail() -> None:
        raise cv2.error("unplugged")

    monkeypatch.setattr(threading, "excepthook", lambda problem: None)
    for problem in (fail, lambda: (False, None)):
        capture = FakeCapture([0.0], 0)
        monkeypatch.setattr(cv2, "VideoCapture", lambda source, capture=capture: capture)
        stream = VideoStream(0, lambda h, w, c=capture, p=problem: setattr(c, "read", p) or field_of_view(h, w))
        assert [frame.index for frame in stream] == [0]
        assert capture.released.wait(10)


def test_sources_that_cannot_be_opened(tmp_path: Path, folder: Path, video: Path) -> None:
    with pytest.raises(SequenceError, match="no such file or folder"):
        open_stream(str(tmp_path / "nothing.mp4"), field_of_view)
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    with pytest.raises(SequenceError, match="is a text, not a video"):
        open_stream(str(text), field_of_view)
    text.write_text("ein Text, kein Video: äöü")
    with pytest.raises(SequenceError, match="is a text, not a video"):
        open_stream(str(text), field_of_view)
    (tmp_path / "list.m3u8").write_text("#EXTM3U")  # may name one
    with pytest.raises(SequenceError, match="cannot be opened as a video"):
        open_stream(str(tmp_path / "list.m3u8"), field_of_view)
    text.write_bytes(bytes(range(256)))
    with pytest.raises(SequenceError, match="cannot be opened as a video"):
        open_stream(str(text), field_of_view)
    with pytest.raises(SequenceError, match="is one image; name the folder"):
        open_stream(str(next(folder.glob("*.png"))), field_of_view)
    for source in (folder, video):
        with pytest.raises(SequenceError, match="carries no intrinsics"):
            open_stream(str(source))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SequenceError, match="no images"):
        open_stream(str(tmp_path / "empty"), field_of_view)


def test_intrinsics_of_another_image_size(folder: Path) -> None:
    camera = Camera(700, 700, 600, 180, height=370, width=1226)
    with pytest.raises(SequenceError, match=f"images are {HEIGHT}x{WIDTH}, but the intrinsics belong to 370x1226"):
        ImageFolder(folder, lambda height, width: camera)


def test_four_sources_of_intrinsics(tmp_path: Path) -> None:
    size = {"height": 480, "width": 640}
    assert camera_from(**size, intrinsics=(500, 510, 320, 240)) == Camera(500, 510, 320, 240, **size)
    assert camera_from(**size, fov_deg=90).fx == pytest.approx(320)
    kitti = tmp_path / "calib.txt"
    kitti.write_text("P0: 500 0 320 0 0 510 240 0 0 0 1 0\nP2: 400 0 320 0 0 410 240 0 0 0 1 0\n")
    assert camera_from(**size, calibration=kitti) == Camera(500, 510, 320, 240, **size)
    assert camera_from(**size, calibration=kitti, camera=2).fx == 400
    ros = tmp_path / "camera.yaml"
    ros.write_text(
        "image_width: 640\nimage_height: 480\n"
        "camera_matrix: {rows: 3, cols: 3, data: [500, 0, 320, 0, 510, 240, 0, 0, 1]}\n"
        "distortion_coefficients: {rows: 1, cols: 5, data: [0, 0, 0, 0, 0]}\n"
    )
    assert camera_from(**size, calibration=ros) == Camera(500, 510, 320, 240, **size)


def test_intrinsics_that_cannot_be_used(tmp_path: Path) -> None:
    size = {"height": 480, "width": 640}
    with pytest.raises(SequenceError, match="no source of intrinsics: give exactly one"):
        camera_from(**size)
    with pytest.raises(SequenceError, match="more than one source"):
        camera_from(**size, fov_deg=80, intrinsics=(1, 1, 1, 1))
    with pytest.raises(CameraError, match="must be positive"):
        camera_from(**size, intrinsics=(-1, 1, 1, 1))
    ros = tmp_path / "camera.yaml"
    ros.write_text("image_width: 640\n")
    with pytest.raises(SequenceError, match=r"camera\.yaml: has no camera_matrix; it needs"):
        camera_from(**size, calibration=ros)
    ros.write_text(
        "image_width: 640\nimage_height: 480\ncamera_matrix: {data: [500, 0, 320, 0, 510, 240, 0, 0, 1]}\n"
        "distortion_coefficients: {data: [0.1, 0, 0, 0, 0]}\n"
    )
    with pytest.raises(SequenceError, match="undistort"):
        camera_from(**size, calibration=ros)
