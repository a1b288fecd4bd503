"""Protect and verify, onto S3 and folders, by workers here and by Ray; repeated, misused."""

import gzip
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from support.builders import make_16_bit_png, make_image, make_samples, make_tar, write_corpus

from one4all.errors import BindingError, ProtectorError, UsageError
from one4all.ledger import Ledger, read_binding
from one4all.protectors.card import WEIGHTS
from one4all.storage import open_storage
from pipelines.cli import app as cli
from pipelines.protect import own_protector
from pipelines.protect.config import ProtectConfig
from pipelines.protect.job import protect
from pipelines.status import read_status
from pipelines.verify import VerifyConfig, verify

pytestmark = pytest.mark.usefixtures("s3_endpoint")


def upload(folder: Path, uri: str) -> str:
    storage = open_storage(uri)
    for path in folder.glob("*.tar"):
        storage.write_bytes(path.name, path.read_bytes())
    return uri


@pytest.fixture
def config(protector_folder):
    return ProtectConfig(
        protector=str(protector_folder),
        batch_size=4,
        num_workers=1,
        cpus_per_worker=1,
        runner="local",
    )


@pytest.fixture(params=["local", "ray"])
def either(request, config):
    """The same, for workers of either kind."""
    if request.param == "ray":
        request.getfixturevalue("ray_local")
    return config.model_copy(update={"runner": request.param})


def test_first_run_fits_a_protector_and_later_ones_use_it(tmp_path, s3_uri, monkeypatch, either):
    """No protector is named: it is fitted once, kept below the destination, and found by verify."""
    monkeypatch.setattr(own_protector, "FEWEST_IMAGES", 10)
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    out = f"{s3_uri}/out"
    own = either.model_copy(update={"protector": ""})
    said = []
    result = protect(str(corpus), out, own, on_fit=lambda *news: said.append(news))
    assert (result.exit_code, result.num_images) == (0, 10)
    *_, grouping, fitted = [sentence for sentence, _ in said if sentence]
    assert grouping == "finding kinds among 10 images"
    assert fitted.startswith("fitted to 10 images")
    assert ("", 2) in said
    binding = read_binding(open_storage(out))
    assert binding.protector == "fitted"
    place = f"{out}/_one4all/protectors/{binding.protector_sha256}"
    assert open_storage(place).read_bytes("concepts.png").startswith(b"\x89PNG")
    assert verify(str(corpus), out, VerifyConfig(recompute=1.0, runner=either.runner)).ok

    (corpus / "later.tar").write_bytes(make_tar(make_samples(3, seed=50)))
    said.clear()
    again = protect(str(corpus), out, own, on_fit=lambda *news: said.append(news))
    assert (again.exit_code, again.num_protected_now, said) == (0, 1, [])
    with pytest.raises(UsageError, match="protected with strength discreet"):
        protect(str(corpus), out, own.model_copy(update={"strength": "strong"}))
    named = own.model_copy(update={"strength": "strong", "protector": "default"})
    with pytest.raises(UsageError, match="leave out --strength, or --protector"):
        protect(str(corpus), out, named)
    with pytest.raises(UsageError, match="bound to another configuration"):
        protect(str(corpus), out, own.model_copy(update={"protector": "default"}))


def test_worker_that_no_node_can_hold_ends_the_run(tmp_path, config, ray_local):
    corpus, out = write_corpus(tmp_path / "in", num_shards=1), tmp_path / "out"
    config = config.model_copy(update={"runner": "ray"})
    too_large = config.model_copy(update={"cpus_per_worker": 7})
    with pytest.raises(UsageError, match="no node can hold a worker of 7 CPUs: there are 1 node"):
        protect(str(corpus), str(out), too_large)
    assert protect(str(corpus), str(out), config).exit_code == 0, "the lease is held"


