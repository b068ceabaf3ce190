"""``Stream``: which frames are served, that every other one is counted, alarms, fall-backs, and its end."""

import itertools
import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import DenseFeatures, FeatureExtractor
from phreg_deploy.stream import Limits, Stream
from phreg_deploy.stream.alarms import Alarms
from phreg_deploy.stream.watchdog import Watchdog
from tests.video_files import HeldSource, video_frames

FRAMES = video_frames(6)


@pytest.fixture(scope="module")
def loaded(bundle):
    with FeatureExtractor.load(bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture
def extractor(loaded, monkeypatch):
    """The extractor, of which a test may patch the ``dense`` of this object alone."""
    yield loaded
    loaded.__dict__.pop("dense", None)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("phreg-stream")]
    assert left == []


def cycle(count):
    return itertools.islice(itertools.cycle(FRAMES), count)


def balance(figures):
    """Assert that every frame is accounted for."""
    assert figures.received == figures.served + figures.dropped + figures.pending
    assert sum(figures.dropped_by.values()) == figures.dropped


def wait_for(condition):
    """Wait until a condition holds; fail after two seconds."""
    deadline = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 2 s"
        time.sleep(0.002)


def test_every_frame_is_served_in_order(extractor):
    with Stream(extractor, FRAMES, every_frame=True) as stream:
        results = list(stream)
    figures = stream.figures()["camera"]
    assert [result.frame.index for result in results] == list(range(6))
    assert (figures.received, figures.served, figures.dropped, figures.pending) == (6, 6, 0, 0)
    assert figures.ended
    for result, frame in zip(results, FRAMES):
        np.testing.assert_allclose(result.dense.features, extractor(frame).features, rtol=1e-5, atol=1e-6)
        assert result.frame.captured <= result.started <= result.done
        assert result.image.shape == (64, 64, 3)
    assert figures.latency_p50 > 0
    assert figures.artifact_rate == pytest.approx(np.mean([result.dense.artifact_rate for result in results]))


def test_the_newest_frame_wins_and_every_drop_is_counted(extractor):
    """The callback holds the worker at its first frame until all others have arrived."""
    served, gate = [], threading.Event()

    def take(result):
        served.append(result.frame.index)
        gate.wait(5)

    with Stream(extractor, cycle(500), on_result=take) as stream:
        wait_for(lambda: stream.figures()["camera"].ended)
        balance(stream.figures()["camera"])
        gate.set()
        assert stream.wait(5)
    figures = stream.figures()["camera"]
    assert served[-1] == 499, "the newest frame is served"
    assert len(served) <= 3
    assert (figures.received, figures.served) == (500, len(served))
    assert figures.dropped_by == {"newer": 500 - len(served)}


def test_counts_balance_at_every_moment(extractor):
    with Stream(extractor, cycle(400), fps=2000) as stream:
        for _ in stream:
            balance(stream.figures()["camera"])
    figures = stream.figures()["camera"]
    balance(figures)
    assert (figures.received, figures.pending) == (400, 0)


@pytest.mark.parametrize("every", [True, False])
def test_an_early_stop_counts_what_was_left(extractor, every):
    """At the moment of the stop a source may be between two frames, and then none is left; so it is tried again."""
    left = 0
    for _ in range(10):
        with Stream(extractor, cycle(10**9), every_frame=every) as stream:
            for _ in zip(range(3), stream):
                pass
        figures = stream.figures()["camera"]
        balance(figures)
        assert figures.pending == 0
        assert figures.served >= 3
        left += figures.dropped_by.get("stopped", 0)
        if left:
            break
    assert left


def test_cameras_take_turns(extractor):
    """Both slots are full whenever the worker chooses, except at the end."""
    order = []

    def take(result):
        order.append(result.frame.camera)
        wait_for(lambda: all(c.slot is not None or c.ended for c in stream.cameras.values()))

    stream = Stream(extractor, {"left": cycle(20), "right": cycle(20)}, every_frame=True, on_result=take)
    with stream:
        assert stream.wait(5)
    assert {name: figures.served for name, figures in stream.figures().items()} == {"left": 20, "right": 20}
    assert all(a != b for a, b in itertools.pairwise(order[1:-1]))


