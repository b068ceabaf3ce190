from enum import IntEnum


class HistoryPolicy(IntEnum):
    SYSTEM_DEFAULT, KEEP_LAST, KEEP_ALL, UNKNOWN = range(4)


class ReliabilityPolicy(IntEnum):
    SYSTEM_DEFAULT, RELIABLE, BEST_EFFORT, UNKNOWN = range(4)


class InvalidQoSProfileException(Exception):
    pass


class QoSProfile:
    KNOWN = ("history", "depth", "reliability", "durability", "lifespan", "deadline", "liveliness")

    def __init__(self, **kwargs):
        assert all(key in self.KNOWN for key in kwargs), f"Invalid arguments passed to constructor: {kwargs.keys()}"
        if "history" not in kwargs:
            if "depth" not in kwargs:
                raise InvalidQoSProfileException("History and/or depth settings are required.")
            kwargs["history"] = HistoryPolicy.KEEP_LAST
        if kwargs["history"] == HistoryPolicy.KEEP_LAST and "depth" not in kwargs:
            raise InvalidQoSProfileException("History set to KEEP_LAST without a depth setting.")
        assert isinstance(kwargs.get("depth", 0), int)
        self.history, self.depth = HistoryPolicy(kwargs["history"]), kwargs.get("depth", 10)
        self.reliability = ReliabilityPolicy(kwargs.get("reliability", ReliabilityPolicy.RELIABLE))
