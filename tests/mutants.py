"""Damage bundles at random by a seed, correct their hashes, and judge the outcome, in a test or in longer runs."""

import copy
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np

from phreg_deploy.bundle.writing import write_npz
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests.cli_helpers import invoke, photograph

BACKEND = "onnxruntime-cpu"
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 64, 65, 100_000, 2**31, 2**63, 10**30, 0.5, 0.01, -0.5, 1e-9, 1e308,
    float("nan"), float("inf"), "", "x", "64", "center", "nearest", "fp16", "int8", "range", "model.onnx", "../x",
    "/etc/passwd", "x" * 5000, [], {}, [[]], [64, 64], [1, 2, 3], {"a": 1}, [None] * 3, [[48, 48], [64, 64], [96, 96]],
]  # fmt: skip


def answers(folder, verify=True):
    """Return the outputs that a bundle gives for one photograph, which is resized to the bundle's size."""
    with FeatureExtractor.load(folder, BACKEND, threads=1, verify=verify) as extractor:
        dense = extractor(photograph(77, 90, 70))
    return {**dense.outputs(), "rate": dense.artifact_rate}


def verdict(folder, expected, verify=True):
    """Return "refused", "harmless", "caught by check", or which output changed silently; other exceptions pass."""
    try:
        got = answers(folder, verify)
    except PhregError:
        return "refused"
    finally:
        inspected = invoke("inspect", folder, "--json")
        assert inspected.code in (0, 2), inspected.err
    changed = difference(got, expected)
    checked = invoke("check", folder, "--backend", BACKEND, "--threads", "1", "--json")
    assert checked.code in (0, 2, 3), checked.err
    if checked.code:
        return "refused" if checked.code == 2 else "caught by check"
    return f"silent: {changed}" if changed else "harmless"


def difference(got, expected):
    """Return the name of the first output that differs, or None."""
    for name, value in expected.items():
        if name not in got or np.shape(got[name]) != np.shape(value):
            return f"shape of {name}"
    for name in {"features", "cls"} & set(expected):
        a, b = (np.asarray(x[name], np.float64) for x in (got, expected))
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-12)
        if not cosine.min() >= 0.999:
            return name
    if "labels" in expected and not (got["labels"] == expected["labels"]).mean() >= 0.99:
        return "labels"
    if not np.allclose(got["token_norm"], expected["token_norm"], rtol=0.01):
        return "token_norm"
    return None if np.array_equal(got["rate"], expected["rate"]) else "artifact rate"


