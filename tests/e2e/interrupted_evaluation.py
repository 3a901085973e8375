"""`python interrupted_evaluation.py --flags`: train_gpt.py that gets SIGTERM at the start of its first evaluation.

With FAIL in the environment it runs failing_training.py.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from train.evaluate import Evaluator


def run(self, *args):
    if self.due(args[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    return original_run(self, *args)


original_run, Evaluator.run = Evaluator.run, run
script = "tests/e2e/failing_training.py" if "FAIL" in os.environ else "train_gpt.py"
runpy.run_path(str(ROOT / script), run_name="__main__")
