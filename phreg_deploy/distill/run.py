"""Load the base model of a distillation, and hold what its stages share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from phreg_deploy.arguments import check_model
from phreg_deploy.distill.devices.processes import Processes
from phreg_deploy.distill.neurons.transplant import STRENGTH
from phreg_deploy.distill.recipes import NEIGHBOURS, Recipe, Request
from phreg_deploy.images.photographs import Photographs
from phreg_deploy.images.views import check_views
from phreg_deploy.layers import parse_layers
from phreg_deploy.models.batches import Batches, spread
from phreg_deploy.models.hardware import find_autocast
from phreg_deploy.models.hooks import ViT
from phreg_deploy.models.loading import load_model, model_preprocess
from phreg_deploy.models.origin import ModelIdentity, find_origin, model_identity
from phreg_deploy.models.readouts import with_readout
from phreg_deploy.progress import Progress
from phreg_deploy.spec import Preprocess


@dataclass(frozen=True)
class Run:
    """The loaded base model, and how this run computes. ``recipe`` has the requested values."""

    request: Request
    recipe: Recipe
    base: ViT
    preprocess: Preprocess
    origin: dict[str, str | None]
    devices: tuple[str, ...]
    autocast: bool
    progress: Progress
    processes: Processes

    @property
    def device(self) -> str:
        return self.devices[0]

    @property
    def strength(self) -> float | None:
        """Activation of a transplanted neuron, as a share of that on outlier tokens; None if the recipe moves none."""
        return self.request.strength or STRENGTH if self.recipe.moves_neurons else None

    @property
    def views(self) -> int:
        """Views per target; 1 if the loss reads no targets, and only the photographs kept beside them."""
        return 1 if self.recipe.loss == NEIGHBOURS else self.request.views

    @property
    def checkpoint(self) -> str | None:
        """Name of the file of weights, if one was given."""
        return self.request.checkpoint.name if self.request.checkpoint else None

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        return model_identity(self.base)

    def batches(self, photographs: Photographs, most: int) -> Batches:
        """Return at most ``most`` photographs as normalised batches on the first device."""
        return Batches(spread(photographs, most), self.preprocess, self.device)

    def settings(self, training: Photographs) -> dict[str, Any]:
        """Return what must be equal for a run to be resumed, as JSON."""
        return {
            **self.identity.to_json(),
            "preprocess": self.preprocess.to_json(),
            "images": training.digest(),
            "recipe": self.recipe.to_json(),
            "registers": self.recipe.registers,
            "views": self.views,
            "strength": self.strength,
            "seed": self.request.seed,
            "autocast": self.autocast,
        }


def load_run(request: Request, progress: Progress, processes: Processes) -> Run:
    """Load the base model, and choose devices, precision and recipe."""
    devices = processes.find_devices(request.device)
    autocast = all(find_autocast(request.precision, device) for device in devices)
    base = load_model(request.model, checkpoint=request.checkpoint, image_size=request.image_size)
    origin = find_origin(request.model, check_model(request.model, request.checkpoint), request.checkpoint)
    check_views(request.views, tuple(base.patch_embed.grid_size))
    recipe = request.adjusted_recipe(base.embed_dim)
    # Refuses a model without projection.
    with_readout(base, recipe.student_readout)
    if request.layers is not None:
        layers = parse_layers(request.layers, len(base.blocks))
        recipe.student_readout.check_outputs(layers, len(base.blocks), False)
        # The last layer is trained in any case.
        recipe = replace(recipe, layers=tuple(layer for layer in layers if layer < len(base.blocks)))
    return Run(request, recipe, base, model_preprocess(base, "center"), origin, devices, autocast, progress, processes)
