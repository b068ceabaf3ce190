"""Change bundles as a damaged disk, an editor or another exporter would."""

import hashlib
import json


def first_half(data):
    return data[: len(data) // 2]


def edit_manifest(**changes):
    """Return a function that changes the manifest's keys; None removes one."""

    def change(data):
        manifest = {**json.loads(data), **changes}
        return json.dumps({k: v for k, v in manifest.items() if v is not None or k not in changes}).encode()

    return change


def edit_graph(change):
    """Return a function that changes the graph by ``change``, which takes an ``onnx.ModelProto``."""

    def changed(data):
        import onnx

        model = onnx.load_from_string(data)
        change(model)
        return model.SerializeToString()

    return changed


def misname_operator(model):
    model.graph.node[0].op_type = "NoSuchOperator"


def write_hashes(folder):
    """Write the correct hashes into the manifest, as a tool that edits bundles might."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def rewrite_bundle(folder, **changes):
    """Change manifest and graph alike, as another exporter might have written them."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes

    def write_onnx_metadata(model):
        for entry in model.metadata_props:
            entry.value = json.dumps(manifest[entry.key.removeprefix("phreg.")])

    (folder / "model.onnx").write_bytes(edit_graph(write_onnx_metadata)((folder / "model.onnx").read_bytes()))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return write_hashes(folder)
