"""Signals that stop a run: at once or, when it has something to save, at the next checkpoint."""

import contextlib
import os
import signal
import time

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO = 3  # seconds in which a repeated signal is ignored


class StopSignals:
    """A context in which SIGTERM and Ctrl-C stop the run: at once or, if `deferred`, later.

    A deferred signal is kept in `received`. A second one stops at once by KeyboardInterrupt. One
    within ECHO seconds is ignored: after a Ctrl-C the launcher sends the same signal again.
    """

    def __init__(self):
        self.received, self.since, self.deferred = None, None, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number):
        """Record a signal that this or another process of the run received."""
        self.received, self.since = signal.Signals(number), time.monotonic()

    def _receive(self, number, frame):
        again = self.received is not None
        if again and time.monotonic() - self.since < ECHO:
            return
        self.note(number)
        if again or not self.deferred:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # not print: the signal may interrupt one
            os.write(2, f"\n{self.received.name}: stopping at the next checkpoint; another signal "
                        f"after {ECHO} seconds stops at once\n".encode())
