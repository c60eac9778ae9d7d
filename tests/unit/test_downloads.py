"""The files that clear_cache deletes from the hub's cache, and the files that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from img2img_server.worker.downloads import forget_downloads

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, repo: str, content: bytes) -> Path:
    """Creates a repository in the layout of the hub's cache; returns the file in its snapshot."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    blob, snapshot = folder / "blobs" / "b1", folder / "snapshots" / REVISION
    for path in (blob.parent, snapshot, folder / "refs"):
        path.mkdir(parents=True)
    blob.write_bytes(content)
    (folder / "refs" / "main").write_text(REVISION)
    (snapshot / "weights.bin").symlink_to(blob)
    return snapshot / "weights.bin"


def test_the_files_of_the_model_go_and_those_of_others_stay(tmp_path: Path) -> None:
    ours, other = cached(tmp_path, "acme/sd", b"x" * 1000), cached(tmp_path, "acme/lm", b"y")
    assert forget_downloads("acme/sd", tmp_path) == 1000
    assert not ours.exists()
    assert other.read_bytes() == b"y"
    assert forget_downloads("acme/sd", tmp_path) == 0


def test_a_directory_of_the_operator_is_left_alone(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "weights.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"x")
    assert forget_downloads(str(weights.parent), tmp_path) == 0
    assert weights.exists()


def test_without_a_cache_there_is_nothing_to_delete(tmp_path: Path) -> None:
    assert forget_downloads("acme/sd", tmp_path / "none") == 0


def test_what_could_not_be_fetched_again_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = cached(tmp_path, "acme/sd", b"x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert forget_downloads("acme/sd", tmp_path) == 0
    assert ours.exists()
