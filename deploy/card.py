"""The README.md of an export, with the front matter of the hub."""

from dataclasses import asdict

from data import build_prompt
from metrics import headline
from registry import EMBEDDED, MODELS

# By the hub's identifiers; of another model it is not known here.
LICENSES = {EMBEDDED: "apache-2.0", "qwen3-8b": "apache-2.0", "qwen3-4b": "apache-2.0",
            "llama3-8b": "llama3", "llama3-3b": "llama3.2", "gemma2-9b": "gemma",
            "gemma2-2b": "gemma"}


def measured(form, near, suite):
    """Lines that say what an export is, and how near it is to the adapter."""
    kind = "exact"
    if form.fitted:
        kind = (f"approximated: in {form.fitted} layers, whose experts depend on the token, the "
                f"nearest constant by least squares over {form.rows} training rows")
    cut = f"; cut to it, at most {form.lost:.1%} of a layer's update lost" if form.lost else ""
    yield f"{kind}; rank {form.rank}{cut}"
    yield (f"on {near.prompts} held-out prompts of {suite} ({near.tokens:,} tokens): KL(adapter || "
           f"export) {near.kl:.2g}, the same likeliest token at {near.agreement:.1%}, largest "
           f"difference of a logit {near.difference:.1e} of the largest")
    yield f"mean score on them: adapter {near.score:.2f}, export {near.exported_score:.2f}"


def render(args, config, settings, run, form, near, suite, hub_name):
    """The card; `run` are the Results of the adapter's run or None, `hub_name` the base's or None.
    """
    kind = "transformers" if args.merged else "peft"
    front = [f"base_model: {hub_name}"] if hub_name else []
    front += [f"library_name: {kind}", "pipeline_tag: text-generation"]
    front += [f"license: {LICENSES[args.model]}"] if args.model in LICENSES else []
    tags = ["badit"] if args.merged else ["lora", "badit"]
    tags += [f"base_model:{'finetune' if args.merged else 'adapter'}:{hub_name}"] * bool(hub_name)
    front += ["tags:", *(f"- {tag}" for tag in tags)]
    base = hub_name or (args.model if args.model in MODELS else config.model_type)
    given = ", ".join(f"{name} {value}" for name, value in sorted(asdict(settings).items()))
    frame = build_prompt("{definition}", "{input}")
    lines = [
        "---", *front, "---", "",
        f"# {config.method} on {base}", "",
        "A whole checkpoint: the adapter is merged into its weights." if args.merged else
        "A LoRA adapter: `PeftModel.from_pretrained(base, folder)`.", "",
        *(f"- {line}" for line in measured(form, near, suite)),
        f"- method: {config.method} ({given})",
        f"- base model: {base}, SHA-256 of its weights as float32 {config.base_sha256}"
        + ("" if config.base == "dense" else f"; trained on it stored as {config.base}, exported "
           "for the dense one"),
        *score_lines(run), "",
        "Prompts were framed so" + (", inside the model's chat template:" if config.chat_template
                                    else ", without a chat template:"), "",
        "```", frame, "```", ""]
    return "\n".join(lines)


def score_lines(run):
    """What the adapter's run was, and its scores after all training."""
    if run is None:
        return []
    mean = headline(task.metric for task in run.tasks.values())
    numbers = ", ".join(f"{mean if name == 'rouge' else name} {value:.2f}"
                        for name, value in sorted(run.metrics.items()) if value is not None)
    count = f"each of {len(run.tasks)} tasks alone" if run.args["setting"] == "single" else (
        f"{run.args['setting']}, {len(run.tasks)} tasks")
    trained = (f"- trained: {count}, suite {run.args['suite']}, {run.args['epochs']} epochs, "
               f"learning rate {run.args['learning_rate']:g}, seed {run.args['seed']}, precision "
               f"{run.precision}")
    return [trained, f"- scores of its run: {numbers}"] if numbers else [trained]
