"""Protect a corpus with PySpark: one task for each shard. A sketch to start from.

    pip install pyspark                     # and Java 17 or newer
    python examples/spark.py in out         # or: spark-submit examples/spark.py in out

Source and destination are folders that all executors see, or s3:// prefixes. Only the list of
shards and one row for each shard travel through Spark; pixels stay in the task.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import one4all


def protect_units(
    units: Iterable[one4all.Unit], source: str, destination: str, protector: str
) -> Iterator[dict[str, Any]]:
    """Protect some shards in this process; the protector is loaded once for all of them.

    Yields:
        For each shard: name, number of protected and of bad images, and why it failed, or "".
    """
    model = one4all.load(protector)
    source_storage, destination_storage = map(one4all.open_storage, (source, destination))
    for unit in units:
        row = {"name": unit.name, "protected": 0, "bad": 0, "error": ""}
        try:
            manifest = one4all.rewrite_unit(unit, source_storage, destination_storage, model)
        except one4all.One4AllError as error:  # this shard only; the others go on
            yield row | {"error": str(error)}
        else:
            yield row | {"protected": manifest.num_protected, "bad": len(manifest.bad_images)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Protect a corpus with PySpark.")
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--protector", default="default")
    parser.add_argument("--partitions", type=int, default=0, help="Tasks; 0: one for each shard.")
    options = parser.parse_args()

    from pyspark.sql import SparkSession

    places = (options.source, options.destination, options.protector)
    units = list(one4all.list_units(one4all.open_storage(options.source)))
    if not units:
        parser.error(f"{options.source} holds no shard")
    # Tasks run the Python of this program, which has one4all, unless you name another one.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.appName("one4all").getOrCreate()
    try:
        tasks = spark.sparkContext.parallelize(units, options.partitions or len(units))
        rows = tasks.mapPartitions(lambda units: protect_units(units, *places)).collect()
    finally:
        spark.stop()
    for row in rows:
        outcome = row["error"] or f"{row['protected']} images protected, {row['bad']} bad"
        print(f"{row['name']}: {outcome}")
    return 1 if any(row["error"] or row["bad"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
