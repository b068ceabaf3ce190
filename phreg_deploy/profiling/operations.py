"""Count the operations of a Vision Transformer, and the bytes that it moves, by part.

Operations are counted by formula: 2 per multiply-add; by convention 5 per element of a softmax (maximum, difference,
exponential, sum, quotient), 8 of a layer norm and 8 of a GELU. Bytes are the minimum: inputs and weights read once,
outputs written once. TensorRT fuses biases, the GELU and residuals into the products, which then also read the residual
stream once; in a fused attention the scores stay on the chip.
"""

from __future__ import annotations

from phreg_deploy.errors import PhregError
from phreg_deploy.readout import FINAL, VALUE
from phreg_deploy.spec import ModelSpec, check_multiple

# Operations per element.
SOFTMAX, NORM, GELU = 5, 8, 8


def count_parts(
    spec: ModelSpec,
    *,
    batch: int,
    size: tuple[int, int],
    activation_bytes: float = 2,
    weight_bytes: float | None = None,
    hidden: int | None = None,
    fused_attention: bool = True,
    readout: str = FINAL,
) -> dict[str, tuple[float, float]]:
    """Part -> (operations, bytes) of one inference, all blocks together.

    Args:
        size: (height, width) in pixels. activation_bytes, weight_bytes: per element; weights as activations by default.
        hidden: width of the MLP, which the spec does not know; by default 4 times the model's.
        fused_attention: scores and probabilities, ``(B, heads, T, T)``, never reach the device's memory.
        readout: "value" and "neighbour" leave out the MLP and the residuals of the last block, and also its queries;
            "value" leaves out its keys and attention too.

    Raises:
        PhregError: a size that is not a multiple of the patch, or an empty batch.
    """
    if batch < 1:
        raise PhregError(f"batch: got {batch}, expected at least 1.")
    check_multiple(size, spec.patch)
    a, w = activation_bytes, activation_bytes if weight_bytes is None else weight_bytes
    c, m, pixels = spec.width, hidden or 4 * spec.width, spec.patch[0] * spec.patch[1] * 3
    patches = size[0] * size[1] * 3 // pixels
    tokens = patches + spec.prefix_tokens
    n, scores = batch * tokens, batch * spec.heads * tokens * tokens

    def linear(rows: int, inputs: int, outputs: int, per_output: int = 0) -> tuple[float, float]:
        """A product with bias; ``per_output``: further operations on each output, fused."""
        work = 2 * rows * inputs * outputs + (1 + per_output) * rows * outputs
        return work, a * rows * (inputs + outputs) + w * outputs * (inputs + 1)

    apart = 0 if fused_attention else 2 * a * scores  # written by one kernel, read by the next
    block = {
        "norm": (2 * NORM * n * c, 4 * a * n * c),
        "qkv": linear(n, c, 3 * c),
        "attention products": (4 * scores * (c // spec.heads), 4 * a * n * c + apart),
        "softmax": (SOFTMAX * scores, apart),
        "proj": linear(n, c, c),
        "fc1": linear(n, c, m, GELU),
        "fc2": linear(n, m, c),
        "residual": (2 * n * c, 2 * a * n * c),
    }
    last = block
    if readout != FINAL:
        last = dict.fromkeys(block, (0, 0)) | {"norm": (NORM * n * c, 2 * a * n * c), "proj": block["proj"]}
        last["qkv"] = linear(n, c, c if readout == VALUE else 2 * c)
        if readout != VALUE:
            last |= {name: block[name] for name in ("attention products", "softmax")}
    parts = {
        name: ((spec.depth - 1) * work + last[name][0], (spec.depth - 1) * moved + last[name][1])
        for name, (work, moved) in block.items()
    }
    parts["norm"] = (parts["norm"][0] + NORM * n * c, parts["norm"][1] + 2 * a * n * c)  # the final one
    work, moved = linear(batch * patches, pixels, c, 1)  # the image comes in bytes; a position is added to each patch
    image = batch * patches * pixels
    return {"patch embed": (work, moved + (1 - a) * image + a * patches * c), **parts}
