"""What a run reads: its data sets, opened, with the tokenizer and the codec that all of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.codec import ImageCodec, build_codec
from mmar_megatron.data.index import NO_LANGUAGE, PAIR, Index, Split
from mmar_megatron.data.sequence import Document, DocumentBuilder, assemble
from mmar_megatron.data.shards import Sample, ShardReader
from mmar_megatron.data.storage import Storage, open_storage
from mmar_megatron.data.stream import Planner, PlanSettings, SourceLengths
from mmar_megatron.data.tokenizer import TOKENIZER_NAMES, Tokenizer, find_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from mmar_megatron.config import DataConfig, SourceConfig, TaskConfig

SINGLE = "data"
"""Name of the one source where `data.path` is read."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One opened source."""

    name: str
    path: str
    weight: float
    tasks: TaskConfig
    storage: Storage
    index: Index
    first_id: int
    """What is added to a sample's number to tell it from other sources' samples in reports."""

    @property
    def has_pairs(self) -> bool:
        """Whether it holds pictures with captions, beside or instead of content."""
        return bool((self.index.kind == PAIR).any())


class DataSource:
    """The opened data sets with the tokenizer and the codec that go with them.

    Args:
        config: the data section.
        teacher: whether documents carry the features of the alignment teacher, which all sets with pictures must then hold.
        codec: in place of the configured one.

    Raises:
        ValueError: nothing is there, or it was made with another tokenizer or codec, or lacks all of the languages, or features
            or mirrored latents that are asked for.
    """

    def __init__(self, config: DataConfig, *, teacher: bool = False, codec: ImageCodec | None = None) -> None:
        self.config = config
        self.sets = [*_open_all(config)]
        self.codec: ImageCodec = codec or build_codec(config.codec)
        self._tokenizer_path = config.tokenizer or self.sets[0].path
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer_file(config, storage=self.sets[0].storage))
        self.builder = DocumentBuilder(self.tokenizer, num_tokens=self.codec.num_tokens, sequence_length=config.sequence_length)
        for opened in self.sets:
            self._check(opened)
        self.teacher_features = self._teacher_features() if teacher else 0

    # --- opening ----------------------------------------------------------------------------------------------------------------

    def _check(self, opened: DataSet) -> None:
        path, index = opened.path, opened.index
        if index.codec != self.codec.fingerprint:
            raise ValueError(
                f"{path} was made for the codec ({index.codec}), data.codec is ({self.codec.fingerprint}): "
                f"change data.codec or prepare the data set anew"
            )
        if index.tokenizer != self.tokenizer.fingerprint:
            raise ValueError(
                f"{path} was made with the tokenizer {index.tokenizer[:16]}..., but {self._tokenizer_path} is "
                f"{self.tokenizer.fingerprint[:16]}...: change data.tokenizer or prepare the data set with it"
            )
        latents = self.config.codec.kind == "vae" and index.images.any()
        if self.config.horizontal_flip > 0 and latents and not index.flipped:
            raise ValueError(
                f"{path} holds no latents of mirrored pictures, but data.horizontal_flip is {self.config.horizontal_flip}: "
                "set that to 0, or prepare the data set with --flip"
            )
        self._check_languages(opened)

    def _check_languages(self, opened: DataSet) -> None:
        index, wanted = opened.index, self.config.languages
        if set(index.languages) <= set(wanted):
            return
        allowed_T = _text_groups(index, wanted) >= 0
        before_T = np.concatenate([[0], np.cumsum(allowed_T)])
        bad = np.flatnonzero(before_T[index.text_start[1:]] == before_T[index.text_start[:-1]])
        if len(bad):
            split: Split = "train" if bad[0] in index.ids("train") else "validation"
            sample = self.reader(split, of=opened).read(int(bad[0]) - index.ids(split).start)
            raise ValueError(
                f"{opened.path}: sample {sample.key} has captions in {sorted(sample.captions)}, but data.languages is {wanted}: "
                "add one of those, or prepare the data set without such samples"
            )

    def _teacher_features(self) -> int:
        teachers = {opened.path: opened.index.teacher for opened in self.sets if opened.index.images.any()}
        if not teachers:
            raise ValueError("the data have no pictures to align: set model.alignment_loss_weight to 0")
        for path, found in teachers.items():
            if found is None:
                raise ValueError(
                    f"{path} holds no teacher features: set model.alignment_loss_weight to 0, or prepare it with --teacher"
                )
        (path, first), *others = teachers.items()
        for other, found in others:
            if found != first:
                raise ValueError(f"{path} has the teacher's features ({first}), but {other} ({found}): prepare one of them anew")
        assert first is not None
        return int(first["features"])

    # --- what is in it ----------------------------------------------------------------------------------------------------------

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of what gives a model's tokens their meaning."""
        return {"tokenizer": self.tokenizer.fingerprint, "codec": self.codec.fingerprint}

    @property
    def validation_set(self) -> DataSet:
        """The data set whose held-out samples validate."""
        wanted = self.config.validation_source
        return next(opened for opened in self.sets if wanted in (None, opened.name))

    def reader(self, split: Split, *, of: DataSet | None = None, cache_bytes: int = 0) -> ShardReader:
        """Opens the samples of a split, by default of the set that validates.

        Raises:
            ValueError: the split is empty, or a shard missing or truncated.
        """
        opened = of or self.validation_set
        return ShardReader(opened.path, index=opened.index, split=split, cache_bytes=cache_bytes, storage=opened.storage)

    def planner(self, *, seed: int) -> Planner:
        """Plans the training stream."""
        config = self.config
        for opened in self.sets:
            if not opened.index.count("train"):
                raise ValueError(f"{opened.path} has no train samples: prepare a data set that has, or leave the source out")
        settings = PlanSettings(
            seed=seed,
            sequence_length=config.sequence_length,
            image_tokens=self.codec.num_tokens,
            packing=config.packing,
            window=config.packing_window,
            caption_dropout=config.caption_dropout,
            shuffle_block=config.shuffle_block,
            shuffle_pool=config.shuffle_pool,
        )
        return Planner([_lengths(opened, languages=config.languages) for opened in self.sets], settings)

    def captions(self, sample: Sample) -> list[str]:
        """All captions of a sample in the configured languages."""
        return [text for language in self.config.languages for text in sample.captions.get(language, [])]

    def picture(self, sample: Sample) -> NDArray[np.uint8]:
        """A sample's first picture [H, W, 3], or what the codec makes of its latents where these alone are stored."""
        moments_I2NC = sample.moments_I2NC
        if sample.num_pictures or moments_I2NC is None:
            return sample.image_HW3
        return self.codec.decode(moments_I2NC[0, 0].astype(np.float32))

    def name_of(self, sample_id: int) -> str:
        """Tells a sample in a report: its source and its number there."""
        opened = next(o for o in reversed(self.sets) if o.first_id <= sample_id)
        return f"{opened.name}:{sample_id - opened.first_id}"

    def assemble(self, rows: Sequence[Sequence[Document]], *, timestep_multiplier: int) -> Batch:
        """Rows of documents -> a microbatch."""
        return assemble(
            rows,
            sequence_length=self.config.sequence_length,
            image_shape=(self.codec.num_tokens, self.codec.channels),
            timestep_multiplier=timestep_multiplier,
            teacher_features=self.teacher_features,
            pad_id=self.tokenizer.pad_id,
        )


