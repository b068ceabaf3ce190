"""Run work in several threads at once."""

import threading
from collections.abc import Callable, Iterable
from typing import Any


def run_in_threads(work: Callable[[Any], object], arguments: Iterable[Any]) -> list[BaseException]:
    """Call ``work`` on every argument, each in a separate thread; return the exceptions that were raised."""
    errors: list[BaseException] = []

    def call(argument: Any) -> None:
        try:
            work(argument)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
