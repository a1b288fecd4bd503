"""The job that protects a corpus: what it says of a source, and of its end."""

import pytest

from one4all.errors import UsageError
from one4all.storage import open_storage
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json", "b.tar.gz"], r"\.tar shard, but b.tar.gz; .* unpack such files"),
        (["a.TGZ"], r"\.tar shard, but a.TGZ; .* unpack such files"),
        (["cat/1.jpg"], "but images, such as cat/1.jpg; one4all pack"),
        (["a.json"], "but files such as a.json"),
        ([], r"holds no \.tar shard$"),
    ],
    ids=["compressed", "tgz", "images", "others", "nothing"],
)
def test_source_without_shards_is_told_what_is_there(tmp_path, protector_folder, names, message):
    source = open_storage(str(tmp_path / "in"))
    source.root.mkdir()
    for name in names:
        source.write_bytes(name, b"x")
    with pytest.raises(UsageError, match=message):
        protect(source.uri, str(tmp_path / "out"), ProtectConfig(protector=str(protector_folder)))
