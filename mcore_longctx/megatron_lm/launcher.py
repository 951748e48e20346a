"""From a command line to Megatron-LM's `pretrain`: parse, refuse, plug in, run."""

from __future__ import annotations

import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mcore_longctx.errors import LongctxError
from mcore_longctx.megatron_compat import (
    MEGATRON_VERSION,
    quiet_import,
    require_training_program,
    training_device,
    training_program_context,
)

__all__ = ["main", "read_arguments", "train"]

logger = logging.getLogger("mcore_longctx")

_PROGRAM_STARTED = time.time()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 2 with one line on stderr for what is refused."""
    try:
        train(sys.argv[1:] if argv is None else argv)
    except LongctxError as error:
        if int(os.environ.get("RANK", "0")) == 0:  # every rank meets the same
            sys.stderr.write(f"mcore-longctx: {error}\n")
        return error.exit_code
    return 0


def train(argv: Sequence[str]) -> None:
    """Train as the command line says.

    Raises:
        LongctxError: something of it is refused. No process group has been built then.
    """
    require_training_program()
    _set_torchrun_variables()
    from mcore_longctx.megatron_lm.programs import find_program

    program = find_program(argv)
    flags = read_arguments(argv, program)
    _log_on_rank_0()
    with training_program_context(), _command_line(flags.line):
        _pretrain(flags, program)


def read_arguments(argv: Sequence[str], program: Any = None) -> Any:
    """Parse a command line and refuse what must be refused. Builds nothing.

    Args:
        argv: flags of pretrain_gpt.py and ours.
        program: from `find_program`; None: the one of megatron-core's wheel.

    Returns:
        `mcore_longctx.megatron_lm.flags.CommandLine`.

    Raises:
        LongctxError: a flag is unknown, or refused.
    """
    require_training_program()
    from mcore_longctx.megatron_lm.flags import parse
    from mcore_longctx.megatron_lm.programs import OWN_PROGRAM
    from mcore_longctx.megatron_lm.refusals import check_arguments

    program = OWN_PROGRAM if program is None else program
    line = parse(argv, program)
    if not line.args.use_checkpoint_args:  # else most of them are still in the checkpoint
        check_arguments(line.args, line.given, program)
    return line


def _pretrain(flags: Any, program: Any) -> None:
    with quiet_import():
        from megatron.core.enums import ModelType
        from megatron.training import inprocess_restart, training
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args
    from mcore_longctx.megatron_lm.flags import extra_args_provider
    from mcore_longctx.megatron_lm.hosting import hosted, join_without_cuda
    from mcore_longctx.megatron_lm.model import model_config
    from mcore_longctx.megatron_lm.refusals import check_arguments
    from mcore_longctx.megatron_lm.rope import rope_of

    training.set_startup_timestamps(program_start=_PROGRAM_STARTED, main_entry=time.time())
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(training.pretrain)
    args: Namespace = parse_and_validate_args(
        extra_args_provider=extra_args_provider(program), args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    check_arguments(args, flags.given, program)
    rope = rope_of(args, flags.given)
    config = model_config(args, rope)
    logger.info("megatron-core %s on %s, batches and loss of %s", MEGATRON_VERSION, training_device(), program.name)
    if flags.added:
        logger.info("added flags: %s", " ".join(flags.added))
    logger.info("rope: %s", rope.describe())
    with hosted():
        join_without_cuda(args, program.embedding_ranks)
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            program.datasets_provider,
            ModelType.encoder_or_decoder,
            program.forward_step,
            store=store,
            get_embedding_ranks=program.embedding_ranks,
        )


def _set_torchrun_variables() -> None:
    """Under srun, tell Megatron-LM who this rank is; it reads the variables of torchrun and nothing else."""
    from mcore_longctx.model.process_groups import rank_info

    ranks = rank_info()
    if "RANK" not in os.environ and ranks.master_addr is not None:
        os.environ.update(
            RANK=str(ranks.rank),
            WORLD_SIZE=str(ranks.world_size),
            LOCAL_RANK=str(ranks.local_rank),
            MASTER_ADDR=ranks.master_addr,
            MASTER_PORT=str(ranks.master_port),
        )


@contextmanager
def _command_line(line: Sequence[str]) -> Iterator[None]:
    """Megatron-LM parses sys.argv, in two places."""
    before = sys.argv
    sys.argv = [before[0], *line]
    try:
        yield
    finally:
        sys.argv = before


def _log_on_rank_0() -> None:
    if int(os.environ.get("RANK", "0")) == 0 and not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("mcore-longctx: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
