"""Write a Triton model repository: a folder per model with its ``config.pbtxt`` and version 1 of its file."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from phreg_deploy import __version__
from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.manifest import GRAPH, TABLES
from phreg_deploy.bundle.plans import StoredPlan, list_plans
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.extras import require
from phreg_deploy.files.atomic import atomic_folder, check_target
from phreg_deploy.model_repository.config import BACKENDS, ONNXRUNTIME, TENSORRT, write_config
from phreg_deploy.spec import Sizes, Stored

# What the repository was written from; Triton reads only the folders beside it.
FACTS = "repository.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Size = tuple[int, int]


@dataclass(frozen=True)
class ModelRepository(Stored):
    """A written repository. ``models``: name and size (height, width) of each; a size of None is any of the range."""

    folder: Path
    backend: str
    models: list[dict[str, object]]


def write_repository(
    bundle: Bundle,
    output: Path,
    *,
    backend: str = ONNXRUNTIME,
    name: str | None = None,
    image_size: str | None = None,
    instances: int = 1,
    force: bool = False,
) -> ModelRepository:
    """Write a bundle as a model repository for Triton.

    A graph of one size is copied. Graphs of several sizes have position embeddings as inputs, which this project's
    runtime computes and Triton cannot: there is one model for each size, with its embeddings as constants.

    Args:
        backend: "onnxruntime", "openvino", or "tensorrt" for the plans that ``build`` stored in the bundle.
        name: of the model; None for that of the bundle's folder. With several sizes, ``-HEIGHTxWIDTH`` follows.
        image_size: sizes to serve, "224" or "224,480x640"; None for those that the bundle lists or names.
        instances: copies of a model that run at a time.

    Raises:
        PhregError: another backend or name, a size or batch that cannot be served, or a damaged bundle.
        BackendMissing: no plan for "tensorrt", or onnx is needed and not installed.
    """
    if backend not in BACKENDS:
        raise PhregError(f"triton: got the backend {backend!r}, expected {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
    if type(instances) is not int or not 1 <= instances <= 256:
        raise PhregError(f"triton: got {instances} instances, expected 1 to 256.")
    name = bundle.folder.resolve().name.removesuffix(".bundle") if name is None else name
    if not NAME.fullmatch(name):
        raise PhregError(f"triton: got the name {name[:80]!r}, expected letters, digits, '.', '_' and '-'.")
    check_target(output, force, [bundle.folder])
    sizes = _sizes(bundle, image_size)
    # Refuses a bundle before anything is copied.
    write_config(name, bundle.manifest, sizes[0], backend)
    plans = _plans(bundle) if backend == TENSORRT else {}
    tables = [key for key in TABLES if key in bundle.manifest.inputs]
    if tables and not plans:
        require("A repository of several sizes", calibration=("onnx",))
    bundle.verify()
    models: list[dict[str, object]] = []
    with atomic_folder(output, force, [bundle.folder]) as folder:
        for size in sizes:
            own = name if len(sizes) == 1 else f"{name}-{size[0]}x{size[1]}" if size else name
            version = folder / own / "1"
            version.mkdir(parents=True)
            files = _copy_plans(plans, version) if plans else {}
            if not plans:
                _write_graph(bundle, size if tables else None, version)
            profiles = len(next(iter(plans.values())).profiles) if plans else 0
            config = write_config(
                own, bundle.manifest, size, backend, instances=instances, profiles=profiles, plans=files
            )
            (folder / own / "config.pbtxt").write_text(config)
            models.append({"name": own, "size": None if size is None else list(size)})
        facts = {"phreg_deploy": __version__, "backend": backend, "models": models, **_facts(bundle)}
        (folder / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return ModelRepository(output, backend, models)


def _facts(bundle: Bundle) -> dict[str, object]:
    """What a client needs: how an image becomes the input, what heads answer, and where the bundle came from."""
    manifest = bundle.manifest
    heads = [{"output": head.output, **head.to_json()} for head in manifest.heads]
    known = {"preprocess": manifest.preprocess.to_json(), "sizes": manifest.sizes.to_json(), "heads": heads}
    return {**known, "norm_median": manifest.norm_median, "source": manifest.source, "files": manifest.files}


def _sizes(bundle: Bundle, text: str | None) -> list[Size | None]:
    """Return the sizes of the models; [None] for a graph that takes any size of its range without further inputs."""
    manifest = bundle.manifest
    if text is None and manifest.sizes.mode == "range" and not any(key in manifest.inputs for key in TABLES):
        return [None]
    if text is None:
        return list(dict.fromkeys(manifest.sizes.sizes))
    given = Sizes.parse(text, manifest.model.patch)
    if given.mode == "range":
        raise PhregError(f"triton: got the range {text}, expected sizes such as 224,518: each becomes a model.")
    for size in given.sizes:
        manifest.sizes.check(size, manifest.model.patch)
    return list(dict.fromkeys(given.sizes))


def _plans(bundle: Bundle) -> dict[str, StoredPlan]:
    """Return the newest plan for each compute capability, such as "8.7".

    Raises:
        PhregError: the plans have further inputs. BackendMissing: there is no plan.
    """
    if bundle.manifest.sizes.dynamic:
        raise PhregError(
            f"triton: the plans of a bundle for {bundle.manifest.sizes} take position embeddings, which Triton cannot "
            "compute. Export a bundle with one --image-size, and build that."
        )
    plans: dict[str, StoredPlan] = {}
    for plan in sorted(list_plans(bundle), key=lambda plan: int(plan.report.get("serial", 0))):
        plans[f"{plan.key.architecture // 10}.{plan.key.architecture % 10}"] = plan
    if not plans:
        raise BackendMissing(
            f"triton: {bundle.folder} holds no TensorRT plan. Run on the machine with the GPU: "
            f"phreg-deploy build {bundle.folder}"
        )
    if len({len(plan.profiles) for plan in plans.values()}) > 1:
        raise PhregError("triton: the plans have different numbers of profiles. Build them again: build --force.")
    return plans


def _copy_plans(plans: dict[str, StoredPlan], version: Path) -> dict[str, str]:
    """Copy every plan, after a comparison with its hash; return the files by compute capability."""
    files = {capability: f"model_cc{capability.replace('.', '')}.plan" for capability in plans}
    for capability, plan in plans.items():
        (version / files[capability]).write_bytes(plan.read())
    return files


def _write_graph(bundle: Bundle, size: Size | None, version: Path) -> None:
    """Copy the graph and the weights beside it; with a size, its position embeddings become constants."""
    weights = bundle.manifest.weights
    if weights:
        shutil.copy(bundle.folder / weights, version)
    if size is None:
        shutil.copy(bundle.graph, version / GRAPH)
        return
    from phreg_deploy.bundle.exam import answer_shape
    from phreg_deploy.onnx_graph.fixed_size import fix_size
    from phreg_deploy.runtime.feed import InputFeed

    shapes = {name: answer_shape(bundle.manifest, name, (1, *size, 3)) for name in bundle.manifest.outputs}
    fix_size(bundle.graph, version / GRAPH, size, InputFeed(bundle).others(size), shapes)