def test_bucket_to_bucket_then_only_what_is_new(tmp_path, s3_uri, either):
    config, audits = either, VerifyConfig(runner=either.runner)
    corpus = write_corpus(tmp_path / "in", num_shards=4)
    source, target = upload(corpus, f"{s3_uri}/in"), f"{s3_uri}/out"
    statuses = []
    result = protect(source, target, config, on_progress=statuses.append)
    assert (result.exit_code, result.num_done, result.num_images) == (0, 4, 20)
    assert {status.outcome for status in statuses} == {"done"}
    audit = verify(source, target, audits)
    assert audit.ok, audit.problems
    assert (audit.num_images, audit.num_sidecars) == (20, 60)

    again = protect(source, target, config)
    assert (again.exit_code, again.num_done, again.num_protected_now) == (0, 4, 0)

    storage = open_storage(source)
    storage.write_bytes("new.tar", make_tar(make_samples(2, seed=50)))
    storage.write_bytes("shard-000.tar", make_tar(make_samples(3, seed=60)))
    assert not verify(source, target, audits).ok
    third = protect(source, target, config)
    assert (third.num_done, third.num_protected_now, third.num_images) == (5, 2, 5)
    assert verify(source, target, audits).ok
    status = read_status(target)
    assert (status.num_done, status.num_pending, status.num_protected) == (5, 0, 20)


def test_older_shards_are_left_out_and_do_not_decide_the_exit_code(tmp_path, config):
    corpus, out = write_corpus(tmp_path / "in", num_shards=3), str(tmp_path / "out")
    (corpus / "shard-001.tar").write_bytes(make_tar([("b.jpg", b"junk"), ("a.jpg", make_image())]))
    os.utime(corpus / "shard-000.tar", (0, 0))
    os.utime(corpus / "shard-001.tar", (0, 0))
    recent = config.model_copy(update={"since": "2h"})
    result = protect(str(corpus), out, recent)
    assert (result.exit_code, result.num_shards, result.num_done) == (0, 1, 1)
    assert (result.num_older, result.num_older_undone) == (2, 2)
    assert protect(str(corpus), out, config).exit_code == 3  # all of them, under the same binding
    again = protect(str(corpus), out, recent)
    assert (again.exit_code, again.num_bad_images, again.num_older_undone) == (0, 0, 0)
    with pytest.raises(UsageError, match="in the future"):
        protect(str(corpus), out, config.model_copy(update={"since": "2126-01-01"}))


def test_folder_and_bucket_get_the_same_bytes(tmp_path, s3_uri, config):
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    protect(str(corpus), str(tmp_path / "out"), config)
    protect(str(corpus), s3_uri, config)
    for name in ("shard-000.tar", "shard-001.tar"):
        local = (tmp_path / "out" / name).read_bytes()
        assert open_storage(s3_uri).read_bytes(name) == local


def test_damaged_shards_are_given_up_and_the_rest_goes_on(tmp_path, config):
    corpus = write_corpus(tmp_path / "in", num_shards=3)
    (corpus / "cut.tar").write_bytes((corpus / "shard-000.tar").read_bytes()[:4096])
    (corpus / "notes.txt").write_text("not a shard")
    out = tmp_path / "out"
    result = protect(str(corpus), str(out), config)
    assert (result.exit_code, result.num_done) == (3, 3)
    assert list(result.quarantined) == ["cut.tar"]
    assert "truncated" in result.quarantined["cut.tar"]
    assert (result.num_others, result.other) == (1, "notes.txt")
    assert not (out / "cut.tar").exists()
    assert read_status(str(out)).quarantined == result.quarantined
    audit = verify(str(corpus), str(out), VerifyConfig())
    assert [p for p in audit.problems if "cut.tar: not protected" in p]
    # Mended at the source, it is another version, with a clean record.
    (corpus / "cut.tar").write_bytes(make_tar(make_samples(2)))
    assert protect(str(corpus), str(out), config).exit_code == 0


def test_bad_images_show_in_exit_code_and_policy_fail_stops_the_shard(tmp_path, config):
    corpus = tmp_path / "in"
    corpus.mkdir()
    files = [("a.jpg", make_image()), ("b.jpg", b"junk")]
    (corpus / "s.tar").write_bytes(make_tar(files))
    assert protect(str(corpus), str(tmp_path / "drop"), config).exit_code == 3
    again = protect(str(corpus), str(tmp_path / "drop"), config)
    assert (again.exit_code, again.num_bad_images) == (3, 1)  # it is still missing
    failing = config.model_copy(update={"on_bad_image": "fail"})
    result = protect(str(corpus), str(tmp_path / "fail"), failing)
    assert result.exit_code == 1
    assert "b.jpg: not an image file" in result.failed["s.tar"]


