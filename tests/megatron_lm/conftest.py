"""One folder with packed data and a checkpoint to start from, for all runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_longctx.convert import import_hf
from mcore_longctx.data.build import build
from mcore_longctx.recipe.schema import DataSection, DocumentSource
from tests.megatron_lm.program import EXAMPLES, SEQ_LENGTH, TINY


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/data/books, packed samples of the tiny model's bytes, and FOLDER/start, its weights as Megatron-LM's `release`."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    section = DataSection(sources=(DocumentSource(name="books", path=EXAMPLES / "documents" / "books"),), separator="<s>")
    build(
        section,
        "books",
        chats=False,
        tokenizer=TINY,
        model_vocab_size=262,
        seq_length=SEQ_LENGTH,
        num_samples=64,
        seed=1,
        out=folder / "data",
    )
    import_hf(TINY, folder / "start" / "release")
    (folder / "start" / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


@pytest.fixture(scope="session")
def data(world: Path) -> list[str]:
    """Flags that read the samples and start from the weights."""
    return [
        *("--data-path", str(world / "data" / "books"), "--split", "100,0,0", "--data-cache-path", str(world / "cache")),
        *("--load", str(world / "start"), "--finetune"),
    ]
