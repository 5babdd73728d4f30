"""Which way imports run, and which file alone may speak to a foreign library. Reads the source, imports nothing.

    config, platform, progress <- parallel <- diffusion, data, model, engine <- inference, scaling, evaluation <- training
                                           <- pretrain_mmar.py, hf <- generation <- chaos, benchmarks, sweep, demo, cluster, tools

`diffusion`, `data`, `model` and `engine` do not import each other, with two exceptions: `model` uses `diffusion`; and the
contract between the loader and the model, `data.batch`, is open to `model` and `engine`. `hf` converts checkpoints and may see
all that trains; what its files that ship with exported weights may see is checked elsewhere. Nothing imports `tools`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mmar_megatron"

BASE = {"config", "config_checks", "platform", "progress", "parallel"}
CORE = BASE | {"diffusion", "data", "model", "engine"}
# What each part may import, as module paths within the package; a path allows all that is below it.
ALLOWED: dict[str, set[str]] = {
    "platform": set(),
    "progress": set(),
    "config": {"platform", "config_checks"},
    "config_checks": {"config"},  # for its types alone
    "parallel": {"config", "platform"},
    "diffusion": BASE,
    "data": BASE,
    "model": BASE | {"diffusion", "data.batch"},
    "engine": BASE | {"data.batch", "model"},
    "inference": CORE,
    "scaling": CORE,
    "evaluation": CORE,
    "training": CORE | {"inference", "scaling", "evaluation"},
    "hf": CORE | {"training"},
    "generation": CORE | {"training", "hf"},
    "demo": CORE | {"training", "hf", "generation"},
    "sweep": CORE | {"training", "scaling"},
    "cluster": CORE | {"training", "scaling"},
    "chaos": BASE | {"training.metrics"},
    "benchmarks": CORE | {"training", "inference", "scaling", "evaluation", "hf", "generation"},
    "pretrain_mmar": CORE | {"training", "inference", "scaling", "evaluation"},
    "tools": CORE
    | {"training", "inference", "scaling", "evaluation", "hf", "generation", "demo", "chaos", "benchmarks", "sweep", "cluster"},
}

# A word that may stand as part of a dotted name in one file alone.
HOMES = {
    "torch.cuda": f"{PACKAGE}/platform.py",
    "parallel_state": f"{PACKAGE}/parallel.py",
    "transformer_engine": f"{PACKAGE}/model/layer_specs.py",
    "deepspeed": f"{PACKAGE}/engine/deepspeed.py",
    "diffusers": f"{PACKAGE}/data/vae.py",
    "efficientnet_lite_pytorch": f"{PACKAGE}/data/teacher.py",
    **dict.fromkeys(("gradio", "fastapi", "uvicorn"), f"{PACKAGE}/demo/page.py"),
}


def source_files(root: Path) -> list[Path]:
    """The package, the tools and the entry script; not the tests."""
    folders = [*(root / PACKAGE).rglob("*.py"), *(root / "tools").rglob("*.py")]
    return sorted([*folders, *root.glob("pretrain_mmar.py")])


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; empty where it does not start at a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported, inside functions too; relative imports are resolved from `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*origin, node.module] if node.module else origin)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def arrow_violations(root: Path) -> list[str]:
    found = []
    for path in source_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        part = parts[1] if parts[0] == PACKAGE else parts[0]
        if part == "__init__":  # the package's own: it must import nothing of its parts
            allowed: set[str] = set()
        elif part in ALLOWED:
            allowed = ALLOWED[part] | ({part} if part != "tools" else set())
        else:
            found.append(f"{path.relative_to(root)}: `{part}` has no place in the layout: give it one in ALLOWED")
            continue
        for line, name in imported(ast.parse(path.read_text()), parts[:-1]):
            top, _, target = name.partition(".")
            if top in ("tools", "tests", "pretrain_mmar"):
                found.append(f"{path.relative_to(root)}:{line}: nothing imports `{top}`")
            elif top == PACKAGE and target and not target.startswith("__") and not is_within(target, allowed):
                found.append(f"{path.relative_to(root)}:{line}: `{part}` must not import `{name}`")
    return found


def is_within(target: str, allowed: set[str]) -> bool:
    return any(target == path or target.startswith(path + ".") for path in allowed)


def home_violations(root: Path) -> list[str]:
    found = []
    for path in source_files(root):
        tree = ast.parse(path.read_text())
        names = [(line, name) for line, name in imported(tree, path.relative_to(root).parts[:-1]) if not name.startswith(PACKAGE)]
        # After a mere `import torch` or `import megatron.core`, what is below them is an attribute.
        chains = ((node.lineno, dotted(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        names += [(line, chain) for line, chain in chains if chain.startswith(("torch.", "megatron."))]
        for word, home in HOMES.items():
            lines = {line for line, name in names if f".{word}." in f".{name}."}
            if path.relative_to(root).as_posix() != home:
                found += [f"{path.relative_to(root)}:{line}: `{word}` belongs into {home} alone" for line in sorted(lines)]
    return found


def test_imports_run_one_way() -> None:
    assert arrow_violations(ROOT) == []


def test_foreign_libraries_have_one_home() -> None:
    assert home_violations(ROOT) == []


def test_the_checks_see_the_real_tree() -> None:
    checked = {path.relative_to(ROOT).as_posix() for path in source_files(ROOT)}
    assert {f"{PACKAGE}/config.py", f"{PACKAGE}/platform.py", f"{PACKAGE}/data/batch.py"} <= checked
    home = ROOT / PACKAGE / "platform.py"
    assert any(name.startswith("torch.cuda") for name in map(dotted, ast.walk(ast.parse(home.read_text()))))


def tree_with(root: Path, file: str, source: str) -> Path:
    path = root / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    return root


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mmar_megatron/data/loader.py", "from mmar_megatron.model.head import DiffusionHead"),
        ("mmar_megatron/data/loader.py", "from mmar_megatron import diffusion"),
        ("mmar_megatron/data/loader.py", "from ..model import head"),
        ("mmar_megatron/data/loader.py", "def f():\n    import mmar_megatron.engine.native"),
        ("mmar_megatron/model/mmar_model.py", "from mmar_megatron.data.loader import TrainLoader"),
        ("mmar_megatron/model/mmar_model.py", "from mmar_megatron.data import loader"),
        ("mmar_megatron/diffusion/sampler.py", "from mmar_megatron.data.batch import Batch"),
        ("mmar_megatron/inference/generate.py", "from mmar_megatron.training.trainer import Trainer"),
        ("mmar_megatron/evaluation/shapes.py", "from mmar_megatron.inference import generate"),
        ("mmar_megatron/platform.py", "from mmar_megatron.config import Config"),
        ("mmar_megatron/config.py", "from . import parallel"),
        ("mmar_megatron/hf/exporting.py", "from mmar_megatron.evaluation import scores"),
        ("mmar_megatron/hf/loading.py", "from mmar_megatron.generation.opening import open_model"),
        ("mmar_megatron/generation/painting.py", "from mmar_megatron.demo.canvas import Canvas"),
        ("mmar_megatron/training/trainer.py", "from tools.evaluate import main"),
        ("mmar_megatron/utils/misc.py", "import os"),
        ("mmar_megatron/__init__.py", "from mmar_megatron.config import Config"),
        ("mmar_megatron/training/trainer.py", "from mmar_megatron.sweep import journal"),
        ("tools/plan.py", "from tools.sweep import main"),
    ],
)
def test_wrong_arrows_are_found(tmp_path: Path, file: str, source: str) -> None:
    assert len(arrow_violations(tree_with(tmp_path, file, source))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mmar_megatron/model/mmar_model.py", "from mmar_megatron.diffusion import schedule"),
        ("mmar_megatron/model/mmar_model.py", "from mmar_megatron.data.batch import Batch"),
        ("mmar_megatron/engine/native.py", "from mmar_megatron.data import batch"),
        ("mmar_megatron/engine/native.py", "from . import optimizer"),
        ("mmar_megatron/training/trainer.py", "from mmar_megatron import evaluation, inference, scaling, __version__"),
        ("mmar_megatron/hf/importing.py", "from mmar_megatron.training.saving import facts_of"),
        ("tools/convert_ckpt.py", "from mmar_megatron.hf.importing import import_model"),
    ],
)
def test_right_arrows_pass(tmp_path: Path, file: str, source: str) -> None:
    assert arrow_violations(tree_with(tmp_path, file, source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.synchronize()",
        "import torch.cuda",
        "from torch import cuda",
        "from torch.cuda import synchronize",
        "from megatron.core import parallel_state",
        "import megatron.core.parallel_state as mpu",
        "from megatron.core.parallel_state import get_tensor_model_parallel_rank",
        "import megatron.core\nmegatron.core.parallel_state.is_initialized()",
        "def f():\n    import transformer_engine.pytorch as te",
        "from megatron.core.extensions.transformer_engine import TENorm",
        "import deepspeed",
        "from diffusers import AutoencoderKL",
        "def f():\n    from efficientnet_lite_pytorch import EfficientNet",
        "import gradio as gr",
        "from uvicorn import run",
    ],
)
def test_strangers_are_found(tmp_path: Path, source: str) -> None:
    assert len(home_violations(tree_with(tmp_path, "mmar_megatron/engine/native.py", source))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("mmar_megatron/platform.py", "import torch\ntorch.cuda.synchronize()"),
        ("mmar_megatron/demo/page.py", "import gradio as gr"),
        ("mmar_megatron/parallel.py", "from megatron.core import parallel_state"),
        ("mmar_megatron/training/trainer.py", "from mmar_megatron.engine.deepspeed import DeepSpeedEngine"),
        ("mmar_megatron/training/trainer.py", "stage = config.deepspeed.zero_stage"),
        ("mmar_megatron/training/trainer.py", "# torch.cuda\nhint = 'see torch.cuda, parallel_state, deepspeed'"),
    ],
)
def test_homes_and_mere_mentions_pass(tmp_path: Path, file: str, source: str) -> None:
    assert home_violations(tree_with(tmp_path, file, source)) == []