def test_some_shards_of_a_folder_are_a_source(tmp_path, config):
    corpus, out = write_corpus(tmp_path / "in", num_shards=3), str(tmp_path / "out")
    source = f"{corpus}/shard-{{000..001}}.tar"
    result = protect(source, out, config)
    assert (result.exit_code, result.num_done, result.num_others) == (0, 2, 0)
    assert verify(source, out, VerifyConfig()).ok
    assert read_status(out).num_shards == 2


def test_source_that_was_moved_is_the_same_if_it_is_said_and_true(tmp_path, config, caplog):
    corpus, out = write_corpus(tmp_path / "in", num_shards=2), str(tmp_path / "out")
    moved = config.model_copy(update={"moved_from": str(corpus)})
    with pytest.raises(UsageError, match="nothing was protected"):
        protect(str(corpus), out, moved)
    protect(str(corpus), out, config)
    another = write_corpus(tmp_path / "another", num_shards=2, num_samples=1)
    elsewhere = corpus.rename(tmp_path / "elsewhere")
    for verb in (protect, verify):
        settings = config if verb is protect else VerifyConfig()
        with pytest.raises(UsageError, match="--moved-from"):
            verb(str(elsewhere), out, settings)
    wrong = config.model_copy(update={"moved_from": str(another)})
    with pytest.raises(UsageError, match="bound to another configuration"):
        protect(str(elsewhere), out, wrong)
    with pytest.raises(UsageError, match=r"shard-000\.tar has another size"):
        protect(str(another), out, moved)
    assert read_binding(open_storage(out)).source_uri == str(corpus)

    os.utime(elsewhere / "shard-001.tar", (0, 0))
    (elsewhere / "shard-002.tar").write_bytes(make_tar([]))
    result = protect(str(elsewhere), out, moved)
    assert (result.exit_code, result.num_done, result.num_protected_now) == (0, 3, 2)
    assert "1 are the same" in caplog.text
    assert "1 have another modification time" in caplog.text
    assert verify(str(elsewhere), out, VerifyConfig()).ok
    assert protect(str(elsewhere), out, moved).num_protected_now == 0


def test_gray_images_are_told_or_tinted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_protector, "FEWEST_IMAGES", 10)
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    gray = [(f"{i}.jpg", make_image("JPEG", "L", seed=i)) for i in range(3)]
    (corpus / "gray.tar").write_bytes(make_tar(gray))
    told = "3 images are gray and stay so"

    def run(out: str, *options: str) -> tuple[object, str]:
        settings = ["--set", "cpus_per_worker=1", "--set", "runner=local", *options]
        with pytest.raises(SystemExit) as stop:
            cli.app(["protect", str(corpus), str(tmp_path / out), *settings])
        printed = capsys.readouterr()
        return stop.value.code, printed.out + printed.err

    code, printed = run("gray")
    assert (code, told in printed) == (0, True)
    with pytest.raises(BindingError, match="tint_gray False -> True"):
        cli.app(["protect", str(corpus), str(tmp_path / "gray"), "--tint-gray"])
    capsys.readouterr()
    code, printed = run("tinted", "--tint-gray")
    assert (code, told in printed) == (0, False)
    assert "converted now: 3 L to RGB" in printed
    assert verify(str(corpus), str(tmp_path / "tinted"), VerifyConfig(recompute=1.0)).ok


