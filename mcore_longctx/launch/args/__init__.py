"""The same run for other programs: flags of Megatron-LM, overrides of Megatron-Bridge. Prints, starts nothing.

source.py        what a command line needs to know of one stage of a recipe
flags.py         a flag, what cannot be said, a whole command line
rope.py          the recipe's rope in Megatron's rope flags
megatron_lm.py   the arrays of Megatron's example scripts, for our program around Megatron-LM (`ours`)
stock.py         the same for pretrain_gpt.py, and what that would change without a word
bridge.py        Megatron-Bridge's key=value
render.py        bash arrays, or one line
"""

from mcore_longctx.launch.args.bridge import bridge_command
from mcore_longctx.launch.args.megatron_lm import our_command
from mcore_longctx.launch.args.render import as_arrays, as_line
from mcore_longctx.launch.args.source import StageRun, stage_run
from mcore_longctx.launch.args.stock import stock_command

__all__ = ["StageRun", "as_arrays", "as_line", "bridge_command", "our_command", "stage_run", "stock_command"]
