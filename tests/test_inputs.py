"""Bad input: exit status 2 and one clear line, before weights are loaded; the disk stays."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SMALL, instances, prompt_of, results_of, run, snapshot, succeed, write_json
from transformers import AutoTokenizer, BertConfig

import models
import train
from harness import arguments, identity, launch
from inputs import embedded
from registry import METHODS, method_class

ROOT = Path(train.__file__).resolve().parent
BAR = re.compile(r"^Loading weights: .*it/s\]$")  # before the one line, once weights are needed


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Runs start in an empty folder and see no data folder of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BADIT_DATA", raising=False)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""
    monkeypatch.setattr(models, "load", lambda *args: pytest.fail("weights were loaded"))


@pytest.fixture(scope="module")
def finished(llama, suite, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    succeed("--model", llama, "--suite", suite, *SMALL, "--epochs", 1, "--max_train_per_task", 2,
            "--eval_tasks", "none", "--output_dir", folder)
    return folder


def refused(*argv, named=()):
    """Call train.main, which must say why not in one line and change nothing -> that line."""
    before = snapshot(Path.cwd())
    outcome = run(*argv)
    assert outcome.status == 2
    lines = [line for line in outcome.err if line and not BAR.search(line)]
    assert len(lines) == 1, lines
    (line,) = lines
    assert line.startswith("error: ") and len(line) > 20
    for word in [named] if isinstance(named, str) else named:
        assert word in line
    assert snapshot(Path.cwd()) == before
    return line


# --- flags --------------------------------------------------------------------------------------

WHOLE = ("epochs", "batch_size", "gradient_accumulation_steps", "max_train_per_task",
         "max_eval_per_task", "max_length", "max_new_tokens", "eval_batch_size", "rank",
         "num_experts", "top_k", "regroup_every")
BAD_NUMBERS = {
    **{name: ("0", "-1", "1.5", "nan", "inf", "many", "") for name in WHOLE},
    "seed": ("-1", "0.5", "nan", "inf", "one"),
    **{name: ("0", "-0.1", "nan", "inf", "-inf", "1e999", "high")
       for name in ("learning_rate", "alpha", "max_grad_norm")},
    "router_noise": ("-0.1", "nan", "inf", "much"),
    "dropout": ("1", "1.5", "-0.1", "nan", "inf", "half"),
    "warmup_ratio": ("1", "2", "-0.1", "nan", "inf", "short"),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_NUMBERS.items()
                                         for value in values])
def test_bad_numbers(no_weights, name, value):
    """Zero, negative or non-finite where that makes no sense; the flag and the value are named."""
    line = refused(f"--{name}={value}", named=f"--{name}")
    assert repr(value) in line and "--help" in line


@pytest.mark.parametrize("flags, named", [
    (["--epoch", "3"], "--epoch"),  # no abbreviations
    (["--epochs"], "--epochs"),
    (["--setting", "both"], "'both'"),
    (["--routing", "random"], "'random'"),
    (["--grouping", "kmeans"], "'kmeans'"),
    (["--inactive", "freeze"], "'freeze'"),
    (["--svd", "slow"], "'slow'"),
    (["--eval_tasks", "some"], "'some'"),
    (["--report_to", "paper"], "'paper'"),
    (["--tasks"], "--tasks"),
    (["--target_modules"], "--target_modules"),
    (["--refine", "yes"], "yes"),
    (["extra"], "extra"),
    (["--learning-rate", "1e-3"], "--learning-rate"),
    (["--learning_rate", "-1"], "--learning_rate"),
])
def test_argparse_errors_are_one_line(no_weights, flags, named):
    """No usage text; the line points to --help."""
    assert "--help" in refused(*flags, named=named)


def test_help_tells_every_flag(capsys):
    """`--help` ends well, and explains what can be refused."""
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"--{name}" in out for name in BAD_NUMBERS)


@pytest.mark.parametrize("flags, named", [
    (["--method", "zero_shot", "--rank", "4"], "--rank"),
    (["--method", "zero_shot", "--epochs", "3"], "--epochs"),
    (["--method", "zero_shot", "--setting", "sequential"], "--setting"),
    (["--method", "zero_shot", "--learning_rate", "1e-3"], "--learning_rate"),
    (["--method", "zero_shot", "--eval_before"], "--eval_before"),
    (["--method", "zero_shot", "--adapter", "somewhere"], "--adapter"),
    (["--adapter", "somewhere"], "--adapter"),
    (["--eval_only"], "--adapter"),
    (["--task_order", "T1"], "--task_order"),
    (["--setting", "single", "--task_order", "T1"], "--task_order"),
    (["--paper_metrics"], "--paper_metrics"),
    (["--setting", "single", "--paper_metrics"], "--paper_metrics"),
    (["--setting", "sequential", "--paper_metrics", "--eval_tasks", "seen"], "--paper_metrics"),
    (["--setting", "single", "--single_task_results", "x.json"], "--single_task_results"),
    (["--routing", "static", "--top_k", "2"], "--top_k"),
    (["--routing", "static", "--router_noise", "0.1"], "--router_noise"),
    (["--routing", "static", "--inactive", "drop"], "--inactive"),
    (["--top_k", "8", "--router_noise", "0.1"], "--router_noise"),
    (["--top_k", "8", "--inactive", "drop"], "--inactive"),
    (["--no_bad", "--routing", "token"], "--routing"),
    (["--no_bad", "--router_noise", "0.1"], "--router_noise"),
    (["--no_bad", "--inactive", "keep"], "--inactive"),
    (["--no_bad", "--svd", "fast"], "--svd"),
    (["--no_dog", "--grouping", "random"], "--grouping"),
    (["--no_dog", "--refine"], "--refine"),
    (["--grouping", "random", "--refine"], "--refine"),
    (["--grouping", "fixed", "--refine"], "--refine"),
    (["--data_dir", "somewhere"], "--data_dir"),
    (["--suite", ".", "--data_dir", "somewhere"], "--data_dir"),
])
def test_flags_that_would_be_ignored_are_refused(no_weights, llama, flags, named):
    """A flag that the method or the setting does not read, also with its default as value."""
    refused("--model", llama, *flags, named=named)


@pytest.mark.parametrize("flags", [
    ["--rank", "4"], ["--epochs", "10"], ["--target_modules", "gate_proj"], ["--refine"],
    ["--setting", "mixed"], ["--top_k", "4"], ["--gradient_checkpointing"],
    ["--eval_tasks", "all"]])
def test_evaluation_reads_no_training_flags(no_weights, finished, flags):
    """With --eval_only the adapter's own settings count."""
    refused("--eval_only", "--adapter", finished / "adapter", *flags, named=flags[0])


