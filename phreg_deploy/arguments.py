"""Check a user's arguments before anything slow is imported or read. Needs neither weights nor PyTorch."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phreg_deploy.errors import FORCE, RESUME, PhregError, write_error
from phreg_deploy.hub.names import is_hub_name
from phreg_deploy.json_files import read_json
from phreg_deploy.readout import FINAL, Readout
from phreg_deploy.spec import Batches, Sizes
from phreg_deploy.student_record import RECORD, model_path

RECIPES = ("transplant", "random-registers", "ph-reg", "ph-reg-clip", "sinder")
FLOATS, EIGHT_BITS = ("fp32", "fp16", "bf16"), ("int8", "fp8")
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
LEAST = {"epochs": 0, "batch": 1, "micro_batch": 1, "workers": 1, "views": 2, "seed": 0}
MOST_REGISTERS = 64
GPU = r"cuda:(?:0|[1-9][0-9]*)"
# An architecture, and the tag of its weights.
TIMM_NAME = re.compile(r"\w+(\.[\w-]+)?")
# ``pathlib`` makes one slash of two; "local-dir:/folder" is no URL.
URL = re.compile(r"(?:^|=)((?:[A-Za-z][A-Za-z0-9+.-]*://|(?:https?|s3|gs|ftp):/)\S*)")


def refuse_url(text: str) -> None:
    """Raise ``PhregError`` for a URL, or for one after "=": every command reads files of this machine."""
    match = URL.search(text)
    if match:
        raise PhregError(
            f"got the URL {match[1]}, expected a file or a folder on this machine. Download it first and give its "
            "path; a repository on the Hugging Face hub is given as hf-hub:org/name, or by its timm name."
        )


def check_model(name: str, checkpoint: Path | None = None, random_weights: bool = False) -> Path | None:
    """Return the complete folder that a model's name points to, or None for a name that timm resolves.

    Raises ``PhregError`` if the path does not exist, is a file or an incomplete folder, or if weights are given twice.
    """
    refuse_url(name)
    folder = _folder(name)
    if random_weights and (folder is not None or checkpoint is not None):
        other = f"the folder {folder}" if folder else f"--checkpoint {checkpoint}"
        raise PhregError(f"model: --random-weights goes with a timm name alone; got {other} as well.")
    if folder is not None and checkpoint is not None:
        raise PhregError(f"model: got both the folder {folder} and --checkpoint {checkpoint}; give one of them.")
    if folder is not None:
        _check_folder(folder)
    elif not TIMM_NAME.fullmatch(name) and not is_hub_name(name):
        expected = "a folder with config.json and model.safetensors, hf-hub:org/name, or a timm name"
        raise PhregError(f"model: got {name!r}, where there is nothing; expected {expected}.")
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return folder


def check_checkpoint(path: Path) -> None:
    """Raise ``PhregError`` unless ``path`` is a file of weights, by its suffix."""
    if not os.path.isfile(path):
        raise PhregError(f"checkpoint: there is no file {path}.")
    if path.suffix not in WEIGHTS:
        raise PhregError(f"checkpoint: got {path.name}, expected {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}.")


def check_distillation(settings: Mapping[str, Any]) -> None:
    """Raise ``PhregError`` for a setting out of bounds; None stands for the recipe's own value."""
    given = {name: value for name, value in settings.items() if value is not None}
    if given.get("recipe", RECIPES[0]) not in RECIPES:
        raise PhregError(f"recipe: got {given['recipe']!r}, expected {', '.join(RECIPES[:-1])} or {RECIPES[-1]}.")
    for name, least in LEAST.items():
        if name in given and given[name] < least:
            raise PhregError(f"{name.replace('_', '-')}: got {given[name]}, expected at least {least}.")
    if not 0 <= given.get("registers", 0) <= MOST_REGISTERS:
        raise PhregError(f"registers: got {given['registers']}, expected 0 to {MOST_REGISTERS}.")
    if not 0 < given.get("lr", 0.5) < 1:
        raise PhregError(f"lr: got {given['lr']}, expected a number between 0 and 1, e.g. 3e-4.")
    if not 0 < given.get("strength", 1) <= 4:
        raise PhregError(f"strength: got {given['strength']}, expected a share above 0 and up to 4, e.g. 0.07.")
    if not 0 <= given.get("holdout", 0) < 1:
        raise PhregError(f"holdout: got {given['holdout']}, expected a share from 0 to below 1.")
    if not 0 <= given.get("average", 0) < 1:
        raise PhregError(
            f"average: got {given['average']}, expected a decay from 0 (no average) to below 1, e.g. 0.99."
        )
    Readout(given.get("readout", FINAL))
    if given.get("precision", "auto") not in ("auto", "fp32", "bf16"):
        raise PhregError(f"precision: got {given['precision']!r}, expected auto, fp32 or bf16.")
    check_devices(given.get("device", "auto"))


