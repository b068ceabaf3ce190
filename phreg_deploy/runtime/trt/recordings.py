"""The CUDA graphs of one execution context: recorded once for its present shapes, replayed from then on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from phreg_deploy.errors import PhregError
from phreg_deploy.runtime.gpu.closing import Closing, close_all
from phreg_deploy.runtime.gpu.cuda import Graph, Stream

# Recordings that may fail before a context does without graphs.
MOST_FAILURES = 2
# How work was queued.
PLAIN, CAPTURED, REPLAYED = "plain", "captured", "replayed"

logger = logging.getLogger("phreg_deploy.runtime")


class Recordings(Closing):
    """CUDA graphs by kind, e.g. with and without the copies from and to the host.

    TensorRT's developer guide ("CUDA Graphs"): an inference is recorded after one plain inference with the same shapes,
    and a graph is valid until the context gets other shapes or addresses. A recording fails if another thread
    synchronises the GPU meanwhile. The work is then queued plainly; after the second failure it always is.
    """

    def __init__(self, stream: Stream, wanted: bool) -> None:
        self.stream, self.wanted, self.warm = stream, wanted, False
        self._graphs: dict[str, Graph] = {}
        self._failures = 0

    def __bool__(self) -> bool:
        return bool(self._graphs)

    def queue(self, kind: str, work: Callable[[], None]) -> str:
        """Queue ``work`` in the stream, by its graph if there is or can be one; return how it was queued.

        Raises ``PhregError`` if the work itself cannot be queued.
        """
        graph, how = self._graphs.get(kind), REPLAYED
        if graph is None and self.wanted and self.warm:
            graph, how = self._record(kind, work), CAPTURED
        if graph is None:
            work()
            self.warm = True
            return PLAIN
        graph.launch(self.stream.handle)
        return how

    def holds(self, kind: str) -> bool:
        """Whether there is a graph of this kind."""
        return kind in self._graphs

    def forget(self) -> None:
        """Drop the graphs, because the context changes; nothing in flight may use them."""
        self.warm = False
        graphs, self._graphs = list(self._graphs.values()), {}
        close_all(graphs)

    def close(self) -> None:
        self.forget()

    def _record(self, kind: str, work: Callable[[], None]) -> Graph | None:
        """Record the work as a graph; None if that fails."""
        try:
            self.stream.begin()
            try:
                work()
            except BaseException:
                # End the recording, or the stream could neither be used nor freed.
                with contextlib.suppress(PhregError):
                    self.stream.end().close()
                raise
            self._graphs[kind] = self.stream.end()
        except PhregError as error:
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                self.wanted = False
                logger.warning(
                    "engine: CUDA graphs are off for one of its contexts, because recording failed %d times: %s "
                    "Inferences are right, but each costs the host more time. Another thread may synchronise the GPU "
                    "while graphs are recorded: run a few frames of each size before such threads start.",
                    self._failures,
                    # A handler may keep the record, and the error holds the outputs of this call through its frames.
                    str(error),
                )
        return self._graphs.get(kind)
