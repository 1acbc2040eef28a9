"""Serve runs of train.main in forked processes, which need not import the libraries again.

The server must not use torch before it forks: a fork after that may hang. Orders are JSON lines on
stdin, answers JSON lines on stdout; `Forks` is the client.
"""

import contextlib
import faulthandler
import gc
import glob
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import saboteurs
import torch

import train
from registry import METHODS, method_class

os.fsync = lambda handle: None  # as in conftest.py
LIMIT = 120  # seconds; no run here takes a third of it where the cores are free


class Forks:
    """Run train.main in new processes, without waiting for imports."""

    def __init__(self):
        root = Path(__file__).resolve().parent
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root.parent)}
        self.server = subprocess.Popen([sys.executable, root / "forked.py"], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env=environment)

    def __call__(self, *argv, out, **order):
        """Run and print into the file `out` -> the answer of `serve`, plus the printed `lines`."""
        order |= {"argv": [str(part) for part in argv], "out": str(out)}
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return answer | {"lines": Path(out).read_text(errors="replace").splitlines()}

    def close(self):
        self.server.stdin.close()
        self.server.wait(LIMIT)


def serve():
    """Carry out orders: {argv, out, processes, sabotage, signal, after or seen, times, to}.

    `sabotage` names a function of saboteurs.py for the children, `signal` is a number that is sent
    `after` seconds, or when a path matches `seen`, so many `times` to all or to one rank. The
    answer: statuses (negative: killed by that signal) and seconds.
    """
    preload()
    for line in sys.stdin:
        order = json.loads(line)
        start, processes = time.perf_counter(), order.get("processes", 1)
        port = free_port()
        children = [fork(order, rank, processes, port) for rank in range(processes)]
        statuses = watch(children, order, start)
        print(json.dumps({"statuses": statuses, "seconds": time.perf_counter() - start}),
              flush=True)


def preload():
    """Import what every child would import late, in more time than a tiny run takes."""
    import accelerate.commands.launch  # noqa: F401
    import datasets  # noqa: F401 (Accelerate asks for its classes in a run of several processes)
    import rouge_score.rouge_scorer  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    for name in METHODS:
        method_class(name)
    gc.freeze()  # as in conftest.py


def free_port():
    """Return a free port below the range of outgoing connections, which could take it."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def fork(order, rank, processes, port):
    """Start one process of a run -> its id."""
    child = os.fork()
    if child:
        return child
    try:
        handle = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        faulthandler.enable()  # on SIGABRT, a run that hangs prints its stack
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
                           "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1"}
        torch.set_num_threads(1)
        if "sabotage" in order:
            getattr(saboteurs, order["sabotage"])(rank)
        status = train.main(order["argv"])
        if status and processes > 1:
            print("main returned")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        leave(status)
    except BaseException:  # noqa: BLE001 (a child must not return into the server)
        traceback.print_exc()
        leave(1)


def leave(status):
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def watch(children, order, start):
    """Wait for all children, sending the signal of the order when its moment has come."""
    waiting, statuses = list(children), {}
    old = matches(order)  # left by an earlier run
    pending, limit = order.get("signal"), LIMIT
    while waiting:
        for child in list(waiting):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                waiting.remove(child)
                statuses[child] = os.waitstatus_to_exitcode(status)
        passed = time.perf_counter() - start
        due = ("after" in order and passed >= order["after"]
               or matches(order) - old)
        if pending and due:
            pending = None
            to = order.get("to")  # a rank, or all
            for _ in range(order.get("times", 1)):
                send(waiting if to is None else [children[to]], order["signal"])
                time.sleep(0.01)  # else the system joins equal signals
        if passed > limit:
            limit += 5  # for it to print where
            send(waiting, signal.SIGABRT)
        time.sleep(0.002)
    if limit > LIMIT:  # else a status of -6 reads as a crash of the run
        with open(order["out"], "a") as out:
            print(f"forked.py: no end after {LIMIT} s, so it sent SIGABRT", file=out)
    return [statuses[child] for child in children]


def matches(order):
    """Return the paths that match the order's `seen`, with their modification times."""
    found = set()
    for path in glob.glob(order.get("seen", "")):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, os.stat(path).st_mtime_ns))
    return found


def send(children, number):
    for child in children:
        os.kill(child, number)


if __name__ == "__main__":
    serve()
