"""The built-in world: streets, drives along them, and their pictures with exact labels, all from seeds."""

from convlstm_vo.world.drives import Drive, Mount, make_drive
from convlstm_vo.world.lens import Distortion, WorldError
from convlstm_vo.world.plan import Plan, make_plan
from convlstm_vo.world.render import Labels
from convlstm_vo.world.sensor import Sensor
from convlstm_vo.world.sequence import KITTI_CAMERA, RoadKind, WorldSequence, endless
from convlstm_vo.world.simulate import SimulateConfig, simulate
from convlstm_vo.world.streets import Street, make_street
from convlstm_vo.world.traffic import Traffic, TrafficKind, heavy_traffic

__all__ = [
    "KITTI_CAMERA",
    "Distortion",
    "Drive",
    "Labels",
    "Mount",
    "Plan",
    "RoadKind",
    "Sensor",
    "SimulateConfig",
    "Street",
    "Traffic",
    "TrafficKind",
    "WorldError",
    "WorldSequence",
    "endless",
    "heavy_traffic",
    "make_drive",
    "make_plan",
    "make_street",
    "simulate",
]
