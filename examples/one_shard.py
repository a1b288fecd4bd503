"""Protect one shard of a corpus inside a program of your own: a queue's worker, say. No Ray.

    python examples/one_shard.py in out photos-000000.tar [--protector NAME_OR_FOLDER]

Source and destination are folders or s3:// prefixes. The manifest of the shard is printed: what was
read, what was written, which images are bad, and how far protected images are from clean ones.
"""

import argparse
import sys

import one4all


def main() -> int:
    parser = argparse.ArgumentParser(description="Protect one shard of a corpus.")
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("shard", help="Name below the source, such as photos-000000.tar.")
    parser.add_argument("--protector", default="default")
    options = parser.parse_args()

    source = one4all.open_storage(options.source)
    destination = one4all.open_storage(options.destination)
    units = {unit.name: unit for unit in one4all.list_units(source)}
    if options.shard not in units:
        parser.error(f"{options.source} has no shard {options.shard}, only {', '.join(units)}")

    try:
        protector = one4all.load(options.protector)
        # Nothing is visible at the destination until the whole shard is written.
        manifest = one4all.rewrite_unit(units[options.shard], source, destination, protector)
    except one4all.One4AllError as error:  # a damaged shard, a store that fails, no such protector
        print(f"not protected: {options.shard}: {error}", file=sys.stderr)
        return error.exit_code
    print(manifest.model_dump_json(indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
