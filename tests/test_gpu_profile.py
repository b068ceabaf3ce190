"""The GPU profile without a GPU: arithmetic checked by hand, TensorRT's own layer names, and a fake extractor."""

import dataclasses
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.profiling import gpu, load, timing
from phreg_deploy.profiling import roofline as roof
from phreg_deploy.profiling.register_cost import register_cost
from phreg_deploy.profiling.roofline import Peaks, count_parts, place_layer
from phreg_deploy.progress import SILENT
from phreg_deploy.spec import Batches, ModelSpec, Sizes

BASE = ModelSpec("vit_base_patch16_224", "vit", (16, 16), (14, 14), 768, 12, 12, True, 0, 86_000_000)
TINY = ModelSpec("tiny", "vit", (4, 4), (2, 2), 8, 3, 2, True, 1, 1000)
AT = {"batch": 1, "size": (224, 224)}
NORM = "__myl_CastMeanSubMulMeanAddSqrtDivMulCastMulAdd"


def onnx(*nodes: str) -> str:
    return "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)


def test_a_known_model_has_the_known_count():
    parts = count_parts(BASE, **AT)
    products = ("patch embed", "qkv", "attention products", "proj", "fc1", "fc2")
    exact = 196 * 768 * 768 + 12 * (12 * 197 * 768 * 768 + 2 * 197 * 197 * 768)
    assert exact == pytest.approx(17.6e9, rel=0.02)
    assert sum(parts[name][0] for name in products) / 2 == pytest.approx(exact, rel=0.005), "but for biases and GELU"
    assert sum(work for work, _ in parts.values()) / 2 == pytest.approx(17.6e9, rel=0.02)


def test_operations_and_bytes_by_hand():
    """2 images of 8x12 at patch 4: 6 patches and 2 prefix tokens, so 16 rows of width 8; 2 heads of 4; 3 blocks."""
    parts = count_parts(TINY, batch=2, size=(8, 12), activation_bytes=2, weight_bytes=1, hidden=20)
    assert parts["patch embed"] == (2 * 12 * 48 * 8 + 2 * 12 * 8, 12 * 48 + 2 * 12 * 8 + 8 * 49 + 2 * 6 * 8)
    assert parts["qkv"] == (3 * (2 * 16 * 8 * 24 + 16 * 24), 3 * (2 * 16 * 32 + 24 * 9))
    assert parts["attention products"] == (3 * 4 * 2 * 2 * 8 * 8 * 4, 3 * 2 * 4 * 16 * 8)
    assert parts["softmax"] == (3 * 5 * 2 * 2 * 8 * 8, 0)
    assert parts["proj"] == (3 * (2 * 16 * 8 * 8 + 16 * 8), 3 * (2 * 16 * 16 + 8 * 9))
    assert parts["fc1"] == (3 * (2 * 16 * 8 * 20 + 9 * 16 * 20), 3 * (2 * 16 * 28 + 20 * 9))
    assert parts["fc2"] == (3 * (2 * 16 * 20 * 8 + 16 * 8), 3 * (2 * 16 * 28 + 8 * 21))
    assert parts["norm"] == (7 * 8 * 16 * 8, 7 * 2 * 2 * 16 * 8)
    assert parts["residual"] == (3 * 2 * 16 * 8, 3 * 2 * 2 * 16 * 8)
    apart = count_parts(TINY, batch=2, size=(8, 12), weight_bytes=1, hidden=20, fused_attention=False)
    assert apart["softmax"][1] == 3 * 2 * 2 * 2 * 2 * 64
    assert apart["attention products"][1] == parts["attention products"][1] + apart["softmax"][1]
    for batch, side, said in ((1, 230, "224x224 and 240x240"), (0, 224, "at least 1")):
        with pytest.raises(PhregError, match=said):
            count_parts(BASE, batch=batch, size=(side, side))


