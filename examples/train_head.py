"""Train a segmentation head in PyTorch on cached features, and write it as a head that `attach` takes.

    phreg-deploy extract student.bundle images/ -o features --fit squash
    python examples/train_head.py features --masks masks/ --classes names.txt -o head
    phreg-deploy attach student.bundle --head head -o labels.bundle --labels --upsample

The backbone runs once for each image, in `extract`; an epoch then takes seconds. The head is a batch norm and a 1x1
convolution; its logits are enlarged bilinearly to the mask. `phreg-deploy probe` does the same without PyTorch; start
from this file where you want another loss, sampler or augmentation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from phreg_deploy.errors import PhregError
from phreg_deploy.heads import Head

# Every fifth image is held out.
HOLD_OUT = 5


class CachedFeatures(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Features of a folder of ``extract``, with the mask of the same name: ``NAME.npy`` and ``MASKS/NAME.png``.

    An item is features float32 ``(C, Hp, Wp)`` and classes int64 ``(H, W)`` at the model's input size.

    Args:
        ignore: the value of pixels without a class.
    """

    def __init__(self, folder: Path, masks: Path, ignore: int) -> None:
        try:
            index = json.loads((folder / "features.json").read_text())
        except OSError:
            raise SystemExit(f"{folder} holds no features.json; expected an output of phreg-deploy extract.") from None
        settings, self.ignore = index["settings"], ignore
        steps = settings["preprocess"]
        whole = settings["fit"] is None and steps["crop_mode"] == "squash" and steps["crop_pct"] == 1
        if not (settings["fit"] == "squash" or whole) or settings["stride"] is not None:
            raise SystemExit(f"{folder} holds features of parts of images; extract them with --fit squash.")
        self.size: tuple[int, int] = (settings["size"][0], settings["size"][1])
        names = [Path(entry["features"]) for entry in index["images"]]
        self.files = [(folder / name, mask) for name in names if (mask := masks / name.with_suffix(".png")).is_file()]
        if not self.files:
            raise SystemExit(f"{masks} holds no mask of the images, e.g. no {names[0].with_suffix('.png')}.")
        self.width = int(np.load(self.files[0][0], mmap_mode="r").shape[-1])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        features, mask = self.files[number]
        height, width = self.size
        with Image.open(mask) as picture:
            if picture.mode not in ("L", "P"):
                raise SystemExit(f"{mask} has the mode {picture.mode}; expected a PNG in grey or with a palette.")
            classes = np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))
        values = torch.from_numpy(np.load(features).astype(np.float32))
        return values.permute(2, 0, 1), torch.from_numpy(classes.astype(np.int64))


class LinearHead(nn.Module):
    """A batch norm and a 1x1 convolution, as the linear heads of DINOv2 have; logits ``(B, K, H, W)``."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)  # type: ignore[arg-type]

    def forward(self, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        logits = self.layer(self.norm(features))
        return functional.interpolate(logits, size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight ``(K, C)`` and bias ``(K,)`` with the batch norm at inference in them."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        bias = self.layer.bias
        if mean is None or variance is None or bias is None:
            raise TypeError("the layers have no statistics or no bias")
        scale = self.norm.weight / torch.sqrt(variance + self.norm.eps)
        shift = self.norm.bias - mean * scale
        weight = self.layer.weight[..., 0, 0]
        return (weight * scale).numpy(), (bias + weight @ shift).numpy()


def train(data: CachedFeatures, classes: int, epochs: int, batch: int, rate: float) -> tuple[LinearHead, np.ndarray]:
    """Train with AdamW and a cosine schedule; return the head and the confusion ``(K, K)`` of the held-out images."""
    torch.manual_seed(0)
    held = [i for i in range(len(data)) if i % HOLD_OUT == HOLD_OUT - 1]
    loader = DataLoader(Subset(data, [i for i in range(len(data)) if i not in set(held)]), batch, shuffle=True)
    model = LinearHead(data.width, classes)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(loader))
    for epoch in range(epochs):
        total = 0.0
        for features, truth in loader:
            loss = functional.cross_entropy(model(features, data.size), truth, ignore_index=data.ignore)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += loss.item() / len(loader)
        print(f"epoch {epoch + 1} of {epochs}: loss {total:.3f}")
    model.eval()
    confusion = np.zeros((classes, classes), np.int64)
    with torch.no_grad():
        for number in held:
            features, truth = data[number]
            guess, kept = model(features[None], data.size)[0].argmax(0), truth != data.ignore
            np.add.at(confusion, (truth[kept].numpy(), guess[kept].numpy()), 1)
    return model, confusion


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path, help="output folder of phreg-deploy extract --fit squash")
    parser.add_argument("--masks", type=Path, required=True, help="folder of NAME.png, in grey or with a palette")
    parser.add_argument("--classes", type=Path, required=True, help="text file, one name a line, from class 0")
    parser.add_argument("--ignore", type=int, default=255, help="value of pixels without a class")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the head")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate")
    parser.add_argument("--force", action="store_true", help="replace a head that exists")
    given = parser.parse_args(arguments)
    names = tuple(given.classes.read_text().split("\n")) if given.classes.is_file() else ()
    names = tuple(name.strip() for name in names if name.strip())
    data = CachedFeatures(given.features, given.masks, given.ignore)
    truths = (data[number][1].numpy() for number in range(len(data)))
    highest = max(int(truth[truth != given.ignore].max(initial=0)) for truth in truths)
    if len(names) < 2 or highest >= len(names):
        raise SystemExit(f"{given.classes} names {len(names)} classes, and the masks have values up to {highest}.")
    model, confusion = train(data, len(names), given.epochs, given.batch, given.rate)
    shared, seen = np.diag(confusion), confusion.sum(1) > 0
    union = confusion.sum(0) + confusion.sum(1) - shared
    mean_iou, accuracy = float((shared[seen] / union[seen]).mean()), float(shared.sum() / max(1, confusion.sum()))
    print(f"held-out images: mean IoU {mean_iou:.1%}, pixel accuracy {accuracy:.1%}")
    weight, bias = model.folded()
    facts = {"by": "examples/train_head.py", "images": len(data), "mean_iou": mean_iou, "pixel_accuracy": accuracy}
    try:
        Head(weight, bias, classes=names, ignore=given.ignore, trained_on=facts).write(given.output, given.force)
    except PhregError as error:
        raise SystemExit(str(error)) from None
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
