"""Start and end a run: the Accelerator, matmul backends, signals, and one line for every error."""

import errno
import importlib.util
import os
import shlex
import signal
import sys
import traceback

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, is_initialized

from harness import checkpoint, output_folder, processes, sharding
from harness.arguments import PAPER_BATCH, PATH_FLAGS, parse_flags, rank_prefix
from harness.run import print_main
from harness.signals import StopSignals
from inputs.errors import (
    InputError,
    Interrupted,
    error_lines,
    escape_output,
    is_out_of_memory,
    one_line,
)
from registry import METHODS

# Errors of the disk, not of this program: one line, no traceback.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# Launcher variables that shard gradients, by the name that users know.
SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
           "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration"}
FLOAT32 = 1e-5  # relative error: float32's is below 1e-6, TF32's above 1e-4, bf16's above 1e-3


def carry_out(argv, execute):
    """Call execute(args, argv, stop) with the flags in `argv` -> exit status.

    0; 2 after one line on bad input; 128 + the signal's number after a signal. Each process prints
    its own line.
    """
    escape_output()

    def end(status, reason):
        print(rank_prefix() + reason, file=sys.stderr)
        if several_processes():
            leave_now(status)
        return status

    args = None
    with StopSignals() as stop:
        try:
            args, _ = parse_flags(argv)
            output_folder.check(args, PATH_FLAGS)
            execute(args, argv, stop)
            return 0
        except InputError as error:
            return end(2, error_lines(error))
        except OSError as error:
            disk = (f"; what was saved before is intact. When the disk can be written again: "
                    f"{command(args, argv, stop)}") if args and error.errno in DISK_ERRORS else ""
            return end(2, one_line(f"error: {error}{disk}"))
        except (Interrupted, KeyboardInterrupt) as error:
            number = stop.received or signal.SIGINT
            if args is None:
                return end(128 + number, f"stopped by {number.name}")
            saved = isinstance(error, Interrupted) and checkpoint.checkpoints_in(
                args.output_dir / checkpoint.FOLDER)
            return end(128 + number, one_line(
                f"stopped by {number.name}, {'saved' if saved else 'nothing more was saved'}; "
                f"continue with: {command(args, argv, stop)}"))
        except Exception as error:
            if args is None or not is_out_of_memory(error):
                if several_processes():
                    traceback.print_exc()
                    leave_now(1)
                raise
            return end(2, one_line(f"error: {out_of_memory(args, stop)} ({error})"))


def several_processes():
    """Return whether Accelerate has started and this is one of several processes."""
    return is_initialized() and AcceleratorState().num_processes > 1


def leave_now(status):
    """End this process before the frames of its exception are freed.

    With them goes the DDP model. The destructor of its gloo group joins a thread that may wait for
    Python's lock, which this thread holds: now and then the process would never end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def out_of_memory(args, stop):
    """Return advice for a run that is out of memory; its batches are fixed once it has begun."""
    kept = (f"; what was saved stays in {args.output_dir}, --resume continues it where there is "
            "more memory") if stop.deferred else ""
    return (f"out of memory with --batch_size {args.batch_size}, --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}, --max_length {args.max_length}, "
            f"--eval_batch_size {args.eval_batch_size}: halve --batch_size and double "
            "--gradient_accumulation_steps for the same result, add --gradient_checkpointing, or "
            "lower --max_length or --eval_batch_size" + kept)


def command(args, argv, stop):
    """Return the command that continues a run, or starts it again if it had written nothing."""
    if args.shard_base and "--shard_base" not in argv:  # asked for by the launcher's --use_fsdp
        argv = [*argv, "--shard_base"]
    if stop.deferred:
        argv = [*(word for word in argv if word not in ("--resume", "--overwrite")), "--resume"]
    return f"{processes.launcher()} train.py {shlex.join(argv)}"


# --- the Accelerator ----------------------------------------------------------------------------


def make_accelerator(args):
    """Return the Accelerator, and set the batch size per process. Raises InputError."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise InputError(f"--mixed_precision {precision} is not supported; allowed: no, bf16")
    refuse_sharding()
    sharding.take_over(args)
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to}: not installed, run `pip install "
                         f"{args.report_to}`")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    # The buffers are groupings, which all processes compute alike.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False,
                                              gradient_as_bucket_view=True)]
    if args.shard_base:
        handlers.append(InitProcessGroupKwargs(timeout=sharding.TIMEOUT))
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir / "tracking",
            kwargs_handlers=handlers)
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError("Accelerate does not start: the launcher or the environment asks for "
                         "something that this machine cannot do "
                         f"({type(error).__name__}: {error})") from error
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise InputError(f"the launcher asks for {accelerator.gradient_accumulation_steps} "
                         "accumulation steps: give --gradient_accumulation_steps to train.py, not "
                         "to accelerate launch")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(f"distributed training by {kind} is not supported, only DDP on GPUs or "
                         "CPUs")
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != str(accelerator.num_processes):
        raise InputError(f"the launcher started {launched} processes, Accelerate sees "
                         f"{accelerator.num_processes}: on a machine without GPUs set "
                         "ACCELERATE_USE_CPU=true")
    if args.shard_base and accelerator.num_processes == 1:
        print_main(accelerator, "--shard_base has no effect in one process")
        args.shard_base = False
    trains = METHODS[args.method].trains and not args.eval_only
    args.batch_size = args.batch_size or share_of_batch(accelerator, trains)
    if accelerator.device.type == "cpu":
        use_onednn()
    return accelerator


