"""Answers of a trained adapter: to one prompt, to a file of them, in a dialogue."""

import contextlib
import json
import os
import sys
from typing import Any

import filelock
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import TextStreamer

import adapter
import data
import evaluation
import models
from harness import products
from harness.adapter_config import read_adapter_config
from harness.arguments import refuse_odd_words
from inputs import formats
from inputs.bars import Bar
from inputs.errors import InputError, Interrupted, one_line
from inputs.files import atomic_path, sha256_file
from inputs.numbers import stable_seed


class Printer(TextStreamer):
    """Prints an answer as it comes, without the white space at its start."""

    begun = False

    def on_finalized_text(self, text, stream_end=False):
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


class Speaker:
    """A base model, bare until `adapt` puts the adapter on it, and what its prompts look like."""

    def __init__(self, args):
        self.args = args
        config, _ = read_adapter_config(args.adapter)
        self.model, self.tokenizer = models.load(args.model,
                                                 torch.bfloat16 if args.bf16 else torch.float32)
        self.device = PartialState().device
        if self.device.type == "cpu":
            products.use_onednn()  # as the evaluation in a run
        if config.base == "dense" or args.base:  # else it may fit the device only when quantised
            self.model.to(self.device)
        self.framer = data.Framer(self.tokenizer, config.chat_template)
        self.sampling = {}
        if args.temperature is not None:
            self.sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0,
                             "top_p": 1.0 if args.top_p is None else args.top_p}

    def adapt(self):
        """From now on the adapter answers."""
        adapter.load(self.model, self.args.adapter, device=self.device).to(self.device).eval()

    def encode(self, turns):
        """Token ids of a dialogue. Raises InputError where the model has no room for an answer."""
        ids = self.framer.turns(turns)[1]
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and len(ids) + self.args.max_new_tokens > room:
            raise InputError(f"the prompt has {len(ids)} tokens: with --max_new_tokens "
                             f"{self.args.max_new_tokens} that is more than the model's {room} "
                             "positions")
        return ids

    @torch.no_grad()
    def answer(self, prompts, number=0, **options):
        """The answers to lists of token ids; `number` tells draws of one seed apart."""
        batch = {key: tensor.to(self.device) for key, tensor
                 in data.pad_left(prompts, self.tokenizer.pad_token_id).items()}
        if self.sampling:
            set_seed(stable_seed("answer", self.args.seed, number) % 2**32)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            return evaluation.generate(self.model, self.tokenizer, batch,
                                       self.args.max_new_tokens, **self.sampling | options)

    def stream(self, turns, number=0):
        """Print the answer to a dialogue token by token -> the answer."""
        streamer = Printer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (text,) = self.answer([self.encode(turns)], number, streamer=streamer)
        return text


def answer_one(args):
    """Print the answer to the prompt, after the bare model's if asked for."""
    speaker = Speaker(args)
    turns = [data.build_prompt(args.definition, args.prompt)]
    if args.base:
        print("base:", flush=True)
        speaker.stream(turns)
    speaker.adapt()
    if args.base:
        print("adapter:", flush=True)
    speaker.stream(turns)
    return 0


