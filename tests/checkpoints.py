"""Copies of finished runs that lack their last checkpoints, to test a resume."""

import shutil


def cut_back(run, to, step=10):
    """Copies a run without its checkpoints after `step`."""
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").glob("step_*"):
        if int(checkpoint.name[-8:]) > step:
            shutil.rmtree(checkpoint)
    return to
