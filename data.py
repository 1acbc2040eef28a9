"""Instruction-tuning suites: reading, downloading, prompting, tokenising, batching.

`python data.py download superni` fetches the paper's 15 tasks once and checks every file.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from errors import InputError, library_errors, one_line
from method import CONFIG_FILE, WEIGHTS_FILE
from metrics import SCORERS
from utils import atomic_path, cache_dir, open_file, read_text, sha256_file, stable_seed

TASKS_DIR = Path(__file__).resolve().parent / "tasks"
SUPERNI_URL = ("https://raw.githubusercontent.com/circle-hit/SAPT/"
               "52a52b920324c656bdb6dac08e43dc600ba22f21/CL_Benchmark/SuperNI/")
LARGEST_FILE = 2**24  # bytes to download at most; SuperNI's largest file has 2.5 million
PROMPT = "{definition}\n\nNow complete the following example -\nInput: {input}\nOutput: "
SPLITS = ("train", "test")
LONGEST = {"Definition": 10**5, "input": 10**6, "output": 10**6}  # characters; more takes minutes

# Table 4 of the paper, in the order that the seeds shuffle (Table 5): category and metric.
SUPERNI = {
    "task1687_sentiment140_classification": ("sentiment analysis", "accuracy"),
    "task1729_personachat_generate_next": ("dialogue generation", "rouge_l"),
    "task748_glucose_reverse_cause_event_detection": ("information extraction", "rouge_l"),
    "task1510_evalution_relation_extraction": ("information extraction", "rouge_l"),
    "task363_sst2_polarity_classification": ("sentiment analysis", "accuracy"),
    "task639_multi_woz_user_utterance_generation": ("dialogue generation", "rouge_l"),
    "task1572_samsum_summary": ("text summarization", "rouge_l"),
    "task511_reddit_tifu_long_text_summarization": ("text summarization", "rouge_l"),
    "task1590_diplomacy_text_generation": ("dialogue generation", "rouge_l"),
    "task1290_xsum_summarization": ("text summarization", "rouge_l"),
    "task073_commonsenseqa_answer_generation": ("question answering", "rouge_l"),
    "task181_outcome_extraction": ("information extraction", "rouge_l"),
    "task002_quoref_answer_generation": ("question answering", "rouge_l"),
    "task875_emotion_classification": ("sentiment analysis", "accuracy"),
    "task591_sciq_answer_generation": ("question answering", "rouge_l"),
}


class Task(NamedTuple):
    """One task; `train` and `test` are lists of {"id", "input", "outputs"}."""

    name: str
    definition: str
    category: str
    metric: str
    train: list
    test: list


class Suite(NamedTuple):
    name: str
    tasks: dict[str, Task]


# --- reading ------------------------------------------------------------------------------------


def load_suite(name_or_path, data_dir=None):
    """Read a suite: "mini" (shipped), "superni" (data_dir, $BADIT_DATA, download), or a folder.

    A folder holds <task>/train.json and <task>/test.json in the natural-instructions layout.
    Raises InputError naming the file and the instance for anything malformed.
    """
    if name_or_path == "superni":
        folder = find_superni(data_dir)
        for name, sha256 in superni_manifest().items():
            if (folder / name).is_file() and sha256_file(folder / name) != sha256:
                raise InputError(f"{folder / name} is not the published file (SHA-256 differs); "
                                 f"use --suite {folder} for data of your own")
        names = list(SUPERNI)
    else:
        if data_dir is not None:
            raise InputError(f"--data_dir is read with --suite superni only, not {name_or_path}")
        folder = TASKS_DIR / "mini" if name_or_path == "mini" else Path(name_or_path)
        if not name_or_path or not folder.is_dir():
            raise InputError(f"suite {str(name_or_path)!r} is unknown: allowed are mini, superni "
                             "and the path of a folder of tasks")
        names = sorted(path.name for path in folder.iterdir()
                       if path.is_dir() and not path.name.startswith((".", "_")))
    if not names:
        raise InputError(f"{folder} holds no task folders")
    for name in names:  # files of a run bear these names
        if not re.fullmatch(r"[\w.-]{1,200}", name, flags=re.ASCII):
            raise InputError(f"{folder}: a task folder's name may hold up to 200 letters, digits, "
                             f"'_', '-' and '.', not {name!r}")
        if name in (CONFIG_FILE, WEIGHTS_FILE):
            raise InputError(f"{folder}: a task cannot be named {name}, as an adapter's file is")
    return Suite(folder.resolve().name if name_or_path != "superni" else "superni",
                 {name: load_task(folder / name) for name in names})


def find_superni(data_dir=None):
    """The folder with the SuperNI tasks. Raises InputError where there is none."""
    places = [("--data_dir", data_dir), ("$BADIT_DATA", os.environ.get("BADIT_DATA")),
              ("the download folder", cache_dir() / "superni")]
    for label, place in places:
        if not place:
            continue
        if any((Path(place) / name).is_dir() for name in SUPERNI):
            return Path(place)
        if place == data_dir or label == "$BADIT_DATA":
            raise InputError(f"{label} {place} holds no SuperNI task folder "
                             f"such as {next(iter(SUPERNI))}")
    raise InputError("SuperNI is not on this machine: run `python data.py download superni`, or "
                     "name its folder with --data_dir or $BADIT_DATA")


def load_task(folder):
    """Read one task folder. Raises InputError naming file and instance."""
    heads, instances = {}, {}
    for split in SPLITS:
        heads[split], instances[split] = _read_split(folder / f"{split}.json")
    head, file = heads["train"], folder / "train.json"
    for key in ("Definition", "Category", "Metric"):
        if heads["test"].get(key) != head.get(key):
            raise InputError(f"{folder / 'test.json'}: {key} differs from that of {file}")
    definition = head.get("Definition")
    if isinstance(definition, list) and all(isinstance(line, str) for line in definition):
        definition = "\n".join(definition)
    if not isinstance(definition, str) or not definition.strip():
        raise InputError(f"{file}: Definition is missing or not text")
    _check_text(definition, "Definition", f"{file}: Definition")
    category, metric = SUPERNI.get(folder.name, (None, None))
    if metric is None:
        category, metric = head.get("Category", "other"), head.get("Metric", "rouge_l")
    if not isinstance(category, str):
        raise InputError(f"{file}: Category {category!r} is not text")
    _check_text(category, "Definition", f"{file}: Category")
    if not isinstance(metric, str) or metric not in SCORERS:
        raise InputError(f"{file}: Metric {metric!r} is unknown; allowed: {', '.join(SCORERS)}")
    return Task(folder.name, definition.strip(), category, metric, **instances)


def _read_split(file):
    try:
        content = json.loads(read_text(file), object_pairs_hook=_refuse_repeats)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise InputError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: the top level must be an object with Definition and Instances")
    rows = content.get("Instances")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file}: Instances must be a non-empty list")
    instances = [_read_instance(row, index, file) for index, row in enumerate(rows)]
    seen = set()
    for instance in instances:
        if instance["id"] in seen:
            raise InputError(f"{file}: the id {instance['id']!r} stands twice")
        seen.add(instance["id"])
    return content, instances


def _refuse_repeats(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return dict(pairs)


def _read_instance(row, index, file):
    where = f"{file}, instance {index}"
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object")
    name = row.get("id", f"{file.parent.name}-{file.stem}-{index}")
    where += f" (id {name!r})"
    outputs = [row["output"]] if isinstance(row.get("output"), str) else row.get("output")
    if not isinstance(name, str) or not isinstance(row.get("input"), str):
        raise InputError(f"{where}: `id` and `input` must be text")
    if not isinstance(outputs, list) or not outputs or not all(
            isinstance(output, str) for output in outputs):
        raise InputError(f"{where}: `output` must be text or a non-empty list of texts")
    for key, text in (("input", name), ("input", row["input"]),
                      *(("output", output) for output in outputs)):
        _check_text(text, key, where)
    return {"id": name, "input": row["input"], "outputs": outputs}


def _check_text(text, key, where):
    if len(text) > LONGEST[key]:
        raise InputError(f"{where}: a text of {len(text):,} characters; at most {LONGEST[key]:,} "
                         "are taken")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the text holds half of a surrogate pair, "
                         "which is no character") from None


def resolve_names(names, allowed):
    """Folder names from folder names or T-numbers (T363, 363), each at most once."""
    resolved = []
    for name in names:
        number = re.fullmatch(r"[Tt]?0*(\d+)", name)
        numbered = [task for task in allowed
                    if number and re.match(rf"task0*{number[1]}_", task)]
        if name not in allowed and len(numbered) != 1:
            raise InputError(f"task {name!r} is {'ambiguous' if numbered else 'unknown'}; "
                             f"this suite has {', '.join(allowed)}")
        found = name if name in allowed else numbered[0]
        if found in resolved:
            raise InputError(f"task {name!r} is named twice")
        resolved.append(found)
    return resolved


def select_tasks(suite, names):
    """The suite cut to some tasks, by folder name or T-number. Raises InputError."""
    resolved = resolve_names(names, list(suite.tasks))
    return Suite(suite.name, {name: suite.tasks[name] for name in resolved})


def task_order(names, seed, explicit=None):
    """The order in which sequential training sees the tasks `names`.

    SuperNI and its subsets: Table 5's list shuffled by the seed. Any other suite: sorted names,
    shuffled. `explicit` (folder names or T-numbers) must name each task once.
    """
    names = list(names)
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
    return PROMPT.format(definition=definition, input=input_text)


def encode_suite(suite, tokenizer, max_length, chat_template=False, cache_dir=None, splits=SPLITS):
    """Tokenise all tasks of a suite -> Encoded; of other `splits` there are no rows.

    `max_length` bounds prompt + target in training and the prompt alone in evaluation. Too long an
    instance loses the end of its input field, never of definition, frame or target; a training
    instance that still does not fit is left out, an evaluation instance never. `cache_dir` keeps
    the result on disk under a hash of all that it depends on. Raises InputError for a task left
    without training instances, or a tokenizer without EOS or chat template where one is needed.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token: nothing would end an answer")
    if chat_template and not tokenizer.chat_template:
        raise InputError("--chat_template: this tokenizer has no chat template")
    encoded = Encoded({}, {}, [], {split: 0 for split in SPLITS})
    for name, task in suite.tasks.items():
        train, test = (_encode_split(task, split, tokenizer, max_length, chat_template, cache_dir)
                       if split in splits else [] for split in SPLITS)
        fits = [row for row in train if len(row["input_ids"]) <= max_length]
        if train and not fits:
            needed = min(len(row["input_ids"]) for row in train)
            raise InputError(f"no training instance of {name} fits into --max_length {max_length}; "
                             f"the smallest that lets one in is {needed}")
        encoded.left_out.extend((name, row["id"]) for row in train
                                if len(row["input_ids"]) > max_length)
        encoded.train[name], encoded.test[name] = fits, test
        for split, rows in (("train", fits), ("test", test)):
            encoded.shortened[split] += sum(row.pop("shortened") for row in rows)
    return encoded