def test_a_missed_deadline_raises_one_alarm(extractor):
    alarms, limits = [], Limits(deadline=1e-9, late_share=0.5, least=3)
    with Stream(extractor, FRAMES, every_frame=True, limits=limits, on_alarm=alarms.append) as stream:
        assert all(result.late for result in stream)
    assert [alarm.kind for alarm in alarms if alarm.kind != "ended"] == ["late"]
    assert "camera: 100 % of frames missed the deadline of 0 ms" in [str(alarm) for alarm in alarms]
    assert stream.figures()["camera"].late == 6
    assert stream.alarms.counts == {"late": 1, "ended": 1}


def test_an_artifact_rate_above_its_bound_raises_an_alarm(extractor, monkeypatch):
    monkeypatch.setattr(DenseFeatures, "artifact_rate", np.array([0.25]))
    alarms, limits = [], Limits(artifact_rate=0.1, least=2)
    with Stream(extractor, FRAMES, every_frame=True, limits=limits, on_alarm=alarms.append) as stream:
        list(stream)
    assert [str(a) for a in alarms if a.kind == "artifacts"] == ["camera: the artifact rate is 25.00 %, above 10.00 %"]


def test_without_a_callback_alarms_are_warnings(extractor, caplog):
    with caplog.at_level(logging.WARNING, "phreg_deploy.stream"), Stream(extractor, FRAMES, every_frame=True) as stream:
        list(stream)
    assert caplog.messages == ["camera: the source ended, after 6 frames"]


def test_an_alarm_is_raised_again_only_after_its_condition_has_ended():
    raised = []
    alarms = Alarms(raised.append)
    for exceeded in (True, True, False, False, True):
        alarms.judge("late", "front", exceeded, "late")
    alarms.judge("late", "rear", True, "late")
    assert [alarm.camera for alarm in raised] == ["front", "front", "rear"]


def test_a_silent_camera_and_a_long_run_raise_alarms():
    raised, since = [], [None]
    camera = SimpleNamespace(name="front", ended=False, slot=None, heard=100.0)
    watchdog = Watchdog(Limits(no_frame=2, slow_run=3), Alarms(raised.append), [camera], lambda: since[0])
    for now in (101.9, 102.1, 103.0):
        watchdog.look(now)
    assert [(alarm.kind, alarm.message) for alarm in raised] == [("stalled", "no frame for 2.1 s")]
    camera.heard = 103.0
    since[0] = 103.5
    watchdog.look(104.0)
    camera.slot = object()
    watchdog.look(107.0)
    assert [alarm.kind for alarm in raised] == ["stalled", "slow"]


def test_the_watchdog_sees_a_source_that_hangs(extractor):
    source, alarms = HeldSource(), []
    limits = Limits(no_frame=0.05)
    with Stream(extractor, source, limits=limits, on_alarm=alarms.append, on_result=lambda _result: None) as stream:
        wait_for(lambda: [alarm.kind for alarm in alarms] == ["stalled"])
        source.release.set()
        assert stream.wait(5)
    assert [alarm.kind for alarm in alarms] == ["stalled", "failed"], "a camera does not end by itself"
    assert source.closed


def test_a_source_that_does_not_end_is_named_by_stop(extractor):
    source = HeldSource()
    stream = Stream(extractor, {"rear": source}, on_result=lambda _result: None)
    stream.start()
    with pytest.raises(PhregError, match="phreg-stream rear did not end within 0 s"):
        stream.stop(timeout=0.05)
    source.release.set()
    stream.stop(timeout=5)
    assert source.closed


def fail_from(extractor, first):
    """Let the extractor's backend fail from its call number ``first`` on."""
    real, calls = extractor.dense, itertools.count()

    def dense(batch):
        if next(calls) >= first:
            raise RuntimeError("the device was lost")
        return real(batch)

    extractor.dense = dense


@pytest.mark.parametrize("kind", ["name", "function"])
def test_a_fallback_takes_over_and_says_so(extractor, bundle, kind):
    fail_from(extractor, 2)
    alarms = []
    fallback = "onnxruntime-cpu" if kind == "name" else lambda: FeatureExtractor.load(bundle, "onnxruntime-cpu")
    with Stream(extractor, FRAMES, every_frame=True, fallback=fallback, on_alarm=alarms.append) as stream:
        results = list(stream)
    assert [result.frame.index for result in results] == list(range(6)), "the frame that failed is run again"
    (said,) = [alarm.message for alarm in alarms if alarm.kind == "fallback"]
    assert "the backend failed (the device was lost); onnxruntime-cpu serves vit_tiny" in said


def test_without_a_fallback_the_failure_ends_the_stream(extractor):
    fail_from(extractor, 2)
    stream = Stream(extractor, FRAMES, every_frame=True)
    with pytest.raises(RuntimeError, match="device was lost"), stream:
        list(stream)
    figures = stream.figures()["camera"]
    balance(figures)
    assert figures.dropped_by["failed"] == 1


