"""A bundle names its base model and the licence of the weights, also after distillation and calibration."""

import json

import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.cli.tables.inspect import source_rows
from phreg_deploy.student_record import read_record

pytestmark = pytest.mark.usefixtures("torch", "traced_once")
TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
STATED = {"model": TINY, "license": "apache-2.0", "hf_hub_id": f"timm/{TINY}"}


def origin_of(*arguments):
    from phreg_deploy.models.origin import find_origin

    return find_origin(*arguments)


def test_timm_states_the_licence_of_a_name(checkpoint):
    assert STATED.items() <= origin_of(TINY, None).items()
    assert STATED.items() <= origin_of("vit_tiny_patch16_224", None).items(), "timm's default weights are meant"
    assert STATED.items() <= origin_of(TINY, None, checkpoint).items()
    assert origin_of("eva02_tiny_patch14_224.mim_in22k", None)["license"] == "mit"
    assert origin_of("vit_small_patch16_dinov3.lvd1689m", None)["license"] == "dinov3-license"


def test_an_unstated_licence_is_not_guessed(checkpoint):
    untagged = origin_of("vit_tiny_patch16_224", None, checkpoint)
    assert untagged == {"model": "vit_tiny_patch16_224", "license": None, "url": None, "hf_hub_id": None}
    assert origin_of("vit_tiny_patch16_224.mine", None, checkpoint)["license"] is None


def test_the_base_models_name_goes_from_folder_to_student_to_bundles(base, student, bundle, int8_bundle):
    for source in (origin_of(str(base), base), read_record(student)["source"], origin_of(str(student), student)):
        assert STATED.items() <= source.items()
    for folder in (bundle, int8_bundle):
        source = Bundle.read(folder).manifest.source
        assert STATED.items() <= source.items()
        assert source["url"].startswith("https://")
        assert source["distilled"] == "transplant"


def test_a_folder_states_its_own_licence_if_timm_does_not_know_its_tag(world):
    def own(data):
        config = json.loads(data)
        config["pretrained_cfg"].update(tag="mine", license="cc0-1.0")
        return json.dumps(config).encode()

    folder = world.copy("base", config=own)
    assert origin_of(str(folder), folder) == {
        "model": "vit_tiny_patch16_224.mine",
        "license": "cc0-1.0",
        "url": None,
        "hf_hub_id": None,
    }


def test_a_record_without_a_licence_is_read(world):
    def old(source):
        def change(data):
            return json.dumps({**json.loads(data), "source": source}).encode()

        return change

    for source, licence in (
        ({"model": "eva02_tiny_patch14_224.mim_in22k", "checkpoint": "x.pth"}, "mit"),
        ({"model": "vit_tiny_patch16_224", "checkpoint": "x.pth"}, None),
        ({"model": "/some/folder", "checkpoint": None}, "apache-2.0"),
    ):
        folder = world.copy("student", phreg=old(source)).rename(world.tmp / f"old-{licence}")
        assert origin_of(str(folder), folder)["license"] == licence


def test_inspect_shows_licence_and_origin(world, run_cli):
    for folder, whose in ((world.student, "its weights"), (world.bundle, "exported"), (world.int8_bundle, "exported")):
        shown = run_cli("inspect", folder)
        assert shown.code == 0, shown.err
        for words in (TINY, whose, "licence of the base's weights", "apache-2.0", f"Hugging Face hub timm/{TINY}"):
            assert words in shown.out


def test_a_source_without_a_licence_is_shown():
    source = {"model": "student", "weights_sha256": "ab" * 32, "distilled": "transplant"}
    rows = dict(source_rows(source, "its weights"))
    assert rows["base model"] == "student"
    assert rows["its weights"].startswith("sha256 abab")
    assert rows["licence of the base's weights"] == "not recorded"


def test_random_weights_have_no_licence(world, run_cli):
    words = ["export", "vit_tiny_patch16_224", "--random-weights", "--image-size", "32", "-o", world.out, "--no-check"]
    outcome = run_cli(*words, "--json")
    assert outcome.code == 0, outcome.err
    source = outcome.document["manifest"]["source"]
    assert (source["model"], source["license"]) == ("vit_tiny_patch16_224", None)
    assert "not stated by timm" in run_cli("inspect", world.out).out
