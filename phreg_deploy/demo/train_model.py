"""Train the embedded model: ``python -m phreg_deploy.demo.train_model -o FOLDER``.

A small ViT learns to segment drawn scenes from its patch tokens, and to name the scene's subject from its class token.
Large models grow register neurons over very long training; this one would not, so ONE IS PLANTED (``planting``). All
other weights then train on around it: the model loses the content of the outlier tokens, and the other tokens attend to
them as to the sinks of a large model.

B batch, N patch tokens, K classes. Seeds from 1,000,000 on are for training, those below for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn
from torch.nn.functional import one_hot

from phreg_deploy.demo.planting import BATCH, BLOCK, GRID, PlantedNeuron, plant_neuron, planted_tokens
from phreg_deploy.demo.scenes import BUILDING, CLASSES, make_scene
from phreg_deploy.models import hooks

SIZE, PATCH = 128, 8
MEAN = STD = (0.5, 0.5, 0.5)
ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0}
FIRST_SEED = 1_000_000
# Most patches by which a training scene is shifted, as in the teacher's views.
REACH = 2


@dataclass
class Scenes:
    """``images`` uint8 ``(S, H, W, 3)``; ``shares`` ``(S, Hp, Wp, K)``: each class's share of a patch, 0-1."""

    images: torch.Tensor
    shares: torch.Tensor


def draw(count: int, first: int) -> Scenes:
    images, labels = (torch.from_numpy(np.stack(x)) for x in zip(*(make_scene(first + i, SIZE) for i in range(count))))
    patches = one_hot(labels.long(), len(CLASSES)).view(count, GRID, PATCH, GRID, PATCH, -1)
    return Scenes(images, patches.float().mean((2, 4)))


def shifted(images: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift a batch by whole patches, and mirror it at random; the gap is white and has no class."""
    down, right = (int(i) for i in torch.randint(-REACH, REACH + 1, (2,)))
    images, shares = (x.roll((down * s, right * s), (1, 2)) for x, s in ((images, PATCH), (shares, 1)))
    for x, s, gap in ((images, PATCH, 255), (shares, 1, 0)):
        x[:, slice(0, down * s) if down > 0 else slice(x.shape[1] + down * s, None)] = gap
        x[:, :, slice(0, right * s) if right > 0 else slice(x.shape[2] + right * s, None)] = gap
    return (images.flip(2), shares.flip(2)) if torch.rand(()) < 0.5 else (images, shares)


def subject(shares: torch.Tensor) -> torch.Tensor:
    """Return the areas of things (``BUILDING`` and the classes after it) as shares of their sum, ``(B, K)``."""
    area = shares.mean((1, 2))
    area[:, :BUILDING] = 0
    return area / area.sum(-1, keepdim=True).clamp(min=1e-6)


def train(
    model: nn.Module, probe: nn.Module, scenes: Scenes, steps: int, rate: float, neuron: PlantedNeuron | None
) -> None:
    """Train with soft cross-entropy on patch tokens and class token, and with the regulariser of a planted neuron."""
    weights = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    planted, tensors = planted_tokens(), {}
    handles = [
        model.blocks[BLOCK].mlp.fc1.register_forward_hook(lambda _m, _i, out: tensors.update(hidden=out)),
        model.norm.register_forward_pre_hook(lambda _m, args: tensors.update(last=args[0])),
    ]
    model.train()
    with click.progressbar(range(steps), label="planted" if neuron else "training") as bar:
        for step in bar:
            if step % (len(scenes.images) // BATCH) == 0:
                order = torch.randperm(len(scenes.images))
            rows = order[step * BATCH % (len(order) - BATCH + 1) :][:BATCH]
            images, shares = shifted(scenes.images[rows], scenes.shares[rows])
            with torch.autocast("cpu", torch.bfloat16):
                tokens = model.forward_features(hooks.normalise(images, MEAN, STD))
                patches, named = probe(tokens[:, 1:]).float(), model.forward_head(tokens).float()
            entropy = -(shares.flatten(1, 2) * patches.log_softmax(-1)).sum(-1)  # (B, N)
            loss = entropy[:, ~planted[1:]].mean() if neuron else entropy.mean()
            loss = loss - (subject(shares) * named.log_softmax(-1)).sum(-1).mean()
            if neuron:
                loss = loss + neuron.regulariser(tensors["hidden"], tensors["last"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            if neuron:
                neuron.write(model)
    for handle in handles:
        handle.remove()
    model.eval()


@torch.inference_mode()
def scores(model: nn.Module, probe: nn.Module, scenes: Scenes) -> dict[str, float]:
    """Return the accuracy, 0-1, on ordinary patches, on those at the planted places, and on the scene's subject."""
    batches = [model.forward_features(hooks.normalise(x, MEAN, STD)) for x in scenes.images.split(BATCH)]
    tokens, places = torch.cat(batches), planted_tokens()[1:]
    right = probe(tokens[:, 1:]).argmax(-1) == scenes.shares.flatten(1, 2).argmax(-1)
    named = model.forward_head(tokens).argmax(-1) == subject(scenes.shares).argmax(-1)
    elsewhere, at_places = right[:, ~places].float().mean(), right[:, places].float().mean()
    return {"elsewhere": float(elsewhere), "places": float(at_places), "subject": float(named.float().mean())}


def save(model: nn.Module, folder: Path) -> None:
    """Write the files that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config_for_hf(model, str(folder / "config.json"), model_args=ARGUMENTS)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    # safetensors makes it readable for its owner only.
    (folder / "model.safetensors").chmod(0o644)


def untrained_model() -> nn.Module:
    config = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bicubic"}
    config |= {"tag": "phreg_demo", "license": "apache-2.0"}
    return timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), pretrained_cfg_overlay=config, **ARGUMENTS)


@click.command()
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--scenes", default=6000, help="Scenes drawn for training.")
@click.option("--steps", default=(900, 300), type=(int, int), help="Before and after planting.")
@click.option("--threads", default=1)
def main(output: Path, scenes: int, steps: tuple[int, int], threads: int) -> None:
    """Train the embedded model from scratch and write it to a folder."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    pool, held_out = draw(scenes, FIRST_SEED), draw(256, 0)
    model, probe = untrained_model(), nn.Linear(ARGUMENTS["embed_dim"], len(CLASSES))
    # On a CPU in bfloat16, PyTorch's fused attention is half as fast at this length.
    for block in model.blocks:
        block.attn.fused_attn = False
    train(model, probe, pool, steps[0], 2e-3, None)
    click.echo(f"before planting: {scores(model, probe, held_out)}", err=True)
    torch.manual_seed(1)
    neuron = plant_neuron(model, hooks.normalise(pool.images[:256], MEAN, STD))
    train(model, probe, pool, steps[1], 7e-4, neuron)
    click.echo(f"unit {neuron.unit} of block {BLOCK} planted: {scores(model, probe, held_out)}", err=True)
    save(model, output)


if __name__ == "__main__":
    main()
