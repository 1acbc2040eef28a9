"""Suites that are known by name: their tasks, where they come from, and where they are."""

import os
from pathlib import Path

from inputs.errors import InputError
from inputs.files import cache_dir, sha256_file

TASKS_DIR = Path(__file__).resolve().parents[1] / "tasks"
SUPERNI_URL = ("https://raw.githubusercontent.com/circle-hit/SAPT/"
               "52a52b920324c656bdb6dac08e43dc600ba22f21/CL_Benchmark/SuperNI/")

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


def suite_folder(name_or_path):
    """Where a suite is that is shipped, or named by its path. Raises InputError for no folder."""
    folder = TASKS_DIR / "mini" if name_or_path == "mini" else Path(name_or_path)
    if not name_or_path or not folder.is_dir():
        raise InputError(f"suite {str(name_or_path)!r} is unknown: allowed are mini, superni and "
                         "the path of a folder of tasks")
    return folder


def superni_folder(data_dir=None):
    """Where SuperNI would be kept: data_dir, $BADIT_DATA, or the download folder."""
    return Path(data_dir or os.environ.get("BADIT_DATA") or cache_dir() / "superni")


def find_superni(data_dir=None):
    """The folder with the SuperNI tasks, checked. Raises InputError where there is none."""
    folder = superni_folder(data_dir)
    if not any((folder / name).is_dir() for name in SUPERNI):
        if data_dir or os.environ.get("BADIT_DATA"):
            raise InputError(f"{'--data_dir' if data_dir else '$BADIT_DATA'} {folder} holds no "
                             f"SuperNI task folder such as {next(iter(SUPERNI))}")
        raise InputError("SuperNI is not on this machine: run `python data.py download superni`, "
                         "or name its folder with --data_dir or $BADIT_DATA")
    for name, sha256 in superni_manifest().items():
        if (folder / name).is_file() and sha256_file(folder / name) != sha256:
            raise InputError(f"{folder / name} is not the published file (SHA-256 differs); use "
                             f"--suite {folder} for data of your own")
    return folder


def superni_manifest():
    """SHA-256 by relative path of the files of the paper's split."""
    lines = (TASKS_DIR / "superni.sha256").read_text(encoding="utf-8").splitlines()
    return {path: sha256 for sha256, path in (line.split() for line in lines)}
