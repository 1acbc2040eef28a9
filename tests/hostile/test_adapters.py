"""Damaged adapters, and adapters of other prompts."""

import json

import pytest
from conftest import complaint

from harness.adapter_config import read_adapter_config
from harness.arguments import parse_flags


@pytest.mark.parametrize("change, named", [
    ("{", "adapter_config.json"), ("{}", "adapter_config.json"),
    ({"method": "lara"}, "lara"), ({"method": ["badit"]}, "method"), ({"format": 5}, "format 5"),
    ({"base": "int2"}, "base"), ({"base": None}, "base"),
    ({"settings": {}}, "'rank'"), ({"settings": {"colour": 1}}, "'colour'"),
    ({"settings": {"rank": "two"}}, "--rank"),
    ({"settings": None}, "settings"), ({"extra": 1}, "extra"),
    ({"base_sha256": None}, "base_sha256"), ({"chat_template": "yes"}, "chat_template"),
], ids=str)
def test_a_broken_adapter(finished, tmp_path, change, named):
    """A damaged configuration is refused in one line."""
    content = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    if isinstance(change, dict) and change.get("settings"):
        change = {"settings": content["settings"] | change["settings"]}
    text = change if isinstance(change, str) else json.dumps(content | change)
    (tmp_path / "adapter_config.json").write_text(text)
    message = complaint(read_adapter_config, tmp_path)
    assert "adapter_config.json" in message and named in message


def test_an_adapter_remembers_its_chat_template(finished):
    """One that was trained without the template is not evaluated or trained on with it."""
    for more in (["--eval_only"], []):
        assert "was trained without --chat_template" in complaint(
            parse_flags, ["--adapter", str(finished / "adapter"), "--chat_template", *more])
