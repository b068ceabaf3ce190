"""Reference outputs and position embeddings with correct hashes and wrong content are refused."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.writing import write_npz
from phreg_deploy.errors import PhregError
from phreg_deploy.runtime import FeatureExtractor
from tests.bundle_changes import write_hashes


def open_bundle(folder):
    return FeatureExtractor.load(folder, "onnxruntime-cpu", threads=1)


def read_exam(folder):
    with np.load(folder / "reference.npz") as data:
        return dict(data)


def drop_tensors(*names):
    return lambda a: {k: v for k, v in a.items() if k.split("/")[-1] not in names and k not in names}


EXAMS = {
    "no case": lambda a: {},
    "no cls": drop_tensors("cls"),
    "no token_norm": drop_tensors("token_norm"),
    "no image": drop_tensors("image"),
    "one tensor": drop_tensors("cls", "token_norm", "features"),
    "misnamed": lambda a: {k.replace("0/", "zero/"): v for k, v in a.items()},
    "without a slash": lambda a: {k.replace("/", ""): v for k, v in a.items()},
    "numbered from 1": lambda a: {k.replace("0/", "1/"): v for k, v in a.items()},
    "a case without end": lambda a: a | {"99999999999/image": a["0/image"]},
    "negative": lambda a: a | {"-1/image": a["0/image"]},
    "more cases than sizes": lambda a: a | {k.replace("0/", "1/"): v for k, v in a.items()},
    "another tensor": lambda a: a | {"0/depth": a["0/cls"]},
    "words": lambda a: a | {"0/features": np.array(["x"])},
    "another type": lambda a: a | {"0/image": a["0/image"].astype(np.float64)},
    "complex": lambda a: a | {"0/cls": a["0/cls"].astype(np.complex64)},
    "a size that is not served": lambda a: a | {"0/image": np.zeros((1, 72, 72, 3), np.uint8)},
    "a batch that is not served": lambda a: {k: np.concatenate([v, v]) for k, v in a.items()},
    "features of another width": lambda a: a | {"0/features": a["0/features"][..., 1:]},
    "a scalar": lambda a: a | {"0/features": np.float32(1)},
}


@pytest.mark.parametrize("name", EXAMS)
def test_a_reference_that_is_no_exam_is_refused(world, run_cli, name):
    folder = world.copy("bundle")
    write_npz(folder / "reference.npz", EXAMS[name](read_exam(folder)))
    run_cli("check", write_hashes(folder), "--backend", "onnxruntime-cpu", "--json").refused(
        2, "reference.npz", "cannot be read"
    )


def npy_header(shape, kind="<f4"):
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": kind, "fortran_order": False, "shape": shape})
    return data.getvalue()


def write_oversized_exam(folder, compression):
    """Write an exam with a tensor that declares 8 GB, and one that unpacks to 64 MB of zeros."""
    with zipfile.ZipFile(folder / "reference.npz", "w", compression) as archive:
        for name, value in OVERSIZED_EXAM.items():
            archive.writestr(f"0/{name}.npy", value)


OVERSIZED_EXAM = {
    "image": npy_header((1, 64, 64, 3), "|u1") + bytes(64 << 20),
    "features": npy_header((2**31, 1)),
    "token_norm": npy_header((1, 8, 8)) + bytes(256),
    "cls": npy_header((1, 48)) + bytes(192),
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_exam_that_declares_8_gb_is_refused_without_reading_it(world, compression):
    folder = world.copy("bundle")
    write_oversized_exam(folder, compression)
    bundle = Bundle.read(write_hashes(folder))
    tracemalloc.start()
    with pytest.raises(PhregError, match=r"compressed|at most|features"):
        bundle.cases()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def npy_bytes(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npy_bytes(np.zeros((8, 8), np.float32)),
        npy_bytes(np.zeros((1, 8, 8, 48), np.float32)),
        npy_bytes(np.zeros((7, 8, 48), np.float32)),
        npy_bytes(np.zeros((8, 8, 48))),
        npy_bytes(np.float32(1)),
        npy_header((8, 8, 48)),
        npy_header((2**40, 8, 48)),
        npy_header((8, 8, 48))[:-20],
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
        b"",
    ],
)
def test_a_position_embedding_of_another_shape_is_refused(world, data):
    folder = write_hashes(world.copy("wide_bundle", pos_embed=data))
    with pytest.raises(PhregError, match=r"pos_embed.npy cannot be read"):
        open_bundle(folder)
