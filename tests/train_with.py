"""train.py with a start method of its workers: python train_with.py spawn --num-epochs 1 ..."""

import multiprocessing
import sys

import train
from machinery import errors

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1], force=True)
    errors.run(lambda: train.main(sys.argv[2:]))
