"""A ROS 2 node: labels, dense features and the artifact rate of a camera's newest image.

    python examples/ros2_node.py --ros-args -p bundle:=/path/labels.bundle -r image:=/camera/image_raw

It reads `image` (sensor_msgs/Image: rgb8, bgr8 or mono8) and publishes, with the stamp and frame of the image,

- `~/labels`, sensor_msgs/Image, mono8: the class of each pixel, at the camera's size; only from a bundle with a head;
- `~/features`, sensor_msgs/Image, 32FC<C>: the features (Hp, Wp, C), while somebody subscribes; not from a
  bundle that serves heads alone;
- `~/artifact_rate`, std_msgs/Float32: the share of artifact tokens, 0 to 1.

Parameters: `bundle`; `backend` ("auto"); `threads` (0: the backend's own choice); `fallback` (a backend that takes over
if the first one fails, or ""); `deadline` (seconds from image to result beyond which it warns, 0 for none). While the
model is busy, a newer image replaces the one that waits. The whole image is resized to the model's input.
"""

from __future__ import annotations

import array
import sys
import threading
from typing import Any

import numpy as np
import rclpy
from PIL import Image as Picture
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Float32

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.stream import Alarm, Limits, Stream, StreamResult

CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1}
# Seconds between two lines of figures in the log, and between two warnings of bad messages.
REPORT, THROTTLE = 10.0, 5.0


def pixels_of(message: Image) -> np.ndarray:
    """Convert a message to uint8 RGB ``(H, W, 3)`` or grey ``(H, W)``; rows may be padded to ``step`` bytes.

    Raises:
        ValueError: another encoding, no pixel, or fewer bytes than its fields say.
    """
    channels = CHANNELS.get(message.encoding)
    if channels is None:
        raise ValueError(f"got the encoding {message.encoding!r}, expected {', '.join(CHANNELS)}")
    height, width, step = message.height, message.width, message.step
    flat = np.frombuffer(message.data, np.uint8)
    if not height or not width or step < width * channels or flat.size < height * step:
        raise ValueError(f"got {flat.size} bytes for {width}x{height} {message.encoding} in rows of {step} bytes")
    rows = flat[: height * step].reshape(height, step)[:, : width * channels]
    image = rows.reshape(height, width, channels)
    if message.encoding == "mono8":
        return np.ascontiguousarray(image[..., 0])
    return np.ascontiguousarray(image[..., ::-1] if message.encoding == "bgr8" else image)


def message_of(values: np.ndarray, encoding: str, header: Any) -> Image:
    """Make a message of an array ``(H, W)`` or ``(H, W, C)``."""
    values = np.ascontiguousarray(values)
    message = Image(header=header, height=values.shape[0], width=values.shape[1], encoding=encoding)
    message.is_bigendian = int(sys.byteorder == "big")
    message.step = values.nbytes // values.shape[0]
    # An array.array is taken as it is; the setter would check any other sequence byte by byte.
    message.data = array.array("B", values.tobytes())
    return message


class Topic:
    """A source of ``Stream``: the newest image of a topic, and the messages of those that are under way."""

    live, fps, color = True, None, "rgb"

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newest: tuple[Image, np.ndarray] | None = None
        self.closed, self._count = False, 0
        self._under_way: dict[int, Image] = {}

    def offer(self, message: Image, pixels: np.ndarray) -> None:
        with self._changed:
            self._newest = (message, pixels)
            self._changed.notify_all()

    def read(self) -> np.ndarray | None:
        with self._changed:
            while self._newest is None and not self.closed:
                self._changed.wait()
            if self._newest is None or self.closed:
                return None
            (message, pixels), self._newest = self._newest, None
            self._under_way[self._count] = message
            self._count += 1
            return pixels

    def message(self, index: int) -> Image:
        """The message of a frame; those of earlier frames are forgotten."""
        with self._changed:
            found = self._under_way[index]
            self._under_way = {number: one for number, one in self._under_way.items() if number > index}
            return found

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()


class DenseFeaturesNode(Node):
    """The node; ``close`` it before ``destroy_node``.

    Raises:
        PhregError: a bundle or backend that cannot be loaded, or a parameter out of bounds.
    """

    def __init__(self) -> None:
        super().__init__("dense_features")
        defaults = {"bundle": "", "backend": "auto", "threads": 0, "fallback": "", "deadline": 0.0}
        given = {name: self.declare_parameter(name, value).value for name, value in defaults.items()}
        if not given["bundle"]:
            raise PhregError("bundle: got none; expected its path: --ros-args -p bundle:=/path/student.bundle.")
        self.extractor = FeatureExtractor.load(given["bundle"], given["backend"], threads=given["threads"] or None)
        self.topic = Topic()
        try:
            self.stream = Stream(
                self.extractor,
                {"image": self.topic},
                fit="squash",
                limits=Limits(deadline=given["deadline"] or None),
                fallback=given["fallback"] or None,
                on_result=self._publish,
                on_alarm=self._warn,
            )
        except PhregError:
            self.extractor.close()
            raise
        self.labels = self.create_publisher(Image, "~/labels", 1)
        alone = self.extractor.manifest.only_heads
        self.features = None if alone else self.create_publisher(Image, "~/features", 1)
        self.rate = self.create_publisher(Float32, "~/artifact_rate", 1)
        self.stream.start()
        # One image waits in the middleware, and an image that is lost is not sent again: only the newest counts.
        newest = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(Image, "image", self._receive, newest)
        self.create_timer(REPORT, self._report)
        self.get_logger().info(f"{given['bundle']} on {self.extractor.choice}")

    def _receive(self, message: Image) -> None:
        try:
            pixels = pixels_of(message)
        except ValueError as error:
            self.get_logger().warning(f"image: {error}; it is dropped", throttle_duration_sec=THROTTLE)
            return
        self.topic.offer(message, pixels)

    def _publish(self, result: StreamResult) -> None:
        """Runs in the stream's thread."""
        message, dense = self.topic.message(result.frame.index), result.dense
        if dense.labels is not None:
            picture = Picture.fromarray(dense.labels[0])
            size = (message.width, message.height)
            labels = np.asarray(picture.resize(size, Picture.Resampling.NEAREST))
            self.labels.publish(message_of(labels, "mono8", message.header))
        if self.features is not None and self.features.get_subscription_count():
            values = dense.features[0]
            self.features.publish(message_of(values, f"32FC{values.shape[-1]}", message.header))
        self.rate.publish(Float32(data=float(dense.artifact_rate[0])))

    def _warn(self, alarm: Alarm) -> None:
        if not self.topic.closed:  # then the end of the topic is no failure
            self.get_logger().warning(str(alarm))

    def _report(self) -> None:
        if self.stream.wait(0):
            self.topic.close()
            self.stream.stop()  # raises what ended it, and so ends the node
        figures = self.stream.figures()["image"]
        if figures.latency_p50 is not None:
            self.get_logger().info(
                f"{figures.served} images served, {figures.dropped} dropped; latency {figures.latency_p50:.1f} ms, "
                f"99th percentile {figures.latency_p99:.1f} ms; artifact rate {figures.artifact_rate:.2%}"
            )

    def close(self) -> None:
        """End the stream and free the backend."""
        self.topic.close()
        self.stream.stop(quietly=True)
        self.extractor.close()


def main(args: list[str] | None = None) -> None:
    rclpy.init(args=args)
    node = None
    try:
        node = DenseFeaturesNode()
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except PhregError as error:
        raise SystemExit(str(error)) from None
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
