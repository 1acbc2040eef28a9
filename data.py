"""Instruction-tuning suites: task orders, prompts, tokens and batches.

`python data.py download superni` downloads the paper's 15 tasks and checks every file;
`python data.py convert SOURCE --to FOLDER` makes a suite of files in another layout.
"""

import datetime
import random
import re
import sys
from itertools import zip_longest
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from inputs.errors import InputError, exit_status, library_errors, one_line
from inputs.numbers import stable_seed
from inputs.settings import REQUIRED, Flag, Parser, add_flags
from inputs.suites import NAMED, ORDERS, SUPERNI, suite_folder
from inputs.task_files import (
    SPLITS,
    Task,
    listed,
    read_task,
    resolve_names,
    task_folders,
    unread_files,
)
from metrics import bare, counts_anything, exact_match

FRAME = "Now complete the following example -\nInput: {input}\nOutput: "
PROMPT = "{definition}\n\n" + FRAME
MARKER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for a text in a chat template
TEMPLATE_FAILS = "--chat_template: this tokenizer's template fails"
# A chat template may write today's date by strftime_now. A fixed date (the one that Llama 3.2's
# template falls back to) gives a run the same prompts on the day that it is resumed or repeated.
FIXED_DATE = datetime.date(2024, 7, 26)
DATE_MACRO = "{% macro strftime_now(format) %}{{ format" + "".join(
    f" | replace('%{code}', '{FIXED_DATE.strftime('%' + code)}')"
    for code in ("-d", "-m", *"aAbBcdDeFhHIjmMpSxXyY")) + " }}{% endmacro +%}"
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep",
                "num_items_in_batch")
SUITE_FLAGS = (
    Flag("suite", Literal[tuple(NAMED)], REQUIRED, "the suite", positional=True),
    Flag("data_dir", str | None, None, "folder of the suite (default: in $BADIT_DATA, or in the "
         "user's cache)"),
)


class Suite(NamedTuple):
    name: str
    tasks: dict[str, Task]
    unread: tuple[str, ...] = ()  # data files that no run reads, such as TASK/dev.json


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
    names = task_folders(folder)
    unread = (f"{name}/{file}" for name in names for file in unread_files(folder / name))
    return Suite(folder.resolve().name, {name: read_task(folder / name) for name in names},
                 tuple(unread))


def select_tasks(suite, names):
    """Return the suite with some of its tasks, by folder name or T-number. Raises InputError."""
    resolved = resolve_names(names, list(suite.tasks))
    return suite._replace(
        tasks={name: suite.tasks[name] for name in resolved},
        unread=tuple(file for file in suite.unread if file.partition("/")[0] in resolved))


def cut(suite, max_train, max_test):
    """Return the suite with the first `max_train` and `max_test` rows of each task (None: all)."""
    return suite._replace(tasks={name: task._replace(train=task.train[:max_train],
                                                     test=task.test[:max_test])
                                 for name, task in suite.tasks.items()})


def hold_out(suite, count):
    """Return the suite with the last `count` training rows of each task as its test rows.

    These held-out rows serve to choose settings and are not trained on. Raises InputError for a
    task without other training rows.
    """
    for name, task in suite.tasks.items():
        if len(task.train) <= count:
            raise InputError(f"--validation {count} leaves {name} nothing to train on: it has "
                             f"{len(task.train)} training rows")
    return suite._replace(tasks={
        name: task._replace(train=task.train[:-count], test=task.train[-count:])
        for name, task in suite.tasks.items()})