def tokenizer_file(config: DataConfig, *, storage: Storage | None = None) -> Path:
    """The file of the tokenizer that is configured, or else lies beside the first data set's index, on `storage` if that is open.

    Raises:
        ValueError: there is none.
    """
    if config.tokenizer is not None:
        return find_tokenizer(config.tokenizer)
    path = next(iter(config.sources.values())).path if config.sources else config.path
    storage = storage or open_storage(path)
    names = [name for name in TOKENIZER_NAMES if storage.size(name) is not None]
    return storage.local(names[0]) if names else find_tokenizer(path)


def _open_all(config: DataConfig) -> Iterator[DataSet]:
    from mmar_megatron.config import SourceConfig

    sources: dict[str, SourceConfig] = config.sources or {SINGLE: SourceConfig(path=config.path)}
    first_id = 0
    for name, source in sources.items():
        storage = open_storage(source.path, cache_dir=config.cache_dir, cache_bytes=_cache_bytes(source.path, config))
        index = Index.load(source.path, storage=storage)
        yield DataSet(
            name=name,
            path=source.path,
            weight=source.weight,
            tasks=source.tasks or config.tasks,
            storage=storage,
            index=index,
            first_id=first_id,
        )
        first_id += len(index)


def _cache_bytes(path: str, config: DataConfig) -> int:
    """What is fetched is kept where a folder is given for it; local data are not fetched."""
    return round(config.cache_gb * 1e9) if config.cache_dir and "://" in path else 0


def _lengths(opened: DataSet, *, languages: Sequence[str]) -> SourceLengths:
    """The columns of the training samples."""
    index, ids = opened.index, opened.index.ids("train")
    weights = asdict(opened.tasks)
    return SourceLengths(
        name=opened.name,
        weight=opened.weight,
        task_weights=(weights["text_to_image"], weights["image_to_text"], weights["image_only"]),
        fingerprint=index.fingerprint,
        is_pair=np.asarray(index.kind[ids.start : ids.stop]) == PAIR,
        images=index.images[ids.start : ids.stop],
        paints=index.paints[ids.start : ids.stop].astype(bool),
        learned=index.learned[ids.start : ids.stop],
        text_start=index.text_start[ids.start : ids.stop + 1],
        text_tokens=index.text_tokens,
        text_group=_text_groups(index, languages),
    )


def _text_groups(index: Index, languages: Sequence[str]) -> NDArray[np.int16]:
    """[T]: the language of each text, -1 where it is not among those asked for."""
    group_of = np.full(256, -1, dtype=np.int16)
    group_of[NO_LANGUAGE] = NO_LANGUAGE
    for code, language in enumerate(index.languages):
        if language in languages:
            group_of[code] = code
    return group_of[index.text_language]
