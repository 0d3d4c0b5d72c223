"""Parquet files and data sets of the hub."""

import time

import numpy as np
import pytest
from tests.data.conftest import COLOUR, GREY, LABELS, encode, labels, stack, write_parquet

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


def test_rows_without_a_usable_image(tmp_path, datasets):
    write_parquet(
        datasets, tmp_path / "a.parquet", image_bytes=[encode(GREY[0]), None, b"no image"]
    )
    data = load_images(str(tmp_path / "a.parquet"), image_column="image_bytes")
    with pytest.raises(DataError, match="image 1 of .* is empty; remove its row"):
        data[1]
    with pytest.raises(DataError, match="image 2 of .* cannot be decoded"):
        data[2]


def test_damaged_parquet(tmp_path, datasets):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        DataError,
        match=r"a\.parquet cannot be read as parquet \(.*\); check the file, or write it again\.",
    ):
        load_images(str(tmp_path / "a.parquet"))


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
