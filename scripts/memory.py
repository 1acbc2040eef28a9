"""Compare what `train.py --plan` says with the peaks of real training steps.

    python scripts/memory.py                              # SmolLM2 on this machine, float32
    python scripts/memory.py --processes 2 --model FOLDER --bf16

A peak is that of a process of its own, from the loaded model to the end of the second step: on a
GPU of its allocator, on a CPU of the resident memory beyond that of the libraries. What is compared
is the largest over the processes.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from accelerate import Accelerator, DistributedDataParallelKwargs  # noqa: E402
from transformers.models.llama import LlamaConfig, LlamaForCausalLM  # noqa: E402

import data  # noqa: E402
import models  # noqa: E402
from harness import plan, sharding  # noqa: E402
from harness.arguments import parse_flags, settings_of  # noqa: E402
from method import Stage  # noqa: E402
from quantized import quantise  # noqa: E402
from registry import EMBEDDED, method_class  # noqa: E402

STEPS = 2  # in the second, the optimizer has its moments


def resident(key):
    """Bytes of this process by /proc: VmRSS now, VmHWM at most."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[key].split()[0]) * 1024


def measured(args, dtype, device_of):
    """Peak bytes of a process beyond its libraries, in some training steps."""
    accelerator = device_of()
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    models.load_tokenizer(args.model)
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=64, intermediate_size=64,
                                        num_hidden_layers=1, num_attention_heads=2))
    tiny(input_ids=torch.ones(1, 9, dtype=torch.int64)).logits.sum().backward()
    before = 0 if cuda else resident("VmRSS")  # of libraries that have worked once
    model, _ = models.load(args.model, dtype)
    for weight in model.parameters():  # else the whole file stays mapped until the last one goes
        weight.data = weight.data.clone()
    method = method_class(args.method)(settings_of(args))
    method.base_sha256, method.device = "not asked for", device
    method.wrap(model, fresh=False)  # as many bytes, without the decomposition
    quantise(model, args.base, device)
    if accelerator.num_processes > 1:
        sharding.shard(model, sharding.mesh_of(accelerator), device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepared = sharding.prepare(accelerator, model)
    prepared.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    batch = plan.batch_of(args, plan.rows_of(args, accelerator.num_processes))
    batch = {key: value.to(device) if torch.is_tensor(value) else value
             for key, value in batch.items()}
    method.start_stage(Stage("memory", ("memory",), 1, 10**6), [batch])
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: loading took more
    for _ in range(STEPS):
        method.before_forward(batch)
        accelerator.backward(prepared(**data.model_inputs(batch), use_cache=False).loss)
        method.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before


def peak_of(words, processes, bf16):
    """The largest `measured` of so many new processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Freed memory must go back to the system, or the peak would be that of the allocator.
    lean = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                         "MALLOC_TOP_PAD_": "0",
                         "ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no"}
    if processes > 1:
        lean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
                 "LOCAL_WORLD_SIZE": str(processes)}
        if not torch.cuda.is_available():
            lean["ACCELERATE_USE_CPU"] = "true"
    started = [subprocess.Popen(
        [sys.executable, __file__, "--child", *words], text=True, stdout=subprocess.PIPE,
        env=lean | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}))
        for rank in range(processes)]
    answers = [process.communicate()[0].split() for process in started]
    if any(process.returncode for process in started):
        sys.exit("error: a process ended without a measurement")
    return max(int(answer[-1]) for answer in answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=EMBEDDED)
    add("--method", default="badit")
    add("--rows", default="4", help="of a micro-batch (default: 4)")
    add("--max_length", default="512", help="of every row (default: 512)")
    add("--bases", nargs="+", default=plan.BASES, choices=plan.BASES)
    add("--processes", type=int, default=1, help="that share the base")
    add("--only_checkpointed", action="store_true", help="with gradient checkpointing alone")
    add("--bf16", action="store_true")
    if "--child" in sys.argv:
        args, _ = parse_flags(sys.argv[2:])
        bf16 = os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
        print(measured(args, torch.bfloat16 if bf16 else torch.float32, lambda: Accelerator(
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])))
        return
    options = parser.parse_args()
    words = ["--model", options.model, "--method", options.method, "--batch_size", options.rows,
             "--max_length", options.max_length]
    args, _ = parse_flags(words)
    planned = {(row.base, row.processes): row for row in plan.plan(
        args, torch.bfloat16 if options.bf16 else torch.float32, options.bases)}
    print(f"{options.method} on {options.model}, {options.rows} x {options.max_length} tokens, "
          f"{'bf16' if options.bf16 else 'float32'}, {options.processes} process(es)")
    print("| base | checkpointing | planned MB | measured MB | measured / planned |")
    print("|---|---|---|---|---|")
    for base in options.bases:
        for checkpointing in (False, True)[options.only_checkpointed:]:
            total = planned[base, options.processes].total(checkpointing)
            peak = peak_of([*words, "--base", base,
                            *["--gradient_checkpointing"] * checkpointing], options.processes,
                           options.bf16)
            print(f"| {base} | {'yes' if checkpointing else 'no'} | {total / 1e6:.0f} | "
                  f"{peak / 1e6:.0f} | {peak / total:.3f} |", flush=True)


if __name__ == "__main__":
    main()