def refuse_sharding():
    """Raise InputError if the launcher would shard gradients."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "false").lower() not in ("false", "0", ""):
            raise InputError(f"{name} is not supported ({variable} is set): Eq. 8 needs whole "
                             "gradients; launch with --multi_gpu or, to shard the frozen base, "
                             "with --use_fsdp --fsdp_version 2")


def share_of_batch(accelerator, trains):
    """Return the rows of a micro-batch at the paper's global batch.

    Raises InputError if something is trained and the processes do not divide that batch.
    """
    micro_batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if PAPER_BATCH % micro_batches and trains:
        raise InputError(f"the global batch of {PAPER_BATCH} does not split over {micro_batches} "
                         "processes * accumulation steps: give --batch_size")
    return max(1, PAPER_BATCH // micro_batches)


def greet(args, accelerator):
    """Print what runs where."""
    trains = "evaluation only" if args.eval_only else args.setting
    print_main(accelerator, f"badit: method {args.method}, {trains}, model {args.model}"
               f"{'' if args.base == 'dense' else f' stored as {args.base}'}, precision "
               f"{accelerator.mixed_precision}, processes {accelerator.num_processes}, device "
               f"{accelerator.device}")
    idle = (os.cpu_count() or 1) - torch.get_num_threads() * accelerator.num_processes
    if accelerator.device.type == "cpu" and idle > 0:
        print_main(accelerator, f"{idle} CPU cores stay idle: {more_threads()} to use them")


def more_threads():
    """Return advice on how to use more CPU threads."""
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # accelerate launch sets OMP_NUM_THREADS itself
        return "give --num_cpu_threads_per_process N to accelerate launch"
    return f"{'raise' if 'OMP_NUM_THREADS' in os.environ else 'set'} OMP_NUM_THREADS"


# --- matmul backends ----------------------------------------------------------------------------
# PyTorch multiplies bf16 matrices with oneDNN and float32 ones with MKL, which takes about twice as
# long on the AMD processor of docs/speed.md. With fp32_precision "bf16" oneDNN multiplies float32
# ones as well. A processor with AMX then rounds them to bf16, others keep float32. So we measure
# whether this one rounds.


def use_onednn():
    """Let oneDNN multiply on this CPU if it keeps float32 precision -> whether it does.

    It changes results by rounding alone, and equally in every run on a machine.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    if not products_are_float32():
        matmul.fp32_precision = before
        return False
    return True


def products_are_float32():
    """Return whether the products of a layer's forward and backward pass have float32 precision."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 16, 256):  # a decoded token, a batch of them, a training step
        x, W, g = (torch.randn(shape, generator=generator)
                   for shape in ((tokens, 192), (320, 192), (tokens, 320)))
        for left, right in ((x, W.T), (g, W), (g.T, x)):
            for batched in (False, True):  # attention multiplies batches of matrices
                pair = [each.expand(2, *each.shape) if batched else each for each in (left, right)]
                exact = pair[0].double() @ pair[1].double()
                if ((pair[0] @ pair[1]).double() - exact).norm() > FLOAT32 * exact.norm():
                    return False
    return True
