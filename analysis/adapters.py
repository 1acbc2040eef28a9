"""Read the adapters of finished runs, and find rows that none of them was trained on."""

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
    """The adapter of a run, or its adapters by task for a run with --setting single."""

    name: str  # of its run
    folders: dict[str | None, Path]  # by task; None: one adapter for all tasks
    config: AdapterConfig
    settings: Settings
    results: dict  # results.json of its run, empty where there is none

    @property
    def single(self):
        """Return whether each task has an adapter of its own."""
        return None not in self.folders

    @property
    def about(self):
        """Return the entries of analysis.json that say which adapter it is."""
        return {"name": self.name, "method": self.config.method, "alone": self.single,
                "variant": self.results.get("variant", self.config.method)}

    def folder(self, task):
        """Return the folder of the adapter for a task."""
        return self.folders[task if self.single else None]


def find(paths):
    """Return the Adapters at --adapter. Raises InputError for different base models or prompts."""
    found = [read(Path(path)) for path in paths]
    if len({each.name for each in found}) < len(found):
        found = [each._replace(name=str(path)) for each, path in zip(found, paths, strict=True)]
    first = found[0].config
    for path, each in zip(paths, found, strict=True):
        for what in ("base_sha256", "base", "chat_template"):
            mine, other = getattr(each.config, what), getattr(first, what)
            if mine != other:
                raise InputError(f"--adapter {path} was trained with {what} {mine}, {paths[0]} "
                                 f"with {other}: they cannot be compared")
    return found


def read(path):
    """Return the Adapter in a folder. Raises InputError for none, or for a mixture of runs."""
    path = path.resolve()
    folders = {None: path}
    if not (path / ADAPTER_CONFIG).exists() and not (path / "adapter" / ADAPTER_CONFIG).exists():
        folders = {file.parent.name: file.parent
                   for file in sorted(path.glob(f"*/{ADAPTER_CONFIG}"))} or folders
    about = {folder: read_adapter_config(folder) for folder in folders.values()}
    first, *others = about.items()
    for folder, (config, settings) in others:
        same = structs.replace(config, trained_on=first[1][0].trained_on)
        if (same, settings) != first[1]:
            raise InputError(f"{folder} and {first[0]} come from different runs: their experts "
                             "cannot be compared")
    results = path.parent / "results.json"
    content = formats.load(results) if results.exists() else {}
    name = path.parent.name if path.name == "adapter" else path.name
    return Adapter(name, folders, *first[1], content)


def check_experts(paths, adapters):
    """Raise InputError for an adapter whose method does not select experts."""
    for path, each in zip(paths, adapters, strict=True):
        method, settings = each.config.method, each.settings
        static = getattr(settings, "routing", "token") == "static" and not settings.no_bad
        if method not in WITH_EXPERTS or static:
            raise InputError(f"--adapter {path}: {method}{' --routing static' * static} selects no "
                             f"experts; methods that do: {', '.join(WITH_EXPERTS)}")


def check_tasks(adapters, suite, flags):
    """Raise InputError where a single-task run has no adapter for a task of the suite.

    The message names the `flags` that choose the tasks.
    """
    for each in adapters:
        missing = [task for task in suite.tasks if each.single and task not in each.folders]
        if missing:
            raise InputError(f"{each.name} has single-task adapters for {', '.join(each.folders)}, "
                             f"not for {', '.join(missing)} ({flags})")


def unseen(suite, adapters, needed):
    """Return the suite with rows in `train` that no adapter was trained on, and their description.

    These are the training rows beyond --max_train_per_task of every run, with the test rows where
    a task has fewer than `needed`. Test rows alone where a run's rows are unknown: its results.json
    is missing, or it continued another run.
    """
    seen = [None if each.results.get("went_on_from") else
            each.results.get("args", {}).get("max_train_per_task") for each in adapters]
    first = None if None in seen else max(seen)
    rest = {name: task.train[first:] if first else [] for name, task in suite.tasks.items()}
    if all(len(rows) >= needed for rows in rest.values()):
        which = f"training rows after the first {first}, which no run was trained on"
    else:
        rest = {name: rest[name] + task.test for name, task in suite.tasks.items()}
        which = "test rows" + (f", and training rows after the first {first}" if first else "")
    return suite._replace(tasks={name: task._replace(train=rest[name])
                                 for name, task in suite.tasks.items()}), which