def test_the_adapters_method_counts(no_weights, finished):
    """--method beside --adapter must be the adapter's."""
    refused("--eval_only", "--adapter", finished / "adapter", "--method", "zero_shot",
            named=("zero_shot", "badit"))


READERS = ("args", "settings", "read")  # variables and attributes that hold flags


def names_read(tree):
    """Flags that a file reads as args.x or settings.x, or by name from a tuple of names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", None)) in READERS:
                yield node.attr
        if isinstance(node, ast.DictComp) and "getattr(self.settings" in ast.unparse(node.value):
            yield from ast.literal_eval(node.generators[0].iter)


def read_in(*files):
    """The flags that some files read."""
    return {name for file in files for name in names_read(ast.parse(file.read_text()))}


def test_every_flag_is_read():
    """No flag is declared, accepted and ignored; no read is of a flag that is not."""
    files = [path for pattern in identity.TRAINS for path in ROOT.glob(pattern)]
    assert arguments.ALL_FLAGS.keys() <= read_in(*files)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_what_it_claims(name):
    """Its settings decide what is refused, so none may be one that the method ignores."""
    own = {Path(inspect.getfile(cls)) for cls in method_class(name).__mro__[:-1]}
    assert set(METHODS[name].settings.names()) <= read_in(*own)


# --- names and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", [
    (["--method", "lora2"], ("lora2", "badit")),
    (["--method", "../badit"], ("../badit", "badit")),
    (["--model", "gpt-5"], ("gpt-5", "smollm2-135m", "qwen3-8b")),
    (["--model", "no/such/folder"], ("no/such/folder", "smollm2-135m")),
    (["--model", ""], "model"),
    (["--suite", "maxi"], ("maxi", "mini", "superni")),
    (["--suite", "no/such/folder"], "no/such/folder"),
    (["--suite", "superni"], "download"),
    (["--suite", "superni", "--data_dir", "nowhere"], "nowhere"),
    (["--tasks", "colour"], ("colour", "colour_name")),
    (["--tasks", "T363"], ("T363", "colour_name")),
    (["--tasks", "../tiny/colour_name"], ("../tiny/colour_name", "colour_name")),
    (["--tasks", "/etc"], "/etc"),
    (["--tasks", "colour_name", "colour_name"], "colour_name"),
    (["--setting", "sequential", "--task_order", "colour_name"], "which_is"),
    (["--setting", "sequential", "--task_order", "colour_name", "which_is", "both"], "both"),
    (["--setting", "sequential", "--tasks", "colour_name", "--task_order", "which_is"],
     "which_is"),
    (["--num_experts", "9"], ("9", "36", "32")),
    (["--rank", "33", "--num_experts", "1", "--top_k", "1"], ("33", "32")),
    (["--top_k", "9"], ("9", "8")),
    (["--num_experts", "2"], ("4", "2")),  # top_k stays at 4
    (["--target_modules", "gate"], ("gate", "gate_proj", "up_proj", "down_proj", "q_proj",
                                    "k_proj", "v_proj", "o_proj")),
    (["--target_modules", "lm_head"], ("lm_head", "gate_proj")),
    (["--target_modules", "gate_proj", "mlp.up_proj"], ("mlp.up_proj", "up_proj")),
    (["--target_modules", "norm"], ("norm", "gate_proj")),
    (["--max_length", "252"], ("252", "256")),  # with 5 new tokens more than 256 positions
    (["--gradient_accumulation_steps", "3"], ("3", "8", "--batch_size")),
    (["--chat_template"], "--chat_template"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--seed", str(2**32)], "--seed"),
    (["--eval_only", "--adapter", "nowhere"], "nowhere"),
    (["--single_task_results", "nowhere.json"], "nowhere.json"),
])
def test_unknown_names_and_impossible_sizes(no_weights, llama, suite, flags, named):
    """What is wrong is named, with what is allowed; flags given twice: the last counts."""
    sizes = SMALL
    if "36" in named:
        sizes = ("--rank", "4", *SMALL[4:])
    if "--eval_only" in flags:
        sizes = SMALL[4:]
    argv = [*flags] if flags[0] == "--eval_only" else ["--model", llama, "--suite", suite, *sizes,
                                                       *flags]
    refused(*argv, named=named)


def test_max_length_names_the_smallest_that_is_enough(no_weights, llama, suite):
    """A task left with no training instance: the number given lets one in, one less does not."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    enough = min(len(tokenizer(prompt_of("say_both", row | {"input": ""})).input_ids)
                 + len(tokenizer(row["output"][0] if isinstance(row["output"], list)
                                 else row["output"]).input_ids) + 1
                 for row in instances("say_both", range(12)))
    for length in (1, enough - 1):
        line = refused("--model", llama, "--suite", suite, *SMALL, "--tasks", "say_both",
                       "--max_length", length, named=("say_both", "--max_length"))
        assert str(enough) in re.findall(r"\d+", line)


