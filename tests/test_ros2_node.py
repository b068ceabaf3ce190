"""examples/ros2_node.py on stand-ins for rclpy's public classes (tests/ros_stubs), with a real bundle and stream."""

import array
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image as Picture

from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import ROOT, photograph

HEIGHT, WIDTH = 90, 120


@pytest.fixture(scope="module")
def ros():
    """The modules ``rclpy``, ``sensor_msgs.msg``, ``std_msgs.msg`` and the example; none is left behind."""
    before = set(sys.modules)
    sys.path.insert(0, str(ROOT / "tests" / "ros_stubs"))
    try:
        import rclpy
        from sensor_msgs import msg

        from examples import ros2_node

        yield rclpy, msg, ros2_node
    finally:
        sys.path.remove(str(ROOT / "tests" / "ros_stubs"))
        for name in set(sys.modules) - before:
            if (
                name.partition(".")[0] in ("rclpy", "sensor_msgs", "std_msgs", "message")
                or name == "examples.ros2_node"
            ):
                del sys.modules[name]


@pytest.fixture
def running(ros, labels_bundle):
    """``running(**parameters)`` runs ``main`` in a thread and returns its node; afterwards it is shut down."""
    rclpy, _, example = ros
    threads = []

    def start(**parameters):
        words = [word for pair in parameters.items() for word in ("-p", "{}:={}".format(*pair))]
        made = len(rclpy.node.Node.made)
        ready = threading.Event()
        rclpy.work.put(lambda node: ready.set())
        threads.append(threading.Thread(target=example.main, args=(["--ros-args", *words],)))
        threads[-1].start()
        assert ready.wait(20)
        return rclpy.node.Node.made[made]

    yield start
    rclpy.work.put(lambda node: rclpy.shutdown())
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("phreg-stream")]
    node = rclpy.node.Node.made[-1]
    assert node.destroyed
    assert not [text for _, text in node.logger.lines if "no more frames" in text]


def message(msg, encoding, pixels, padding=0, frame_id="camera"):
    """Encode uint8 ``(H, W, 3)`` RGB, rows padded with bytes that are no image."""
    if encoding == "mono8":
        pixels = np.asarray(Picture.fromarray(pixels).convert("L"))
    elif encoding == "bgr8":
        pixels = pixels[..., ::-1]
    rows = pixels.reshape(len(pixels), -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=171)
    header = msg.Header(stamp=77, frame_id=frame_id)
    size = {"height": pixels.shape[0], "width": pixels.shape[1], "step": rows.shape[1]}
    return msg.Image(header=header, encoding=encoding, data=array.array("B", rows.tobytes()), **size)


def send(ros, node, one):
    ros[0].work.put(lambda _: node.callbacks["image"](one))


def wait_for(publisher, count):
    with publisher.changed:
        assert publisher.changed.wait_for(lambda: len(publisher.messages) >= count, 20)
    return publisher.messages[count - 1]


@pytest.mark.parametrize(("encoding", "padding"), [("rgb8", 0), ("bgr8", 8), ("mono8", 5)])
def test_it_publishes_what_the_extractor_computes(ros, running, labels_bundle, encoding, padding):
    node = running(bundle=labels_bundle, backend="onnxruntime-cpu", threads=1)
    picture = photograph(3, WIDTH, HEIGHT)
    send(ros, node, message(ros[1], encoding, np.asarray(picture), padding))
    made = node.publishers_made
    rate = wait_for(made["~/artifact_rate"], 1)
    with FeatureExtractor.load(labels_bundle, "onnxruntime-cpu") as extractor:
        dense = extractor(picture.convert("L") if encoding == "mono8" else picture, fit="squash")
    labels, features = made["~/labels"].messages[0], made["~/features"].messages[0]
    assert (labels.encoding, labels.height, labels.width, labels.step) == ("mono8", HEIGHT, WIDTH, WIDTH)
    assert (labels.header.stamp, labels.header.frame_id) == (77, "camera")
    expected = np.asarray(Picture.fromarray(dense.labels[0]).resize((WIDTH, HEIGHT), Picture.Resampling.NEAREST))
    np.testing.assert_array_equal(np.frombuffer(labels.data, np.uint8).reshape(HEIGHT, WIDTH), expected)
    assert (features.encoding, features.height, features.width, features.step) == ("32FC128", 16, 16, 16 * 128 * 4)
    values = np.frombuffer(features.data, np.float32).reshape(16, 16, 128)
    np.testing.assert_allclose(values, dense.features[0], rtol=1e-4, atol=1e-4)
    assert rate.data == pytest.approx(dense.artifact_rate[0])
    assert node.qos["image"].reliability.name == "BEST_EFFORT"
    assert node.qos["image"].depth == 1


