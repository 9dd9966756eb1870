"""train.py on a clock of each process's own: the first becomes four times slower after 20 steps, others are faster."""

import json
import time
from pathlib import Path

import train
from machinery import errors, processes, runs

now, steps = 1000.0, 0
step, batches = train.train_step, runs.Run.end_epoch


def train_step(*args):
    global now, steps
    steps += 1
    now += (16 if steps > 20 else 4) if processes.RANK == 0 else 1
    return step(*args)


def end_epoch(run, *args):
    batches(run, *args)
    Path(f"length{processes.RANK}.json").write_text(json.dumps([run.length.total, run.length.num_epochs]))


if __name__ == "__main__":
    train.train_step, runs.Run.end_epoch = train_step, end_epoch
    time.monotonic = time.perf_counter = lambda: now
    errors.run(train.main)