def test_bounds_and_shares():
    layers = {"fc1": 50.0, "attention": 8.0, "other": 1.0}
    found = roof.roofline(BASE, Peaks(1e12, 1e10), **AT, measured_ms=100.0, layers_ms=layers)
    rows = {row["part"]: row for row in found["parts"]}
    assert [rows[part]["bound"] for part in ("fc1", "norm", "softmax")] == ["compute", "bandwidth", "compute"]
    assert rows["fc1"]["ideal_ms"] == pytest.approx(rows["fc1"]["flops"] / 1e9)
    assert rows["norm"]["ideal_ms"] == pytest.approx(rows["norm"]["bytes"] / 1e7)
    ratio = pytest.approx(rows["fc1"]["flops"] / rows["fc1"]["bytes"])
    assert (rows["fc1"]["intensity"], rows["softmax"]["intensity"]) == (ratio, None), "nothing moves in softmax"
    total = found["total"]
    shares = total["share_of_flops"], total["share_of_bandwidth"]
    assert shares == pytest.approx((total["flops"] / 1e11, total["bytes"] / 1e9))
    assert total["share_of_ideal"] == pytest.approx(sum(row["ideal_ms"] for row in rows.values()) / 100)
    assert set(found["measured"]) == {"fc1", "attention"}
    ideal = rows["attention products"]["ideal_ms"] + rows["softmax"]["ideal_ms"]
    assert found["measured"]["attention"]["share_of_ideal"] == pytest.approx(ideal / 8)
    unknown = roof.roofline(BASE, Peaks(None, 1e10), **AT, measured_ms=100.0, layers_ms=layers)
    assert {row["bound"] for row in unknown["parts"]} == {None, unknown["total"]["ideal_ms"]}
    assert unknown["total"]["share_of_flops"] is None
    assert unknown["total"]["share_of_bandwidth"] == total["share_of_bandwidth"]


class FakeCuda:
    """A device that copies 100 GB in a second, 50 GB the first time; everything else costs nothing."""

    api, index, free_memory = SimpleNamespace(cudaStreamNonBlocking=1), 0, lambda self: (800 << 20, 1 << 30)

    def __init__(self):
        self.now, self.live, self.copied, self.marks = 0.0, 0, [], {}

    def copy(self, target, source, size, kind, stream):
        assert kind == "DeviceToDevice"
        self.copied.append(size)
        self.now += size / (100e9 if len(self.copied) > 8 else 50e9)

    def call(self, name, *arguments):
        self.live += name in ("cudaMalloc", "cudaStreamCreateWithFlags", "cudaEventCreate")
        self.live -= name in ("cudaFree", "cudaStreamDestroy", "cudaEventDestroy")
        if name == "cudaEventRecord":
            self.marks[int(arguments[0])] = self.now
        if name == "cudaEventElapsedTime":
            return 1e3 * (self.marks[int(arguments[1])] - self.marks[int(arguments[0])])
        return b"0:65:0.0\0  " if name == "cudaDeviceGetPCIBusId" else 7 + self.live


def test_peaks_are_measured_by_copies_that_count_twice():
    found = roof.measure_peaks(cuda := FakeCuda())
    assert (found.bandwidth, found.flops, "not measured" in found.note) == (pytest.approx(200e9), None, True)
    assert (cuda.live, set(cuda.copied)) == (0, {100 << 20}), "all freed; an eighth of the free memory"
    assert (roof.measure_peaks(cuda, lambda: 5e12).flops, gpu.pci_of(cuda)) == (5e12, "0:65:0.0")


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("__myl_FcAdd_myl0_2", onnx("dense/MatMul", "dense/Add"), (None, "patch embed")),
        (
            "__myl_CastAddReshTran",
            onnx("dense/Reshape", "dense/Transpose", "dense/Sub", "dense/Cast"),
            (None, "patch embed"),
        ),
        (
            "__mye86549+__mye86537",
            "[ONNX Layer: blocks.3.attn.qkv.v/MatMul]\n[ONNX Layer: blocks.3.attn.qkv.k/MatMul]",
            (3, "qkv"),
        ),
        ("blocks.1.attn.qkv.v/MatMul+blocks.1.attn.qkv.k/MatMul+blocks.1.attn.qkv.q/MatMul", "", (1, "qkv")),
        (
            "__myl_MulAddMulCastReshTranReshMove",
            onnx("blocks.1.attn.qkv.k/MatMul", "layer_norm_2/DequantizeLinear", "blocks.1.attn/Reshape_2"),
            (1, "qkv"),
        ),
        ("_gemm_mha_v2_myl0_15", "", (None, "attention")),
        (NORM, "", (None, "norm")),
        ("norm/LayerNormalization_2", "", (None, "norm")),
        (
            "_gemm_mha_v2",
            onnx("softmax/QuantizeLinear", "blocks.11.attn/MatMul_2", "blocks.11.attn/Softmax"),
            (11, "attention"),
        ),
        ("__myl_FcAddAdd", onnx("blocks.1.attn.proj/MatMul", "blocks.1.attn.proj/Add", "blocks.1/Add"), (1, "proj")),
        (
            "__myl_MulAddAddCastMeanSubMulMeanAddSqrtDivMulCast",
            onnx("blocks.0.mlp.fc2/MatMul", "blocks.0/Add_2", "blocks.1.norm1/LayerNormalization"),
            (1, "norm"),
        ),
        (
            "__myl_FcAddDivCastErfCastAddMul",
            onnx("blocks.0.mlp.fc1/MatMul", "blocks.0.mlp.act/Gelu", "gelu/QuantizeLinear"),
            (0, "fc1"),
        ),
        ("blocks.2.mlp.fc2/MatMul_myl0_17", "", (2, "fc2")),
        ("blocks.2.attn.qkv/MatMul + blocks.2.attn.qkv/Add", "", (2, "qkv")),
        (
            "blocks.0.mlp.fc2/MatMul",
            onnx("blocks.0.mlp.fc2/MatMul", "blocks.0.mlp.fc2/weight/DequantizeLinear"),
            (0, "fc2"),
        ),
        ("__mye1", onnx("blocks.1.mlp.fc1/MatMul", "blocks.1.mlp.fc2/MatMul"), (None, "other")),
        ("Reformatting CopyNode for blocks.1.mlp.fc1/MatMul", "", (None, "other")),
        ("{ForeignNode[dense/Cast...norm/LayerNormalization_2]}", "", (None, "other")),
        ("__myl_Move", onnx("dense/Gather"), (None, "other")),
    ],
)
def test_layers_are_placed(name, metadata, expected):
    assert place_layer(name, metadata) == expected


