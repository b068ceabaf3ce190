"""Read files of weights without unpickling more than tensors, hash weights, and choose which ones train."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from phreg_deploy.arguments import check_checkpoint
from phreg_deploy.errors import PhregError
from phreg_deploy.json_files import read_json
from phreg_deploy.models.hooks import ViT

# Sizes up to this are built whatever the weights are: timm then says what does not fit.
LEAST_DECLARED = 4096


def weights_digest(model: ViT) -> str:
    """Return the sha256 over names and float32 bytes of every weight, which does not depend on the file format."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a flat state dict from ``.safetensors`` or a PyTorch checkpoint; nothing but tensors is unpickled.

    Raises:
        PhregError: the file is missing, has another suffix, is corrupt, or holds more than tensors.
    """
    check_checkpoint(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise PhregError(f"checkpoint: {path} is corrupt or truncated ({error}).") from None
    if _is_squeezed(path):
        raise PhregError(
            f"checkpoint: {path} is compressed, which torch.save does not do; expected it stored as it is. Unpack it, "
            "or convert it to .safetensors."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # PyTorch raises pickle, zip, EOF and runtime errors for damaged files.
    except Exception as error:
        raise PhregError(
            f"checkpoint: {path} cannot be read safely ({type(error).__name__}): it is damaged, or holds more "
            "than tensors. Convert it to .safetensors."
        ) from None
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise PhregError(f"checkpoint: {path} holds no state dict; expected a mapping from names to tensors.")
    odd = next((key for key in state if not isinstance(key, str)), None)
    if odd is not None:
        raise PhregError(
            f"checkpoint: {path} names a tensor by the {type(odd).__name__} {odd!r}; expected names of weights, "
            "such as 'blocks.0.attn.qkv.weight'."
        )
    return state


def check_declared(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Compare the sizes that ``config.json`` declares with the weights beside it, before a model of them is built.

    Raises:
        PhregError: a depth, a width, registers or classes far beyond the weights, which would take gigabytes or hours.
    """
    try:
        declared = read_json(folder / "config.json")["model_args"]
        given = {key: value for key, value in declared.items() if type(value) is int}
    # timm says what is wrong with it.
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return
    largest = max((side for value in state.values() for side in value.shape), default=0)
    for key, most in {
        "depth": len(state),
        **dict.fromkeys(("embed_dim", "reg_tokens", "num_classes"), largest),
    }.items():
        if given.get(key, 0) > max(most, LEAST_DECLARED):
            raise PhregError(
                f"model: config.json in {folder} says {key} {given[key]}, but the weights beside it have at most "
                f"{most}; copy or distil the student again."
            )


def _is_squeezed(path: Path) -> bool:
    """Whether a checkpoint is a zip with compressed members, of which a few megabytes can hold terabytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    # It is no zip, or a damaged one, of which PyTorch says more.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def unlock_weights(model: ViT, unlock: str) -> list[nn.Parameter]:
    """Freeze every weight but those of ``unlock``, "all", "paper" or "paper-clip", and return these.

    The classifier head and the pooling are never trained. "paper": the set for DINOv2 (``distill_main.py`` of arXiv
    2505.21501), which is registers, position embedding, patch projection and last block; and the class token, since
    ``add_registers`` moves its position embedding into it. "paper-clip": its set for CLIP, with the last two blocks.
    """
    last = 2 if unlock == "paper-clip" else 1
    blocks = tuple(f"blocks.{i}." for i in range(len(model.blocks))[-last:])
    paper = ("reg_token", "pos_embed", "cls_token", "patch_embed.", *blocks)
    frozen = ("head.", "fc_norm.", "attn_pool.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) and (unlock == "all" or name.startswith(paper)))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
