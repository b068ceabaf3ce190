"""Which device and precision a run gets: what was asked for, or an error; ``auto`` says what it chose."""

from __future__ import annotations

import torch

from phreg_deploy.arguments import check_device, check_devices
from phreg_deploy.errors import BackendMissing
from phreg_deploy.models.hooks import ViT


def find_device(asked: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` -> a device that works here.

    Raises:
        BackendMissing: CUDA was asked for and this torch cannot use it. PhregError: another word.
    """
    check_device(asked)
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu":
        return asked
    if not torch.cuda.is_available():
        raise BackendMissing(
            f"device: got {asked!r}, but torch {torch.__version__} sees no usable GPU. Check nvidia-smi and the driver, or use --device cpu."
        )
    if asked != "cuda" and int(asked[5:]) >= torch.cuda.device_count():
        raise BackendMissing(f"device: got {asked!r}, but there are {torch.cuda.device_count()} GPUs, numbered from 0.")
    return asked


def find_devices(asked: str) -> tuple[str, ...]:
    """What ``find_device`` takes, or several GPUs, ``cuda:0,cuda:1`` -> devices that work here, at least one.

    Raises:
        BackendMissing: one of them is not there. PhregError: another word, or a GPU named twice.
    """
    check_devices(asked)
    return tuple(find_device(name) for name in asked.split(","))


def find_autocast(asked: str, device: str) -> bool:
    """Whether to run under bfloat16 autocast. ``auto``: where the device computes bfloat16 natively (twice as fast)."""
    if asked != "auto":
        return asked == "bf16"
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.cpu._is_avx512_bf16_supported())


def quickest_attention(model: ViT, device: str, autocast: bool) -> None:
    """On a CPU under bfloat16 autocast torch's fused attention is the slower path, so the explicit one is taken.

    Measured with torch 2.15 on an AVX512-BF16 server core, ViT-Tiny at 224 px, batch 32, two threads, interleaved: 0.79 s
    against 1.14 s a training step, 0.27 s against 0.33 s a forward.
    """
    explicit = autocast and device == "cpu"
    for block in model.blocks:
        block.attn.fused_attn = not explicit
