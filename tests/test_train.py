"""Whole runs of train.py on a tiny model: what they compute, and what they leave on disk."""

import json
import math
import operator
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import (
    QUIET,
    SMALL,
    TASKS,
    instances,
    lines_of,
    prompt_of,
    results_of,
    run,
    settings_of,
    snapshot,
    succeed,
    write_json,
)
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapter
import badit
import data
import train
from harness import arguments
from registry import METHODS, method_class

ROOT = Path(train.__file__).resolve().parent
EPOCHS, ROWS, K, N = 2, 36, 8, 16
WHOLE = {"results.json", "log.jsonl", "regroup.jsonl", "adapter/adapter_model.safetensors",
         "adapter/adapter_config.json"}
NO_EVAL = ("--eval_tasks", "none")
LAYERS = [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]


@pytest.fixture(scope="module")
def base_flags(llama, suite):
    """The flags of every run here: 36 rows, two epochs of five steps, the last one short."""
    return ("--model", llama, "--suite", suite, *SMALL, "--epochs", EPOCHS,
            "--learning_rate", "1e-2")


@pytest.fixture(scope="module")
def trained(base_flags, tmp_path_factory):
    """Call train.main with base_flags and more, once for equal flags -> the output folder."""
    folders = {}

    def call(*flags, again=False):
        key = (flags, again)
        if key not in folders:
            folder = tmp_path_factory.mktemp("run") / "out"
            outcome = succeed(*base_flags, *flags, "--output_dir", folder)
            folders[key] = folder, outcome
        return folders[key][0]

    def outcome(*flags):
        call(*flags)
        return folders[flags, False][1]

    call.outcome = outcome
    return call


MIXED = ("--eval_before",)
SEQUENTIAL = ("--setting", "sequential", "--eval_before", "--paper_metrics")


def files_of(folder):
    """Relative paths of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def losses_of(folder):
    """The loss of every step."""
    return [record["loss"] for record in lines_of(folder / "log.jsonl")]


def groupings_of(folder):
    """The final groupings, by layer."""
    state = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    return {key: tensor.tolist() for key, tensor in state.items() if key.endswith("expert_of")}


def shuffled(seed):
    """Section 7: sorted names, shuffled by random.Random(seed)."""
    order = sorted(TASKS)
    random.Random(seed).shuffle(order)
    return order


# --- settings, files, results -------------------------------------------------------------------


def test_mixed_run(trained):
    """One stage over all tasks; row 0 before it; every promised file and nothing else."""
    folder = trained(*MIXED)
    assert files_of(folder) == WHOLE | {"predictions/00_before.jsonl",
                                        "predictions/01_mixed.jsonl"}
    results = results_of(folder)
    assert results["rows"] == ["before", "mixed"] and results["task_order"] == shuffled(1)
    assert [len(row) for row in results["score_matrix"]] == [3, 3]
    log = lines_of(folder / "log.jsonl")
    assert [record["step"] for record in log] == list(range(1, 11))
    assert [record["epoch"] for record in log] == [1] * 5 + [2] * 5
    assert {record["stage"] for record in log} == {"mixed"}
    assert all(record["tokens"] > 0 and record["gradient_norm"] > 0 for record in log)
    assert results["metrics"] | {"rouge": 0} == {"rouge": 0, "forward": None, "forget_rate": None,
                                                 "backward": None}


PAPER = {
    "num_experts": 8, "top_k": 4, "rank": 4, "alpha": 32, "dropout": 0.05, "epochs": 10,
    "target_modules": ["gate_proj"], "learning_rate": 2e-4, "warmup_ratio": 0.03,
    "max_grad_norm": 1.0, "max_length": 1024, "max_new_tokens": 50, "seed": 1, "routing": "token",
    "inactive": "keep", "grouping": "dog", "svd": "exact", "regroup_every": None, "refine": False,
    "no_bad": False, "no_dog": False, "chat_template": False, "setting": "mixed",
    "method": "badit", "model": "smollm2-135m", "eval_tasks": "all"}


def test_defaults_are_the_papers():
    """Section 6, and what the issue says of the other flags."""
    defaults = vars(arguments.parse_flags([])[0])
    assert {name: defaults[name] for name in PAPER} == PAPER


def test_the_first_items_of_each_task(trained):
    """`--max_eval_per_task` and `--max_train_per_task` take the first ones."""
    folder = trained("--max_train_per_task", "3", "--max_eval_per_task", "2", "--tasks",
                     "which_is", "colour_name")
    rows = lines_of(folder / "predictions" / "01_mixed.jsonl")
    assert {row["id"] for row in rows} == {f"{task}-{i}" for task in ("which_is", "colour_name")
                                           for i in (20, 21)}
    assert results_of(folder)["tasks"].keys() == {"which_is", "colour_name"}
    assert all(t["train"] == 3 and t["test"] == 2 for t in results_of(folder)["tasks"].values())


def test_training_learns(trained):
    """The loss falls, and the scores move."""
    losses = losses_of(trained(*MIXED))
    assert sum(losses[5:]) < 0.9 * sum(losses[:5])
    before, after = results_of(trained(*MIXED))["score_matrix"]
    assert before != after and all(0 < sum(row) < 300 for row in (before, after))


def test_tokens_in_the_log(trained, llama):
    """The log counts the tokens of each global batch, padding left out: all rows, twice."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    total = sum(len(prompt) + len(target) for rows in tokenised(tokenizer).values()
                for prompt, target in rows)
    assert sum(r["tokens"] for r in lines_of(trained(*MIXED) / "log.jsonl")) == EPOCHS * total


