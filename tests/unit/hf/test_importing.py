"""A pretrained model becomes a checkpoint: what is copied, what is drawn, and what is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmar_megatron import parallel
from mmar_megatron.config import Config, ParallelConfig, parse_command_line
from mmar_megatron.data.codec import build_codec
from mmar_megatron.data.shapes import draw_scenes
from mmar_megatron.data.tokenizer import load_tokenizer, train_sentencepiece
from mmar_megatron.hf.exporting import export, open_checkpoint
from mmar_megatron.hf.importing import ImportReport, draw_image_parts, import_model
from mmar_megatron.hf.names import Heads, links, split
from mmar_megatron.hf.storage import CheckpointReader, pieces
from mmar_megatron.hf.weights import HuggingFaceWeights
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model
from mmar_megatron.training import checkpoint, manifest
from tests.unit.command_line import share_parser
from tests.unit.hf.pretrained import FAMILIES, IMAGES, TOKENS, VOCAB_SIZE, save_pretrained

WORDS = "embedding.word_embeddings.weight"
HEADS = {name: Heads(num_query_groups=2, head_dim=8) for name in FAMILIES} | {"qwen3": Heads(num_query_groups=2, head_dim=16)}


@pytest.fixture(scope="module", autouse=True)
def parser() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_parser(patch)
        yield


def convert(hf: Path, out: Path, *options: str, say: Callable[[str], object] = lambda _: None) -> ImportReport:
    """With a configuration that is written for the model."""
    written = out.with_suffix(".yaml")
    return import_model(hf, out, configs=[], options=[*IMAGES, *options], write_config=written, say=say)


def all_tensors(path: Path) -> dict[tuple[str, int | None], Tensor]:
    reader = CheckpointReader(path)
    return {(key, layer): reader.read(key, layer) for key, layer in pieces(reader.tensors)}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model hf/, and the checkpoint made/ with made.yaml."""
    folder = tmp_path_factory.mktemp("qwen3")
    save_pretrained("qwen3", folder / "hf", dtype=torch.bfloat16)
    convert(folder / "hf", folder / "made")
    return folder


# --- what is copied -------------------------------------------------------------------------------------------------------------


def test_bits_and_type_of_a_bf16_model_stay(qwen3: Path) -> None:
    weights, compared = HuggingFaceWeights(qwen3 / "hf"), 0
    link_of = {(link.ours, link.layer): link for link in links(weights.specs)}
    for (key, layer), tensor in all_tensors(qwen3 / "made").items():
        if not key.startswith(("decoder.", WORDS, "output_layer.")):
            assert tensor.dtype == torch.float32
            continue
        for name, part in split(link_of[key, layer], tensor, heads=HEADS["qwen3"]).items():
            theirs = weights.read(name)
            rows = TOKENS if part.shape != theirs.shape else len(theirs)
            assert part.dtype == theirs.dtype == torch.bfloat16
            assert torch.equal(part[:rows].view(torch.int16), theirs[:rows].view(torch.int16)), name
            compared += 1
    assert compared == len(weights.specs) == 47


def test_new_rows_are_the_mean_of_the_copied_ones(qwen3: Path) -> None:
    reader = CheckpointReader(qwen3 / "made")
    for key in (WORDS, "output_layer.weight"):
        rows_VD = reader.read(key)
        assert rows_VD.shape == (384, 32)
        mean_D = rows_VD[:TOKENS].float().mean(dim=0).bfloat16()
        assert torch.equal(rows_VD[TOKENS:], mean_D.expand(384 - TOKENS, -1))


