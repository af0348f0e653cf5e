"""Tar shards and folders from strangers: what is read, what is left out and why, and that nothing escapes."""

import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest
from captioned_tars import picture, write_tar
from PIL import Image

from unclip_jax.data import archives, captions, folders, image_text, images
from unclip_jax.data.records import MAX_PICTURE_BYTES, MAX_TEXT_BYTES, Bad, Ignored, Record, Unit
from unclip_jax.errors import InputError


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(path):
    items = list(archives.read_tar(path))
    return tuple([item for item in items if isinstance(item, kind)] for kind in (Record, Bad, Ignored))


# ---------------------------------------------------------------- tar shards


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_examples_of_every_spelling(tmp_path, tar_format):
    members = [
        ("0.jpg", b"one"),
        ("0.txt", "a café\n".encode()),
        ("1.json", b'{"caption": "two", "url": "x"}'),
        ("1.PNG", b"two!"),
        ("x/2.webp", b""),
        ("x/2.txt", b"\xef\xbb\xbfthree"),
        ("y/2.jpeg", b"z" * 513),
        ("y/2.json", b'{"text": "four"}'),
        ("3.jpg", b"5"),
        ("3.json", b'{"caption": null}'),
        ("3.txt", b"text goes before json"),
    ]
    records, bad, ignored = read(write_tar(tmp_path / "a.tar", members, tar_format))
    assert [(r.source, r.key, r.image, r.caption) for r in records] == [
        ("a.tar", "0", b"one", "a café\n"),
        ("a.tar", "1", b"two!", "two"),
        ("a.tar", "2", b"", "three"),
        ("a.tar", "2", b"z" * 513, "four"),
        ("a.tar", "3", b"5", "text goes before json"),
    ]
    assert not bad and not ignored


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, tar_format):
    members = [(f"{'d' * 90}/{'k' * 120}.jpg", b"1"), (f"{'d' * 90}/{'k' * 120}.txt", b"long")]
    members += [("ключ.jpg", b"2"), ("ключ.txt", b"foreign"), ("plain.jpg", b"3"), ("plain.txt", b"plain")]
    records, bad, _ = read(write_tar(tmp_path / "a.tar", members, tar_format))
    assert [(r.key, r.caption) for r in records] == [("k" * 120, "long"), ("ключ", "foreign"), ("plain", "plain")]
    assert not bad


def test_hostile_members_are_passed_over_and_nothing_is_written(tmp_path):
    good = [("good.jpg", b"g"), ("good.txt", b"good")]
    members = [
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        special("null.jpg", tarfile.CHRTYPE),
        special("disk.jpg", tarfile.BLKTYPE),
        special("pipe.txt", tarfile.FIFOTYPE),
        special("folder.jpg", tarfile.DIRTYPE),
        ("evil.pyd", b"import os"),
        ("evil.pickle", b"cos\nsystem\n."),
        ("evil.pth", b"x"),
        ("._mac.jpg", b"x"),
        (".jpg", b"x"),
        ("seg.mask.png", b"x"),
        *good,
        ("../../escape.jpg", b"u"),
        ("../../escape.txt", b"up"),
        ("/tmp/absolute.jpg", b"a"),
        ("/tmp/absolute.txt", b"abs"),
    ]
    (tmp_path / "in").mkdir()
    path = write_tar(tmp_path / "in" / "a.tar", members)
    records, bad, ignored = read(path)
    assert [(r.key, r.image) for r in records] == [("good", b"g"), ("escape", b"u"), ("absolute", b"a")]
    assert not bad
    assert [item.name for item in ignored] == [
        *("link.jpg", "hard.jpg", "null.jpg", "disk.jpg", "pipe.txt"),
        *("evil.pyd", "evil.pickle", "evil.pth", "._mac.jpg", ".jpg", "seg.mask.png"),
    ]
    assert sorted(os.listdir(tmp_path)) == ["in"] and os.listdir(tmp_path / "in") == ["a.tar"]
    assert not os.path.exists("/tmp/absolute.jpg")


