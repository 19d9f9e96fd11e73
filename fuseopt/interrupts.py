"""A step is whole or not at all: an interrupt falls before its first write or after its last.

Python runs signal handlers (Ctrl-C's raises KeyboardInterrupt) in the main thread, between two bytecodes. So
what runs within one call into C cannot be torn, which `at_once` uses; where Python must run between the
writes, `held` makes the handlers wait.
"""

import _signal  # signal's own functions make enums of every number, at twenty times the cost
import threading
from collections import deque
from collections.abc import Iterable
from itertools import chain


def at_once(*calls: Iterable) -> None:
    """Run iterators over calls, such as map(f, xs) with f compiled, one after the other and all from C."""
    deque(chain(*calls), maxlen=0)


class held:
    """Within the block signal handlers wait; they run as it ends. Elsewhere than in the main thread none run."""

    def __enter__(self) -> None:
        self.handlers: dict = {}
        self.waiting: list = []
        self.holding = False  # until all are replaced an interrupt goes its usual way, and may end this function
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in range(1, _signal.NSIG):
                handler = _signal.getsignal(number)
                while isinstance(handler, held) and not handler.holding:  # one that could not be put back
                    handler = handler.handlers[number]
                if callable(handler):
                    self.handlers[number] = handler
                    _signal.signal(number, self)
        except BaseException:
            self._put_back()
            raise
        self.holding = True

    def __call__(self, number: int, frame) -> None:
        if self.holding:
            self.waiting.append((number, frame))
        else:
            self.handlers[number](number, frame)

    def __exit__(self, *_) -> None:
        self.holding = False
        try:
            self._put_back()
        finally:
            self._run_waiting()

    def _put_back(self) -> None:
        for number, handler in self.handlers.items():
            if _signal.getsignal(number) is self:
                _signal.signal(number, handler)

    def _run_waiting(self) -> None:
        """Each handler once, even if the one before it raised."""
        try:
            if self.waiting:
                number, frame = self.waiting.pop(0)
                self.handlers[number](number, frame)
        finally:
            if self.waiting:
                self._run_waiting()