def task_order(names, seed, explicit=None):
    """Return the order in which sequential training takes the tasks `names`.

    SuperNI and its subsets: the list of Table 5 shuffled by the seed. Other suites: the sorted
    names shuffled. `explicit` names each task once (folder names or T-numbers), or one of ORDERS.
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
    """A tokenised suite: rows by task, and counts of instances that distort a score."""

    train: dict[str, list]  # rows of task, id, input_ids (prompt + target), num_targets
    test: dict[str, list]  # rows of task, id, prompt, input_ids, references, target_tokens
    left_out: list[tuple[str, str]]  # (task, id) of training instances
    # Numbers of instances, by split and task:
    shortened: dict[str, dict[str, int]]  # with a cut input field
    unwritable: dict[str, dict[str, int]]  # with no answer that the tokenizer can write in full
    unknown: dict[str, dict[str, int]]  # with unknown tokens in the prompt
    answer_tokens: dict[str, list]  # of the shortest reference of every test row, by task


COUNTED = ("shortened", "unwritable", "unknown")


def build_prompt(definition, input_text):
    """Return the prompt of one instance; the answer follows it directly."""
    frame = PROMPT if definition else FRAME
    return frame.format(definition=definition, input=input_text)


class Framer:
    """Tokenise texts; only the frame and the chat template give special tokens, never a text.

    A "<|im_end|>" in an input is tokenised as ordinary characters. Raises InputError for a
    tokenizer without EOS, and for one without a chat template where `chat_template` asks for it.
    """

    def __init__(self, tokenizer, chat_template=False):
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token: nothing would end an answer")
        if chat_template and not tokenizer.chat_template:
            raise InputError("--chat_template: this tokenizer has no chat template")
        self.tokenizer, self.chat_template = tokenizer, ""
        if chat_template:
            with library_errors(TEMPLATE_FAILS):
                self.chat_template = tokenizer.get_chat_template()
                if "strftime_now" in self.chat_template:
                    self.chat_template = DATE_MACRO + self.chat_template
        self.special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()
                        if token.special}
        self.special_ids = set(self.special.values())
        self.unknown_id = tokenizer.unk_token_id
        if self.unknown_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            self.unknown_id = None  # as in GPT-2, whose bytes are never unknown
        longest_first = sorted(self.special, key=len, reverse=True)
        self.spelt = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.frames = {}  # text of the template around the turns, by number of turns

    def text(self, text):
        """Return the ids of a text, such as an answer, without added tokens."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def written(self, text):
        """Return what decoding an answer's tokens gives, without white space.

        A model cannot write more of the answer.
        """
        return "".join(self.tokenizer.decode(self.text(text), skip_special_tokens=True).split())

    def prompt(self, definition, text):
        """Return (prompt, ids) of an instance."""
        return self.turns([build_prompt(definition, text)])

    def turns(self, turns):
        """Return (text, ids) of a dialogue: prompts and answers in turn, a prompt last."""
        if not self.chat_template:
            pairs = zip_longest(turns[::2], turns[1::2], fillvalue="")
            text = "\n\n".join(prompt + answer for prompt, answer in pairs)
            encoding = self.tokenizer(text, return_special_tokens_mask=True,
                                      split_special_tokens=True)
            ids, added = encoding.input_ids, encoding.special_tokens_mask
            while added and added.pop():  # a final EOS would stand before the answer
                ids.pop()
            return text, ids
        text = self._in_template(turns)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(turns) not in self.frames:
            self.frames[len(turns)] = self._in_template([MARKER] * len(turns)).split(MARKER)
        frame = self.frames[len(turns)]
        its_own = sum(len(self.spelt.findall(part)) for part in frame)
        if sum(id in self.special_ids for id in ids) > its_own:
            ids = self._around(frame, turns, text)
        return text, ids

    def _around(self, frame, turns, text):
        """Return the ids of a dialogue in which a text spells a special token."""
        for texts in (turns, [turn.strip() for turn in turns]):  # templates may strip them
            pieces = [piece for pair in zip_longest(frame, texts, fillvalue="") for piece in pair]
            if "".join(pieces) == text:
                break
        else:
            raise InputError("--chat_template: the text spells a special token, and this "
                             f"tokenizer's template changes it: {turns[0]!r:.60}")
        ids, between = [], ""  # ids so far, and the text since the last special token
        for part, turn in zip_longest(frame, texts, fillvalue=""):
            for piece in self.spelt.split(part):
                if piece in self.special:
                    ids += [*self.text(between), self.special[piece]]
                    between = ""
                else:
                    between += piece
            between += turn
        return ids + self.text(between)

    def _in_template(self, turns):
        """Return the text of a dialogue up to the beginning of the model's next turn."""
        with library_errors(TEMPLATE_FAILS):
            return self.tokenizer.apply_chat_template(
                [{"role": "assistant" if number % 2 else "user", "content": content}
                 for number, content in enumerate(turns)], tokenize=False,
                add_generation_prompt=True, chat_template=self.chat_template,
                enable_thinking=False)  # Qwen3 would reason before a label; others ignore it


