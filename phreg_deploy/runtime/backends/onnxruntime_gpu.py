"""ONNX Runtime on CUDA, and on its own TensorRT provider."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from phreg_deploy.bundle.bundle import Bundle
from phreg_deploy.errors import BackendMissing, PhregError
from phreg_deploy.runtime.backends.interface import Feed
from phreg_deploy.runtime.backends.onnxruntime_backend import OrtBackend
from phreg_deploy.runtime.backends.onnxruntime_options import load_onnxruntime, replayable
from phreg_deploy.runtime.backends.options import BackendOptions
from phreg_deploy.runtime.gpu.arrays import DeviceArray
from phreg_deploy.runtime.gpu.closing import Calls
from phreg_deploy.runtime.gpu.cuda import Cuda
from phreg_deploy.runtime.gpu.ort_graph import Staging

# Operators that must not run on the processor.
HEAVY = {"MatMul", "Gemm", "LayerNormalization", "Softmax", "Gelu", "Conv"}
DTYPES: dict[str, np.dtype[Any]] = {"tensor(float16)": np.dtype(np.float16), "tensor(float)": np.dtype(np.float32)}


class OrtGpuBackend(OrtBackend):
    """An ``InferenceSession`` on a GPU.

    On CUDA, a bundle of one size and one batch is replayed as a CUDA graph on pinned staging, one call at a time; if
    ONNX Runtime refuses to record one, it is opened again without, and ``remark`` says so. The
    TensorRT provider links libnvinfer.so.10, so it may be another TensorRT than the module ``tensorrt``; it caches its
    engines in the bundle.

    Raises:
        BackendMissing: as ``OrtBackend``; or there is no GPU, or a heavy node runs on the processor, which ONNX
            Runtime itself would only log.
        PhregError: as ``OrtBackend``.
    """

    def __init__(self, bundle: Bundle, name: str, options: BackendOptions) -> None:
        onnxruntime = load_onnxruntime(bundle.manifest, name, options)
        self.cuda, self._calls = Cuda(options.device), Calls()
        if hasattr(onnxruntime, "preload_dlls"):
            # pip puts CUDA and cuDNN into folders that the system's loader does not search.
            onnxruntime.preload_dlls()
        self._staging: Staging | None = None
        graphs = replayable(bundle, name)
        try:
            self._open(onnxruntime, bundle, name, options)
        except PhregError as error:
            # ONNX Runtime refuses a whole session if it cannot record all of its nodes.
            if not graphs or "graph capture" not in str(error):
                raise
            graphs = False
            self._open(onnxruntime, bundle, name, options, graphs)
            self.remark = "ONNX Runtime takes no CUDA graph of this bundle"
        check_assignment(self._session, name)
        self._types = {output.name: output.type for output in self._session.get_outputs()}
        self._staging = self._stage() if graphs else None
        # Device arrays lie at other addresses than those in the CUDA graph.
        self._ungraphed = onnxruntime.RunOptions()
        self._ungraphed.add_run_config_entry("gpu_graph_id", "-1")

    @property
    def replays(self) -> bool:
        """Whether frames of the host are served by a CUDA graph."""
        return self._staging is not None

    def run(self, feed: Feed) -> Feed:
        with self._calls.one():
            return super().run(feed) if self._staging is None else self._staging.run(feed)

    def run_device(
        self, image: DeviceArray, others: Feed, stream: int | None = None, out: Mapping[str, DeviceArray] | None = None
    ) -> dict[str, DeviceArray]:
        """Device memory to device memory by IOBinding; returns when the outputs are written.

        Raises:
            PhregError: a stream of the caller's (ONNX Runtime takes one for all calls only), or an unfit output.
        """
        if stream is not None:
            raise PhregError("stream: onnxruntime-cuda runs on a stream of its own; use tensorrt for one of yours.")
        with self._calls.one(), self.cuda.selected():
            return self._run_selected(image, others, out or {})

    def run_to_host(self, image: DeviceArray, others: Feed) -> Feed:
        """Device memory to host arrays."""
        return {name: array.numpy() for name, array in self.run_device(image, others).items()}

    def _run_selected(self, image: DeviceArray, others: Feed, out: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        outputs = self._outputs(image.shape, out)
        for other in {array.stream for array in (image, *out.values())} - {None}:
            self.cuda.call("cudaStreamSynchronize", other)
        binding, index = self._session.io_binding(), self.cuda.index
        binding.bind_input("image", "cuda", index, np.uint8, image.shape, image.pointer)
        for name, value in others.items():
            binding.bind_cpu_input(name, value)
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", index, array.dtype, array.shape, array.pointer)
        # A session with a CUDA graph runs one call at a time.
        with contextlib.nullcontext() if self._staging is None else self._staging.lock:
            self._session.run_with_iobinding(binding, self._ungraphed)
            binding.synchronize_outputs()
        for array in outputs.values():
            array.stream = None
        return outputs

    def close(self) -> None:
        if not self._calls.end():
            return
        staging, self._staging = self._staging, None
        super().close()
        if staging is not None:
            staging.close()

    def _stage(self) -> Staging:
        """Buffers at fixed addresses for the bundle's one shape."""
        manifest = self._bundle.manifest
        inputs, outputs = (
            {name: (tuple(facts["shape"]), np.dtype(facts["dtype"])) for name, facts in described.items()}
            for described in (manifest.inputs, manifest.outputs)
        )
        return Staging(self.cuda, self._session, inputs, outputs)

    def _outputs(self, image: tuple[int, ...], out: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """The array of every output for images of this shape: the caller's after a check, or a new one."""
        outputs = {}
        for name in self._names:
            shape, dtype, array = self._shape(name, image), DTYPES[self._types[name]], out.get(name)
            if array is not None and (array.shape != shape or array.dtype != dtype):
                raise PhregError(f"out: got {name} as {array.dtype} {array.shape}, expected {dtype} {shape}.")
            outputs[name] = DeviceArray.allocate(self.cuda, shape, dtype) if array is None else array
        return outputs

    def _shape(self, name: str, image: tuple[int, ...]) -> tuple[int, ...]:
        """An output's shape for images of this shape: ``(B, Hp, Wp, ...)`` or ``(B, C)``."""
        declared, patch = self._bundle.manifest.outputs[name]["shape"], self._bundle.manifest.model.patch
        if len(declared) < 3:
            return (image[0], *declared[1:])
        return (image[0], image[1] // patch[0], image[2] // patch[1], *declared[3:])


def check_assignment(session: Any, name: str) -> None:
    """Raise ``BackendMissing`` unless every heavy node runs on the GPU, by ONNX Runtime's own record."""
    # ONNX Runtime records it since 1.24.
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    strays = [
        node
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if node.op_type in HEAVY
    ]
    if strays:
        raise BackendMissing(
            f"backend: {name} left {len(strays)} heavy nodes to the processor, e.g. {strays[0].name} "
            f"({strays[0].op_type}). Use --backend tensorrt, or export in fp16."
        )
