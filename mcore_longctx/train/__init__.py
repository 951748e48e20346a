"""Training one stage of a recipe on megatron-core: the loop, its data, its checkpoints, and how it ends.

Importing this package imports no torch. `mcore_longctx.train.loop.train_stage(job)` trains.
"""

from mcore_longctx.checkpoint_folder import iteration_folder, latest_checkpoint
from mcore_longctx.train.job import TrainJob

__all__ = ["TrainJob", "iteration_folder", "latest_checkpoint"]
