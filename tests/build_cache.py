"""A process that builds a cache slowly, for tests that kill it: python build_cache.py IMAGES MASKS CACHE DELAY"""

import sys
import time
from pathlib import Path

import dataset
from machinery import samples

if __name__ == "__main__":
    images, masks, cache, delay = sys.argv[1:]
    read_sample, count = samples.read_sample, []

    def slowly(*args):
        time.sleep(float(delay))
        count.append(1)
        return read_sample(*args)

    samples.read_sample = slowly
    samples.NUM_THREADS = 2
    data = dataset.CarvanaDataset(Path(images), Path(masks), (32, 48))
    print("building", flush=True)
    data.prepare(Path(cache))
    print(f"decoded {len(count)}")
