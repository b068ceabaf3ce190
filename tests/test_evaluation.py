"""The parts of an evaluation: split, truth, solvers, figures and intervals, each against another computation."""

import numpy as np
import pytest
import torch
from PIL import Image

from phreg_deploy.errors import PhregError
from phreg_deploy.evaluation.adamw import fit_adamw, rate_at
from phreg_deploy.evaluation.data.splits import group_of, split_names
from phreg_deploy.evaluation.data.truth import Depths, find_truth, read_masks
from phreg_deploy.evaluation.intervals import Bootstrap, compare, interval
from phreg_deploy.evaluation.scores import ClassParts, DepthParts, class_row, depth_row, figures_of
from phreg_deploy.evaluation.solvers import fit_classes, fit_depth
from phreg_deploy.progress import SILENT
from phreg_deploy.spec import Preprocess

SQUASH = Preprocess((0.5,) * 3, (0.5,) * 3, "bicubic", "squash", 1.0)
RNG = np.random.default_rng(0)


def test_frames_of_a_video_are_one_group():
    assert [group_of(name, "prefix") for name in ("a/0016E5_07959.jpg", "frame-03.png", "x12.png", "0042.jpg")] == [
        "a/0016E5",
        "frame",
        "x",
        "0042.jpg",
    ]
    assert group_of("a/b_1.png", "image") == "a/b_1.png"
    assert group_of("a/b_1.png", "folder") == "a"
    assert group_of("town-7_left.png", r"town-(\d+)") == "7"
    for rule, message in ((r"(", "no regular expression"), ("city", "does not match")):
        with pytest.raises(PhregError, match=message):
            group_of("town-7.png", rule)


def test_a_hash_keeps_groups_whole_and_adds_images_without_moving_others():
    names = [f"video{g}_{i:03d}.png" for g in range(40) for i in range(3)]
    split = split_names(names, "hash", "prefix", 0.25)
    sides = [{split.groups[n] for n in side} for side in (split.train, split.val)]
    assert not sides[0] & sides[1]
    assert 4 <= len(sides[1]) <= 18
    more = split_names([*names, "other_1.png"], "hash", "prefix", 0.25)
    assert set(split.val) <= set(more.val)
    assert set(split.train) <= set(more.train)
    with pytest.raises(PhregError, match="--group image"):
        split_names(names[:3], "auto", "prefix", 0.25)
    two = split_names(["a_1.png", "b_1.png"], "hash", "prefix", 0.001)
    assert len(two.train) == len(two.val) == 1


def test_splits_by_folders_and_by_lists(tmp_path):
    names = ["train/a_1.png", "train/b_1.png", "val/a_2.png"]
    split = split_names(names, "auto", "prefix", 0.5)
    assert (split.train, split.val) == (tuple(names[:2]), ("val/a_2.png",))
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("train/a_1\nval/a_2.png\n")
    val.write_text("train/b_1.png\n")
    split = split_names(names, f"{train},{val}", "prefix", 0.5)
    assert (split.train, split.val) == (("train/a_1.png", "val/a_2.png"), ("train/b_1.png",))
    for text, message in (("train/a_1.png\n", "is in both"), ("none.png\n", "no such image"), ("", "is empty")):
        val.write_text(text)
        with pytest.raises(PhregError, match=message):
            split_names(names, f"{train},{val}", "prefix", 0.5)
    for how, message in (("random", "expected auto"), (f"{train},none.txt", "cannot be read")):
        with pytest.raises(PhregError, match=message):
            split_names(names, how, "prefix", 0.5)
    with pytest.raises(PhregError, match="train/ and val/"):
        split_names(names[:2], "folders", "prefix", 0.5)


def masks_of(tmp_path, array, **options):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "masks").mkdir(exist_ok=True)
    Image.new("RGB", (array.shape[1], array.shape[0])).save(tmp_path / "images/a.png")
    Image.fromarray(array).save(tmp_path / "masks/a.png")
    files, _ = find_truth(tmp_path / "images", tmp_path / "masks", (".png",))
    given = {"classes": None, "ignore": 255, **options}
    return read_masks(files, tmp_path / "masks", given["classes"], given["ignore"], SILENT)


def test_a_patch_has_its_commonest_class_or_none(tmp_path):
    array = np.zeros((8, 8), np.uint8)
    array[:4, 4:], array[4:, :4], array[4:, 4:] = 1, 2, 11
    array[:3, 0] = 2
    array[4:, 7] = 1
    masks = masks_of(tmp_path, array, ignore=11)
    assert masks.classes == ("class 0", "class 1", "class 2")
    assert masks.colours[1:] == ((128, 0, 0), (0, 128, 0))
    for size in ((8, 8), (32, 48)):
        labels = masks.on_patches("a.png", size, (2, 2), SQUASH)
        np.testing.assert_array_equal(labels, [[0, 1], [2, -1]])