BAD_EXAMPLES = {
    "no caption": ([("k.jpg", b"x")], "no caption"),
    "no picture": ([("k.txt", b"x")], "no picture"),
    "two pictures": ([("k.jpg", b"x"), ("k.png", b"x"), ("k.txt", b"x")], "more than one picture"),
    "one member twice": ([("k.jpg", b"x"), ("k.jpg", b"y"), ("k.txt", b"x")], "two members .jpg"),
    "caption not UTF-8": ([("k.jpg", b"x"), ("k.txt", b"\xff\xfe\x80")], "not UTF-8"),
    "invalid JSON": ([("k.jpg", b"x"), ("k.json", b"{'caption': 1}")], "JSON is not valid"),
    "deep JSON": ([("k.jpg", b"x"), ("k.json", b"[" * 200_000)], "JSON is not valid"),
    "JSON of huge number": ([("k.jpg", b"x"), ("k.json", b'{"caption": ' + b"9" * 50_000 + b"}")], "JSON is not valid"),
    "JSON list": ([("k.jpg", b"x"), ("k.json", b'["caption"]')], "not an object"),
    "JSON without caption": ([("k.jpg", b"x"), ("k.json", b'{"title": "x"}')], "no text in a field 'caption'"),
    "caption no text": ([("k.jpg", b"x"), ("k.json", b'{"caption": 7}')], "no text in a field 'caption'"),
    "huge caption": ([("k.jpg", b"x"), ("k.txt", bytes(MAX_TEXT_BYTES + 1))], "at most"),
    "huge picture": ([("k.jpg", bytes(MAX_PICTURE_BYTES + 1)), ("k.txt", b"x")], "at most"),
}


@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_bad_example_is_named_and_its_neighbours_are_kept(tmp_path, name):
    members, reason = BAD_EXAMPLES[name]
    before, after = [("a.jpg", b"a"), ("a.txt", b"a")], [("z.jpg", b"z"), ("z.txt", b"z")]
    records, bad, _ = read(write_tar(tmp_path / "s.tar", before + members + after))
    assert [r.key for r in records] == ["a", "z"]
    assert [(b.source, b.key) for b in bad] == [("s.tar", "k")] and reason in bad[0].reason


def test_key_that_comes_again_later_is_bad(tmp_path):
    pair = [("k.jpg", b"x"), ("k.txt", b"x")]
    records, bad, _ = read(write_tar(tmp_path / "s.tar", pair + [("m.jpg", b"m"), ("m.txt", b"m")] + pair))
    assert [r.key for r in records] == ["k", "m"] and "comes twice" in bad[0].reason


def test_every_truncation_keeps_the_good_and_names_the_shard(tmp_path):
    members = [(f"{i}.{e}", data) for i in range(3) for e, data in (("jpg", b"p" * 700), ("txt", b"caption"))]
    whole = pathlib.Path(write_tar(tmp_path / "s.tar", members)).read_bytes()
    example = 2 * 512 + 1024 + 512  # two headers, a picture of two blocks, a caption of one
    for length in range(0, 3 * example + 512, 256):
        (tmp_path / "s.tar").write_bytes(whole[:length])
        records, bad, _ = read(str(tmp_path / "s.tar"))
        assert len(records) >= length // example
        if length < 3 * example:
            assert sum(b.key == "" and "damaged" in b.reason for b in bad) == 1


