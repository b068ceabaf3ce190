"""Stand-ins for the public classes of rclpy that examples/ros2_node.py uses, in one process and without middleware.

Signatures are those of rclpy 9 (ROS 2 Kilted, docs.ros.org/en/kilted/p/rclpy); later tests reach what was published by
``Node.made``. ``spin`` runs what ``work`` holds, as an executor runs callbacks, and ends as rclpy's does on a signal.
"""

import queue

from rclpy.executors import ExternalShutdownException

work: queue.Queue = queue.Queue()
arguments: list[str] = []
state = {"ok": False}


def init(*, args=None, context=None, domain_id=None, signal_handler_options=None):
    if state["ok"]:
        raise RuntimeError("Context.init() must only be called once")
    state["ok"] = True
    arguments[:] = args or []


def ok(*, context=None):
    return state["ok"]


def shutdown(*, context=None, uninstall_handlers=None):
    if not state["ok"]:
        raise RuntimeError("Context must be initialized before it can be shutdown")
    state["ok"] = False


def try_shutdown(*, context=None, uninstall_handlers=None):
    state["ok"] = False


def spin(node, executor=None):
    while state["ok"]:
        work.get(timeout=20)(node)
    raise ExternalShutdownException