def test_the_smallest_max_length_is_enough(llama, suite):
    """The number that the error names is accepted."""
    line = run("--model", llama, "--suite", suite, *SMALL, "--max_length", 3,
               "--tasks", "say_both").err[0]
    enough = max(map(int, re.findall(r"\d+", line)))
    succeed("--model", llama, "--suite", suite, *SMALL, "--max_length", enough, "--tasks",
            "say_both", "--epochs", 1, "--eval_tasks", "none")


SPOILS = {
    "missing file": (lambda file: file.unlink(), ()),
    "empty file": (lambda file: file.write_text(""), ()),
    "half a file": (lambda file: file.write_text(file.read_text()[:-20]), ()),
    "not UTF-8": (lambda file: file.write_bytes(b'{"Definition": "\xff"}'), ()),
    "a list": (lambda file: file.write_text("[]"), ("Definition",)),
    "no instances": (lambda file: write_json(file, {"Definition": "x", "Instances": []}),
                     ("Instances",)),
    **{name: (lambda file, change=change: spoil_instance(file, change), ("instance 1", *words))
       for name, change, words in [
           ("no input", lambda row: row.pop("input"), ("input",)),
           ("a number as input", lambda row: row.update(input=5), ("input",)),
           ("null as input", lambda row: row.update(input=None), ("input",)),
           ("no output", lambda row: row.pop("output"), ("output",)),
           ("a number as output", lambda row: row.update(output=5), ("output",)),
           ("an empty output list", lambda row: row.update(output=[]), ("output",)),
           ("a number among outputs", lambda row: row.update(output=["a", 5]), ("output",))]},
}