def test_report_and_what_is_kept_with_it(tmp_path: Path) -> None:
    save_pretrained("mistral", tmp_path / "hf")
    lines: list[str] = []
    report = convert(tmp_path / "hf", tmp_path / "made", say=lines.append)
    assert lines[-1].startswith("84 of 84 tensors, ")
    assert str(report).splitlines() == [
        "39 tensors taken over (float32), 57 of the image parts drawn with seed 1234",
        "special tokens in the vocabulary: eos <|endoftext|> = 300, begin_image <|vision_start|> = 301, "
        "end_image <|vision_end|> = 302, image <|image_pad|> = 303",
        "special tokens appended, which begin as the mean of all words: bos = 304, pad = 305",
        "vocabulary: 384 rows, of which 304 copied and 78 that only pad; 16 that no token had were left out",
        "sliding window: 64 positions, which no sequence exceeds: attention is whole here",
    ]
    facts = manifest.read(tmp_path / "made")
    assert manifest.problems(tmp_path / "made") == []
    assert facts["weights_only"] is True and facts["step"] == 0 and facts["average"] is False
    assert facts["layout"] == {"tensor": 1, "pipeline": 1, "data": 1}
    codec = "patch, image_size 32, patch_size 8"
    assert facts["fingerprints"] == {"tokenizer": load_tokenizer(tmp_path / "hf").fingerprint, "codec": codec}
    kept = (tmp_path / "made" / checkpoint.CONFIG).read_text()
    assert yaml.safe_load(kept)["data"]["tokenizer"] == str(tmp_path / "hf")
    assert parse_command_line(["--config", str(tmp_path / "made" / checkpoint.CONFIG)]).yaml == kept


def test_written_configuration_is_enough_for_another_command(qwen3: Path, tmp_path: Path) -> None:
    written = qwen3 / "made.yaml"
    assert "\n" in written.read_text()
    import_model(qwen3 / "hf", tmp_path / "again", configs=[str(written)], options=IMAGES)
    again, first = all_tensors(tmp_path / "again"), all_tensors(qwen3 / "made")
    assert again.keys() == first.keys()
    assert all(torch.equal(tensor, first[place]) for place, tensor in again.items())


def test_written_configuration_has_the_tokenizer_that_was_asked_for(qwen3: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((qwen3 / "hf" / "tokenizer.json").read_bytes())
    convert(qwen3 / "hf", tmp_path / "made", f"--data.tokenizer={copy}")
    for file in (tmp_path / "made.yaml", tmp_path / "made" / checkpoint.CONFIG):
        assert yaml.safe_load(file.read_text())["data"]["tokenizer"] == str(copy)


def test_layout_and_precision_of_the_run_do_not_matter(qwen3: Path, tmp_path: Path) -> None:
    parallel_options = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=2"]
    parallel_options += ["--parallel.sequence_parallel=true", "--precision.dtype=bf16", "--parallel.pipeline_split=[1, 3]"]
    convert(qwen3 / "hf", tmp_path / "made", *parallel_options)
    other, first = all_tensors(tmp_path / "made"), all_tensors(qwen3 / "made")
    assert other.keys() == first.keys()
    assert all(torch.equal(tensor, first[place]) for place, tensor in other.items())


def test_what_old_versions_saved_besides_is_ignored(tmp_path: Path) -> None:
    save_pretrained("llama3", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file)
    assert convert(tmp_path / "hf", tmp_path / "made").loaded == 38


# --- what is drawn --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [False, True])
def test_image_parts_are_what_a_run_would_draw(aligned: bool) -> None:
    options = ["--model.alignment_loss_weight=0.5", "--model.alignment_features=7"] if aligned else []
    sizes = ["--model.backbone.num_layers=3", "--model.backbone.hidden_size=32", "--model.backbone.num_attention_heads=4"]
    config = parse_command_line([*sizes, *IMAGES, *options, "--seed=11"]).config
    geometry = ImageGeometry.of(build_codec(config.data.codec))
    drawn, whole = draw_image_parts(config, geometry=geometry), full_model(config, geometry=geometry)
    assert drawn.keys() == {name for name in whole if not name.startswith(("decoder.", WORDS))}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in drawn.items())
    assert ("alignment_projector.weight" in drawn) == aligned
    assert len(drawn) == 57 + 2 * aligned


def full_model(config: Config, *, geometry: ImageGeometry) -> dict[str, Tensor]:
    """The initial weights of a run's model."""
    groups = parallel.initialize_fake(ParallelConfig(), rank=0, world_size=1)
    try:
        (model,) = build_model(config.model, geometry=geometry, vocab_size=300, groups=groups, seed=config.seed)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}
    finally:
        parallel.leave()


