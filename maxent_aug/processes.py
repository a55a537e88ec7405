"""Several processes of one run, on one machine or many: process 0 alone touches files.

What it read goes to the others, and so does the news that it failed. With one process a call is
just made.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


class FirstProcessFailed(Exception):
    """Process 0 has failed, and says why."""


def on_first(call: Callable[[], T]) -> T:
    """Calls a function on process 0 only; all processes must come here, and get what it returned.

    Args:
      call: returns what pickle can hold.

    Raises:
      FirstProcessFailed: on the other processes, when process 0 raises an error of its own.
    """
    if jax.process_count() == 1:
        return call()
    content = b""
    try:
        if jax.process_index() == 0:
            content = pickle.dumps(call())
    finally:  # an error is told, too, so that nobody waits
        content = _from_first(content)
    if not content:
        raise FirstProcessFailed
    return pickle.loads(content)


def _from_first(content: bytes) -> bytes:
    """Process 0's bytes, on all processes."""
    high, low = multihost_utils.broadcast_one_to_all(
        np.array(divmod(len(content), 2**32), np.uint32)
    )
    length = int(high) * 2**32 + int(low)
    words = np.zeros(-(-length // 4), np.uint32)
    if jax.process_index() == 0:
        words.view(np.uint8)[:length] = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(words).tobytes()[:length]


@contextmanager
def open_on_first(manager: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """A context manager, made and entered on process 0; the others get None, and never use it."""
    with ExitStack() as stack:
        entered: list[T] = []
        on_first(lambda: entered.append(stack.enter_context(manager())))
        yield entered[0] if entered else cast(T, None)