def encoded_sha256(encoded):
    """SHA-256 by task and split of an encoded suite's rows."""
    return {f"{split} rows of {task}": hashlib.sha256(json.dumps(rows).encode()).hexdigest()
            for split in SPLITS for task, rows in getattr(encoded, split).items()}


def check_encoded(encoded, positions, vocabulary):
    """Raise InputError for a test prompt of more than `positions` tokens, or a token that is none.

    A Definition that alone exceeds max_length is left whole in evaluation; and a tokenizer may know
    ids from `vocabulary` on, for which the model has no embedding.
    """
    for split in SPLITS:
        for task, rows in getattr(encoded, split).items():
            for row in rows:
                length, largest = len(row["input_ids"]), max(row["input_ids"], default=0)
                if split == "test" and length > positions:
                    raise InputError(f"task {task}, {row['id']}: the prompt of {length} tokens, "
                                     f"without any input, exceeds the {positions} that the model "
                                     "has room for beside --max_new_tokens")
                if largest >= vocabulary:
                    raise InputError(f"task {task}, {row['id']}: the tokenizer gives the token "
                                     f"{largest}, the model's embedding has {vocabulary}")


def _encode_split(task, split, tokenizer, max_length, chat_template, cache_dir):
    """Rows of one split, from the cache where its content is known."""
    keys = ("id", "input", "outputs")
    source = [{key: instance[key] for key in keys} for instance in getattr(task, split)]

    def encode(instance):
        target = ([] if split == "test" else
                  tokenizer(instance["outputs"][0], add_special_tokens=False).input_ids
                  + [tokenizer.eos_token_id])
        prompt, ids, shortened = _fit_prompt(task.definition, instance["input"], tokenizer,
                                             max_length - len(target), chat_template)
        row = {"task": task.name, "id": instance["id"], "input_ids": ids + target,
               "shortened": shortened}
        if split == "test":
            return row | {"prompt": prompt, "references": instance["outputs"]}
        return row | {"num_targets": len(target)}

    file = None
    if cache_dir is not None:
        content = [PROMPT, task.name, task.definition, split, max_length, chat_template, source,
                   tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id,
                   tokenizer.chat_template if chat_template else None, CODE_SHA256]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        _make_cache(Path(cache_dir))
        file = Path(cache_dir) / f"{key}.json"
        if (rows := _read_cache(file)) is not None:
            return rows
    with _quiet_datasets(), library_errors(f"the tokenizer fails on {task.name}"):
        rows = Dataset.from_list(source).map(encode, remove_columns=list(keys),
                                             new_fingerprint="encoded").to_list()
    if file is not None:
        _write_cache(file, rows)
    return rows


