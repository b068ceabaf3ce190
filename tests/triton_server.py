"""Triton's own messages, and its server with a Python backend that runs a repository's graph by ONNX Runtime."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.example_downloads import default_folder
from tests.service_helpers import free_port, httpx

TYPES = {"UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}
MODEL = """
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        graph = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(graph, options)
        self.names = [output.name for output in self.session.get_outputs()]

    def execute(self, requests):
        # By DLPack: the backend was built for numpy 1, and gives arrays of numpy 2 no bytes.
        images = [np.from_dlpack(pb.get_input_tensor_by_name(request, "image")) for request in requests]
        answers = self.session.run(self.names, {"image": np.concatenate(images)})
        ends = np.cumsum([len(image) for image in images])
        parts = [[part.copy() for part in np.split(answer, ends[:-1])] for answer in answers]
        tensors = [[pb.Tensor.from_dlpack(name, part) for part in own] for name, own in zip(self.names, parts)]
        return [pb.InferenceResponse(list(own)) for own in zip(*tensors)]
"""


def read_config(path):
    """A ``config.pbtxt`` as Triton's message; skips where the message is not there."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    file = default_folder() / "triton-messages" / "tritonclient" / "grpc" / "model_config_pb2.py"
    if not file.is_file():
        pytest.skip("Triton's messages are not there: python -m tests.example_downloads")
    if "model_config_pb2" not in sys.modules:
        spec = importlib.util.spec_from_file_location("model_config_pb2", file)
        sys.modules["model_config_pb2"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["model_config_pb2"])
    return text_format.Parse(Path(path).read_text(), sys.modules["model_config_pb2"].ModelConfig())


def run_in_python(repository):
    """Give every model of a repository to the Python backend; nothing else of its configuration changes."""
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text()
        changed = text.replace('backend: "onnxruntime"', 'backend: "python"').replace('"model.onnx"', '"model.py"')
        assert changed != text
        config.write_text(changed)
        (config.parent / "1" / "model.py").write_text(MODEL)


@contextmanager
def tritonserver(repository):
    """Start Triton on a repository; yield a client. Skips where the server cannot run."""
    root = default_folder() / "triton-server"
    home = root / "pytriton" / "tritonserver"
    stub = home / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip("Triton's server is not there: python -m tests.example_downloads")
    beside = home / "backends" / "python" / stub.name
    if not beside.exists():
        made = beside.with_name(f"{stub.name}.{os.getpid()}")
        made.write_bytes(stub.read_bytes())
        made.chmod(0o755)
        made.replace(beside)
    libraries = [root / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        # Its Python takes the packages of the first one on the path.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    command = [home / "bin" / "tritonserver", "--model-repository", repository, "--disable-auto-complete-config"]
    command += ["--backend-directory", home / "backends"]
    command += [word for name, port in ports.items() for word in (f"--{name}-port", port)]
    log = repository.with_name(f"{repository.name}.log")
    with open(log, "w") as output:
        process = subprocess.Popen([*map(str, command)], env=environment, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{ports['http']}"
    with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
        try:
            for _ in range(300):
                if process.poll() is not None:
                    said = log.read_text()
                    if "error while loading shared libraries" in said:
                        pytest.skip(f"Triton's server does not run here: {said.splitlines()[-1]}")
                    pytest.fail(said[-3000:])
                try:
                    if client.get("/v2/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            else:
                pytest.fail(log.read_text()[-3000:])
            yield client
        finally:
            process.kill()
            process.communicate()


def infer(client, model, image):
    """Send images ``(B, H, W, 3)`` as bytes; return the outputs by name, or the error's text."""
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": image.shape,
        "parameters": {"binary_data_size": image.nbytes},
    }
    names = [output["name"] for output in client.get(f"/v2/models/{model}").json()["outputs"]]
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in names]
    header = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    response = client.post(f"/v2/models/{model}/infer", content=header + image.tobytes(), headers=headers)
    if response.status_code != 200:
        return response.json()["error"]
    at, outputs = int(response.headers["Inference-Header-Content-Length"]), {}
    for output in json.loads(response.content[:at])["outputs"]:
        end = at + output["parameters"]["binary_data_size"]
        values = np.frombuffer(response.content[at:end], TYPES[output["datatype"]])
        outputs[output["name"]], at = values.reshape(output["shape"]), end
    return outputs
