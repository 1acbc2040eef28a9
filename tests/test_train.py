"""Whole runs of train.py on a tiny model: what they compute, and what they leave on disk."""

import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    BRIEF,
    NO_EVAL,
    QUIET,
    SMALL,
    TASKS,
    adapter_of,
    assert_close_runs,
    failing,
    files_of,
    groupings_of,
    imported_by,
    instances,
    lines_of,
    losses_of,
    prompt_of,
    refused,
    results_of,
    run,
    settings_of,
    succeed,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapter
import data
import evaluation
import metrics
import models
import train
from grouping import (
    component_gram,
    gradient_angles,
    group_components,
    grouping_objective,
)
from harness.arguments import NOT_IDENTITY, parse_flags
from harness.run import Run
from metrics import (
    SCORERS,
    continual_metrics,
    paper_metrics,
    score,
)
from registry import method_class
from regrouping import Regrouper

ROOT = Path(train.__file__).resolve().parent
EPOCHS, K, N = 2, 8, 16
WHOLE = {"results.json", "log.jsonl", "regroup.jsonl", "adapter/adapter_model.safetensors",
         "adapter/adapter_config.json"}
LAYERS = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
MIXED = ("--eval_before",)
SEQUENTIAL = ("--setting", "sequential", "--eval_before")
SINGLE = ("--setting", "single", "--eval_before")


@pytest.fixture(scope="module")
def flags(tiny):
    """The flags of every run here: 36 rows, two epochs of five steps, the last one short."""
    return (*tiny, *SMALL, "--epochs", EPOCHS, "--learning_rate", "1e-2")


@pytest.fixture(scope="module")
def trained(trained_run):
    """Call trained_run with the flags of every run here and more."""
    return functools.partial(trained_run, "--epochs", EPOCHS, "--learning_rate", "1e-2")


def printed(folder):
    return folder.with_name("printed").read_text().splitlines()


def shuffled(seed, names=TASKS):
    """Return the default task order: sorted names, shuffled by the seed."""
    order = sorted(names)
    random.Random(seed).shuffle(order)
    return order


# --- settings, files, results -------------------------------------------------------------------