def test_what_was_converted_is_told_and_a_link_to_nothing_fails(tmp_path, config, capsys):
    corpus = tmp_path / "in"
    corpus.mkdir()
    mask, depth = make_image("PNG", "P"), make_16_bit_png(1)
    files = [("a.jpg", make_image()), ("a.seg.png", mask), ("b.png", mask), ("c.png", depth)]
    files += [("d.jpg", make_image()), ("d.txt.gz", gzip.compress(make_image()))]
    (corpus / "s.tar").write_bytes(make_tar(files))
    (corpus / "gone.tar").symlink_to(tmp_path / "unmounted" / "gone.tar")
    result = protect(str(corpus), str(tmp_path / "out"), config)
    assert (result.exit_code, result.num_done, result.num_bad_images) == (1, 1, 2)
    assert "no such file" in result.failed["gone.tar"]
    assert result.converted == {"P to RGB": 2}
    (corpus / "gone.tar").unlink()
    settings = ["--protector", config.protector, "--set", "cpus_per_worker=1"]
    with pytest.raises(SystemExit) as stop:
        cli.app(["protect", str(corpus), str(tmp_path / "again"), *settings])
    printed = capsys.readouterr().out
    assert stop.value.code == 3
    assert "converted now: 2 P to RGB" in printed
    assert "sidecar_patterns copies them" in printed
    manifest = next(Ledger(open_storage(str(tmp_path / "again"))).manifests())
    bad = {entry.member: entry.reason for entry in manifest.bad_images}
    assert "name it in sidecar_patterns" in bad["c.png"]
    assert "compressed by gzip" in bad["d.txt.gz"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(lambda d: (d / "in", d / "in"), "are the same", id="same"),
        pytest.param(lambda d: (d / "in", d / "in" / "out"), "contain one another", id="inside"),
        pytest.param(lambda d: (d / "in", d / "empty" / ".." / "in"), "are the same", id="dots"),
        pytest.param(lambda d: (d / "none", d / "out"), "no such folder", id="missing-source"),
        pytest.param(lambda d: (d / "empty", d / "out"), "holds no .tar shard", id="empty"),
        pytest.param(lambda d: ("s3://nowhere-at-all", d / "out"), "does not exist", id="bucket"),
    ],
)
def test_impossible_requests_write_nothing(tmp_path, config, prepare, message):
    write_corpus(tmp_path / "in", num_shards=1)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    source, destination = prepare(tmp_path)
    with pytest.raises(UsageError, match=message):
        protect(str(source), str(destination), config)
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_protector_is_noticed_before_anything_is_written(tmp_path, config):
    write_corpus(tmp_path / "in", num_shards=1)
    damaged = shutil.copytree(config.protector, tmp_path / "damaged")
    (damaged / WEIGHTS).write_bytes(b"")
    broken = config.model_copy(update={"protector": str(damaged)})
    with pytest.raises(ProtectorError, match="not the file its card describes"):
        protect(str(tmp_path / "in"), str(tmp_path / "out"), broken)
    assert not (tmp_path / "out").exists()


def test_another_configuration_is_refused(tmp_path, config):
    corpus = str(write_corpus(tmp_path / "in", num_shards=1))
    out = str(tmp_path / "out")
    protect(corpus, out, config)
    other = config.model_copy(update={"output_format": "lossless"})
    with pytest.raises(UsageError, match="'match' -> 'lossless'"):
        protect(corpus, out, other)
    with pytest.raises(UsageError, match="was not written by one4all protect"):
        verify(corpus, corpus, VerifyConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protector", "nothing"], "no protector at 'nothing'"),
        (["--set", "colour=blue"], "unknown key 'colour'"),
        (["--output-format", "gif"], "output_format"),
        (["--config", "missing.yaml"], "cannot read configuration missing.yaml"),
    ],
)
def test_mistake_on_the_command_line_is_one_sentence(
    tmp_path, monkeypatch, capsys, arguments, message
):
    corpus = str(write_corpus(tmp_path / "in", num_shards=1))
    command = ["one4all", "protect", corpus, str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(cli, "_keep_native_messages_off_the_terminal", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_denied_credentials_are_one_sentence(tmp_path, config, s3_uri, monkeypatch):
    """moto accepts any key until its authentication is switched on."""
    import urllib.request

    def switch_authentication(free_requests: bytes) -> None:
        request = urllib.request.Request(
            f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth",
            data=free_requests,
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request).close()

    corpus = str(write_corpus(tmp_path / "in", num_shards=1))
    switch_authentication(b"0")
    try:
        with pytest.raises(UsageError, match="denied"):
            protect(corpus, s3_uri, config)
    finally:
        switch_authentication(b"inf")


def test_verify_prints_json_and_lines_for_images(tmp_path, config, monkeypatch, capsys):
    corpus, out = str(write_corpus(tmp_path / "in", num_shards=1)), str(tmp_path / "out")
    protect(corpus, out, config)
    lines = tmp_path / "images.jsonl"
    monkeypatch.setattr(cli, "_keep_native_messages_off_the_terminal", lambda: None)
    monkeypatch.setattr(
        sys, "argv", ["one4all", "verify", corpus, out, "--json", "--per-image", str(lines)]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert printed["ok"]
    assert printed["num_images"] == 5
    images = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(images) == 5
    assert max(image["max_levels"] for image in images) == printed["max_levels"]
    assert max(image["flip"] for image in images) == printed["visibility"]["worst"]["flip"]
    measured = "max_levels psnr_db ssim ciede2000 flip ssimulacra2".split()
    assert list(images[0]) == ["shard", "member", *measured]
