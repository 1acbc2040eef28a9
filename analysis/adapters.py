"""The adapters of finished runs that are compared, and rows that none of them was trained on."""

from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from harness.adapter_config import ADAPTER_CONFIG, read_adapter_config
from inputs import formats
from inputs.errors import InputError
from inputs.formats import AdapterConfig
from inputs.settings import Settings
from registry import METHODS

WITH_EXPERTS = [name for name, entry in METHODS.items() if "num_experts" in entry.settings.names()]


class Adapter(NamedTuple):
    """One adapter, or those of a run with --setting single: one folder for each task."""

    name: str  # of its run
    folders: dict[str | None, Path]  # by task; None: one for all
    config: AdapterConfig
    settings: Settings
    results: dict  # of its run, empty where there is no results.json

    @property
    def alone(self):
        return None not in self.folders

    def folder(self, task):
        """The folder of the adapter that this task is measured with."""
        return self.folders[task if self.alone else None]


def find(paths):
    """The Adapters at --adapter. Raises InputError for different base models or prompts."""
    found = [read(Path(path)) for path in paths]
    names = [each.name for each in found]
    if len(set(names)) < len(names):  # then their paths tell them apart
        found = [each._replace(name=str(path)) for each, path in zip(found, paths, strict=True)]
    for path, each in zip(paths, found, strict=True):
        if each.config.base_sha256 != found[0].config.base_sha256:
            raise InputError(f"--adapter {path} was made on another base model than {paths[0]}")
        if each.config.base != found[0].config.base:
            raise InputError(f"--adapter {path} was made on a base stored as {each.config.base}, "
                             f"{paths[0]} on one stored as {found[0].config.base}")
        if each.config.chat_template != found[0].config.chat_template:
            raise InputError(f"--adapter {path} and {paths[0]}: only one of them was trained on "
                             "prompts in the chat template")
    return found


def read(path):
    """The Adapter in a folder. Raises InputError for none, or single ones of different settings."""
    folders = {None: path}
    if not (path / ADAPTER_CONFIG).exists() and not (path / "adapter" / ADAPTER_CONFIG).exists():
        folders = {file.parent.name: file.parent
                   for file in sorted(path.glob(f"*/{ADAPTER_CONFIG}"))} or folders
    about = {folder: read_adapter_config(folder) for folder in folders.values()}
    first, *others = about.items()
    for folder, (config, settings) in others:
        same = structs.replace(config, trained_on=first[1][0].trained_on)  # but for the task
        if (same, settings) != first[1]:
            raise InputError(f"{folder} and {first[0]} are of different runs: their experts cannot "
                             "be compared")
    results = path.parent / "results.json"
    content = formats.load(results) if results.exists() else {}
    name = path.parent.name if path.name == "adapter" else path.name
    return Adapter(name, folders, *first[1], content)


def check_experts(paths, adapters):
    """Raise InputError for an adapter without a router."""
    for path, each in zip(paths, adapters, strict=True):
        method, settings = each.config.method, each.settings
        static = getattr(settings, "routing", "token") == "static" and not settings.no_bad
        if method not in WITH_EXPERTS or static:
            raise InputError(f"--adapter {path} is of {method}{' --routing static' * static}, "
                             f"which has no router; methods with one: {', '.join(WITH_EXPERTS)}")


def check_tasks(adapters, suite):
    """Raise InputError where single-task adapters are not those of the suite's tasks."""
    for each in adapters:
        missing = [task for task in suite.tasks if each.alone and task not in each.folders]
        if missing:
            raise InputError(f"{each.name} has single-task adapters of {', '.join(each.folders)}, "
                             f"not of {', '.join(missing)} (--tasks, --suite)")


def unseen(suite, adapters, needed):
    """The suite with rows that no adapter was trained on in `train`, and words that say which.

    Training rows beyond each run's --max_train_per_task, as its results.json says; where they are
    fewer than `needed` in a task, test rows as well. Test rows alone where a run drew its rows, or
    went on from another whose rows are not known.
    """
    seen = [None if each.results.get("args", {}).get("sample") or each.results.get("went_on_from")
            else each.results.get("args", {}).get("max_train_per_task") for each in adapters]
    first = None if None in seen else max(seen)
    rest = {name: task.train[first:] if first else [] for name, task in suite.tasks.items()}
    if all(len(rows) >= needed for rows in rest.values()):
        which = f"training rows after the first {first}, which no run was trained on"
    else:
        rest = {name: rest[name] + task.test for name, task in suite.tasks.items()}
        which = "test rows" + (f", and training rows after the first {first}" if first else "")
    return suite._replace(tasks={name: task._replace(train=rest[name])
                                 for name, task in suite.tasks.items()}), which
