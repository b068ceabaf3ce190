"""Write messages in protobuf's text format, without protobuf."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Symbol(str):
    """The name of an enum's value, which has no quotes."""


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """Return a message: each key is a field; a list is a repeated field, and a mapping a message. None is left out."""
    return "".join(_field(name, value, indent) for name, value in message.items())


def _field(name: str, value: Any, indent: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        if all(isinstance(part, int) for part in value):
            return f"{indent}{name}: [{', '.join(map(str, value))}]\n" if value else ""
        return "".join(_field(name, part, indent) for part in value)
    if isinstance(value, Mapping):
        return f"{indent}{name} {{\n{to_text(value, indent + '  ')}{indent}}}\n"
    return f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, Symbol):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    # JSON's escapes of ASCII are those of the text format; others are written as they are.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