def test_layers_are_grouped_and_nothing_is_lost():
    fc1 = {"blocks.10.mlp.fc1/MatMul": 8.0, "blocks.2.mlp.fc1/MatMul": 16.0}
    layers = {"a": 1.0, "b": 2.0, "_gemm_mha_v2_myl0_15": 4.0, **fc1, NORM: 32.0}
    found = roof.group_layers(layers, {"a": onnx("dense/MatMul"), "b": onnx("blocks.2.attn.proj/MatMul")})
    assert (found["total_ms"], sum(found["parts"].values()), found["unplaced_ms"]) == (63.0, 63.0, 36.0)
    told = {part: took for part, took in found["parts"].items() if took}
    assert told == {"patch embed": 1.0, "norm": 32.0, "attention": 4.0, "proj": 2.0, "fc1": 24.0}
    assert list(found["blocks"].items()) == [("2", {"proj": 2.0, "fc1": 16.0}), ("10", {"fc1": 8.0})]


def test_percentiles_and_the_medians_interval():
    found = timing.describe(range(1, 1002))
    names = ("rounds", "min", "mean", "p50", "p90", "p95", "p99", "p99.9", "max", "std")
    std = np.sqrt((1001**2 - 1) / 12)
    assert [found[n] for n in names] == pytest.approx([1001, 1, 501, 501, 901, 951, 991, 1000, 1001, std])
    values = (rng := np.random.default_rng(5)).gamma(2.0, 1.0, 100)
    resampled = np.percentile([np.median(rng.choice(values, 100)) for _ in range(4000)], (2.5, 97.5))
    assert timing.bootstrap(values) == timing.bootstrap(values) == pytest.approx(resampled, rel=0.05)
    assert timing.bootstrap(np.full(20, 3.0)) == [3.0, 3.0]


def test_configurations_are_measured_in_turn_until_they_agree():
    assert all(timing.is_stable(means) for means in ([10, 10.2, 10.4], [90, 10, 10, 10]))
    assert not any(timing.is_stable(means) for means in ([10, 10], [10, 10.2, 10.51], [10, 10, 10, 90]))
    order, drift = [], iter(range(10**9))

    def steady():
        order.append("A")
        return {"latency": 2.0, "compute": 1.0}

    def drifting():
        order.append("B")
        return {"latency": 1.0 * 2 ** next(drift)} if len(order) < 40 else {"latency": 1.0}

    found = timing.measure({"A": steady}, 0.01, 0, SILENT)["A"]
    assert (found["stable"], found["windows"], found["latency"]["rounds"] > 9) == (True, 3, True)
    order.clear()
    found = timing.measure({"A": steady, "B": drifting}, 0.0, 0, SILENT)
    assert "".join(order[2:10]) == "ABBAABBA", "after a call of each to warm up"
    assert found["A"]["windows"] == found["B"]["windows"] > 3
    assert (found["B"]["stable"], found["B"]["latency"]["max"]) == (True, 1.0), "what drifted is forgotten"
    forever = iter(range(10**9))
    found = timing.measure({"A": lambda: {"latency": 1.5 ** next(forever)}}, 0.0, 0, SILENT)["A"]
    assert (found["stable"], found["windows"]) == (False, 9)


