"""Sources of streams: videos through OpenCV and PyAV, folders, iterables, and what cannot be opened."""

import sys
import time

import numpy as np
import pytest

from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.stream import Stream
from phreg_deploy.stream.sources.addresses import public_name
from phreg_deploy.stream.sources.opening import IterableSource, open_source
from tests.video_files import SIZE, video_frames, write_video

FRAMES = video_frames(8)


@pytest.fixture(scope="module")
def extractor(bundle):
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "drive.avi", FRAMES, fps=200)


@pytest.fixture(params=["cv2", "av"])
def reader(request, monkeypatch):
    """One of the two libraries, with the other one missing."""
    pytest.importorskip(request.param)
    monkeypatch.setitem(sys.modules, {"cv2": "av", "av": "cv2"}[request.param], None)
    return request.param


def test_a_video_gives_its_frames_in_rgb_order(video, reader, extractor):
    source = open_source(video)
    assert type(source).__module__.endswith({"cv2": "opencv_source", "av": "pyav_source"}[reader])
    assert (source.live, source.fps) == (False, 200)
    frames = []
    while (frame := source.read()) is not None:
        frames.append(frame if source.color == "rgb" else frame[..., ::-1])
    source.close()
    assert [frame.shape for frame in frames] == [(*SIZE, 3)] * 8
    for got, expected in zip(frames, FRAMES):
        assert np.abs(got.astype(int) - expected).mean() < 12, "Motion JPEG loses a little, not the channels' order"


def test_a_stream_of_a_video_has_the_features_of_its_frames(video, reader, extractor):
    with Stream(extractor, video, every_frame=True) as stream:
        results = list(stream)
    assert len(results) == 8
    for result in results:
        assert result.frame.color == {"cv2": "bgr", "av": "rgb"}[reader]
        right = result.frame.image if reader == "av" else result.frame.image[..., ::-1]
        np.testing.assert_allclose(result.dense.features, extractor(right).features, rtol=1e-5, atol=1e-6)


def test_a_video_is_paced_at_its_own_rate(tmp_path, extractor):
    path = write_video(tmp_path / "slow.avi", FRAMES[:4], fps=50)
    started, times = time.monotonic(), []
    with Stream(extractor, str(path)) as stream:
        times = [result.frame.captured - started for result in stream]
        received = stream.figures()["camera"].received
    assert received == 4
    assert times[-1] >= 3 / 50
    assert stream.figures()["camera"].dropped + len(times) == 4


def test_a_folder_and_iterables_are_sources(photos, extractor):
    folder = open_source(photos)
    assert isinstance(folder, IterableSource)
    assert folder.read().name == "frame-00.png"
    assert open_source(np.stack(FRAMES)).read().shape == (*SIZE, 3)
    assert open_source(iter(FRAMES)).read() is FRAMES[0]
    assert open_source(folder) is folder
    with Stream(extractor, photos, every_frame=True) as stream:
        assert sum(1 for _ in stream) == 24


def test_generators_are_closed():
    closed = []

    def frames():
        try:
            yield from FRAMES
        finally:
            closed.append(True)

    source = open_source(frames())
    source.read()
    source.close()
    assert closed == [True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: tmp / "none.mp4", "there is no file"),
        (lambda tmp: tmp / "text.mp4", "Is it a video, and whole?"),
        (lambda _tmp: FRAMES[0], "expected frames (N, H, W, 3)"),
        (lambda _tmp: b"frames", "source: got bytes, expected a video file"),
        (lambda _tmp: True, "source: got bool"),
        (lambda _tmp: None, "source: got NoneType"),
        (lambda tmp: tmp, "holds no image"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, make, message, capfd, reader):
    place = make(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(PhregError) as error:
        open_source(place)
    assert message in str(error.value)


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    for name in ("cv2", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "drive.mp4").write_bytes(b"0")
    for place in (tmp_path / "drive.mp4", 0, "rtsp://camera/stream"):
        with pytest.raises(BackendMissing, match=r"phreg-deploy\[video\]"):
            open_source(place)


def test_passwords_of_addresses_are_not_shown():
    assert public_name("rtsp://user:secret@camera/stream") == "rtsp://camera/stream"
    assert public_name("drive@home.mp4") == "drive@home.mp4"
