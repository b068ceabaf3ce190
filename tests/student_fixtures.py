"""A small model with a planted register neuron, its student and their bundles; each is made once."""

import pickle
from pathlib import Path
from typing import Any

import pytest

SIDE, PATCH, WIDTH, DEPTH = 64, 8, 48, 3
NEURON = (1, 17)  # block and hidden unit of the planted register neuron


def plant(model: Any, torch: Any) -> None:
    """Give ``model`` seeded weights of normal scale, and a register neuron that makes the four corner tokens outliers.

    A vector in the position embedding marks the corners. The neuron detects it and adds one large vector.
    """
    draw = torch.Generator().manual_seed(7)
    block, unit = NEURON
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            if "norm" in name:
                value.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            elif value.ndim > 1 and name.endswith("weight"):
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise if "embed" in name or "token" in name else 0.05 * noise)
        mark = torch.randn(WIDTH, generator=draw)
        mark = (mark - mark.mean()) / (mark - mark.mean()).norm()
        last = SIDE // PATCH - 1
        for row, column in ((0, 0), (0, last), (last, 0), (last, last)):
            model.pos_embed[0, 1 + row * (last + 1) + column] += 9 * mark
        mlp = model.blocks[block].mlp
        mlp.fc1.weight[unit] = 60 * mark
        mlp.fc1.bias[unit] = -60 * 3.5
        wrote = torch.randn(WIDTH, generator=draw)
        mlp.fc2.weight[:, unit] = 2 * wrote / wrote.norm()


@pytest.fixture(scope="session")
def base(made_once, torch) -> Path:
    """A folder that stock timm loads: a ViT of 64 px, patch 8, width 48, 3 blocks, 5 classes."""
    import timm
    from timm.models import save_for_hf

    def make(folder: Path) -> None:
        shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)
        plant(model, torch)
        save_for_hf(model, str(folder), model_args=shape, safe_serialization=True)

    return made_once("base", make)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, torch) -> Path:
    """Random weights in safetensors for timm's ``vit_tiny_patch16_224`` at its native 224 px."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "vit_tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def distilled(student) -> tuple[Path, Any]:
    """A student of one epoch, and its record."""
    return student, pickle.loads(student.with_name("record.pickle").read_bytes())


@pytest.fixture(scope="session")
def student(request, made_once, photos) -> Path:
    def make(folder: Path) -> None:
        base = request.getfixturevalue("base")
        from phreg_deploy.distill import distill

        record = distill(str(base), photos, folder, epochs=1, batch=8, views=6, device="cpu", precision="fp32")
        folder.with_name("record.pickle").write_bytes(pickle.dumps(record))

    return made_once("student", make)


@pytest.fixture(scope="session")
def exported(request, made_once):
    """``exported(name, **settings)`` returns the folder of a bundle of the student, which needs torch to be made."""

    def made(name: str, **settings: str) -> Path:
        def make(folder: Path) -> None:
            request.getfixturevalue("torch")
            from phreg_deploy.export.exporter import ExportRequest, export_bundle

            export_bundle(ExportRequest(str(request.getfixturevalue("student")), **settings), folder)

        return made_once(name, make)

    return made


@pytest.fixture(scope="session")
def bundle(exported) -> Path:
    """The student at 64 x 64, one image at a time."""
    return exported("fixed")


@pytest.fixture(scope="session")
def wide_bundle(exported) -> Path:
    """The student from 48 to 96 pixels a side, one to four images."""
    return exported("wide", image_size="48:64:96", batch="1:2:4")


@pytest.fixture(scope="session")
def int8_bundle(made_once, bundle, photos) -> Path:
    """The fixed bundle in INT8, as ``calibrate`` writes it by default."""
    from phreg_deploy.calibration import calibrate

    return made_once("int8", lambda folder: calibrate(bundle, photos, folder))


@pytest.fixture(scope="session")
def wide_int8_bundle(made_once, wide_bundle, photos) -> Path:
    """The bundle of many sizes and batches in INT8, with a given smoothing instead of a search."""
    from phreg_deploy.calibration import calibrate
    from phreg_deploy.quantisation import Smoothing

    return made_once("wide-int8", lambda folder: calibrate(wide_bundle, photos, folder, smoothing=Smoothing()))


@pytest.fixture(scope="session")
def clip_models(made_once, torch) -> Path:
    """``open_clip`` and ``timm``: a small CLIP with random weights, whole for open_clip and as timm's image tower."""
    pytest.importorskip("open_clip")
    from tests.text_models import clip

    def make(folder: Path) -> None:
        folder.mkdir()
        clip(folder)

    return made_once("clip-models", make)


@pytest.fixture(scope="session")
def clip_bundle(made_once, clip_models) -> Path:
    """The image tower at 64 x 64, projected into the space of text."""
    from phreg_deploy.export import export

    return made_once("clip-bundle", lambda folder: export(str(clip_models / "timm"), folder, project=True))
