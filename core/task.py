"""A sequence of steps with waits between them, on the core's loop, written from top to bottom.

A ``Task`` drives a coroutine: ``await`` on a ``Future`` gives the loop back until somebody sets it, so QMP, sidecars
and the supervisor are served meanwhile. There is no scheduler: setting a future runs its waiter at once, on the
thread that sets it, which is the loop's. Nothing ends a coroutine that waits but the future's result or error: see to
it that every future gets one, also at the process's end. (asyncio would cost the core 50 modules at every start.)

    async def sequence() -> None:
        answer = await ask()        # ask() returns a Future
        try:
            await more(answer)
        finally:
            await clean_up()
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, Generic, TypeVar, cast

from motorcade.core.loop import Loop

log = logging.getLogger(__name__)

T = TypeVar("T")


class Future(Generic[T]):
    """A result that comes later, once; whatever comes after the first is dropped."""

    def __init__(self) -> None:
        self.done = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []

    def set(self, result: T) -> None:
        """Gives the result and runs who waits for it."""
        self._finish(result, None)

    def fail(self, error: BaseException) -> None:
        """Has who waits raise ``error``."""
        self._finish(None, error)

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        if self.done:
            return
        self.done, self._result, self._error = True, result, error
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_done(self, callback: Callable[[], None]) -> None:
        """Calls it when there is a result or an error; at once where there is."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)

    def result(self) -> T:
        """The result, or raises the error; RuntimeError before there is either."""
        if not self.done:
            raise RuntimeError("nothing has come of it yet")
        if self._error is not None:
            raise self._error
        return cast(T, self._result)

    def __await__(self) -> Generator[Future[Any], None, T]:
        if not self.done:
            yield self
        return self.result()


def every(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """All their results in order, or the first error as soon as it comes."""
    whole: Future[list[T]] = Future()
    left = len(futures)

    def one_done(future: Future[T]) -> None:
        nonlocal left
        left -= 1
        try:
            future.result()
        except Exception as e:
            whole.fail(e)
            return
        if left == 0 and not whole.done:
            whole.set([f.result() for f in futures])

    if not futures:
        whole.set([])
    for future in futures:
        future.on_done(lambda f=future: one_done(f))  # type: ignore[misc]
    return whole


class Task:
    """A coroutine on its way. What it raises in the end is ``on_end``'s, None after a plain return."""

    def __init__(
        self, coroutine: Coroutine[Future[Any], None, None], on_end: Callable[[Exception | None], None]
    ) -> None:
        """Runs it at once, up to its first wait."""
        self._coroutine = coroutine
        self._on_end = on_end
        self._step()

    def _step(self) -> None:
        try:
            future = self._coroutine.send(None)
        except StopIteration:
            self._on_end(None)
        except Exception as e:
            self._on_end(e)
        else:
            future.on_done(self._step)


def in_thread(loop: Loop, work: Callable[[], T], name: str) -> Future[T]:
    """Has ``work`` done on a thread of its own, for what may block (fsync); its outcome comes on the loop."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except Exception as e:
            error = e
            loop.call_soon(lambda: future.fail(error))
        else:
            loop.call_soon(lambda: future.set(result))

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
