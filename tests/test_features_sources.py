"""Every form that images come in gives the same pictures, and what holds none says so."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from inception_fast.features.sources import SourceError, digest_of, expand_ranges, open_source
from inception_fast.images import ImageError
from pictures import encoded, may_not_be_read, write_folder, write_tar


def read_all(text: object) -> dict[str, bytes]:
    source = open_source(str(text))
    return {name: source.read(i) for i, name in enumerate(source.names)}


def write_parquet(path: Path, columns: dict[str, object], group: int = 2) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)


def test_folder_in_the_order_of_its_paths(tmp_path: Path) -> None:
    paths = write_folder(tmp_path / "photos", 7)
    (tmp_path / "photos" / "notes.md").write_text("not a picture")
    (tmp_path / "photos" / ".hidden.jpg").write_bytes(b"")
    found = read_all(tmp_path / "photos")
    assert list(found) == [str(path) for path in paths] and len(found) == 7
    assert list(found.values()) == [path.read_bytes() for path in paths]


def test_list_relative_to_its_own_folder(tmp_path: Path) -> None:
    paths = write_folder(tmp_path / "photos", 3)
    (tmp_path / "some.txt").write_text(f"photos/0001.jpg\n\n{paths[0]}\nphotos/gone.jpg\n")
    source = open_source(str(tmp_path / "some.txt"))
    assert list(source.names) == ["photos/0001.jpg", str(paths[0]), "photos/gone.jpg"]
    (tmp_path / "mark.txt").write_text("photos/0001.jpg\n", encoding="utf-8-sig")
    assert list(open_source(str(tmp_path / "mark.txt")).names) == ["photos/0001.jpg"]
    assert source.read(0) == (tmp_path / "photos/0001.jpg").read_bytes() and source.read(1) == paths[0].read_bytes()
    with pytest.raises(FileNotFoundError):
        source.read(2)


def test_a_list_holds_every_name_that_a_file_can_have(tmp_path: Path) -> None:
    """Titles copied from pages bring U+2028 and hard spaces into names; only line ends part two of them."""
    names = ["a\u2028b.jpg", "\xa0c\x85\x1c.jpg", "d  e.jpg"]
    (tmp_path / "all.txt").write_bytes("\r\n".join(["", *names, "", " \t"]).encode())
    assert list(open_source(str(tmp_path / "all.txt")).names) == names


def test_tar_shards(tmp_path: Path) -> None:
    """webdataset's: several files of one key, of which the pictures count."""
    content = [{f"{s}{i}.{end}": encoded(10 * s + i) for i in range(3) for end in ("jpg", "cls")} for s in range(2)]
    for s, files in enumerate(content):
        write_tar(tmp_path / f"train-{s:03d}.tar", files)
    wanted = {
        f"{tmp_path}/train-{s:03d}.tar/{name}": data
        for s, files in enumerate(content)
        for name, data in files.items()
        if name.endswith(".jpg")
    }
    for text in (tmp_path, tmp_path / "train-*.tar", tmp_path / "train-{000..001}.tar"):
        assert read_all(text) == wanted and len(wanted) == 6
    assert len(read_all(tmp_path / "train-001.tar")) == 3


def test_links_in_a_tar_are_the_images_that_they_lead_to(tmp_path: Path) -> None:
    """tar writes a file's second name as a link; links were left out, and nobody was told."""
    links = (
        ("./again.jpg", tarfile.LNKTYPE, "./0.jpg"),
        ("./sub/link.jpg", tarfile.SYMTYPE, "../1.jpg"),
        ("./sub/far.jpg", tarfile.SYMTYPE, "link.jpg"),
        ("./sub/lost.jpg", tarfile.SYMTYPE, "../../elsewhere.jpg"),
        ("./sub/a.jpg", tarfile.SYMTYPE, "b.jpg"),
        ("./sub/b.jpg", tarfile.SYMTYPE, "far.jpg"),
        ("./round.jpg", tarfile.SYMTYPE, "./trip.jpg"),
        ("./trip.jpg", tarfile.SYMTYPE, "./round.jpg"),
        ("./0.jpg", tarfile.LNKTYPE, "./0.jpg"),
    )
    write_tar(tmp_path / "x.tar", {f"./{i}.jpg": encoded(i) for i in range(2)})
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    write_tar(tmp_path / "y.tar", {"3.jpg": encoded(3)})
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / "[xy].tar"))))
    rows, images = (0, 1, 2, 3, 4, 6, 7, 10, 11), (0, 1, 0, 1, 1, 1, 1, 0, 3)
    assert [source.read(i) for i in rows] == [encoded(i) for i in images]
    for row, target in ((5, r"\.\./elsewhere\.jpg"), (8, r"trip\.jpg"), (9, r"round\.jpg")):
        with pytest.raises(OSError, match=rf"a link to {target}, no image of the tar file"):
            source.read(row)


