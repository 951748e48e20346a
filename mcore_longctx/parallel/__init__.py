"""What ranks compute together over any process group, knowing tensors and ranks, not Megatron: attention, loss of the head, MLP."""
