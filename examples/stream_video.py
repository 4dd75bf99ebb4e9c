"""Track a camera through a video, frame by frame: python examples/stream_video.py VIDEO CHECKPOINT [FOV_DEGREES]"""

import sys

from convlstm_vo.geometry.camera import Camera
from convlstm_vo.odometer import VisualOdometry
from convlstm_vo.sequences.video import VideoStream

video, checkpoint = sys.argv[1:3]
fov = float(sys.argv[3]) if len(sys.argv) > 3 else 80.0

stream = VideoStream(video, lambda height, width: Camera.from_fov(fov, height=height, width=width))
odometer = VisualOdometry.from_checkpoint(checkpoint, stream.camera)
for frame in stream:  # frame.image: uint8 (height, width, 3) RGB
    tracked = odometer.track(frame)  # the recurrent state stays inside the odometer
    x, y, z = tracked.T_world_camera[:3, 3]  # metres; x right, y down, z forward, from the first frame
    print(f"{tracked.timestamp_s:8.2f} s  x {x:8.2f}  y {y:8.2f}  z {z:8.2f}  ({1000 * tracked.seconds:.0f} ms)")
