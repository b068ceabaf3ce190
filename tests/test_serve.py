"""``serve`` in a process of its own: every answer against the extractor's, what is refused, token, metrics."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from phreg_deploy.runtime import FeatureExtractor
from tests.service_helpers import TOKEN, encoded, figures, httpx, running

for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "onnxruntime"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def service(labels_bundle, demo_bundle):
    words = (f"labels={labels_bundle}", f"plain={demo_bundle}", "--max-mib", "0.5", "--max-megapixels", "0.2")
    with running(*words, token=TOKEN) as (client, _):
        yield client


@pytest.fixture(scope="module")
def scene(demo_scenes):
    return demo_scenes / "images" / "0004.png"


@pytest.fixture(scope="module")
def expected(labels_bundle, scene):
    with FeatureExtractor.load(labels_bundle, "onnxruntime-cpu", threads=1) as extractor:
        yield {fit: extractor(scene, fit=fit) for fit in (None, "pad", "squash")}


def arrays(response, kind):
    assert response.status_code == 200, response.text
    if kind == "npz":
        assert response.headers["content-type"] == "application/x-npz"
        return dict(np.load(io.BytesIO(response.content)))
    if kind == "json":
        return {name: np.array(value, np.float32) for name, value in response.json()["outputs"].items()}
    pa = pytest.importorskip("pyarrow")
    table = pa.ipc.open_stream(response.content).read_all()
    return {name: table[name].chunk(0).to_numpy_ndarray()[0] for name in table.column_names}


@pytest.mark.parametrize("kind", ["npz", "json", "arrow"])
def test_features_are_the_extractors(service, scene, expected, kind):
    params = {"model": "labels", "outputs": "features,cls,token_norm,labels", "format": kind}
    response = service.post("/features", params=params, content=scene.read_bytes())
    got, dense = arrays(response, kind), expected[None]
    assert list(got) == ["features", "cls", "token_norm", "labels"]
    for name in got:
        np.testing.assert_allclose(got[name], getattr(dense, name)[0], rtol=1e-4, atol=1e-4)
    assert float(response.headers["x-phreg-artifact-rate"]) == pytest.approx(dense.artifact_rate[0], abs=1e-6)
    assert response.headers["x-phreg-model"] == "labels"
    assert "run;dur=" in response.headers["server-timing"]


def test_json_has_null_for_what_is_no_number():
    from phreg_deploy.serving.requests.answers import encode

    said = json.loads(encode("json", {"cls": np.array([1.5, np.nan, -np.inf], np.float16)}, {"size": [1, 2]}))
    assert said == {"size": [1, 2], "outputs": {"cls": [1.5, None, None]}}


def test_a_form_and_a_body_are_the_same_and_npy_is_one_output(service, scene, expected):
    params = {"model": "labels", "dtype": "float16", "fit": "squash"}
    body = service.post("/features", params=params, content=scene.read_bytes())
    form = service.post("/features", params=params, files={"image": scene.read_bytes()}, data={"other": "1"})
    assert body.headers["content-type"] == "application/x-npy"
    assert body.content == form.content
    got = np.load(io.BytesIO(body.content), allow_pickle=False)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected["squash"].features[0], rtol=2e-3, atol=2e-3)


def test_padding_is_marked(service, demo_scenes):
    wide = encoded(Image.open(demo_scenes / "images" / "0005.png").resize((300, 150)))
    params = {"model": "plain", "fit": "pad", "format": "npz"}
    got = arrays(service.post("/features", params=params, content=wide), "npz")
    assert got["mask"].shape == got["features"].shape[:2]
    assert got["mask"].mean() == 0.5


def test_labels_overlay_and_artifacts(service, scene, expected):
    labels = service.post("/labels", params={"model": "labels"}, files={"image": scene.read_bytes()})
    picture = Image.open(io.BytesIO(labels.content))
    np.testing.assert_array_equal(np.asarray(picture), expected["squash"].labels[0])
    assert picture.mode == "P"
    raw = service.post("/labels", params={"model": "labels", "format": "npy"}, content=scene.read_bytes())
    np.testing.assert_array_equal(np.load(io.BytesIO(raw.content)), expected["squash"].labels[0])
    pictures = {}
    for model, of in (("labels", None), ("labels", "token_norm"), ("plain", None), ("plain", "features")):
        params = {"model": model} | ({"of": of} if of else {})
        answer = service.post("/overlay", params=params, content=scene.read_bytes())
        assert answer.headers["content-type"] == "image/png"
        pictures[model, of] = np.asarray(Image.open(io.BytesIO(answer.content)))
        assert pictures[model, of].shape == (128, 128, 3)
    assert np.array_equal(pictures["labels", "token_norm"], pictures["plain", None])
    assert len({picture.tobytes() for picture in pictures.values()}) == 3
    said = service.post("/artifacts", params={"model": "plain"}, content=scene.read_bytes()).json()
    assert said["artifact_rate"] == pytest.approx(expected[None].artifact_rate[0])
    assert said["norm"]["largest"] > 10 * said["norm"]["median"], "the demo model has outlier tokens"


REFUSED = [
    ("/features", {}, b"", 422, "model: got no name"),
    ("/features", {"model": "x"}, b"", 404, "expected one of labels, plain"),
    ("/features", {"model": "plain"}, b"", 422, "got no bytes"),
    ("/features", {"model": "plain"}, b"not an image", 422, "expected JPEG, PNG, WEBP, BMP or TIFF"),
    ("/features", {"model": "plain"}, "gif", 422, "expected JPEG, PNG, WEBP, BMP or TIFF"),
    ("/features", {"model": "plain"}, "truncated", 422, "truncated or damaged"),
    ("/features", {"model": "plain", "outputs": "cls,depth"}, "whole", 422, "outputs: got 'depth'"),
    ("/features", {"model": "plain", "outputs": "cls,features"}, "whole", 422, "expected npz, arrow or json"),
    ("/features", {"model": "plain", "format": "exe"}, "whole", 422, "format: got 'exe'"),
    ("/features", {"model": "plain", "fit": "shrink"}, "whole", 422, "fit: got 'shrink'"),
    ("/features", {"model": "plain", "size": "500"}, "whole", 422, "expected 128x128"),
    ("/features", {"model": "plain", "size": "9" * 5000}, "whole", 422, "image size"),
    ("/labels", {"model": "plain"}, "whole", 422, "phreg-deploy attach --help"),
    ("/labels", {"model": "labels", "head": "x"}, "whole", 422, "head: got 'x', expected one of labels"),
    ("/overlay", {"model": "plain", "of": "cls"}, "whole", 422, "expected one of token_norm, features"),
    ("/features", {"model": "plain"}, bytes(600_000), 413, "larger than 0.5 MiB"),
    ("/features", {"model": "plain"}, "big", 413, "1000x300 pixels, expected at most 0.2 megapixels"),
]


@pytest.mark.parametrize(("path", "params", "data", "status", "words"), REFUSED)
def test_what_a_client_does_wrong_is_refused_with_the_reason(service, scene, path, params, data, status, words):
    whole = Image.open(scene).convert("RGB")
    made = {
        "whole": lambda: encoded(whole),
        "gif": lambda: encoded(whole, "GIF"),
        "truncated": lambda: encoded(whole, "JPEG")[:900],
        "big": lambda: encoded(Image.new("RGB", (1000, 300))),
    }
    content = made[data]() if isinstance(data, str) else data
    response = service.post(path, params=params, content=content)
    assert (response.status_code, words in response.json()["detail"]) == (status, True), response.text


def test_forms_that_are_none_and_bodies_without_length_are_refused(service):
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"", b"--x\r\nnonsense", b"--x\r\n\r\n\r\n--x--\r\n"):
        response = service.post("/features?model=plain", content=body, headers=headers)
        assert response.status_code in (400, 422), response.text
        assert response.json()["detail"].startswith(("form: ", "image: "))
    response = service.post("/features?model=plain", content=b"", headers={"Content-Type": "multipart/form-data"})
    assert response.status_code == 400
    response = service.post("/features?model=plain", files={"picture": b"x"})
    assert (response.status_code, "no file in the field 'image'" in response.text) == (422, True)
    pieces = (bytes(100_000) for _ in range(9))
    response = service.post("/features?model=plain", content=pieces)
    assert (response.status_code, "larger than 0.5 MiB" in response.text) == (413, True)


def test_damaged_images_never_break_the_service(service, scene):
    """120 mutants of five formats: each is served, or refused with a reason."""
    draw, whole, seen = random.Random(0), Image.open(scene).convert("RGB"), {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        data = encoded(whole, kind)
        for _ in range(24):
            mutant = bytearray(data)
            for _ in range(draw.choice((1, 4, 30))):
                mutant[draw.randrange(min(len(mutant), draw.choice((64, 1024, len(mutant)))))] = draw.randrange(256)
            response = service.post("/artifacts?model=plain", content=bytes(mutant[: draw.choice((None, None, 900))]))
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            assert response.status_code in (200, 413, 422), response.text
    assert min(seen.get(200, 0), seen.get(422, 0)) > 15


def test_the_token_is_needed_for_all_but_health(service, scene):
    body, address = scene.read_bytes(), service.base_url
    with httpx.Client(base_url=address, trust_env=False, timeout=30) as stranger:
        for header in (None, f"Bearer {TOKEN}x", "Bearer", f"Basic {TOKEN}", TOKEN, "Bearer \xff"):
            headers = [(b"Authorization", header.encode("latin-1"))] if header else []
            for path in ("/features?model=plain", "/nothing"):
                response = stranger.post(path, content=body, headers=headers)
                assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/info", "/metrics"):
            assert stranger.get(path).status_code == 401
        for path in ("/health", "/health/live", "/health/ready", "/docs", "/openapi.json"):
            assert stranger.get(path).status_code == 200, path
        assert stranger.post("/artifacts?model=plain", content=body, headers={"Authorization": f"bearer {TOKEN}"})


def test_metrics_count_images_stages_and_the_live_artifact_rate(service, scene):
    before = figures(service)
    for _ in range(3):
        assert service.post("/artifacts?model=plain", content=scene.read_bytes()).status_code == 200
    assert service.post("/artifacts?model=plain", content=b"x").status_code == 422
    after = figures(service)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['phreg_requests_total{route="/artifacts",status="200"}'] == 3
    assert grown['phreg_requests_total{route="/artifacts",status="422"}'] == 1
    for stage in ("read", "decode", "queue", "run", "encode", "total"):
        assert grown[f'phreg_latency_seconds_count{{model="plain",stage="{stage}"}}'] == 3
    assert grown['phreg_batch_images_sum{model="plain"}'] == 3
    assert after['phreg_artifact_rate{model="plain"}'] == pytest.approx(5 / 256, abs=0.01)
    assert (after["phreg_ready"], after["phreg_active_requests"]) == (1, 0)


def test_info_and_openapi_say_what_is_served(service):
    info = service.get("/info").json()
    assert [model["name"] for model in info["models"]] == ["labels", "plain"]
    assert info["models"][0]["heads"][0]["output"] == "labels"
    assert info["models"][1]["outputs"]["features"]["shape"][1:] == [16, 16, 128]
    assert info["limits"]["bytes"] == 1 << 19
    described = service.get("/openapi.json").json()
    for path in ("/features", "/labels", "/overlay", "/artifacts"):
        post = described["paths"][path]["post"]
        assert set(post["requestBody"]["content"]) == {"image/*", "application/octet-stream", "multipart/form-data"}
        assert {"200", "400", "401", "413", "422", "503", "504"} <= set(post["responses"])
        assert post["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")
        assert post["summary"]
        assert post["description"]
        assert post["security"] == [{"HTTPBearer": []}]
    assert "HTTPValidationError" not in json.dumps(described)
