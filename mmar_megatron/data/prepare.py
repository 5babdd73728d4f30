"""Making a data set: records -> tokenizer, shards and index, all of it or nothing.

Everything is written into a hidden directory beside the final one. The data set takes its name when it is complete, and a run
that was killed goes on where it was. The parts are in `preparation`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.data import shapes
from mmar_megatron.data.codec import Encoder, ImageCodec, build_codec
from mmar_megatron.data.index import INDEX_NAME, SPLITS, Index, Split, write_index
from mmar_megatron.data.preparation.look import Looker
from mmar_megatron.data.preparation.plan import Plan, make_plan
from mmar_megatron.data.preparation.pool import ordered
from mmar_megatron.data.preparation.recipe import Recipe
from mmar_megatron.data.preparation.records import UNDECODABLE, Block, Made, Raw, Source
from mmar_megatron.data.preparation.report import Report
from mmar_megatron.data.preparation.training_texts import training_texts
from mmar_megatron.data.preparation.unfinished import Finished, Unfinished
from mmar_megatron.data.preparation.write import Preparer, my_shards, part_file, read_part, write_shards
from mmar_megatron.data.tokenizer import load_tokenizer, train_sentencepiece
from mmar_megatron.progress import Progress

if TYPE_CHECKING:
    from mmar_megatron.config import DataConfig

TOKENIZER_NAME = "tokenizer.model"


@dataclass(kw_only=True)
class Preparation:
    """Makes one data set of one source.

    Args:
        out: directory to make; it appears when it is complete.
        source: of the records.
        codec: the images are sized for it.
        recipe: what is asked of the records, and how they are stored.
        tokenizer: path of the one that counts the tokens; none: one is trained on the training texts.
        encoders: what they make of the pictures is stored.
        workers: processes that decode; 0: this one does.
        rank, ranks: this process, and how many share the work through a common file system.
        resume: go on with what a killed run left, and leave it when this one fails; or else neither.
        log: takes lines about progress.
    """

    out: Path
    source: Source
    codec: ImageCodec
    recipe: Recipe
    tokenizer: str | None = None
    encoders: Sequence[Encoder] = ()
    workers: int = 0
    rank: int = 0
    ranks: int = 1
    resume: bool = True
    log: Callable[[str], None] = print
    _resumed: bool = False

    def run(self, *, dropped: dict[str, int] | None = None) -> Report | None:
        """Makes the data set, or goes on making it. Rank 0 returns the report.

        Args:
            dropped: by reason, what the source left out, for the report.

        Raises:
            ValueError: `out` exists; it was begun with other settings or inputs; the source is unfit.
        """
        self.recipe.check()
        assert self.recipe.keep_pictures or self.encoders, "nothing of the pictures would be stored"
        unfinished = Unfinished(self.out, rank=self.rank, ranks=self.ranks)
        settings = self._settings()
        try:
            blocks = unfinished.begin(self.source, settings, anew=not self.resume)
            try:
                return self._steps(unfinished, blocks, dropped=dropped or {})
            finally:
                if not self.resume:
                    unfinished.remove()
        except (Finished, FileNotFoundError):
            if self.rank and self.out.exists():
                return None
            raise
        finally:
            unfinished.release()

    def _steps(self, unfinished: Unfinished, blocks: int, *, dropped: dict[str, int]) -> Report | None:
        begin = time.monotonic()
        self._look(unfinished, blocks)
        plan = self._plan(unfinished, blocks)
        self._write(unfinished, plan)
        if self.rank:
            return None
        index, lost = self._finish(unfinished, plan)
        report = Report.of(
            self.out,
            index=index,
            dropped=dict(Counter(dropped) + Counter(plan.dropped) + Counter(lost)),
            examples=plan.examples,
            vocab_size=load_tokenizer(self.tokenizer or unfinished.data).vocab_size,
            seconds=time.monotonic() - begin,
            resumed=self._resumed,
        )
        report.save(unfinished.data)
        unfinished.finish()
        return report

    def _settings(self) -> dict[str, Any]:
        return {
            **self.source.settings,
            **self.recipe.settings,
            "codec": self.codec.fingerprint,
            "tokenizer": load_tokenizer(self.tokenizer).fingerprint if self.tokenizer else None,
            "encoders": [encoder.fingerprint for encoder in self.encoders],
        }

    def _look(self, unfinished: Unfinished, blocks: int) -> None:
        """Looks at this rank's blocks; when it returns on rank 0, all ranks have."""
        looker = Looker(
            self.source,
            recipe=self.recipe,
            blocks=unfinished.blocks,
            directory=unfinished.looks,
            texts=self.tokenizer is None,
        )
        looks = [unfinished.looks / f"{number:06d}.json" for number in range(blocks)]
        mine = range(self.rank, blocks, self.ranks)
        missing = [number for number in mine if not looks[number].exists()]
        if len(missing) < len(mine):
            self._resumed = True
            self._say(f"{len(mine) - len(missing):,} of {len(mine):,} blocks were looked at before")
        progress = self._progress(sum(unfinished.block(number).records for number in missing), "records looked at")
        for records in ordered(looker, missing, workers=min(self.workers, len(missing))):
            progress.add(records)
        progress.close()
        if self.rank == 0:
            for look in looks:
                unfinished.wait(look)

    def _plan(self, unfinished: Unfinished, blocks: int) -> Plan:
        file = unfinished.path / "plan.json"
        if self.rank:
            unfinished.wait(file)
        elif not file.exists():
            plan = make_plan(unfinished, blocks=blocks, recipe=self.recipe, source=self.source)
            if self.tokenizer is None:
                self._train_tokenizer(unfinished, plan)
            plan.save(file)
        return Plan.load(file)

    def _train_tokenizer(self, unfinished: Unfinished, plan: Plan) -> None:
        texts, used, total = training_texts(unfinished, plan)
        some = "" if used == total else f", of {used:,} of the {total:,} training records, evenly spread"
        self._say(f"training a tokenizer on {len(texts):,} texts{some}")
        (unfinished.data / TOKENIZER_NAME).write_bytes(
            train_sentencepiece(texts, vocab_size=self.recipe.vocab_size, or_fewer=True)
        )

    def _write(self, unfinished: Unfinished, plan: Plan) -> None:
        """Makes this rank's shards; when it returns on rank 0, all ranks have made theirs."""
        preparer = Preparer(
            self.source,
            recipe=self.recipe,
            blocks=unfinished.blocks,
            tokenizer=self.tokenizer or unfinished.data,
            languages=plan.languages,
            encodes=bool(self.encoders),
            stores=self.recipe.keep_pictures,
        )
        mine = my_shards(unfinished, plan)
        done = [shard for shard in mine if part_file(unfinished, shard).exists()]
        if done:
            self._resumed = True
            self._say(f"{len(done):,} of {len(mine):,} shards were written before")
        total, before = (sum(shard.end - shard.begin for shard in shards) for shards in (mine, done))
        progress = self._progress(total, "records written", done=before)
        write_shards(
            unfinished,
            plan=plan,
            preparer=preparer,
            chunk_records=self.source.chunk_records,
            encoders=self.encoders,
            batch=self.recipe.encoder_batch,
            workers=self.workers if before < total else 0,
            done=progress.add,
        )
        progress.close()
        if self.rank == 0:
            for shard in plan.shards:
                unfinished.wait(part_file(unfinished, shard))

    def _finish(self, unfinished: Unfinished, plan: Plan) -> tuple[Index, dict[str, int]]:
        """Writes the index, and returns it and what was lost in the second pass, by reason."""
        parts = [read_part(unfinished, shard) for shard in plan.shards]
        for shard, _, _ in parts:
            if not shard.samples:
                (unfinished.data / shard.name).unlink(missing_ok=True)
        arrays = {name: array for _, _, rest in parts for name, array in rest["arrays"].items()}
        features = arrays.get("teacher")
        teacher = features and {"fingerprint": features["encoder"], "features": features["shape"][-1]}
        index = write_index(
            unfinished.data,
            shards=[shard for shard, _, _ in parts if shard.samples],
            columns=[columns for shard, columns, _ in parts if shard.samples],
            made_by=self.source.settings | self.recipe.settings,
            image_size=self.codec.image_size,
            codec=self.codec.fingerprint,
            tokenizer=load_tokenizer(self.tokenizer or unfinished.data).fingerprint,
            num_tokens=self.codec.num_tokens,
            channels=self.codec.channels,
            pictures=self.recipe.keep_pictures and any(columns["images"].any() for _, columns, _ in parts),
            moments="moments" in arrays,
            flipped="flipped" in arrays,
            teacher=teacher,
            languages=plan.languages,
        )
        lost = sum(rest["dropped"] for _, _, rest in parts)
        return index, {UNDECODABLE: lost} if lost else {}

    def _progress(self, total: int, what: str, *, done: int = 0) -> Progress:
        mine = " by rank 0" if self.ranks > 1 else ""
        live = self.log is print and self.rank == 0 and sys.stdout.isatty()
        return Progress(total, done=done, what=what + mine, log=self._say, terminal=sys.stdout if live else None)

    def _say(self, line: str) -> None:
        if self.rank == 0:
            self.log(line)


