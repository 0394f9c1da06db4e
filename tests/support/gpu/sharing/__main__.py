"""pytest with ranks that share a GPU, so that tests of several ranks run where there are fewer GPUs:

python -m tests.support.gpu.sharing tests/gpu/test_rank_faults.py
"""

import os
import sys
from pathlib import Path

path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
os.execve(sys.executable, pytest, os.environ | {"PYTHONPATH": path})
