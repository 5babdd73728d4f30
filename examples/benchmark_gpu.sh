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
# Lengths of 320 to 8,192, heads of 64 channels and of 128, as many keys as queries and a quarter of them.
for width in 1024 2048; do
    measure attention --model.backbone.hidden_size $width
    measure attention --model.backbone.hidden_size $width --model.backbone.num_query_groups 4
done
# 0.4 billion parameters on pictures of 256 tokens, which are made at first.
backbone="--model.backbone.num_layers 24 --model.backbone.hidden_size 1024 --model.backbone.num_attention_heads 16
    --model.backbone.num_query_groups 4 --model.backbone.ffn_hidden_size 2816"
data="--data.path data/shapes64 --data.codec.image_size 64 --data.sequence_length 324"
for dtype in fp32 bf16; do
    # shellcheck disable=SC2086
    measure step --config examples/configs/tiny.yaml $backbone $data --model.head.width 1024 --precision.dtype $dtype \
        --train.micro_batch_size 16 --train.global_batch_size 16
done

# Texts alone, whose attention is in causal order, by torch's kernel and by Transformer Engine's.
for layers in local transformer_engine; do
    # shellcheck disable=SC2086
    measure causal $backbone --precision.dtype bf16 --model.backbone.transformer_impl $layers
done

# The backbone of 1.3 billion parameters on packed rows of 4,096: time by implementation, and the share of the peak.
backbone="--model.backbone.num_layers 24 --model.backbone.hidden_size 2048 --model.backbone.num_attention_heads 16
    --model.backbone.num_query_groups 16 --model.backbone.ffn_hidden_size 5504"
options="--config examples/configs/tiny.yaml $backbone --data.path data/shapes64 --data.codec.image_size 64 --data.packing true
    --data.sequence_length 4096 --model.head.width 1024 --precision.dtype bf16 --train.micro_batch_size 4 --train.global_batch_size 4"
flex="--model.attention flex"
engine="$flex --model.backbone.transformer_impl transformer_engine"
# shellcheck disable=SC2086
measure step --rounds 10 --variant "$flex" $options
# shellcheck disable=SC2086
measure step --rounds 10 --variant "$engine" $options $flex
for head in "kernels" "graphs --model.head.row_multiple 2048"; do
    # shellcheck disable=SC2086
    measure step --rounds 10 --variant "--model.head.compile $head" $options $flex
done
for fp8 in tensorwise delayed blockwise; do
    # shellcheck disable=SC2086
    measure step --rounds 10 --variant "--precision.fp8 $fp8" $options $engine
done
for variant in "" "$flex" "$engine" "$engine --precision.fp8 tensorwise"; do
    rm -rf runs/benchmark
    # shellcheck disable=SC2086
    python pretrain_mmar.py $options $variant --train.steps 40 --train.profile 30:32 --run_dir runs/benchmark \
        --validation.every 0 --preview.every 0 --checkpoint.every 0
    echo "pretrain_mmar.py $variant" | tee -a "$log"
    tail -n 1 runs/benchmark/metrics.jsonl | tee -a "$log"
    cat runs/benchmark/profile/*.txt | tee -a "$log"
done