def encode_suite(suite, tokenizer, max_length, chat_template=False, splits=SPLITS):
    """Tokenise some `splits` of all tasks of a suite and return an Encoded.

    `max_length` limits prompt + target in training and the prompt in evaluation. An instance that
    is too long loses the end of its input, never of definition, frame or target. A training
    instance that still does not fit is left out; an evaluation instance is kept. Raises InputError
    for a task left without training instances, or of whose answers nothing can be tokenised, and
    as Framer does.
    """
    framer = Framer(tokenizer, chat_template)
    encoded = Encoded({}, {}, [], *({split: {} for split in SPLITS} for _ in COUNTED), {})
    total = sum(len(getattr(task, split)) for task in suite.tasks.values() for split in splits)
    with tqdm(total=total, desc="tokenise", unit="row", delay=2, leave=False) as bar:
        for name, task in suite.tasks.items():
            with library_errors(f"the tokenizer fails on {name}"):
                train, test = (_encode_split(task, split, framer, max_length, bar)
                               if split in splits else [] for split in SPLITS)
            fits = [row for row in train if len(row["input_ids"]) <= max_length]
            if train and not fits:
                needed = min(len(row["input_ids"]) for row in train)
                raise InputError(f"no training instance of {name} fits into --max_length "
                                 f"{max_length}; the smallest that lets one in is {needed}")
            encoded.left_out.extend((name, row["id"]) for row in train
                                    if len(row["input_ids"]) > max_length)
            encoded.train[name], encoded.test[name] = fits, test
            encoded.answer_tokens[name] = [row.pop("answer_tokens") for row in test]
            for split, rows in (("train", fits), ("test", test)):
                if rows and all([row.pop("blank") for row in rows]):
                    answer = getattr(task, split)[0]["outputs"][0]
                    raise InputError(f"the tokenizer has no tokens for any answer of {name} "
                                     f"({split}), such as {answer!r:.60}")
                for what in COUNTED:
                    getattr(encoded, what)[split][name] = sum(row.pop(what) for row in rows)
    return encoded


def describe(suite, encoded, max_length, max_new_tokens):
    """Yield lines about the used part of a suite, and about instances that distort its scores."""
    counts = [sum(map(len, split.values())) for split in (encoded.train, encoded.test)]
    shortened = [sum(encoded.shortened[split].values()) for split in SPLITS]
    yield (f"suite {suite.name}: {len(suite.tasks)} tasks, {counts[0]} training and {counts[1]} "
           f"test instances; input shortened to fit {max_length} tokens: "
           f"{shortened[0]} and {shortened[1]}")
    own = [f"{name} {task.metric}" for name, task in suite.tasks.items()
           if SUPERNI.get(name, (None, None))[1] != task.metric]
    if own:
        yield f"metrics (JSON key Metric, default rouge_l): {', '.join(own)}"
    if suite.unread:
        yield f"not read: {listed(suite.unread)}"
    for task in suite.tasks.values():
        yield from _describe_task(task, encoded, suite.unread, max_length, max_new_tokens)
    for task, name in encoded.left_out:
        yield f"left out, does not fit {max_length} tokens without input: {task} {name}"


