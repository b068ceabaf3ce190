from typing import ClassVar

from message import Message
from std_msgs.msg import Header


class Image(Message):
    FIELDS: ClassVar[dict] = {
        "header": Header,
        "height": "uint32",
        "width": "uint32",
        "encoding": "string",
        "is_bigendian": "uint8",
        "step": "uint32",
        "data": "uint8[]",
    }
