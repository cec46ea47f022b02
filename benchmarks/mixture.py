"""One parquet file with three kinds of images, so that clusters are obvious: satellite photos, flowers, emoji.

    ATOLL_DATA=... python benchmarks/mixture.py mixture.parquet
    ATOLL_MIXTURE=mixture.parquet atoll study mixture

Columns `image`, `caption`, `kind`, `key`, `split`. It takes every second image of EuroSAT, and all emoji and flowers.
Flowers have no split of their own: one in ten, by a hash of its key, is held out.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SOURCES = {
    "satellite": ("eurosat64_*of2.parquet", "image_bytes", 2),
    "emoji": ("emoji64.parquet", "image_webp", 1),
    "flower": ("flowers128.parquet", "image_bytes", 1),
}


def rows(data: Path) -> Iterator[dict[str, object]]:
    for kind, (pattern, column, every) in SOURCES.items():
        for file in sorted(data.glob(pattern)):
            table = pq.read_table(file)
            splits = table["split"].to_pylist() if "split" in table.column_names else [None] * len(table)
            for number in range(0, len(table), every):
                key = f"{file.stem}:{number}"
                held_out = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10 == 0
                yield {
                    "image": table[column][number].as_py(),
                    "caption": table["caption"][number].as_py(),
                    "kind": kind,
                    "key": key,
                    "split": splits[number] or ("val" if held_out else "train"),
                }


if __name__ == "__main__":
    if len(sys.argv) != 2 or "ATOLL_DATA" not in os.environ:
        sys.exit(__doc__)
    table = pa.Table.from_pylist(list(rows(Path(os.environ["ATOLL_DATA"]))))
    pq.write_table(table, sys.argv[1], row_group_size=1024)
    print(f"{sys.argv[1]} written: {len(table):,} images")
