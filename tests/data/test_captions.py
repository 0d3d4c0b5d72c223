"""Captions come from folders, tables and arrays, each with the image it was written for."""

import json
import os

import numpy as np
import pytest
from tests.data.conftest import COLOUR, GREY, LABELS, stack, write_parquet, write_png

from ddim.data.captions import read_prompts
from ddim.data.dataset import Source
from ddim.data.named import NAMED
from ddim.data.sources import load_images
from ddim.errors import DataError


def three(folder, *names):
    for i, name in enumerate(names or ("a.png", "b.png", "c.png")):
        write_png(folder / name, GREY[i])


def captions_of(source, **options):
    return list(load_images(str(source), captions=True, **options).captions)


def test_captions_are_read_only_where_they_are_asked_for(tmp_path):
    three(tmp_path)
    (tmp_path / "a.txt").write_text("one of three")
    assert load_images(str(tmp_path)).captions is None


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_of_an_image_folder(tmp_path, name):
    three(tmp_path, "a.png", "deep/b.png", "c.png")
    rows = [("c.png", "last, with a comma"), ("deep/b.png", 'a "quoted" word'), ("./a.png", "été")]
    if name.endswith("csv"):
        lines = [
            "text,file_name",
            *('"' + text.replace('"', '""') + f'",{file}' for file, text in rows),
        ]
    else:
        lines = [json.dumps({"file_name": file, "text": text, "n": 1}) for file, text in rows]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert captions_of(tmp_path) == ["été", "last, with a comma", 'a "quoted" word']


def test_each_split_has_its_own_metadata_and_the_column_a_name(tmp_path):
    for split in ("train", "test"):
        three(tmp_path / split)
        lines = [
            json.dumps({"file_name": f"{n}.png", "said": [f"{split} {n}", "another"]})
            for n in "abc"
        ]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    assert captions_of(tmp_path, split="test", caption_column="said") == [
        "test a",
        "test b",
        "test c",
    ]
    with pytest.raises(
        DataError,
        match=(
            r"metadata\.jsonl must have columns file_name and text \(or --caption-column\); it has "
            r"file_name, said"
        ),
    ):
        captions_of(tmp_path)


def test_captions_in_text_files_beside_the_images(tmp_path):
    three(tmp_path)
    for name, text in zip("abc", ("one\n", "", " two "), strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    assert captions_of(tmp_path) == ["one", "", "two"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(
        DataError,
        match=(
            r"^1 of 3 images of .* have no caption: .*b\.txt is missing; an empty file will do\.$"
        ),
    ):
        captions_of(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"is not UTF-8 text \(.*\); save it as UTF-8"):
        captions_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            '{"file_name": "a.png", "text": "x"}',
            r"has no row for 2 of 3 images of .*, such as .*b\.png; add it, or move the image away",
        ),
        (
            '{"file_name": "a.png", "text": null}',
            r"row 1 of .*metadata\.jsonl has no caption but None; an empty text will do",
        ),
        (
            '{"file": "a.png", "text": "x"}',
            r"must have columns file_name and text \(or --caption-column\); it has file, text",
        ),
        ('{"file_name"', r"metadata\.jsonl cannot be read \(.*\); write one row per image"),
        ("", r"must hold one row per image with file_name and a caption; got nothing"),
        ("[1]", r"must hold one row per image with file_name and a caption; got other values"),
    ],
)
def test_messages_of_metadata(tmp_path, content, text):
    three(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=text):
        captions_of(tmp_path)


def test_captions_of_a_table(tmp_path, datasets):
    path = write_parquet(
        datasets,
        tmp_path / "a.parquet",
        image=GREY,
        caption=list("abcdef"),
        other=[[c, "x"] for c in "uvwxyz"],
        n=[1, 2] * 3,
    )
    assert captions_of(path) == list("abcdef")
    assert captions_of(path, caption_column="other") == list("uvwxyz")
    with pytest.raises(DataError, match=r"has no column 'said'; it has image, caption, other, n"):
        captions_of(path, caption_column="said")
    with pytest.raises(
        DataError, match=r"row 0 of column 'n' of .* has no caption but 1; an empty text will do"
    ):
        captions_of(path, caption_column="n")


def test_captions_of_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, captions=np.array(list("abcdef")))
    assert captions_of(tmp_path / "a.npz") == list("abcdef")
    np.savez(tmp_path / "a.npz", images=GREY, captions=np.array(["x"]))
    with pytest.raises(
        DataError, match="holds 6 images but 1 captions; there must be one caption per image"
    ):
        captions_of(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=GREY, captions=LABELS)
    with pytest.raises(
        DataError,
        match=r"captions of .*a\.npz must be text, one per image; got int64 of shape \[6\]",
    ):
        captions_of(tmp_path / "a.npz")


@pytest.mark.parametrize("source", ["digits", "folder", "npz", "parquet"])
def test_data_without_captions(tmp_path, datasets, source):
    three(tmp_path / "folder")
    np.savez(tmp_path / "npz.npz", images=GREY)
    write_parquet(datasets, tmp_path / "parquet.parquet", image=GREY)
    place = {"digits": "digits", "folder": tmp_path / "folder"}.get(
        source, tmp_path / f"{source}.{source}"
    )
    with pytest.raises(
        DataError,
        match=(
            r"has no captions; put metadata\.jsonl \(with file_name and text\) or NAME\.txt beside"
        ),
    ):
        captions_of(place)


def test_a_named_source_may_have_captions(monkeypatch):
    named = Source(COLOUR, LABELS, tuple("abc"), tuple("uvwxyz"))
    monkeypatch.setitem(NAMED, "drawn", lambda split: named)
    assert captions_of("drawn") == list("uvwxyz")
    assert load_images("drawn").captions is None
    assert np.array_equal(stack(load_images("drawn")), COLOUR.transpose(0, 3, 1, 2))


def test_the_first_caption_of_a_picture_is_taken_and_the_others_are_told(tmp_path):
    three(tmp_path, "a.png", "deep/b.png")
    row = '{{"file_name": "{}", "text": "{}"}}\n'
    first = [("a.png", "one"), ("a.png", "two"), ("a.png", "three"), ("deep/b.png", "b")]
    (tmp_path / "metadata.jsonl").write_text("".join(row.format(*r) for r in first))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,four\nnone.png,five\n")
    (tmp_path / "deep" / "metadata.jsonl").write_text(row.format("b.png", "six"))
    data = load_images(str(tmp_path), captions=True)
    assert list(data.captions) == ["one", "b"]
    assert "rows that name an image again are left out: 4." in data.notes[0]
    assert "rows that name an image that is not there are left out: 1." in data.notes[1]


def test_a_caption_file_of_several_lines_is_its_first_line(tmp_path):
    three(tmp_path)
    for name, text in (("a", "one\ntwo\n"), ("b", "\nthree\r\nfour"), ("c", "")):
        (tmp_path / f"{name}.txt").write_text(text)
    data = load_images(str(tmp_path), captions=True)
    assert list(data.captions) == ["one", "three", ""]
    assert data.notes == (f"captions of {tmp_path} of several lines are read by the first: 2.",)


def test_nested_metadata_are_refused_in_a_sentence(tmp_path):
    three(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        load_images(str(tmp_path), captions=True)


def test_a_pipe_of_prompts_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="it is a folder, a pipe or a device"):
        read_prompts([str(tmp_path / "a.txt")])
