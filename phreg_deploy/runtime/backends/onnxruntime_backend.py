"""ONNX Runtime behind the backend interface, on the processor, on CUDA, and on its own TensorRT provider."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.bundle.plans import FOLDER
from phreg_deploy.bundle.profiles import profiles_of
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.backends.instructions import EXACT
from phreg_deploy.runtime.backends.interface import check_outputs, run_error
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu.ort_graph import Staging

PROVIDERS = {
    "onnxruntime-cpu": "CPUExecutionProvider",
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
}
HEAVY = {"MatMul", "Gemm", "LayerNormalization", "Softmax", "Gelu", "Conv"}  # what must not be left to the processor


class OrtBackend:
    """An ``InferenceSession`` on exactly the execution provider that was asked for.

    On CUDA a bundle of one size and one batch is replayed as a CUDA graph on pinned staging, one call at a time.
    On a GPU no heavy node may be assigned to another provider, which ONNX Runtime itself would only log. Its TensorRT
    provider links libnvinfer.so.10, so it is another TensorRT than the module ``tensorrt`` may be; its engines are cached
    in the bundle too.

    Raises:
        BackendMissing: ONNX Runtime cannot be imported, is not the GPU build, or dropped the provider silently.
        PhregError: it refuses the graph, or was asked for a precision that the graph is not in.
    """

    remark = ""

    def __init__(self, bundle: Bundle, name: str, tuning: BackendOptions, device: int = 0) -> None:
        manifest = bundle.manifest
        self.name, self._gpu = name, name != "onnxruntime-cpu"
        self.compute = manifest.precision if self._gpu and manifest.precision in ("fp16", "bf16") else "fp32"
        _refuse(manifest.precision, name, tuning, self.compute)
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendMissing(
                f"backend: onnxruntime cannot be imported ({error}). Reinstall it: pip install --force-reinstall onnxruntime"
            ) from None
        provider = PROVIDERS[name]
        if provider not in onnxruntime.get_available_providers():
            raise BackendMissing(
                f"backend: this ONNX Runtime {onnxruntime.__version__} was built without {provider}. Run: pip uninstall onnxruntime, then pip install "
                '"phreg-deploy[gpu]"'
            )
        if name == "onnxruntime-tensorrt":
            _check_libraries(onnxruntime)
        self.cuda = Cuda(device) if self._gpu else None
        if self._gpu and hasattr(
            onnxruntime, "preload_dlls"
        ):  # CUDA and cuDNN from pip's folders, which the loader does not search
            onnxruntime.preload_dlls()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only; they also raise
        options.add_session_config_entry(*EXACT)
        if tuning.threads:
            options.intra_op_num_threads = tuning.threads
        if manifest.quantisation is not None and manifest.quantisation["target"] == "trt":
            options.add_session_config_entry(
                "session.disable_quant_qdq", "1"
            )  # FP8 has kernels for Q/DQ alone: compute it as written
        if self._gpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers: list[Any] = [provider]
        if self._gpu:
            providers = [
                (provider, settings(bundle, name, device)),
                *([("CUDAExecutionProvider", {"device_id": str(device)})] if "tensorrt" in name else []),
            ]
        try:
            self._session: Any = onnxruntime.InferenceSession(str(bundle.graph), options, providers=providers)
        except Exception as error:  # the binding's exceptions share no base but Exception
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PhregError(
                f"backend: ONNX Runtime {onnxruntime.__version__} cannot load {bundle.graph}: {first}"
            ) from None
        used = self._session.get_providers()
        if used[0] != provider:
            raise BackendMissing(
                f"backend: asked ONNX Runtime for {provider}, got {used[0]}: a library that it needs is missing. `phreg-deploy doctor` names it."
            )
        if self._gpu:
            _check_assignment(self._session, name)
        self._types = {o.name: o.type for o in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._bundle, self._names = bundle, [output.name for output in self._session.get_outputs()]
        check_outputs(bundle, self._names)
        self._staging: Staging | None = None
        if self.cuda is not None and replayable(bundle, name):
            layouts = [
                {key: (tuple(facts["shape"]), np.dtype(facts["dtype"])) for key, facts in described.items()}
                for described in (manifest.inputs, manifest.outputs)
            ]
            self._staging = Staging(self.cuda, self._session, *layouts)
        self._patch = manifest.model.patch
        self._ungraphed: Any = None
        if self._gpu:  # device arrays lie at other addresses than the graph's
            self._ungraphed = onnxruntime.RunOptions()
            self._ungraphed.add_run_config_entry("gpu_graph_id", "-1")
        self._shapes = {name: facts["shape"] for name, facts in manifest.outputs.items()}

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._staging is not None:
            return self._staging.run(feed)
        try:
            return dict(zip(self._names, self._session.run(None, feed)))
        except Exception as error:  # the binding's exceptions share no base but Exception
            if self._session is None:  # closed meanwhile
                raise
            raise run_error(self.name, self._bundle, error) from error

    def run_device(
        self,
        image: DeviceArray,
        others: dict[str, np.ndarray],
        stream: int | None = None,
        out: Mapping[str, DeviceArray] | None = None,
    ) -> dict[str, DeviceArray]:
        """Device memory to device memory by IOBinding; returns when the answers are there.

        Raises:
            PhregError: on the processor, or with a stream of the caller's: ONNX Runtime takes one only for all calls.
        """
        if self.cuda is None:
            raise PhregError(
                "device array: onnxruntime-cpu reads host memory only; use --backend onnxruntime-cuda or tensorrt."
            )
        if stream is not None:
            raise PhregError("stream: onnxruntime-cuda runs on a stream of its own; use tensorrt for one of yours.")
        binding, found = self._session.io_binding(), dict(out or {})
        self.cuda.use()
        for other in {array.stream for array in (image, *found.values())} - {None}:
            self.cuda.call("cudaStreamSynchronize", other)
        binding.bind_input("image", "cuda", self.cuda.index, np.uint8, image.shape, image.pointer)
        for name, value in others.items():
            binding.bind_cpu_input(name, value)
        for name in self._names:
            shape, dtype = self._shape(name, image.shape), self._dtype(name)
            if name not in found:
                found[name] = DeviceArray.allocate(self.cuda, shape, dtype)
            elif found[name].shape != shape or found[name].dtype != dtype:
                raise PhregError(
                    f"out: got {name} as {found[name].dtype} {found[name].shape}, expected {dtype} {shape}."
                )
            binding.bind_output(
                name, "cuda", self.cuda.index, found[name].dtype, found[name].shape, found[name].pointer
            )
        with (
            contextlib.nullcontext() if self._staging is None else self._staging.lock
        ):  # a session with a graph runs one call at a time
            self._session.run_with_iobinding(binding, self._ungraphed)
            binding.synchronize_outputs()
        for array in found.values():
            array.stream = None
        return found

    def _shape(self, name: str, image: tuple[int, ...]) -> tuple[int, ...]:
        """An output's shape for images of this one: ``(B, Hp, Wp, ...)`` of a patch grid, or ``(B, C)``."""
        declared = self._shapes[name]
        if len(declared) < 3:
            return (image[0], *declared[1:])
        return (image[0], image[1] // self._patch[0], image[2] // self._patch[1], *declared[3:])

    def _dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype({"tensor(float16)": np.float16, "tensor(float)": np.float32}[self._types[name]])

    def close(self) -> None:
        staging, self._staging = self._staging, None
        self._session = None
        if staging is not None:
            staging.close()


def replayable(bundle: Bundle, name: str) -> bool:
    """Whether every call has the same shapes, so that a CUDA graph can be replayed."""
    return name == "onnxruntime-cuda" and not bundle.manifest.sizes.dynamic and not bundle.manifest.batches.dynamic


def settings(bundle: Bundle, name: str, device: int) -> dict[str, str]:
    """Provider options. TensorFloat-32 is off, as it is for engines: parity is with FP32."""
    if name == "onnxruntime-cuda":
        graph = {"enable_cuda_graph": "1"} if replayable(bundle, name) else {}
        return {"device_id": str(device), "use_tf32": "0", **graph}
    cache = bundle.folder / FOLDER / "onnxruntime"
    _folder(cache)
    chosen = {
        "device_id": str(device), "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache), "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),     }  # fmt: skip
    eight = (
        bundle.manifest.precision == "int8"
    )  # its network is weakly typed: without the switch, FP16 would be computed in FP32
    chosen["trt_fp16_enable"] = str(int(eight or bundle.manifest.precision == "fp16"))
    chosen["trt_int8_enable"] = str(int(eight))
    profiles = profiles_of(bundle.manifest)
    if bundle.manifest.sizes.dynamic or bundle.manifest.batches.dynamic:
        for i, kind in enumerate(("min", "opt", "max")):
            chosen[f"trt_profile_{kind}_shapes"] = ",".join(
                f"{tensor}:{'x'.join(str(side) for side in shapes[i])}"
                for profile in profiles
                for tensor, shapes in profile.inputs.items()
            )
    return chosen


