"""RoPE scaling as pure float64 mathematics: what can be asked for, its frequencies, its fingerprint, its Hugging Face spelling."""

from mcore_longctx.rope.hf_config import read_hf_rope, write_hf_rope
from mcore_longctx.rope.scaling import RopeScaling, RopeType

__all__ = ["RopeScaling", "RopeType", "read_hf_rope", "write_hf_rope"]
