"""Pack rows of given lengths with TRL's packers.

Usage: pack.py LENGTHS.npy CAPACITY...
"""

import json
import sys
import time
from importlib.metadata import version

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import pack_dataset

datasets.disable_caching()
datasets.disable_progress_bars()


def main():
    lengths = np.load(sys.argv[1])
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int64))
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(int(lengths.sum()), np.int32)))
    dataset = Dataset(pa.table({"input_ids": tokens.cast(pa.list_(pa.int32()))}))
    results = {}
    for capacity in map(int, sys.argv[2:]):
        for strategy in ("bfd", "wrapped"):
            started = time.perf_counter()
            packed = pack_dataset(dataset, capacity, strategy)
            seconds = time.perf_counter() - started
            sizes = np.fromiter((len(ids) for ids in packed.data.column("input_ids")), np.int64)
            results[f"{strategy} {capacity}"] = {
                "seconds": seconds, "packs": len(sizes), "fill": float(sizes.sum() / capacity / len(sizes)),
                "tokens_kept": int(sizes.sum()),
            }  # fmt: skip
    sys.stdout.write(
        json.dumps({"results": results, "versions": {"trl": version("trl"), "datasets": version("datasets")}})
    )


if __name__ == "__main__":
    main()
