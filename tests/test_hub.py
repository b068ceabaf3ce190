"""Students and bundles are pushed to a hub and read from it by name, against a hub on this machine."""

import errno
import io
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from unittest import mock

import pytest

from phreg_deploy.errors import PhregError
from phreg_deploy.hub.download import _replace_link
from phreg_deploy.hub.failures import explained
from phreg_deploy.hub.names import HubName, check_repository, parse_hub_name
from phreg_deploy.hub.reports import PATIENCE, reported, shown_by
from phreg_deploy.progress import Progress
from tests.cli_helpers import ROOT, without
from tests.fake_hub import TOKEN, FakeHub
from tests.key_pairs import write_pair

pytest.importorskip("huggingface_hub")
TORCH = ["torch", "timm", "safetensors", "torchvision", "onnx", "onnxscript"]
MANY = 5


@pytest.fixture
def hub():
    served = FakeHub()
    yield served
    served.close()


@pytest.fixture
def online(hub, tmp_path):
    """Run commands in another process, which knows the hub's address and token and has a cache of its own."""

    def run(*commands, blocked=(), home="home", **environment):
        known = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        known |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_TELEMETRY": "1"}
        outcomes = without(blocked, commands, **{**known, **environment})
        return outcomes[0] if len(commands) == 1 else outcomes

    return run


def test_a_pushed_bundle_is_served_in_another_process_without_torch(hub, online, world):
    shutil.copytree(world.int8_bundle, world.out)
    (world.out / "engines").mkdir()
    (world.out / "engines" / "gpu.plan").write_bytes(b"a plan")
    (world.out / "private-notes.txt").write_text("not for others")
    pushed = online(["push", world.out, "org/served", "--private", "--json"], blocked=TORCH)
    assert pushed.code == 0, pushed.err
    files = hub.repositories["org/served"].files("main")[1]
    expected = {"manifest.json", "model.onnx", "reference.npz", "calibration.json", "README.md"}
    assert set(files) == expected | {".gitattributes"}
    assert set(pushed.document["files"]) == expected
    assert hub.repositories["org/served"].private
    assert 'FeatureExtractor.load("hf-hub:org/served")' in files["README.md"].decode()
    image = world.photos / "frame-02.png"
    shutil.rmtree(world.out)
    outcomes = online(
        ["inspect", "hf-hub:org/served", "--json"],
        ["check", "hf-hub:org/served", "--json"],
        ["extract", "hf-hub:org/served", image, "-o", world.out, "--backend", "onnxruntime-cpu", "--json"],
        ["profile", "hf-hub:org/served", "--seconds", "0.1", "--backend", "onnxruntime-cpu", "--json"],
        ["push", "hf-hub:org/served", "org/copy", "--json"],
        blocked=TORCH,
        home="another",
    )
    assert [outcome.code for outcome in outcomes] == [0] * MANY, [outcome.err[-600:] for outcome in outcomes]
    assert outcomes[0].document["precision"] == "int8"
    assert (world.out / "frame-02.npy").is_file()
    assert set(hub.repositories["org/copy"].files("main")[1]) == set(files)
    assert not any("gpu.plan" in line or "private-notes" in line for line in hub.requests)


def test_a_signature_is_pushed_and_verified_under_the_name_on_the_hub(hub, online, world, tmp_path):
    pytest.importorskip("model_signing")
    key, public = write_pair(tmp_path)
    shutil.copytree(world.int8_bundle, world.out)
    (world.out / "engines").mkdir()
    (world.out / "engines" / "gpu.plan").write_bytes(b"a plan")
    shutil.copytree(world.student, tmp_path / "s")
    outcomes = online(
        ["sign", world.out, "--key", key, "--json"],
        ["sign", tmp_path / "s", "--key", key, "--json"],
        ["push", world.out, "org/served", "--json"],
        ["push", tmp_path / "s", "org/student", "--json"],
        ["verify", "hf-hub:org/served", "--public-key", public, "--json"],
        ["verify", "hf-hub:org/student", "--public-key", public, "--json"],
        ["check", "hf-hub:org/served", "--public-key", public, "--json"],
    )
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), [outcome.err[-600:] for outcome in outcomes]
    assert "org/served" in hub.repositories["org/served"].files("main")[1]["README.md"].decode(), "the card was changed"
    assert "engines.sig" not in outcomes[2].document["files"]
    files = hub.repositories["org/served"].files("main")[1]
    hub.repositories["org/served"].commit("main", {**files, "model.onnx": files["model.onnx"] + b"x"})
    hub.repositories["org/student"].commit("main", {name: data for name, data in files.items() if name != "model.sig"})
    changed, unsigned = online(
        ["check", "hf-hub:org/served", "--public-key", public, "--json"],
        ["check", "hf-hub:org/student", "--public-key", public, "--json"],
        home="another",
    )
    changed.refused(2, "changed: model.onnx")
    unsigned.refused(2, "is not signed: there is no model.sig")


