"""Long context for NVIDIA Megatron-Core: take a Llama from 128K to 1M, 2M and 4M tokens."""

__version__ = "0.1.0"