def check_resume(work: Path, resume: bool, force: bool) -> None:
    """Raise ``PhregError`` if there is no interrupted run in ``work`` to resume, or if one would be lost."""
    interrupted = (work / "settings.json").is_file()
    if resume and not interrupted:
        raise PhregError(f"resume: there is no interrupted run in {work}; start without --resume.")
    if interrupted and not resume and not force:
        raise PhregError(f"output: an interrupted run is kept in {work}; add {RESUME}, or {FORCE} to start over.")


def check_device(device: str) -> None:
    """Raise ``PhregError`` unless ``device`` is a device's name; PyTorch checks later that it exists."""
    if not re.fullmatch(rf"auto|cpu|cuda|{GPU}", device):
        raise PhregError(f"device: got {device!r}, expected auto, cpu, cuda or cuda:N.")


def check_devices(devices: str) -> None:
    """Raise ``PhregError`` unless ``devices`` names one device, or lists different GPUs: ``cuda:0,cuda:1``."""
    names = devices.split(",")
    if len(names) == 1:
        check_device(devices)
        return
    for name in names:
        if not re.fullmatch(GPU, name):
            raise PhregError(f"device: got {name!r} in the list {devices!r}, expected GPUs by number: cuda:0,cuda:1.")
        if names.count(name) > 1:
            raise PhregError(f"device: got {name} more than once in the list {devices!r}; name each GPU once.")


def check_export(
    precision: str, keep: tuple[str, ...], images: Path | None, image_size: str | None, batch: str, target: str = "cpu"
) -> None:
    """Raise ``PhregError`` for options that are wrong or without effect, as far as the model is not needed to tell."""
    if precision not in (*FLOATS, *EIGHT_BITS):
        raise PhregError(f"precision: got {precision!r}, expected {', '.join(FLOATS)}, {' or '.join(EIGHT_BITS)}.")
    if target not in ("cpu", "trt"):
        raise PhregError(f"target: got {target!r}, expected cpu or trt.")
    if precision == "fp32" and (keep or images):
        raise PhregError("export: --keep-fp32 and --images say what stays FP32; with --precision fp32 everything does.")
    if precision in EIGHT_BITS and images is None:
        photographs = "photographs like those of the deployment, to calibrate on"
        raise PhregError(f"export: --precision {precision} needs --images DIR, {photographs}.")
    for expression in keep:
        check_pattern(expression)
    if image_size:
        # The form alone: the patch is known with the model.
        Sizes.parse(image_size, (1, 1))
    Batches.parse(batch)


def check_pattern(expression: str) -> re.Pattern[str]:
    """Compile a user's regular expression. Raises ``PhregError`` if it is not one."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise PhregError(f"keep in FP32: {expression!r} is no regular expression ({error}).") from None


def check_cosine(bar: float | None) -> None:
    """Raise ``PhregError`` unless ``bar`` is None or a cosine that features can reach."""
    if bar is not None and not 0 < bar <= 1:
        raise PhregError(f"cosine: got {bar}, expected a bar above 0 and up to 1, e.g. 0.99.")


def check_file(path: Path, option: str) -> None:
    """Raise ``PhregError`` if the file that ``option`` names cannot be written, before any work is done."""
    if os.path.isdir(path):
        raise PhregError(f"{option}: got the folder {path}, expected the name of a file that is to be written.")
    parent = path.absolute().parent
    if not os.path.isdir(parent):
        raise PhregError(f"{option}: there is no folder {parent} to write {path.name} into; create it first.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise write_error(error, path) from None


def _folder(name: str) -> Path | None:
    path = model_path(name)
    # timm finds and downloads weights under other names itself.
    if is_hub_name(name) and not {"model.safetensors", "manifest.json", RECORD} & set(os.listdir(path)):
        return None
    if os.path.isdir(path):
        return path
    if name.startswith("local-dir:"):
        raise PhregError(f"model: {name} names no folder; expected a folder with config.json and model.safetensors.")
    if os.path.isfile(path):
        expected = "a timm name (weights go in --checkpoint FILE) or a student's folder"
        raise PhregError(f"model: got the file {path}; expected {expected}.")
    return None


def _check_folder(folder: Path) -> None:
    missing = [f for f in ("config.json", "model.safetensors") if not os.path.isfile(folder / f)]
    if missing:
        is_bundle = os.path.isfile(folder / "manifest.json")
        hint = " This looks like a bundle: use check, extract, profile or inspect on it." if is_bundle else ""
        raise PhregError(
            f"model: {folder} holds no {' and no '.join(missing)}; expected a folder written by "
            f"`phreg-deploy distill`.{hint}"
        )
    file, again = folder / "config.json", "copy or distil the student again."
    try:
        config = read_json(file)
    except ValueError as error:
        raise PhregError(f"model: {file} is not valid JSON ({error}); {again}") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise PhregError(f"model: {file} names no architecture; {again}")
    for key in ("pretrained_cfg", "model_args"):
        if not isinstance(config.get(key, {}), dict):
            raise PhregError(f"model: {file} is damaged ({key} is no object); {again}")
