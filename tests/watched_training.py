"""`unclip_jax.train` itself, whose batches are written down on their way, or on one process held back.

Of the environment:
  WATCH_IDS=PREFIX         step and ids of each batch go to PREFIX-<process>.jsonl
  WATCH_HANG=PROCESS:STEP  this process never gets the batch of that step
  WATCH_RAISE=PROCESS:STEP there it gets an error
"""

import json
import os
import pathlib
import sys
import time
import unittest.mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from unclip_jax import hosts, programs, train
from unclip_jax.inputs import Input


def _is_here(name: str, step: int) -> bool:
    return os.environ.get(name) == f"{hosts.index()}:{step}"


class _Watched:
    """An iterator over batches."""

    def __init__(self, batches, step):
        self._batches, self._step = batches, step

    def __next__(self):
        batch = next(self._batches)
        self._step += 1
        if _is_here("WATCH_HANG", self._step):
            time.sleep(10_000)
        if _is_here("WATCH_RAISE", self._step):
            raise ValueError(f"the loader broke at step {self._step}")
        if prefix := os.environ.get("WATCH_IDS"):
            with open(f"{prefix}-{hosts.index()}.jsonl", "a") as file:
                file.write(json.dumps([self._step, batch["id"].tolist()]) + "\n")
        return batch

    def close(self):
        self._batches.close()


if __name__ == "__main__":
    training = Input.training
    with unittest.mock.patch.object(Input, "training", lambda self, step: _Watched(training(self, step), step)):
        programs.run(train.main)