def _refuse(precision: str, name: str, tuning: BackendOptions, compute: str) -> None:
    if tuning.compute not in ("auto", compute):
        raise PhregError(
            f"compute: got {tuning.compute}, but {name} computes in what the graph says, {compute}; use --backend openvino, or export in {tuning.compute}."
        )
    if precision == "bf16" and name == "onnxruntime-cpu":
        raise BackendMissing(
            "backend: ONNX Runtime has no bfloat16 on the processor; use --backend openvino, a GPU, or --precision fp16."
        )
    if precision in ("int8", "fp8") and name == "onnxruntime-cuda":
        raise PhregError(
            f"backend: ONNX Runtime has no {precision} kernels on CUDA and would compute in float, slower than FP16. Use --backend tensorrt, or an FP16 bundle."
        )
    if precision in ("bf16", "fp8") and name == "onnxruntime-tensorrt":
        raise PhregError(
            "backend: ONNX Runtime's TensorRT provider is not offered for " + precision + "; use --backend tensorrt."
        )


def _check_libraries(onnxruntime: Any) -> None:
    """Raise where the TensorRT that this ONNX Runtime was linked to is not here; another major version does not serve it."""
    from phreg_deploy.runtime.gpu.libraries import needed_libraries

    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    try:
        wanted = [library for library in needed_libraries(provider) if library.startswith("libnv")]
    except (OSError, ValueError, struct.error):
        return  # another system's: the session will tell
    for library in wanted:
        try:
            ctypes.CDLL(library)
        except OSError:
            raise BackendMissing(
                f"backend: ONNX Runtime {onnxruntime.__version__}'s TensorRT provider links {library}, which is not here. Install that major version "
                "of TensorRT, or use --backend tensorrt with the one that you have."
            ) from None


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PhregError(
            f"engine cache: {path} cannot be made ({error.strerror}); copy the bundle where you may write."
        ) from None


def _check_assignment(session: Any, name: str) -> None:
    """Raise unless every heavy node runs on the GPU; by what ONNX Runtime itself recorded."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
        return
    strays = [
        node for part in session.get_provider_graph_assignment_info() if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes() if node.op_type in HEAVY
    ]  # fmt: skip
    if strays:
        raise BackendMissing(
            f"backend: {name} left {len(strays)} heavy nodes to the processor, e.g. {strays[0].name} ({strays[0].op_type}). Use --backend tensorrt, or export in fp16."
        )
