import hashlib
import shutil

import diffusers
import pytest
import safetensors.torch
import torch
from tests.conftest import edit

from ddim.configuration import noise_schedule
from ddim.errors import CheckpointError
from ddim.models import checkpoints
from ddim.models.checkpoints import (
    embedded_models,
    find_model,
    has_scheduler,
    is_unconditional,
    load_network,
    read_model_index,
    read_scheduler_config,
    resolve_model,
    weight_hash,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny, tmp_path):
    """A model to damage."""
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


def set_scheduler(folder, **keys):
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, **keys)


def test_a_name_is_an_embedded_model_then_a_folder_then_a_hub_id(tiny, tmp_path, monkeypatch):
    assert {"fashion-mnist"} <= set(embedded_models()) <= {"fashion-mnist", "fashion-text"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert resolve_model("fashion-mnist").parent.name == "zoo"
    assert resolve_model("./fashion-mnist").resolve() == tmp_path / "fashion-mnist"
    assert resolve_model(tiny) == tiny
    assert str(resolve_model("owner/model")) == "owner/model"
    assert resolve_model("owner/other") == "owner/other"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fashion-mnst",
            (
                "'fashion-mnst' is neither an embedded model nor an existing folder; did you mean "
                "'fashion-mnist'?"
            ),
        ),
        (
            "./nowhere",
            (
                "'./nowhere' is neither an embedded model nor an existing folder; give a diffusers "
                "folder or a hub id"
            ),
        ),
        ("a/b/c", "the embedded models are: fashion-mnist"),
        ("file", "'file' is a file, and a model is a folder"),
    ],
)
def test_other_names_are_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    assert message in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_told_with_the_id(monkeypatch):
    def unreachable(*args, **options):
        assert options == {"revision": "main"}
        raise OSError("a\nlong story")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    with pytest.raises(
        CheckpointError,
        match=(
            r"'some/where' is neither an embedded model \(fashion-mnist.*\) nor an existing "
            r"folder, and the hub"
        ),
    ):
        find_model("some/where", revision="main")


def test_what_the_hub_gives_is_a_folder(tiny, monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *a, **k: str(tiny))
    assert find_model("some/where") == tiny


def test_the_hash_is_of_the_files_bytes(tiny, copy):
    expected = hashlib.sha256((tiny / "unet" / WEIGHTS).read_bytes()).hexdigest()[:16]
    assert weight_hash(tiny) == weight_hash(copy) == weight_hash(copy / "unet") == expected
    network = load_network(copy)
    network.conv_in.weight.data[0, 0, 0, 0] += 1e-6
    network.save_pretrained(copy / "unet")
    assert weight_hash(copy) != expected