def test_a_mask_is_cropped_as_its_image(tmp_path):
    array = np.zeros((16, 32), np.uint8)
    array[:, 16:], array[:, :8], array[:, 24:] = 1, 2, 2
    centre = Preprocess((0.5,) * 3, (0.5,) * 3, "bicubic", "center", 1.0)
    labels = masks_of(tmp_path, array).on_patches("a.png", (64, 64), (2, 2), centre)
    np.testing.assert_array_equal(labels, [[0, 1], [0, 1]])


def test_bad_masks_are_refused(tmp_path):
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    names = tmp_path / "names.txt"
    names.write_text("sky\nroad\n")
    with pytest.raises(PhregError, match="the value 63, but"):
        masks_of(tmp_path, array, classes=names)
    names.write_text("sky\nsky\n")
    with pytest.raises(PhregError, match="each once"):
        masks_of(tmp_path, array, classes=names)
    with pytest.raises(PhregError, match="at least two"):
        masks_of(tmp_path, np.zeros((8, 8), np.uint8))
    with pytest.raises(PhregError, match="mode RGB"):
        masks_of(tmp_path, np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "masks/a.png").write_bytes(b"no PNG")
    with pytest.raises(PhregError, match="cannot be read"):
        read_masks({"a.png": tmp_path / "masks/a.png"}, tmp_path, None, 255, SILENT)
    with pytest.raises(PhregError, match="expected the same names"):
        find_truth(tmp_path / "images", tmp_path, (".npy",))


