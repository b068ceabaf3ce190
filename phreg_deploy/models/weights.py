"""Files of weights, read without ever unpickling more than tensors, and the identity of a set of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from phreg_deploy.arguments import check_checkpoint
from phreg_deploy.errors import PhregError
from phreg_deploy.models.hooks import ViT


def weights_digest(model: ViT) -> str:
    """sha256 over names and float32 bytes of every weight: the identity of a model, however it was stored."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A flat state dict from ``.safetensors`` or a torch checkpoint; nothing is unpickled beyond tensors.

    Raises:
        PhregError: missing, of another suffix, corrupt, or holding something other than tensors.
    """
    check_checkpoint(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise PhregError(f"checkpoint: {path} is corrupt or truncated ({error}).") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors for damaged files
        raise PhregError(
            f"checkpoint: {path} cannot be read safely ({type(error).__name__}): it is damaged, or holds more than tensors. Convert it to .safetensors."
        ) from None
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise PhregError(f"checkpoint: {path} holds no state dict; expected a mapping from names to tensors.")
    odd = next((key for key in state if not isinstance(key, str)), None)
    if odd is not None:
        raise PhregError(
            f"checkpoint: {path} names a tensor by the {type(odd).__name__} {odd!r}; expected names of weights, such as 'blocks.0.attn.qkv.weight'."
        )
    return state
