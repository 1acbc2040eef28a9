"""Instruction-tuning suites: task orders, prompts, tokens and batches.

`python data.py download superni` fetches the paper's 15 tasks once and checks every file;
`python data.py convert SOURCE --to FOLDER` makes a suite of files in another layout.
"""

import random
import sys
from itertools import zip_longest
from typing import NamedTuple

import torch

from inputs import convert
from inputs.bars import Bar
from inputs.download import download
from inputs.errors import InputError, library_errors, one_line
from inputs.numbers import stable_seed
from inputs.settings import Parser
from inputs.suites import NAMED, ORDERS, SUPERNI, suite_folder
from inputs.task_files import SPLITS, Task, listed, read_task, resolve_names, task_folders
from metrics import counts_anything

FRAME = "Now complete the following example -\nInput: {input}\nOutput: "
PROMPT = "{definition}\n\n" + FRAME
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep",
                "num_items_in_batch")


class Suite(NamedTuple):
    name: str
    tasks: dict[str, Task]


# --- suites and orders --------------------------------------------------------------------------


def load_suite(name_or_path, data_dir=None):
    """Read a suite: "mini" (shipped), one of NAMED (data_dir, $BADIT_DATA, download), or a folder.

    A folder holds <task>/train.json and <task>/test.json in the natural-instructions layout.
    Raises InputError naming the file and the instance for anything malformed.
    """
    if name_or_path in NAMED:
        named = NAMED[name_or_path]
        folder = named.find(data_dir)
        return Suite(named.name, {name: read_task(folder / name, about)
                                  for name, about in named.tasks.items()})
    if data_dir is not None:
        raise InputError(f"--data_dir is read with --suite {' or '.join(NAMED)} only, not "
                         f"{name_or_path}")
    folder = suite_folder(name_or_path)
    return Suite(folder.resolve().name,
                 {name: read_task(folder / name) for name in task_folders(folder)})


def select_tasks(suite, names):
    """The suite cut to some tasks, by folder name or T-number. Raises InputError."""
    resolved = resolve_names(names, list(suite.tasks))
    return Suite(suite.name, {name: suite.tasks[name] for name in resolved})


def cut(suite, max_train, max_test):
    """The suite with the first so many rows of each task; None for all."""
    return suite._replace(tasks={name: task._replace(train=task.train[:max_train],
                                                     test=task.test[:max_test])
                                 for name, task in suite.tasks.items()})


def task_order(names, seed, explicit=None):
    """The order in which sequential training sees the tasks `names`.

    SuperNI and its subsets: Table 5's list shuffled by the seed. Any other suite: sorted names,
    shuffled. `explicit` (folder names or T-numbers) must name each task once, or is one of ORDERS.
    """
    names = list(names)
    if explicit is not None and len(explicit) == 1 and explicit[0] in set(ORDERS) - set(names):
        order = ORDERS[explicit[0]]
        other = [name for name in names if name not in order]
        if other:
            raise InputError(f"--task_order {explicit[0]} is for tasks of long_sequence, not for "
                             f"{listed(other)}")
        return [name for name in order if name in names]
    if explicit is not None:
        order = resolve_names(explicit, names)
        if len(order) != len(names):
            missing = [name for name in names if name not in order]
            raise InputError(f"--task_order leaves out {', '.join(missing)}")
        return order
    known = all(name in SUPERNI for name in names)
    order = list(SUPERNI) if known else sorted(names)
    random.Random(seed).shuffle(order)
    return [name for name in order if name in names]


# --- tokenising ---------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A tokenised suite: rows by task, and what did not fit into max_length."""

    train: dict[str, list]  # rows of task, id, input_ids (prompt + target), num_targets
    test: dict[str, list]  # rows of task, id, prompt, input_ids, references
    left_out: list[tuple[str, str]]  # (task, id) of training instances
    shortened: dict[str, int]  # instances with a cut input field, by split


def build_prompt(definition, input_text):
    """The prompt of one instance; the answer follows it directly."""
    frame = PROMPT if definition else FRAME
    return frame.format(definition=definition, input=input_text)


def encode_turns(turns, tokenizer, chat_template=False):
    """A dialogue of prompts and answers in turn, up to a last prompt -> (its text, token ids)."""
    if not chat_template:
        pairs = zip_longest(turns[::2], turns[1::2], fillvalue="")
        text = "\n\n".join(prompt + answer for prompt, answer in pairs)
        encoding = tokenizer(text, return_special_tokens_mask=True)
        ids, added = encoding.input_ids, encoding.special_tokens_mask
        while added and added.pop():  # at its end, such as an EOS: the answer comes there
            ids.pop()
        return text, ids
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "assistant" if number % 2 else "user", "content": content}
             for number, content in enumerate(turns)], tokenize=False, add_generation_prompt=True,
            enable_thinking=False)  # Qwen3 would think aloud before a label; others ignore it
        return text, tokenizer(text, add_special_tokens=False).input_ids
    except Exception as error:  # noqa: BLE001 (a template is a program)
        raise InputError(f"--chat_template: this tokenizer's template fails "
                         f"({type(error).__name__}: {error})") from error