def no_fallback():
    raise PhregError("no second device")


def test_a_fallback_that_fails_too_is_named(extractor):
    fail_from(extractor, 0)
    with pytest.raises(PhregError, match=r"the device was lost.*so did its fall-back.*no second device"):
        with Stream(extractor, FRAMES, every_frame=True, fallback=no_fallback) as stream:
            list(stream)


def test_an_unreadable_frame_is_dropped_and_said_once(extractor):
    frames = [FRAMES[0], FRAMES[1].astype(np.float32), FRAMES[1].astype(np.float32), FRAMES[2]]
    alarms = []
    with Stream(extractor, frames, every_frame=True, on_alarm=alarms.append) as stream:
        assert [result.frame.index for result in stream] == [0, 3]
    assert stream.figures()["camera"].dropped_by == {"unreadable": 2}
    assert ["frame 1 cannot be read: image: got an array of float32" in str(a) for a in alarms] == [True, False]


def broken(_value):
    raise ValueError("mine")


def broken_frames():
    yield FRAMES[0]
    raise ValueError("mine")


@pytest.mark.parametrize(
    ("source", "options"), [(FRAMES, {"on_result": broken}), (FRAMES, {"on_alarm": broken}), (broken_frames(), {})]
)
def test_errors_of_callbacks_and_iterators_are_raised_by_stop(extractor, source, options):
    stream = Stream(extractor, source, every_frame=True, **{"on_result": lambda _result: None, **options})
    stream.start()
    assert stream.wait(5)
    # An alarm that says that the source ended comes after its last frame.
    wait_for(lambda: stream._error is not None)
    with pytest.raises(ValueError, match="mine"):
        stream.stop()
    balance(stream.figures()["camera"])


def test_a_callback_may_stop_the_stream(extractor):
    served = []

    def take(result):
        served.append(result)
        if len(served) == 2:
            stream.stop()

    stream = Stream(extractor, cycle(10**9), every_frame=True, on_result=take)
    with stream:
        assert stream.wait(5)
    assert len(served) == 2
    balance(stream.figures()["camera"])


def test_padding_and_colour_order_are_those_of_a_call(extractor):
    with Stream(extractor, FRAMES[:1], every_frame=True, fit="pad") as stream:
        (result,) = stream
    expected = extractor(FRAMES[0], fit="pad")
    assert np.array_equal(result.dense.mask, expected.mask)
    np.testing.assert_allclose(result.dense.features, expected.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps: got 0, expected frames per second above 0"),
        ({"fit": "stretch"}, "fit: got 'stretch'"),
        ({"size": (65, 64)}, "image size: got 65x64"),
        ({"source": {}}, "source: got no camera"),
        ({"fallback": "no-such-backend"}, "no-such-backend"),
        ({"source": HeldSource(), "every_frame": True}, "every_frame: camera is a camera, which does not wait"),
        ({"source": HeldSource(), "fps": 5}, "fps: camera is a camera"),
    ],
)
def test_wrong_options_are_refused(extractor, options, message):
    with pytest.raises(PhregError) as error:
        Stream(extractor, **{"source": FRAMES, **options})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"deadline": 0}, "deadline: got 0 s, expected more than 0"),
        ({"no_frame": float("nan")}, "no-frame: got nan s"),
        ({"late_share": 2}, "late-share: got 2, expected a share"),
        ({"least": 400}, "expected 1 <= least <= window"),
    ],
)
def test_wrong_limits_are_refused(limits, message):
    with pytest.raises(PhregError) as error:
        Limits(**limits)
    assert message in str(error.value)


def test_results_go_one_way(extractor):
    with Stream(extractor, FRAMES, every_frame=True, on_result=lambda _result: None) as stream:
        with pytest.raises(PhregError, match="results go to on_result"):
            next(iter(stream))
        assert stream.wait(5)
    with Stream(extractor, FRAMES, every_frame=True) as stream, pytest.raises(PhregError, match="nobody takes"):
        stream.wait()


def test_a_stream_starts_once(extractor):
    with Stream(extractor, FRAMES, every_frame=True) as stream:
        list(stream)
    with pytest.raises(PhregError, match="it was started already"):
        stream.start()


def test_a_stream_that_never_started_closes_its_sources(extractor):
    source = HeldSource()
    Stream(extractor, source).stop()
    assert source.closed
