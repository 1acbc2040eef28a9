"""Which module may import which: the method no run, inputs nothing above, reports nothing heavy."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)
         if path.parent.name not in ("tests", ".venv")}
PAPER = {"badit", "energy", "decomposition", "experts", "grouping", "regrouping", "method",
         "registry", "quantized", "subspaces", "protection",
         *(name for name in FILES if name.startswith("baselines"))}
BELOW = {"inputs.errors", "inputs.numbers"}  # what the paper's files may import as well
HEAVY = ("torch", "transformers", "accelerate", "harness", "train")


def statements(name):
    """(line, whether it stands at the top level, imported module) of all imports of a module."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{module}" for module in modules]
                modules = [module for module in inner if module in FILES] or [node.module]
            yield from ((node.lineno, node.col_offset == 0, module) for module in modules)


IMPORTS = {name: {module for _, _, module in statements(name)} for name in FILES}
AT_ONCE = {name: {module for _, top, module in statements(name) if top} for name in FILES}


def is_of(module, *packages):
    """Whether a module is one of the packages, or in one."""
    return any(module == each or module.startswith(f"{each}.") for each in packages)


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    """A module imports only from the layers below it."""
    own = IMPORTS[name] & FILES.keys()
    if name in PAPER:
        more = {"inputs.settings"} if name == "registry" else set()
        assert own <= PAPER | BELOW | more
    if is_of(name, "inputs"):
        assert all(is_of(module, "inputs") for module in own)
    if is_of(name, "harness"):
        assert "train" not in own
    if name == "evaluation":
        assert not any(is_of(module, "harness", "adapter") for module in own)
    if is_of(name, "report", "reporting"):
        assert not any(is_of(module, *HEAVY) for module in IMPORTS[name])
    elif not is_of(name, "analysis", "analyze"):  # they draw their own figures
        assert not any(is_of(module, "reporting") for module in own)
    if not is_of(name, "deploy", "generate", "export"):
        assert not any(is_of(module, "deploy", "generate", "export") for module in own)
    if not is_of(name, "analysis", "analyze"):
        assert not any(is_of(module, "analysis") for module in IMPORTS[name])
    lines = ["", *FILES[name].read_text(encoding="utf-8").splitlines()]
    for line, top, module in statements(name):  # a late import has a comment that says why
        assert top or "#" in lines[line - 1] + lines[line], module


def test_no_module_imports_itself_in_a_circle():
    waiting = {name: modules & FILES.keys() for name, modules in AT_ONCE.items()}
    while ready := {name for name, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {name: needed for name, needed in waiting.items() if name not in ready}
    assert waiting == {}
