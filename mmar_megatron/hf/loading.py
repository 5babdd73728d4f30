"""A model to paint and read with, in one process: out of an export, or straight out of a checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mmar_megatron import platform
from mmar_megatron.hf.configuration_mmar import MMARConfig
from mmar_megatron.hf.exporting import copies_of, files_of, open_checkpoint
from mmar_megatron.hf.modeling_mmar import MMARForCausalLM
from mmar_megatron.hf.processing_mmar import MMARProcessor


def load_model(
    path: str | Path,
    *,
    average: bool = False,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> tuple[MMARForCausalLM, MMARProcessor]:
    """The model in evaluation mode, on this process's device, and the processor that goes with it.

    Args:
        path: of an export, of a checkpoint, or of a run, whose newest checkpoint it then is.
        average: of a checkpoint, take the moving average of the weights.
        dtype: of the weights; none: as they are stored.
        tokenizer, vae: of a checkpoint, where these lie now, if it is not where its configuration says.
        say: is told of damaged checkpoints.

    Raises:
        ValueError: nothing of the kind is there, or not whole, or of another model than its configuration says.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        if average or tokenizer or vae:
            raise ValueError(
                f"{path} is an export, which has its weights, tokenizer and codec: leave out --ema, --tokenizer, --vae."
            )
        return _from_export(path, dtype=dtype)
    source = open_checkpoint(path, average=average, dtype=dtype, tokenizer=tokenizer, vae=vae, say=say)
    with torch.device("meta"):
        model = MMARForCausalLM(source.hf_config)
    weights = {name: tensor for link in source.links for name, tensor in source.tensors(link).items()}
    model.name_or_path = str(source.path)
    model.load_state_dict(weights, strict=False, assign=True)  # complete but for a tied output layer, as was checked
    model.tie_weights()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in files_of(source).items():
            (folder / file).write_text(text)
        for file, origin in copies_of(source).items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).symlink_to(origin.resolve())
        processor = MMARProcessor.from_pretrained(folder)
        model.generation_config = type(model.generation_config).from_pretrained(folder)
        if processor.codec["kind"] == "vae":
            processor.autoencoder()  # while its directory is there
    return model.to(platform.device()).eval(), processor


def _from_export(path: Path, *, dtype: torch.dtype | None) -> tuple[MMARForCausalLM, MMARProcessor]:
    try:
        kind = json.loads((path / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}/config.json is not a JSON object: export the model again") from error
    if kind != MMARConfig.model_type:
        raise ValueError(f"{path}/config.json is of a {kind} model: give an export, a checkpoint or a run of this program")
    try:
        model = MMARForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
        processor = MMARProcessor.from_pretrained(path, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"{path} is not a whole export ({' '.join(str(error).split())[:200]}): export the model again"
        ) from error
    return model.to(platform.device()).eval(), processor
