"""What `pip install .` installs: the flat files as one package, so that they clash with nobody's.

The files import each other by their own names, to be read and forked as they lie here. In the
package each such import gets the package's name in front; nothing else in them changes.
"""

import ast
import re
from pathlib import Path

from setuptools.command.build_py import build_py

PACKAGE = "badit_reference"
ROOT = Path(__file__).resolve().parents[1]
DATA = ("tasks/*", "tasks/mini/*/*.json", "reporting/*.jinja", "results/paper.json", "LICENSE")


def sources():
    """The Python files of the package."""
    folders = [path.parent for path in ROOT.glob("*/__init__.py")]
    return [path for folder in (ROOT, *folders) for path in folder.glob("*.py")]


def renamed(text, own):
    """The text of a module whose imports of the names `own` come from the package.

    Raises ValueError for an import that cannot be written so in its line.
    """
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        where = getattr(node, "lineno", 0) - 1
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in own:
            lines[where] = lines[where].replace(f"from {node.module} import",
                                                f"from {PACKAGE}.{node.module} import", 1)
        elif isinstance(node, ast.Import) and own & {name.name.split(".")[0]
                                                     for name in node.names}:
            if not re.fullmatch(r"\s*import \w+( +#.*)?", lines[where]):
                raise ValueError(f"one module a line, please: {lines[where]}")
            lines[where] = lines[where].replace("import ", f"from {PACKAGE} import ", 1)
    return "\n".join(lines)


def write_package(folder):
    """Write the package into `folder`/badit_reference."""
    own = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in sources()}
    target = Path(folder) / PACKAGE
    for path in sources():
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(renamed(path.read_text(encoding="utf-8"), own), encoding="utf-8")
    for path in (path for pattern in DATA for path in ROOT.glob(pattern) if path.is_file()):
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (target / "__init__.py").write_text('"""BADIT, installed: the files of its repository."""\n')


class BuildPackage(build_py):
    """setuptools' step that lays out the files of a wheel."""

    def run(self):
        if self.editable_mode:
            raise SystemExit("an editable install would import the flat files under their own "
                             "names: work in the repository itself, or `pip install .`")
        write_package(self.build_lib)