def test_damage_in_mid_archive_is_not_taken_for_its_end(tmp_path):
    members = [(f"{i}.{e}", b"x") for i in range(4) for e in ("jpg", "txt")]
    data = bytearray(pathlib.Path(write_tar(tmp_path / "s.tar", members)).read_bytes())
    data[4 * 1024 : 4 * 1024 + 100] = b"\xa5" * 100  # the header of member 4
    (tmp_path / "s.tar").write_bytes(data)
    records, bad, _ = read(str(tmp_path / "s.tar"))
    assert [r.key for r in records] == ["0", "1"] and "no tar header at byte 4096" in bad[0].reason


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"zzzzzzzzzzz\0"]
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_lying_sizes(tmp_path, size, kind):
    header = bytearray(tarfile.TarInfo("k.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + bytes(2048))
    records, bad, _ = read(str(tmp_path / "s.tar"))
    assert not records and len(bad) == 1 and "damaged" in bad[0].reason


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", bytes(range(256)) * 8, b"\x1f\x8b" + b"z" * 2000])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "s.tar").write_bytes(data)
    records, bad, _ = read(str(tmp_path / "s.tar"))
    assert not records and len(bad) == 1 and "damaged" in bad[0].reason


def test_random_damage_raises_nothing(tmp_path):
    members = [(f"{i}.{e}", b"x" * 600) for i in range(3) for e in ("jpg", "txt")]
    members.insert(2, ("n" * 200 + ".jpg", b"x"))
    whole = pathlib.Path(write_tar(tmp_path / "s.tar", members)).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 20):
            data[at] = rng.integers(256)
        (tmp_path / "s.tar").write_bytes(data)
        read(str(tmp_path / "s.tar"))


# ---------------------------------------------------------------- folders


def read_folder(path, entries_per_chunk=2):
    units = folders.find_chunks(str(path), entries_per_chunk=entries_per_chunk)
    assert [unit.index for unit in units] == list(range(len(units)))
    items = [item for unit in units for item in folders.read_entries(unit)]
    return [i for i in items if isinstance(i, Record)], [i for i in items if isinstance(i, Bad)], units


@pytest.mark.parametrize("entries_per_chunk", [1, 2, 3, 100])
def test_jsonl(tmp_path, entries_per_chunk):
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    lines = [
        "\ufeff" + json.dumps({"file_name": "a.jpg", "caption": "A é"}, ensure_ascii=False),
        "",
        json.dumps({"file": "b.jpg", "text": "B"}),
        "  " + json.dumps({"file_name": "./c.jpg", "caption": "C"}) + "\r",
        json.dumps({"file_name": "a.jpg", "caption": "A again"}),
        json.dumps({"file_name": "d.jpg", "caption": "no newline at the end"}),
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    records, bad, units = read_folder(tmp_path / "captions.jsonl", entries_per_chunk)
    assert [(r.image, r.caption) for r in records] == [
        *((b"a", "A é"), (b"b", "B"), (b"c", "C"), (b"a", "A again"), (b"d", "no newline at the end"))
    ]
    assert not bad and sum(unit.entries for unit in units) == 5 and len(units) == -(-5 // entries_per_chunk)


@pytest.mark.parametrize("entries_per_chunk", [1, 2, 100])
def test_csv_with_quotes_and_line_breaks_inside(tmp_path, entries_per_chunk):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    text = 'id,file_name,caption\r\n1,a.png,"one, ""two""\r\nthree"\r\n\r\n2,b.png,plain\r\n3,c.png,"x\ny\nz"\r\n'
    (tmp_path / "captions.csv").write_text("\ufeff" + text, encoding="utf-8", newline="")
    records, bad, _ = read_folder(tmp_path / "captions.csv", entries_per_chunk)
    assert [(r.key, r.caption) for r in records] == [
        *(("a.png", 'one, "two"\r\nthree'), ("b.png", "plain"), ("c.png", "x\ny\nz"))
    ]
    assert not bad


def test_bad_entries_are_named_by_line(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    (tmp_path / "in" / "dir.jpg").mkdir()
    (tmp_path / "in" / "ok.jpg").write_bytes(b"ok")
    with open(tmp_path / "in" / "huge.jpg", "wb") as file:
        file.truncate(MAX_PICTURE_BYTES + 1)
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "..\\secret.jpg", "gone.jpg"]
    names += ["pipe.jpg", "dir.jpg", "notes.txt", "nul\0.jpg", "huge.jpg", "\ud800.jpg", "n" * 300 + ".jpg"]
    lines = [json.dumps({"file_name": name, "caption": "x"}).encode() for name in names]
    lines += [
        b"{",
        b'{"file_name": "ok.jpg"}',
        b'{"caption": "x"}',
        b'{"file_name": "ok.jpg", "caption": "\xff"}',
        b"7",
    ]
    lines += [b'{"file_name": "ok.jpg", "caption": "' + b"x" * 3 * MAX_TEXT_BYTES + b'"}']
    lines += [b'{"file_name": "ok.jpg", "caption": "fine"}']
    (tmp_path / "in" / "captions.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    records, bad, _ = read_folder(tmp_path / "in" / "captions.jsonl", entries_per_chunk=5)
    assert [(r.image, r.caption) for r in records] == [(b"ok", "fine")]
    assert [b.key for b in bad] == [f"line {i + 1}" for i in range(len(lines) - 1)]
    reasons = [b.reason for b in bad]
    assert all("outside the folder" in reason for reason in reasons[:4]) and "cannot be read" in reasons[4]
    assert all(len(reason) < 300 for reason in reasons)


def test_csv_with_broken_quotes_goes_on(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    rows = ["file_name,caption", "a.png,one", 'a.png,"never closed ' + "x" * 200_000]
    rows += ["a.png,lost in the quotes"] + ["a.png,found again"] * 3
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    records, bad, _ = read_folder(tmp_path / "captions.csv", entries_per_chunk=2)
    assert records[0].caption == "one" and records[-1].caption == "found again"
    assert len(bad) == 1 and "no valid CSV" in bad[0].reason


@pytest.mark.parametrize("text", ["", "\n", "path,words\na,b\n", "file_name\na\n", "file_name,caption\n"])
def test_csv_without_columns_or_entries(tmp_path, text):
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(InputError, match="has to name a column|no entries"):
        folders.find_chunks(str(tmp_path / "captions.csv"), entries_per_chunk=2)


# ---------------------------------------------------------------- conversion


def test_pictures_within_the_size_keep_their_bytes():
    for kind in ("PNG", "JPEG", "WEBP"):
        data = picture(size=(20, 30), kind=kind)
        for size in (0, 20, 64):
            settings = image_text.Settings(size=size)
            assert image_text.convert(Record("s", "k", data, " a  b "), settings) == (data, "a b")


@pytest.mark.parametrize("kind, expected", [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "jpeg")])
def test_larger_pictures_shrink_to_the_shorter_side(kind, expected):
    data, _ = image_text.convert(
        Record("s", "k", picture((200, 50, 100), (90, 60), kind), "x"), image_text.Settings(size=20)
    )
    assert images.read_header(data) == (expected, 30, 20)
    assert np.abs(images.decode(data).astype(int) - (200, 50, 100)).max() <= 6


def test_shrinking_is_antialiased():
    """Stripes of one pixel average to grey; nearest-neighbour would keep black or white."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    data, _ = image_text.convert(Record("s", "k", images.encode_png(stripes), "x"), image_text.Settings(size=16))
    assert np.abs(images.decode(data)[2:-2, 2:-2].astype(int) - 127).max() <= 4


def test_orientation_is_part_of_a_shrunk_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60)).save(buffer, "JPEG", exif=exif)
    data, _ = image_text.convert(Record("s", "k", buffer.getvalue(), "x"), image_text.Settings(size=20))
    assert images.read_header(data) == ("jpeg", 20, 30)


@pytest.mark.parametrize("caption", ["", " \n", "\0\x01"])
def test_empty_captions_are_refused(caption):
    with pytest.raises(InputError, match="caption is empty"):
        image_text.convert(Record("s", "k", picture(), caption), image_text.Settings())


def test_captions_are_cleaned():
    caption = "Cafe\u0301 \ud800" + "word " * 10_000
    _, stored = image_text.convert(Record("s", "k", picture(), caption), image_text.Settings())
    assert stored == captions.clean(caption) and len(stored) <= captions.MAX_CHARACTERS


def test_validation_share_is_a_function_of_the_name():
    splits = [image_text.split_of("a.tar", f"{i:06d}", validation_percent=10) for i in range(5000)]
    # 500 expected, standard deviation of the binomial 21.
    assert 400 < splits.count("validation") < 600
    assert {image_text.split_of("a.tar", str(i), validation_percent=0) for i in range(100)} == {"train"}


def test_unit_without_examples_leaves_a_report_and_no_shard(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("k.jpg", b"no picture"), ("k.txt", b"x")])
    unit = Unit(index=3, kind="tar", path=path)
    report = image_text.write_unit(unit, image_text.Settings(), directory=str(tmp_path))
    assert report.seen == 1 and report.records == {"train": 0, "validation": 0}
    assert sorted(os.listdir(tmp_path)) == ["0000003.json", "s.tar"]
    assert image_text.read_report(str(tmp_path), unit) == report