def test_streams_run_at_once_and_count_what_ended_together():
    one = load.sweep(lambda: time.sleep(0.01), 1, 0.2, SILENT, batch=4)
    four = load.sweep(lambda: time.sleep(0.01), 4, 0.2, SILENT, batch=4)
    assert 100 < one["images_per_second"] <= 400
    assert one["images_per_second"] == pytest.approx(4 * one["calls"] / one["seconds"])
    assert four["images_per_second"] > 1.5 * one["images_per_second"]
    assert four["latency"]["min"] >= 10
    entries = [{"images_per_second": r, "latency": {"p50": took}} for r, took in ((1, 1), (3, 4), (2, 2), (3, 3))]
    load.mark_pareto(entries)
    assert [entry["pareto"] for entry in entries] == [True, False, True, True]
    callers = []

    def uneven():
        callers.append(threading.get_ident())
        time.sleep(0.05 if callers[-1] == callers[0] else 0.01)

    assert load.sweep(uneven, 2, 0.1, SILENT)["calls"] < 16, "what the slow thread did alone does not count"


@pytest.mark.parametrize("at", [4, 12])  # while warming up, and afterwards
def test_an_error_in_a_stream_ends_all(at):
    seen = iter(range(10**9))

    def failing():
        if next(seen) == at:
            raise PhregError("GPU: out of memory.")
        time.sleep(0.001)

    begun = time.perf_counter()
    with pytest.raises(PhregError, match="out of memory"):
        load.sweep(failing, 3, 30.0, SILENT)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(("service", "frames", "misses", "longest"), [(5, 50, 0, 5), (16, 38, 1, 238)])
def test_frames_that_come_at_a_rate(service, frames, misses, longest):
    """At 100 frames a second; with 16 ms each, every frame waits 6 ms longer than the one before."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    found = load.pace(lambda: clock.sleep(service / 1e3), 100, 0.5, clock)
    assert (found["expected"], found["frames"], found["misses"], found["kept_up"]) == (50, frames, misses, frames == 50)
    assert (found["response"]["max"], found["wait"]["max"]) == pytest.approx((longest, longest - service))
    assert found["jitter"] == pytest.approx(6 * misses * np.std(range(frames)), abs=1e-6)


def fake_extractor(parts=True):
    """2 images in 1.8 ms, with a graph 1.3; 10 ms by the host's clock. ``parts``: its backend tells them."""
    runs, backend = [], SimpleNamespace(name="fake", cuda=FakeCuda(), run_device=lambda *_: {})

    def split(feed, graph):
        time.sleep(0.001)
        compute = 1.0 if graph else 1.5
        return {"h2d": 0.1, "enqueue": 0.5, "compute": compute, "d2h": 0.2, "latency": compute + 0.3}

    def run(batch):
        runs.append(batch.shape)
        time.sleep(0.01)

    if parts:
        backend.split, backend.device_memory = split, lambda: {"activations": 5}
        backend.layers = lambda feed, rounds: {"_gemm_mha_v2_myl0_15": 0.25, "x": 0.75}
    served = {"sizes": Sizes("fixed", ((8, 12),)), "batches": Batches(1, 2, 4), "precision": "fp16"}
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


def test_the_whole_report():
    extractor, going, frames = fake_extractor(), [], []
    watch = SimpleNamespace(start=lambda: going.append(1), stop=lambda: going.append(0), summary=frames.append)
    watch.measure_idle = lambda seconds: 7.5
    how = {"telemetry": watch, "fps": 50, "peaks": Peaks(1e12, 1e11), "hidden": 20}
    how["metadata"] = {"x": onnx("blocks.0.mlp.fc1/MatMul")}
    report = json.loads(json.dumps(profiled(extractor, **how).to_json(), allow_nan=False))
    (plain, graph), told = report["results"], [(r["graph"], r["stable"], r["size"]) for r in report["results"]]
    assert told == [(False, True, [8, 12]), (True, True, [8, 12])]
    assert (plain["latency"]["p99.9"], graph["latency"]["p99.9"]) == pytest.approx((1.8, 1.3))
    assert [graph[part]["p50"] for part in ("h2d", "enqueue", "compute", "d2h")] == [0.1, 0.5, 1.0, 0.2]
    assert graph["images_per_second"] == pytest.approx(2000 / 1.3)
    assert ([entry["streams"] for entry in report["streams"]], going) == ([1, 2], [1, 0, 1, 0])
    counted = len(extractor.runs) - report["queue"][0]["frames"] - 2 * 1 - 2 * 2
    assert sum(frames) == 2 * counted, "images of all calls but those that warm up"
    assert report["layers"][0]["blocks"] == {"0": {"fc1": 0.75}}
    assert report["roofline"][0]["total"]["measured_ms"] == 1.0
    assert report["memory"] == {"before": 224 << 20, "after": 224 << 20, "device": {"activations": 5}}
    assert (report["idle_power"], report["missing"], report["model"]["registers"]) == (7.5, {}, 1)


def test_a_backend_that_tells_less_is_said():
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
def test_what_cannot_be_is_refused_before_anything_runs(changes, said):
    with pytest.raises(PhregError, match=said):
        profiled(extractor := fake_extractor(), **changes)
    assert extractor.runs == []


def test_what_registers_cost():
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
