"""The peaks of a GPU: copies count twice, products in each precision, and what is kept on disk."""

import json

import numpy as np
import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.export.engine import gemm
from phreg_deploy.export.engine.product_graph import SCALE, bytes_of, product_graph
from phreg_deploy.profiling.device import peaks as module
from phreg_deploy.profiling.device.peaks import find_peaks
from phreg_deploy.profiling.gpu import pci_of
from phreg_deploy.runtime.gpu.cuda import Cuda
from tests import nvidia
from tests.profile_helpers import FakeCuda

SPEED = {"fp16": 1e14, "int8": 3e14, "fp32": 5e13}


def test_copies_count_twice():
    found = module.measure_bandwidth(cuda := FakeCuda())
    assert found == pytest.approx(200e9)
    assert (cuda.live, set(cuda.copied)) == (0, {100 << 20}), (
        "everything is freed; each copy is an eighth of the free memory"
    )
    assert pci_of(cuda) == "0:65:0.0"


def test_peaks_are_measured_once_for_a_device_and_its_conditions(tmp_path):
    asked = []

    def product(precision):
        asked.append(precision)
        return SPEED[precision]

    def find(precision, cuda, **conditions):
        asked.clear()
        found, remarks = find_peaks(cuda, precision, product, conditions, tmp_path)
        assert remarks == []
        return found, list(asked), len(cuda.copied)

    found, measured, copies = find("int8", FakeCuda(), mode="15W")
    assert (found.flops, found.around, found.precision) == (3e14, 1e14, "int8")
    assert (measured, copies > 0, "measured now" in found.note) == (["int8", "fp16"], True, True)
    again, measured, copies = find("int8", FakeCuda(), mode="15W")
    assert (measured, copies, "from an earlier run (peaks-" in again.note) == ([], 0, True)
    assert (again.flops, again.bandwidth) == (found.flops, found.bandwidth)
    found, measured, copies = find("fp32", FakeCuda(), mode="15W")
    assert (found.flops, found.around, measured, copies) == (5e13, None, ["fp32"], 0), "only what is not known"
    assert find("int8", FakeCuda(), mode="MAXN")[1] == ["int8", "fp16"], "another power mode"


@pytest.mark.parametrize("damage", [b"", b"no JSON", b"[]", b'{"key": 1}', None])
def test_a_damaged_file_is_measured_again(tmp_path, damage):
    find_peaks(FakeCuda(), "fp16", SPEED.get, {}, tmp_path)
    (path,) = tmp_path.glob("peaks-*.json")
    whole = json.loads(path.read_text())
    path.write_bytes(json.dumps({**whole, "values": {"fp16": -1.0}}).encode() if damage is None else damage)
    found, _ = find_peaks(FakeCuda(), "fp16", SPEED.get, {}, tmp_path)
    assert found.flops == 1e14
    assert json.loads(path.read_text())["values"]["fp16"] == 1e14


def test_what_cannot_be_measured_or_kept_is_said(tmp_path):
    def refused(precision):
        raise PhregError(f"no {precision} here.")

    (tmp_path / "file").write_bytes(b"")
    found, remarks = find_peaks(FakeCuda(), "int8", refused, {}, tmp_path / "file")
    assert (found.flops, found.around, found.bandwidth > 0) == (None, None, True)
    assert [text.split(":")[0] for text in remarks] == [
        "No peak of int8 products",
        "No peak of fp16 products",
        "The peaks were not kept, so the next profile measures them again",
    ]
    assert find_peaks(FakeCuda(), "fp16", None, {}, tmp_path)[0].flops is None, "a backend without products"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_product_is_built_run_and_freed(tensorrt, device, precision, all_freed, monkeypatch):
    monkeypatch.setattr(gemm, "INTEGRATED_SIDE", 64)
    device.integrated = True
    assert gemm.measure_product(tensorrt.module, Cuda(), precision, rounds=2) > 0
    assert tensorrt.runs == 3
    assert "TF32" not in {flag.name for flag in tensorrt.builds[-1]._flags}


def test_a_product_that_tensorrt_refuses_is_an_error(tensorrt, all_freed):
    tensorrt.refused_node = "product/MatMul"
    with pytest.raises(PhregError, match="refuses"):
        gemm.measure_product(tensorrt.module, Cuda(), "fp16", 64)
    tensorrt.refused_node, tensorrt.fail_enqueue = None, 1
    with pytest.raises(PhregError, match="could not start the product"):
        gemm.measure_product(tensorrt.module, Cuda(), "fp16", 64)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8", "bf16"])
def test_the_graph_is_sound_and_its_tensors_have_the_bytes_that_are_reserved(precision):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(product_graph(precision, 8))
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        assert bytes_of(value.name, precision, 8) == 64 * kind.itemsize
    if precision in ("int8", "fp8"):
        (scale,) = model.graph.initializer
        assert onnx.numpy_helper.to_array(scale) == np.float16(SCALE)


KERNELS = """
import tensorrt as trt
from phreg_deploy.export.engine.gemm import build_product
from tests import nvidia

print(json.dumps({p: [[s.kind, s.nodes] for s in nvidia.operators(build_product(trt, p, 512))] for p in given}))
"""


def test_nvidias_builder_joins_the_operands_in_eight_bits_with_the_product():
    """One kernel for each product; in 8 bits it takes both operands as they are."""
    built = nvidia.inside(nvidia.NEWEST, KERNELS, ["fp32", "fp16", "bf16", "int8", "fp8"], rtx=True)
    for precision, steps in built.items():
        ((kind, nodes),) = steps
        assert kind == "fully_connected"
        halves = {"a/half/DequantizeLinear", "b/half/DequantizeLinear"} if precision in ("int8", "fp8") else set()
        assert set(nodes) == {"product/MatMul", *halves}
