import json
import os
import shutil
import sys
import types

import pytest
from tests.conftest import edit

from ddim.errors import CheckpointError
from ddim.models.checkpoints import configuration_hash, read_model_index, weight_hash
from ddim.models.folder import check_index, check_links, part_names, read_json

GOOD = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AsymmetricAutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["ddim.scheduler", "DDIMScheduler"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
    "select_layers": [10, 20, 30],
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def copy(tiny_text, tmp_path):
    """A text model to change."""
    return shutil.copytree(tiny_text, tmp_path / "model")


def test_an_index_of_diffusers_and_transformers_is_taken():
    check_index(GOOD, "index")
    listed = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    assert part_names(GOOD) == [*listed, "feature_extractor", "safety_checker"]


@pytest.mark.parametrize(
    "named",
    [
        ["payload", "AutoencoderKL"],
        ["my-model.payload", "AutoencoderKL"],
        ["os", "system"],
        ["builtins", "exec"],
        ["ddim.scheduler", "os"],
        ["ddim.cli", "main"],
        ["diffusers.utils", "os"],
        ["deprecated.paint_by_example", "PaintByExampleImageEncoder"],
        ["paint_by_example", "PaintByExampleImageEncoder"],  # diffusers would import it by itself
        ["diffusers", "DiffusionPipeline"],  # which opens an index of its own
        ["stable_diffusion", "StableDiffusionPipeline"],
        ["diffusers", "AutoModel"],
        ["diffusers", "OnnxRuntimeModel"],
        ["transformers", "AutoModel"],
        ["transformers", "AutoTokenizer"],
        ["transformers", "models.clip"],
    ],
)
def test_other_libraries_and_classes_that_open_more_are_refused(named):
    with pytest.raises(CheckpointError, match=r"index names .* as the class of vae, and only"):
        check_index({**GOOD, "vae": named}, "index")
    check_index({**GOOD, "vae": named}, "index", given={"trust_remote_code": True})
    check_index({**GOOD, "vae": named}, "index", given={"vae": None})


def test_a_module_that_the_user_has_imported_is_his_own(monkeypatch):
    index = {**GOOD, "vae": ["payload", "Own"]}
    monkeypatch.setitem(sys.modules, "payload", types.ModuleType("payload"))
    check_index(index, "index", given={})
    with pytest.raises(CheckpointError, match=r"payload\.Own"):
        check_index(index, "index")  # a command has no user who imported it
    with pytest.raises(CheckpointError, match=r"payload\.DiffusionPipeline"):
        check_index({**GOOD, "vae": ["payload", "DiffusionPipeline"]}, "index", given={})
    monkeypatch.delitem(sys.modules, "payload")
    with pytest.raises(CheckpointError, match=r"payload\.Own"):
        check_index(index, "index", given={"vae": object()})


@pytest.mark.parametrize("name", ["../secrets", "/etc", "a/b", "..", "", "vae\x1b[2J", "a b"])
@pytest.mark.parametrize("value", [["diffusers", "AutoencoderKL"], [None, None], ["diffusers"]])
def test_a_part_is_the_name_of_a_folder(name, value):
    with pytest.raises(CheckpointError, match="a part must be the name of a folder inside"):
        check_index({**GOOD, name: value}, "index", given={"trust_remote_code": True})


def test_code_as_the_pipeline_is_refused_unless_the_user_answers_for_it():
    index = {**GOOD, "_class_name": ["my_pipeline", "Mine"]}
    with pytest.raises(CheckpointError, match="names code in the model's folder"):
        check_index(index, "index")
    check_index(index, "index", given={"custom_pipeline": "mine"})


def deep(levels):
    return '{"a": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vae/diffusers.py", "raise SystemExit", "is code in a model's part"),
        ("text_encoder/modeling.py", "raise SystemExit", "is code in a model's part"),
        ("None.py", "raise SystemExit", "None.py is code, and is not run"),
        (
            "text_encoder/adapter_config.json",
            {"base_model_name_or_path": "../../secret"},
            "names weights that are added",
        ),
        (
            "text_encoder/model.safetensors.index.json",
            {"weight_map": {"a": "../vae/model.safetensors"}},
            r"names the weights '\.\./vae/model\.safetensors'",
        ),
        (
            "unet/diffusion_pytorch_model.safetensors.index.json",
            {"weight_map": {"a": "/etc/shadow.safetensors"}},
            "must be files of that folder",
        ),
        (
            "vae/pytorch_model.bin.index.json",
            {"weight_map": {"a": "weights.pkl"}},
            "must be files of that folder",
        ),
        ("text_encoder/config.json", {"transformers_weights": "x.safetensors"}, "is not followed"),
        ("text_encoder/config.json", {"text": {"attn_implementation": "a/b"}}, "is not followed"),
        ("unet/config.json", {"layers_per_block": 10**25}, "at most 200 as layers_per_block"),
        ("unet/config.json", {"layers_per_block": [[1, 10**7]]}, "at most 200 as layers_per_b"),
        ("unet/config.json", {"layers_per_block": 1e300}, "at most 200 as layers_per_block"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "at most 200"),
        ("unet/config.json", {"sample_size": [10**6, 8]}, "at most 8192 as sample_size"),
        ("unet/config.json", {"sample_size": [8]}, "one whole number or two, above 0, as sampl"),
        ("unet/config.json", {"sample_size": 0}, "one whole number or two, above 0, as sample"),
        ("unet/config.json", {"num_class_embeds": 10**9}, "at most 100000 as num_class_embeds"),
        ("vae/config.json", {"block_out_channels": [8, 10**5]}, "at most 8192 as block_out_chan"),
        ("unet/config.json", {"cross_attention_dim": 10**6}, "at most 65536 as cross_attention_d"),
        ("unet/config.json", {"block_out_channels": [8] * 20_000}, "lists 20000 block_out_cha"),
        ("unet/config.json", {"norm_eps": "x"}, "must hold a number as norm_eps; got 'x'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -5}, "above 0 as model_max_le"),
        ("unet/config.json", {"in_channels": 10**12}, "at most 8192 as in_channels"),
        ("unet/config.json", deep(100_000), "it is nested too deeply"),
        ("unet/config.json", '{"a": ' + "9" * 400 + "}", "it holds a number of 400 digits"),
        ("model_index.json", deep(100_000), "it is nested too deeply"),
    ],
)
def test_files_that_name_code_or_other_files_or_claim_too_much_are_refused(
    file, content, message, copy
):
    write(copy / file, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_index(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["unet/x.safetensors", "text_encoder/pytorch_model.bin"])
def test_a_pipe_or_a_device_is_no_model(file, copy):
    os.mkfifo(copy / file)
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_model_index(copy)
    (copy / file).unlink()
    (copy / file).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_model_index(copy)
    os.mkfifo(copy / "card.json")
    with pytest.raises(CheckpointError, match="is no regular file"):
        read_json(copy / "card.json")


def test_a_large_json_file_is_not_read(tmp_path):
    path = tmp_path / "card.json"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(CheckpointError, match="it has 67108865 bytes"):
        read_json(path)


def test_links_out_of_a_folder_are_told_and_those_of_the_hubs_cache_followed(tiny, tmp_path):
    cache = tmp_path / "models--some--model"
    snapshot = shutil.copytree(tiny, cache / "snapshots" / "1234")
    config, weights = snapshot / "unet" / "config.json", cache / "blobs" / "ab"
    (cache / "blobs").mkdir()
    config.rename(weights)
    config.symlink_to("../../../blobs/ab")
    (snapshot / "inside").symlink_to("unet")
    check_links(snapshot)
    (tmp_path / "secret.json").write_text("{}")
    config.unlink()
    config.symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=r"config\.json is a link to .*secret\.json, out of"):
        check_links(snapshot)
    config.unlink()
    (snapshot / "vae").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(CheckpointError, match=r"vae is a link to"):
        check_links(snapshot)


