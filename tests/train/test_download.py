"""Downloads: checked by the hash in their name, one message on failure, one process at a time."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from irpe_train import download as downloads
from irpe_train.checkpoint import read_checkpoint, read_weights
from irpe_train.errors import BadCheckpoint


@pytest.mark.parametrize("name", ["right", "wrong", "without"])
def test_a_fetched_file_is_held_against_the_hash_in_its_name(tmp_path, monkeypatch, name):
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "theirs.pth")
    digest = downloads.sha256(tmp_path / "theirs.pth")[:8]
    file = {"right": f"net-{digest}.pth", "wrong": "net-01234567.pth", "without": "net.pth"}[name]
    asked = []

    def download(url, part, *, most):
        asked.append(url)
        part.write_bytes((tmp_path / "theirs.pth").read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "download", download)
    for _ in range(2):  # the second time it is there
        with pytest.raises(BadCheckpoint, match="unlike its name") if name == "wrong" else contextlib.nullcontext():
            assert read_weights(f"https://example.org/a/{file}?download=1")["w"].sum() == 3
    assert asked == [f"https://example.org/a/{file}?download=1"] * (2 if name == "wrong" else 1)
    if name == "right":  # is the same file wherever it comes from
        assert downloads.local_file(f"https://mirror.example.org/{file}").is_file() and len(asked) == 1


def test_another_address_with_the_same_last_part_is_another_file(tmp_path, monkeypatch):
    """Many are called checkpoint.pth or pytorch_model.bin, and the cache knows names only."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "download", lambda url, part, most: part.write_bytes(url.encode()))
    first = downloads.local_file("https://example.org/one/net.pth?token=1")
    assert downloads.local_file("https://example.org/one/net.pth?token=2") == first
    with pytest.raises(
        BadCheckpoint, match="net.pth is from https://example.org/one/net.pth; give its path, or delete"
    ):
        downloads.local_file("https://example.org/two/net.pth")
    first.unlink()
    assert downloads.local_file("https://example.org/two/net.pth").read_bytes() == b"https://example.org/two/net.pth"
    first.unlink()
    monkeypatch.setattr(downloads, "download", no_network)
    with pytest.raises(BadCheckpoint, match="Put it here by hand"):
        downloads.local_file("https://example.org/one/net.pth")
    first.write_bytes(b"by hand")
    assert downloads.local_file("https://example.org/one/net.pth") == first


def no_network(url, part, *, most):
    raise OSError("no network")


def test_a_file_that_cannot_be_fetched_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "download", no_network)
    with pytest.raises(BadCheckpoint, match=rf"download failed \(no network\). Put it here by hand: {tmp_path}.*a.pth"):
        read_checkpoint("https://example.org/a.pth")
    monkeypatch.setenv("TORCH_HOME", "/dev/null")
    with pytest.raises(BadCheckpoint, match="by hand: /dev/null/.*/a.pth. For a cache elsewhere set TORCH_HOME"):
        read_checkpoint("https://example.org/a.pth")


def test_one_process_fetches_and_the_others_wait(tmp_path, monkeypatch):
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "theirs.pth")
    asked = []

    def download(url, part, *, most):
        asked.append(url)
        time.sleep(0.2)  # time enough for another to begin
        part.write_bytes((tmp_path / "theirs.pth").read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "download", download)
    with ThreadPoolExecutor(4) as pool:  # the lock is on an open folder, so it keeps threads apart as it does processes
        found = list(pool.map(downloads.local_file, ["https://example.org/a.pth"] * 4))
    assert len(asked) == 1 and set(found) == {tmp_path / "hub" / "checkpoints" / "a.pth"}
