"""Find and download the suites that are known by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pooch
from tqdm import tqdm

from inputs.errors import InputError
from inputs.files import cache_dir, git_blob_file, sha256_file
from inputs.settings import did_you_mean

TASKS_DIR = Path(__file__).resolve().parents[1] / "tasks"
URL = ("https://raw.githubusercontent.com/circle-hit/SAPT/"
       "52a52b920324c656bdb6dac08e43dc600ba22f21/CL_Benchmark/")

# Table 4 of the paper: category and metric, in the order that a seed shuffles (Table 5).
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

# The 15 classification tasks of O-LoRA, SAPT and GainLoRA, in their order 4.
LONG_SEQUENCE = {
    "mnli": ("natural language inference", "accuracy"),
    "cb": ("natural language inference", "accuracy"),
    "wic": ("word sense disambiguation", "accuracy"),
    "copa": ("question answering", "accuracy"),
    "qqp": ("paraphrase detection", "accuracy"),
    "boolq": ("question answering", "accuracy"),
    "rte": ("natural language inference", "accuracy"),
    "imdb": ("sentiment analysis", "accuracy"),
    "yelp": ("sentiment analysis", "accuracy"),
    "amazon": ("sentiment analysis", "accuracy"),
    "sst2": ("sentiment analysis", "accuracy"),
    "dbpedia": ("topic classification", "accuracy"),
    "agnews": ("topic classification", "accuracy"),
    "multirc": ("question answering", "accuracy"),
    "yahoo": ("topic classification", "accuracy"),
}

# The published orders of LONG_SEQUENCE, which --task_order takes by name.
ORDERS = {
    "order4": tuple(LONG_SEQUENCE),
    "order5": ("multirc", "boolq", "wic", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst2",
               "dbpedia", "agnews", "yelp", "amazon", "yahoo"),
    "order6": ("yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst2", "dbpedia",
               "agnews", "yahoo", "multirc", "boolq", "wic"),
}


class NamedSuite(NamedTuple):
    """A published suite and the checksums of its files."""

    name: str
    url: str
    tasks: dict[str, tuple[str, str]]  # category and metric by task
    checksum: Callable  # (path) -> the checksum that the manifest has of a file
    manifest_file: str

    def manifest(self):
        """Return {relative path: checksum} of every file."""
        lines = (TASKS_DIR / self.manifest_file).read_text(encoding="utf-8").splitlines()
        return {path: checksum for checksum, path in (line.split() for line in lines)}

    def folder(self, data_dir=None):
        """Return the folder of the suite: data_dir, else $BADIT_DATA or a folder in it, else the
        download folder in the user's cache.
        """
        shared = os.environ.get("BADIT_DATA")
        if data_dir or not shared:
            return Path(data_dir or cache_dir() / self.name)
        return Path(shared) if self.is_in(Path(shared)) else Path(shared) / self.name

    def is_in(self, folder):
        """Return whether the folder holds any task of the suite."""
        return any((folder / name).is_dir() for name in self.tasks)

    def download(self, folder):
        """Fetch every file that is missing in the folder or has another checksum.

        A second call continues where the first one stopped. Raises InputError naming the file.
        """
        pooch.get_logger().setLevel("WARNING")
        # The manifest of long_sequence has git's ids, which pooch cannot check.
        manifest = self.manifest()
        fetcher = pooch.create(folder, self.url, registry=dict.fromkeys(manifest))
        for name, known in tqdm(manifest.items(), desc="download", unit="file"):
            path = folder / name
            if path.is_file() and self.checksum(path) != known:
                path.unlink()
            try:
                fetcher.fetch(name)
                if self.checksum(path) != known:
                    path.unlink()
                    raise ValueError("it differs from the published file (checksum)")
            except (OSError, ValueError) as error:  # OSError of requests; ValueError: an odd answer
                raise InputError(f"could not download {self.url + name}: {error}; run the command "
                                 "again to go on from here") from None

    def find(self, data_dir=None):
        """Return the folder of the suite after checking its files. Raises InputError."""
        folder = self.folder(data_dir)
        if not self.is_in(folder):
            shared = os.environ.get("BADIT_DATA")
            if data_dir or shared:
                where = f"--data_dir {folder} holds" if data_dir else (
                    f"$BADIT_DATA {shared} and its folder {self.name} hold")
                raise InputError(f"{where} no task folder of {self.name} such as "
                                 f"{next(iter(self.tasks))}")
            raise InputError(f"{self.name} is not on this machine: run `python data.py download "
                             f"{self.name}`, or name its folder with --data_dir or $BADIT_DATA")
        for name, checksum in self.manifest().items():
            if (folder / name).is_file() and self.checksum(folder / name) != checksum:
                raise InputError(f"{folder / name} is not the published file (its checksum "
                                 f"differs); use --suite {folder} for data of your own")
        return folder


NAMED = {suite.name: suite for suite in (
    NamedSuite("superni", URL + "SuperNI/", SUPERNI, sha256_file, "superni.sha256"),
    NamedSuite("long_sequence", URL + "Long_Sequence/", LONG_SEQUENCE, git_blob_file,
               "long_sequence.blobs"),
)}


def suite_folder(name_or_path):
    """Return the folder of "mini", or of a suite named by its path. Raises InputError."""
    folder = TASKS_DIR / "mini" if name_or_path == "mini" else Path(name_or_path)
    if not name_or_path or not folder.is_dir():
        raise InputError(f"--suite: there is no folder {str(name_or_path)!r} here; allowed are "
                         f"mini, {', '.join(NAMED)} and the path of a folder of tasks"
                         f"{did_you_mean(name_or_path, ('mini', *NAMED))}")
    return folder