def _write_cache(file, rows):
    """Write rows as a line with the checksum of the file's name and content, then the content."""
    content = json.dumps(rows).encode()
    with atomic_path(file) as temporary:
        temporary.write_bytes(_cache_sum(file, content) + b"\n" + content)


def _read_cache(file):
    """The rows that `_write_cache` wrote, or None where they are not there, whole and unchanged."""
    try:
        with open_file(file) as opened:
            found, _, content = opened.read().partition(b"\n")
    except OSError:
        return None
    return json.loads(content) if found == _cache_sum(file, content) else None


def _cache_sum(file, content):
    return hashlib.sha256(file.name.encode() + content).hexdigest().encode()


def _make_cache(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the cache folder {folder} ({error.strerror}): name another "
                         "with $XDG_CACHE_HOME") from None


CODE_SHA256 = sha256_file(__file__)  # a changed prompt or cut must not meet old tokens


@contextlib.contextmanager
def _quiet_datasets():
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _fit_prompt(definition, text, tokenizer, budget, chat_template):
    """The longest prompt of at most `budget` tokens -> (prompt, ids, whether it was shortened).

    Cuts characters off the end of `text` by bisection; an empty input may exceed the budget.
    """

    def encode(length):
        prompt = build_prompt(definition, text[:length])
        if not chat_template:
            encoding = tokenizer(prompt, return_special_tokens_mask=True)
            ids, added = encoding.input_ids, encoding.special_tokens_mask
            while added and added.pop():  # at its end, such as an EOS: the answer comes there
                ids.pop()
            return prompt, ids
        try:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True,
                enable_thinking=False)  # Qwen3 would think aloud before a label; others ignore it
            return prompt, tokenizer(prompt, add_special_tokens=False).input_ids
        except Exception as error:  # noqa: BLE001 (a template is a program)
            raise InputError(f"--chat_template: this tokenizer's template fails "
                             f"({type(error).__name__}: {error})") from error

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