def test_mixed_run(trained):
    """One stage over all tasks, row 0 before it; every promised file and nothing else."""
    folder = trained(*MIXED)
    assert files_of(folder).keys() == WHOLE | {"predictions/00_before.jsonl",
                                               "predictions/01_mixed.jsonl"}
    results, log = results_of(folder), lines_of(folder / "log.jsonl")
    assert results["rows"] == ["before", "mixed"] and results["task_order"] == shuffled(1)
    assert [len(row) for row in results["scores"]["best"]] == [3, 3]
    assert [(line["stage"], line["epoch"], line["step"]) for line in log] == [
        ("mixed", 1 + step // 6, step) for step in range(1, 11)]
    assert all(line["tokens"] > 0 and line["gradient_norm"] > 0 for line in log)
    assert {name for name, value in results["metrics"].items() if value is not None} == {"rouge"}


PAPER = {
    "num_experts": 8, "top_k": 4, "rank": 4, "alpha": 32, "dropout": 0.05, "epochs": 10,
    "target_modules": ["gate_proj"], "learning_rate": 2e-4, "warmup_ratio": 0.03,
    "max_grad_norm": 1.0, "max_length": 1024, "max_new_tokens": 50, "seed": 1, "routing": "token",
    "inactive": "keep", "grouping": "dog", "svd": "exact", "regroup_every": None,
    "no_bad": False, "no_dog": False, "chat_template": False, "setting": "mixed",
    "method": "badit", "model": "smollm2-135m", "eval_tasks": "all"}


def test_defaults_are_the_papers():
    defaults = vars(parse_flags([])[0])
    assert {name: defaults[name] for name in PAPER} == PAPER


@pytest.mark.parametrize("more, items, counts", [
    (("--max_train_per_task", "3", "--max_eval_per_task", "2"), (20, 21), (3, 2)),  # the first
    (("--max_train_per_task", "5", "--validation", "4"), (8, 9, 10, 11), (5, 4))])  # of training
def test_which_rows_are_read(trained, more, items, counts):
    """The first rows of each task, or the last training rows with --validation."""
    tasks = ("which_is", "colour_name")
    folder = trained(*more, "--tasks", *tasks)
    assert {row["id"] for row in lines_of(folder / "predictions/01_mixed.jsonl")} == {
        f"{task}-{i}" for task in tasks for i in items}
    assert {name: (task["train"], task["test"])
            for name, task in results_of(folder)["tasks"].items()} == dict.fromkeys(tasks, counts)


def tokenised(tokenizer):
    """(prompt ids, target ids) of the training rows by task, in the suite's order."""
    return {task: [(tokenizer(prompt_of(task, row)).input_ids,
                    [*tokenizer(row["output"][0], add_special_tokens=False).input_ids, 2])
                   for row in instances(task, range(12))] for task in sorted(TASKS)}


def test_tokens_in_the_log(trained, llama):
    """The log counts the tokens of each global batch, padding left out: all rows, twice."""
    rows = tokenised(AutoTokenizer.from_pretrained(llama)).values()
    total = sum(len(prompt) + len(target) for task in rows for prompt, target in task)
    assert sum(line["tokens"] for line in lines_of(trained(*MIXED) / "log.jsonl")) == 2 * total


def test_results_json(trained, flags, llama):
    """Flags and versions are recorded; what differs between equal runs is under `run`."""
    folder = trained(*MIXED)
    results = results_of(folder)
    recorded = results["args"] | {name: results["run"][name] for name in NOT_IDENTITY}
    given = vars(parse_flags([str(word) for word in (*flags, *MIXED)])[0])
    assert recorded == given | {"batch_size": 8, "output_dir": str(folder)}
    assert len(results["code_sha256"]) == 64 and int(results["code_sha256"], 16) >= 0
    commit = shutil.which("git") and subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert results["git_commit"] == (commit or None)
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"]["python"] == sys.version.split()[0]
    assert {"transformers", "accelerate"} <= results["versions"].keys()
    model = AutoModelForCausalLM.from_pretrained(llama)
    bank, router = N * 32 + 64 * N, K * 32
    expected = {"total": sum(weight.numel() for weight in model.parameters()),
                "trainable": 2 * (bank + router), "stored": 2 * (2 * bank + router + N)}
    assert expected.items() <= results["parameters"].items()
    assert results["precision"] == "no" and results["processes"] == 1
    assert results["global_batch_size"] == 8
    assert {name: (task["metric"], task["train"], task["test"])
            for name, task in results["tasks"].items()} == {
                name: (metric or "rouge_l", 12, 5) for name, metric in TASKS.items()}
    here = results["run"]
    assert set(here["seconds"]) == {"load", "decompose", "train", "regroup", "evaluate"}
    assert all(seconds > 0 for seconds in here["seconds"].values())
    assert here["device"].startswith("cpu (")
    events = results["regroupings"]
    assert [event["step"] for event in events] == [5, 10]
    for event in events:
        layers = events_of(folder)[event["step"]]
        for key in ("inter_before", "intra_before", "inter_after", "intra_after"):
            assert event[key] == pytest.approx(sum(layer[key] for layer in layers) / 2)


def test_regrouping_is_not_counted_as_training(flags, tmp_path, monkeypatch):
    """By a clock that hardly moves but in the two regroupings."""
    now, real = [0.0], Regrouper.regroup

    def advance(seconds):
        now[0] += seconds
        return now[0]

    def regroup(*args):
        advance(100)
        return real(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: advance(1e-6))
    monkeypatch.setattr(Regrouper, "regroup", regroup)
    succeed(*flags, *NO_EVAL, "--output_dir", tmp_path / "out")
    seconds = results_of(tmp_path / "out")["run"]["seconds"]
    assert seconds["regroup"] == pytest.approx(200, abs=1) and seconds["train"] < 1


@pytest.mark.parametrize("more", [MIXED, SEQUENTIAL], ids=["mixed", "sequential"])
def test_predictions_and_their_scores(trained, more):
    """Tasks in the run's order, items in the file's; the matrix has means by best and first."""
    folder, order = trained(*more), shuffled(1)
    results = results_of(folder)
    expected = [(task, item["id"], prompt_of(task, item), item["output"])
                for task in order for item in instances(task, range(20, 25))]
    assert results["scores"]["best"] != results["scores"]["first"]
    for number, name in enumerate(results["rows"]):
        rows = lines_of(folder / "predictions" / f"{number:02d}_{name}.jsonl")
        assert [(row["task"], row["id"], row["prompt"], row["references"])
                for row in rows] == expected
        for row in rows:
            assert row["scores"] == {metric: score(row["prediction"], row["references"], metric)
                                     for metric in SCORERS}
        for reference in ("best", "first"):
            assert results["scores"][reference][number] == pytest.approx([
                sum(row["scores"][TASKS[task] or "rouge_l"][reference]
                    for row in rows if row["task"] == task) / 5 for task in order])


def test_sequential_run(trained):
    """One stage per task in the seed's order; its own optimizer and schedule."""
    folder, order = trained(*SEQUENTIAL), shuffled(1)
    results, log = results_of(folder), lines_of(folder / "log.jsonl")
    assert results["task_order"] == order and results["rows"] == ["before", *order]
    assert files_of(folder).keys() == WHOLE | {"predictions/00_before.jsonl"} | {
        f"predictions/{i:02d}_{task}.jsonl" for i, task in enumerate(order, start=1)}
    assert [(line["stage"], line["step"]) for line in log] == [
        (task, step) for task in order for step in range(1, 5)]
    rates = [line["learning_rate"] for line in log]
    assert rates[:4] == rates[4:8] == rates[8:] and max(rates) == 1e-2
    events = {(line["stage"], line["step"]) for line in lines_of(folder / "regroup.jsonl")}
    assert events == {(task, step) for task in order for step in (2, 4)}
    a = results["scores"]["best"][1:]
    assert len(a) == 3 and all(len(row) == 3 and None not in row for row in a)
    expected = continual_metrics(a, order, None) | paper_metrics(a, order)
    assert len(expected) == 6 and expected["forward"] is None
    assert results["metrics"] == pytest.approx(expected)
    assert expected["backward"] != 0 and expected["forget_rate"] != 0


def test_tasks_may_be_called_as_rows_are(flags, suite, tmp_path):
    """The names of rows are not reserved, and a seed gives the order of the stages."""
    names = ("after", "before", "mixed")
    for task, name in zip(TASKS, names, strict=True):
        shutil.copytree(suite / task, tmp_path / "suite" / name)
    succeed(*flags, "--suite", tmp_path / "suite", "--setting", "sequential", "--eval_before",
            "--max_train_per_task", 2, "--seed", 5, "--output_dir", tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert results["rows"] == ["before", *shuffled(5, names)]  # seeds 1 to 3 agree
    assert len(results["scores"]["best"]) == 4 and results["metrics"]["backward"] is not None


@pytest.mark.parametrize("which, evaluated, metric", [
    ("seen", lambda i, j: i <= j, "forget_rate"),
    ("new", lambda i, j: i == j or j == 2, "backward")])  # the last stage evaluates all
def test_eval_tasks(trained, which, evaluated, metric):
    """Other scores are null, and the metrics that do not need them are those of a full run."""
    results = results_of(trained("--setting", "sequential", "--eval_tasks", which))
    full = results_of(trained(*SEQUENTIAL))
    assert results["scores"]["best"] == [
        [score if evaluated(i, j) else None for i, score in enumerate(row)]
        for j, row in enumerate(full["scores"]["best"][1:])]
    measured = {name: value for name, value in results["metrics"].items() if value is not None}
    assert measured.items() <= full["metrics"].items() and metric in measured


def test_eval_tasks_none(trained):
    """Nothing is evaluated, no score is made up, and training is the same."""
    folder = trained("--setting", "sequential", *NO_EVAL)
    results = results_of(folder)
    assert results["scores"]["best"] == [[None] * 3] * 3
    assert set(results["metrics"].values()) == {None}
    assert files_of(folder).keys() == WHOLE
    assert files_of(folder)["log.jsonl"] == files_of(trained(*SEQUENTIAL))["log.jsonl"]


def test_single_run(trained):
    """Each task alone from the base model; the first equals the first stage of a sequence."""
    folder, order = trained(*SINGLE), shuffled(1)
    results, log = results_of(folder), lines_of(folder / "log.jsonl")
    assert files_of(folder).keys() == {
        "results.json", "log.jsonl", "regroup.jsonl", "predictions/00_before.jsonl"} | {
        f"predictions/{i:02d}_{task}.jsonl" for i, task in enumerate(order, start=1)} | {
        f"adapter/{task}/adapter_{rest}" for task in order
        for rest in ("model.safetensors", "config.json")}
    matrix = results["scores"]["best"][1:]
    assert [[value is None for value in row] for row in matrix] == [
        [i != j for i in range(3)] for j in range(3)]
    assert matrix[0][0] == results_of(trained(*SEQUENTIAL))["scores"]["best"][1][0]
    sequence = lines_of(trained(*SEQUENTIAL) / "log.jsonl")
    assert log[:4] == sequence[:4] and log[4:8] != sequence[4:8]
    assert results["metrics"]["forward"] is None and results["metrics"]["backward"] is None
    # The second task too starts from the base model, whatever ran before it.
    alone = trained("--setting", "single", "--tasks", order[1], *NO_EVAL)
    assert lines_of(alone / "log.jsonl") == log[4:8]
    assert [parse_flags(["--eval_only", "--adapter", str(folder / "adapter" / task)])[0].tasks
            for task in order] == [[task] for task in order]


def test_zero_shot(trained, tiny, tmp_path):
    """The untrained model has the scores of row 0, and leaves no adapter and no log."""
    succeed("--method", "zero_shot", *tiny, *BRIEF, "--output_dir", tmp_path)
    files, results = files_of(tmp_path), results_of(tmp_path)
    assert files.keys() == {"results.json", "predictions/01_zero_shot.jsonl"}
    assert files["predictions/01_zero_shot.jsonl"] == files_of(trained(*MIXED))[
        "predictions/00_before.jsonl"]
    assert results["scores"]["best"] == results_of(trained(*MIXED))["scores"]["best"][:1]
    assert results["parameters"]["trainable"] == results["parameters"]["stored"] == 0


def test_the_first_line_and_the_table(trained):
    """Precision and processes first; then scores before and after for every task."""
    out, results = printed(trained(*MIXED)), results_of(trained(*MIXED))
    assert "precision no, processes 1, device cpu" in out[0]
    for task, *scores in zip(results["task_order"], *results["scores"]["best"], strict=True):
        (line,) = (line for line in out if line.startswith(f"{task} "))
        assert line.split()[2:] == [f"{score:.2f}" for score in scores]
    assert f"mean score: {results['metrics']['rouge']:.2f}" in out
    assert not any("not measured" in line for line in out)


# --- reproducibility ----------------------------------------------------------------------------


def test_the_seed_counts(trained):
    """It changes order, dropout and noise; equal runs are equal (test_resume.py)."""
    assert losses_of(trained("--seed", "2", *NO_EVAL)) != losses_of(trained(*MIXED))


def test_accumulation_equals_one_large_batch(trained):
    """Losses are means over the target tokens of the global batch, a short last one included."""
    parts = trained(*QUIET, *NO_EVAL, "--batch_size", "2", "--gradient_accumulation_steps", "4")
    assert_close_runs(parts, trained(*QUIET))


@torch.no_grad()
def shares_by_hand(model, layer, rows, top_k):
    """The share of tokens that selects each expert of a layer, row by row, without noise."""
    seen = []
    handle = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    model.eval()
    for prompt, target in rows:
        model(input_ids=torch.tensor([prompt + target]))
    model.train()
    handle.remove()
    chosen = (torch.cat(seen) @ layer.router.T).topk(top_k, dim=1).indices  # (tokens, top_k)
    return (torch.bincount(chosen.flatten(), minlength=K) / len(chosen)).tolist()


def naive_training(llama, stages, peak, top_k, seed=1, warmup=0.03):
    """Algorithm 1 in plain torch: rows one by one, full logits, no accelerate, no padding.

    Returns losses and learning rates of all steps, what regroup.jsonl must say, and the final
    groupings.
    """
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    method = method_class("badit")(settings_of(dropout=0.0, router_noise=0.0, top_k=top_k))
    method.wrap(model)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rows_of, losses, rates, events = tokenised(tokenizer), [], [], []
    for stage, tasks in stages:
        rows = [row for task in tasks for row in rows_of[task]]
        lengths = [len(prompt) + len(target) for prompt, target in rows]
        optimizer = torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.999), eps=1e-8,
                                      weight_decay=0.0)
        steps = EPOCHS * math.ceil(len(rows) / 8)
        warm, step = math.ceil(warmup * steps), 0
        for epoch in range(EPOCHS):
            summed, count = {}, 0
            for batch in data.plan_epoch(lengths, 8, seed, stage, epoch):
                chosen = [rows[i] for i in batch if i >= 0]
                targets = sum(len(target) for _, target in chosen)
                optimizer.zero_grad()
                loss = 0.0
                for prompt, target in chosen:
                    ids = torch.tensor([prompt + target])
                    log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
                    part = -sum(log_probs[len(prompt) + i - 1, token]
                                for i, token in enumerate(target)) / targets
                    part.backward()
                    loss += float(part.detach())
                count += 1
                for name, layer in method.layers.items():
                    g = torch.cat([layer.lora_A.grad, layer.lora_B.grad.T], 1)
                    summed[name] = summed.get(name, 0) + g
                norm = sum(float(p.grad.double().square().sum()) for p in weights) ** 0.5
                for weight in weights:
                    weight.grad *= min(1.0, 1.0 / norm)
                cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
                rates.append(peak * (step / warm if step < warm else cosine))
                optimizer.param_groups[0]["lr"] = rates[-1]
                optimizer.step()
                losses.append(loss)
                step += 1
            shares = [shares_by_hand(model, layer, chosen, top_k)
                      for layer in method.layers.values()]
            for (name, layer), share in zip(method.layers.items(), shares, strict=True):
                mean, old = summed[name] / count, layer.expert_of.clone()
                if step < steps:
                    layer.expert_of.copy_(group_components(mean, K, old))
                norms = [float(mean[old == k].norm()) for k in range(K)]
                events.append({"stage": stage, "step": step, "layer": name, "steps": count,
                               "moved": int((old != layer.expert_of).sum()),
                               "expert_share": pytest.approx(share, abs=1e-6),
                               "gradient_norm": pytest.approx(norms, rel=1e-3, abs=1e-5)})
                gram = component_gram(mean)
                for when, grouping in (("before", old), ("after", layer.expert_of)):
                    inter, intra = gradient_angles(gram, grouping, K)
                    objective = grouping_objective(gram, grouping, K)
                    events[-1] |= {f"inter_{when}": pytest.approx(float(inter), abs=0.05),
                                   f"intra_{when}": pytest.approx(float(intra), abs=0.05),
                                   f"objective_{when}": pytest.approx(float(objective), rel=1e-3)}
    return losses, rates, events, {f"{name}.expert_of": layer.expert_of.tolist()
                                   for name, layer in method.layers.items()}


@pytest.mark.parametrize("setting, top_k", [("mixed", 4), ("sequential", 8)])
def test_the_loop_is_algorithm_1(trained, llama, setting, top_k):
    """Against the naive loop: losses, schedule, gradients of Eq. 8, angles and groupings."""
    stages = ([("mixed", sorted(TASKS))] if setting == "mixed"
              else [(task, [task]) for task in shuffled(1)])
    losses, rates, events, groupings = naive_training(llama, stages, 3e-3, top_k)
    quiet = QUIET if top_k < K else QUIET[:2]  # noise selects nothing where all are active
    folder = trained("--setting", setting, *quiet, *NO_EVAL, "--learning_rate", "3e-3",
                     "--top_k", str(top_k))
    log, regroupings = lines_of(folder / "log.jsonl"), lines_of(folder / "regroup.jsonl")
    assert losses_of(folder) == pytest.approx(losses, abs=1e-5)
    assert [line["learning_rate"] for line in log] == pytest.approx(rates, rel=1e-9)
    assert groupings_of(folder) == groupings
    for line, expected in zip(regroupings, events, strict=True):
        assert {key: line[key] for key in expected} == expected


# --- precision and compilation ------------------------------------------------------------------


def test_bf16_and_checkpointing_combine(trained, monkeypatch):
    """Recomputed activations change no loss; bf16 is near float32, its adapter is in float32.

    The precision comes from the launcher.
    """
    exact = trained(*MIXED)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plain, recomputed = (trained(*NO_EVAL, *more, again="bf16")
                         for more in ((), ("--gradient_checkpointing",)))
    for folder in (plain, recomputed):
        assert "precision bf16" in printed(folder)[0] and results_of(folder)["precision"] == "bf16"
        assert {t.dtype for t in adapter_of(folder).values()} <= {torch.float32, torch.int64}
    assert_close_runs(recomputed, plain)
    losses, exact = losses_of(plain), losses_of(exact)
    assert losses == pytest.approx(exact, rel=0.05) and losses != exact


# --- regrouping ---------------------------------------------------------------------------------


def events_of(folder):
    """Lines of regroup.jsonl by step."""
    events = {}
    for line in lines_of(folder / "regroup.jsonl"):
        events.setdefault(line["step"], []).append(line)
    return events


def assert_contiguous(folder):
    """The groupings are those of the start."""
    assert set(map(tuple, groupings_of(folder).values())) == {tuple(i // 2 for i in range(N))}


@pytest.mark.parametrize("more, steps, counts", [
    (MIXED, [5, 10], [5, 5]), (("--regroup_every", "3", *NO_EVAL), [3, 6, 9, 10], [3, 3, 3, 1]),
    (("--regroup_every", "100", *NO_EVAL), [10], [10])])
def test_when_experts_are_regrouped(trained, more, steps, counts):
    """At every interval's end, from the mean gradient since the last; at the last step only
    angles are logged."""
    folder = trained(*more)
    events = events_of(folder)
    assert list(events) == list(steps)
    assert [layers[0]["steps"] for layers in events.values()] == counts
    for step, layers in events.items():
        assert [layer["layer"] for layer in layers] == LAYERS
        for layer in layers:
            assert layer["grouping"] == ("fixed" if step == 10 else "dog")
            assert (layer["regroup_drift"] > 0) == (layer["moved"] > 0)
            assert layer["skipped"] is None and 0 <= layer["rounds"] <= 10
            if step == 10:
                assert layer["moved"] == 0 and layer["intra_before"] == layer["intra_after"]
    if len(events) == 1:
        assert_contiguous(folder)
        return
    first = events[steps[0]]
    assert sum(layer["moved"] for layer in first) > 0
    assert all(layer["intra_after"] < layer["intra_before"] for layer in first)
    assert all(layer["objective_after"] > layer["objective_before"] for layer in first)


def test_random_groupings_are_a_control(trained):
    """They are balanced, follow the same schedule, and differ from DOG's."""
    folder, dog = trained("--grouping", "random", *NO_EVAL), trained(*MIXED)
    mine, theirs = events_of(folder), events_of(dog)
    assert list(mine) == list(theirs)
    for a, b in zip(mine[5], theirs[5], strict=True):
        assert a["grouping"] == "random" and a["moved"] > 0
        assert a["intra_before"] == b["intra_before"]
        assert a["objective_after"] < b["objective_after"]
    groupings = groupings_of(folder)
    for name, grouping in groupings.items():
        assert sorted(grouping) == [i // 2 for i in range(N)]
        assert grouping != groupings_of(dog)[name]
    assert len(set(map(tuple, groupings.values()))) == 2  # independent of one another
    assert losses_of(folder)[:5] == losses_of(dog)[:5] and losses_of(folder) != losses_of(dog)


def test_no_dog_only_measures(trained):
    """It never regroups and logs angles at the same steps; equal to DOG up to its first move."""
    fixed, dog = trained("--no_dog", *NO_EVAL), trained(*MIXED)
    assert losses_of(fixed)[:5] == losses_of(dog)[:5] and losses_of(fixed) != losses_of(dog)
    for step, layers in events_of(fixed).items():
        for layer, theirs in zip(layers, events_of(dog)[step], strict=True):
            assert layer["moved"] == 0 and layer["regroup_drift"] == 0
            assert step != 5 or layer["intra_before"] == theirs["intra_before"]
    assert_contiguous(fixed)


# --- evaluation ---------------------------------------------------------------------------------


def test_eval_only_gives_the_runs_predictions(trained, tiny, tmp_path):
    """Equal for another batch size, in the same order; no adapter is saved."""
    expected = files_of(trained(*MIXED))["predictions/01_mixed.jsonl"]
    succeed("--eval_only", "--adapter", trained(*MIXED) / "adapter", *tiny, *BRIEF,
            "--eval_batch_size", 7, "--output_dir", tmp_path / "out")
    files, results = files_of(tmp_path / "out"), results_of(tmp_path / "out")
    assert files.keys() == {"results.json", "predictions/01_badit.jsonl"}
    assert files["predictions/01_badit.jsonl"] == expected
    assert results["scores"]["best"] == results_of(trained(*MIXED))["scores"]["best"][1:]
    assert results["args"]["method"] == "badit"


def test_predictions_are_greedy_and_new(trained, llama):
    """Equal to an arg-max loop, although the checkpoint asks for sampling at temperature 5;
    neither prompt nor special tokens are in the text."""
    asked = json.loads((llama / "generation_config.json").read_text())
    assert asked["do_sample"] is True and asked["temperature"] == 5.0
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    adapter.load(model, trained(*MIXED) / "adapter").eval()
    ended = 0
    for row in lines_of(trained(*MIXED) / "predictions" / "01_mixed.jsonl"):
        ids = tokenizer(row["prompt"]).input_ids
        new = []
        while len(new) < 5 and (not new or new[-1] != 2):
            with torch.no_grad():
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        ended += new[-1] == 2
        assert row["prediction"] == tokenizer.decode([t for t in new if t != 2]).strip()
    assert 0 < ended


def test_predictions_are_streamed(flags, tmp_path):
    """An evaluation that is stopped leaves the answers so far, and no file that looks whole."""
    argv = (*flags, "--eval_before", "--eval_batch_size", 4, "--output_dir", tmp_path)
    with failing(evaluation, "generate", 3, KeyboardInterrupt):
        assert run(*argv).status == 130
    (partial,) = (tmp_path / "predictions").iterdir()
    assert partial.name == "00_before.jsonl.partial" and len(lines_of(partial)) == 8
    assert not (tmp_path / "results.json").exists()


# --- when things go wrong -----------------------------------------------------------------------


def test_a_non_finite_loss_stops_the_run(flags, tmp_path):
    """One clear line; no adapter and no results are left."""
    line = refused("loss", *flags, "--learning_rate", "1e30", "--output_dir", tmp_path / "out")
    assert "step 3" in line and "--learning_rate" in line
    assert files_of(tmp_path / "out").keys() == {"log.jsonl", "regroup.jsonl"}
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "out"))


# --- the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, status", [(["--help"], 0), (["--rank", "0"], 2),
                                          (["--output_dir", "/dev/null"], 2)])