def test_features_are_published_only_while_somebody_subscribes(ros, running, demo_bundle):
    node = running(bundle=demo_bundle, backend="onnxruntime-cpu")
    made = node.publishers_made
    made["~/features"].subscribers = 0
    send(ros, node, message(ros[1], "rgb8", np.asarray(photograph(1, WIDTH, HEIGHT))))
    wait_for(made["~/artifact_rate"], 1)
    assert made["~/features"].messages == made["~/labels"].messages == []


def test_labels_alone_are_published_without_a_topic_of_features(ros, running, alone_bundle):
    node = running(bundle=alone_bundle, backend="onnxruntime-cpu")
    made = node.publishers_made
    assert set(made) == {"~/labels", "~/artifact_rate"}
    send(ros, node, message(ros[1], "rgb8", np.asarray(photograph(1, WIDTH, HEIGHT))))
    wait_for(made["~/artifact_rate"], 1)
    assert wait_for(made["~/labels"], 1).width == WIDTH


def test_the_newest_image_wins_and_keeps_its_header(ros, running, labels_bundle):
    node = running(bundle=labels_bundle, backend="onnxruntime-cpu")
    run, busy, go = node.extractor.dense, threading.Event(), threading.Event()

    def held(batch):
        busy.set()
        assert go.wait(20)
        return run(batch)

    node.extractor.dense = held
    pixels = np.asarray(photograph(2, WIDTH, HEIGHT))
    send(ros, node, message(ros[1], "rgb8", pixels, frame_id="0"))
    assert busy.wait(20)
    for number in range(1, 6):
        send(ros, node, message(ros[1], "rgb8", pixels, frame_id=str(number)))
    done = threading.Event()
    ros[0].work.put(lambda _: done.set())
    assert done.wait(20)
    while node.topic._newest is not None:  # until the stream has taken it
        time.sleep(0.01)
    go.set()
    labels = node.publishers_made["~/labels"]
    wait_for(labels, 2)
    assert labels.messages[1].header.frame_id == "5"
    assert labels.messages[0].header.frame_id == "0"
    assert len(labels.messages) == 2


def test_bad_messages_are_dropped_with_a_warning(ros, running, labels_bundle):
    _, msg, _ = ros
    node = running(bundle=labels_bundle, backend="onnxruntime-cpu")
    pixels = np.asarray(photograph(2, WIDTH, HEIGHT))
    depth, short, narrow, empty = (message(msg, "rgb8", pixels) for _ in range(4))
    depth.encoding, short.data, narrow.step, empty.height = "16UC1", short.data[:-1], WIDTH, 0
    for one in (depth, short, narrow, empty):
        send(ros, node, one)
    send(ros, node, message(msg, "rgb8", pixels))
    wait_for(node.publishers_made["~/artifact_rate"], 1)
    warned = [text for severity, text in node.logger.lines if severity == "warning"]
    assert len(warned) == 4
    assert "got the encoding '16UC1', expected rgb8, bgr8, mono8" in warned[0]
    assert f"got {3 * WIDTH * HEIGHT - 1} bytes for {WIDTH}x{HEIGHT} rgb8 in rows of {3 * WIDTH} bytes" in warned[1]


def test_figures_are_logged_and_a_failed_backend_ends_the_node(ros, labels_bundle):
    rclpy, msg, example = ros
    rclpy.init(args=["--ros-args", "-p", f"bundle:={labels_bundle}", "-p", "backend:=onnxruntime-cpu"])
    node = example.DenseFeaturesNode()
    try:
        one = message(msg, "rgb8", np.asarray(photograph(2, WIDTH, HEIGHT)))
        node.callbacks["image"](one)
        wait_for(node.publishers_made["~/artifact_rate"], 1)
        node._report()
        assert "1 images served, 0 dropped; latency " in node.logger.lines[-1][1]

        def fail(batch):
            raise MemoryError("no memory")

        node.extractor.dense = fail
        node.callbacks["image"](one)
        assert node.stream.wait(20)
        with pytest.raises(MemoryError):
            node._report()
    finally:
        node.close()
        rclpy.shutdown()


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ([], "bundle: got none"),
        (["-p", "bundle:=/nowhere"], "/nowhere"),
        (["-p", "bundle:=BUNDLE", "-p", "fallback:=abacus"], "abacus"),
        (["-p", "bundle:=BUNDLE", "-p", "deadline:=-1.0"], "deadline: got -1.0 s"),
    ],
)
def test_a_wrong_parameter_is_a_message(ros, labels_bundle, parameters, reason):
    words = [word.replace("BUNDLE", str(labels_bundle)) for word in parameters]
    with pytest.raises(SystemExit, match=reason):
        ros[2].main(["--ros-args", *words, "-p", "backend:=onnxruntime-cpu"])
    assert not ros[0].ok()
