"""``watch``: its figures, alarms, overlay video and display."""

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from tests.video_files import video_frames, write_video

HERE = ("--backend", "onnxruntime-cpu", "--threads", "1", "--json")


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "drive.avi", video_frames(8), fps=100)


def test_every_frame_is_served_and_reported(world, run_cli, video):
    outcome = run_cli("watch", video, world.bundle, "--every-frame", "--deadline", "60000", *HERE)
    assert outcome.code == 0, outcome.err
    report = outcome.document
    (camera,) = report["cameras"]
    assert (camera["received"], camera["served"], camera["dropped"], camera["pending"]) == (8, 8, 0, 0)
    assert (camera["camera"], camera["late"], report["backend"]) == (str(video), 0, "onnxruntime-cpu")
    assert report["alarm_counts"] == {"ended": 1}
    assert "the source ended, after 8 frames" in report["alarms"][0]["message"]
    assert "Alarm (ended): " in outcome.err
    assert "latency p50 ms" in outcome.err


def test_frames_ends_it_and_counts_balance(world, run_cli, video, photos):
    report = run_cli("watch", video, world.bundle, "--also", photos, "--frames", "3", "--quiet", *HERE).document
    served, dropped = (sum(camera[kind] for camera in report["cameras"]) for kind in ("served", "dropped"))
    # On a busy machine the sources may end before, since newer frames replace those that wait.
    assert served == 3 or (0 < served < 3 and dropped > 0)
    assert {camera["camera"] for camera in report["cameras"]} == {str(video), str(photos)}
    for camera in report["cameras"]:
        assert camera["received"] == camera["served"] + camera["dropped"]


@pytest.mark.parametrize(("more", "late"), [([], "-"), (["--deadline", "60000"], "0.000")])
def test_only_a_deadline_can_be_missed(world, run_cli, video, monkeypatch, more, late):
    monkeypatch.chdir(video.parent)
    outcome = run_cli("watch", video.name, world.bundle, "--frames", "2", *more, *HERE)
    (row,) = [line.split() for line in outcome.err.splitlines() if "drive.avi" in line and "Alarm" not in line]
    assert row[5] == late


def test_what_opencv_tries_is_not_written_on_stderr(capfd):
    pytest.importorskip("cv2")
    from phreg_deploy.stream.sources.opencv_source import OpenCVSource

    with pytest.raises(PhregError, match=r"OpenCV cannot open the camera 63\. Is it connected"):
        OpenCVSource(63, live=True)
    assert capfd.readouterr().err == ""


def test_write_makes_a_video_of_three_panels(world, run_cli, video):
    cv2 = pytest.importorskip("cv2")
    words = ["watch", video, world.bundle, "--every-frame", "--write", world.tmp / "overlay.mp4", *HERE]
    assert run_cli(*words).document["written"] == str(world.tmp / "overlay.mp4")
    capture = cv2.VideoCapture(str(world.tmp / "overlay.mp4"))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == 8
    assert frames[0].shape == (360, 3 * 360, 3)
    assert np.std([frame.mean((0, 1)) for frame in frames], axis=0).max() > 0
    run_cli(*words).refused(2, "exists already", "--force")
    assert run_cli(*words, "--force").code == 0


def test_ctrl_c_ends_it_with_its_figures(world, run_cli, video, monkeypatch):
    from phreg_deploy.cli.streaming.display import Display

    def interrupt(_self, _stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "update", interrupt)
    outcome = run_cli("watch", video, world.bundle, "--every-frame", *HERE)
    assert outcome.code == 0
    assert outcome.document["interrupted"] is True
    assert outcome.document["cameras"][0]["served"] == 1


def test_the_display_follows_the_stream(world, video, monkeypatch):
    from io import StringIO

    from rich.console import Console

    from phreg_deploy.cli.console import Result
    from phreg_deploy.cli.streaming import display
    from phreg_deploy.runtime import FeatureExtractor
    from phreg_deploy.stream.watching import watch

    monkeypatch.setattr(display, "REFRESH", 0.0)
    result, screen = Result(False, False), StringIO()
    result.progress.console = Console(file=screen, force_terminal=True, width=140, highlight=False)
    with FeatureExtractor.load(world.bundle, "onnxruntime-cpu", threads=1) as extractor:
        with display.Display(result, timed=True) as shown:
            watch(extractor, str(video), every_frame=True, show=shown.update, on_alarm=shown.alarm)
    text = screen.getvalue()
    assert "On onnxruntime-cpu; Ctrl-C ends it" in text
    assert "frames/s" in text
    assert "Alarm (ended): camera: the source ended, after 8 frames." in text


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--write", "overlay.avi"], ["write: got overlay.avi, expected a name that ends in .mp4"]),
        (["--fallback", "no-such-backend"], ["no-such-backend"]),
        (["--image-size", "48"], ["image size: got 48x48"]),
        (["--max-late", "2"], ["2.0 is not in the range"]),
        (["--fps", "nan"], ["not a finite number"]),
    ],
)
def test_wrong_options_are_refused(world, run_cli, video, options, fragments):
    run_cli("watch", video, world.bundle, *options, *HERE).refused(2, *fragments)


def test_addresses_reach_watch_alone(world, run_cli, monkeypatch):
    from phreg_deploy.errors import PhregError
    from phreg_deploy.stream.sources import opening

    def refuse(place, live):
        raise PhregError(f"source: asked for {place}, live {live}")

    monkeypatch.setattr(opening, "_video", refuse)
    run_cli("watch", "rtsp://camera/1", world.bundle, *HERE).refused(2, "asked for rtsp://camera/1, live True")
    run_cli("watch", "3", world.bundle, *HERE).refused(2, "asked for 3, live True")
    run_cli("watch", "none.mp4", world.bundle, *HERE).refused(2, "there is no file none.mp4")
    run_cli("extract", world.bundle, "rtsp://camera/1", "-o", world.out, *HERE).refused(2, "got the URL")
    run_cli("watch", "0", "https://host/a.bundle", *HERE).refused(2, "got the URL")
