"""What ships with weights needs torch, numpy and transformers alone, in the form that transformers can load."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from mmar_megatron.hf.shipping import AUTO_MAP, PACKAGE, SHIPPED, rewritten, shipped_code

ENTRIES = ("configuration_mmar.py", "modeling_mmar.py", "processing_mmar.py")
"""The files that transformers is told of."""
THERE = {"torch", "numpy", "transformers"} | sys.stdlib_module_names
MAY_BE_THERE = {"PIL"}
"""Imported under `try` alone."""


def violations(code: Mapping[str, str], folder: Path) -> list[str]:
    """What keeps these files, by name, from being loaded; they are written into a folder, where transformers reads them."""
    found = []
    for name, source in code.items():
        for node, is_guarded in import_statements(source):
            where = f"{name}:{node.lineno}: `{ast.unparse(node)}`"
            if isinstance(node, ast.ImportFrom) and node.level:
                if node.level > 1 or f"{node.module}.py" not in code:
                    found.append(f"{where} is of no shipped file")
            elif not top_modules(node) <= THERE | (MAY_BE_THERE if is_guarded else set()):
                found.append(f"{where} may not be there")
        # It looks for them by regular expressions, and finds them in docstrings too.
        (folder / name).write_text(source)
        looked_for = {f"{module}.py" for module in get_relative_imports(folder / name)}
        found += [f"{name}: transformers looks for {file}" for file in sorted(looked_for - code.keys())]
    for entry in ENTRIES:
        if indirect := reached(entry, code) - helpers(entry, code):
            found.append(f"{entry} does not itself import {', '.join(sorted(indirect))}, which transformers 4 would not copy")
    reachable = set(ENTRIES).union(*(reached(entry, code) for entry in ENTRIES))
    return found + [f"{name} is imported by none" for name in code if name not in reachable]


def import_statements(source: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """At any depth, and whether a missing module is caught."""
    tree = ast.parse(source)
    attempts = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and catches_import_errors(node)]
    guarded = [inner for attempt in attempts for statement in attempt.body for inner in ast.walk(statement)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, node in guarded


def catches_import_errors(attempt: ast.Try) -> bool:
    return any(handler.type is not None and ast.unparse(handler.type) == "ImportError" for handler in attempt.handlers)


def top_modules(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = [str(node.module)] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def helpers(name: str, code: Mapping[str, str]) -> set[str]:
    """The shipped files that one imports."""
    nodes = (node for node, _ in import_statements(code[name]) if isinstance(node, ast.ImportFrom) and node.level)
    return {f"{node.module}.py" for node in nodes} & code.keys()


def reached(name: str, code: Mapping[str, str]) -> set[str]:
    """The shipped files that one imports, or that these import."""
    found: set[str] = set()
    waiting = helpers(name, code)
    while waiting:
        found |= waiting
        waiting = set().union(*(helpers(helper, code) for helper in waiting)) - found
    return found


def test_shipped_files_need_nothing_that_may_be_missing(tmp_path: Path) -> None:
    assert violations(shipped_code(), tmp_path) == []


def test_names_are_unique_since_all_lie_side_by_side() -> None:
    assert len(shipped_code()) == len(SHIPPED) == len(set(SHIPPED))


def test_files_differ_from_the_packages_in_imports_alone() -> None:
    for path in SHIPPED:
        ours, theirs = ((PACKAGE / path).read_text().splitlines(), shipped_code()[Path(path).name].splitlines())
        changed = [new for old, new in zip(ours, theirs, strict=True) if old != new]
        assert all(line.startswith("from .") for line in changed)


def test_automatic_classes_are_in_the_files_that_are_named() -> None:
    for target in AUTO_MAP.values():
        module, _, name = target.partition(".")
        tree = ast.parse(shipped_code()[f"{module}.py"])
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assert f"{module}.py" in ENTRIES


GOOD = {
    "configuration_mmar.py": "from transformers import PretrainedConfig\n",
    "modeling_mmar.py": "import torch.nn as nn\nfrom .configuration_mmar import C\nfrom .a import x\nfrom .b import y\n",
    "processing_mmar.py": "def f():\n    from .b import y\n",
    "a.py": "import os, numpy\nfrom .b import y\nimportlib.import_module('diffusers')\n",
    "b.py": "try:\n    from PIL import Image\nexcept ImportError:\n    pass\n",
}


def test_good_files_pass(tmp_path: Path) -> None:
    assert violations(GOOD, tmp_path) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("b.py", "import einops", "b.py:1: `import einops` may not be there"),
        ("b.py", "import os, einops.layers", "may not be there"),
        ("b.py", "def f():\n    class A:\n        from einops import rearrange", "b.py:3: `from einops import rearrange`"),
        ("b.py", "from PIL import Image", "may not be there"),
        ("b.py", "try:\n    pass\nexcept ImportError:\n    from PIL import Image", "may not be there"),
        ("b.py", "try:\n    from PIL import Image\nexcept ValueError:\n    pass", "may not be there"),
        ("b.py", "try:\n    import diffusers\nexcept ImportError:\n    pass", "may not be there"),
        ("b.py", "def f():\n    from mmar_megatron.data.patches import scaled", "may not be there"),
        ("b.py", "import mmar_megatron.data.patches", "may not be there"),
        ("b.py", "from . import a", "is of no shipped file"),
        ("b.py", "from .c import x", "b.py:1: `from .c import x` is of no shipped file"),
        ("b.py", "from .a.b import x", "is of no shipped file"),
        ("b.py", "from ..a import x", "is of no shipped file"),
        ("b.py", '"""It is good to take\nfrom .those import some."""', "b.py: transformers looks for those.py"),
        ("processing_mmar.py", "from .a import x", "processing_mmar.py does not itself import b.py"),
        ("c.py", "import os", "c.py is imported by none"),
    ],
)
def test_bad_files_are_found(name: str, source: str, complaint: str, tmp_path: Path) -> None:
    found = violations({**GOOD, name: source}, tmp_path)
    assert any(complaint in one for one in found), found


def test_imports_of_the_package_become_relative() -> None:
    source = "import torch\nfrom mmar_megatron.data.patches import a, b\nfrom mmar_megatron.hf.x import c\n"
    assert rewritten(source) == "import torch\nfrom .patches import a, b\nfrom .x import c\n"
