import json
import re
import threading
from typing import ClassVar

import rclpy
from rclpy.qos import QoSProfile


class Parameter:
    def __init__(self, name, value):
        self.name, self.value = name, value


class Publisher:
    """``messages``: what was published. ``subscribers``: a test sets how many there are."""

    def __init__(self, msg_type, topic, qos):
        self.msg_type, self.topic_name, self.qos_profile = msg_type, topic, qos
        self.subscribers, self.messages, self.changed = 1, [], threading.Condition()

    def publish(self, msg):
        if not isinstance(msg, self.msg_type):
            raise TypeError(f"Expected {self.msg_type}, got {type(msg)}")
        if not rclpy.ok():
            raise RuntimeError("publisher's context is invalid")
        with self.changed:
            self.messages.append(msg)
            self.changed.notify_all()

    def get_subscription_count(self):
        return self.subscribers


class Logger:
    def __init__(self):
        self.lines = []

    def _log(self, severity, message, once=False, throttle_duration_sec=None, skip_first=False):
        assert isinstance(message, str)
        self.lines.append((severity, message))

    def info(self, message, **kwargs):
        self._log("info", message, **kwargs)

    def warning(self, message, **kwargs):
        self._log("warning", message, **kwargs)

    def error(self, message, **kwargs):
        self._log("error", message, **kwargs)


class Node:
    made: ClassVar[list] = []

    def __init__(
        self,
        node_name,
        *,
        context=None,
        cli_args=None,
        namespace=None,
        use_global_arguments=True,
        enable_rosout=True,
        rosout_qos_profile=None,
        start_parameter_services=True,
        parameter_overrides=None,
        allow_undeclared_parameters=False,
        automatically_declare_parameters_from_overrides=False,
        enable_logger_service=False,
    ):
        assert rclpy.ok(), "rclpy.init() has not been called"
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", node_name)
        self.publishers_made, self.callbacks, self.timers = {}, {}, []
        self.logger, self.destroyed, self.qos = Logger(), False, {}
        Node.made.append(self)

    def declare_parameter(self, name, value=None, descriptor=None, ignore_override=False):
        words = rclpy.arguments
        given = [words[i + 1] for i, word in enumerate(words) if word in ("-p", "--param")]
        for key, _, text in (pair.partition(":=") for pair in given):
            if key == name:
                try:
                    read = json.loads(text)
                except ValueError:
                    read = text
                # A declared parameter keeps its type.
                if type(read) is not type(value):
                    raise TypeError(f"Trying to set parameter '{name}' to '{text}' of another type")
                value = read
        return Parameter(name, value)

    def create_publisher(
        self,
        msg_type,
        topic,
        qos_profile,
        *,
        callback_group=None,
        event_callbacks=None,
        qos_overriding_options=None,
        publisher_class=Publisher,
    ):
        assert isinstance(qos_profile, (QoSProfile, int))
        return self.publishers_made.setdefault(topic, publisher_class(msg_type, topic, qos_profile))

    def create_subscription(
        self,
        msg_type,
        topic,
        callback,
        qos_profile,
        *,
        callback_group=None,
        event_callbacks=None,
        qos_overriding_options=None,
        raw=False,
    ):
        assert isinstance(qos_profile, (QoSProfile, int))
        self.callbacks[topic], self.qos[topic] = callback, qos_profile

    def create_timer(self, timer_period_sec, callback, callback_group=None, clock=None, autostart=True):
        assert isinstance(timer_period_sec, float)
        self.timers.append(callback)

    def get_logger(self):
        return self.logger

    def destroy_node(self):
        self.destroyed = True
