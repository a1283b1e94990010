"""Files on disk: arrays whose claims are checked, and writing that leaves the old file where it fails."""

import errno
from pathlib import Path

import numpy as np
import pytest

from fastrdm.files import read_npy, write_whole


def test_an_array_comes_back(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    found = read_npy(tmp_path / "a.npy")
    assert type(found) is np.ndarray and found.flags.writeable
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array", b"\x93NUMPY\x01\x00\xff\xff{"])
def test_what_is_no_array_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array: "):
        read_npy(tmp_path / "a.npy")


def test_a_missing_array_and_an_archive_of_arrays_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as an array: No such file"):
        read_npy(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"b\.npz cannot be read as an array: not a \.npy file"):
        read_npy(tmp_path / "b.npz")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_whole(path, b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
