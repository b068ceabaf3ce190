"""Detect that OpenVINO's 8-bit kernels saturate on this processor, and compute INT8 in float32 instead.

Without VNNI oneDNN multiplies unsigned by signed bytes and adds two products in 16 bits (``vpmaddubsw``), which clips
sums above 32767: on a ViT-Tiny the mean patch cosine to FP32 fell from .993 to .985.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

# Inputs and outputs of the product.
WIDTH = 64
# An unsigned input and a signed weight; two products sum to 64770.
LARGEST = (255, 127)


@functools.cache
def saturates() -> bool:
    """Whether OpenVINO's CPU plugin clips the sums of a product of the largest bytes; takes 40 ms, once a process."""
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
    sums = compiled(np.full((1, 4, WIDTH), LARGEST[0], np.float32))[0]
    return bool((sums != WIDTH * LARGEST[0] * LARGEST[1]).any())


def fold_weights(model: Any) -> int:
    """Replace every int8 weight and its DequantizeLinear by one float32 constant, in place; returns how many.

    The plugin then makes no 8-bit product. Inputs are still rounded to 8 bits, so the features stay those of INT8; it
    takes a tenth longer than FP32 (12.9 ms against 11.7 on a ViT-Tiny, ``benchmarks/``).
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
    """The constant behind conversions and reshapes, as ``(1, O)``: one step per output channel."""
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32).reshape(1, -1)  # type: ignore[no-any-return]
