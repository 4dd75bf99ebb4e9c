"""Learned monocular visual odometry: the video of one moving camera in, a metric trajectory out.

Importing this package is cheap and has no side effects; import what you need from its modules, e.g.
``from convlstm_vo.odometer import VisualOdometry``.
"""

__version__ = "0.1.0"
