"""Class names embedded by open_clip's text towers: the numbers, the file, the models, and what is refused."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
import torch  # noqa: E402

from phreg_deploy.errors import PhregError  # noqa: E402
from phreg_deploy.heads import ClassEmbeddings  # noqa: E402
from phreg_deploy.text import embed_classes  # noqa: E402
from phreg_deploy.text.embedding import find_model  # noqa: E402
from phreg_deploy.text.model_names import OPEN_CLIP, vision_names  # noqa: E402
from phreg_deploy.text.templates import read_templates  # noqa: E402
from tests.cli_helpers import leftovers, without  # noqa: E402
from tests.text_models import JOINT, siglip  # noqa: E402

NAMES = ["background", "road, street", "car", "tree, bush, hedge"]
FLAT = ["background", "road", "street", "car", "tree", "bush", "hedge"]


@pytest.fixture(scope="module")
def theirs(clip_models):
    name = f"local-dir:{clip_models / 'open_clip'}"
    return open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)


@pytest.fixture(scope="module")
def ours(clip_models):
    return embed_classes(NAMES, str(clip_models / "open_clip"), templates="7")


@pytest.mark.parametrize(
    ("which", "templates"),
    [("80", open_clip.OPENAI_IMAGENET_TEMPLATES), ("7", open_clip.SIMPLE_IMAGENET_TEMPLATES)],
)
def test_embeddings_equal_open_clips_classifier(theirs, clip_models, which, templates):
    names = NAMES if which == "7" else NAMES[1:2]
    found = embed_classes(names, str(clip_models / "open_clip"), templates=which)
    expected = open_clip.build_zero_shot_classifier(*theirs, list(found.names), templates).T.numpy()
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-6)
    assert len(found.templates) == int(which)
    np.testing.assert_allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-6)
    # Names differ, so that the comparison means something.
    assert np.ptp(found.embeddings, axis=0).max() > 0.02


def test_classes_have_their_synonyms_the_models_scale_and_no_bias(theirs, ours):
    assert ours.names == tuple(FLAT)
    assert ours.classes == (0, 1, 1, 2, 3, 3, 3)
    assert ours.class_names == ("background", "road", "car", "tree")
    assert ours.scale == pytest.approx(float(theirs[0].logit_scale.exp()))
    assert (ours.bias, ours.model, ours.pretrained, ours.vision) == (None, "open_clip", "", ())


@torch.no_grad()
def test_the_bundles_tokens_are_open_clips(theirs, clip_bundle, photos):
    """timm's conversion of the image tower: class token and projected patch tokens, and their cosines with text."""
    from phreg_deploy.runtime import FeatureExtractor

    model, tokenizer = theirs
    with FeatureExtractor.load(clip_bundle, "onnxruntime-cpu") as extractor:
        image = extractor.prepare(photos / "frame-03.jpg")
        dense, steps = extractor.dense(image[None]), extractor.preprocess
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    pixels = (pixels - torch.tensor(steps.mean)[:, None, None]) / torch.tensor(steps.std)[:, None, None]
    model.visual.output_tokens = True
    pooled, tokens = model.visual(pixels)
    model.visual.output_tokens = False
    projected = tokens @ model.visual.proj
    np.testing.assert_allclose(dense.cls, pooled.numpy(), atol=2e-5)
    np.testing.assert_allclose(dense.features.reshape(1, -1, JOINT), projected.numpy(), atol=2e-5)
    text = model.encode_text(tokenizer(["a photo of a car.", "a tree"]))
    cosines = torch.nn.functional.cosine_similarity(projected[:, :, None], text[None, None], dim=-1)
    np.testing.assert_allclose(dense.similarity(text.numpy()).reshape(1, -1, 2), cosines.numpy(), atol=1e-5)
    np.testing.assert_allclose(dense.similarity(text[0].numpy()).reshape(1, -1), cosines[..., 0].numpy(), atol=1e-5)


