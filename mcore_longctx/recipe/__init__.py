"""The recipe: one YAML file that describes a whole run, and the facts that travel with a checkpoint."""

from mcore_longctx.families import ModelShape
from mcore_longctx.recipe.card import CARD, CheckpointCard, read_card, write_card
from mcore_longctx.recipe.cluster import ClusterSection
from mcore_longctx.recipe.schema import (
    DataSection,
    DocumentSource,
    EvaluateSection,
    LengthSampling,
    LossByPositionSection,
    ModelSection,
    NeedleSection,
    OptimizerSection,
    Parallel,
    Recipe,
    RopeSection,
    Stage,
    TokenCount,
)

__all__ = [
    "CARD",
    "CheckpointCard",
    "ClusterSection",
    "DataSection",
    "DocumentSource",
    "EvaluateSection",
    "LengthSampling",
    "LossByPositionSection",
    "ModelSection",
    "ModelShape",
    "NeedleSection",
    "OptimizerSection",
    "Parallel",
    "Recipe",
    "RopeSection",
    "Stage",
    "TokenCount",
    "read_card",
    "write_card",
]
