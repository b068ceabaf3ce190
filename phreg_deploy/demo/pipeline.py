"""Run the stages of the demo: draw scenes, distil, export, calibrate, check, measure, draw the report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

from phreg_deploy.calibration import calibrate
from phreg_deploy.demo.measuring import Scenes, draw_rows, measure
from phreg_deploy.demo.report import DemoReport
from phreg_deploy.demo.scenes import CLASSES, write_scenes
from phreg_deploy.distill import distill
from phreg_deploy.errors import GateFailed
from phreg_deploy.explorer import explore
from phreg_deploy.explorer.page import render
from phreg_deploy.export import export
from phreg_deploy.files.atomic import atomic_folder
from phreg_deploy.images.pictures import sheet
from phreg_deploy.models.loading import load_model
from phreg_deploy.progress import Progress
from phreg_deploy.quantisation import Smoothing
from phreg_deploy.runtime.features import FeatureExtractor
from phreg_deploy.spec import plain
from phreg_deploy.verify.checking import EXAM

MODEL = Path(__file__).parent / "model"
BACKEND = "onnxruntime-cpu"
# Seeds of the scenes, none of them twice: to distil, to fit the probe, and to measure.
TRAINING, PROBED, TESTED = range(288), range(1000, 1160), range(2000, 2064)
EPOCHS = 8


def run_pipeline(output: Path, force: bool, progress: Progress) -> DemoReport:
    """Run all stages; result, files and errors as of ``phreg_deploy.demo.run_demo``."""
    started = time.perf_counter()
    with atomic_folder(output, force) as folder:
        progress.say("The model is small and its register neuron was planted; see phreg_deploy/demo/model/README.md.")
        scenes, probed, tested = (folder / name for name in ("scenes", "scenes-probe", "scenes-test"))
        for place, seeds in ((scenes, TRAINING), (probed, PROBED), (tested, TESTED)):
            write_scenes(place, seeds)
        student, bundle, int8 = (folder / name for name in ("student", "demo.bundle", "demo-int8.bundle"))
        record = distill(str(MODEL), scenes, student, epochs=EPOCHS, cache=folder / "cache", progress=progress)
        shutil.rmtree(folder / "cache")
        export(str(student), bundle, batch="1:8:16", progress=progress)
        calibrate(bundle, scenes, int8, smoothing=Smoothing(), progress=progress)
        exploration = explore(
            [bundle],
            backend=BACKEND,
            reference=str(student),
            base=str(MODEL),
            images=tested,
            limit=16,
            progress=progress,
        )
        models = {"base": load_model(str(MODEL)), "student": load_model(str(student))}
        test_scenes = Scenes.read(tested, TESTED, models["base"])
        probe_scenes = Scenes.read(probed, PROBED, models["base"])
        with FeatureExtractor.load(bundle, BACKEND) as served, FeatureExtractor.load(int8, BACKEND) as served_int8:
            measured = measure(models, {"served": served, "int8": served_int8}, probe_scenes, test_scenes)
            pictures = draw_rows(test_scenes.photographs, measured, served.spec.patch)
        # The folders still have a temporary name here.
        (explored,) = exploration.bundles
        *exam, with_student = explored.check.comparisons
        comparisons = (*exam, replace(with_student, reference="PyTorch student"))
        gates = dict(zip((EXAM, "PyTorch student"), explored.check.gates.values()))
        check = replace(explored.check, bundle="demo.bundle", comparisons=comparisons, gates=gates)
        explored = replace(explored, check=check)
        exploration = replace(exploration, bundles=(explored,), commands=("phreg-deploy demo",))
        sheet(pictures, side=192).save(folder / "before-after.png")
        (folder / "report.html").write_text(render(exploration), encoding="utf-8")
        text = json.dumps(plain({"figures": measured.figures, "check": check}), indent=1)
        (folder / "demo.json").write_text(text + "\n")
    if check.missed:
        raise GateFailed(f"demo: {'; '.join(check.missed)}.")
    seconds = time.perf_counter() - started
    return DemoReport(output, len(TESTED), CLASSES, measured.figures, check, record.register_neurons, seconds)
