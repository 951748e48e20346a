"""The benchmarks are scripts: their folder is where they find each other."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "tools" / "bench"
sys.path.insert(0, str(FOLDER))
