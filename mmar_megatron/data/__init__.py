"""Data: pictures and captions on disk -> microbatches of fixed shape (`batch.Batch`).

1. `prepare`    writes a data set: WebDataset tars, `index.json`, `tokenizer.model` (its sources: `shapes`, `emoji`).
2. `shards`     reads single samples of it by their offsets.
3. `draw`       decides, by (seed, sample id, epoch), everything that is random.
4. `sequence`   lays text and image tokens out, one document after another.
5. `loader`     puts 2 to 4 together, in worker processes, for one data-parallel rank.
"""
