"""Model cards: their metadata is the hub's, their figures are the record's, and what they say to type works."""

import json
import re

import pytest
from PIL import Image

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.cards.bundle import bundle_card
from phreg_deploy.cards.metadata import KNOWN, origin
from phreg_deploy.cards.student import student_card
from phreg_deploy.student_record import read_record

hub = pytest.importorskip("huggingface_hub")
BASE = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def read_card(text):
    """Parse a card as the hub does; an error in the metadata is raised."""
    card = hub.ModelCard(text)
    assert card.data.to_dict()["pipeline_tag"] == "image-feature-extraction"
    return card


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_card_of_a_student_holds_its_record(student, torch):
    text, record = (student / "README.md").read_text(encoding="utf-8"), read_record(student)
    card = read_card(text)
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("apache-2.0", "timm", BASE)
    scores = record["scores"]["student"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["norm_outlier_rate"] == scores["norm_outliers"]["rate"]
    assert results["target_cosine"] == scores["fidelity"]["mean"]
    assert results["class_cosine"] == record["scores"]["class_cosine"]
    for fact in (record["images"]["digest"], record["source"]["weights_sha256"], "seed 0", "4 register tokens"):
        assert fact in text
    base = f"{record['scores']['base']['norm_outliers']['rate']:.3%}"
    assert f"| norm-outlier rate | {base} | {scores['norm_outliers']['rate']:.3%} |" in text
    picture = student / "before-after.png"
    assert f"]({picture.name})" in text
    assert picture.stat().st_size < 1 << 20
    with Image.open(picture) as image:
        assert image.width > image.height


def test_the_code_in_the_card_of_a_student_runs(student, torch):
    (code,) = python_blocks((student / "README.md").read_text(encoding="utf-8"))
    names = {"images": torch.zeros(2, 3, 64, 64)}
    exec(code.replace("path/to/this/folder", str(student)), names)
    assert names["tokens"].shape == (2, 64, 48)


def test_the_card_of_a_bundle_holds_its_manifest_and_its_code_runs(bundle, int8_bundle, photos, monkeypatch):
    for folder, relation in ((bundle, "finetune"), (int8_bundle, "quantized")):
        text, manifest = (folder / "README.md").read_text(encoding="utf-8"), Bundle.read(folder).manifest
        card = read_card(text)
        data = card.data.to_dict()
        assert (data["license"], data["base_model"], data["base_model_relation"]) == ("apache-2.0", BASE, relation)
        assert "README.md" not in manifest.files
        assert text == bundle_card(manifest.to_json())
        if manifest.quantisation:
            figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
            assert figures["patch_cosine"] == manifest.quantisation["fidelity"]["cosine_mean"]
    (code,) = python_blocks(text)
    names = {}
    monkeypatch.chdir(photos)
    exec(code.replace("path/to/this/folder", str(int8_bundle)).replace("photo.jpg", "frame-03.jpg"), names)
    assert names["dense"].features.shape == (1, 8, 8, 48)


def test_a_licence_is_stated_as_it_is_known(student, bundle):
    record, manifest = read_record(student), Bundle.read(bundle).manifest.to_json()
    cases = {None: ("unknown", None), "dinov3-license": ("other", "dinov3-license"), "mit": ("mit", None)}
    for licence, (stated, name) in cases.items():
        source = {**record["source"], "license": licence, "hf_hub_id": None, "url": "https://example.org/terms"}
        for text in (student_card({**record, "source": source}), bundle_card({**manifest, "source": source})):
            data = read_card(text).data.to_dict()
            assert (data["license"], data.get("license_name")) == (stated, name)
            assert ("license_link" in data) == (stated == "other")
            assert "base_model" not in data
            assert ("find it before you share" in text) == (licence is None)


def test_a_licence_without_an_address_has_no_link():
    assert origin({"license": "odd-1.0"}, "finetune")["license_link"] is None
    assert origin({"license": "odd-1.0", "hf_hub_id": "a/b"}, "finetune")["license_link"].endswith("/a/b")


def test_every_licence_that_timm_states_has_a_form_of_the_hub(torch):
    import timm

    names = timm.list_pretrained(["vit*", "eva*", "deit*", "dinov*", "naflex*"])
    stated = {timm.get_pretrained_cfg(name).license for name in names}
    assert {"apache-2.0", "mit"} <= stated & set(KNOWN)


def test_cards_of_students_without_scores_and_of_random_weights_say_so(student, bundle):
    record, manifest = read_record(student), Bundle.read(bundle).manifest.to_json()
    text = student_card({**record, "scores": {"missing": "RuntimeError: CUDA out of memory"}})
    assert "None: RuntimeError: CUDA out of memory." in text
    assert read_card(text).data.eval_results is None
    assert "for timing only" in bundle_card({**manifest, "random_weights": True})


def test_names_with_signs_of_yaml_stay_names(student):
    record = read_record(student)
    odd = 'a: b # "c" | é\n---\n'
    text = student_card({**record, "source": {**record["source"], "model": odd, "license": odd, "url": odd}})
    assert json.loads(json.dumps(read_card(text).data.to_dict()))["license_name"] == odd