def test_help_and_wrong_flags_wait_for_no_library(argv, status):
    """They end before anything is imported that takes seconds; of two processes, with the rank."""
    done, imported = imported_by("train.py", *argv, WORLD_SIZE="2", RANK="1")
    assert done.returncode == status
    assert done.stderr.count("[rank 1] error: ") == (status > 0)
    assert "registry" in imported
    assert not imported & {"torch", "transformers", "accelerate", "numpy", "safetensors"}


@pytest.mark.parametrize("warmup, steps, shares", [
    (0, 1, [1, 0]), (1, 1, [0, 1]), (4, 8, [0, 0.25, 0.5, 0.75, 1, 0.5 + 0.125**0.5, 0.5])])
def test_the_learning_rate_by_hand(warmup, steps, shares):
    """Up linearly, then half a cosine; no division by zero without a warm-up or a descent."""
    assert [train.warmup_then_cosine(step, warmup, steps) for step in range(len(shares))
            ] == pytest.approx(shares)


def test_accelerate_launch(trained, flags, tmp_path):
    """The documented command, in two processes, equals one process; a short last batch too."""
    one, two = trained(*QUIET), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2",
         ROOT / "train.py", *map(str, (*flags, *QUIET)), "--output_dir", two],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "processes 2" in lines[0] and sum(line.startswith("badit:") for line in lines) == 1
    assert_close_runs(two, one)
    mine, theirs = files_of(two), files_of(one)
    assert mine.keys() == theirs.keys()
    assert mine["predictions/01_mixed.jsonl"] == theirs["predictions/01_mixed.jsonl"]
    assert [line["tokens"] for line in lines_of(two / "log.jsonl")] == [
        line["tokens"] for line in lines_of(one / "log.jsonl")]
    results = results_of(two)
    assert results["scores"]["best"] == results_of(one)["scores"]["best"]
    assert results["processes"] == 2 and results["global_batch_size"] == 8
    assert results["args"]["batch_size"] == 4