def spoil_instance(file, change):
    """Change the second instance of a task's file."""
    content = json.loads(file.read_text())
    change(content["Instances"][1])
    write_json(file, content)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_malformed_data(no_weights, llama, suite, tmp_path, split, spoil):
    """File and instance are named."""
    shutil.copytree(suite, tmp_path / "suite")
    file = tmp_path / "suite" / "say_both" / f"{split}.json"
    change, named = SPOILS[spoil]
    change(file)
    refused("--model", llama, "--suite", "suite", *SMALL, named=(f"say_both/{split}.json", *named))


@pytest.mark.parametrize("key, value", [("Definition", None), ("Definition", ""),
                                        ("Definition", 5), ("Metric", "bleu"), ("Metric", 1),
                                        ("Category", [])])
def test_malformed_heads(no_weights, llama, suite, tmp_path, key, value):
    """Definition, metric and category are checked as well."""
    shutil.copytree(suite, tmp_path / "suite")
    for split in ("train", "test"):
        file = tmp_path / "suite" / "say_both" / f"{split}.json"
        write_json(file, json.loads(file.read_text()) | {key: value})
    refused("--model", llama, "--suite", "suite", *SMALL, named=("say_both", key))


def test_an_empty_suite(no_weights, llama, tmp_path):
    """A folder without tasks, and a file in place of a folder."""
    (tmp_path / "suite").mkdir()
    refused("--model", llama, "--suite", "suite", named="suite")
    (tmp_path / "file").write_text("{}")
    refused("--model", llama, "--suite", "file", named="file")


# --- checkpoints --------------------------------------------------------------------------------


