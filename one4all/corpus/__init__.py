"""What a corpus is made of: units of work, each a stream of samples.

* `container`, `containers`: the seam, and what stands behind it.
* `sources`: what a corpus may be given as: a folder, a shard, a pattern.
* `tar`: WebDataset shards, read strictly and copied byte for byte.
* `loose`: images that lie in a folder or bucket one by one.
* `parquet`: Parquet files, of which some columns hold images.
* `packing`: labelled images from many places, made into shards.
"""

from one4all.corpus.container import (
    DEFAULT_READ,
    Container,
    OutputObject,
    ReadOptions,
    UnitWriter,
)
from one4all.corpus.containers import (
    CONTAINERS,
    Corpora,
    find_container,
    is_empty,
    is_group,
    list_units,
    open_corpora,
    read_samples,
    what_is_read,
    write_unit,
)
from one4all.corpus.samples import (
    DEFAULT_MAX_SAMPLE_BYTES,
    Member,
    Sample,
    images_of,
    is_exempt,
    is_protectable,
    printable,
)
from one4all.corpus.sources import Selection, open_source
from one4all.corpus.units import ObjectVersion, Unit, UnitList, filed_name

__all__ = [
    "CONTAINERS",
    "DEFAULT_MAX_SAMPLE_BYTES",
    "DEFAULT_READ",
    "Container",
    "Corpora",
    "Member",
    "ObjectVersion",
    "OutputObject",
    "ReadOptions",
    "Sample",
    "Selection",
    "Unit",
    "UnitList",
    "UnitWriter",
    "filed_name",
    "find_container",
    "images_of",
    "is_empty",
    "is_exempt",
    "is_group",
    "is_protectable",
    "list_units",
    "open_corpora",
    "open_source",
    "printable",
    "read_samples",
    "what_is_read",
    "write_unit",
]
