"""Read adapter_config.json, without torch."""

from pathlib import Path

from inputs import formats
from inputs.errors import InputError
from registry import ADDED, METHODS, MODELS

ADAPTER_CONFIG, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FORMATS = (1, 2, 3, 4)  # the last is written
# PEFT has a file of that name too, and quotes an unknown value of this key.
NOT_OF_PEFT = "BADIT: no adapter of PEFT's; `python export.py FOLDER --out OTHER` makes one of it"


def read_adapter_config(path):
    """Return (configuration, settings) of a saved adapter. Raises InputError."""
    file = Path(path) / ADAPTER_CONFIG
    if not file.exists():
        raise InputError(f"no adapter at {path}, which holds no {ADAPTER_CONFIG}: give the folder "
                         f"adapter/ of a run, such as runs/X/adapter"
                         f"{nearest_adapter(Path(path))}")
    content = formats.load(file)
    kind = content.get("peft_type", NOT_OF_PEFT) if isinstance(content, dict) else NOT_OF_PEFT
    if kind != NOT_OF_PEFT:
        raise InputError(f"{path} is a PEFT adapter (peft_type {kind!r:.40}): load it "
                         "with PEFT or transformers; this program loads the folder adapter/ of a "
                         "run")
    config = formats.convert(content, formats.AdapterConfig, file)
    if config.format not in ADAPTER_FORMATS:
        raise InputError(f"{file} has format {config.format}, this code reads "
                         f"{', '.join(map(str, ADAPTER_FORMATS))}")
    if config.method not in METHODS:
        raise InputError(f"{file}: method {config.method!r} is unknown; known: "
                         f"{', '.join(METHODS)}")
    cls, values = METHODS[config.method].settings, config.settings
    if config.format < 4:
        values = {name: ADDED[name] for name in ADDED.keys() & cls.names()} | values
    return config, cls.from_values(values, file)


def base_name(path, config):
    """Return the base model that an adapter names, or None. Raises InputError if it has moved."""
    name = config.model
    if name is not None and "/" not in name and name not in MODELS and not Path(name).is_dir():
        raise InputError(f"{path} names its base model {name!r}, a folder that is missing: give "
                         "--model")
    return name


def nearest_adapter(path):
    """Return words that name the adapter one level below `path`, or above, or ''."""
    for near in (path / "adapter", *sorted(path.glob("*")), path.parent):
        if (near / ADAPTER_CONFIG).is_file():
            return f"; there is one at {near}"
    return ""