def change_json(**changed):
    """A change of keys in a checkpoint's JSON file."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def change_tokenizer(change):
    """A change of what tokenizer.json holds."""
    def apply(file):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return apply


@pytest.mark.parametrize("name, change, named", [
    ("tokenizer_config.json", change_json(tokenizer_class="ByT5Tokenizer"), "ByT5Tokenizer"),
    ("tokenizer.json", change_tokenizer(lambda content: content["model"]["vocab"].update(
        red=2**31 - 1)), ("'red'", str(2**31 - 1))),
    ("tokenizer.json", change_tokenizer(lambda content: content["added_tokens"].append(
        content["added_tokens"][0] | {"id": 2**31, "content": "new"})), ("'new'", str(2**31))),
    ("tokenizer.json", change_tokenizer(lambda content: content["model"]["vocab"].update(
        red=-1)), ("'red'", "-1")),
])
def test_a_tokenizer_of_no_use(no_weights, llama, suite, tmp_path, name, change, named):
    """A slow one, and ids for which memory would be taken; refused by name and value."""
    shutil.copytree(llama, tmp_path / "model")
    change(tmp_path / "model" / name)
    line = refused("--model", "model", "--suite", suite, *SMALL, named=named)
    assert line.startswith("error: cannot load model")


@pytest.mark.parametrize("name, change", [
    ("config.json", Path.unlink),
    ("config.json", lambda file: file.write_text("{")),
    ("config.json", lambda file: file.write_text("[]")),
    ("config.json", change_json(model_type="abacus")),
    ("tokenizer.json", lambda file: file.write_text("{")),
    ("tokenizer.json", Path.unlink),
    ("tokenizer_config.json", change_json(eos_token=None)),
])
def test_a_broken_checkpoint(no_weights, llama, suite, tmp_path, name, change):
    """One line about the folder, before weights are read."""
    shutil.copytree(llama, tmp_path / "model")
    change(tmp_path / "model" / name)
    refused("--model", "model", "--suite", suite, *SMALL,
            named="EOS" if name == "tokenizer_config.json" else "model")


def test_a_library_that_panics(no_weights, llama, suite, monkeypatch):
    """Its Rust code raises what is no Exception; all lines of a reason become one."""
    class PanicException(BaseException):
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds:\n\n  the len is 0\x1b[31m " + "x" * 999)

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", panic)
    line = refused("--model", llama, "--suite", suite, *SMALL,
                   named="(index out of bounds: the len is 0\\x1b[31m xxx")
    assert "x" * 300 not in line


def test_the_reason_of_a_bad_value(no_weights, llama, suite, tmp_path):
    """Stands in a later line of the library's message."""
    shutil.copytree(llama, tmp_path / "model")
    change_json(max_position_embeddings="256")(tmp_path / "model" / "config.json")
    refused("--model", "model", "--suite", suite, *SMALL,
            named=("max_position_embeddings", "expected int, got str"))


