"""Signatures of students and bundles: what is signed, what is refused, and where a key may be given."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime import FeatureExtractor
from phreg_deploy.signing import sign, verify_signature
from tests.cli_helpers import ROOT, without
from tests.key_pairs import write_pair

pytest.importorskip("model_signing")
pytest.importorskip("OpenSSL")

CPU = ("--backend", "onnxruntime-cpu", "--threads", "1")


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


@pytest.fixture
def signed(bundle, tmp_path, pair):
    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    sign(folder, pair[0])
    return folder


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_signed_bundle_is_loaded_wherever_it_is_copied(bundle, tmp_path, curve):
    key, public = write_pair(tmp_path, curve=curve)
    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    done = sign(folder, key)
    assert (done.kind, done.signatures) == ("bundle", ["model.sig"])
    assert done.files == sorted(["manifest.json", *Bundle.read(bundle).manifest.files])
    shutil.copytree(folder, tmp_path / "other name")
    (tmp_path / "other name" / "README.md").write_text("edited")
    assert verify_signature(tmp_path / "other name", public).files == done.files
    with FeatureExtractor.load(tmp_path / "other name", "onnxruntime-cpu", threads=1, public_key=public) as extractor:
        data = pickle.dumps(extractor)
    Bundle.read(folder).verify()
    with pickle.loads(data) as again:
        assert again.public_key == public


def test_a_student_is_signed_and_exported(student, tmp_path, pair, run_cli):
    pytest.importorskip("torch")
    folder = tmp_path / "s"
    shutil.copytree(student, folder)
    outcome = run_cli("sign", folder, "--key", pair[0], "--json")
    assert outcome.document["files"] == ["config.json", "model.safetensors", "phreg.json"]
    words = ["export", folder, "-o", tmp_path / "out", "--public-key", pair[1], "--quiet", "--json"]
    assert run_cli(*words).code == 0
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    run_cli(*words, "--force").refused(2, "changed: config.json")


def names_in(folder):
    return sorted(name for name in os.listdir(folder) if name not in ("README.md", "model.sig"))


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "reference.npz", "pos_embed.npy"])
@pytest.mark.parametrize("how", ["changed", "missing", "another bundle's"])
def test_a_file_that_was_changed_is_refused_though_its_hash_was_corrected(wide_bundle, tmp_path, pair, name, how):
    from tests.bundle_changes import write_hashes

    folder = tmp_path / "w"
    shutil.copytree(wide_bundle, folder)
    assert name in names_in(folder)
    sign(folder, pair[0])
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "changed":
        path.write_bytes(path.read_bytes() + b" ")
        if name != "manifest.json":
            write_hashes(folder)
    else:
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(PhregError, match=rf"is not what .* signed: .*{name.replace('.', '[.]')}"):
        FeatureExtractor.load(folder, "onnxruntime-cpu", public_key=pair[1])


def add(folder, name, content="x"):
    (folder / name).write_text(content)


def add_folder(folder):
    (folder / "more").mkdir()


def flip(folder):
    """Change the signature's own bytes, in the middle of its payload."""
    document = json.loads((folder / "model.sig").read_text())
    payload = document["dsseEnvelope"]["payload"]
    middle = len(payload) // 2
    document["dsseEnvelope"]["payload"] = (
        payload[:middle] + ("A" if payload[middle] != "A" else "B") + payload[middle + 1 :]
    )
    (folder / "model.sig").write_text(json.dumps(document))


def replace_signature(folder):
    """Sign with another key, as whoever changes the bundle may."""
    (folder / "other").mkdir()
    key, _ = write_pair(folder / "other")
    key = shutil.move(key, folder.parent / "other.pem")
    shutil.rmtree(folder / "other")
    sign(folder, key, force=True)


