"""Commands around training: python -m tools.NAME."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py, before a command imports torch
