"""Exchange patterns of context parallelism over any process group: they know tensors and ranks, not Megatron."""