def link(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def endless(folder):
    (folder / "model.sig").unlink()
    os.mkfifo(folder / "model.sig")


# Name -> what is done to a signed bundle, and a part of the message.
CHANGES = {
    "no signature": (lambda f: (f / "model.sig").unlink(), "is not signed: there is no model.sig"),
    "another key": (replace_signature, "was not made with the private key of .*key.pub"),
    "a changed signature": (flip, "was not made with the private key of"),
    "an empty signature": (lambda f: add(f, "model.sig", ""), "cannot be read"),
    "a list": (lambda f: add(f, "model.sig", "[]"), "cannot be read"),
    "no signature in it": (lambda f: add(f, "model.sig", "{}"), "cannot be read"),
    "nested": (lambda f: add(f, "model.sig", "[" * 100_000), "cannot be read"),
    "much too large": (lambda f: add(f, "model.sig", " " * (9 << 20)), "has more than 8 MB"),
    "a pipe as signature": (endless, "model.sig is no regular file"),
    "a further file": (lambda f: add(f, "run.sh"), "added: run.sh"),
    "a hidden file": (lambda f: add(f, ".hidden"), "added: .hidden"),
    "a further folder": (add_folder, "more is no regular file"),
    "a link to a device": (lambda f: link(f, "model.onnx", "/dev/zero"), "model.onnx is no regular file"),
    "a link to nothing": (lambda f: link(f, "model.onnx", "gone"), "model.onnx cannot be read"),
    "a link to another file": (lambda f: link(f, "model.onnx", "manifest.json"), "changed: model.onnx"),
    "engines without a signature": (
        lambda f: (f / "engines").mkdir() or add(f / "engines", "a.plan"),
        "engines is not signed: there is no engines.sig. Sign it after `build`",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_it_was_signed_is_refused(signed, pair, change, monkeypatch):
    """Also before anything of the bundle is parsed."""
    do, reason = CHANGES[change]
    do(signed)
    monkeypatch.setattr(Bundle, "read", lambda _folder: pytest.fail("the manifest was read"))
    with pytest.raises(PhregError, match=reason):
        FeatureExtractor.load(signed, "onnxruntime-cpu", public_key=pair[1])


def test_links_as_the_cache_of_the_hub_has_them_are_followed(signed, tmp_path, pair):
    blobs = tmp_path / "blobs"
    signed.rename(blobs)
    signed.mkdir()
    for path in blobs.iterdir():
        (signed / path.name).symlink_to(os.path.relpath(path, signed))
    assert "model.onnx" in verify_signature(signed, pair[1]).files


def test_engines_have_a_signature_of_their_own(signed, tmp_path, pair):
    engines = signed / "engines"
    engines.mkdir()
    (engines / "a.plan").write_bytes(b"plan")
    with pytest.raises(PhregError, match="is there already; replace it with --force"):
        sign(signed, pair[0])
    assert sign(signed, pair[0], force=True).signatures == ["model.sig", "engines.sig"]
    assert "engines/a.plan" in verify_signature(signed, pair[1]).files
    (engines / "a.plan").write_bytes(b"other")
    with pytest.raises(PhregError, match=r"engines is not what .* changed: a[.]plan"):
        verify_signature(signed, pair[1])
    shutil.rmtree(engines)
    assert verify_signature(signed, pair[1]).signatures == ["model.sig"], "engines are a cache"


def test_a_signature_of_another_program_may_not_leave_files_out(bundle, tmp_path, pair):
    from model_signing import hashing, signing

    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    config = hashing.Config().set_ignored_paths(paths=["model.onnx", "README.md", "model.sig"])
    signing.Config().use_elliptic_key_signer(private_key=pair[0]).set_hashing_config(config).sign(
        folder, folder / "model.sig"
    )
    with pytest.raises(PhregError, match=r"model\.sig leaves out model\.onnx"):
        verify_signature(folder, pair[1])


def test_the_standard_program_verifies_our_signature(signed, pair):
    words = ["verify", "key", signed, "--signature", signed / "model.sig", "--public_key", pair[1]]
    words += [word for name in ("README.md", "model.sig") for word in ("--ignore-paths", signed / name)]
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert "Verification succeeded" in done.stdout, done.stderr + done.stdout


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the docs are not here")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_keys_are_made_as_the_docs_say(bundle, tmp_path):
    text = (ROOT / "docs" / "sharing.md").read_text()
    commands = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith("openssl ")]
    assert len(commands) == len(("private", "public"))
    for command in commands:
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    shutil.copytree(bundle, tmp_path / "b")
    sign(tmp_path / "b", tmp_path / "key.pem")
    assert verify_signature(tmp_path / "b", tmp_path / "key.pub").kind == "bundle"


def test_only_what_belongs_to_a_bundle_is_signed(bundle, tmp_path, pair, run_cli):
    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    (folder / "key.pem").write_bytes(pair[0].read_bytes())
    words = ["sign", folder, "--json", "--key"]
    run_cli(*words, folder / "key.pem").refused(2, "holds key.pem, which is no part of a bundle")
    (folder / "key.pem").unlink()
    (folder / "model.onnx").write_bytes(b"x")
    run_cli(*words, pair[0]).refused(2, "model.onnx has another sha256")
    run_cli("sign", tmp_path, "--json", "--key", pair[0]).refused(2, "expected a student or a bundle")
    run_cli("sign", tmp_path / "none", "--json", "--key", pair[0]).refused(2, "none, where there is no folder")
    assert not (folder / "model.sig").exists()


@pytest.mark.parametrize("kind", ["missing", "text", "rsa", "ed25519", "secp256k1", "public for private"])
def test_other_keys_are_refused_by_name(signed, tmp_path, pair, kind):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    makers = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    }
    private, public = tmp_path / "x.pem", tmp_path / "x.pub"
    if kind in makers:
        key, pem, plain = makers[kind](), serialization.Encoding.PEM, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    elif kind == "text":
        private.write_text("no key")
        public.write_text("no key")
    elif kind == "public for private":
        private, public = pair[1], pair[0]
    for call in (lambda: sign(signed, private, force=True), lambda: verify_signature(signed, public)):
        with pytest.raises(PhregError, match=r"expected a (private|public) key|is encrypted"):
            call()


def test_an_encrypted_key_takes_its_password_from_the_environment(signed, tmp_path, run_cli, monkeypatch):
    key, public = write_pair(tmp_path, "secret", password=b"pass word")
    words = ["sign", signed, "--key", key, "--force", "--json"]
    run_cli(*words).refused(2, "secret.pem is encrypted; set PHREG_KEY_PASSWORD")
    monkeypatch.setenv("PHREG_KEY_PASSWORD", "another")
    run_cli(*words).refused(2, "secret.pem cannot be used", "PHREG_KEY_PASSWORD")
    monkeypatch.setenv("PHREG_KEY_PASSWORD", "pass word")
    assert run_cli(*words).code == 0
    assert verify_signature(signed, public).kind == "bundle"


@pytest.mark.parametrize("by", ["option", "variable"])
def test_commands_take_a_key(signed, photos, tmp_path, pair, run_cli, monkeypatch, by):
    monkeypatch.setenv("PHREG_PUBLIC_KEY", str(pair[1]) if by == "variable" else "")
    option = ["--public-key", pair[1]] if by == "option" else []
    image = photos / "frame-00.png"
    commands = {
        "verify": ["verify", signed],
        "extract": ["extract", signed, image, "-o", tmp_path / "out", *CPU],
        "check": ["check", signed, *CPU],
        "watch": ["watch", photos, signed, "--frames", "1", *CPU],
        "export": ["export", signed, "-o", tmp_path / "models", "--format", "triton"],
    }
    for words in commands.values():
        done = run_cli(*words, *option, "--quiet", "--json")
        assert done.code == 0, done.err
    add(signed, "more.txt")
    for name in ("out", "models"):
        shutil.rmtree(tmp_path / name)
    commands["serve"] = ["serve", signed, "--port", "0", *CPU]
    for words in commands.values():
        run_cli(*words, *option, "--json").refused(2, "added: more.txt")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "models").exists()