def test_predictions_sort_by_number():
    """Also with more than 99 stages."""
    setup = SimpleNamespace(args=SimpleNamespace(output_dir=Path("out")), accelerator=None,
                            stages=[None] * 120)
    files = [str(Run(setup, None).predictions_file(number, "a")) for number in (1, 99, 100, 120)]
    assert files == sorted(files)
    setup.stages[:] = setup.stages[:99]
    assert Run(setup, None).predictions_file(1, "a") == Path("out/predictions/01_a.jsonl")


def test_losses_of_answers(llama, suite, tmp_path):
    """Losses equal the model's own, row by row; scores do not change. Gates read the prompts."""
    model_folder = shutil.copytree(llama, tmp_path / "model")
    (model_folder / "chat_template.jinja").write_text("<s>{{ messages[0]['content'] }}</s>")
    argv = ["--model", model_folder, "--suite", suite, "--method", "gainlora", "--setting",
            "sequential", "--eval_before", "--max_length", 64, "--max_new_tokens", 5, "--rank", 2,
            "--epochs", 1, "--chat_template"]
    succeed(*argv, "--eval_loss", "--output_dir", tmp_path / "with")
    succeed(*argv, "--output_dir", tmp_path / "without")
    results, plain = results_of(tmp_path / "with"), results_of(tmp_path / "without")
    assert results["scores"] == plain["scores"] and "losses" not in plain
    model, tokenizer = models.load(model_folder)
    model = adapter.load(model, tmp_path / "with" / "adapter").eval()
    *_, last = sorted((tmp_path / "with" / "predictions").iterdir())
    sums = {}
    for line in lines_of(last):
        prompt = tokenizer(line["prompt"], add_special_tokens=False).input_ids
        target = [*tokenizer(line["references"][0], add_special_tokens=False).input_ids, 2]
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])
        model.adapted_by.before_forward({"input_ids": ids, "labels": labels,
                                         "attention_mask": torch.ones_like(ids)})
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)  # (seq, vocabulary)
        places = range(len(prompt), len(prompt) + len(target))
        by_hand = -sum(float(log_probs[place - 1, ids[0, place]]) for place in places)
        assert line["loss"] == [pytest.approx(by_hand, rel=1e-4), len(target)]
        task = sums.setdefault(line["task"], [0, 0])
        task[0] += by_hand
        task[1] += len(target)
    assert results["losses"][-1] == [pytest.approx(sums[task][0] / sums[task][1], rel=1e-4)
                                     for task in results["task_order"]]
    assert results["loss_metrics"] == metrics.loss_metrics(
        results["losses"][1:], results["task_order"], None)
    assert len(results["losses"]) == 4 and results["losses"][0] != results["losses"][1]
