"""Serve video: cameras, files and iterators feed one extractor, and every frame that is not served is counted.

Imports neither torch nor OpenCV; OpenCV or PyAV is imported when a video or camera is opened.
"""

from phreg_deploy.stream.alarms import Alarm
from phreg_deploy.stream.frames import CameraFigures, Frame, StreamResult
from phreg_deploy.stream.limits import Limits
from phreg_deploy.stream.sources.source import Source
from phreg_deploy.stream.stream import Stream

__all__ = ["Alarm", "CameraFigures", "Frame", "Limits", "Source", "Stream", "StreamResult"]
