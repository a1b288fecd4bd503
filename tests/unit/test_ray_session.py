"""Starting or joining Ray: what fails is said, and an interrupt is kept until it can be obeyed."""

import os
import signal
import socket
from contextlib import closing

import pytest

from one4all.errors import AccessError, One4AllError
from one4all.storage import open_storage
from pipelines import ray_session as session
from pipelines.protect import job
from pipelines.protect.config import ProtectConfig
from pipelines.ray_session import check_cluster, ray_session
from pipelines.settings import RayConfig


@pytest.fixture
def server(monkeypatch):
    """A socket that takes connections and says nothing."""
    monkeypatch.setattr(session, "_is_running", lambda: False)
    monkeypatch.setattr(session, "_ANSWER_SECONDS", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        yield listening


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.fault("stale RAY_ADDRESS")
@pytest.mark.parametrize("kind", ["closed", "silent", "another protocol"])
def test_cluster_that_does_not_answer_is_named(server, monkeypatch, kind):
    if kind == "another protocol":
        monkeypatch.setattr(socket.socket, "recv", lambda *_: b"HTTP/1.1 400")
    if kind == "closed":
        server.close()
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    else:
        monkeypatch.setenv("RAY_ADDRESS", address_of(server))
    with pytest.raises(AccessError, match=r"no Ray cluster answers at 127.0.0.1:\d+ .*RAY_ADDRESS"):
        check_cluster(RayConfig())
    with pytest.raises(AccessError, match="no Ray cluster"), ray_session(RayConfig()):
        pass


@pytest.mark.fault("stale RAY_ADDRESS")
def test_cluster_of_this_machine_that_is_gone_is_named(server, monkeypatch):
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: address_of(server))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port = server.getsockname()[1]  # of the machine's address, for which Ray takes 127.0.0.1
    with pytest.raises(AccessError, match=rf"no Ray cluster answers at [\d.]+:{port} within"):
        check_cluster(RayConfig(address="auto"))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(AccessError, match="no Ray cluster runs here"):
        check_cluster(RayConfig(address="auto"))


def test_server_of_grpc_answers(server):
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        there = grpc.server(pool)
        port = there.add_insecure_port("127.0.0.1:0")
        there.start()
        check_cluster(RayConfig(address=f"127.0.0.1:{port}"))
        check_cluster(RayConfig(address=f"ray://127.0.0.1:{port}"))
        there.stop(None).wait()


def test_stale_address_is_found_before_anything_is_written(tmp_path, server, protector_folder):
    source = open_storage(str(tmp_path / "in"))
    source.write_bytes("a.tar", b"x")
    config = ProtectConfig(
        protector=str(protector_folder), ray=RayConfig(address=address_of(server))
    )
    with pytest.raises(AccessError, match="no Ray cluster answers"):
        job.protect(source.uri, str(tmp_path / "out"), config)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("Ctrl-C while Ray starts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupt_while_ray_starts_waits_until_it_has_started(monkeypatch, number):
    ray = pytest.importorskip("ray")
    done = []

    def init(**_: object) -> None:
        os.kill(os.getpid(), number)
        done.append("started")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does

    def obey(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_is_running", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("stopped"))
    before = signal.signal(number, obey)
    try:
        with pytest.raises(KeyboardInterrupt), ray_session(RayConfig(address="local")):
            done.append("entered")
        assert signal.getsignal(number) is obey
    finally:
        signal.signal(number, before)
    assert done == ["started", "stopped"]


def test_folder_that_is_too_long_for_sockets_is_named(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(session, "_is_running", lambda: False)
    (tmp_path / "long").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "long"))
    message = r"long would be \d+ bytes too long; set RAY_TMPDIR"
    with pytest.raises(One4AllError, match=message), ray_session(RayConfig()):
        pass
    assert not list((tmp_path / "long").iterdir())


def test_folder_of_a_session_that_failed_is_kept_only_for_its_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(session, "_LONGEST_SOCKET", "")  # the path of this test is long
    with pytest.raises(OSError, match="no start"), session._private_folder():
        raise OSError("no start")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="later"), session._private_folder() as folder:  # noqa: PT012
        os.mkdir(folder)
        raise OSError("later")
    assert len(list(tmp_path.iterdir())) == 1
