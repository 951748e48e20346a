"""Megatron-LM's own training program with the long-context parts: `python -m mcore_longctx.megatron_lm`.

All flags of `pretrain_gpt.py` (megatron-core 0.19), a few of our own, and refusals of what that program would lose without a word.
Nothing of Megatron-LM is edited, and its `pretrain_gpt.py` is not needed: the wheel of megatron-core brings the program itself.
"""
