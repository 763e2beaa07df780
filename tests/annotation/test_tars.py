"""Tars with hostile headers: they cost the rows behind them, and neither the run nor its memory."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from pipelines.annotation.sources.tars import TarImage, TruncatedTar, read_tar

CONTENT = b"picture"


def member(name: str, content: bytes = CONTENT, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    return info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims a size. tarfile writes and reads sizes of any length, and negative ones."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**records: str) -> bytes:
    lines = b""
    for name, value in records.items():
        length = len(f" {name.replace('_', '.')}={value}\n")
        length += len(str(length + len(str(length))))
        lines += f"{length} {name.replace('_', '.')}={value}\n".encode()
    return member("pax", lines, tarfile.XHDTYPE)


def sparse() -> bytes:
    block = bytearray(header("sparse.png", 0, tarfile.GNUTYPE_SPARSE))
    block[482] = 1  # the map continues in the next block
    block[148:156] = b"        "
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def read(data: bytes) -> tuple[list[TarImage], str]:
    images: list[TarImage] = []
    try:
        images.extend(_collect(images, data))
    except TruncatedTar as error:
        return images, str(error)
    return images, ""


def _collect(images: list[TarImage], data: bytes) -> list[TarImage]:
    for image in read_tar(io.BytesIO(data)):
        images.append(image)
    return []


HOSTILE = {
    "long name of 2^50 bytes": header("long", 2**50, tarfile.GNUTYPE_LONGNAME),
    "pax header of 2^50 bytes": header("pax", 2**50, tarfile.XHDTYPE),
    "global pax header of 2^50 bytes": header("pax", 2**50, tarfile.XGLTYPE),
    "long name of negative size": header("long", -512, tarfile.GNUTYPE_LONGNAME),
    "member of negative size": header("b.png", -1024),
    "member that ends where the first one begins": header("b.png", -1536),
    "pax size that is negative": pax(size="-2048") + member("b.png"),
    "many pax headers for one member": pax(path="x.png") * 2000 + member("b.png"),
    "sparse map without an end": sparse() + (bytes(504) + b"\1" + bytes(7)) * 1000,
    "sparse map of many entries": pax(GNU_sparse_major="1", GNU_sparse_minor="0")
    + member("b.png", b"9999999\n" + b"1\n" * 500_000),
    "encoding that does not exist": pax(hdrcharset="BINARY") + header("long", 2**80, tarfile.GNUTYPE_LONGLINK),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_keeps_the_rows_before_it(name: str) -> None:
    tracemalloc.start()
    try:
        images, error = read(member("a.png") + HOSTILE[name] + member("c.png") + bytes(1024))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (images[0].name, images[0].size, images[0].rejection) == ("a.png", len(CONTENT), None)
    assert "cannot be read beyond 1 members" in error
    assert peak < 32 << 20


def test_size_beyond_the_tar_is_a_truncated_image_with_a_storable_size() -> None:
    images, _ = read(member("a.png") + header("b.png", 2**80))
    assert [(image.name, image.truncated) for image in images] == [("a.png", False), ("b.png", True)]
    assert images[1].size < 2**63


INVALID = {
    "no header": CONTENT + bytes(505),
    "wrong checksum": header("b.png", 0)[:148] + b"000000\0 " + header("b.png", 0)[156:],
    "wrong number": header("b.png", 0)[:124] + b"not a number" + header("b.png", 0)[136:],
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_header_behind_the_first_is_reported(name: str) -> None:
    """tarfile takes it for the end of the tar, so the rows behind it would be lost without a word."""
    images, error = read(member("a.png") + INVALID[name] + member("c.png") + bytes(1024))
    assert [image.name for image in images] == ["a.png"]
    assert "cannot be read beyond 1 members: the header of a member is invalid" in error


@pytest.mark.parametrize("empty_blocks", [1, 2, 20, 1000])
def test_members_behind_the_end_are_reported(empty_blocks: int) -> None:
    """Two tars in one file, or an empty block that an attacker has put between two members."""
    images, error = read(member("a.png") + bytes(512 * empty_blocks) + member("c.png") + bytes(1024))
    assert [image.name for image in images] == ["a.png"]
    assert error == "the tar has members behind its end, which comes after 1 members"


@pytest.mark.parametrize("padding", [b"", bytes(512), bytes(1024), bytes(10_240), bytes(1024) + b"garbage" * 512])
def test_padding_and_garbage_behind_the_end_are_no_error(padding: bytes) -> None:
    images, error = read(member("a.png") + padding)
    assert ([image.name for image in images], error) == (["a.png"], "")


def test_usual_headers_are_read(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = tmp_path / f"{form}.tar"
        with tarfile.open(file, "w", format=form) as tar:
            for number in range(3):
                info = tarfile.TarInfo(f"{'folder/' * 60}{number}.png")
                info.size, info.pax_headers = len(CONTENT), {"comment": "c" * 10_000}
                tar.addfile(info, io.BytesIO(CONTENT))
        images, error = read(file.read_bytes())
        assert [image.name.rpartition("/")[2] for image in images] == ["0.png", "1.png", "2.png"]
        assert error == ""