def test_the_file_is_read_back_and_damage_is_refused(ours, tmp_path):
    path = tmp_path / "classes.npz"
    ours.write(path)
    again = ClassEmbeddings.read(path)
    np.testing.assert_array_equal(again.embeddings, ours.embeddings)
    assert {**vars(again), "embeddings": 0} == {**vars(ours), "embeddings": 0} | {"scale": again.scale}
    assert again.scale == pytest.approx(ours.scale)
    with np.load(path, allow_pickle=False) as arrays:
        content = {key: arrays[key] for key in arrays.files}
    assert content["embeddings"].dtype == np.float32
    with pytest.raises(PhregError, match=r"exists; choose another name, or replace it with --force"):
        ours.write(path)
    ours.write(path, force=True)
    assert leftovers(tmp_path) == []
    for change, message in (
        ({"format": np.int64(2)}, "format 2, expected at most 1"),
        ({"embeddings": 2 * ours.embeddings}, "unit length"),
        ({"classes": np.zeros(3, np.int64)}, "class of each name"),
        ({"classes": content["classes"][::-1]}, "class of each name"),
        ({"scale": np.float32(0)}, "scale above 0"),
        ({"names": np.array([object()] * 7)}, "cannot be read"),
    ):
        np.savez(tmp_path / "changed.npz", **{**content, **change})
        with pytest.raises(PhregError, match=f"^classes: .*{message}"):
            ClassEmbeddings.read(tmp_path / "changed.npz")
    np.savez(tmp_path / "less.npz", embeddings=ours.embeddings)
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:200])
    for name in ("less", "cut", "none"):
        with pytest.raises(PhregError, match=r"^classes: .*written by|`phreg-deploy classes` writes one"):
            ClassEmbeddings.read(tmp_path / f"{name}.npz")


def test_every_known_name_is_in_both_libraries_with_the_same_tower():
    """Names, tags, activations, patch size and widths; the weights themselves are not here."""
    models, tags = set(open_clip.list_models()), timm.list_pretrained()
    for name, (architecture, tag) in OPEN_CLIP.items():
        assert name in tags, name
        assert architecture in models, architecture
        theirs, config = open_clip.get_pretrained_cfg(architecture, tag), open_clip.get_model_config(architecture)
        assert theirs, (architecture, tag)
        vision, tower = config["vision_cfg"], timm.get_pretrained_cfg(name)
        stem = name.partition(".")[0]
        if "timm_model_name" in vision:
            assert vision["timm_model_name"] == stem, name
        else:
            quick = bool(config.get("quick_gelu", False))
            assert quick == ("quickgelu" in name) == bool(theirs.get("quick_gelu", False)), name
            assert int(re.search(r"patch(\d+)", name)[1]) == vision["patch_size"]
            assert tower.num_classes == config["embed_dim"], name
            assert tower.input_size[1] == vision["image_size"], name
    assert "vit_base_patch16_clip_224.openai" in vision_names("ViT-B-16-quickgelu", "openai")
    assert vision_names("ViT-B-16", None) == ("vit_base_patch16_clip_224",)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("ViT-B-16", {}, "got ViT-B-16 with no weights, expected --pretrained with one of .*laion2b_s34b_b88k"),
        ("ViT-B-16", {"pretrained": "laion"}, "the tag 'laion'"),
        ("ViT-B-16", {"pretrained": "openai"}, "trained with QuickGELU; expected --model ViT-B-16-quickgelu"),
        ("ViT-B-16", {"pretrained": "openai", "checkpoint": "x"}, "expected one of them"),
        ("vit_base_patch16_clip_224.openai", {}, r"expected --model vit_base_patch16_clip_quickgelu_224.openai"),
        ("vit_base_patch16_clip_224", {}, "with its tag, one of vit_base_patch16_clip_224.laion2b"),
        ("vit_base_patch16_clip_224.laion2b", {"pretrained": "x"}, "leave out --pretrained"),
        ("vit_small_patch14_dinov2.lvd142m", {}, "the timm names whose text tower is known: .*siglip_224.webli"),
        ("ViT-B-16", {"checkpoint": "none.pt"}, "there is no file none.pt"),
    ],
)
def test_a_model_without_a_known_text_tower_is_refused(model, options, message):
    given = {"pretrained": None, "checkpoint": None, **options}
    given["checkpoint"] = given["checkpoint"] and Path(given["checkpoint"])
    with pytest.raises(PhregError, match=message):
        find_model(model, **given)


def test_names_of_both_libraries_find_the_same_weights():
    pair = ("ViT-B-16-SigLIP", "webli", "webli", ("vit_base_patch16_siglip_224.webli",))
    assert find_model("vit_base_patch16_siglip_224.webli", None, None) == pair
    assert find_model("ViT-B-16-SigLIP", "webli", None) == pair


def test_a_student_or_bundle_stands_for_the_model_that_it_came_from(clip_bundle, tmp_path):
    known = find_model("vit_base_patch16_clip_224.laion2b", None, None)
    record = {"format": 1, "source": {"model": "vit_base_patch16_clip_224.laion2b"}}
    (tmp_path / "phreg.json").write_text(json.dumps(record))
    assert find_model(str(tmp_path), None, None) == known
    with pytest.raises(
        PhregError, match="came from vit_base_patch16_clip_quickgelu_224, whose text tower is not known"
    ):
        find_model(str(clip_bundle), None, None)