def test_the_weight_hash_is_of_the_shards_that_the_index_names(tiny_text, copy, tmp_path):
    whole = weight_hash(copy)
    (copy / "unet" / "other.safetensors").write_bytes(b"other weights")
    assert weight_hash(copy) == whole
    index = {"weight_map": {"a": "other.safetensors"}}
    write(copy / "unet" / "diffusion_pytorch_model.safetensors.index.json", index)
    assert weight_hash(copy) != whole  # diffusers prefers shards
    before = weight_hash(copy)
    write(copy / "text_encoder" / "model.safetensors.index.json", index)
    (copy / "text_encoder" / "other.safetensors").write_bytes(b"other weights")
    assert weight_hash(copy) == before  # transformers a whole file
    (copy / "text_encoder" / "model.safetensors").rename(copy / "text_encoder" / "x.safetensors")
    assert weight_hash(copy) != before


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("unet/config.json", {"norm_eps": 0.1}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("vae/config.json", {"scaling_factor": 0.2}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 3}),
        ("tokenizer/tokenizer.json", {"model": {}}),
    ],
)
def test_the_configuration_hash_covers_every_part(file, keys, tiny_text, copy):
    assert configuration_hash(copy) == configuration_hash(tiny_text)
    if not file.endswith("tokenizer.json"):
        edit(copy / file, _name_or_path="elsewhere", _diffusers_version="9")
        assert configuration_hash(copy) == configuration_hash(tiny_text)
    edit(copy / file, **keys)
    assert configuration_hash(copy) != configuration_hash(tiny_text)
    assert weight_hash(copy) == weight_hash(tiny_text)