def sparse(name: str, form: str, pieces: list[tuple[int, bytes]], size: int) -> tuple[tarfile.TarInfo, bytes]:
    """A member as `tar -S` writes it, in GNU's own format or in a version of the sparse one of pax, and its data."""
    member, data = tarfile.TarInfo(name), b"".join(piece for _, piece in pieces)
    numbers = [number for start, piece in pieces for number in (start, len(piece))]
    if form == "0.1":
        listed = {"map": ",".join(map(str, numbers)), "size": size, "numblocks": len(pieces), "name": name}
    else:
        listed = {"major": 1, "minor": 0, "realsize": size, "name": name}
        text = "".join(f"{number}\n" for number in (len(pieces), *numbers)).encode()
        data = text + bytes(-len(text) % 512) + data
    member.pax_headers = {f"GNU.sparse.{key}": str(value) for key, value in listed.items()}
    member.size = len(data)
    return member, data


def old_sparse(name: str, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    """The same in GNU's own format: a header that tarfile does not write, then the data."""
    data = b"".join(piece for _, piece in pieces)
    member = tarfile.TarInfo(name)
    member.type, member.size = tarfile.GNUTYPE_SPARSE, len(data)
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    for at, number in zip(
        range(386, 482, 12), (n for start, piece in pieces for n in (start, len(piece))), strict=False
    ):
        head[at : at + 12] = b"%011o\0" % number
    head[483:495], head[148:156] = b"%011o\0" % size, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("form", ["gnu", "0.1", "1.0"])
@pytest.mark.parametrize("last", [False, True])
def test_sparse_files_in_a_tar_have_their_holes(tmp_path: Path, form: str, last: bool) -> None:
    """`tar -S` leaves the holes of a file out: what followed in the tar was read in their place."""
    path, pieces, size = tmp_path / "x.tar", [(512, b"one" * 400), (9_000, b"two" * 100)], 20_000
    whole = bytearray(size)
    for start, piece in pieces:
        whole[start : start + len(piece)] = piece
    other = {} if last else {"b.jpg": b"other" * 8_000}
    with tarfile.open(path, "w") as archive:
        if form != "gnu":
            member, data = sparse("a.bmp", form, pieces, size)
            archive.addfile(member, io.BytesIO(data))
        for name, data in other.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo("c.bmp")
        member.type, member.linkname = tarfile.LNKTYPE, "a.bmp"
        archive.addfile(member)
    if form == "gnu":
        path.write_bytes(old_sparse("a.bmp", pieces, size) + path.read_bytes())
    source = pickle.loads(pickle.dumps(open_source(str(path))))
    found = {name.rpartition("/")[2]: source.read(i) for i, name in enumerate(source.names)}
    assert found == {"a.bmp": whole, **other, "c.bmp": whole}


def test_a_tar_that_was_cut_short_is_found_at_its_image(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    write_tar(path, {"a.jpg": encoded(1), "b.jpg": encoded(2)})
    whole = path.read_bytes()
    second = whole.index(b"b.jpg")
    for length, name in ((second + 512 + 100, "b.jpg"), (second + 100, "(what follows byte ")):
        path.write_bytes(whole[:length])
        source = open_source(str(path))
        assert len(source.names) == 2 and source.read(0) == encoded(1) and source.names[1].startswith(f"{path}/{name}")
        with pytest.raises(OSError, match="cut short here"):
            source.read(1)


@pytest.mark.parametrize("form", ["struct", "binary", "unnamed"])
def test_parquet_with_encoded_images(tmp_path: Path, form: str) -> None:
    data = [encoded(i) for i in range(5)]
    names = [f"{i}.jpg" for i in range(5)]
    if form == "struct":
        rows = [{"bytes": d, "path": n} for d, n in zip(data, names, strict=True)]
        write_parquet(tmp_path / "x.parquet", {"label": [0] * 5, "image": rows})
    elif form == "binary":
        write_parquet(tmp_path / "x.parquet", {"key": names, "jpg": data})
    else:
        write_parquet(tmp_path / "x.parquet", {"thumb": data})
        names = [f"{tmp_path}/x.parquet#{i}" for i in range(5)]
    source = open_source(str(tmp_path))
    assert list(source.names) == names
    assert [source.read(i) for i in (4, 0, 2, 1, 3)] == [data[i] for i in (4, 0, 2, 1, 3)]
    twin = pickle.loads(pickle.dumps(source))
    assert twin.read(3) == data[3]


def test_columns_of_parquet_that_hold_no_images(tmp_path: Path) -> None:
    """Lists of images, which end a decoding process, and the number of an image's bytes beside it."""
    lists, sizes = [[encoded(0), encoded(1)]], [{"bytes": 1000, "width": 8}]
    write_parquet(tmp_path / "x.parquet", {"image": lists, "about": sizes, "photo": [encoded(0)]})
    assert open_source(str(tmp_path)).read(0) == encoded(0)
    write_parquet(tmp_path / "x.parquet", {"image": lists, "about": sizes, "page": [{"bytes": "text"}]})
    with pytest.raises(SourceError, match=r"has the columns image: list<.*binary>, about: .* allowed: one of images"):
        open_source(str(tmp_path))


def test_several_parquet_files_and_a_row_without_an_image(tmp_path: Path) -> None:
    for i in range(2):
        write_parquet(tmp_path / f"{i}.parquet", {"image": [{"bytes": encoded(i), "path": None}, None]})
    source = open_source(str(tmp_path / "*.parquet"))
    assert len(source.names) == 4 and source.names[2] == f"{tmp_path}/1.parquet#0" and source.read(2) == encoded(1)
    with pytest.raises(ValueError, match="the row holds no image"):
        source.read(1)


def test_a_parquet_file_with_fewer_rows_than_it_says(tmp_path: Path) -> None:
    """As where it was written again meanwhile: an image that cannot be read, not the end of a decoding process."""
    file = tmp_path / "x.parquet"
    write_parquet(file, {"jpg": [encoded(0), encoded(1)]})
    source = open_source(str(file))
    write_parquet(file, {"jpg": [encoded(0)]})
    assert source.read(0) == encoded(0)
    with pytest.raises(ValueError, match="the file lacks this row"):
        source.read(1)


def test_a_form_of_parquet_that_pyarrow_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise pyarrow.ArrowNotImplementedError("integers of 4 bits")

    write_parquet(tmp_path / "x.parquet", {"jpg": [encoded(0)]})
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(SourceError, match=r"x\.parquet is no readable parquet file \(integers of 4 bits\)"):
        open_source(str(tmp_path))


def test_the_digest_follows_the_names(tmp_path: Path) -> None:
    write_folder(tmp_path, 3)
    before = digest_of(open_source(str(tmp_path)))
    assert digest_of(open_source(str(tmp_path))) == before
    (tmp_path / "new.jpg").write_bytes(encoded(9))
    assert digest_of(open_source(str(tmp_path))) != before


@pytest.mark.parametrize("form", ["list", "parquet"])
def test_the_digest_tells_images_of_the_same_names(tmp_path: Path, form: str) -> None:
    """Else a run over the second set would take the features of the first for its own."""
    digests = []
    for i in range(2):
        folder = tmp_path / str(i)
        write_folder(folder, 1)
        (folder / "x.list").write_text("a.jpg\n")
        write_parquet(folder / "x.parquet", {"key": ["a.jpg"], "jpg": [encoded(i)]})
        source = open_source(str(folder / f"x.{form}"))
        assert source.names == ["a.jpg"]
        digests.append(digest_of(source))
    assert digests[0] != digests[1]


def test_names_that_are_not_utf8_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "\udcff.jpg").write_bytes(encoded(1))
    write_tar(tmp_path / "b.tar", {"fine.jpg": encoded(1), "\udcff.jpg": encoded(2)})
    for text in (tmp_path / "a", tmp_path / "b.tar"):
        with pytest.raises(ImageError, match=r"the name '.*\\udcff\.jpg' is not UTF-8"):
            open_source(str(text))


def test_ranges() -> None:
    assert expand_ranges("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_ranges("{0..1}/{1..1}") == ["0/1", "1/1"] and expand_ranges("plain{}.jpg") == ["plain{}.jpg"]


def test_a_missing_shard_of_a_range_is_named(tmp_path: Path) -> None:
    for s in (0, 2):
        write_tar(tmp_path / f"train-{s}.tar", {"a.jpg": encoded(s)})
    with pytest.raises(SourceError, match=r"train-1\.tar: no such file or folder"):
        open_source(f"{tmp_path}/train-{{0..2}}.tar")
    write_tar(tmp_path / "train-{0..2}.tar", {"b.jpg": encoded(1)})
    assert open_source(f"{tmp_path}/train-{{0..2}}.tar").names == [f"{tmp_path}/train-{{0..2}}.tar/b.jpg"]


def test_linked_folders_are_looked_into_once(tmp_path: Path) -> None:
    """As in training."""
    for name in ("data/cat", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jpg").write_bytes(encoded(1))
    root = tmp_path / "data"
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root)
    names = [Path(name).relative_to(root).as_posix() for name in open_source(str(root)).names]
    assert names == ["cat/a.jpg", "dog/a.jpg"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    assert source.names == [str(tmp_path / "a.png")]
    with pytest.raises(OSError, match="it is a pipe or a device"):
        source.read(0)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out, it would take its images from the features, and from what a score is of, without a word."""
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.jpg").write_bytes(encoded(1))
    may_not_be_read(monkeypatch, "shut")
    with pytest.raises(PermissionError, match="shut"):
        open_source(str(tmp_path))


def test_refuses(tmp_path: Path) -> None:
    def said(text: object, match: str) -> None:
        with pytest.raises(SourceError, match=match):
            open_source(str(text))

    with pytest.raises(ImageError, match="'' is no path"):
        open_source("")
    said(tmp_path / "none", "no such file or folder; allowed: a folder of images, a list")
    said(tmp_path, "holds no image; looked for")
    (tmp_path / "x.txt").write_text("\n\n")
    said(tmp_path / "x.txt", "lists no image")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    said(tmp_path / "x.txt", "not a list of paths")
    (tmp_path / "x.bin").write_text("?")
    said(tmp_path / "x.bin", "x.bin; allowed: a folder, a list")
    (tmp_path / "x.tar.gz").write_text("?")
    said(tmp_path / "x.tar.gz", "compressed tar file; allowed: .tar")
    (tmp_path / "x.tar").write_bytes(b"not a tar file at all" * 100)
    said(tmp_path / "x.tar", "no readable tar file")
    write_tar(tmp_path / "x.tar", {"a.txt": b"?"})
    said(tmp_path / "x.tar", "holds no image")
    (tmp_path / "x.parquet").write_text("?")
    said(tmp_path / "x.parquet", "no readable parquet file")
    write_parquet(tmp_path / "x.parquet", {"label": [1, 2]})
    said(tmp_path / "x.parquet", "has the columns label: int64; allowed: one of images")
    said(tmp_path / "x.{tar,parquet}", "no such file")
    (tmp_path / "x.tar.gz").unlink()
    said(tmp_path / "x.[tp]ar*", "x.parquet; allowed: a folder, a list")
    said(tmp_path, "1 tar files, 1 parquet files; allowed: one kind")