def encode_suite(suite, tokenizer, max_length, chat_template=False, splits=SPLITS):
    """Tokenise all tasks of a suite -> Encoded; of other `splits` there are no rows.

    `max_length` bounds prompt + target in training and the prompt alone in evaluation. Too long an
    instance loses the end of its input field, never of definition, frame or target; a training
    instance that still does not fit is left out, an evaluation instance never. Raises InputError
    for a task left without training instances, or a tokenizer without EOS or chat template where
    one is needed.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token: nothing would end an answer")
    if chat_template and not tokenizer.chat_template:
        raise InputError("--chat_template: this tokenizer has no chat template")
    encoded = Encoded({}, {}, [], {split: 0 for split in SPLITS})
    total = sum(len(getattr(task, split)) for task in suite.tasks.values() for split in splits)
    with Bar(total=total, desc="tokenise", unit="row", delay=2, leave=False) as bar:
        for name, task in suite.tasks.items():
            train, test = (_encode_split(task, split, tokenizer, max_length, chat_template, bar)
                           if split in splits else [] for split in SPLITS)
            fits = [row for row in train if len(row["input_ids"]) <= max_length]
            if train and not fits:
                needed = min(len(row["input_ids"]) for row in train)
                raise InputError(f"no training instance of {name} fits into --max_length "
                                 f"{max_length}; the smallest that lets one in is {needed}")
            encoded.left_out.extend((name, row["id"]) for row in train
                                    if len(row["input_ids"]) > max_length)
            encoded.train[name], encoded.test[name] = fits, test
            for split, rows in (("train", fits), ("test", test)):
                encoded.shortened[split] += sum(row.pop("shortened") for row in rows)
    return encoded


def describe(suite, encoded, max_length):
    """Lines about what of a suite is used, and how."""
    counts = [sum(map(len, split.values())) for split in (encoded.train, encoded.test)]
    yield (f"suite {suite.name}: {len(suite.tasks)} tasks, {counts[0]} training and {counts[1]} "
           f"test instances; input shortened to fit {max_length} tokens: "
           f"{encoded.shortened['train']} and {encoded.shortened['test']}")
    assumed = [f"{name} {task.metric}" for name, task in suite.tasks.items()
               if name not in SUPERNI]
    if assumed:
        yield f"metrics (JSON key Metric, default rouge_l): {', '.join(assumed)}"
    for name, task in suite.tasks.items():
        references = [row["references"] for row in encoded.test[name]]
        empty = sum(not any(counts_anything(text, task.metric) for text in texts)
                    for texts in references)
        if empty:
            yield (f"{name}: {empty} of {len(references)} test items have no reference with "
                   f"anything that {task.metric} counts")
    for task, name in encoded.left_out:
        yield f"left out, does not fit {max_length} tokens without input: {task} {name}"


def _encode_split(task, split, tokenizer, max_length, chat_template, bar):
    """Rows of one split."""
    rows = []
    with library_errors(f"the tokenizer fails on {task.name}"):
        for instance in getattr(task, split):
            target = []
            if split == "train":
                ids = tokenizer(instance["outputs"][0], add_special_tokens=False).input_ids
                target = [*ids, tokenizer.eos_token_id]
            prompt, ids, shortened = _fit_prompt(task.definition, instance["input"], tokenizer,
                                                 max_length - len(target), chat_template)
            row = {"task": task.name, "id": instance["id"], "input_ids": ids + target,
                   "shortened": shortened}
            rows.append(row | ({"num_targets": len(target)} if split == "train" else
                               {"prompt": prompt, "references": instance["outputs"]}))
            bar.update()
    return rows


def _fit_prompt(definition, text, tokenizer, budget, chat_template):
    """The longest prompt of at most `budget` tokens -> (prompt, ids, whether it was shortened).

    Cuts characters off the end of `text` by bisection; an empty input may exceed the budget.
    """

    def encode(length):
        return encode_turns([build_prompt(definition, text[:length])], tokenizer, chat_template)

    prompt, ids = encode(len(text))
    if len(ids) <= budget:
        return prompt, ids, False
    fits, exceeds = 0, len(text)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if len(encode(middle)[1]) <= budget:
            fits = middle
        else:
            exceeds = middle
    return *encode(fits), True


# --- batching -----------------------------------------------------------------------------------


def plan_epoch(lengths, global_batch_size, seed, stage, epoch):
    """The row numbers of every global batch of one epoch, rows of similar length together.

    Every row once; a short last batch is filled with -1. Depends on nothing but the arguments, so
    neither on the number of processes nor on accumulation.
    """
    shuffle = random.Random(stable_seed("order", seed, stage, epoch))
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    chunk = 32 * global_batch_size  # sorted within chunks: short padding, yet random batches
    batches = []
    for start in range(0, len(order), chunk):
        rows = sorted(order[start:start + chunk], key=lambda row: lengths[row], reverse=True)
        batches += [rows[first:first + global_batch_size]
                    for first in range(0, len(rows), global_batch_size)]
    *batches, last = batches  # the only one that may be short
    shuffle.shuffle(batches)
    return [*batches, last + [-1] * (global_batch_size - len(last))]


class MicroBatch(NamedTuple):
    """What one process sees of one global batch at a time."""

    rows: list  # training rows, None where the last global batch of an epoch is short
    num_target_tokens: int  # of the whole global batch: its loss is a mean over these
    num_tokens: int  # of the whole global batch, padding left out


class EpochPlan(torch.utils.data.Dataset):
    """The micro-batches of one epoch in the order in which processes take them in turn.

    Accelerate calls `set_epoch` at the start of every pass.
    """

    def __init__(self, rows, global_batch_size, micro_batch_size, seed, stage):
        self.rows, self.seed, self.stage = rows, seed, stage
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.micro_batches = []
        for batch in plan_epoch(self.lengths, self.global_batch_size, self.seed, self.stage, epoch):
            rows = [None if row < 0 else self.rows[row] for row in batch]
            targets = sum(row["num_targets"] for row in rows if row)
            tokens = sum(len(row["input_ids"]) for row in rows if row)
            for first in range(0, len(rows), self.micro_batch_size):
                part = rows[first:first + self.micro_batch_size]
                self.micro_batches.append(MicroBatch(part, targets, tokens))

    def __len__(self):
        return len(self.micro_batches)

    def __getitem__(self, index):
        return self.micro_batches[index]


def collate(rows, pad_token_id, num_target_tokens):
    """Left-padded tensors of training rows, with logits only where there are targets.

    Returns input_ids, attention_mask, position_ids (batch, seq), labels (batch, k), and the ints
    logits_to_keep = k = longest target + 1 and num_items_in_batch = num_target_tokens. A row that
    is None is a filler: no attention, no target. Masks come from lengths, never from token ids.
    """
    rows = [row or {"input_ids": [], "num_targets": 0} for row in rows]
    batch = pad_left([row["input_ids"] for row in rows], pad_token_id)
    k = max(row["num_targets"] for row in rows) + 1
    k = min(k, batch["input_ids"].shape[1])
    labels = batch["input_ids"][:, -k:].clone()  # (batch, k)
    for label, row in zip(labels, rows, strict=True):
        label[:k - row["num_targets"]] = -100
    return batch | {"labels": labels, "logits_to_keep": k,
                    "num_items_in_batch": num_target_tokens}


def collate_micro_batch(batches, pad_token_id):
    """A DataLoader's collate function for an EpochPlan: `collate`, plus what is not for the model.

    That is the int num_tokens, and tasks: the task of every row, None for a filler.
    """
    (batch,) = batches
    return collate(batch.rows, pad_token_id, batch.num_target_tokens) | {
        "num_tokens": batch.num_tokens, "tasks": [row and row["task"] for row in batch.rows]}


def model_inputs(batch):
    """What of a batch is for the model's forward pass."""
    return {key: batch[key] for key in MODEL_INPUTS}