# --- our own exports ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(qwen3: Path, tmp_path: Path) -> Path:
    """The checkpoint made/ as a Hugging Face model."""
    export(open_checkpoint(qwen3 / "made"), tmp_path / "exported", say=lambda _: None)
    return tmp_path / "exported"


def test_our_own_export_comes_back_whole(qwen3: Path, exported: Path, tmp_path: Path) -> None:
    report = convert(exported, tmp_path / "back", "--seed=99")
    assert str(report).splitlines()[-1] == "vocabulary: 384 rows"
    assert (report.fresh, report.dropped_rows, report.copied_rows) == (0, 0, 384)
    back, first = all_tensors(tmp_path / "back"), all_tensors(qwen3 / "made")
    assert back.keys() == first.keys()
    assert all(torch.equal(tensor, first[place]) and tensor.dtype == first[place].dtype for place, tensor in back.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.codec.patch_size=16"], "4 x 4 of 192: change data.codec"),
        (
            ["--model.make_vocab_size_divisible_by=100"],
            "has embeddings for 384 tokens, but the vocabulary of 306 is padded to 400",
        ),
        (["--model.head.depth=3"], "says model.head.depth 3, but .*/config.json makes it 2"),
    ],
)
def test_configuration_of_another_export(exported: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(exported, tmp_path / "back", *options)
    assert not (tmp_path / "back").exists()


def test_tokenizer_of_another_export(exported: Path, tmp_path: Path) -> None:
    change_config(exported, image_token_id=302)
    with pytest.raises(ValueError, match=r"image_token_id is 302, but 303 in the tokenizer: give its own as data.tokenizer"):
        convert(exported, tmp_path / "back")


# --- what is refused ------------------------------------------------------------------------------------------------------------


def change_config(hf: Path, **fields: Any) -> None:
    file = hf / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(hf: Path) -> None:
        weights = load_file(hf / "model-00001-of-00002.safetensors")
        change(weights)
        save_file(weights, hf / "model-00001-of-00002.safetensors")
        update_index(hf)

    return damage


def update_index(hf: Path) -> None:
    shards = sorted(path.name for path in hf.glob("*.safetensors"))
    places = {name: shard for shard in shards for name in load_file(hf / shard)}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def cut_off(hf: Path) -> None:
    file = hf / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def name_another_tensor(hf: Path) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.bias"] = "model-00001-of-00002.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def without_a_shard(hf: Path) -> None:
    (hf / "model-00002-of-00002.safetensors").unlink()


def without_index(hf: Path) -> None:
    (hf / "model.safetensors.index.json").unlink()


def without_tokenizer(hf: Path) -> None:
    (hf / "tokenizer.json").unlink()


def without_weights(hf: Path) -> None:
    for file in hf.glob("model*"):
        file.unlink()


def pickled_alone(hf: Path) -> None:
    without_weights(hf)
    (hf / "pytorch_model.bin").write_bytes(b"")


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (without_a_shard, "00002.safetensors is missing, which"),
    "half a shard": (cut_off, "model-00002-of-00002.safetensors is cut off or no file of weights: copy it again"),
    "wrong index": (name_another_tensor, "has no tensor model.norm.bias, though model.safetensors.index.json says so"),
    "damaged index": (lambda hf: (hf / "model.safetensors.index.json").write_text("[]"), "index.json makes no sense"),
    "index of no names": (
        lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "index.json makes no sense",
    ),
    "no index": (without_index, "has shards of weights, but no model.safetensors.index"),
    "pickle": (pickled_alone, "has its weights in pytorch_model.bin alone, which could run as a program: convert it"),
    "no weights": (
        without_weights,
        "has neither model.safetensors nor model.safetensors.index",
    ),
    "no prefix": (
        change_weights(lambda w: w.update({name.removeprefix("model."): w.pop(name) for name in list(w)})),
        r"lacks the tensor model.embed_tokens.weight, which must be \[320, 32\]: save it as a model for causal language",
    ),
    "not a number": (
        change_weights(lambda w: w[Q_PROJ].view(-1)[:1].fill_(float("nan"))),
        rf"{Q_PROJ} has values that are not finite: give a model that was saved whole",
    ),
    "missing tensor": (change_weights(lambda w: w.pop(Q_PROJ)), rf"lacks the tensor {Q_PROJ}, which must be \[32, 32\]"),
    "extra tensor": (
        change_weights(lambda w: w.update({"score.weight": torch.ones(2, 3)})),
        r"has the tensor score.weight \[2, 3\], which this model has no place for",
    ),
    "other shape": (
        change_weights(lambda w: w.update({Q_PROJ: torch.ones(16, 32)})),
        rf"{Q_PROJ} is \[16, 32\], but its config.json makes it \[32, 32\]",
    ),
    "other type": (
        change_weights(lambda w: w.update({Q_PROJ: torch.ones(32, 32, dtype=torch.int8)})),
        f"{Q_PROJ} is of the type I8, which is none of F32, F16, BF16",
    ),
    "two types": (
        change_weights(lambda w: w.update({Q_PROJ: w[Q_PROJ].half()})),
        f"{Q_PROJ} is torch.float16, but model.layers.0.self_attn.k_proj.weight is torch.float32: save the model in one type",
    ),
    "two output layers": (
        change_weights(lambda w: w.update({"lm_head.weight": torch.ones(VOCAB_SIZE, 32)})),
        "lm_head.weight differs from model.embed_tokens.weight, but config.json says that they are one",
    ),
    "fewer rows": (
        lambda hf: change_config(hf, vocab_size=VOCAB_SIZE - 1),
        r"embed_tokens.weight is \[320, 32\], but .* \[319, 32\]",
    ),
    "no tokenizer": (without_tokenizer, "no tokenizer at"),
    "window": (
        lambda hf: change_config(hf, use_sliding_window=True, sliding_window=32, layer_types=["sliding_attention"] * 4),
        "attention reaches back over sliding_window 32 positions, and ours over all of a sequence: lower data.sequence_length 64",
    ),
    "quantized": (lambda hf: change_config(hf, quantization_config={"bits": 4}), "config.json: quantization_config says"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_pretrained("qwen2", folder, max_shard_size="100KB")
    assert (folder / "model-00002-of-00002.safetensors").exists()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_models_are_refused_before_anything_is_written(damage: str, sharded: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    for file in sharded.iterdir():
        (hf / file.name).write_bytes(file.read_bytes())
    harm, message = DAMAGES[damage]
    harm(hf)
    with pytest.raises(ValueError, match=message) as raised:
        convert(hf, tmp_path / "made")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_tokenizer_of_another_model(qwen3: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    texts = [scene.caption for scene in draw_scenes(100, split="train", seed=0)]
    file.write_bytes(train_sentencepiece(texts, vocab_size=350, or_fewer=True))
    other = f'data: {{tokenizer: "{file}"}}'
    (tmp_path / "other.yaml").write_text(other)
    sizes = [str(qwen3 / "made.yaml"), str(tmp_path / "other.yaml")]
    with pytest.raises(
        ValueError, match=f"data.tokenizer {file} is not that of .*: token 0 is '<unk>' in the former and '!' in the"
    ):
        import_model(qwen3 / "hf", tmp_path / "made", configs=sizes, options=IMAGES)
    assert not (tmp_path / "made").exists()


def test_tokenizer_with_more_tokens_than_rows(qwen3: Path, tmp_path: Path) -> None:
    save_pretrained("llama", tmp_path / "hf", vocab_size=TOKENS - 1)
    with pytest.raises(ValueError, match="has embeddings for 303 tokens, but the tokenizer has 304: give the tokenizer of this"):
        convert(tmp_path / "hf", tmp_path / "made")


def test_configuration_of_another_model(qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"says model.backbone.hidden_size 64, but .*config.json makes it 32: change it, or let --w"
    ):
        convert(qwen3 / "hf", tmp_path / "made", "--model.backbone.hidden_size=64")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(qwen3: Path, tmp_path: Path) -> None:
    for there, option in ((tmp_path / "made", "--out"), (tmp_path / "made.yaml", "--write-config")):
        there.mkdir()
        with pytest.raises(ValueError, match=f"{there} exists: remove it or choose another {option}"):
            convert(qwen3 / "hf", tmp_path / "made")
        there.rmdir()
