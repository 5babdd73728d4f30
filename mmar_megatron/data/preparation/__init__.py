"""The steps of preparing a data set; `mmar_megatron.data.prepare` puts them together.

1. A source (`folders`, `tables`, `documents`, `tars`) lists its records in blocks, each of which can be read by itself.
2. `look`     every picture of a block is decoded and judged; the result is one small file for each block.
3. `plan`     duplicates are found, records are split, and what is kept is dealt out to shards: a function of the looks alone.
4. `write`    each shard is made by itself, and has its name when it is whole.
5. `prepare`  the index is written and the data set gets its name.

`unfinished` keeps what is done until then, so that a killed run goes on; `pool` has the worker processes.
"""