def pad_left(sequences, pad_token_id):
    """Lists of token ids -> input_ids, attention_mask and position_ids, each (batch, seq)."""
    longest = max(1, *map(len, sequences)) if sequences else 1
    ids = [[pad_token_id] * (longest - len(ids)) + ids for ids in sequences]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
    input_ids, attention_mask = torch.tensor(ids), torch.tensor(mask)  # (batch, seq)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


# --- the command line ---------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(prog="data.py", allow_abbrev=False,
                    description="Fetch, check or make suites of tasks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("download", "fetch a suite and check it"),
                       ("verify", "check the files of a suite that is there")):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("suite", choices=NAMED)
        command.add_argument("--data_dir", help="folder of the suite (default: in $BADIT_DATA, or "
                             "in the user's cache)")
    text = "make a suite of files in another layout"
    convert.add_flags(commands.add_parser("convert", help=text, description=text,
                                          allow_abbrev=False))
    try:
        args = parser.parse_args(argv)
        lines = convert.convert(args) if args.command == "convert" else fetch(args)
        for line in lines:
            print(one_line(line))
    except (InputError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


def fetch(args):
    """Download a suite, unless it is only to be verified; yield a line about it."""
    named = NAMED[args.suite]
    folder = named.folder(args.data_dir)
    if args.command == "download":
        download(folder, named.url, named.manifest(), named.checksum)
    suite = load_suite(named.name, args.data_dir)
    counts = [sum(len(getattr(task, split)) for task in suite.tasks.values()) for split in SPLITS]
    yield (f"{folder}: {len(suite.tasks)} tasks, {counts[0]} training and {counts[1]} test "
           "instances, all checksums right")


if __name__ == "__main__":
    sys.exit(main())
