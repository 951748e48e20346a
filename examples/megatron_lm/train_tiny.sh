#!/usr/bin/env bash
# Megatron-LM's own training program with the long-context parts: the tiny Llama from 512 to 2,048 tokens, context parallel on two
# processes. Two CPU cores are enough. Needs megatron-core 0.19 (Python 3.12) and a clone of this repository.
#   bash examples/megatron_lm/train_tiny.sh FOLDER [more flags of pretrain_gpt.py]
set -euo pipefail
work=$1; shift

if [ ! -e "$work/start" ]; then
    python -m mcore_longctx convert import examples/tiny-llama "$work/base"
    python -m mcore_longctx data build tiny-cpu --stage extend --out "$work/data" stages.extend.seq_length=2048
    # llama3 scaling, 8 times the 512 tokens of the original training; the rope flags of pretrain_gpt.py know 8,192 only
    echo '{"head_dim": 32, "rope_theta": 10000, "max_position_embeddings": 4096, "rope_scaling": {"rope_type": "llama3", "factor": 8,
        "original_max_position_embeddings": 512, "low_freq_factor": 1, "high_freq_factor": 4}}' > "$work/config.json"
    # what Megatron-LM loads is named by this file
    mkdir "$work/start" && ln -s ../base "$work/start/release" && echo release > "$work/start/latest_checkpointed_iteration.txt"
fi

python -m torch.distributed.run --standalone --nproc-per-node 2 -m mcore_longctx.megatron_lm \
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4 --group-query-attention --num-query-groups 2 \
    --kv-channels 32 --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --hidden-dropout 0 \
    --attention-dropout 0 --untie-embeddings-and-output-weights --seq-length 2048 --max-position-embeddings 2048 \
    --longctx-rope "$work/config.json" --longctx-recompute attention_kept --longctx-mlp-tile 512 --longctx-loss-chunk 512 \
    --context-parallel-size 2 --cp-comm-type p2p --calculate-per-token-loss --use-distributed-optimizer \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model examples/tiny-llama --split 100,0,0 \
    --data-path "$work/data/long-documents" --data-cache-path "$work/cache" \
    --micro-batch-size 1 --global-batch-size 2 --train-iters 12 --lr 4e-4 --min-lr 4e-5 --lr-warmup-iters 2 --clip-grad 1.0 \
    --eval-iters 0 --eval-interval 1000 --log-interval 1 --save "$work/checkpoints" --save-interval 6 \
    --load "$work/checkpoints" --pretrained-checkpoint "$work/start" "$@"
