"""Parquet files and data sets of the hub."""

import json
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.conftest import (
    COLOUR,
    GREY,
    LABELS,
    encode,
    labels,
    stack,
    write_parquet,
    write_png,
)

from ddim.data.sources import load_images
from ddim.errors import DataError


def test_parquet_file(tmp_path, datasets):
    names = datasets.ClassLabel(names=["cat", "dog", "eel"])
    path = write_parquet(
        datasets, tmp_path / "a.parquet", image=COLOUR, label=(names, LABELS.tolist())
    )
    data = load_images(str(path))
    assert (data.name, data.class_names, labels(data)) == (
        str(path),
        ("cat", "dog", "eel"),
        LABELS.tolist(),
    )
    assert (data.channels, data.resolution) == (3, (5, 7))
    assert np.array_equal(stack(data), COLOUR.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("inside", ["", "data"])
def test_parquet_folder_with_splits(tmp_path, datasets, inside):
    whole, words = datasets.Value("int64"), datasets.Value("string")
    write_parquet(
        datasets,
        tmp_path / "set" / inside / "train-00000-of-00002.parquet",
        image=GREY[:2],
        other=(whole, [7, 7]),
    )
    write_parquet(
        datasets,
        tmp_path / "set" / inside / "train-00001-of-00002.parquet",
        image=GREY[2:4],
        other=(whole, [7, 7]),
    )
    write_parquet(
        datasets,
        tmp_path / "set" / inside / "test-00000-of-00001.parquet",
        image=GREY[4:],
        label=(words, ["b", "a"]),
    )
    train, test = (
        load_images(str(tmp_path / "set")),
        load_images(str(tmp_path / "set"), split="test"),
    )
    assert np.array_equal(stack(train)[:, 0], GREY[:4])
    assert train.class_names is None
    assert np.array_equal(stack(test)[:, 0], GREY[4:])
    assert (test.class_names, labels(test)) == (("a", "b"), [1, 0])
    with pytest.raises(DataError, match=r"has no split 'val'; it has test, train\."):
        load_images(str(tmp_path / "set"), split="val")


def test_columns_by_name(tmp_path, datasets):
    write_parquet(
        datasets,
        tmp_path / "a.parquet",
        scan=[encode(a) for a in GREY],
        kind=LABELS.tolist(),
        label=[[0, 1]] * 6,
    )
    data = load_images(str(tmp_path / "a.parquet"), image_column="scan", label_column="kind")
    assert np.array_equal(stack(data)[:, 0], GREY)
    assert (labels(data), data.class_names) == (LABELS.tolist(), ("0", "1", "2"))
    unasked = load_images(str(tmp_path / "a.parquet"), image_column="scan")
    assert unasked.class_names is None  # lists are not labels
    with pytest.raises(DataError, match=r"has columns scan, kind, label, and none is called image"):
        load_images(str(tmp_path / "a.parquet"))
    for wrong in ({"image_column": "photo"}, {"label_column": "photo"}):
        with pytest.raises(DataError, match=r"has no column 'photo'; it has scan, kind, label\."):
            load_images(str(tmp_path / "a.parquet"), **wrong)
    with pytest.raises(DataError, match="column 'kind' of .* does not hold images"):
        load_images(str(tmp_path / "a.parquet"), image_column="kind")
    with pytest.raises(
        DataError, match="labels of .* must be whole numbers, one per image; got int64 of shape"
    ):
        load_images(str(tmp_path / "a.parquet"), image_column="scan", label_column="label")


@pytest.mark.parametrize("options", [{}, {"channels": 1, "resolution": 4}])
@pytest.mark.parametrize(
    ("row", "text"), [(None, "is empty; remove its row"), (b"no image", "cannot be decoded")]
)
def test_a_row_without_a_usable_image_is_told_at_once(tmp_path, datasets, row, text, options):
    write_parquet(datasets, tmp_path / "a.parquet", image_bytes=[encode(GREY[0]), row])
    with pytest.raises(DataError, match=f"image 1 of .* {text}"):
        load_images(str(tmp_path / "a.parquet"), image_column="image_bytes", **options)


def test_a_table_of_several_sizes_is_told_at_once(tmp_path, datasets):
    images = [encode(a) for a in (*GREY, GREY[0, :4])]
    write_parquet(datasets, tmp_path / "a.parquet", image=images)
    with pytest.raises(DataError, match="image 6 of .* is 7x4 and the first image of .* 7x5"):
        load_images(str(tmp_path / "a.parquet"))


def named_rows(path, *values):
    """A table of ``datasets``' images with these rows, of which none is opened."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pa.schema([("image", kind)], metadata={"huggingface": json.dumps(features)})
    pq.write_table(pa.table({"image": list(values)}, schema=schema), path)


@pytest.mark.parametrize(
    "place", ["{}/secret.png", "ftp://host/a.png", "hf://datasets/a/b/c.png", "https://host/a.png"]
)
def test_a_row_that_names_a_picture_in_place_of_holding_it_is_refused(
    tmp_path, datasets, place, no_socket
):
    write_png(tmp_path / "secret.png", GREY[0])
    place, path = place.format(tmp_path), tmp_path / "a.parquet"
    named_rows(path, {"bytes": encode(GREY[0]), "path": place})  # the name says nothing here
    assert np.array_equal(stack(load_images(str(path)))[0, 0], GREY[0])
    message = "names pictures by a path or an address in place of holding them, such as"
    named_rows(path, {"bytes": encode(GREY[0]), "path": None}, {"bytes": None, "path": place})
    for options in ({}, {"channels": 1, "resolution": 5}):
        with pytest.raises(DataError, match=message):
            load_images(str(path), **options)
    pq.write_table(pa.table({"image": [place], "label": [0]}), path)
    with pytest.raises(DataError, match=message):
        load_images(str(path))
    pq.write_table(pa.table({"image": [encode(GREY[0])], "label": [place]}), path)
    assert load_images(str(path)).class_names == (place,)


def test_a_set_of_the_hub_reads_what_was_fetched_and_no_other_file(datasets, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    inside, outside = write_png(cache / "a.png", GREY[0]), write_png(tmp_path / "b.png", GREY[1])
    (cache / "link.png").symlink_to(outside)
    for path in (inside, outside, cache / "link.png", cache / ".." / "b.png"):
        table = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(path)}]})
        table = table.cast_column("image", datasets.Image())
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, table=table, **o: table)
        if path == inside:
            assert np.array_equal(stack(load_images("owner/set"))[0, 0], GREY[0])
        else:
            with pytest.raises(DataError, match="image 0 of owner/set is no picture but the name"):
                load_images("owner/set")


def test_a_parquet_with_an_old_time_is_read_anew(tmp_path, datasets):
    path = tmp_path / "a.parquet"
    for images in (GREY[:3], GREY[3:]):
        write_parquet(datasets, path, image=images)
        os.utime(path, (1_600_000_000, 1_600_000_000))
        assert np.array_equal(stack(load_images(str(path)))[:, 0], images)


def test_a_card_beside_tables_chooses_no_data(tmp_path, datasets, no_socket):
    write_parquet(datasets, tmp_path / "set" / "train-0.parquet", image=GREY)
    card = "---\nconfigs:\n- config_name: default\n  data_files: https://host/x.parquet\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    assert len(load_images(str(tmp_path / "set"))) == 6


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.parquet", "x::y.parquet"])
def test_a_name_stands_for_itself(tmp_path, datasets, name, no_socket):
    write_parquet(datasets, tmp_path / "a.parquet", image=COLOUR)
    write_parquet(datasets, tmp_path / "b.parquet", image=GREY).rename(tmp_path / name)
    assert np.array_equal(stack(load_images(str(tmp_path / name)))[:, 0], GREY)


ROWS = 1000


def repeated(path, compression):
    """A table of few bytes that holds a picture of a megabyte many times over."""
    big = pa.array([encode(GREY[0]) + bytes(1 << 20)])
    if compression == "snappy":  # rows are numbers of the one value, which nothing counts
        column = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), big)
        options = {"use_dictionary": True}
    else:
        column = pa.chunked_array([big] * 64)
        options = {"use_dictionary": False}
    pq.write_table(
        pa.table({"image": column}), path, compression=compression, store_schema=False, **options
    )
    return path


@pytest.mark.parametrize(
    ("compression", "verb"), [("snappy", "decodes to more"), ("zstd", "claims more")]
)
def test_a_small_table_that_holds_too_much_takes_no_memory(
    tmp_path, datasets, monkeypatch, compression, verb
):
    path = repeated(tmp_path / "a.parquet", compression)
    bound = 1 << 20 if compression == "zstd" else 1 << 28
    monkeypatch.setattr("ddim.data.parquet._LEAST_BOUND", bound)
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(
            DataError, match=rf"{verb} than the \d+ bytes that are decoded of a table"
        ):
            load_images(str(path))
    finally:
        pa.set_memory_pool(usual)
    # What only claims too much is refused before anything is decoded.
    assert pool.max_memory() < (1 << 20 if compression == "zstd" else 1 << 28)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_a_table_that_claims_less_than_it_holds_is_stopped(tmp_path, datasets, monkeypatch):
    path = repeated(tmp_path / "a.parquet", "zstd")
    monkeypatch.setattr("ddim.data.parquet._LEAST_BOUND", 1 << 24)
    monkeypatch.setattr("ddim.data.parquet._check_claims", lambda *facts: None)
    with pytest.raises(DataError, match="decodes to more than the"):
        load_images(str(path))


def test_words_of_few_kinds_are_read_as_words(tmp_path, datasets):
    """A column of categories, as pandas writes it, is a dictionary."""
    words = pa.array(["cat", "dog"] * 3).dictionary_encode()
    images = [encode(a) for a in GREY]
    pq.write_table(pa.table({"image": images, "label": words}), tmp_path / "a.parquet")
    data = load_images(str(tmp_path / "a.parquet"))
    assert (data.class_names, labels(data)) == (("cat", "dog"), [0, 1] * 3)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/0.parquet", "test/0.parquet"),
        ("data/train-00000.parquet", "data/test-00000.parquet"),
        ("plain/Train/0.parquet", "plain/Test/0.parquet"),
        ("data/training/part-0.parquet", "data/testing/part-0.parquet"),
        ("train/validation-free.parquet", "validation/train-free.parquet"),
    ],
)
def test_tables_in_subfolders_are_split_by_a_word_of_their_path(tmp_path, datasets, train, test):
    write_parquet(datasets, tmp_path / "set" / train, image=GREY[:4])
    write_parquet(datasets, tmp_path / "set" / test, image=GREY[4:])
    write_png(tmp_path / "set" / "preview.png", COLOUR[0])
    split = "validation" if "validation" in test else "test"
    data = load_images(str(tmp_path / "set"))
    assert np.array_equal(stack(data)[:, 0], GREY[:4])
    assert data.notes == (
        f"pictures of {tmp_path / 'set'} that lie beside its tables are left out: 1, such as "
        f"{tmp_path / 'set' / 'preview.png'}.",
    )
    data = load_images(str(tmp_path / "set"), split=split)
    assert np.array_equal(stack(data)[:, 0], GREY[4:])


def test_tables_of_no_split_and_of_two_are_told(tmp_path, datasets):
    for name in ("train", "test", "train-test", "other"):
        write_parquet(datasets, tmp_path / "set" / f"{name}.parquet", image=GREY[:2])
    write_parquet(datasets, tmp_path / "set" / "old" / "train.parquet", image=GREY)
    data = load_images(str(tmp_path / "set"))
    what = f"tables of {tmp_path / 'set'} that are"
    assert len(data) == 2
    assert data.notes == (
        f"{what} in its folders are left out: 1, such as old/train.parquet.",
        f"{what} of no split are left out: 2, such as other.parquet.",
    )


@pytest.mark.parametrize("content", [b"PAR1 and no more", b""])
def test_damaged_parquet(tmp_path, datasets, capfd, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(
        DataError,
        match=r"a\.parquet cannot be read as parquet \(.*\); check the file, or write it again\.",
    ):
        load_images(str(tmp_path / "a.parquet"))
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()


@pytest.mark.parametrize("source", ["owner/set", "plain", "owner/set-v1.0"])
def test_a_hub_data_set_is_asked_for_by_its_id_and_split(datasets, monkeypatch, source):
    asked = []
    table = datasets.Dataset.from_dict(
        {"img": [encode(a) for a in GREY], "fine_label": LABELS.tolist()}
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or table
    )
    data = load_images(source, split="validation")
    assert asked == [((source,), {"split": "validation"})]
    assert (data.name, labels(data)) == (source, LABELS.tolist())
    assert np.array_equal(stack(data)[:, 0], GREY)


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (
            "owner/set",
            ConnectionError("Couldn't reach 'owner/set' on the Hub (LocalEntryNotFoundError)"),
            (
                r"^there is no folder or file 'owner/set' here, and the hub cannot be reached \(no "
                r"route to the hub\); check the path"
            ),
        ),
        (
            "fashion-mnist",
            ConnectionError("no route"),
            (
                "^'fashion-mnist' is not on this machine, and the hub cannot be reached .*; "
                "install Debian's package dataset-fashion-mnist"
            ),
        ),
        (
            "owner/set",
            FileNotFoundError("Dataset 'owner/set' doesn't exist"),
            "is neither a path that exists nor a hub data set open to you",
        ),
        (
            "owner/set",
            ValueError("Unknown split \"train\". Should be one of ['all']."),
            r"owner/set has no split 'train' \(.*\['all'\]\)",
        ),
        (
            "owner/set",
            ValueError("Config name is missing.\nPick one"),
            r"owner/set cannot be opened \(Config name is missing\); see its page",
        ),
    ],
)
def test_messages_of_the_hub(tmp_path, datasets, monkeypatch, source, error, text):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("DDIM_FASHION_MNIST", raising=False)
    monkeypatch.setattr("ddim.data.named.FASHION_MNIST_FOLDER", str(tmp_path / "none"))
    with pytest.raises(DataError, match=text):
        load_images(source)


class ConnectError(Exception):
    """As the hub's client has it, of no built-in kind."""


ConnectError.__module__ = "httpx2"


@pytest.mark.parametrize(
    ("error", "offline"),
    [(ConnectError("no name"), True), (TimeoutError(), True), (ValueError("gated"), False)],
)
def test_a_hub_that_cannot_be_reached_is_tried_once(datasets, monkeypatch, error, offline):
    """Its libraries would go on for half a minute, with a line of a warning a try; what they have
    in their cache they give offline too."""
    import huggingface_hub

    constants, seen = huggingface_hub.constants, []

    def refuse(*args, **options):
        raise error

    def load(*args, **options):
        seen.append(constants.HF_HUB_OFFLINE)
        return datasets.Dataset.from_dict({"image": [encode(a) for a in GREY]})

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_images("nothere")) == 6
    assert seen == [offline]
    assert constants.HF_HUB_OFFLINE is False


def test_a_name_that_is_neither_here_nor_reached_says_so_at_once(datasets, monkeypatch, caplog):
    """With the libraries themselves, which find no hub in a fraction of a second."""
    began = time.perf_counter()
    with pytest.raises(
        DataError,
        match=(
            r"^there is no folder or file 'nothere' here, and the hub cannot be reached \(no route"
        ),
    ):
        load_images("nothere")
    assert time.perf_counter() - began < 5
    assert "Retry" not in caplog.text


def test_tables_that_are_not_all_there_and_columns_that_are_left_out_are_told(tmp_path, datasets):
    for place in (0, 2):
        columns = {"image": GREY[:3], "mask": GREY[:3], "text": [["a", "b"], ["c"], ["d", "e"]]}
        write_parquet(datasets, tmp_path / "set" / f"train-0000{place}-of-00005.parquet", **columns)
    assert load_images(str(tmp_path / "set"), captions=True).notes == (
        f"{tmp_path / 'set'} has 2 of the 5 tables that their names count.",
        f"{tmp_path / 'set'} has images in image, mask; image is read.",
        f"images of {tmp_path / 'set'} with several captions have the first: 4.",
    )
