"""Name what is read out of a ViT as its dense features: the final tokens, or what CLIP needs for segmentation.

CLIP is trained on its class token alone; the attention of its last block mixes patches by the needs of that token.
``value`` (MaskCLIP, arXiv 2112.01071) and ``neighbour`` (NACLIP, arXiv 2404.08181) change the last block only, without
training, and leave the checkpoint as timm loads it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from phreg_deploy.errors import PhregError
from phreg_deploy.spec import Stored

FINAL, VALUE, NEIGHBOUR = "final", "value", "neighbour"
READOUTS = (FINAL, VALUE, NEIGHBOUR)
# Standard deviation in patches of the window that "neighbour" adds to its attention; the default of NACLIP's code.
WINDOW_STD = 5.0


@dataclass(frozen=True)
class Readout(Stored):
    """``name``: "final", the tokens of the last block.

    "value": the last block is ``proj(v(norm1(x)))``, without attention, residual and MLP. "neighbour": it is attention
    of keys to keys plus a Gaussian window around each patch, without residual and MLP. Both apply the block's
    LayerScale, if it has one, and the model's final norm.
    ``project``: the model's own projection into the space of text follows, on patch tokens and class token.
    """

    name: str = FINAL
    project: bool = False

    def __post_init__(self) -> None:
        if self.name not in READOUTS:
            raise PhregError(f"readout: got {self.name!r}, expected {', '.join(READOUTS[:-1])} or {READOUTS[-1]}.")
        if not isinstance(self.project, bool):
            raise PhregError(f"readout: got project {self.project!r}, expected true or false.")

    @property
    def is_plain(self) -> bool:
        """Whether the features are those of the unchanged model."""
        return self == PLAIN

    def check_outputs(self, layers: Collection[int], depth: int, attention: bool) -> None:
        """Raise ``PhregError`` for further outputs of a last block that this readout changes.

        Args:
            layers: further layers, by how many blocks their tokens have passed.
        """
        if self.name == FINAL:
            return
        if depth in layers:
            raise PhregError(
                f"layers: got {depth}, the last block, with the readout {self.name}, which serves that block's "
                f"tokens as features already; expected layers from 1 to {depth - 1}."
            )
        if attention:
            raise PhregError(
                f"attention: the readout {self.name} does not compute the class token's attention in the last block; "
                "leave out --attention, or use --readout final."
            )


PLAIN = Readout()
