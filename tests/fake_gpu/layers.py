"""The layers that the fake inspector reports for an ONNX file."""

import re

from tests.fake_gpu.onnx_file import read_nodes, weight_types

ATTENTION = re.compile(r"^(blocks\.(\d+)\.attn)/(MatMul|Softmax)")


def make_layers(graph, tensorrt):
    """List the layers of an ONNX file: one kernel for each attention in 16 bits, one product for each linear layer.

    Layers of types gemm and kgen separate the ONNX names by 0x1f, others by 0x1e (``inspector_dumps.json``).
    """
    nodes, types_ = read_nodes(graph), weight_types(graph)
    half = any(kind in (10, 16) for kind in types_.values())
    layers, attentions = [], {}
    names = {name for name, _, _ in nodes}

    def layer(kind, label, members, datatype="Half"):
        layers.append(
            {
                "Name": f"{label}_myl0_{len(layers)}",
                "LayerType": kind,
                "TacticName": label,
                "Inputs": [{"Name": "x", "Dimensions": [1, 8, 8], "Format/Datatype": datatype}],
                "Outputs": [{"Name": "y", "Dimensions": [1, 8, 8], "Format/Datatype": "Half" if half else "Float"}],
                "Metadata": "\x1f".join(f"[ONNX Layer: {name}]" for name in members),
            }
        )

    for name, operator, _ in nodes:
        found = ATTENTION.match(name)
        if found:
            attentions.setdefault((found[1], int(found[2])), []).append(name)
        elif operator == "MatMul":
            linear = name.rpartition("/")[0]
            weight = f"{linear}/weight/DequantizeLinear"
            eight = weight in names and linear not in tensorrt.float_layers
            kind = (
                ("FP8" if any(t == 17 for t in types_.values()) else "Int8") if eight else ("Half" if half else "Float")
            )
            layer("gemm", "sm80_xmma_gemm", [name, weight] if weight in names else [name], f"Row major linear {kind}")
        else:
            layer("kgen", f"__myl_{operator}", [name])
    for (_, block), members in attentions.items():
        if half and block not in tensorrt.unfused_blocks:
            layer("kgen", "_gemm_mha_v2", members, "FP8" if any(t == 17 for t in types_.values()) else "Half")
        else:
            for member in members:
                layer("kgen", "__myl_MaxSubExpSumDivMul" if "Softmax" in member else "__myl_Fc", [member])
    return layers