class Mutator:
    """Makes copies of a bundle, each with one seeded change of its manifest, exam, graph or position embedding.

    Args:
        flips: also change single bytes of the files.
        hashes: write the correct hashes into the manifest.
    """

    def __init__(self, bundle: Path, work: Path, *, flips: bool = False, hashes: bool = True) -> None:
        self.bundle, self.work, self.flips, self.hashes = bundle, work, flips, hashes
        self.kinds = [self.manifest, self.reference, self.graph]

    def make(self, seed: int) -> tuple[Path, str]:
        """Return the folder of a mutant, and a description of the change."""
        self.draw = random.Random(seed)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.bundle, self.work)
        done = self.flip() if self.flips and self.draw.random() < 0.25 else self.kinds[seed % len(self.kinds)]()
        if self.hashes:
            self.rehash()
        return self.work, done

    def rehash(self):
        path = self.work / "manifest.json"
        try:
            manifest = json.loads(path.read_text())
            files = manifest["files"]
            # Bare names only: a mutant may list /proc/kmsg, which never ends.
            for name in [n for n in files if Path(n).name == n and (self.work / n).is_file()]:
                files[name] = hashlib.sha256((self.work / name).read_bytes()).hexdigest()
        except (ValueError, TypeError, KeyError, OSError):
            return  # the manifest itself was changed
        path.write_text(json.dumps(manifest))

    def flip(self):
        path = self.draw.choice([p for p in sorted(self.work.iterdir()) if p.is_file()])
        data = bytearray(path.read_bytes())
        places = [self.draw.randrange(len(data)) for _ in range(self.draw.choice([1, 1, 4, 30]))]
        for place in places:
            data[place] = self.draw.randrange(256)
        if self.draw.random() < 0.2:
            del data[self.draw.randrange(len(data)) :]
        path.write_bytes(bytes(data))
        return f"{path.name}: bytes {places[:3]}"

    def manifest(self):
        return json_change(self.work / "manifest.json", self.draw, VALUES)

    def reference(self):
        with np.load(self.work / "reference.npz") as file:
            arrays = dict(file)
        name = self.draw.choice(sorted(arrays))
        value, rng = arrays[name], np.random.default_rng(self.draw.randrange(2**32))
        names = ["x", "0", "/", "1/image", "99999999999/image", "a/b/c"]
        types = ["f8", "i8", "c16", "f2", "?", "U3"]
        shapes = lambda: [value[0], value[..., :1], value[None], value[:0], value.reshape(-1)]  # noqa: E731
        replace = lambda other: arrays.update({name: other})  # noqa: E731
        changes = {
            "delete": lambda: arrays.pop(name),
            "rename": lambda: arrays.update({self.draw.choice(names): arrays.pop(name)}),
            "type": lambda: replace(value.astype(self.draw.choice(types))),
            "shape": lambda: replace(self.draw.choice(shapes())),
            "zeros": lambda: replace(np.zeros_like(value)),
            "noise": lambda: replace((value + 200 * rng.standard_normal(value.shape)).astype(value.dtype)),
            "scale": lambda: replace((value * self.draw.choice([-1.0, 0.5, 2.0])).astype(value.dtype)),
            "not a number": lambda: replace(np.full(value.shape, np.nan, "f4")),
        }
        kind = self.draw.choice(sorted(changes))
        changes[kind]()
        write_npz(self.work / "reference.npz", arrays)
        return f"reference: {kind} {name}"

    def graph(self):
        import onnx

        model = onnx.load(self.work / "model.onnx")
        changes = {
            "metadata": self._metadata,
            "drop a node": self._drop_node,
            "rename an output": self._rename,
            "another operator": self._operator,
            "swap outputs": self._swap,
            "weights": self._weights,
            "no output": lambda m: m.graph.output.pop() and "",
        }
        kind = self.draw.choice(sorted(changes) + ["weights"] * 4)
        done = changes[kind](model)
        (self.work / "model.onnx").write_bytes(model.SerializeToString())
        return f"graph: {kind} {done}"

    def _metadata(self, model):
        entry = self.draw.choice(list(model.metadata_props))
        entry.value = self.draw.choice(["", "x", "null", "[]", "NaN", "[" * 5000, json.dumps(self.draw.choice(VALUES))])
        return entry.key

    def _drop_node(self, model):
        return model.graph.node.pop(self.draw.randrange(len(model.graph.node))).name

    def _rename(self, model):
        node = self.draw.choice(list(model.graph.node))
        node.output[0] += "x"
        return node.name

    def _operator(self, model):
        node = self.draw.choice(list(model.graph.node))
        node.op_type = self.draw.choice(["Add", "Mul", "Identity", "Relu", "NoSuch"])
        return node.name

    def _swap(self, model):
        one, other = self.draw.sample(list(model.graph.output), 2)
        one.name, other.name = other.name, one.name
        return one.name

    def _weights(self, model):
        from onnx import numpy_helper

        floats = [t for t in model.graph.initializer if t.data_type in (1, 10)]
        tensor = self.draw.choice(floats)
        value = numpy_helper.to_array(tensor)
        factor = self.draw.choice([0.0, -1.0, 0.5, 2.0, np.nan, 1e30, "mix"])
        if factor == "mix":
            changed = np.random.default_rng(1).permutation(value.reshape(-1)).reshape(value.shape)
        else:
            changed = value * factor
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(changed, value.dtype), tensor.name))
        return f"{tensor.name} {factor}"


def json_change(path, draw, values):
    """Change, delete, exchange or add one key of a JSON file; return what was done."""
    data = json.loads(path.read_text())
    places = list(_places(data))
    holder, key, named = draw.choice(places)
    kind = draw.choice(["value", "value", "number", "delete", "exchange", "add"])
    number = type(holder[key]) in (int, float)
    if kind == "delete":
        del holder[key]
    elif kind == "exchange":
        other, place, also = draw.choice(places)
        holder[key], named = copy.deepcopy(other[place]), f"{named} from {also}"
    elif kind == "add" and isinstance(holder[key], dict):
        holder[key][draw.choice(["x", "../x", "/proc/kmsg", "engines"])] = draw.choice(values)
    elif kind == "number" and number:
        value = holder[key]
        holder[key] = draw.choice([value + 1, value * 2, value / 2, -value, str(value)])
    else:
        holder[key] = draw.choice(values)
    path.write_text(json.dumps(data))
    return f"{path.name}: {kind} {named}"


def _places(data, named=""):
    """Yield every container and key of a JSON document, with its dotted name."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key, f"{named}.{key}"
        if isinstance(data[key], (dict, list)):
            yield from _places(data[key], f"{named}.{key}")