def test_a_damaged_copy_of_the_embedded_model(no_weights, suite, tmp_path, monkeypatch):
    """The advice is to delete it, not to accept a licence."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "badit" / f"{models.EMBEDDED}-{embedded.SHA256[:12]}"
    folder.mkdir(parents=True)
    line = refused("--suite", suite, named=f"delete {folder} and run again")
    assert "licence" not in line


@pytest.mark.parametrize("name, value", [
    ("return_dict", False), ("is_encoder_decoder", True), ("attention_dropout", 1.0),
    ("attention_dropout", -0.5), ("hidden_dropout_prob", 5), ("attn_implementation", "some/kernel"),
    ("_attn_implementation", "some/kernel"), ("attn_implementation", {"": "some/kernel"}),
    ("attn_implementation", "flash_attention_2"),
])
def test_a_configuration_of_no_use(no_weights, llama, suite, tmp_path, name, value):
    """What would fail later, or fetch code, is refused by name and value."""
    shutil.copytree(llama, tmp_path / "model")
    change_json(**{name: value})(tmp_path / "model" / "config.json")
    shown = "some/kernel" if isinstance(value, dict) else value
    refused("--model", "model", "--suite", suite, *SMALL,
            named=("cannot load model", f"{name.lstrip('_')} is {shown!r}"))


def test_a_model_that_is_not_causal(no_weights, llama, suite, tmp_path):
    """BERT as a decoder is taken, as an encoder not."""
    shutil.copytree(llama, tmp_path / "model")
    for decoder in (True, False):
        BertConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                   num_attention_heads=4, is_decoder=decoder).save_pretrained(tmp_path / "model")
        if decoder:
            models.skeleton("model")
    refused("--model", "model", "--suite", suite, *SMALL, named=("BertLMHeadModel", "not causal"))


def write_index(name):
    """A change of a folder: its index says that a weight is in the file `name`."""
    return lambda folder: write_json(folder / "model.safetensors.index.json",
                                     {"metadata": {}, "weight_map": {WEIGHT: name}})


@pytest.mark.parametrize("change, named", [
    (lambda folder: os.mkfifo(folder / "chat_template.jinja"), "chat_template.jinja"),
    (lambda folder: (folder / "vocab.json").symlink_to("/dev/zero"), "vocab.json"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    (write_index("../w.safetensors"), "'../w.safetensors'"),
    (write_index("/tmp/w.safetensors"), "'/tmp/w.safetensors'"),
    (write_index(5), "cannot load"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("[1]"), "cannot load"),
], ids=["pipe", "device", "adapter", "above", "absolute", "number", "no index"])
def test_a_folder_that_leads_elsewhere(no_weights, llama, suite, tmp_path, change, named):
    """A model is what its folder holds: nothing is waited for, applied to it or read elsewhere."""
    shutil.copytree(llama, tmp_path / "model")
    change(tmp_path / "model")
    refused("--model", "model", "--suite", suite, *SMALL, named=named)


def test_token_ids_beyond_the_embedding(llama, suite, tmp_path):
    """Unused ones harm nothing; padding, which is in no row of the data, would."""
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["never"] = 305
    write_json(file, content)
    argv = ("--model", "model", "--suite", suite, "--method", "zero_shot", "--max_length", 64,
            "--max_eval_per_task", 1)
    succeed(*argv, "--output_dir", "out")
    change_json(pad_token="never")(tmp_path / "model" / "tokenizer_config.json")
    refused(*argv, "--output_dir", "other", named=("305", "300"))


def test_an_empty_model_folder(no_weights, suite, tmp_path):
    """A folder that holds no checkpoint."""
    (tmp_path / "model").mkdir()
    refused("--model", "model", "--suite", suite, *SMALL, named="model")


def change_weights(change):
    """A change of a checkpoint's tensors."""
    def apply(folder):
        state = safetensors.torch.load_file(folder / "model.safetensors")
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return apply


def halve(folder):
    """The second half of the weights' file is lost."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change, named", [
    *((change_weights(lambda state, bad=bad: state[WEIGHT].view(-1)[-1:].fill_(bad)), WEIGHT)
      for bad in (float("nan"), float("inf"), float("-inf"))),
    (change_weights(lambda state: state.pop(WEIGHT)), WEIGHT),
    (change_weights(lambda state: state.update({WEIGHT: torch.ones(3, 32)})), "model"),
    (change_weights(lambda state: state.update(stray=torch.ones(2))), "stray"),
    (lambda folder: change_json(num_hidden_layers=1)(folder / "config.json"),
     "model.layers.1.input_layernorm.weight"),
    (halve, "model"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model"),
], ids=["nan", "inf", "-inf", "missing weight", "other shape", "unknown", "fewer layers",
        "half a file", "no file", "empty"])
def test_bad_weights(llama, suite, tmp_path, change, named):
    """A non-finite weight is named; damage is no traceback; an old run's files stay."""
    shutil.copytree(llama, tmp_path / "model")
    change(tmp_path / "model")
    write_json(tmp_path / "out" / "results.json", {"old": True})
    refused("--model", "model", "--suite", suite, *SMALL, "--output_dir", "out", "--overwrite",
            named=named)


