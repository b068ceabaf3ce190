"""The GPU profile of a fake extractor: the whole report, refused requests, and the cost of registers."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling import gpu
from phreg_deploy.profiling.device.peaks import Peaks
from phreg_deploy.profiling.register_cost import register_cost
from phreg_deploy.progress import SILENT
from phreg_deploy.readout import PLAIN
from phreg_deploy.spec import Batches, Sizes
from tests.profile_helpers import TINY, FakeCuda, layer_metadata


def fake_extractor(parts=True):
    """Make an extractor that takes 1.8 ms for 2 images, 1.3 with a graph, and 10 on the host.

    ``parts``: whether its backend times the parts of a call and the layers.
    """
    unused = {"run_device": lambda *_: {}, "run_to_host": lambda *_: {}}
    runs, backend = [], SimpleNamespace(name="fake", cuda=FakeCuda(), **unused)

    def split(feed, graph):
        time.sleep(0.001)
        compute = 1.0 if graph else 1.5
        return {"h2d": 0.1, "enqueue": 0.5, "compute": compute, "d2h": 0.2, "latency": compute + 0.3}

    def run(batch):
        runs.append(batch.shape)
        time.sleep(0.01)

    if parts:
        backend.split, backend.device_memory = split, lambda: {"activations": 5}
        backend.reserve = lambda contexts: contexts
        backend.layers = lambda feed, rounds: {"_gemm_mha_v2_myl0_15": 0.25, "x": 0.75}
    served = {"sizes": Sizes("fixed", ((8, 12),)), "batches": Batches(1, 2, 4), "precision": "fp16", "readout": PLAIN}
    return SimpleNamespace(
        manifest=SimpleNamespace(**served),
        spec=TINY,
        runs=runs,
        run=run,
        opened=backend,
        feed=lambda batch: {"image": batch},
        graph_call=lambda batch: lambda: run(batch),
    )


REQUEST = gpu.GpuRequest(batches=[2], size=None, seconds=0.05, streams=[1, 2], warmup_ms=0)


def profiled(extractor=None, *, telemetry=None, peaks=None, metadata=None, **changes):
    request = dataclasses.replace(REQUEST, **changes)
    how = {"progress": SILENT, "telemetry": telemetry, "peaks": peaks, "metadata": metadata}
    return gpu.profile_gpu(extractor or fake_extractor(), request, **how)


def test_the_report_holds_every_measurement():
    extractor, going, frames = fake_extractor(), [], []
    watch = SimpleNamespace(
        start=lambda: going.append(1), stop=lambda: going.append(0), summary=frames.append, clocks=dict
    )
    watch.measure_idle = lambda seconds: 7.5
    how = {"telemetry": watch, "fps": 50, "peaks": Peaks(1e12, 1e11), "hidden": 20}
    how["metadata"] = {"x": layer_metadata("blocks.0.mlp.fc1/MatMul")}
    report = json.loads(json.dumps(profiled(extractor, **how).to_json(), allow_nan=False))
    (plain, graph), told = report["results"], [(r["graph"], r["stable"], r["size"]) for r in report["results"]]
    assert told == [(False, True, [8, 12]), (True, True, [8, 12])]
    assert (plain["latency"]["p99.9"], graph["latency"]["p99.9"]) == pytest.approx((1.8, 1.3))
    assert [graph[part]["p50"] for part in ("h2d", "enqueue", "compute", "d2h")] == [0.1, 0.5, 1.0, 0.2]
    assert graph["images_per_second"] == pytest.approx(2000 / 1.3)
    measurements = ["latency", "1 threads", "2 threads", "layers", "paced"]
    assert [entry["measurement"] for entry in report["watched"]] == measurements
    assert ([entry["streams"] for entry in report["streams"]], going) == ([1, 2], [1, 0] * 5)
    assert frames[0] == 2 * sum(result["latency"]["calls"] for result in report["results"])
    paced = report["queue"][0]["frames"]
    assert (frames[3], frames[4]) == (2 * 20, 2 * paced)
    counted = len(extractor.runs) - paced - 3 * 1 - 3 * 2
    assert sum(frames[1:3]) == 2 * counted, "images of all calls except those for warm-up"
    assert report["layers"][0]["blocks"] == {"0": {"fc1": 0.75}}
    assert report["roofline"][0]["total"]["measured_ms"] == 1.0
    assert report["memory"] == {"before": 224 << 20, "after": 224 << 20, "device": {"activations": 5}}
    assert (report["idle_power"], report["missing"], report["model"]["registers"]) == (7.5, {}, 1)


def test_what_a_backend_cannot_measure_is_listed_as_missing():
    report = profiled(fake_extractor(parts=False), peaks=Peaks(None, 1e11)).to_json()
    assert [(r["graph"], "compute" in r) for r in report["results"]] == [(None, False)]
    assert report["results"][0]["latency"]["min"] >= 10
    assert set(report["missing"]) == {"parts", "layers"}
    assert report["layers"] == [] == report["queue"]
    assert report["roofline"][0]["total"]["measured_ms"] is report["memory"]["device"] is report["idle_power"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batches": [2, 9]}, "got 9 images"),
        ({"size": (9, 9)}, "got 9x9"),
        ({"streams": [0]}, "streams: got 0"),
        ({"fps": 0}, "fps: got 0"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(changes, said):
    with pytest.raises(PhregError, match=said):
        profiled(extractor := fake_extractor(), **changes)
    assert extractor.runs == []


def test_the_cost_of_registers_is_the_ratio_of_two_profiles():
    with_registers, without = profiled(streams=[]), profiled(streams=[])
    without.model["registers"] = 0
    without.results[0]["latency"]["p50_interval"] = [1.7, 1.9]
    without.results[1]["latency"] |= {"p50": 1.0, "p50_interval": [0.9, 1.1]}
    costs = register_cost(with_registers, without)
    assert [(c.graph, c.ratio, c.measurable) for c in costs] == [(False, 1.0, False), (True, 1.3, True)]
    assert (costs[1].compute, costs[1].latency, costs[1].registers) == (1.0, (1.3, 1.0), (1, 0))
    empty = dataclasses.replace(without, results=[])
    cases = {"more registers first": (without, with_registers), "in common": (with_registers, empty)}
    for message, pair in cases.items():
        with pytest.raises(PhregError, match=message):
            register_cost(*pair)