def _describe_task(task, encoded, unread, max_length, max_new_tokens):
    """Yield lines about instances that distort the score of a task."""
    train, test = encoded.train[task.name], encoded.test[task.name]
    shortened = [encoded.shortened[split][task.name] for split in SPLITS]
    if any(shortened):
        yield (f"{task.name}: input shortened to fit {max_length} tokens in {shortened[0]} of "
               f"{len(train)} training and {shortened[1]} of {len(test)} test items")
    new = _unseen_labels(task) if train else 0
    if new:
        yield (f"{task.name}: {new} of {len(test)} test items have a label that no training item "
               "has")
    if f"{task.name}/labels.json" in unread and task.metric == "rouge_l":
        yield (f"{task.name}: it has a labels.json, and is scored by rouge_l: a key Metric, or "
               "`python data.py convert`, makes that accuracy")
    for what, words in (("unwritable", "no answer that the tokenizer can write in full"),
                        ("unknown", "characters in the prompt that the tokenizer does not know")):
        counts = [getattr(encoded, what)[split][task.name] for split in SPLITS]
        if any(counts):
            yield (f"{task.name}: {counts[0]} of {len(train)} training and {counts[1]} of "
                   f"{len(test)} test items have {words}")
    too_long = sum(length > max_new_tokens for length in encoded.answer_tokens[task.name])
    if too_long:
        yield (f"{task.name}: {too_long} of {len(test)} test items have no reference of at most "
               f"{max_new_tokens} tokens (--max_new_tokens): no answer reaches it")
    seen = {row["input"] for row in task.train} if train else ()
    known = sum(row["input"] in seen for row in task.test)
    if known:
        yield f"{task.name}: {known} of {len(test)} test inputs are in its training data too"
    blank = sum(row["num_targets"] == 1 for row in train)  # EOS alone
    if blank:
        yield f"{task.name}: {blank} of {len(train)} training items have an empty answer"
    empty = sum(not any(counts_anything(text, task.metric) for text in row["references"])
                for row in test)
    if empty:
        yield (f"{task.name}: {empty} of {len(test)} test items have no reference with anything "
               f"that {task.metric} counts")


def _unseen_labels(task):
    """Count the test rows of an accuracy task whose labels are in no training row.

    Answers are labels if they repeat: at most half as many as rows.
    """
    if task.metric != "accuracy":
        return 0
    labels = {bare(text) for row in task.train for text in row["outputs"]}
    return 2 * len(labels) <= len(task.train) and sum(
        not labels & {bare(text) for text in row["outputs"]} for row in task.test)


def _encode_split(task, split, framer, max_length, bar):
    """Return the rows of one split."""
    rows = []
    for instance in getattr(task, split):
        row = {"task": task.name, "id": instance["id"]}
        if split == "train":
            answers = instance["outputs"][:1]
            target = [*framer.text(answers[0]), framer.tokenizer.eos_token_id]
            _, ids, shortened = _fit_prompt(framer, task.definition, instance["input"],
                                            max_length - len(target))
            row |= {"input_ids": ids + target, "num_targets": len(target)}
        else:
            answers = instance["outputs"]
            prompt, ids, shortened = _fit_prompt(framer, task.definition, instance["input"],
                                                 max_length)
            lengths = [len(framer.text(answer)) for answer in answers]
            row |= {"prompt": prompt, "input_ids": ids, "references": answers,
                    "target_tokens": lengths[0] + 1, "answer_tokens": min(lengths)}  # 1: EOS
        written = {"".join(answer.split()): framer.written(answer) for answer in answers}
        rows.append(row | {
            "shortened": shortened, "unknown": framer.unknown_id in ids,
            "unwritable": not any(exact_match(*pair) for pair in written.items()),
            "blank": any(written) and not any(written.values())})
        bar.update()
    return rows


def _fit_prompt(framer, definition, text, budget):
    """Return (prompt, ids, whether it was shortened) of the longest prompt within `budget` tokens.

    Characters are cut off the end of `text`, by bisection. With an empty input a prompt may still
    exceed the budget.
    """
    prompt, ids = framer.prompt(definition, text)
    if len(ids) <= budget:
        return prompt, ids, False
    fits, exceeds = 0, len(text)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if len(framer.prompt(definition, text[:middle])[1]) <= budget:
            fits = middle
        else:
            exceeds = middle
    return *framer.prompt(definition, text[:fits]), fits < len(text)


# --- batching -----------------------------------------------------------------------------------