def pad_left(sequences, pad_token_id):
    """Lists of token ids -> input_ids, attention_mask and position_ids, each (batch, seq)."""
    longest = max(1, *map(len, sequences)) if sequences else 1
    ids = [[pad_token_id] * (longest - len(ids)) + ids for ids in sequences]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
    input_ids, attention_mask = torch.tensor(ids), torch.tensor(mask)  # (batch, seq)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


# --- downloading --------------------------------------------------------------------------------


def superni_manifest():
    """SHA-256 by relative path of the files of the paper's split."""
    lines = (TASKS_DIR / "superni.sha256").read_text(encoding="utf-8").splitlines()
    return {path: sha256 for sha256, path in (line.split() for line in lines)}


def download(destination, base_url=SUPERNI_URL, manifest=None):
    """Fetch every file of `manifest` (relative path -> SHA-256) that is not yet there and right.

    A file appears under its name only whole and with the right checksum; a second call goes on
    where the first was stopped. Raises InputError naming the file.
    """
    manifest = superni_manifest() if manifest is None else manifest
    destination = Path(destination)
    missing = [name for name, sha256 in manifest.items()
               if not (destination / name).is_file() or sha256_file(destination / name) != sha256]
    for name in tqdm(missing, desc="download", unit="file"):
        _download_file(base_url + name, destination / name, manifest[name])


def _download_file(url, path, sha256):
    with atomic_path(path) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
                expected = response.headers.get("Content-Length")
                while file.tell() <= LARGEST_FILE and (block := response.read(1 << 16)):
                    file.write(block)
                received = file.tell()
        except (http.client.HTTPException, OSError, ValueError) as error:  # or a bad redirect
            raise InputError(f"could not download {url}: {error}; run the command again to go on "
                             "from here") from None
        if received > LARGEST_FILE:
            raise InputError(f"{url} is larger than {LARGEST_FILE:,} bytes: not kept")
        if expected is not None and expected != str(received):
            raise InputError(f"could not download {url}: {received} bytes came, its Content-Length "
                             f"is {expected!r:.40}; run the command again to go on from here")
        found = sha256_file(temporary)
        if found != sha256:
            raise InputError(f"{url} has SHA-256 {found}, expected {sha256}: not kept")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[-1])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("download", "fetch a suite and check it"),
                       ("verify", "check the files of a suite that is there")):
        command = commands.add_parser(name, help=text)
        command.add_argument("suite", choices=("superni",))
        command.add_argument("--data_dir", help="folder of the suite (default: the user's cache)")
    args = parser.parse_args(argv)
    folder = Path(args.data_dir or os.environ.get("BADIT_DATA") or cache_dir() / "superni")
    try:
        if args.command == "download":
            download(folder)
        suite = load_suite("superni", folder)
    except (InputError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    counts = [sum(len(getattr(task, split)) for task in suite.tasks.values()) for split in SPLITS]
    print(f"{one_line(str(folder))}: {len(suite.tasks)} tasks, {counts[0]} training and "
          f"{counts[1]} test instances, all checksums right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
