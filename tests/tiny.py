"""Tiny layers, models, tasks and training steps that tests share."""

import itertools

import torch
from conftest import CONFIGS
from transformers import AutoModelForCausalLM

import data
import subspaces
from method import Stage

IN, OUT = 20, 24  # of bare layers
PROMPTS = [[1, 40, 17, 5, 9, 33], [1, 8], [1, *range(30, 55)], [1, 21, 22, 21]]


def randn(seed, *shape):
    """Return fixed float64 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(space):
    """Return P P' (d, d) of a basis P or a Complement."""
    if isinstance(space, subspaces.Complement):
        return torch.eye(len(space.N)).to(space.N) - space.N @ space.N.T
    return space @ space.T


def linear(seed=0, n=IN, m=OUT, bias=True, dtype=torch.float64):
    """Return a linear layer with fixed weights."""
    torch.manual_seed(seed)
    return torch.nn.Linear(n, m, bias=bias).to(dtype)


def base_model(architecture="llama", dtype=torch.float32):
    """Return a random model, the same at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype).eval()


def flattened(model, tokens=slice(None)):
    """`model`, whose last MLP gets inputs (batch * seq, hidden), or only some `tokens` of them."""
    mlp, given = model.model.layers[1].mlp, []

    def flatten(module, inputs):
        given.append(inputs[0].clone())
        return inputs[0].flatten(0, 1)[tokens]

    def unflatten(module, inputs, output):
        given[-1].flatten(0, 1)[tokens] = output
        return given[-1]

    mlp.register_forward_pre_hook(flatten)
    mlp.register_forward_hook(unflatten)
    return model


@torch.no_grad()
def logits_of(model, prompts=PROMPTS):
    """Return float32 logits of a left-padded batch, without padding."""
    batch = data.pad_left(prompts, 2)
    if hasattr(model, "adapted_by"):
        model.adapted_by.before_forward(batch)
    return model(**batch, use_cache=False).logits.float()[batch["attention_mask"].bool()]


def continuations(model, prompts=PROMPTS, **options):
    """Return new tokens of model.generate, called without a method's hooks."""
    batch = data.pad_left(prompts, 2)
    batch.pop("position_ids")
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=2,
                            pad_token_id=2, **options)
    return tokens[:, batch["input_ids"].shape[1]:].tolist()


def rows_of(task, count=8):
    """Return random training rows of several lengths; each task has its own words."""
    generator = torch.Generator().manual_seed(task)
    rows = []
    for i in range(count):
        ids = torch.randint(20 + 60 * task, 80 + 60 * task, (5 + 2 * i,), generator=generator)
        rows.append({"task": f"task{task}", "input_ids": [1, *ids.tolist()],
                     "num_targets": 1 + i % 3})
    return rows


def batch_of(rows, targets=None):
    """Collate a micro-batch; its loss is divided by `targets`, or its own target tokens."""
    own = sum(row["num_targets"] for row in rows if row)
    return data.collate_micro_batch([data.MicroBatch(rows, targets or own, 99)], 2)


def loader_of(rows, size=4):
    """Return the training loop's batches of `rows`, the last one with a filler."""
    parts = [rows[first:first + size] for first in range(0, len(rows), size)]
    parts[-1] = [*parts[-1], None]
    return [batch_of(part, sum(row["num_targets"] for row in rows)) for part in parts]


def stage_of(task, steps=4):
    return Stage(f"task{task}", (f"task{task}",), 1, steps)


def trainable(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def start(method, task, steps=4):
    """Call the first hook of a task."""
    torch.manual_seed(task)
    method.start_stage(stage_of(task, steps), loader_of(rows_of(task)))


def backward(method, batch):
    """Run a micro-batch through the hooks and add up gradients; return (loss, penalty)."""
    method.before_forward(batch)
    loss = method.model(**data.model_inputs(batch), use_cache=False).loss
    penalty = torch.as_tensor(method.penalty(batch))
    (loss + penalty).backward()
    return loss.item(), penalty.item()


def train(method, task, steps=4, learning_rate=3e-2):
    """Train with the loop's order of hooks; return losses and lines for regroup.jsonl."""
    optimizer = torch.optim.AdamW(trainable(method.model).values(), lr=learning_rate,
                                  weight_decay=0.0)
    method.model.train()
    losses, lines = [], []
    for batch in itertools.islice(itertools.cycle(loader_of(rows_of(task))), steps):
        losses.append(sum(backward(method, batch)))
        method.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        lines += method.after_step(batch)
    method.model.eval()
    return losses, lines


def learn(method, *tasks, steps=4):
    """Train whole tasks in sequence; return the losses of the last."""
    for task in tasks:
        start(method, task, steps)
        losses, _ = train(method, task, steps)
        method.end_stage(stage_of(task, steps), loader_of(rows_of(task)))
        method.model.eval()
    return losses


def weights_of(module):
    """Copy all parameters and buffers by name."""
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}


def assert_same(left, right):
    """Assert that two dicts of tensors are bitwise equal."""
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