def test_buffers_of_older_checkpoints(llama, suite, tmp_path):
    """What every version of the architecture computes for itself may stand in the file."""
    shutil.copytree(llama, tmp_path / "model")
    change_weights(lambda state: state.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(tmp_path / "model")
    succeed("--method", "zero_shot", "--model", "model", "--suite", suite, *SMALL[4:],
            "--max_eval_per_task", 1, "--output_dir", "out")


def test_an_adapter_of_another_base(finished, llama, suite, tmp_path):
    """Refused when the weights are compared, and nothing is written."""
    shutil.copytree(llama, tmp_path / "model")
    change_weights(lambda state: state[WEIGHT].view(-1)[:1].add_(1e-3))(tmp_path / "model")
    refused("--eval_only", "--adapter", finished / "adapter", "--model", "model", "--suite",
            suite, *SMALL[4:], "--output_dir", "out", named="base")


@pytest.mark.parametrize("change, named", [
    (lambda file: file.write_text("{"), "adapter_config.json"),
    (lambda file: file.write_text("{}"), "adapter_config.json"),
    (change_json(method="lara"), "lara"),
    (change_json(method=["badit"]), "method"),
    (change_json(settings={}), "settings"),
    (change_json(settings=None), "settings"),
])
def test_a_broken_adapter(finished, llama, suite, tmp_path, change, named):
    """One line, whatever its configuration holds."""
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json")
    refused("--eval_only", "--adapter", "adapter", "--model", llama, "--suite", suite, *SMALL[4:],
            named=named)


# --- output and other results -------------------------------------------------------------------


def test_an_output_folder_in_use(no_weights, finished, llama, suite, tmp_path):
    """Refused without --overwrite, for any file in it; an empty folder is free."""
    refused("--model", llama, "--suite", suite, *SMALL, "--output_dir", finished,
            named=(str(finished), "--overwrite"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / ".hidden").write_text("mine")
    refused("--model", llama, "--suite", suite, *SMALL, "--output_dir", "used", named="used")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("folder", ["file", "file/below", "file/deep/below"])
def test_an_output_folder_that_cannot_be(no_weights, llama, suite, tmp_path, folder, flags):
    """A file stands in the way."""
    (tmp_path / "file").write_text("mine")
    refused("--model", llama, "--suite", suite, *SMALL, "--output_dir", folder, *flags,
            named="file")


@pytest.mark.parametrize("flags", [["--tasks", "no_such_task"], ["--target_modules", "gate"],
                                   ["--suite", "nowhere"], ["--max_length", "1"]])
def test_overwrite_with_bad_input_loses_nothing(no_weights, finished, llama, suite, tmp_path,
                                                flags):
    """What is on disk stays until a run can start."""
    shutil.copytree(finished, tmp_path / "out")
    refused("--model", llama, "--suite", suite, *SMALL, "--output_dir", "out", "--overwrite",
            *flags, named=flags[1])


@pytest.mark.parametrize("tracker", ("tensorboard", "wandb", "trackio", "mlflow"))
def test_a_tracker_that_is_not_installed(no_weights, llama, suite, monkeypatch, tracker):
    """Named with what to install, before data or weights are read."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == tracker else found(name, *rest))
    refused("--model", llama, "--suite", suite, *SMALL, "--report_to", tracker,
            named=(tracker, "pip install"))


def test_unsupported_precision(no_weights, llama, suite, monkeypatch):
    """The launcher's precision is checked as well."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    refused("--model", llama, "--suite", suite, *SMALL, named=("fp16", "bf16"))


@pytest.mark.parametrize("variable, name", launch.SHARDED.items())
def test_sharded_gradients_are_refused(no_weights, llama, suite, monkeypatch, variable, name):
    """By name and with the reason, whether its library is installed or not."""
    monkeypatch.setenv(variable, "true")
    refused("--model", llama, "--suite", suite, *SMALL, named=(name, "only DDP", "Eq. 8"))
    monkeypatch.setenv(variable, "false")
    launch.refuse_sharding()


@pytest.mark.parametrize("content, named", [
    ("{", "single.json"), ("[]", "single.json"), ("{}", "single.json"), ("5", "single.json"),
    ('{"args": [], "task_order": []}', "single.json"),
    ('{"args": {"setting": "single"}, "task_order": 5}', "single.json"),
])
def test_single_task_results_that_are_none(no_weights, llama, suite, tmp_path, content, named):
    """Any JSON that is no results.json."""
    (tmp_path / "single.json").write_text(content)
    refused("--model", llama, "--suite", suite, *SMALL, "--single_task_results", "single.json",
            named=named)


def test_single_task_results_of_another_run(no_weights, finished, llama, suite, tmp_path):
    """Setting, settings and tasks must fit; what differs is named."""
    flags = ("--model", llama, "--suite", suite, *SMALL, "--epochs", 1, "--max_train_per_task", 2)
    single = results_of(finished)
    single["args"]["setting"] = "single"
    single["scores"] = {"best": [[1.0] * 3] * 3, "first": [[1.0] * 3] * 3}
    for change, named in ((("args", single["args"] | {"setting": "mixed"}), "mixed"),
                          (("args", single["args"] | {"rank": 3}), "rank"),
                          (("args", single["args"] | {"seed": 2}), "seed"),
                          (("args", single["args"] | {"epochs": 4}), "epochs"),
                          (("task_order", single["task_order"][1:]), single["task_order"][0]),
                          (("scores", None), "single.json"),
                          (("scores", {"best": [], "first": []}), "single.json")):
        write_json(tmp_path / "single.json", single | dict([change]))
        refused(*flags, "--single_task_results", "single.json", named=named)


# --- what the environment or a checkpoint could slip in -----------------------------------------


def test_code_in_a_checkpoint_never_runs(no_weights, llama, suite, tmp_path, monkeypatch):
    """trust_remote_code is never on, and nobody is asked."""
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "cfg.py").write_text(
        "from transformers import LlamaConfig\nopen('executed', 'w').close()\n"
        "class Config(LlamaConfig):\n    model_type = 'abacus'\n")
    change_json(model_type="abacus", auto_map={"AutoConfig": "cfg.Config"})(
        tmp_path / "model" / "config.json")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    refused("--model", "model", "--suite", suite, *SMALL, named="model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "abc"}, {"ACCELERATE_USE_CPU": "maybe"},
    {"ACCELERATE_DYNAMO_BACKEND": "abacus"}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "some"},
    {"WORLD_SIZE": "2"}])
