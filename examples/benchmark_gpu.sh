#!/usr/bin/env bash
# Where the time of a training step goes on a GPU, for docs/performance.md: each command and what it printed, in FILE.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=${1:-runs/benchmark.log}
mkdir -p "$(dirname "$log")"

measure() {
    echo "python tools/benchmark.py $*" | tee -a "$log"
    python tools/benchmark.py "$@" | tee -a "$log"
}

measure head
measure head --model.head.depth 12 --model.head.width 1536 --images 16
measure logits
measure logits --vocabulary 128000 --model.backbone.hidden_size 4096 --sequences 8
measure attention
measure attention --model.backbone.num_query_groups 4
# 0.4 billion parameters on pictures of 256 tokens, which are made at first.
backbone="--model.backbone.num_layers 24 --model.backbone.hidden_size 1024 --model.backbone.num_attention_heads 16
    --model.backbone.num_query_groups 4 --model.backbone.ffn_hidden_size 2816"
data="--data.path data/shapes64 --data.codec.image_size 64 --data.sequence_length 324"
for dtype in fp32 bf16; do
    # shellcheck disable=SC2086
    measure step --config examples/configs/tiny.yaml $backbone $data --model.head.width 1024 --precision.dtype $dtype \
        --train.micro_batch_size 16 --train.global_batch_size 16
done
