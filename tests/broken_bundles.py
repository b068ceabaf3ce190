"""Make bundles with correct hashes and wrong outputs, by nodes that are added behind the outputs of the graph."""

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.writing import write_manifest


class BrokenBundle:
    """A copy of a bundle with more nodes between the outputs of the model and those of the graph."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        shutil.copytree(bundle, folder)
        self.folder, self.manifest = folder, Bundle.read(folder).manifest
        self.model = onnx.load(folder / "model.onnx")
        self.grid = tuple(s // p for s, p in zip(self.manifest.sizes.default, self.manifest.model.patch))
        self.width = self.manifest.model.width

    def constant(self, value: np.ndarray, kind: type = np.float32) -> str:
        name = f"broken/{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        name = f"broken/{operator}/{len(self.model.graph.node)}"
        self.model.graph.node.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def output(self, name: str) -> str:
        """Rename an output inside the graph; return its new name. The old name can be given to another value."""
        true = f"{name}/true"
        for node in self.model.graph.node:
            node.input[:] = [true if i == name else i for i in node.input]
            node.output[:] = [true if o == name else o for o in node.output]
        return true

    def give(self, name: str, value: str) -> None:
        self.model.graph.node.append(helper.make_node("Identity", [value], [name]))

    def save(self) -> Path:
        onnx.checker.check_model(self.model)
        (self.folder / "model.onnx").write_bytes(self.model.SerializeToString())
        (self.folder / "manifest.json").unlink()
        write_manifest(self.folder, self.manifest)
        Bundle.read(self.folder).verify()
        return self.folder


def scale_outputs(broken: BrokenBundle, **factors: float) -> None:
    for name, factor in factors.items():
        broken.give(name, broken.node("Mul", broken.output(name), broken.constant(factor)))


def replace_class_token(broken: BrokenBundle, value: np.ndarray) -> None:
    true = broken.output("cls")
    nothing = broken.node("Mul", true, broken.constant(0))
    broken.give("cls", broken.node("Add", nothing, broken.constant(value.reshape(1, -1))))


def shift_features(broken: BrokenBundle) -> None:
    """Shift features one patch to the right; the last column comes first."""
    true, columns = broken.output("features"), broken.grid[1]
    order = broken.constant([(i - 1) % columns for i in range(columns)], np.int64)
    broken.give("features", broken.node("Gather", true, order, axis=2))


def add_garbage_token(broken: BrokenBundle, pixel: tuple[int, int, int] | None = None, value: int = 0) -> None:
    """Make the first patch token noise; with ``pixel`` (row, column, channel) only in images with ``value`` there."""
    rng, (rows, columns) = np.random.default_rng(0), broken.grid
    mask = np.zeros((1, rows, columns, 1), bool)
    mask[0, 0, 0] = True
    where = broken.constant(mask, np.bool_)
    if pixel is not None:
        starts, ends, axes = (broken.constant(v, np.int64) for v in (pixel, [p + 1 for p in pixel], [1, 2, 3]))
        pixels = broken.node("Cast", broken.node("Slice", "image", starts, ends, axes), to=TensorProto.INT32)
        equal = broken.node("Equal", pixels, broken.constant([value], np.int32))
        where = broken.node("And", where, equal)
    noise = broken.constant(rng.normal(0, 2, (1, 1, 1, broken.width)))
    broken.give("features", broken.node("Where", where, noise, broken.output("features")))
