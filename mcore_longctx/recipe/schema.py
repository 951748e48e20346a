"""The recipe: one YAML file that describes a whole run, as frozen dataclasses.

Every field here is a key of the file. `load.py` reads it, `docs/recipe.md` explains it. Lower rooms are handed the section that
they need, never the whole recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mcore_longctx.recipe.cluster import ClusterSection
from mcore_longctx.recipe.data import AugmentSection, ChunkSet, DataSection, DocumentSource, LengthSampling, SentenceSection
from mcore_longctx.recipe.evaluation import EvaluateSection, LossByPositionSection, NeedleSection, RulerSection, ShortSuiteSection
from mcore_longctx.recipe.model import ModelSection, RopeSection
from mcore_longctx.recipe.parallel import CpCommType, Parallel
from mcore_longctx.recipe.stage import Activations, MergeSection, OptimizerSection, PositionsSection, SparsitySection, Stage
from mcore_longctx.recipe.values import TokenCount, check_name

__all__ = [
    "Activations",
    "AugmentSection",
    "ChunkSet",
    "ClusterSection",
    "CpCommType",
    "DataSection",
    "DocumentSource",
    "EvaluateSection",
    "LengthSampling",
    "LossByPositionSection",
    "MergeSection",
    "ModelSection",
    "NeedleSection",
    "OptimizerSection",
    "Parallel",
    "PositionsSection",
    "Recipe",
    "RopeSection",
    "RulerSection",
    "SentenceSection",
    "ShortSuiteSection",
    "SparsitySection",
    "Stage",
    "TokenCount",
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: which model, which rope, which data, which stages, what is measured, where it goes."""

    name: str
    about: str = ""  # what is special about it, in a few words: `compare` shows it
    model: ModelSection
    rope: RopeSection
    data: dict[str, DataSection]
    stages: tuple[Stage, ...]
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    tokenizer: Path | None = None  # None: the model's folder
    output: Path | None = None  # None: runs/<name>
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in (self.name, *self.data):
            check_name(name)
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages is empty")
        if len(set(names)) < len(names):
            raise ValueError("two stages share a name")
        masked = [stage.name for stage in self.stages if stage.cross_document_mask]
        if masked and self.model.backend == "te":
            raise ValueError(f"stage {masked[0]}: cross_document_mask is computed by backend local only, model.backend is te")
        _refuse_combinations(self)
        reserved = {"base", "before", "scaled", "cache", *(f"{stage.name}-merged" for stage in self.stages)} & set(names)
        if reserved:
            raise ValueError(f"no stage may be called {reserved.pop()!r}: the run folder uses this name")

    @property
    def evaluation_seed(self) -> int:
        """Seed of the samples that are measured."""
        return self.evaluate.seed if self.evaluate.seed is not None else self.seed

    @property
    def run_folder(self) -> Path:
        """Where everything that comes of this recipe goes."""
        return self.output if self.output is not None else Path("runs") / self.name

    def rope_section(self, stage_name: str | None = None) -> RopeSection:
        """What a stage is trained with: its own `rope`, else the recipe's; without a name, of the last stage."""
        stage = next(stage for stage in reversed(self.stages) if stage_name in (None, stage.name))
        return stage.rope if stage.rope is not None else self.rope

    @property
    def tokenizer_folder(self) -> Path:
        """Folder that holds tokenizer.json."""
        return self.tokenizer if self.tokenizer is not None else self.model.path


def _refuse_combinations(recipe: Recipe) -> None:
    """What two published methods ask for and one training cannot give. A stage whose data set is missing is somebody else's error."""
    for number, stage in enumerate(recipe.stages):
        data = recipe.data.get(stage.data)
        augment = data.augment if data is not None else None
        if augment is not None and stage.kind == "sft":
            raise ValueError(f"stage {stage.name}: augment {augment.type} is for documents, data set {stage.data!r} holds chats")
        if data is not None and data.sentences is not None and stage.kind == "sft":
            raise ValueError(f"stage {stage.name}: sentences are chosen from documents, data set {stage.data!r} holds chats")
        if data is not None and data.prompt_loss != "none" and stage.kind == "pretrain":
            raise ValueError(f"stage {stage.name}: prompt_loss is for chats, data set {stage.data!r} holds documents")
        if augment is not None and stage.cross_document_mask:
            raise ValueError(
                f"stage {stage.name}: augment {augment.type} spreads a document over the sample, and cross_document_mask hides its "
                "pieces from each other; use one of them"
            )
        if stage.loss_reduction == "sequence_mean" and stage.kind != "sft":
            raise ValueError(f"stage {stage.name}: loss_reduction sequence_mean weighs conversations; kind is {stage.kind}")
        if stage.optimizer_from == "previous" and (number == 0 or recipe.stages[number - 1].merge is not None):
            what = (
                "there is no stage before it" if number == 0 else "the stage before it is merged, which leaves no optimizer state"
            )
            raise ValueError(f"stage {stage.name}: optimizer_from is previous, and {what}")
        if stage.merge is not None and stage.merge.other not in ("base", *(other.name for other in recipe.stages[:number])):
            raise ValueError(f"stage {stage.name}: merge.other is {stage.merge.other!r}, expected base or an earlier stage")
