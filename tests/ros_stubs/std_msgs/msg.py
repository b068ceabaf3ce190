from typing import ClassVar

from message import Message


class Header(Message):
    """``stamp``: nanoseconds, in place of builtin_interfaces/Time, which the example passes on as it is."""

    FIELDS: ClassVar[dict] = {"stamp": "uint32", "frame_id": "string"}


class Float32(Message):
    FIELDS: ClassVar[dict] = {"data": "float32"}