def plan_epoch(lengths, global_batch_size, seed, stage, epoch):
    """Return the row numbers of every global batch of one epoch, grouped by similar length.

    Each row is there once; a short last batch is filled with -1. The plan depends on the arguments
    alone, not on the number of processes or on accumulation.
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
    """The part of a global batch that one process takes in one step."""

    rows: list  # training rows, None where the last global batch of an epoch is short
    num_target_tokens: int  # of the whole global batch, over which its loss is a mean
    num_tokens: int  # of the whole global batch, without padding


class EpochPlan(torch.utils.data.Dataset):
    """The micro-batches of one epoch, in the order in which the processes take them.

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
    """Pad training rows on the left, and ask for logits at targets only.

    Returns input_ids, attention_mask, position_ids (batch, seq), labels (batch, k) of the last
    k = longest target + 1 columns, logits_to_keep (k,), the indices of these columns, and
    num_items_in_batch = num_target_tokens. A row that is None fills a short batch: no attention, no
    target. Masks follow from lengths, never from token ids.
    """
    rows = [row or {"input_ids": [], "num_targets": 0} for row in rows]
    batch = pad_left([row["input_ids"] for row in rows], pad_token_id)
    width = batch["input_ids"].shape[1]
    k = min(width, 1 + max(row["num_targets"] for row in rows))
    labels = batch["input_ids"][:, -k:].clone()  # (batch, k)
    for label, row in zip(labels, rows, strict=True):
        label[:k - row["num_targets"]] = -100
    # Indices, not a slice: a strided input makes the LM head several times slower.
    return batch | {"labels": labels, "logits_to_keep": torch.arange(width - k, width),
                    "num_items_in_batch": num_target_tokens}


def collate_micro_batch(batches, pad_token_id):
    """Collate the one MicroBatch that a DataLoader of an EpochPlan gives.

    Returns what `collate` does, num_tokens, and tasks: the task of every row, None for a filler.
    """
    (batch,) = batches
    return collate(batch.rows, pad_token_id, batch.num_target_tokens) | {
        "num_tokens": batch.num_tokens, "tasks": [row and row["task"] for row in batch.rows]}


def model_inputs(batch):
    """Return the entries of a batch that the model's forward pass takes."""
    return {key: batch[key] for key in MODEL_INPUTS}


def pad_left(sequences, pad_token_id):
    """Return input_ids, attention_mask and position_ids, each (batch, seq), of lists of ids."""
    longest = max([1, *map(len, sequences)])
    ids = [[pad_token_id] * (longest - len(ids)) + ids for ids in sequences]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
    input_ids, attention_mask = torch.tensor(ids), torch.tensor(mask)  # (batch, seq)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


# --- the command line ---------------------------------------------------------------------------


def carry_out(argv):
    """Download, check or make the suite that the flags in `argv` name. Raises InputError."""
    from inputs import convert  # here, because a run needs none of it

    parser = Parser(prog="data.py", description="Download, check or make suites of tasks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text, flags in (
            ("download", "download a suite and check it", SUITE_FLAGS),
            ("verify", "check the files of a suite that is there", SUITE_FLAGS),
            ("convert", "make a suite of files in another layout", convert.FLAGS)):
        add_flags(commands.add_parser(name, help=text, description=text), flags)
    args = parser.parse_args(argv)
    for line in convert.convert(args) if args.command == "convert" else [fetch(args)]:
        print(one_line(line))


def fetch(args):
    """Download a suite, or only verify it; return a line about it."""
    named = NAMED[args.suite]
    folder = named.folder(args.data_dir)
    if args.command == "download":
        named.download(folder)
    suite = load_suite(named.name, args.data_dir)
    counts = [sum(len(getattr(task, split)) for task in suite.tasks.values()) for split in SPLITS]
    return (f"{folder}: {len(suite.tasks)} tasks, {counts[0]} training and {counts[1]} test "
            "instances, all checksums right")


def main(argv=None):
    return exit_status(carry_out, argv)


if __name__ == "__main__":
    sys.exit(main())
