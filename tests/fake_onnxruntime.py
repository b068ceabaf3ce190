"""A fake GPU build of ONNX Runtime: it computes on the processor, and reads and writes memory of the fake GPU."""

import threading
import types

import numpy as np
import onnxruntime


class Binding:
    """The fake ``IOBinding``: the place of each tensor."""

    def __init__(self):
        self.inputs, self.outputs, self.waited = {}, {}, False

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = (np.dtype(element_type), tuple(shape), buffer_ptr)

    def bind_cpu_input(self, name, arr_on_cpu):
        self.inputs[name] = arr_on_cpu

    def bind_output(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = (np.dtype(element_type), tuple(shape), buffer_ptr)

    def synchronize_outputs(self):
        self.waited = True


class Session:
    """The fake ``InferenceSession``, which computes on the processor."""

    def __init__(self, library, path, options, providers):
        self.library, self.options, self.asked, self.bindings = library, options, providers, []
        self.recorded, self.busy = None, threading.Lock()
        self.real = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs, self.run = self.real.get_inputs, self.real.get_outputs, self.real.run

    def get_providers(self):
        names = [provider[0] for provider in self.asked]
        return ["CPUExecutionProvider"] if self.library.drops_providers else [*names, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        assert self.options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        part = types.SimpleNamespace
        nodes = [part(op_type=kind, name=name) for name, kind in self.library.nodes_on_cpu]
        there = part(op_type="MatMul", name="blocks.0.attn.qkv/MatMul")
        return [
            part(ep_name=self.asked[0][0], get_nodes=lambda: [there]),
            part(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes),
        ]

    def io_binding(self):
        self.bindings.append(Binding())
        return self.bindings[-1]

    def run_with_iobinding(self, binding, options=None):
        """Refuse to replay a CUDA graph on another binding, or in two threads at once."""
        device, feed = self.library.device, {}
        graph = dict(self.asked[0][1]).get("enable_cuda_graph") == "1"
        if graph and (options is None or options.get_run_config_entry("gpu_graph_id") != "-1"):
            self.recorded = self.recorded or binding
            assert binding is self.recorded, "the graph was recorded with another binding"
        assert not graph or self.busy.acquire(blocking=False), "two threads are in a session with a CUDA graph"
        try:
            self._compute(binding, device, feed)
        finally:
            if graph:
                self.busy.release()

    def _compute(self, binding, device, feed):
        for name, place in binding.inputs.items():
            if not isinstance(place, np.ndarray):
                dtype, shape, pointer = place
                place = np.frombuffer(bytes(device.span(pointer, int(np.prod(shape)) * dtype.itemsize)), dtype).reshape(
                    shape
                )
            feed[name] = place
        for output, value in zip(self.real.get_outputs(), self.real.run(None, feed)):
            dtype, shape, pointer = binding.outputs[output.name]
            assert (value.dtype, value.shape) == (dtype, shape), "ONNX Runtime refuses outputs of another shape"
            device.span(pointer, value.nbytes)[:] = value.tobytes()


def make_onnxruntime(device):
    """Make a module ``onnxruntime`` with the providers for GPUs.

    Tests read ``sessions``. They set ``drops_providers``, whether sessions run without the providers that were asked
    for, ``refuses_graphs``, whether a session that asks for a CUDA graph is refused, and ``nodes_on_cpu``, the
    (name, operator) of the nodes that stay on the processor.
    """
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    module = types.SimpleNamespace(
        __version__="1.31.0",
        __file__="/nowhere/__init__.py",
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        get_available_providers=lambda: providers,
        device=device,
        drops_providers=False,
        refuses_graphs=False,
        nodes_on_cpu=[],
        sessions=[],
    )

    def open_session(path, options, providers):
        if module.refuses_graphs and dict(providers[0][1]).get("enable_cuda_graph") == "1":
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user as all compute graph nodes "
                "have not been partitioned to the CUDAExecutionProvider"
            )
        module.sessions.append(Session(module, path, options, providers))
        return module.sessions[-1]

    module.InferenceSession = open_session
    return module
