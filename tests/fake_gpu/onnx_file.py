"""Read an ONNX file without the package onnx, because ``build`` runs without it."""


def _fields(data):
    """Yield (field number, value) of a protobuf message; values with a length are memoryviews that can be written."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        tag = number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, number()
        else:
            size = number() if kind == 2 else {1: 8, 5: 4}[kind]
            yield tag >> 3, data[at : at + size]
            at += size


def _texts(message, wanted):
    return [bytes(value).decode() for key, value in _fields(message) if key == wanted]


def read_nodes(data):
    """List the nodes of an ONNX file in order: (name, operator, inputs)."""
    graph = next(value for key, value in _fields(memoryview(data)) if key == 7)
    nodes = [value for key, value in _fields(graph) if key == 1]
    return [((_texts(n, 3) or [""])[0], _texts(n, 4)[0], _texts(n, 1)) for n in nodes]


def weight_types(data):
    """Map each weight's name to its ONNX type number."""
    graph = next(value for key, value in _fields(memoryview(data)) if key == 7)
    tensors = [list(_fields(value)) for key, value in _fields(graph) if key == 5]
    facts = [{key: value for key, value in tensor if key in (2, 8)} for tensor in tensors]
    return {bytes(fact[8]).decode(): fact[2] for fact in facts}


def zero_weights(data, name):
    """Set every weight whose name starts with ``name`` to zero, of which there must be one; return the file."""
    changed = bytearray(data)
    graph = next(value for key, value in _fields(memoryview(changed)) if key == 7)
    found = 0
    for key, tensor in _fields(graph):
        if key == 5 and _texts(tensor, 8)[0].startswith(name):
            raw = next(value for number, value in _fields(tensor) if number == 9)
            raw[:] = bytes(len(raw))
            found += 1
    assert found, f"no weight is called {name}"
    return bytes(changed)
