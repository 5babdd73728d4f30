"""Data: pictures and texts on disk or below a URL -> microbatches (`batch.Batch`).

1. `preparation` writes a data set out of any collection: WebDataset tars, an index, a tokenizer, what encoders made of pictures.
2. `index`       is memory-mapped: the lengths and places of all samples. `shards` reads any sample, through `storage`.
3. `source`      opens the data sets of a run, with the tokenizer and the codec that all share.
4. `stream`      plans which documents come in which order and share a row (`packing`), from lengths alone; `draw` has the chance.
5. `documents`   makes a planned document out of its sample; `sequence` lays documents out in rows.
6. `loader`      does 4 and 5 in worker processes, for one data-parallel rank; `held_out` has what validates.

`inspection` draws all of it as a page. An index is checked and made anew by `verify`.
"""