def chat(args):
    """A dialogue in the terminal, until /quit or its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lets input() edit its line; not on every system)
    speaker = Speaker(args)
    speaker.adapt()
    print("/reset begins anew, /quit ends", flush=True)
    turns = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text == "/quit":
            return 0
        if text == "/reset":
            turns = []
        elif text:
            asked = [*turns, data.build_prompt("" if turns else args.definition, text)]
            try:
                refuse_odd_words([text])
                turns = [*asked, speaker.stream(asked, len(asked))]
            except InputError as error:
                print(one_line(f"{error}; /reset begins anew"), flush=True)


# --- files --------------------------------------------------------------------------------------


def answer_file(args):
    """Answer the lines of --prompts into --out -> 0, or 2 where a line could not be answered.

    Answers reach OUT.partial as they come, and OUT, in the order of the prompts, once all are
    there. Broken lines are named and left out.
    """
    partial = args.out.with_name(args.out.name + ".partial")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}")
    lines = list(formats.try_lines(args.prompts, formats.Question))
    with alone(partial):
        speaker = Speaker(args)
        asked, broken = encode_lines(speaker, lines)
        if not asked:
            raise InputError(f"{args.prompts} holds no prompt that can be answered")
        voices = ["base", "answer"] if args.base else ["answer"]
        with Progress(partial, identity(args), len(asked) * len(voices)) as done:
            for voice in voices:
                if voice == "answer":
                    speaker.adapt()
                answer_all(speaker, voice, asked, done)
        rows = [{"line": number, "asked": value} | {voice: done.texts[voice, number]
                                                    for voice in voices}
                for number, value, _ in lines if number in asked]
        with atomic_path(args.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial.unlink()
    print(one_line(f"{len(rows)} answers in {args.out}"
                   + (f"; {broken} lines of {args.prompts} have none" if broken else "")))
    return 2 if broken else 0


def encode_lines(speaker, lines):
    """({line number: token ids}, how many lines cannot be answered, which are named)."""
    asked, broken = {}, 0
    for number, value, error in lines:
        try:
            if error is not None:
                raise error
            if not value["prompt"].strip():
                raise InputError(f"{speaker.args.prompts}, line {number}: the prompt is empty")
            definition = value.get("definition", speaker.args.definition)
            asked[number] = speaker.encode([data.build_prompt(definition, value["prompt"])])
        except InputError as reason:
            where = "" if f"line {number}" in str(reason) else (
                f"{speaker.args.prompts}, line {number}: ")
            print(one_line(f"left out: {where}{reason}"), file=sys.stderr)
            broken += 1
    return asked, broken


def answer_all(speaker, voice, asked, done):
    """Answer in batches of prompts of similar length, the longest first, what is not `done`."""
    order = sorted(asked, key=lambda number: -len(asked[number]))
    size = speaker.args.batch_size
    for first in range(0, len(order), size):
        batch = order[first:first + size]
        if not all((voice, number) in done.texts for number in batch):
            texts = speaker.answer([asked[number] for number in batch], first)
            done.add(voice, dict(zip(batch, texts, strict=True)))


def identity(args):
    """What a stopped call must have in common with the one that goes on."""
    flags = ("definition", "batch_size", "base", "max_new_tokens", "temperature", "top_p", "seed",
             "bf16")
    config, _ = read_adapter_config(args.adapter)
    return {f"--{name}": getattr(args, name) for name in flags} | {
        "the adapter": sha256_file(args.adapter / adapter.WEIGHTS_FILE),
        "the base model": config.base_sha256, "--prompts": sha256_file(args.prompts)}


class Progress:
    """A context with a file of answers that a later call goes on with; `texts` are all so far.

    Its first line is the identity of the call, each other one a batch. Raises InputError for the
    file of another call.
    """

    def __init__(self, path, mine, total):
        self.path, self.mine, self.total, self.texts = path, mine, total, {}

    def __enter__(self):
        lines = self._read() if self.path.exists() else []
        self.file = open(self.path, "a", encoding="utf-8")
        if not lines:
            self._write(self.mine)
        for voice, number, text in (each for batch in lines[1:] for each in batch):
            self.texts[voice, number] = text
        self.bar = Bar(total=self.total, initial=len(self.texts), desc="answer", unit="prompt",
                       delay=2, leave=False)
        return self

    def _read(self):
        """The lines so far, without one that a kill has cut."""
        whole = self.path.read_bytes().rfind(b"\n") + 1
        os.truncate(self.path, whole)
        lines = formats.read_lines(self.path, Any)
        theirs = formats.convert(lines[0], dict, self.path) if lines else self.mine
        formats.convert(lines[1:], list[list[tuple[str, int, str]]], self.path)
        different = [name for name in self.mine if theirs.get(name) != self.mine[name]]
        if different:
            raise InputError(f"{self.path} holds answers of a call with another "
                             f"{', '.join(different)}: delete it, or name another --out")
        return lines

    def __exit__(self, kind, error, trace):
        self.bar.close()
        self.file.close()
        if kind is KeyboardInterrupt:
            raise Interrupted(f"{len(self.texts)} of {self.total} answers are kept in {self.path}; "
                              "the same command goes on") from None

    def add(self, voice, texts):
        """Keep the answers {line number: text} of a batch."""
        self._write([[voice, number, text] for number, text in texts.items()])
        self.texts |= {(voice, number): text for number, text in texts.items()}
        self.bar.update(len(texts))

    def _write(self, line):
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.file.flush()


@contextlib.contextmanager
def alone(path):
    """A context that no other process enters for this path. Raises InputError where one is in it.
    """
    lock = filelock.FileLock(f"{path}.lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{path} is written by another process: let it end first") from None
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}.lock")
        lock.release()
