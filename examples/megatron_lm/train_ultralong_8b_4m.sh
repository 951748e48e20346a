#!/bin/bash
# UltraLong-8B, 128K to 4M tokens, in Megatron-LM's training program with the long-context parts: 32 nodes of 8 GPUs of 80 GB.
# The arrays are those that `mcore-longctx args ultralong-8b-4m --stage extend --for megatron-lm` prints. Run it on every node, for
# example with srun (one task a node), with MASTER_ADDR set to the first one. README.md says what stands in the three folders.
set -euo pipefail

# Megatron-LM stops without it on Hopper and before: communication is queued ahead of the product that it overlaps with
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

CHECKPOINT_PATH=${1:-"runs/ultralong-8b-4m/megatron-lm/extend"}
TENSORBOARD_LOGS_PATH=${2:-"$CHECKPOINT_PATH/tensorboard"}
TOKENIZER_ARG=${3:-"Llama-3.1-8B-Instruct"}
DATA_ARG=${4:-"runs/ultralong-8b-4m/data/extend/long-documents"}

# Distributed training setup
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-32}
MASTER_PORT=${MASTER_PORT:-29500}

# Fixed model parameters
TP_SIZE=8
CP_SIZE=16
PP_SIZE=1
MICRO_BATCH_SIZE=1
GLOBAL_BATCH_SIZE=2
NUM_LAYERS=32
SEQ_LENGTH=4194304
TRAIN_ITERS=150

DISTRIBUTED_ARGS=(
    --nnodes "$NUM_NODES"
    --nproc-per-node "$GPUS_PER_NODE"
    --rdzv-backend c10d
    --rdzv-endpoint "${MASTER_ADDR:?the first node, the same on all of them}:$MASTER_PORT"
    --rdzv-id "${SLURM_JOB_ID:-mcore-longctx}"
)

MODEL_ARGS=(
    --num-layers "$NUM_LAYERS"
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --swiglu
    --attention-dropout 0
    --hidden-dropout 0
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    # Llama 3's scaling: pretrain_gpt.py itself would train with factor 8, whatever stands here
    --position-embedding-type rope
    --rotary-base 500000
    --use-rope-scaling
    --rope-scaling-factor 512
    --longctx-phase-dtype float32
)

TRAINING_ARGS=(
    --micro-batch-size "$MICRO_BATCH_SIZE"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS"
    --optimizer adam
    --lr 3e-05
    --min-lr 0
    --lr-decay-style constant
    --lr-decay-iters "$TRAIN_ITERS"
    --lr-warmup-iters 0
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --adam-eps 1e-08
    --clip-grad 1
    --seed 1234
    --bf16
    # one division by the number of tokens that carry loss, over all ranks
    --calculate-per-token-loss
    # attention is never computed twice; the MLP runs in tiles of tokens, the loss in chunks
    --longctx-recompute attention_kept
    --longctx-mlp-tile 8192
)

# Model parallelism arguments
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP_SIZE"
    --sequence-parallel
    --pipeline-model-parallel-size "$PP_SIZE"
    --context-parallel-size "$CP_SIZE"
    --cp-comm-type p2p
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    # time that a rank waits for the others, several steps' worth; Megatron's default is 10 minutes
    --distributed-timeout-minutes 30
)

# Data arguments
DATA_ARGS=(
    --longctx-data "$DATA_ARG"
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER_ARG"
    # not a multiple of 128: padding would take part in the softmax
    --padded-vocab-size 128256
)

EVAL_AND_LOGGING_ARGS=(
    --log-interval 1
    --log-throughput
    --eval-iters 0
    --eval-interval "$TRAIN_ITERS"
    --tensorboard-dir "$TENSORBOARD_LOGS_PATH"
    --save "$CHECKPOINT_PATH/checkpoints"
    --load "$CHECKPOINT_PATH/checkpoints"
    # read as long as --load has nothing: never random weights
    --pretrained-checkpoint "$CHECKPOINT_PATH/start"
    --save-interval 5
    --ckpt-format torch_dist
    # so that a run can go on with another layout
    --dist-ckpt-optim-fully-reshardable
    # SIGUSR1 saves and ends at the end of a step
    --exit-signal-handler
    --exit-signal SIGUSR1
)

trap '' USR1 # for the ranks, which have a handler; torchrun would die of it
exec torchrun "${DISTRIBUTED_ARGS[@]}" -m mcore_longctx.megatron_lm \
    "${MODEL_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${MODEL_PARALLEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${EVAL_AND_LOGGING_ARGS[@]}"
