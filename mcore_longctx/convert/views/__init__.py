"""A checkpoint of either format as Hugging Face names and rows: what import, export, verify and merge read."""

from mcore_longctx.convert.views.hf import open_hf
from mcore_longctx.convert.views.locate import locate_checkpoint
from mcore_longctx.convert.views.open import open_checkpoint
from mcore_longctx.convert.views.rows import BAND_BYTES, Piece, TensorRows
from mcore_longctx.convert.views.torch_dist import open_torch_dist
from mcore_longctx.convert.views.training_state import is_training_state
from mcore_longctx.convert.views.view import CONFIG, HF_FOLDER, CheckpointView, nonzero_padding

__all__ = [
    "BAND_BYTES",
    "CONFIG",
    "HF_FOLDER",
    "CheckpointView",
    "Piece",
    "TensorRows",
    "is_training_state",
    "locate_checkpoint",
    "nonzero_padding",
    "open_checkpoint",
    "open_hf",
    "open_torch_dist",
]
