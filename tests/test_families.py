"""Which of timm's models are supported: every name is judged; small models of the kinds are distilled and served."""

import re

import numpy as np
import pytest
import timm
import torch

from benchmarks import families
from phreg_deploy.distill import distill
from phreg_deploy.errors import PhregError
from phreg_deploy.export import export
from phreg_deploy.models import hooks
from phreg_deploy.models.families import refused_name
from phreg_deploy.models.loading import check_supported, load_model, model_spec
from phreg_deploy.models.registers import add_registers
from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import invoke
from tests.small_models import save, small
from tests.test_export import random_images, run_both

# timm names of kinds that are not in tests/small_models.py.
MORE = [
    "vit_small_patch16_lingbot",
    "vit_pe_lang_large_patch14_448",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_small_patch16_rope_224",
    "vit_betwixt_patch16_rope_reg4_gap_256",
    "eva02_base_patch16_clip_224",
    "eva_giant_patch14_clip_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch14_reg1_tipsv2",
    "vit_small_patch14_reg4_dinov2",
    "vit_intern300m_patch14_448",
    "beit3_base_patch16_224",
    "flexivit_small",
    "vit_so400m_patch14_siglip_224",
]
WANTED = ("dinov3", "vit_pe_", "eva02_", "aimv2", "siglip", "sapiens2", "lingbot", "_rope_")
TIMM = re.compile(r"^timm (\S+): ", re.MULTILINE)


@pytest.fixture(scope="module")
def verdicts():
    return list(families.survey())


def test_every_name_is_supported_or_refused_with_what_to_use_instead(verdicts):
    assert len(verdicts) > 200
    supported = {verdict.name for verdict in verdicts if verdict.reason is None}
    for verdict in verdicts:
        if verdict.reason is not None:
            _, use, instead = verdict.reason.partition("; use ")
            assert use, verdict
            proposed = [word for word in re.findall(r"\w+", instead) if timm.is_model(word)]
            assert set(proposed) <= supported, verdict
            assert proposed or "it built with" in instead, verdict


def test_the_families_that_people_ask_for_are_supported(verdicts):
    refused = {verdict.name for verdict in verdicts if verdict.reason is not None}
    for part in WANTED:
        assert [verdict.name for verdict in verdicts if part in verdict.name]
        odd = {name for name in refused if part in name and not name.startswith("naflexvit")}
        assert odd <= {"eva02_enormous_patch14_clip_224"}


def test_the_page_is_current(verdicts):
    text = families.PAGE.read_text()
    written = TIMM.search(text)[1]
    if written != timm.__version__:
        pytest.skip(f"the page is of timm {written}, this is {timm.__version__}")
    assert families.page(text, families.render(verdicts)) == text, "run: python -m benchmarks.families"


@pytest.mark.parametrize(
    "name", ["naflexvit_base_patch16_siglip", "samvit_base_patch16", "vit_relpos_medium_patch16_224"]
)
def test_a_name_is_refused_before_anything_is_downloaded(name):
    reason = refused_name(name)
    assert reason
    with pytest.raises(PhregError) as caught:
        load_model(name)
    assert reason in str(caught.value)


def test_a_structure_is_refused_with_what_to_use_instead():
    with torch.device("meta"):
        model = timm.create_model("eva02_enormous_patch14_clip_224", depth=1)
    with pytest.raises(PhregError, match=r"norms stand after attention and MLP.*use eva02_large_patch14_clip_224"):
        check_supported(model, "eva02_enormous_patch14_clip_224")


@pytest.mark.parametrize("name", MORE)
def test_other_kinds_are_served_as_pytorch_computes_them(name):
    heads = 4 if "pool" in name or "pe_" in name else 3
    model = add_registers(small(name, depth=1, heads=heads), 2)
    check_supported(model, name)
    got, expected, _ = run_both(model, random_images(1, tuple(model.patch_embed.img_size)))
    patches = expected.patches.numpy()
    np.testing.assert_allclose(got["features"].reshape(patches.shape), patches, atol=2e-4 * np.abs(patches).max())
    np.testing.assert_allclose(got["token_norm"].reshape(expected.norms.shape), expected.norms.numpy(), rtol=1e-4)
    assert ("cls" in got) == (model.cls_token is not None)


# Registers


@pytest.mark.parametrize(
    "family", ["dinov3", "sapiens2", "vit_small_patch14_reg4_dinov2", "vit_base_patch14_reg1_tipsv2"]
)
def test_new_registers_come_before_those_of_the_model(family):
    model = small(family)
    own = model_spec(model).registers
    student = add_registers(model, 3)
    first = int(model.cls_token is not None)
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    seen, base = [], []
    for each, tokens in ((student, seen), (model, base)):
        handle = each.blocks[0].register_forward_pre_hook(lambda _m, inputs, tokens=tokens: tokens.append(inputs[0]))
        with torch.no_grad():
            hooks.forward(each, images)
        handle.remove()
    assert model_spec(student).registers == own + 3
    torch.testing.assert_close(seen[0][:, first : first + 3], student.reg_token[:, :3])
    torch.testing.assert_close(torch.cat([seen[0][:, :first], seen[0][:, first + 3 :]], 1), base[0])


@pytest.mark.parametrize("family", ["dinov3", "sapiens2", "vit_small_patch14_reg4_dinov2"])
def test_no_new_registers_change_nothing(family):
    model = small(family)
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        got, wanted = (hooks.forward(each, images).patches for each in (add_registers(model, 0), model))
    torch.testing.assert_close(got, wanted)


def test_registers_that_were_added_are_not_added_again():
    with pytest.raises(PhregError, match="already has 6 register tokens"):
        add_registers(add_registers(small("dinov3"), 2), 2)


# The whole way


@pytest.mark.parametrize("family", ["dinov3-plus", "perception", "aimv2"])
def test_a_family_is_distilled_exported_and_checked(family, tmp_path, photos):
    model = small(family)
    patch = model.patch_embed.patch_size[0]
    base, student, bundle = save(model, tmp_path / "base"), tmp_path / "student", tmp_path / "bundle"
    settings = {"epochs": 1, "batch": 8, "views": 3, "device": "cpu", "precision": "fp32", "cache": tmp_path / "cache"}
    distill(str(base), photos, student, recipe="random-registers", registers=2, **settings)
    stock = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
    assert model_spec(stock).registers == model_spec(model).registers + 2
    export(str(student), bundle, image_size=f"{2 * patch}:{4 * patch}:{6 * patch}")
    done = invoke("check", bundle, "--reference", student, "--images", photos, "--limit", "3", "--json")
    assert done.code == 0, done.err
    with FeatureExtractor.load(bundle, backend="onnxruntime-cpu") as extractor:
        assert extractor.run(random_images(1, (3 * patch, 5 * patch)))["features"].shape == (1, 3, 5, 48)