def test_a_network_is_loaded_for_evaluation_in_the_dtype_asked(tiny):
    state = torch.random.get_rng_state()
    network = load_network(tiny)
    assert not network.training
    assert network.dtype == torch.float32
    assert all(weight.is_contiguous() for weight in network.parameters())
    assert load_network(tiny, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shards_bins_flat_folders_and_lone_networks_are_read(tiny, tmp_path):
    network = load_network(tiny)
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    expected = network(x, 3).sample

    network.save_pretrained(tmp_path / "shards" / "unet", max_shard_size="20KB")
    shutil.copytree(tiny / "scheduler", tmp_path / "shards" / "scheduler")
    shutil.copy(tiny / "model_index.json", tmp_path / "shards")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1

    network.save_pretrained(tmp_path / "bin" / "unet", safe_serialization=False)
    shutil.copytree(tiny / "scheduler", tmp_path / "bin" / "scheduler")
    shutil.copy(tiny / "model_index.json", tmp_path / "bin")

    shutil.copytree(tiny / "unet", tmp_path / "flat")
    shutil.copy(tiny / "model_index.json", tmp_path / "flat")
    shutil.copy(tiny / "scheduler" / "scheduler_config.json", tmp_path / "flat")

    for folder in (tmp_path / "shards", tmp_path / "bin", tmp_path / "flat", tiny / "unet"):
        torch.testing.assert_close(load_network(folder)(x, 3).sample, expected)
        assert is_unconditional(read_model_index(folder))
        assert len(weight_hash(folder)) == 16
        assert len(noise_schedule(read_scheduler_config(folder))) == 1000
    assert has_scheduler(tmp_path / "flat")
    assert not has_scheduler(tiny / "unet")
    assert read_scheduler_config(tiny / "unet")["clip_sample"] is False


def test_a_pickle_that_would_run_code_is_refused(copy, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (copy / "unet" / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Trap()}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_network(copy)
    assert not (tmp_path / "sprung").exists()


def damage_cut(folder):
    path = folder / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def damage_keys(folder):
    path = folder / "unet" / "config.json"
    edit(path, layers_per_block=2)


def damage_shapes(folder):
    path = folder / "unet" / "config.json"
    edit(path, in_channels=3)


def damage_blocks(folder):
    path = folder / "unet" / "config.json"
    edit(path, down_block_types=["DownBlock2D", "SpiralBlock2D"])


def damage_part(folder):
    path = folder / "unet" / WEIGHTS
    weights = safetensors.torch.load_file(path)
    del weights["conv_in.bias"], weights["conv_in.weight"]
    safetensors.torch.save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, "is damaged or cut off"),
        (
            lambda f: (f / "unet" / WEIGHTS).write_bytes(b"not weights at all"),
            "is damaged or cut off",
        ),
        (
            lambda f: (f / "unet" / WEIGHTS).write_text(
                "version https://git-lfs.github.com/spec/v1"
            ),
            "only a pointer of git-lfs",
        ),
        (
            lambda f: (f / "unet" / WEIGHTS).unlink(),
            "holds no weights: diffusion_pytorch_model.safetensors is missing",
        ),
        (
            lambda f: (f / "unet" / "config.json").unlink(),
            "config.json is missing; the model's folder is not complete",
        ),
        (
            lambda f: (f / "unet" / "config.json").write_text("{"),
            "config.json cannot be read as JSON",
        ),
        (lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON object; got list"),
        (
            lambda f: (f / "model_index.json").write_text('{"unet": 3}'),
            "must name the library and the class of unet",
        ),
        (
            lambda f: (f / "model_index.json").write_text('{"scheduler": ["diffusers"]}'),
            "in a list of two; got ['diffusers'].",
        ),
        (damage_keys, "weights and config.json do not fit (Cannot load"),
        (damage_shapes, "weights and config.json do not fit"),
        (damage_blocks, "cannot be loaded"),
        (damage_part, "conv_in.bias and 1 more"),
        (
            lambda f: (f / "model_index.json").write_text('{"unet": ["diffusers", "NoNet"]}'),
            "no network that diffusers knows",
        ),
    ],
)
def test_damage_is_one_sentence_that_names_the_file(damage, message, copy):
    damage(copy)
    with pytest.raises(CheckpointError) as caught:
        load_network(copy)
    assert message in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "is a FlowMatchEulerDiscreteScheduler of a flow-matching model",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            "of a flow-matching model",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
            "of a flow-matching model",
        ),
        (
            {"_class_name": "EDMEulerScheduler"},
            "is a EDMEulerScheduler, which has no noise schedule of discrete betas",
        ),
    ],
)
def test_schedulers_of_other_families_are_refused_by_name(keys, message, copy):
    set_scheduler(copy, **keys)
    with pytest.raises(CheckpointError) as caught:
        read_scheduler_config(copy)
    assert message in str(caught.value)


def test_a_missing_scheduler_is_told(copy):
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing"):
        read_scheduler_config(copy)


def test_a_folder_that_is_no_model_says_what_would_be(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"without model_index\.json; a model in diffusers format has that file",
    ):
        read_model_index(tmp_path)
    (tmp_path / "checkpoints" / "0000200").mkdir(parents=True)
    (tmp_path / "checkpoints" / "0000100").mkdir()
    with pytest.raises(
        CheckpointError, match=r"a training run that has not finished: take .*0000200"
    ):
        read_model_index(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "set_alpha_to_one": False,
        },
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ],
)
def test_the_schedule_is_the_one_diffusers_reads(config):
    theirs, schedule = diffusers.DDIMScheduler(**config), noise_schedule(config)
    torch.testing.assert_close(
        schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-7
    )
    assert schedule.final_alpha_cumprod == pytest.approx(float(theirs.final_alpha_cumprod))
    assert len(schedule) == theirs.config.num_train_timesteps


def test_unconditional_is_a_network_and_a_scheduler():
    unet, scheduler = ["diffusers", "UNet2DModel"], ["diffusers", "DDPMScheduler"]
    assert is_unconditional({"_class_name": "DDPMPipeline", "unet": unet, "scheduler": scheduler})
    assert is_unconditional(
        {"_class_name": "MyPipeline", "unet": unet, "scheduler": scheduler, "vae": [None, None]}
    )
    assert not is_unconditional(
        {
            "_class_name": "LDMPipeline",
            "unet": unet,
            "scheduler": scheduler,
            "vqvae": ["diffusers", "VQModel"],
        }
    )
    assert not is_unconditional(
        {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"], "scheduler": scheduler}
    )
    assert checkpoints.is_unconditional(read_model_index(resolve_model("fashion-mnist")))
