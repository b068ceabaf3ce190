"""Enums, errors, handles, streams and queued work of the fake CUDA runtime."""

import enum
from collections import deque
from dataclasses import dataclass


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorNoKernelImageForDevice = 209
    cudaErrorInvalidResourceHandle = 400
    cudaErrorSymbolNotFound = 500
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorMisalignedAddress = 716
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureUnmatched = 903
    cudaErrorStreamCaptureIsolation = 905
    cudaErrorStreamCaptureImplicit = 906
    cudaErrorCapturedEvent = 907
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


@dataclass
class Event:
    """``mark``: the position that it was last recorded at. ``index``: its GPU. ``captured``: recorded into a graph."""

    index: int
    timing: bool = True
    mark: Mark | None = None
    captured: bool = False


@dataclass
class Work:
    """One piece of queued work.

    ``run``: computes it; gets the number of an inference in its context if there is an ``owner``. ``touches``: the
    (address, bytes) that it reads or writes. ``owner``: the execution context's state.
    """

    run: object
    touches: tuple = ()
    owner: object = None


class Stream:
    """A stream of the GPU ``index``. ``blocking``: it waits for the default stream, and the default stream for it."""

    def __init__(self, index=0, blocking=False):
        self.index, self.blocking = index, blocking
        self.queue, self.recording, self.thread, self.broken = deque(), None, None, False
