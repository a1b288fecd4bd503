"""The job that protects a corpus: what it says of a source, and of its end."""

import pytest

from one4all.errors import UsageError
from one4all.storage import open_storage
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json", "b.tar.gz"], r"or image, but b.tar.gz; .* unpack such files"),
        (["a.TGZ"], r"or image, but a.TGZ; .* unpack such files"),
        (["a.json"], "but files such as a.json"),
        ([], r"holds no \.tar shard.* or image$"),
    ],
    ids=["compressed", "tgz", "others", "nothing"],
)
def test_source_without_shards_is_told_what_is_there(tmp_path, protector_folder, names, message):
    source = open_storage(str(tmp_path / "in"))
    source.root.mkdir()
    for name in names:
        source.write_bytes(name, b"x")
    with pytest.raises(UsageError, match=message):
        protect(source.uri, str(tmp_path / "out"), ProtectConfig(protector=str(protector_folder)))