@dataclass(kw_only=True)
class Record:
    """One sample to be written."""

    key: str
    """Unique in the data set."""
    split: Split
    captions: dict[str, list[str]]
    """By language."""
    image: Callable[[], NDArray[np.uint8]]
    """Makes the picture: uint8 [H, W, 3]."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else to store."""


class RecordSource:
    """A source whose records are in memory and whose pictures have the right size.

    Args:
        records: all of them.
        settings: what they are.
    """

    chunk_records = 64

    def __init__(self, records: Sequence[Record], *, settings: dict[str, Any]) -> None:
        self._records = records
        self.settings = settings

    def blocks(self) -> Iterator[Block]:
        """A thousand records each."""
        for begin in range(0, len(self._records), 1024):
            yield Block(len(self._records[begin : begin + 1024]), begin)

    def inputs(self) -> Iterator[Path]:
        """None."""
        return iter(())

    def read(self, block: Block, rows: Sequence[int] | None = None) -> Iterator[Raw]:
        """See `Source`."""
        for row in range(block.records) if rows is None else rows:
            record = self._records[block.locator + row]
            yield Raw(
                name=record.key,
                captions=record.captions,
                pictures=[Made(record.image)],
                split=record.split,
                extra=record.extra,
            )


def write_dataset(
    out: str | Path,
    *,
    records: Sequence[Record],
    codec: ImageCodec,
    made_by: dict[str, Any],
    tokenizer: str | None = None,
    vocab_size: int,
    samples_per_shard: int = 4096,
    dropped: dict[str, int] | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Writes records that are in memory to the directory `out`, which appears when it is complete.

    Args:
        records: in any order.
        codec: the images are sized for it.
        made_by: source and settings, for the index.
        tokenizer: path of the one that counts the caption's tokens; none: one is trained on the training captions.
        vocab_size: of a tokenizer trained here, at most.
        dropped: counts by reason, for the report.
        log: takes lines about progress.

    Raises:
        ValueError: `out` exists.
    """
    recipe = Recipe(
        image_size=codec.image_size, vocab_size=vocab_size, samples_per_shard=samples_per_shard, validation=0, deduplicate=False
    )
    preparation = Preparation(
        out=Path(out),
        source=RecordSource(records, settings=made_by),
        codec=codec,
        recipe=recipe,
        tokenizer=tokenizer,
        resume=False,
        log=log,
    )
    report = preparation.run(dropped=dropped)
    assert report is not None
    return report


def make_shapes(
    out: str | Path,
    *,
    codec: ImageCodec,
    train: int = 8000,
    validation: int = 512,
    seed: int = 0,
    tokenizer: str | None = None,
    vocab_size: int = 400,
    log: Callable[[str], None] = print,
) -> Report:
    """Makes the `shapes` data set.

    Args:
        out: directory to make.
        codec: its image size is drawn.
        train, validation: number of pictures of each split.
        seed: other seeds give other scenes, with the same combinations held out.
        tokenizer, vocab_size, log: see `write_dataset`.

    Raises:
        ValueError: `out` exists.
    """
    records = [
        Record(
            key=f"shapes_{split}_{number:06d}",
            split=split,
            captions={"en": [scene.caption]},
            image=partial(shapes.render, scene, image_size=codec.image_size),
            extra={"spec": scene.spec},
        )
        for split, count in zip(SPLITS, (train, validation), strict=True)
        for number, scene in enumerate(shapes.draw_scenes(count, split=split, seed=seed))
    ]
    made_by = {"source": "shapes", "train": train, "validation": validation, "seed": seed}
    return write_dataset(out, records=records, codec=codec, made_by=made_by, tokenizer=tokenizer, vocab_size=vocab_size, log=log)


def ensure_data(config: DataConfig) -> None:
    """Makes the data set at `config.path` if it is one that can be generated and is not there yet, and says so in one line.

    One process calls this; the others wait for it.
    """
    if config.generate is None or (Path(config.path) / INDEX_NAME).is_file():
        return
    report = make_shapes(config.path, codec=build_codec(config.codec), tokenizer=config.tokenizer, log=lambda _: None)
    total = sum(report.samples.values())
    print(
        f"made the data set {config.path} (shapes): {total:,} pictures in {report.seconds:.1f} s; on first use only", flush=True
    )
