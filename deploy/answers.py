"""Answers of a trained adapter: to one prompt, to a file of prompts, in a chat."""

import contextlib
import json

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import TextStreamer

import adapter
import data
import evaluation
import models
from harness import launch
from harness.adapter_config import read_adapter_config
from harness.arguments import refuse_odd_words
from inputs import formats
from inputs.errors import InputError, one_line
from inputs.files import atomic_path


class Printer(TextStreamer):
    """Print an answer as it comes, without the white space at its start."""

    begun = False

    def on_finalized_text(self, text, stream_end=False):
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        super().on_finalized_text(text, stream_end)


class Answerer:
    """A base model that answers prompts: bare at first, with the adapter after `adapt`."""

    def __init__(self, args):
        self.args = args
        config, _ = read_adapter_config(args.adapter)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        padded = args.prompts is not None and args.batch_size > 1
        self.model, self.tokenizer = models.load(args.model, dtype, padded)
        self.device = PartialState().device
        if self.device.type == "cpu":
            launch.use_onednn()  # as in the evaluation of a run
        # A base to be quantised may not fit while dense.
        if config.base == "dense" or args.compare_base:
            self.model.to(self.device)
        self.framer = data.Framer(self.tokenizer, config.chat_template)
        self.sampling = {}
        if args.temperature is not None:
            torch.manual_seed(args.seed)
            self.sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0,
                             "top_p": 1.0 if args.top_p is None else args.top_p}

    def adapt(self):
        """Put the adapter on the model."""
        adapter.load(self.model, self.args.adapter, device=self.device).to(self.device).eval()

    def encode(self, turns):
        """Return the token ids of a dialogue. Raises InputError where no answer would fit."""
        ids = self.framer.turns(turns)[1]
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and len(ids) + self.args.max_new_tokens > positions:
            raise InputError(f"the prompt has {len(ids)} tokens, which with --max_new_tokens "
                             f"{self.args.max_new_tokens} exceeds the model's {positions} "
                             "positions")
        return ids

    @torch.no_grad()
    def answer(self, prompts, **options):
        """Return the answers to lists of token ids."""
        batch = {key: tensor.to(self.device) for key, tensor
                 in data.pad_left(prompts, self.tokenizer.pad_token_id).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            return evaluation.generate(self.model, self.tokenizer, batch,
                                       self.args.max_new_tokens, **self.sampling | options)

    def stream(self, turns):
        """Print the answer to a dialogue token by token -> the answer."""
        streamer = Printer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (text,) = self.answer([self.encode(turns)], streamer=streamer)
        return text


def answer_one(args):
    """Print the answer to the prompt, with --compare_base after the base model's."""
    model = Answerer(args)
    turns = [data.build_prompt(args.definition, args.prompt)]
    if args.compare_base:
        print("base:", flush=True)
        model.stream(turns)
        print("adapter:", flush=True)
    model.adapt()
    model.stream(turns)


def answer_file(args):
    """Answer the JSON lines of --prompts and write --out, a line for each, in the same order."""
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}")
    model, rows, prompts = None, [], []
    for number, row in list(formats.numbered_lines(args.prompts, formats.Question)):
        model = model or Answerer(args)
        definition = row.get("definition", args.definition)
        try:
            prompts.append(model.encode([data.build_prompt(definition, row["prompt"])]))
        except InputError as error:
            raise InputError(f"{args.prompts}, line {number}: {error}") from None
        rows.append({"asked": row})
    if not rows:
        raise InputError(f"{args.prompts} holds no prompts")
    order = sorted(range(len(rows)), key=lambda index: -len(prompts[index]))
    batches = [order[first:first + args.batch_size]
               for first in range(0, len(order), args.batch_size)]
    for name in ("base", "answer") if args.compare_base else ("answer",):
        if name == "answer":
            model.adapt()
        for batch in tqdm(batches, desc=name, unit="batch", delay=2, leave=False):
            texts = model.answer([prompts[index] for index in batch])
            for index, text in zip(batch, texts, strict=True):
                rows[index][name] = text
    with atomic_path(args.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(one_line(f"{len(rows)} answers in {args.out}"))


def chat(args):
    """Chat in the terminal until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing in input(); not on every system)
    model = Answerer(args)
    model.adapt()
    print("/reset forgets the chat so far, /quit ends", flush=True)
    turns = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            turns = []
        elif text:
            asked = [*turns, data.build_prompt("" if turns else args.definition, text)]
            try:
                refuse_odd_words([text])
                turns = [*asked, model.stream(asked)]
            except InputError as error:
                print(one_line(f"{error}; /reset forgets the chat so far"), flush=True)
