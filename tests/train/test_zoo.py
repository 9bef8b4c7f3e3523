"""The model zoo: its file, and downloads that break, arrive wrong or find no network."""

import contextlib
import http.server
import os
import pwd
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from irpe_train import download
from irpe_train import zoo as zoo_module
from irpe_train.config import ROOT
from irpe_train.errors import RunError
from irpe_train.zoo import fetch, main, read_zoo


@pytest.fixture
def server():
    """A web server on this machine: ``files`` by name, number ``asked`` for, ``cut`` bytes after which it hangs up."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if server.raw:
                with contextlib.suppress(ConnectionError):
                    while self.wfile.write(server.raw) and server.raw.startswith(b"HTTP/1.1 100"):
                        time.sleep(0.01)
                return None
            whole = server.files.get(self.path.rpartition("/")[2])
            if whole is None:
                return self.send_error(404)
            server.asked += 1
            self.send_response(200)
            if server.announces:
                self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client has closed the connection
                body = whole[: server.cut]
                for at in range(0, len(body), 1 << 20):
                    self.wfile.write(body[at : at + (1 << 20)])
                    server.sent += 1

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent = 0  # in MiB
    server.files, server.asked, server.cut, server.announces = {}, 0, None, True
    server.raw = b""  # instead of an answer
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def zoo(server, tmp_path):
    torch.save({"model": {"a": torch.ones(3), "b": torch.ones(2)}}, tmp_path / "net.pth")
    server.files["net.pth"] = (tmp_path / "net.pth").read_bytes()
    content = {
        "prefix": f"http://127.0.0.1:{server.server_port}/",
        "source": "a test",
        "tolerance": {"acc1": 0.1},
        "models": {
            "net": {
                "package": "deit_irpe",
                "config": "configs/deit/tiny_k.yaml",
                "file": "net.pth",
                "entries": 2,
                "expect": {"acc1": 70.0},
            }
        },
    }
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(content))
    return read_zoo(tmp_path / "zoo.yaml")


def with_entry(zoo, **changes):
    entry = zoo_module.Entry(**{**vars(zoo.models["net"]), **changes})
    return zoo_module.Zoo({"net": entry}, zoo.tolerance, zoo.source)


def test_the_committed_zoo():
    zoo = read_zoo()
    assert len(zoo.models) == 9
    for entry in zoo.models.values():
        assert (ROOT / entry.config).is_file()
        assert entry.url == "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/" + entry.file
        assert set(entry.expect) <= set(zoo.tolerance)
        assert zoo.find(str(ROOT / entry.config)) == entry
    assert zoo.models["deit_base_patch16_224_ctx_product_50_shared_qkv"].expect["acc1"] == 82.8
    assert zoo.models["rpe-2.0-product-ctx-1-k_300epochs"].expect["AP"] == 0.422


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no published checkpoint 'nope'; expected one of deit_tiny_patch16_224_ctx"):
        read_zoo().find("nope")


def test_outside_a_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="A checkout and an installed package both have one"):
        read_zoo(tmp_path / "model_zoo.yaml")


def test_fetches_once(server, zoo, tmp_path):
    path = fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert path == tmp_path / "hub" / "net.pth" and path.read_bytes() == server.files["net.pth"]
    fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert server.asked == 1
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == ["net.pth", "net.pth.sha256"]


def test_a_broken_download_begins_again(server, zoo, tmp_path):
    server.cut = 100
    with pytest.raises(ConnectionError, match="cannot download.*after 100 of .*put it here: .*net.pth. .* TORCH_HOME"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert list((tmp_path / "hub").iterdir()) == []
    server.cut = None
    path = fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert server.asked == 2 and path.read_bytes() == server.files["net.pth"]


def test_what_a_killed_download_left_is_replaced(server, zoo, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "net.pth.part").write_bytes(b"killed")
    path = fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert path.read_bytes() == server.files["net.pth"] and not (tmp_path / "hub" / "net.pth.part").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sha256": "0" * 64}, "sha256 .* expected 0000"),
        ({"size": 7}, "more than 7 bytes"),
        ({"size": 70_000}, "bytes, 70000 expected"),
        ({"entries": 3}, "2 tensors in 'model', 3 expected"),
        ({"entries": 1}, "2 tensors in 'model', 1 expected"),
    ],
)
def test_a_wrong_file_is_not_kept(zoo, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fetch("net", folder=tmp_path / "hub", zoo=with_entry(zoo, **changes))
    assert list((tmp_path / "hub").iterdir()) == []


def test_known_hash_and_size(server, zoo, tmp_path):
    digest = download.sha256(tmp_path / "net.pth")
    whole = with_entry(zoo, sha256=digest, size=len(server.files["net.pth"]))
    assert fetch("net", folder=tmp_path / "hub", zoo=whole).is_file()


def test_the_first_download_is_trusted_and_compared_with_ever_after(server, zoo, tmp_path):
    path, record = fetch("net", folder=tmp_path / "hub", zoo=zoo), tmp_path / "hub" / "net.pth.sha256"
    assert record.read_text() == f"{download.sha256(path)}  net.pth\n"
    first = path.read_bytes()
    torch.save({"model": {"a": torch.zeros(3), "b": torch.zeros(2)}}, path)  # a valid checkpoint, but a different one
    message = "net.pth: sha256 .*, expected .* written when it was first downloaded. Delete it and download it again"
    with pytest.raises(ValueError, match=message):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    server.files["net.pth"] = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match="If the authors have replaced it, delete net.pth.sha256 too"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert [file.name for file in (tmp_path / "hub").iterdir()] == ["net.pth.sha256"]
    server.files["net.pth"] = first
    assert fetch("net", folder=tmp_path / "hub", zoo=zoo).read_bytes() == first


def test_a_file_put_there_by_hand_is_checked(zoo, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "net.pth").write_bytes(b"<html>sign in</html>")
    with pytest.raises(ValueError, match="net.pth"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    (tmp_path / "hub" / "net.pth").write_bytes((tmp_path / "net.pth").read_bytes())
    assert fetch("net", folder=tmp_path / "hub", zoo=zoo).is_file() and (tmp_path / "hub" / "net.pth.sha256").is_file()


@pytest.mark.parametrize("announced", [True, False])
def test_an_endless_answer_is_cut_off(server, zoo, tmp_path, monkeypatch, announced):
    """Announced (nothing is read) or not (it is read up to the limit); nothing is kept."""
    monkeypatch.setattr(download, "LARGEST_FILE", 20 * download.CHUNK)
    server.files["net.pth"], server.announces = bytes(64 << 20), announced
    with pytest.raises(ValueError, match="more than 20971520 bytes; that is not a checkpoint"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert list((tmp_path / "hub").iterdir()) == []
    assert server.sent < (18 if announced else 50)  # the limit, and what the system buffers
    with pytest.raises(ValueError, match="more than 100 bytes"):
        fetch("net", folder=tmp_path / "hub", zoo=with_entry(zoo, size=100))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": [1]}, "not in the form of model_zoo.yaml"),
        ({"models": {"net": {"file": "../net.pth"}}}, "expected a name without a folder"),
        ({"models": {"net": {"file": "net.pth", "colour": 1}}}, "colour"),
        ({"tolerance": None, "prefix": None}, "not in the form"),
    ],
)
def test_a_malformed_zoo_file(zoo, tmp_path, change, message):
    content = yaml.safe_load((tmp_path / "zoo.yaml").read_text()) | change
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match=f"zoo.yaml: .*{message}"):
        main(["--zoo", str(tmp_path / "zoo.yaml")])


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"\x00\xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 301 Moved\r\nLocation: /net.pth\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_any_other_answer_is_one_message(server, zoo, tmp_path, answer):
    server.raw = answer
    with pytest.raises(
        ConnectionError, match="cannot download http://127.*Download net.pth on a machine with a"
    ) as error:
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert "\n" not in str(error.value) and not (tmp_path / "hub" / "net.pth").exists()


def test_an_answer_that_never_begins_is_not_waited_for(server, zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.5)
    server.raw = b"HTTP/1.1 100 Continue\r\n\r\n"
    with pytest.raises(ConnectionError, match=r"cannot download http://127.*no answer within 0.5 s"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert {thread.daemon for thread in threading.enumerate() if "(ask)" in thread.name} == {True}  # not waited for
    server.raw = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"  # ends the thread that still listens


def test_a_connection_that_falls_silent_says_so_itself(zoo, tmp_path, monkeypatch):
    def silent(request, timeout):
        raise TimeoutError(f"silent for {timeout} s")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    with pytest.raises(ConnectionError, match=r"cannot download http://127.*silent for 30 s"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)


@pytest.mark.parametrize("name", ["net.pth", "net.pth.part", "net.pth.sha256"])
def test_a_pipe_in_the_cache_is_refused_and_not_waited_for(server, zoo, tmp_path, name):
    (tmp_path / "hub").mkdir()
    os.mkfifo(tmp_path / "hub" / name)
    with pytest.raises(RunError, match=f"hub/{name}: expected a plain file"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)


@pytest.mark.parametrize(
    "url", ["", "net.pth", "http://", "http://[", "http://a b/", "http://127.0.0.1:x/", "file:///no"]
)
def test_an_invalid_url_is_one_message(zoo, tmp_path, url):
    with pytest.raises(
        ConnectionError, match="model zoo: cannot download .*Download net.pth on a machine with a network"
    ):
        fetch("net", folder=tmp_path / "hub", zoo=with_entry(zoo, url=url))


def test_something_else_arrives(server, zoo, tmp_path):
    server.files["net.pth"] = b"<html>sign in</html>"
    with pytest.raises(ValueError, match="net.pth"):
        fetch("net", folder=tmp_path / "hub", zoo=zoo)
    assert not (tmp_path / "hub" / "net.pth").exists()


def test_without_a_network_the_message_says_what_to_put_where(zoo, tmp_path):
    lost = with_entry(zoo, url="http://127.0.0.1:9/net.pth")
    with pytest.raises(
        ConnectionError,
        match="cannot download http://127.0.0.1:9/net.pth.*Download net.pth on a machine "
        f"with a network and put it here: {tmp_path}/hub/net.pth",
    ):
        fetch("net", folder=tmp_path / "hub", zoo=lost)


def test_command_line(server, zoo, tmp_path, capsys):
    common = ["--zoo", str(tmp_path / "zoo.yaml"), "--folder", str(tmp_path / "hub")]
    main(["net", "--where", *common])
    assert not (tmp_path / "hub").exists()
    main(["all", *common])
    main(common)
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [str(tmp_path / "hub" / "net.pth")] * 2
    assert out[2].startswith("here      net  http://")
    with pytest.raises(SystemExit, match="no published checkpoint 'nope'"):
        main(["nope", *common])


def test_without_a_home_folder_the_message_says_what_to_set(monkeypatch):
    """As for an unknown user in a container."""
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # no such user
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="there is none: set TORCH_HOME"):
        main([])


@pytest.mark.parametrize("variable", ["TORCH_HOME", "XDG_CACHE_HOME", None])
def test_the_cache_is_torch_hubs(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert download.cache_folder() == Path(torch.hub.get_dir()) / "checkpoints"
