"""Signals that ask a run to stop: at once or, once it has something to save, later."""

import contextlib
import os
import signal
import stat
import threading
import time

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO = 3  # seconds


class StopSignals:
    """A context in which SIGTERM, SIGHUP and Ctrl-C ask to stop: at once or, if `deferred`, later.

    A deferred signal is found in `received`. Another stops at once, by KeyboardInterrupt, unless it
    comes within ECHO seconds: launchers pass on what their processes have got themselves.
    """

    def __init__(self):
        self.received, self.since, self.deferred = None, None, False

    def __enter__(self):
        self.before = receive_stops(self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number):
        """Take a signal, of this process or another one of the run, as received now."""
        self.received, self.since = signal.Signals(number), time.monotonic()

    def _receive(self, number, frame):
        again = self.received is not None
        if again and time.monotonic() - self.since < ECHO:
            return
        self.note(number)
        if number == signal.SIGHUP:
            leave_terminal()
        if again or not self.deferred:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # not print: the signal may come in the middle of one
            os.write(2, f"\n{self.received.name}: stopping at the next checkpoint; another, after "
                        f"{ECHO} seconds, stops at once\n".encode())


def receive_stops(handler):
    """Let `handler` receive what asks to stop -> the handlers before, by signal.

    In a thread that is not the main one Python has no handlers: what runs there is not asked.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in STOPPING
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}  # by nohup


def leave_terminal():
    """Throw away what would be printed: the terminal, and what reads a pipe there, have gone."""
    with open(os.devnull, "w") as null:
        for stream in (1, 2):
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(null.fileno(), stream)
