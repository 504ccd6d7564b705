"""Text: any files, split by name, read through maps, in constant memory."""

import resource
from pathlib import Path

import pytest

from unisono.data.text import OPEN_FILES, Bytes, TextFile, Windows, corpus
from unisono.errors import DataError
from unisono.tasks.lm import bigram_bits_per_byte, bigram_counts


def write(root: Path, count: int) -> None:
    for i in range(count):
        (root / f"d{i % 3}").mkdir(exist_ok=True)
        (root / f"d{i % 3}" / f"{i}.txt").write_bytes(bytes([i % 251]) * (i + 1))


def test_files_are_split_by_their_names(tmp_path: Path) -> None:
    write(tmp_path, 100)
    whole = corpus(str(tmp_path))
    again = corpus(str(tmp_path))
    assert whole == again and whole.digest() == again.digest()
    assert len(whole.train) + len(whole.validation) == 100 and 3 <= len(whole.validation) <= 25
    (tmp_path / "d0" / "new.txt").write_text("new")
    grown = corpus(str(tmp_path))
    assert {f.name for f in whole.validation} <= {f.name for f in grown.validation}
    assert grown.digest() != whole.digest()


def test_a_single_file_is_split_by_position(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(bytes(range(200)))
    whole = corpus(str(tmp_path / "one.txt"))
    assert Bytes(whole.train).read(0, 180) == bytes(range(180))
    assert Bytes(whole.validation).read(0, 20) == bytes(range(180, 200))


def test_bytes_run_across_files(tmp_path: Path) -> None:
    write(tmp_path, 2 * OPEN_FILES)
    files = [TextFile(p, p.name, 0, p.stat().st_size) for p in sorted(tmp_path.rglob("*.txt"))]
    joined = b"".join(f.path.read_bytes() for f in files)
    data = Bytes(files)
    assert len(data) == len(joined)
    for start in range(0, len(joined) - 300, 211):
        assert data.read(start, 300) == joined[start : start + 300]
    assert b"".join(data.chunks(1000)) == joined


def test_windows_are_shifted_by_one_and_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(101)))
    windows = Windows([TextFile(tmp_path / "a", "a", 0, 101)], 10, "train")
    assert len(windows) == 10
    x, y = windows[3]
    assert x.tolist() == list(range(30, 40)) and y.tolist() == list(range(31, 41))


def test_what_is_missing_or_too_short_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file at .*nothing"):
        corpus(str(tmp_path / "nothing*"))
    with pytest.raises(DataError, match="no text in"):
        corpus(str(tmp_path))
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(DataError, match="has 3 bytes; a sample takes 11"):
        Windows([TextFile(tmp_path / "a", "a", 0, 3)], 10, "train")


def test_the_standard_library_is_there_without_its_tests() -> None:
    whole = corpus(None)
    size = sum(f.stop for f in (*whole.train, *whole.validation))
    assert 8e6 < size < 40e6
    assert not any("test" in Path(f.name).parts for f in whole.train)


def test_a_large_corpus_is_never_loaded(tmp_path: Path) -> None:
    """2 GiB of zeros that take no room on disk: a hundred samples from all over cost next to no memory."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2 << 30)
    windows = Windows(corpus(str(tmp_path / "large")).train, 128, "train")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(0, len(windows), len(windows) // 100):
        assert windows[i][0].sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_bigram_model_of_a_cycle_is_certain(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 4000)
    data = Bytes([TextFile(tmp_path / "a", "a", 0, 12_000)])
    assert bigram_counts(data)[ord("a"), ord("b")] == 4000
    assert bigram_bits_per_byte(data, data) < 0.2