def test_results_json(trained, base_flags, llama, suite):
    """Every field that the issue promises; what differs between equal runs stands under `run`."""
    results = results_of(trained(*MIXED))
    defaults = vars(arguments.parse_flags([])[0])
    given = {"model": str(llama), "suite": str(suite), "rank": 2, "alpha": 16.0, "max_length": 64,
             "max_new_tokens": 5, "epochs": 2, "learning_rate": 0.01, "eval_before": True}
    recorded = results["args"] | {key: results["run"][key] for key in arguments.RUN_FLAGS}
    for name, value in (defaults | given).items():
        if name not in ("output_dir", "overwrite", "batch_size"):
            assert recorded[name] == value, name
    assert results["args"]["batch_size"] == results["global_batch_size"] == 8
    assert len(results["code_sha256"]) == 64 and int(results["code_sha256"], 16) >= 0
    commit = shutil.which("git") and subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert results["git_commit"] == (commit or None)
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"]["python"] == sys.version.split()[0]
    assert {"transformers", "accelerate"} <= results["versions"].keys()
    model = AutoModelForCausalLM.from_pretrained(llama)
    bank, router = N * 32 + 64 * N, K * 32
    expected = {"total": sum(p.numel() for p in model.parameters()),
                "trainable": 2 * (bank + router), "stored": 2 * (2 * bank + router + N)}
    assert expected.items() <= results["parameters"].items()
    assert results["precision"] == "no" and results["processes"] == 1
    assert {name: task["metric"] for name, task in results["tasks"].items()} == {
        name: metric or "rouge_l" for name, metric in TASKS.items()}
    assert all((task["train"], task["test"]) == (12, 5) for task in results["tasks"].values())
    here = results["run"]
    parts = ("load", "decompose", "train", "regroup", "evaluate")
    assert all(here["seconds"][part] > 0 for part in parts)
    assert here["peak_memory_gib"] > 0 and here["pids"] == [os.getpid()]
    assert here["device"].startswith("cpu (")
    angles = results["regroupings"]
    assert [event["step"] for event in angles] == [5, 10]
    records = lines_of(trained(*MIXED) / "regroup.jsonl")
    for key in ("inter_before", "intra_before", "inter_after", "intra_after"):
        for event in angles:
            here = [r[key] for r in records if r["step"] == event["step"]]
            assert event[key] == pytest.approx(sum(here) / 2)


ROUGE = RougeScorer(["rougeL"], use_stemmer=True)


def score_by_hand(task, prediction, references):
    """(best, first) by the task's metric."""
    if TASKS[task] == "accuracy":
        words = [" ".join("".join(c for c in text.lower() if c.isalnum() or c.isspace()).split())
                 for text in (prediction, *references)]
        scores = [100.0 * (words[0] == word) for word in words[1:]]
    else:
        scores = [100 * ROUGE.score(reference, prediction)["rougeL"].fmeasure
                  for reference in references]
    return max(scores), scores[0]


def test_scores_are_those_of_the_predictions(trained):
    """The score matrix is the mean of each task's predictions, by best and first reference."""
    for flags, names in ((MIXED, ["before", "mixed"]), (SEQUENTIAL, ["before", *shuffled(1)])):
        folder = trained(*flags)
        results = results_of(folder)
        best_differs = False
        for number, name in enumerate(names):
            rows = lines_of(folder / "predictions" / f"{number:02d}_{name}.jsonl")
            for i, task in enumerate(results["task_order"]):
                scores = [score_by_hand(task, row["prediction"], row["references"])
                          for row in rows if row["task"] == task]
                assert len(scores) == 5
                best, first = (sum(column) / 5 for column in zip(*scores, strict=True))
                assert results["score_matrix"][number][i] == pytest.approx(best)
                assert results["scores"]["best"][number][i] == pytest.approx(best)
                assert results["scores"]["first"][number][i] == pytest.approx(first)
                best_differs |= best > first
        assert best_differs
        assert results["metrics_first_reference"]["rouge"] == pytest.approx(
            sum(results["scores"]["first"][-1]) / 3)


def test_predictions_are_in_the_order_of_the_test_items(trained):
    """Tasks in the run's order, items in the file's; prompt and references as in the suite."""
    rows = lines_of(trained(*MIXED) / "predictions" / "01_mixed.jsonl")
    expected = [(task, item["id"], prompt_of(task, item),
                 [item["output"]] if isinstance(item["output"], str) else item["output"])
                for task in shuffled(1) for item in instances(task, range(20, 25))]
    assert [(r["task"], r["id"], r["prompt"], r["references"]) for r in rows] == expected
    for row in rows:
        best, first = score_by_hand(row["task"], row["prediction"], row["references"])
        metric = TASKS[row["task"]] or "rouge_l"
        assert row["scores"][metric] == pytest.approx({"best": best, "first": first})


def test_sequential_run(trained):
    """One stage per task in the seed's order; its own optimizer and schedule; metrics by hand."""
    folder = trained(*SEQUENTIAL)
    order = shuffled(1)
    results = results_of(folder)
    assert results["task_order"] == order and results["rows"] == ["before", *order]
    assert files_of(folder) == WHOLE | {"predictions/00_before.jsonl"} | {
        f"predictions/{i:02d}_{task}.jsonl" for i, task in enumerate(order, start=1)}
    log = lines_of(folder / "log.jsonl")
    assert [(r["stage"], r["step"]) for r in log] == [
        (task, step) for task in order for step in range(1, 5)]
    rates = [r["learning_rate"] for r in log]
    assert rates[:4] == rates[4:8] == rates[8:] and max(rates) == 1e-2
    events = {(r["stage"], r["step"]) for r in lines_of(folder / "regroup.jsonl")}
    assert events == {(task, step) for task in order for step in (2, 4)}
    a = results["score_matrix"][1:]
    assert len(a) == 3 and all(len(row) == 3 and None not in row for row in a)
    expected = {
        "rouge": sum(a[2]) / 3, "forward": None,
        "backward": (a[2][0] - a[0][0] + a[2][1] - a[1][1]) / 2,
        "forget_rate": (max(a[0][0], a[1][0]) - a[2][0] + a[1][1] - a[2][1]) / 2,
        "backward_paper": (a[2][0] - a[0][0] + a[2][1] - a[1][1]) / 3,
        "forget_rate_paper": sum(max(a[0][i], a[1][i]) - a[2][i] for i in range(2)) / 2}
    assert results["metrics"] == pytest.approx(expected)
    assert expected["backward"] != 0 and expected["forget_rate"] != 0


