"""Enums, errors, handles and streams of the fake CUDA runtime."""

import enum
from collections import deque


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureUnmatched = 903
    cudaErrorStreamCaptureIsolation = 905
    cudaErrorStreamCaptureWrongThread = 908


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class Refused(Exception):
    """Makes a call return an error code instead of a result."""

    def __init__(self, code):
        super().__init__(code.name)
        self.code = code


class Handle:
    """A ``cudaStream_t`` or another handle: an object that ``int`` turns into its number."""

    def __init__(self, number):
        self.number = number

    def __int__(self):
        return self.number


class Mark:
    """A position in a stream; ``time`` is None until the stream reaches it."""

    def __init__(self, stream):
        self.stream, self.time = stream, None


class Stream:
    def __init__(self):
        self.queue, self.recording, self.thread, self.broken = deque(), None, None, False