def test_the_command_writes_the_file(clip_models, ours, tmp_path, run_cli):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    (tmp_path / "templates.txt").write_text("\n".join(ours.templates))
    words = ["classes", tmp_path / "names.txt", "--model", clip_models / "open_clip", "-o", tmp_path / "classes.npz"]
    done = run_cli(*words, "--templates", tmp_path / "templates.txt", "--json")
    assert done.code == 0, done.err
    assert done.document["classes"] == ["background", "road", "car", "tree"]
    assert (done.document["names"], done.document["width"], done.document["templates"]) == (7, JOINT, 7)
    np.testing.assert_array_equal(ClassEmbeddings.read(tmp_path / "classes.npz").embeddings, ours.embeddings)
    run_cli(*words, "--json").refused(2, "exists")
    run_cli(*words[:-1], tmp_path / "classes.txt", "--json").refused(2, "a name with .npz")
    run_cli(*words[:-1], tmp_path / "none" / "classes.npz", "--json").refused(2, "there is no folder")
    words = [*words, "--force", "--json"]
    run_cli(*words, "--templates", "8").refused(2, "got '8', expected 80 or 7")
    (tmp_path / "templates.txt").write_text("a photo\n")
    run_cli(*words, "--templates", tmp_path / "templates.txt").refused(2, "expected sentences with {} once")
    run_cli(*words, "--pretrained", "openai").refused(2, "has its own weights")
    for text, message in (("", "0 classes"), ("a,,b", "an empty name"), ("a\nb,a", "'a' twice"), (None, "read")):
        path = tmp_path / "wrong.txt"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        run_cli(words[0], path, *words[2:]).refused(2, message)
    folder = tmp_path / "empty"
    folder.mkdir()
    run_cli(*words[:3], folder, *words[4:]).refused(2, "has no open_clip_config.json")
    shutil.copy(clip_models / "open_clip" / "open_clip_config.json", folder)
    run_cli(*words[:3], folder, *words[4:]).refused(2, "open_clip cannot load")
    for damage in (None, b"", b"damaged", pickle.dumps({"weight": Path("x")})):
        torch.save({"weight": torch.ones(2)}, folder / "open_clip_pytorch_model.bin")
        if damage is not None:
            (folder / "open_clip_pytorch_model.bin").write_bytes(damage)
        run_cli(*words[:3], folder, *words[4:]).refused(2, "open_clip cannot load")
    (folder / "open_clip_model.safetensors").write_bytes(b"damaged")
    run_cli(*words[:3], folder, *words[4:]).refused(2, "open_clip cannot load")
    (folder / "open_clip_config.json").write_text("{")
    run_cli(*words[:3], folder, *words[4:]).refused(2, "open_clip cannot load")
    assert leftovers(tmp_path) == []


def test_a_missing_library_is_named(clip_models, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    words = [
        "classes",
        tmp_path / "names.txt",
        "--model",
        clip_models / "open_clip",
        "-o",
        tmp_path / "c.npz",
        "--json",
    ]
    (outcome,) = without(["open_clip"], [words])
    outcome.refused(4, "needs the module 'open_clip'", 'pip install "phreg-deploy[text]"')


def test_a_siglip_has_its_own_tokens_scale_and_bias(tmp_path, run_cli, monkeypatch):
    pytest.importorskip("transformers")
    model = siglip(tmp_path / "siglip")
    (tmp_path / "names.txt").write_text("car\ntree\n")
    found = embed_classes(tmp_path / "names.txt", str(tmp_path / "siglip"), templates="7")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'siglip'}")
    assert isinstance(tokenizer, open_clip.tokenizer.HFTokenizer)
    assert tokenizer(["itap of a car"])[0, :5].tolist() == [2, 3, 4, 16, 0]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, found.names, open_clip.SIMPLE_IMAGENET_TEMPLATES)
    np.testing.assert_allclose(found.embeddings, expected.T.numpy(), atol=1e-6)
    assert (found.bias, found.scale) == (pytest.approx(-10), pytest.approx(np.exp(2.3), rel=1e-5))
    words = ["classes", tmp_path / "names.txt", "--model", tmp_path / "siglip", "-o", tmp_path / "c.npz", "--json"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    run_cli(*words).refused(4, "the tokens of", "need transformers", 'pip install "phreg-deploy[text]"')


def test_small_templates_are_open_clips():
    assert read_templates("7")[0] == "itap of a {}."
    assert len(set(read_templates("80"))) == 80