def test_verify_needs_a_key(signed, run_cli, monkeypatch):
    monkeypatch.delenv("PHREG_PUBLIC_KEY", raising=False)
    run_cli("verify", signed, "--json").refused(2, "--public-key is missing")


def test_without_the_extra_its_name_is_said(signed, photos, tmp_path, pair):
    image, key = photos / "frame-00.png", pair[1]
    commands = [
        ["sign", signed, "--key", pair[0], "--force", "--json"],
        ["verify", signed, "--public-key", key, "--json"],
        ["extract", signed, image, "-o", tmp_path / "out", "--public-key", key, "--json"],
        ["extract", signed, image, "-o", tmp_path / "out", *CPU, "--json"],
    ]
    *refused, plain = without(["model_signing", "OpenSSL", "cryptography"], commands)
    for outcome in refused:
        outcome.refused(4, "'OpenSSL', 'model_signing'", 'pip install "phreg-deploy[sign]"')
    assert plain.code == 0, "without a key the extra is not needed"


def test_a_library_that_cannot_be_imported_is_said(signed, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenSSL", None)
    with pytest.raises(BackendMissing, match=r"phreg-deploy\[sign\]"):
        FeatureExtractor.load(signed, "onnxruntime-cpu", public_key=pair[1])


def test_loading_without_a_key_imports_no_library_of_signatures(bundle):
    code = (
        "import sys; from phreg_deploy.runtime import FeatureExtractor\n"
        "FeatureExtractor.load(sys.argv[1], 'onnxruntime-cpu').close()\n"
        "assert not {'model_signing', 'sigstore', 'OpenSSL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(bundle)], check=True, cwd=ROOT)
