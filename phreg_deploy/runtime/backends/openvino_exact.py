"""INT8 on processors where OpenVINO's 8-bit kernels saturate: found by a product, and computed in float32 instead.

Without VNNI oneDNN multiplies unsigned by signed bytes and adds two products in 16 bits (``vpmaddubsw``), which clips
sums above 32767: on a ViT-Tiny the mean patch cosine to FP32 fell from .993 to .985.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

WIDTH = 64  # inputs and outputs of the product
LARGEST = (255, 127)  # an unsigned input and a signed weight; two products are 64770


@functools.cache
def saturates() -> bool:
    """Whether OpenVINO's CPU plugin clips the sums of a product of the largest bytes. Computed once a process, in 40 ms."""
    import openvino
    from openvino import opset8 as ops

    image = ops.parameter([1, 4, WIDTH], np.float32)
    low, high = (ops.constant(np.float32(value)) for value in (0, LARGEST[0]))
    eight = ops.fake_quantize(image, low, high, low, high, levels=256)
    weight = ops.convert(ops.constant(np.full((WIDTH, WIDTH), LARGEST[1], np.int8)), "f32")
    steps = ops.constant(np.ones((1, WIDTH), np.float32))
    product = ops.matmul(eight, ops.multiply(weight, steps), False, False)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.Model([product], [image]), "CPU", options)
    found = compiled(np.full((1, 4, WIDTH), LARGEST[0], np.float32))[0]
    return bool((found != WIDTH * LARGEST[0] * LARGEST[1]).any())


def fold_weights(model: Any) -> int:
    """Replace every int8 weight and its DequantizeLinear by one float32 constant, in place; returns how many.

    The plugin then finds no 8-bit product to make. Inputs still pass their grid of 8 bits, so that the features are
    INT8's own; the time is that of FP32 and a tenth (12.9 ms against 11.7 on a ViT-Tiny, ``benchmarks/``).
    """
    from openvino import opset8 as ops

    folded = 0
    for constant in model.get_ordered_ops():
        if constant.get_type_name() != "Constant" or not constant.get_friendly_name().endswith(".int8"):
            continue
        value, node = constant.get_data().astype(np.float32), constant
        while (reader := _reader(node)).get_type_name() in ("Convert", "Subtract", "Multiply"):
            if reader.get_type_name() != "Convert":
                operand = _constant(reader.input_value(1).get_node())
                value = value - operand if reader.get_type_name() == "Subtract" else value * operand
            node = reader
        output = ops.constant(value.astype(np.float32)).output(0)
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(output)
        folded += 1
    return folded


def _reader(node: Any) -> Any:
    return next(iter(node.output(0).get_target_inputs())).get_node()


def _constant(node: Any) -> np.ndarray:
    """The value of a constant behind conversions and reshapes, in the shape ``(1, O)`` of a step per output channel."""
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32).reshape(1, -1)  # type: ignore[no-any-return]