def test_depth_is_read_in_metres_and_averaged_over_patches(tmp_path):
    array = np.full((4, 8), 2000, np.uint16)
    array[:, 4:], array[:2, :2], array[:3, 4:] = 4000, 0, 0
    Image.fromarray(array).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.where(array, array / 1000, np.inf).astype(np.float32))
    depths = Depths(tmp_path, {"a": tmp_path / "a.png", "b": tmp_path / "b.npy"}, 0.001)
    for name in ("a", "b"):
        assert np.nanmax(depths.read(name)) == 4
        assert np.isnan(depths.read(name)).sum() == 16
        np.testing.assert_allclose(depths.on_patches(name, (8, 16), (1, 2), SQUASH), [[np.log(2), np.nan]])
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    np.save(tmp_path / "d.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "e.npy", np.zeros((2, 2)))
    for name, message in (("c.png", "16-bit"), ("d.npy", r"\(H, W\)"), ("e.npy", "no depth"), ("f.npy", "read")):
        with pytest.raises(PhregError, match=message):
            Depths(tmp_path, {"x": tmp_path / name}, 1).read("x")


def planted(count=600, width=8, classes=4):
    x = RNG.normal(size=(count, width)) * RNG.uniform(0.1, 30, width) + RNG.normal(size=width)
    scores = (x / x.std(0)) @ RNG.normal(size=(width, classes)) + RNG.gumbel(size=(count, classes))
    return x.astype(np.float32), scores.argmax(1)


def test_the_logistic_probe_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, y = planted()
    fit = fit_classes(x.copy(), y, 4, "logistic", 1e-2)
    z = (x - x.mean(0)) / x.std(0)
    other = LogisticRegression(C=1 / (2e-2 * len(x)), tol=1e-6, max_iter=1000).fit(z, y)
    ours, theirs = x @ fit.weight.T + fit.bias, z @ other.coef_.T + other.intercept_
    np.testing.assert_allclose(
        ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=0.02, rtol=0.02
    )
    assert fit.converged
    assert fit.weight.dtype == fit.bias.dtype == np.float32


def test_the_solver_of_dinov2_takes_the_steps_of_pytorchs_adamw():
    x, y = planted()
    z = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    # Batches of all patches, so that their order plays no part.
    weight, bias = fit_adamw(z, y, 4, 1e-4, len(z), 3, steps=60)
    start = np.random.default_rng(3).normal(0, 0.01, (9, 4)).astype(np.float32)
    start[-1] = 0
    layer = torch.nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(start[:-1].T))
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=1e-4)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = rate_at(step, 60)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(torch.from_numpy(z)), torch.from_numpy(y)).backward()
        optimizer.step()
    np.testing.assert_allclose(weight, layer.weight.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(bias, layer.bias.detach().numpy(), atol=1e-5)
    rates = [rate_at(step, 40_000) for step in (0, 750, 1500, 20_000, 39_999)]
    np.testing.assert_allclose(rates, [1e-9, 4.906e-4, 9.625e-4, 5e-4, 2.5e-8], rtol=1e-3)
    # Small batches reach nearly what the solver that converges does.
    weight, bias = fit_adamw(z, y, 4, 1e-4, 64, 0, steps=4000)
    best = fit_classes(x.copy(), y, 4, "logistic", 1e-6)
    reached, most = ((s.argmax(1) == y).mean() for s in (z @ weight.T + bias, x @ best.weight.T + best.bias))
    assert reached > most - 0.02


@pytest.mark.parametrize("protocol", ["logistic", "ridge"])
@pytest.mark.parametrize("present", [(0, 2), (1, 2, 4)])
def test_a_class_without_patches_is_never_predicted(protocol, present):
    x, y = planted(classes=len(present))
    fit = fit_classes(x.copy(), np.array(present)[y], 5, protocol, 1e-4)
    predicted = (x @ fit.weight.T + fit.bias).argmax(1)
    assert set(predicted) == set(present)
    assert (predicted == np.array(present)[y]).mean() > 0.6


def test_the_ridge_of_depth_is_the_closed_form():
    x, _ = planted()
    y = x @ RNG.normal(size=8) / 30
    fit = fit_depth(x.copy(), y, 1e-2)
    z = (x - x.mean(0)) / x.std(0)
    weight = np.linalg.solve(z.T @ z + 1e-2 * len(z) * np.eye(8), z.T @ (y - y.mean()))
    np.testing.assert_allclose(x @ fit.weight[0] + fit.bias[0], z @ weight + y.mean(), atol=1e-4)


def parts_of(predicted, truth, classes):
    rows = np.stack([class_row(p, t, classes) for p, t in zip(predicted, truth)])
    right, known = rows[..., 0].sum(1), rows[..., 2].sum(1)
    return ClassParts(rows, rows, np.stack([right, known, right, known, right * 0, known * 0], 1))


def test_figures_are_those_of_their_definition():
    truth = RNG.integers(0, 4, (3, 10, 10)).astype(np.uint8)
    truth[:, :2] = 255
    predicted = np.where(RNG.random(truth.shape) < 0.6, truth % 4, 2)
    figures, known = figures_of([parts_of(predicted, truth, 5)]), truth != 255
    expected = [
        ((predicted == k) & (truth == k))[known].sum() / ((predicted == k) | (truth == k))[known].sum()
        for k in range(4)
    ]
    assert figures["miou"] == pytest.approx(np.mean(expected))
    assert figures["pixel_accuracy"] == pytest.approx((predicted == truth)[known].mean())
    assert figures["outlier_accuracy"] is None
    assert parts_of(predicted, truth, 5).class_iou() == [*(pytest.approx(e) for e in expected), None]


def test_depth_figures_are_those_of_their_definition():
    truth, predicted = np.array([[1.0, 2.0, np.nan]]), np.array([[1.2, 3.0, 7.0]])
    rmse, relative, close = depth_row(predicted, truth)
    assert (rmse, relative, close) == pytest.approx((np.sqrt((0.04 + 1) / 2), (0.2 + 0.5) / 2, 0.5))
    figures = figures_of([DepthParts(np.array([[1.0, 0.5, 0.2], [3.0, 0.7, 0.4]]))])
    assert figures == pytest.approx({"rmse": 2, "abs_rel": 0.6, "delta_1": 0.3})


def trained(truth, noise, seed):
    rng = np.random.default_rng(seed)
    wrong = rng.random(truth.shape) < noise
    return parts_of(np.where(wrong, rng.integers(0, 4, truth.shape), truth), truth, 4)


def test_a_better_model_is_told_from_its_base_and_an_equal_one_is_not():
    truth = RNG.integers(0, 4, (40, 12, 12)).astype(np.uint8)
    bootstrap = Bootstrap([str(i) for i in range(40)], 0)
    assert (bootstrap.unit, bootstrap.units) == ("groups", 40)
    base, equal, better = ([trained(truth, noise, s) for s in seeds] for noise, seeds in
                           ((0.5, (0, 1)), (0.5, (2, 3)), (0.4, (4, 5))))  # fmt: skip
    drawn = [bootstrap.draw(parts)["miou"] for parts in (base, equal, better)]
    value = figures_of(base)["miou"]
    low, high = interval(drawn[0])
    assert low < value < high
    assert high - low < 0.1
    verdicts = [compare("miou", 0.0, d - drawn[0]).verdict for d in drawn]
    assert verdicts == ["not told apart", "not told apart", "better"]
    assert compare("miou", 0.0, drawn[0] - drawn[2]).verdict == "worse"
    assert compare("rmse", 0.0, drawn[0] - drawn[2]).verdict == "better"


def test_few_groups_are_resampled_as_images():
    bootstrap = Bootstrap(["a", "a", "b"], 0)
    assert (bootstrap.unit, bootstrap.units) == ("images", 3)
    many = Bootstrap([str(i // 2) for i in range(24)], 0)
    assert (many.unit, many.units) == ("groups", 12)
    np.testing.assert_array_equal(many.weights[:, ::2], many.weights[:, 1::2])
