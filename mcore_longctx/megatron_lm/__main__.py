"""`python -m mcore_longctx.megatron_lm FLAGS`."""

import os
import sys

import torch

if not torch.cuda.is_available():
    # megatron-core decorates its fused functions with torch.compile; compiling for the CPU takes minutes and a C++ compiler
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from mcore_longctx.megatron_lm.launcher import main

if __name__ == "__main__":
    sys.exit(main())
