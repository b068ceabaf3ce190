"""A message as rosidl's Python generator makes it: fields by keyword, whose setters check the type."""

import array
from collections.abc import Sequence
from typing import ClassVar


class Message:
    FIELDS: ClassVar[dict] = {}

    def __init__(self, **kwargs):
        assert all(key in self.FIELDS for key in kwargs), f"Invalid arguments passed to constructor: {kwargs.keys()}"
        for name, kind in self.FIELDS.items():
            default = {"uint8[]": lambda: array.array("B"), "float32": float}.get(kind, int)
            default = str if kind == "string" else kind if isinstance(kind, type) else default
            setattr(self, name, kwargs[name] if name in kwargs else default())

    def __setattr__(self, name, value):
        kind, wrong = self.FIELDS[name], f"The {name!r} field got {type(value)}"
        if kind == "uint8[]":
            if not isinstance(value, array.array):
                assert isinstance(value, Sequence), wrong
                assert not isinstance(value, str), wrong
                assert all(isinstance(v, int) and 0 <= v < 256 for v in value), wrong
                value = array.array("B", value)
            assert value.typecode == "B", wrong
        elif kind in ("uint8", "uint32"):
            assert isinstance(value, int), wrong
            assert 0 <= value < 2 ** int(kind[4:]), wrong
        else:
            assert isinstance(value, {"string": str, "float32": float}.get(kind, kind)), wrong
        object.__setattr__(self, name, value)