@pytest.mark.parametrize("flags, order", [
    (("--seed", "3"), shuffled(3)), (("--seed", "4"), shuffled(4)),
    (("--task_order", "which_is", "say_both", "colour_name"),
     ["which_is", "say_both", "colour_name"]),
    (("--tasks", "which_is", "say_both"), [t for t in shuffled(1) if t != "colour_name"])])
def test_task_orders(trained, flags, order):
    """By seed, by hand, and of a part of the suite."""
    if "--tasks" in flags:
        order = ["say_both", "which_is"]
        random.Random(1).shuffle(order)
    folder = trained("--setting", "sequential", "--max_train_per_task", "3", *NO_EVAL, *flags)
    assert results_of(folder)["task_order"] == order
    assert [r["stage"] for r in lines_of(folder / "log.jsonl")] == [
        task for task in order for _ in range(2)]
    assert results_of(folder)["tasks"][order[0]]["train"] == 3


def test_a_task_may_be_called_before(base_flags, suite, tmp_path):
    """The name of row 0 is no reserved word."""
    renamed = tmp_path / "suite"
    for task, name in zip(TASKS, ("before", "mixed", "after"), strict=True):
        for split in ("train", "test"):
            write_json(renamed / name / f"{split}.json",
                       json.loads((suite / task / f"{split}.json").read_text()))
    succeed(*base_flags, "--suite", renamed, "--setting", "sequential", "--eval_before",
            "--max_train_per_task", 2, "--output_dir", tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert len(results["score_matrix"]) == 4 and results["metrics"]["backward"] is not None


def test_eval_tasks_seen(trained):
    """Only tasks trained so far are evaluated; what would need the others is null."""
    folder = trained("--setting", "sequential", "--eval_tasks", "seen")
    full = results_of(trained(*SEQUENTIAL))["score_matrix"][1:]
    matrix = results_of(folder)["score_matrix"]
    assert matrix == [[full[j][i] if i <= j else None for i in range(3)] for j in range(3)]
    metrics = results_of(folder)["metrics"]
    assert metrics["rouge"] == pytest.approx(sum(full[2]) / 3)
    assert metrics["backward"] is not None and metrics["forget_rate"] is not None


def test_eval_tasks_none(trained):
    """Nothing is evaluated and no score is made up."""
    folder = trained("--setting", "sequential", *NO_EVAL)
    results = results_of(folder)
    assert results["score_matrix"] == [[None] * 3] * 3
    assert set(results["metrics"].values()) == {None}
    assert files_of(folder) == WHOLE
    # Evaluation changes nothing in training.
    assert (folder / "log.jsonl").read_bytes() == (trained(*SEQUENTIAL) / "log.jsonl").read_bytes()


def test_single_run(trained):
    """Each task alone from the base model; the first equals the first stage of a sequence."""
    folder = trained("--setting", "single", "--eval_before")
    order, results = shuffled(1), results_of(folder)
    assert files_of(folder) == {"results.json", "log.jsonl", "regroup.jsonl"} | {
        "predictions/00_before.jsonl"} | {
        f"predictions/{i:02d}_{task}.jsonl" for i, task in enumerate(order, start=1)} | {
        f"adapter/{task}/adapter_{rest}" for task in order
        for rest in ("model.safetensors", "config.json")}
    matrix = results["score_matrix"][1:]
    assert [[value is None for value in row] for row in matrix] == [
        [i != j for i in range(3)] for j in range(3)]
    assert matrix[0][0] == results_of(trained(*SEQUENTIAL))["score_matrix"][1][0]
    mine, theirs = (lines_of(trained(*flags) / "log.jsonl") for flags in (
        ("--setting", "single", "--eval_before"), SEQUENTIAL))
    assert mine[:4] == theirs[:4] and mine[4:8] != theirs[4:8]
    assert results["metrics"]["forward"] is None and results["metrics"]["backward"] is None
    # The second task too starts from the base model, whatever ran before it.
    alone = trained("--setting", "single", "--tasks", order[1], *NO_EVAL)
    assert lines_of(alone / "log.jsonl") == mine[4:8]


@pytest.mark.parametrize("flags", [MIXED, SEQUENTIAL])
def test_forward_comes_from_a_single_run(trained, base_flags, tmp_path, monkeypatch, flags):
    """Forward is null beside a command; that command's results give it, recomputed by hand."""
    monkeypatch.chdir(tmp_path)
    results = results_of(trained(*flags))
    assert results["metrics"]["forward"] is None
    command = shlex.split(results["forward_needs"])
    assert results["forward_needs"] in "\n".join(trained.outcome(*flags).out)
    argv = command[command.index("train.py") + 1:]
    args, _ = train.parse_flags(argv)
    assert args.setting == "single"
    single = args.output_dir
    succeed(*argv)
    outcome = run(*base_flags, *flags, "--single_task_results", single / "results.json",
                  "--output_dir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    results, alone = results_of(tmp_path / "out"), results_of(single)
    assert alone["task_order"] == results["task_order"]
    for reference, metrics in (("best", "metrics"), ("first", "metrics_first_reference")):
        a = results["scores"][reference][1:]
        a0 = alone["scores"][reference][-3:]
        learned = [a[min(i, len(a) - 1)][i] for i in range(3)]
        forward = sum(learned[i] - a0[i][i] for i in range(3)) / 3
        assert results[metrics]["forward"] == pytest.approx(forward)
    assert "forward_needs" not in results
    assert results["metrics"]["forward"] != 0


def test_forward_takes_single_runs_of_the_same_global_batch(trained, base_flags, tmp_path):
    """As two processes are one, their single-task scores may come from one: 8 is 4 times 2."""
    single = trained("--setting", "single", "--eval_before") / "results.json"
    outcome = run(*base_flags, "--batch_size", 4, "--gradient_accumulation_steps", 2,
                  "--max_train_per_task", 8, "--single_task_results", single,
                  "--output_dir", tmp_path / "refused")
    assert outcome.status == 2 and "max_train_per_task" in outcome.err[0]
    outcome = run(*base_flags, "--batch_size", 4, "--gradient_accumulation_steps", 2,
                  "--single_task_results", single, "--output_dir", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert results_of(tmp_path / "out")["metrics"]["forward"] is not None


def test_zero_shot(trained, llama, suite, tmp_path):
    """The untrained model: the scores of row 0, no adapter, no log, no command that it refuses."""
    folder = tmp_path / "out"
    succeed("--method", "zero_shot", "--model", llama, "--suite", suite, "--max_length", 64,
            "--max_new_tokens", 5, "--output_dir", folder)
    assert files_of(folder) == {"results.json", "predictions/01_zero_shot.jsonl"}
    results = results_of(folder)
    assert results["score_matrix"] == results_of(trained(*MIXED))["score_matrix"][:1]
    assert results["parameters"]["trainable"] == results["parameters"]["stored"] == 0
    assert lines_of(folder / "predictions/01_zero_shot.jsonl") == lines_of(
        trained(*MIXED) / "predictions/00_before.jsonl")
    if "forward_needs" in results:
        argv = shlex.split(results["forward_needs"])
        train.parse_flags(argv[argv.index("train.py") + 1:])


def test_the_first_line_and_the_table(trained):
    """Precision and processes first; then scores before and after for every task."""
    out = trained.outcome(*MIXED).out
    assert "precision no" in out[0] and "processes 1" in out[0] and "cpu" in out[0]
    results = results_of(trained(*MIXED))
    for task, *scores in zip(results["task_order"], *results["score_matrix"], strict=True):
        (line,) = (line for line in out if line.startswith(task))
        assert line.split()[2:] == [f"{score:.2f}" for score in scores]
    assert f"rouge: {results['metrics']['rouge']:.2f}" in out
    assert any(line.startswith("forward:") and "not measured" in line for line in out)


# --- reproducibility ----------------------------------------------------------------------------


def test_equal_runs_leave_equal_files(trained):
    """Adapter, logs and predictions are byte-equal in another folder."""
    one, two = trained(*MIXED), trained(*MIXED, again=True)
    assert files_of(one) == files_of(two)
    for name in files_of(one) - {"results.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_equal_runs_have_equal_results(trained):
    """results.json differs under its key `run` alone."""
    one, two = (results_of(trained(*MIXED, again=again)) for again in (False, True))
    different = {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}
    assert different == {"run"}


def test_another_seed_is_another_run(trained):
    """The seed decides order, dropout and noise."""
    assert losses_of(trained("--seed", "2", *NO_EVAL)) != losses_of(trained(*MIXED))


@pytest.mark.parametrize("train_rows", [8, 12])
@pytest.mark.parametrize("batch, accumulation", [(4, 2), (2, 4)])
def test_accumulation_equals_one_large_batch(trained, batch, accumulation, train_rows):
    """Losses are means over the target tokens of the global batch, a short last one included."""
    flags = (*QUIET, *NO_EVAL, "--max_train_per_task", str(train_rows))
    whole = trained(*flags)
    parts = trained(*flags, "--batch_size", str(batch),
                    "--gradient_accumulation_steps", str(accumulation))
    assert len(losses_of(whole)) == EPOCHS * math.ceil(3 * train_rows / 8)
    assert losses_of(parts) == pytest.approx(losses_of(whole), abs=1e-5)
    assert groupings_of(parts) == groupings_of(whole)
    for mine, theirs in zip(lines_of(parts / "regroup.jsonl"), lines_of(whole / "regroup.jsonl"),
                            strict=True):
        for key in ("intra_before", "intra_after", "inter_before", "inter_after", "moved"):
            assert mine[key] == pytest.approx(theirs[key], abs=0.05)


def tokenised(tokenizer):
    """(prompt ids, target ids) of the training rows by task, in the suite's order."""
    return {task: [(tokenizer(prompt_of(task, row)).input_ids,
                    tokenizer(row["output"] if isinstance(row["output"], str)
                              else row["output"][0], add_special_tokens=False).input_ids + [2])
                   for row in instances(task, range(12))] for task in sorted(TASKS)}


def angle(a, b):
    """Angle in degrees between two vectors."""
    cosine = float(a @ b) / (float(a @ a) * float(b @ b)) ** 0.5
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def angles_by_hand(g, grouping):
    """(inter, intra) in degrees and Eq. 10's objective from gradients (N, D), pair by pair.

    A component without a gradient has no direction and no angle.
    """
    unit = {i: row / row.norm() for i, row in enumerate(g.double()) if row.norm() > 0}
    members = [[unit[i] for i in unit if grouping[i] == k] for k in range(K)]
    centroids = [sum(group) for group in members if group]
    K_alive = len(centroids)
    inter = [angle(centroids[p], centroids[q]) for p in range(K_alive) for q in range(p)]
    intra = [angle(a, b) for group in members for i, a in enumerate(group) for b in group[:i]]
    return (sum(inter) / len(inter), sum(intra) / len(intra),
            sum(float(c @ c) for c in centroids))


def naive_training(llama, stages, rate, top_k, seed=1, warmup=0.03):
    """Algorithm 1 in plain torch: rows one by one, full logits, no accelerate, no padding.

    Returns losses and learning rates of all steps, (inter, intra, objective) before every
    regrouping, and the final groupings.
    """
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    method = method_class("badit")(settings_of(dropout=0.0, router_noise=0.0, top_k=top_k))
    method.wrap(model)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
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
                for parameter in weights:
                    parameter.grad *= min(1.0, 1.0 / norm)
                rates.append(rate * (step / warm if step < warm else
                                     0.5 * (1 + math.cos(math.pi * (step - warm)
                                                         / (steps - warm)))))
                optimizer.param_groups[0]["lr"] = rates[-1]
                optimizer.step()
                losses.append(loss)
                step += 1
            for name, layer in method.layers.items():
                mean = summed[name] / count
                old = layer.expert_of.clone()
                if step < steps:
                    layer.expert_of.copy_(badit.group_components(mean, K, old))
                events.append([angles_by_hand(mean, old), angles_by_hand(mean, layer.expert_of)])
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
    assert [record["learning_rate"] for record in log] == pytest.approx(rates, rel=1e-9)
    assert groupings_of(folder) == groupings
    assert len(regroupings) == len(events)
    for record, (before, after) in zip(regroupings, events, strict=True):
        for moment, (inter, intra, objective) in (("before", before), ("after", after)):
            assert record[f"inter_{moment}"] == pytest.approx(inter, abs=0.05)
            assert record[f"intra_{moment}"] == pytest.approx(intra, abs=0.05)
            assert record[f"objective_{moment}"] == pytest.approx(objective, rel=1e-3)


def test_gradient_checkpointing_changes_nothing(trained):
    """Less memory, the same losses, with dropout and selection noise."""
    folder = trained("--gradient_checkpointing", *NO_EVAL)
    assert losses_of(folder) == pytest.approx(losses_of(trained(*MIXED)), abs=1e-6)
    assert groupings_of(folder) == groupings_of(trained(*MIXED))


def test_bf16(base_flags, tmp_path, monkeypatch):
    """Precision comes from the launcher: base in bf16, adapter in fp32, close to the fp32 run."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    outcome = succeed(*base_flags, *QUIET, "--gradient_checkpointing", "--output_dir", tmp_path)
    assert "precision bf16" in outcome.out[0]
    assert results_of(tmp_path)["precision"] == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    plain = tmp_path / "fp32"
    succeed(*base_flags, *QUIET, *NO_EVAL, "--output_dir", plain)
    assert losses_of(tmp_path)[:3] == pytest.approx(losses_of(plain)[:3], rel=3e-2)
    assert losses_of(tmp_path) != losses_of(plain)
    state = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64}


# --- regrouping ---------------------------------------------------------------------------------


def events_of(folder):
    """Records of regroup.jsonl by step."""
    events = {}
    for record in lines_of(folder / "regroup.jsonl"):
        events.setdefault(record["step"], []).append(record)
    return events


@pytest.mark.parametrize("every, steps, counts", [
    (None, [5, 10], [5, 5]), (3, [3, 6, 9, 10], [3, 3, 3, 1]), (1, range(1, 11), [1] * 10),
    (100, [10], [10])])
def test_when_experts_are_regrouped(trained, every, steps, counts):
    """At every interval's end, from the mean gradient since the last; at the last step only
    angles are logged."""
    flags = () if every is None else ("--regroup_every", str(every))
    events = events_of(trained(*flags, *NO_EVAL))
    assert list(events) == list(steps)
    assert [layers[0]["steps"] for layers in events.values()] == counts
    for step, layers in events.items():
        assert [layer["layer"] for layer in layers] == LAYERS
        for layer in layers:
            assert layer["grouping"] == ("fixed" if step == 10 else "dog")
            # At step 1 the learning rate is 0, so all weights alpha are equal still.
            assert (layer["regroup_drift"] > 0) == (layer["moved"] > 0 and step > 1)
            assert layer["skipped"] is None and 0 <= layer["rounds"] <= 10
            if step == 10:
                assert layer["moved"] == 0 and layer["intra_before"] == layer["intra_after"]
    if len(events) > 1:
        first = events[steps[0]]
        assert sum(layer["moved"] for layer in first) > 0
        assert all(r["intra_after"] < r["intra_before"] for r in first)
        assert all(r["objective_after"] > r["objective_before"] for r in first)
    else:
        assert set(map(tuple, groupings_of(trained(*flags, *NO_EVAL)).values())) == {
            tuple(i // 2 for i in range(N))}


def test_random_groupings_are_a_control(trained):
    """Balanced, on the same schedule, of the same gradients at first, and not DOG's."""
    folder, dog = trained("--grouping", "random", *NO_EVAL), trained(*MIXED)
    mine, theirs = events_of(folder), events_of(dog)
    assert list(mine) == list(theirs)
    for a, b in zip(mine[5], theirs[5], strict=True):
        assert a["grouping"] == "random" and a["moved"] > 0
        assert a["intra_before"] == b["intra_before"] and a["objective_after"] < b[
            "objective_after"]
    for name, grouping in groupings_of(folder).items():
        assert sorted(grouping) == [i // 2 for i in range(N)]
        assert grouping != groupings_of(dog)[name]
    assert losses_of(folder)[:5] == losses_of(dog)[:5] and losses_of(folder) != losses_of(dog)
    assert groupings_of(trained("--grouping", "random", *NO_EVAL, again=True)) == groupings_of(
        folder)
    # Layers are grouped independently of one another.
    assert len(set(map(tuple, groupings_of(folder).values()))) == 2


def test_fixed_grouping_is_no_dog(trained):
    """Both never regroup and log angles at the same steps; equal to DOG up to its first move."""
    fixed, no_dog = trained("--grouping", "fixed", *NO_EVAL), trained("--no_dog", *NO_EVAL)
    for file in ("log.jsonl", "regroup.jsonl", "adapter/adapter_model.safetensors"):
        assert (fixed / file).read_bytes() == (no_dog / file).read_bytes()
    dog = trained(*MIXED)
    assert losses_of(fixed)[:5] == losses_of(dog)[:5] and losses_of(fixed) != losses_of(dog)
    for step, layers in events_of(fixed).items():
        for layer, theirs in zip(layers, events_of(dog)[step], strict=True):
            assert layer["moved"] == 0 and layer["regroup_drift"] == 0
            assert step != 5 or layer["intra_before"] == theirs["intra_before"]
    assert set(map(tuple, groupings_of(fixed).values())) == {tuple(i // 2 for i in range(N))}


def test_refine_is_never_below_the_rounds(trained):
    """Eq. 10 after the swaps is at least that after the paper's rounds, from equal gradients."""
    refined = events_of(trained("--refine", "--regroup_every", "3", *NO_EVAL))[3]
    rounds = events_of(trained("--regroup_every", "3", *NO_EVAL))[3]
    for mine, theirs in zip(refined, rounds, strict=True):
        assert mine["objective_before"] == theirs["objective_before"]
        assert mine["objective_after"] >= theirs["objective_after"] - 1e-9
    assert sum(r["objective_after"] for r in refined) > sum(r["objective_after"] for r in rounds)


def test_static_routing(trained):
    """All experts are active; a regrouping changes no layer's output; alpha is trained."""
    folder = trained("--routing", "static", "--regroup_every", "2", *NO_EVAL)
    moved = 0
    for layers in events_of(folder).values():
        for layer in layers:
            assert layer["regroup_drift"] < 1e-5 and layer["expert_share"] == [1.0] * K
            moved += layer["moved"]
    assert moved > 0
    state = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    for layer in LAYERS:
        assert state[f"{layer}.alpha"].shape == (K,) and (state[f"{layer}.alpha"] != 1).all()
        assert f"{layer}.router" not in state


def test_first_losses_of_the_variants(trained, llama):
    """At init all but `--inactive drop` are the base model, so their first losses agree."""
    first = {}
    variants = {"token": (), "top_1": ("--top_k", "1"), "top_8": ("--top_k", "8"),
                "static": ("--routing", "static"), "no_bad": ("--no_bad",),
                "lora_moe": ("--no_bad", "--no_dog"), "fast": ("--svd", "fast"),
                "two": ("--target_modules", "gate_proj", "up_proj"),
                "drop": ("--inactive", "drop")}
    logs = {}
    for name, flags in variants.items():
        folder = trained("--dropout", "0", "--max_train_per_task", "4", *NO_EVAL, *flags)
        first[name], logs[name] = losses_of(folder)[0], losses_of(folder)
        assert all(math.isfinite(value) for value in logs[name])
    dropped = first.pop("drop")
    assert list(first.values()) == pytest.approx([first["token"]] * len(first), rel=1e-4)
    assert abs(dropped - first["token"]) > 1e-3 * first["token"]
    different = [name for name in logs if name not in ("lora_moe", "fast")]
    assert len({tuple(logs[name]) for name in different}) == len(different)


def test_no_bad_regroups_the_bank_of_loramoe(trained):
    """`--no_bad` has no initial bank but DOG; with `--no_dog` too it never moves a component."""
    for flags, moves in ((("--no_bad",), True), (("--no_bad", "--no_dog"), False)):
        folder = trained(*flags, "--regroup_every", "4", *NO_EVAL)
        state = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
        assert state.keys() == {f"{layer}.{part}" for layer in LAYERS
                                for part in ("lora_A", "lora_B", "router", "expert_of")}
        events = events_of(folder)
        assert list(events) == [4, 8, 10]
        assert (sum(r["moved"] for layers in events.values() for r in layers) > 0) == moves


def test_two_target_modules(trained):
    """Every named module of every layer is adapted and logged."""
    folder = trained("--target_modules", "gate_proj", "o_proj", *NO_EVAL)
    names = {r["layer"] for r in lines_of(folder / "regroup.jsonl")}
    assert names == {f"model.layers.{i}.{name}" for i in range(2)
                     for name in ("mlp.gate_proj", "self_attn.o_proj")}
    assert {key.rpartition(".")[0] for key in groupings_of(folder)} == names


@torch.no_grad()
def observe(method, batch):
    """(input, output) at the real tokens of each layer for the last micro-batch, in evaluation
    mode."""
    seen = {}
    mask = batch["attention_mask"].bool()
    handles = [layer.register_forward_hook(
        lambda layer, inputs, output, name=name: seen.update({name: (inputs[0][mask],
                                                                     output[mask])}))
        for name, layer in method.layers.items()]
    method.model.eval()
    method.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")})
    method.model.train()
    for handle in handles:
        handle.remove()
    return seen


def test_what_a_regrouping_logs(base_flags, tmp_path, monkeypatch):
    """Angles, Eq. 10, moves, drift and the router's health, recomputed from gradients and
    activations that the test catches itself."""
    gradients, expected = [], []
    after_backward, after_step = badit.Badit.after_backward, badit.Badit.after_step

    def catch_gradients(self):
        gradients.append({name: torch.cat([layer.lora_A.grad, layer.lora_B.grad.T], 1).clone()
                          for name, layer in self.layers.items()})
        return after_backward(self)

    @torch.no_grad()
    def catch_records(self, batch):
        old = {name: layer.expert_of.clone() for name, layer in self.layers.items()}
        seen = observe(self, batch)
        records = after_step(self, batch)
        for record in records:
            name = record["layer"]
            layer, (x, y) = self.layers[name], seen[name]
            g = torch.stack([step[name] for step in gradients]).mean(0)
            layer.eval()
            drift = float((layer(x) - y).norm() / y.norm())
            layer.train()
            z = x @ layer.router.T
            alpha = K * z.exp() / z.exp().sum(1, keepdim=True)
            chosen = torch.zeros_like(z).scatter(1, z.topk(4, dim=1).indices, 1.0)
            p = alpha / K
            before, after = angles_by_hand(g, old[name]), angles_by_hand(g, layer.expert_of)
            norms = [float(g[old[name] == k].norm()) for k in range(K)]
            expected.append({
                "inter_before": before[0], "intra_before": before[1],
                "objective_before": before[2], "inter_after": after[0], "intra_after": after[1],
                "objective_after": after[2], "moved": int((old[name] != layer.expert_of).sum()),
                "regroup_drift": drift, "expert_share": chosen.mean(0).tolist(),
                "alpha_mean": alpha.mean(0).tolist(), "alpha_max": float(alpha.max()),
                "alpha_entropy": float(-(p * p.log()).sum(1).mean()), "gradient_norm": norms,
                "steps": len(gradients)})
        if records:
            gradients.clear()
        return records

    monkeypatch.setattr(badit.Badit, "after_backward", catch_gradients)
    monkeypatch.setattr(badit.Badit, "after_step", catch_records)
    succeed(*base_flags, *NO_EVAL, "--regroup_every", 4, "--output_dir", tmp_path)
    records = lines_of(tmp_path / "regroup.jsonl")
    assert len(records) == len(expected) == 6
    for record, wanted in zip(records, expected, strict=True):
        for key, value in wanted.items():
            tolerance = {"abs": 1e-2} if "int" in key else {"rel": 1e-3, "abs": 1e-5}
            assert record[key] == pytest.approx(value, **tolerance), key
    assert len({tuple(record["expert_share"]) for record in records}) > 1


# --- evaluation ---------------------------------------------------------------------------------


@pytest.fixture
def evaluate_only(llama, suite, trained, tmp_path):
    """Evaluate the mixed run's adapter with more flags -> records of its predictions."""
    def call(*flags):
        succeed("--eval_only", "--adapter", trained(*MIXED) / "adapter", "--model", llama,
                "--suite", suite, "--max_length", 64, "--max_new_tokens", 5,
                "--output_dir", tmp_path / "eval", *flags)
        return lines_of(tmp_path / "eval" / "predictions" / "01_badit.jsonl")
    return call


def test_eval_only_gives_the_runs_predictions(trained, evaluate_only, tmp_path):
    """A saved adapter evaluates as it did when it was trained; nothing is trained or saved."""
    assert evaluate_only() == lines_of(trained(*MIXED) / "predictions" / "01_mixed.jsonl")
    assert files_of(tmp_path / "eval") == {"results.json", "predictions/01_badit.jsonl"}
    results = results_of(tmp_path / "eval")
    assert results["score_matrix"] == results_of(trained(*MIXED))["score_matrix"][1:]
    assert results["args"]["method"] == "badit"


@pytest.mark.parametrize("size", [1, 2, 7])
def test_predictions_do_not_depend_on_the_batch_size(trained, evaluate_only, size):
    """Padding and batch mates change no answer, and not the order."""
    expected = lines_of(trained(*MIXED) / "predictions" / "01_mixed.jsonl")
    assert evaluate_only("--eval_batch_size", size) == expected


def test_batches_hold_every_row_once_and_what_is_alike():
    """At most `size` rows, none half padding; tasks with brief answers apart; longest first."""
    import evaluation

    rows = [{"task": task, "input_ids": [0] * length, "references": [answer]}
            for task, answer in (("label", "yes"), ("summary", "a long answer of some seven words"))
            for length in (7, 9, 8, 3)]
    assert evaluation.make_batches(rows, 2) == [[5, 6], [4], [7], [1, 2], [0], [3]]
    assert evaluation.make_batches(rows, 16) == [[5, 6, 4], [7], [1, 2, 0], [3]]
    assert evaluation.make_batches([], 4) == []


def test_predictions_are_greedy_and_new(trained, llama):
    """Against a loop over arg-max, although the checkpoint asks for sampling at temperature 5;
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


def test_predictions_are_streamed(base_flags, tmp_path, monkeypatch):
    """An evaluation that is stopped leaves the answers so far, and no file that looks whole."""
    import evaluation

    calls, real = [], evaluation.generate

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(evaluation, "generate", stop_at_the_third)
    assert run(*base_flags, "--eval_before", "--eval_batch_size", 4, "--output_dir",
               tmp_path).status == 130
    (partial,) = (tmp_path / "predictions").iterdir()
    assert partial.name == "00_before.jsonl.partial" and len(lines_of(partial)) == 8
    assert not (tmp_path / "results.json").exists()


# --- when things go wrong -----------------------------------------------------------------------


def test_a_non_finite_loss_stops_the_run(base_flags, tmp_path):
    """Exit status 2 and one clear line of its own; no adapter and no results are left."""
    outcome = run(*base_flags, "--learning_rate", "1e30", "--output_dir", tmp_path / "out")
    assert outcome.status == 2
    (line,) = (line for line in outcome.err if "error" in line)
    assert line.startswith("error: ") and "loss" in line and "--learning_rate" in line
    assert "step 3" in line and not any("Traceback" in line for line in outcome.err)
    assert files_of(tmp_path / "out") == {"log.jsonl", "regroup.jsonl"}
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "out"))


def test_overwrite_deletes_only_what_the_program_wrote(base_flags, trained, tmp_path):
    """A user's files survive byte for byte; nothing of the earlier run does."""
    folder = tmp_path / "out"
    succeed(*base_flags, "--setting", "sequential", "--max_train_per_task", 2, "--output_dir",
            folder)
    old = files_of(folder)
    mine = ["notes.txt", "predictions/notes.txt", "predictions/scores.jsonl",
            "adapter/README.md", "adapter/copy/adapter_model.safetensors.bak", "data/log.jsonl"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    before = snapshot(folder)
    refused = run(*base_flags, "--output_dir", folder)
    assert refused.status == 2 and snapshot(folder) == before
    assert len(refused.err) == 1 and f"{folder} is not empty" in refused.err[0]
    succeed(*base_flags, *MIXED, "--overwrite", "--output_dir", folder)
    assert files_of(folder) == files_of(trained(*MIXED)) | set(mine)
    after = snapshot(folder)
    assert all(after[name] == before[name] for name in mine)
    for name in files_of(trained(*MIXED)) - {"results.json"}:
        assert (folder / name).read_bytes() == (trained(*MIXED) / name).read_bytes()
    assert old - files_of(folder)


def test_overwrite_does_not_delete_what_the_run_reads(trained, llama, suite, tmp_path):
    """Evaluating an adapter into the folder of its own run must not cost the adapter."""
    folder = tmp_path / "out"
    for name in files_of(trained(*MIXED)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((trained(*MIXED) / name).read_bytes())
    run("--eval_only", "--adapter", folder / "adapter", "--model", llama, "--suite", suite,
        "--max_length", 64, "--max_new_tokens", 2, "--overwrite", "--output_dir", folder)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (folder / name).read_bytes() == (trained(*MIXED) / name).read_bytes()


# --- the launcher -------------------------------------------------------------------------------


def launch(*argv, processes):
    """`accelerate launch train.py` on the CPU, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else [
        "--cpu", "--num_processes", "1"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", *several, ROOT / "train.py",
         *map(str, argv)], env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_accelerate_launch(trained, base_flags, tmp_path):
    """The documented command does what train.main does in this process."""
    done = launch(*base_flags, *MIXED, "--output_dir", tmp_path, processes=1)
    assert done.returncode == 0, done.stderr
    assert "precision no, processes 1" in done.stdout.splitlines()[0]
    assert losses_of(tmp_path) == pytest.approx(losses_of(trained(*MIXED)), abs=1e-5)
    assert groupings_of(tmp_path) == groupings_of(trained(*MIXED))
    assert results_of(tmp_path)["score_matrix"] == results_of(trained(*MIXED))["score_matrix"]


@pytest.mark.slow
def test_two_processes_are_one(trained, base_flags, tmp_path):
    """Losses, groupings, predictions and metrics of two processes, a short last batch included."""
    done = launch(*base_flags, *QUIET, "--output_dir", tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr
    assert "processes 2" in done.stdout.splitlines()[0]
    assert sum(line.startswith("badit:") for line in done.stdout.splitlines()) == 1
    one, two = trained(*QUIET), tmp_path / "out"
    assert files_of(two) == files_of(one)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)
    assert groupings_of(two) == groupings_of(one)
    assert [r["tokens"] for r in lines_of(two / "log.jsonl")] == [
        r["tokens"] for r in lines_of(one / "log.jsonl")]
    for mine, theirs in zip(lines_of(two / "regroup.jsonl"), lines_of(one / "regroup.jsonl"),
                            strict=True):
        for key in ("intra_before", "intra_after", "inter_before", "inter_after", "moved"):
            assert mine[key] == pytest.approx(theirs[key], abs=0.05)
    assert lines_of(two / "predictions/01_mixed.jsonl") == lines_of(
        one / "predictions/01_mixed.jsonl")
    results = results_of(two)
    assert results["score_matrix"] == results_of(one)["score_matrix"]
    assert results["processes"] == 2 and results["global_batch_size"] == 8
    assert results["args"]["batch_size"] == 4


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trains])
def test_bf16_and_checkpointing_combine(method, llama, suite, tmp_path, monkeypatch):
    """Recomputed activations change no loss; bf16 autocast stays near float32."""
    argv = ("--model", llama, "--suite", suite, *SMALL, "--tasks", "colour_name", "which_is",
            "--method", method, "--epochs", 2, "--learning_rate", "1e-2", *NO_EVAL)
    losses = {}
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        for more in ((), ("--gradient_checkpointing",)):
            folder = tmp_path / f"{precision}{len(more)}"
            succeed(*argv, *more, "--output_dir", folder)
            losses[precision, len(more)] = losses_of(folder)
    assert losses["bf16", 1] == pytest.approx(losses["bf16", 0], abs=1e-5)
    assert losses["no", 1] == pytest.approx(losses["no", 0], abs=1e-6)
    assert losses["bf16", 0] == pytest.approx(losses["no", 0], rel=0.05)


@pytest.mark.slow
def test_torch_compile_changes_no_loss(llama, suite, tmp_path, monkeypatch):
    """As `accelerate launch --dynamo_backend aot_eager` asks for it; forward and backward."""
    argv = ("--model", llama, "--suite", suite, *SMALL, *QUIET, "--tasks", "colour_name",
            "--epochs", 2, "--learning_rate", "1e-2", *NO_EVAL)
    succeed(*argv, "--output_dir", tmp_path / "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    succeed(*argv, "--output_dir", tmp_path / "compiled")
    torch.compiler.reset()
    assert results_of(tmp_path / "compiled")["compiler"] == "aot_eager"
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "eager"),
                                                             abs=1e-5)


EVALUATE_ALL = """
import sys, train
for argv in (arguments.split("\\t") for arguments in sys.stdin.read().splitlines()):
    assert train.main(argv) == 0
"""


@pytest.mark.slow
def test_every_method_loads_in_a_fresh_process(llama, suite, tmp_path):
    """Base and adapter folder are all that the same predictions need, after two tasks."""
    names = [name for name, method in METHODS.items() if method.trains]
    common = ["--model", llama, "--suite", suite, "--max_length", 64, "--max_new_tokens", 6]
    lines = []
    for name in names:
        succeed("--method", name, *common, "--rank", 2, "--learning_rate", 0.02, "--epochs", 1,
                "--setting", "sequential", "--tasks", "colour_name", "which_is",
                "--output_dir", tmp_path / name)
        argv = ["--eval_only", "--adapter", tmp_path / name / "adapter", *common, "--tasks",
                "colour_name", "which_is", "--output_dir", tmp_path / f"{name}-eval"]
        lines.append("\t".join(map(str, argv)))
    subprocess.run([sys.executable, "-c", EVALUATE_ALL], input="\n".join(lines), text=True,
                   cwd=ROOT, check=True, capture_output=True)
    for name in names:
        trained_rows = lines_of(sorted((tmp_path / name / "predictions").iterdir())[-1])
        loaded_rows = lines_of(tmp_path / f"{name}-eval" / "predictions" / f"01_{name}.jsonl")
        key = operator.itemgetter("task", "id")
        assert sorted(loaded_rows, key=key) == sorted(trained_rows, key=key), name
