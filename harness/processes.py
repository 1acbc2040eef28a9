"""What the processes of one run agree on: that they hold the same, and who says why they end."""

import contextlib
import ctypes
import os
import shlex
import signal
from datetime import timedelta

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import DistError, TCPStore

from inputs.errors import InputError

PATIENCE = timedelta(seconds=5)
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def end_with_launcher():
    """Get a SIGTERM when the launcher of this process ends first: it may pass none on (Linux).

    A launcher is told by the variables that it sets; so a shell that exports them counts as one.
    """
    if {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        with contextlib.suppress(AttributeError):  # another system than Linux
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def check_equal(accelerator, state, step):
    """Raise InputError unless all processes hold the same {name: tensor}, to the bit."""
    if accelerator.num_processes == 1:
        return
    sums = torch.stack([bit_sum(tensor) for tensor in state.values()])  # (tensors,)
    everywhere = accelerator.gather(sums[None])  # (processes, tensors)
    different = (everywhere != everywhere[0]).any(0).tolist()
    names = [name for name, differs in zip(state, different, strict=True) if differs]
    if names:
        raise InputError(f"the processes hold different adapters at step {step} ({len(names)} "
                         f"tensors, such as {names[0]}): do all of them have the same hardware "
                         "and libraries?")


def check_same(values, what):
    """Raise InputError unless all processes have the same {name: value}, of the kind `what`."""
    everywhere = gather_object([values])
    different = sorted({name for each in everywhere for name in each.keys() | values.keys()
                        if each.get(name) != everywhere[0].get(name)})
    if different:
        raise InputError(f"the processes have different {what}: {', '.join(different)}; do all of "
                         "them see the same files?")


def bit_sum(tensor):
    """A checksum of a tensor's bytes, an int64 scalar, that is quick on any device."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).to(torch.int64)
    return (data * torch.arange(1, len(data) + 1, device=data.device)).sum()


def launcher():
    """How this process was started: by python, or by accelerate launch with these settings."""
    processes = os.environ.get("WORLD_SIZE", "1")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if (processes, precision, backend) == ("1", "no", "no"):
        return "python"
    several = ["--multi_gpu"] if processes != "1" else []
    return shlex.join(["accelerate", "launch", *several, "--num_processes", processes,
                       "--mixed_precision", precision, "--dynamo_backend", backend])


class FirstToSay:
    """Calling it says whether this process is the first of the run to do so: it gives the reason.

    The others end because that one did, or for the same reason. `meet` opens the store by which
    they know; before that, the store of the launcher serves, where there is one.
    """

    def __init__(self):
        self.store = self.answer = None

    def meet(self, accelerator):
        """Called by all processes as soon as they can talk to each other."""
        if accelerator.num_processes == 1:
            return
        address, port = os.environ["MASTER_ADDR"], [None]
        if accelerator.is_main_process:
            self.store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            port = [self.store.port]
        broadcast_object_list(port)
        if not accelerator.is_main_process:
            self.store = TCPStore(address, port[0], is_master=False, timeout=PATIENCE)

    def __call__(self):
        if self.answer is None:
            self.answer = self._ask()
        return self.answer

    def _ask(self):
        launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            if self.store is None and launcher:
                self.store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                      is_master=False, timeout=PATIENCE)
            # Without a store: the only process, or nobody to ask; better said twice than never.
            return self.store is None or self.store.add("reasons given", 1) == 1
        except DistError:
            return False  # the process that kept the store has ended
