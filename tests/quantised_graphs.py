"""Trace the graph of every family once a session, with the same images for graph and model."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from phreg_deploy.calibration.qdq import write_int8
from phreg_deploy.calibration.ranges import Ranges, observe_ranges
from phreg_deploy.calibration.smoothing import Equalised, equalise
from phreg_deploy.export.dense_vit import DenseViT
from phreg_deploy.export.trace import trace
from phreg_deploy.models import hooks
from phreg_deploy.models.loading import model_preprocess, model_spec
from phreg_deploy.models.registers import add_registers
from phreg_deploy.onnx_graph.linears import Linear, find_linears
from phreg_deploy.onnx_graph.wiring import Wiring
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.spec import Batches, ModelSpec, Preprocess, Sizes
from tests.cli_helpers import photograph
from tests.small_models import small

BATCH = 4
# These families have two blocks; the others have one, which is faster to trace.
DEEPER = ("augreg", "dinov2", "eva02-base")


@dataclass
class Traced:
    """A small model, its graph for four images, and photographs in batches of four, uint8 ``(2, 4, H, W, 3)``."""

    model: Any
    graph: ModelProto
    preprocess: Preprocess
    images: np.ndarray

    @functools.cached_property
    def linears(self) -> list[Linear]:
        return find_linears(self.graph)

    @functools.cached_property
    def ranges(self) -> Ranges:
        return observe_ranges(self.graph, self.linears, self.spec, self.feeds, lambda _count: None)

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.model)

    @property
    def feeds(self) -> list[tuple[dict[str, np.ndarray], int]]:
        return [({"image": batch}, len(batch)) for batch in self.images]

    @property
    def batches(self) -> list[torch.Tensor]:
        """Return the images as normalised tensors, which the model takes."""
        return [hooks.normalise(batch, self.preprocess.mean, self.preprocess.std) for batch in self.images]

    def equalised(self, smoothing: Smoothing = Smoothing()) -> Equalised:  # noqa: B008
        return equalise(Wiring(self.graph), self.linears, self.ranges, smoothing)

    def eight_bits(self, target: str, keep: frozenset[str] = frozenset(), smoothing: Smoothing = Smoothing()) -> Any:  # noqa: B008
        return write_int8(self.graph, self.linears, self.equalised(smoothing), set(keep), target)

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def names(self) -> list[str]:
        return [linear.name for linear in self.linears]


# In their small size, the two are the same model.
SAME = {"dino": "augreg"}


def traced(family: str) -> Traced:
    return _traced(SAME.get(family, family))


@functools.lru_cache
def _traced(family: str) -> Traced:
    model = add_registers(small(family, depth=2 if family in DEEPER else 1), 4)
    height, width = model.patch_embed.img_size
    preprocess = model_preprocess(model)
    graph = trace(DenseViT(model, preprocess), Sizes("fixed", ((height, width),)), Batches.parse(str(BATCH))).model
    images = np.stack([np.asarray(photograph(i, width, height)) for i in range(2 * BATCH)])
    return Traced(model, graph, preprocess, images.reshape(2, BATCH, height, width, 3))


def features(session: Any, images: np.ndarray) -> np.ndarray:
    """``(B, N, C)`` of one batch."""
    (values,) = session.run(["features"], {"image": images})
    return values.reshape(len(images), -1, values.shape[-1])
