"""How a run starts and ends: the Accelerator, signals, and one line for whatever goes wrong."""

import errno
import importlib.util
import os
import shlex
import signal
import sys
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.commands.config.config_args import default_config_file

from harness import checkpoint, output_folder, processes, products, sharding
from harness.arguments import PAPER_BATCH, parse_flags
from harness.early import print_anything
from harness.run import say
from harness.signals import StopSignals
from inputs.errors import InputError, Interrupted, error_lines, one_line

# Of the disk, not of this program: one line, no traceback.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# What the launcher sets for what shards gradients, by the name that users know.
SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
           "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration"}


def carry_out(argv, execute):
    """Call execute(args, argv, stop, first_to_say) with the flags in `argv` -> exit status.

    0; 2 after one line on bad input; 128 + the signal's number after one that asked to stop.
    """
    print_anything()
    first_to_say = processes.FirstToSay()

    def end(status, reason):
        if first_to_say():
            print(reason, file=sys.stderr)
        return status

    with StopSignals() as stop:
        processes.end_with_launcher()
        try:
            args, _ = parse_flags(argv)
            output_folder.check(args)
            execute(args, argv, stop, first_to_say)
            return 0
        except InputError as error:
            return end(2, error_lines(error))
        except OSError as error:
            full = (f"; what was saved before is whole: make room there, then "
                    f"{command(args, argv, stop)}") if error.errno in DISK_ERRORS else ""
            return end(2, one_line(f"error: {error}{full}"))
        except (Interrupted, KeyboardInterrupt) as error:
            number = stop.received or signal.SIGINT
            whole = isinstance(error, Interrupted) and checkpoint.checkpoints_in(
                args.output_dir / checkpoint.FOLDER)
            saved = "saved" if whole else "nothing more was saved"
            return end(128 + number, one_line(f"stopped by {number.name}, {saved}; go on with: "
                                              f"{command(args, argv, stop)}"))
        except Exception as error:
            if is_out_of_memory(error):
                return end(2, one_line(f"error: {out_of_memory(args, stop)} ({error})"))
            if first_to_say():
                raise
            return 1


def is_out_of_memory(error):
    """Whether an exception says so, of a GPU's memory or of the machine's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error))


def out_of_memory(args, stop):
    """What to do where memory is short; a run cannot change its batches once it has begun."""
    kept = (f"; what was saved stays in {args.output_dir}, --resume goes on with it where there is "
            "more memory") if stop.deferred else ""
    return (f"out of memory with --batch_size {args.batch_size}, --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}, --max_length {args.max_length}, "
            f"--eval_batch_size {args.eval_batch_size}: halve the first and double the second for "
            "the same result, add --gradient_checkpointing, or lower the others" + kept)


def command(args, argv, stop):
    """The command that goes on with a run, or starts it again where it had not begun to write."""
    if args.shard_base and "--shard_base" not in argv:  # but --use_fsdp of the launcher
        argv = [*argv, "--shard_base"]
    if stop.deferred:
        argv = [*(word for word in argv if word not in ("--resume", "--overwrite")), "--resume"]
    threads = os.environ.get("OMP_NUM_THREADS")  # a run goes on with as many
    prefix = f"OMP_NUM_THREADS={shlex.quote(threads)} " if threads else ""
    return f"{prefix}{processes.launcher()} train.py {shlex.join(argv)}"


def base_dtype():
    """The type of the base's weights, by the launcher's precision. Raises InputError."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher sets
    if precision not in ("no", "bf16"):
        raise InputError(f"--mixed_precision {precision} is not supported; allowed: no, bf16"
                         f"{launcher_file('mixed_precision', precision)}")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_accelerator(args):
    """The Accelerator, and a batch size for every process. Raises InputError."""
    base_dtype()
    refuse_sharding()
    sharding.take_over(args)
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to}: not installed, run `pip install "
                         f"{args.report_to}`")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    # Buffers are groupings, equal on all processes by construction.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if args.shard_base:
        handlers.append(InitProcessGroupKwargs(timeout=sharding.TIMEOUT))
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir / "tracking",
            kwargs_handlers=handlers)
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise InputError("Accelerate does not start: what the launcher or the environment asks for "
                         f"does not fit this machine ({type(error).__name__}: {error})") from error
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
        say(accelerator, "--shard_base: nothing to share in one process")
        args.shard_base = False
    args.batch_size = args.batch_size or share_of_batch(accelerator)
    products.avoid_cudnn_attention()
    if accelerator.device.type == "cpu":
        products.use_onednn()
    return accelerator


def refuse_sharding():
    """Raise InputError where the launcher asks for what shards gradients, before it is obeyed."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "false").lower() not in ("false", "0", ""):
            raise InputError(f"{name} is not supported ({variable} is set): Eq. 8 needs whole "
                             "gradients; launch with --multi_gpu, or, to share the frozen base, "
                             "with --use_fsdp --fsdp_version 2"
                             f"{launcher_file('distributed_type', variable[15:])}")


def launcher_file(key, value):
    """Where Accelerate's default file is what asks for a value: its path, in words."""
    file = Path(default_config_file)
    said = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
    if not isinstance(said, dict) or str(said.get(key)).upper() != value.upper():
        return ""
    return (f"; {default_config_file}, which accelerate launch reads, asks for it: change that, or "
            "give --config_file")


def share_of_batch(accelerator):
    """Rows of a micro-batch where the global batch is the paper's. Raises InputError."""
    micro_batches = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if PAPER_BATCH % micro_batches:
        raise InputError(f"the global batch of {PAPER_BATCH} does not split over {micro_batches} "
                         "processes * accumulation steps: give --batch_size")
    return PAPER_BATCH // micro_batches


def greet(args, accelerator):
    """Say what runs where."""
    trains = "evaluation only" if args.eval_only else args.setting
    say(accelerator, f"badit: method {args.method}, {trains}, model {args.model}"
        f"{'' if args.base == 'dense' else f' stored as {args.base}'}, precision "
        f"{accelerator.mixed_precision}, processes {accelerator.num_processes}, device "
        f"{accelerator.device}")
    idle = (os.cpu_count() or 1) - torch.get_num_threads() * accelerator.num_processes
    if accelerator.device.type == "cpu" and idle > 0:
        say(accelerator, f"{idle} CPU cores stay idle: `accelerate launch "
            "--num_cpu_threads_per_process N`, or `python train.py`, uses them")
