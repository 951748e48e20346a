"""RoPE scaling as pure float64 mathematics: what can be asked for, its frequencies, its fingerprint, its Hugging Face spelling."""

from mcore_longctx.rope.bands import RopeBand
from mcore_longctx.rope.hf_config import merge_hf_rope, read_hf_rope, write_hf_rope
from mcore_longctx.rope.readers import Misreading, misreadings
from mcore_longctx.rope.scaling import RopeScaling, RopeType
from mcore_longctx.rope.spec import parse_rope_spec
from mcore_longctx.rope.words import dropped_scaling, explain

__all__ = [
    "Misreading",
    "RopeBand",
    "RopeScaling",
    "RopeType",
    "dropped_scaling",
    "explain",
    "merge_hf_rope",
    "misreadings",
    "parse_rope_spec",
    "read_hf_rope",
    "write_hf_rope",
]
