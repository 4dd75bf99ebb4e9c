"""The built-in world: streets, drives along them, and their pictures with exact labels, all from seeds."""

from convlstm_vo.world.drives import Drive, Mount, make_drive
from convlstm_vo.world.lens import Distortion, WorldError
from convlstm_vo.world.plan import Plan, make_plan
from convlstm_vo.world.render import Labels
from convlstm_vo.world.sensor import Sensor
from convlstm_vo.world.sequence import KITTI_CAMERA, RoadKind, WorldSequence, endless
from convlstm_vo.world.simulate import SimulateConfig, simulate
from convlstm_vo.world.streets import Street, make_street

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
    "WorldError",
    "WorldSequence",
    "endless",
    "make_drive",
    "make_plan",
    "make_street",
    "simulate",
]
