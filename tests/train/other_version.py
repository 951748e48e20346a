"""Run by `test_resume` with another interpreter: goes on from a checkpoint of the first, and makes one of its own."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from mcore_longctx.train import iteration_folder
from tests.train.jobs import make_job, start_at, train

if __name__ == "__main__":
    world = Path(sys.argv[1])
    train(start_at(make_job(world, "ours-there"), iteration_folder(make_job(world, "alone").checkpoints, 4)))
    beside = iteration_folder(make_job(world, "alone-beside").checkpoints, 4)
    train(start_at(make_job(world, "ours-beside-there"), beside))
    train(make_job(world, "theirs", keep_checkpoints=9, async_save=True))
    (world / "other").mkdir()
    text = {"python": list(sys.version_info[:2]), "megatron-core": version("megatron-core")}
    (world / "other" / "versions.json").write_text(json.dumps(text))