def test_an_environment_of_another_kind(no_weights, llama, suite, variables):
    """Accelerate reads these; what it raises is one line."""
    before = dict(os.environ)  # to which Accelerate adds
    os.environ.update(variables)
    try:
        refused("--model", llama, "--suite", suite, *SMALL, named="Accelerate does not start")
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_names_that_a_terminal_cannot_show(llama, suite, tmp_path):
    """Escaped, in ASCII and in one line; the run is none the worse."""
    shutil.copytree(suite, tmp_path / "suit\u00e9")
    argv = ["--model", str(llama), "--suite", "suit\u00e9", "--method", "zero_shot",
            "--max_length", "64", "--output_dir", "o\u00fct\x1b[31m"]
    answer = subprocess.run([sys.executable, ROOT / "train.py", *argv], capture_output=True,
                            env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert answer.returncode == 0 and b"suit\\xe9" in answer.stdout, answer.stderr[-500:]
    assert b"results in o\\xfct\\x1b[31m" in answer.stdout


def test_accumulation_asked_of_the_launcher_is_refused(no_weights, llama, suite, monkeypatch):
    """It would override the flag and make another experiment."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    refused("--model", llama, "--suite", suite, *SMALL, named="--gradient_accumulation_steps")


def test_an_adapter_remembers_its_chat_template(finished, llama, suite, tmp_path):
    """Prompts of another form than in training are refused."""
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    change_json(chat_template=True)(tmp_path / "adapter" / "adapter_config.json")
    refused("--eval_only", "--adapter", "adapter", "--model", llama, "--suite", suite, *SMALL[4:],
            named="--chat_template")


@pytest.mark.parametrize("text", ["9" * 400, "1e400", "1_0000000000"])
def test_numbers_without_end(no_weights, llama, suite, text):
    """Neither an overflow nor an allocation."""
    refused("--model", llama, "--suite", suite, *SMALL, "--batch_size", text,
            named="--batch_size")