LOAD = """
import json, sys
import timm, torch
from safetensors.torch import load_file
from tests.cli_helpers import invoke
model = timm.create_model("hf-hub:org/student", pretrained=True)
expected = load_file(sys.argv[1])
assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
outcomes = [invoke(*command) for command in json.loads(sys.argv[2])]
assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), [o.err[-600:] for o in outcomes]
print(json.dumps([model.num_prefix_tokens, *(outcome.document for outcome in outcomes)]))
"""


def test_a_pushed_student_is_loaded_by_timm_and_by_every_command(hub, online, world, tmp_path, torch):
    from safetensors.torch import load_file

    assert online(["push", world.student, "org/student", "--json"], blocked=TORCH).code == 0
    card = hub.repositories["org/student"].files("main")[1]["README.md"].decode()
    assert 'timm.create_model("hf-hub:org/student", pretrained=True)' in card
    hub.add("org/plain", world.base)
    # A timm model whose weights only timm reads.
    pickled = world.copy("base")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    hub.add("org/pickled", pickled)
    shutil.copytree(world.bundle, tmp_path / "local.bundle")
    photos = ["--images", world.photos, "--limit", "2"]
    few = ["--epochs", "0", "--views", "4", "--device", "cpu"]
    commands = [
        ["inspect", "hf-hub:org/student", "--json"],
        ["artifacts", "hf-hub:org/pickled", *photos, "--json"],
        ["check", tmp_path / "local.bundle", "--reference", "hf-hub:org/student", *photos, "--json"],
        ["distill", "hf-hub:org/plain@main", "--images", world.photos, "-o", tmp_path / "again", *few, "--json"],
        ["export", "hf-hub:org/pickled", "-o", tmp_path / "exported", "--no-check", "--json"],
    ]
    words = json.dumps([[str(word) for word in command] for command in commands])
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD, world.student / "model.safetensors", words]
    loaded = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert loaded.returncode == 0, loaded.stderr[-1500:]
    prefix, inspected, _, _, distilled, exported = json.loads(loaded.stdout.splitlines()[-1])
    assert (prefix, inspected["kind"]) == (5, "student")
    for source in (distilled["source"], exported["manifest"]["source"]):
        assert source["model"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_a_name_stands_for_a_revision_and_works_offline_afterwards(hub, online, world):
    repository = hub.add("org/served", world.bundle)
    first = repository.branches["main"]
    repository.commit("main", {**repository.files("main")[1], "manifest.json": b"{}"})
    repository.branches["v1"] = first
    names = ["hf-hub:org/served@v1", f"hf-hub:org/served@{first}"]
    new, *old = online(*(["inspect", name, "--json"] for name in ("hf-hub:org/served", *names)), blocked=TORCH)
    assert "manifest" in new.err
    assert [new.code, *(outcome.code for outcome in old)] == [2, 0, 0], old[0].err
    count = len(hub.requests)
    offline = online(*(["inspect", name, "--json"] for name in names), blocked=TORCH, HF_HUB_OFFLINE="1")
    assert [outcome.code for outcome in offline] == [0, 0]
    assert len(hub.requests) == count
    unreachable = online(["inspect", names[0], "--json"], blocked=TORCH, HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert unreachable.code == 0, unreachable.err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_cannot_be_read_is_said(hub, online, world):
    hub.add("org/gated", world.bundle, gated=True)
    hub.add("org/secret", world.bundle, private=True)
    odd = hub.add("org/odd", world.bundle)
    files = odd.files("main")[1]
    odd.commit("changed", {**files, "model.onnx": files["model.onnx"] + b"x"})
    odd.commit("notes", {"notes.txt": b"nothing of ours"})
    odd.commit("damaged", {**files, "manifest.json": b"[1, 2"})
    cases = {
        "hf-hub:org/gated": "org/gated is gated. Ask for access at",
        "hf-hub:org/secret": "or it is private. Check its name; if it is private, run `hf auth login`, or set HF_TOKEN",
        "hf-hub:org/none": "there is no repository",
        "hf-hub:org/odd@gone": "org/odd has no revision 'gone'",
        "hf-hub:org/odd@changed": "has another sha256 than manifest.json says",
        "hf-hub:org/odd@notes": "holds neither manifest.json nor config.json",
        "hf-hub:org/odd@damaged": "manifest.json of hf-hub:org/odd@damaged is damaged",
        "hf-hub:odd": "expected the owner and the name of a repository",
        "hf-hub:org/../odd": "expected the owner and the name of a repository",
        "hf-hub:org/odd@a b": "got the revision 'a b'",
    }
    for name, outcome in zip(cases, online(*(["inspect", name, "--json"] for name in cases), HF_TOKEN="")):
        outcome.refused(2, cases[name])
    nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    online(["inspect", "hf-hub:org/odd", "--json"], home="fresh", **nowhere).refused(2, "the hub cannot be reached")
    online(["inspect", "hf-hub:org/odd", "--json"], home="fresh", HF_HUB_OFFLINE="1").refused(
        2, "HF_HUB_OFFLINE is set"
    )
    online(["check", "hf-hub:org/odd", "--json"], blocked=["huggingface_hub"]).refused(
        4, "needs the module 'huggingface_hub'", 'pip install "phreg-deploy[hub]"'
    )


def test_a_slow_hub_is_named_unless_the_command_is_quiet(hub, online, world):
    hub.add("org/slow", world.bundle)
    hub.delay = 2 * PATIENCE
    said = online(["inspect", "hf-hub:org/slow", "--json"], blocked=TORCH)
    assert said.code == 0
    assert said.err.count(f"hub: org/slow: waiting for {hub.address}\n") == 1
    hub.delay = 2 * PATIENCE
    quiet = online(["inspect", "hf-hub:org/slow", "--json", "--quiet"], blocked=TORCH, home="another")
    assert (quiet.code, quiet.err) == (0, "")
    nowhere = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    lost = online(["inspect", "hf-hub:org/slow", "--json", "--quiet"], home="fresh", **nowhere)
    lost.refused(2, "the hub cannot be reached")
    assert lost.err.startswith("Error: hub: ")


@pytest.mark.parametrize(("quiet", "passed"), [(False, ["from the cache", "broken"]), (True, ["broken"])])
def test_lines_about_retries_are_dropped(quiet, passed):
    """huggingface_hub logs two lines for each attempt."""
    import huggingface_hub  # noqa: F401

    lines, handler = io.StringIO(), logging.StreamHandler()
    handler.setStream(lines)
    parent, logger = logging.getLogger("huggingface_hub"), logging.getLogger("huggingface_hub.utils._http")
    parent.addHandler(handler)
    try:
        with shown_by(Progress(quiet)), reported("org/name"):
            logger.warning("'timed out' thrown while requesting HEAD https://huggingface.co/org/name")
            logger.warning("Retrying in 1s [Retry 1/5].")
            logger.warning("from the cache")
            logger.error("broken")
    finally:
        parent.removeHandler(handler)
    assert lines.getvalue().splitlines() == passed


def test_what_cannot_be_pushed_is_said(hub, online, world, tmp_path):
    hub.add("org/public", world.bundle)
    hub.add("org/student", world.student)
    changed = world.copy("bundle", model=lambda data: data + b"x")
    unread = shutil.copytree(world.student, tmp_path / "unread")
    (unread / "README.md").write_text("---\nlicense: [\n---\n")
    damaged = shutil.copytree(world.student, tmp_path / "damaged")
    (damaged / "phreg.json").write_text('{"format": 1, "source": 3}')
    cases = [
        (["push", world.base, "org/new"], "holds neither manifest.json nor phreg.json"),
        (["push", tmp_path / "gone", "org/new"], "where there is no folder"),
        (["push", world.bundle, "new"], "expected the owner and the name of a repository"),
        (["push", changed, "org/new"], "has another sha256 than manifest.json says"),
        (["push", damaged, "org/new", "--dry-run"], "phreg.json is damaged"),
        (["push", unread, "org/new"], "the metadata of README.md cannot be read"),
        (["push", world.bundle, "org/student"], "org/student holds a student; a bundle needs a repository"),
        (["push", world.bundle, "org/public", "--private"], "org/public is there already and public"),
        (["push", world.bundle, "others/new"], "answered 403"),
    ]
    outcomes = online(*([*words, "--json"] for words, _ in cases), blocked=TORCH)
    for (_, message), outcome in zip(cases, outcomes):
        outcome.refused(2, message)
    assert "org/new" not in hub.repositories
    count = len(hub.requests)
    words = ["push", world.bundle, "org/new", "--json"]
    dry, refused = online([*words, "--dry-run"], words, HF_TOKEN="")
    assert dry.code == 0, dry.err
    assert (dry.document["commit"], dry.document["kind"]) == (None, "bundle")
    refused.refused(2, "there is no token for the hub; run `hf auth login`, or set HF_TOKEN")
    assert len(hub.requests) == count
    online(words, HF_HUB_OFFLINE="1").refused(2, "org/new was not pushed")
    online(words, blocked=["huggingface_hub"]).refused(4, "phreg-deploy[hub]")


@pytest.mark.parametrize("error", [ConnectionError, ConnectionResetError, TimeoutError])
def test_a_broken_connection_is_said_whichever_client_had_it(error):
    """hf_xet, which uploads large files, raises Python's own types."""
    with pytest.raises(PhregError, match=rf"org/new was not pushed: the hub cannot be reached \({error.__name__}\)"):
        with explained("org/new", None, "pushed"):
            raise error("Network error: HTTP status client error (404 Not Found)")


def test_a_branch_is_made_and_a_card_that_was_edited_is_kept(hub, online, world, tmp_path):
    folder = shutil.copytree(world.bundle, tmp_path / "edited")
    (folder / "README.md").write_text("Mine. Load path/to/this/folder.\n")
    words = ["push", folder, "hf-hub:org/new", "--revision", "v2", "--message", "A message", "--json"]
    plain = shutil.copytree(world.student, tmp_path / "plain")
    (plain / "before-after.png").unlink()
    done, again, third = online(words, words, ["push", plain, "org/plain", "--json"])
    assert (done.code, again.code, third.code) == (0, 0, 0), done.err + again.err + third.err
    files = hub.repositories["org/plain"].files("main")[1]
    assert "before-after.png" not in files
    assert "before-after.png" not in files["README.md"].decode()
    repository = hub.repositories["org/new"]
    assert repository.files("v2")[1]["README.md"] == b"Mine. Load hf-hub:org/new@v2.\n"
    assert set(repository.files("main")[1]) == {".gitattributes"}
    assert done.document["commit"] == repository.branches["v2"] or len(repository.commits) == 3


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("hf-hub:timm/vit_tiny.augreg", "timm/vit_tiny.augreg", None),
        ("hf-hub:a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ("hf-hub:me_2/x-y_z@v1.0", "me_2/x-y_z", "v1.0"),
    ],
)
def test_names_are_split(text, repository, revision):
    assert parse_hub_name(text) == HubName(repository, revision)
    assert str(parse_hub_name(text)) == text


@pytest.mark.parametrize("name", ["", "a", "a/b/c", "/b", "a/", "a/b c", "a/..", "a--b/c", "a/b.git", "-a/b", "a/b\n"])
def test_malformed_names_are_refused(name):
    with pytest.raises(PhregError, match="expected the owner and the name"):
        check_repository(name)


def test_weights_beside_the_graph_are_in_its_folder(hub, online, world, tmp_path, torch):
    """The cache holds links, and OpenVINO reads no weights behind one."""
    pytest.importorskip("openvino")
    from phreg_deploy.export import export
    from phreg_deploy.onnx_graph import external
    from tests.small_models import save, small

    with mock.patch.object(external, "MOST_BYTES", 20_000):
        written = export(str(save(small("dinov3"), tmp_path / "model")), tmp_path / "large", image_size="64")
    hub.add("org/large", written.folder)
    names = [["check", "hf-hub:org/large", "--backend", name, "--json"] for name in ("openvino", "onnxruntime-cpu")]
    outcomes = online(*names, blocked=TORCH)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    (weights,) = (tmp_path / "home").rglob("weights.bin")
    assert not weights.is_symlink()


@pytest.mark.parametrize("without_links", [False, True])
def test_processes_that_replace_one_link_at_once_leave_the_file_alone(tmp_path, monkeypatch, without_links):
    """Each has seen the link; the system does not rename a file to another name of itself, and keeps both names."""
    if without_links:
        monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EPERM, "no hard links")))
    (tmp_path / "blob").write_bytes(b"weights")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "weights.bin").symlink_to(tmp_path / "blob")
    for _ in range(2):
        _replace_link(folder / "weights.bin")
    (left,) = folder.iterdir()
    assert (left.name, left.is_symlink(), left.read_bytes()) == ("weights.bin", False, b"weights")
