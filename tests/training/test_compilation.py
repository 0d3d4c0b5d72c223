"""A compiled network is trained only if its gradients are the eager network's."""

import copy
import json
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState

import ddim
from ddim.pipelines.faster_layers import Faster
from ddim.pipelines.networks import prepare_for_training
from ddim.training import compilation, trainer
from ddim.training.compilation import compiled, count_differences
from ddim.training.config import TrainConfig
from ddim.training.trainer import train

ZOO = Path(ddim.__file__).parent / "zoo"


def config(out, **options):
    return TrainConfig(
        data="digits",
        out=str(out),
        block_out_channels=(8, 16),
        batch_size=4,
        images=12,
        validation_images=0,
        preview_every=0,
        compile=True,
        **options,
    )


@pytest.fixture
def worth_it(monkeypatch):
    """Compiles on a CPU too, which trains no faster."""
    monkeypatch.setattr(trainer, "reason_against", lambda device: None)


def test_a_run_on_a_cpu_says_that_compiling_is_not_worth_it(tmp_path, monkeypatch, alone):
    notes = []
    monkeypatch.setattr(compilation, "compiled", None)
    assert train(config(tmp_path), on_note=notes.append).finished
    assert sum("--compile is not worth it on a CPU" in note for note in notes) == 1
    assert compilation.reason_against(torch.device("cuda")) is None


class LosesGradients(torch.autograd.Function):
    """The identity, with the gradient 0."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.zeros_like(gradient)


def test_a_compiler_that_loses_gradients_is_not_used_and_the_run_says_so(
    tmp_path, monkeypatch, alone, worth_it
):
    def faulty(model, device):
        called.append(model)

        def run(*inputs, **options):
            hook = model.mid_block.register_forward_hook(lambda *x: LosesGradients.apply(x[2]))
            with hook:
                return model(*inputs, **options)

        return run

    called, notes = [], []
    plain = train(TrainConfig(**{**vars(config(tmp_path / "a")), "compile": False}))
    monkeypatch.setattr(compilation, "compiled", faulty)
    AcceleratorState._reset_state(reset_partial_state=True)
    other = train(config(tmp_path / "b"), on_note=notes.append)
    assert other.losses == plain.losses
    assert len(called) == 1
    told = [note for note in notes if "compiled" in note]
    assert len(told) == 1
    assert told[0].startswith("the compiled network has wrong gradients for ")
    assert told[0].endswith(" parameters; the run goes on without --compile.")


def test_a_compiler_that_fails_is_not_used_and_the_run_says_so(
    tmp_path, monkeypatch, alone, worth_it
):
    def failing(model, device):
        def refuse(*args, **options):
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a long explanation")

        return refuse

    notes = []
    monkeypatch.setattr(compilation, "compiled", failing)
    assert train(config(tmp_path), on_note=notes.append).finished
    assert (
        "the network cannot be compiled here (no compiler); the run goes on without --compile."
        in notes
    )


@pytest.mark.parametrize(
    ("found", "expected", "count"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.001, 2.0], [1.0, 2.0], 0),
        ([0.0, 2.0], [1.0, 2.0], 1),
        ([None, 2.0], [1.0, 2.0], 1),
        ([None, 2.0], [None, 2.0], 0),
        ([1e-9, 2.0], [-1e-9, 2.0], 0),  # both are rounding
        ([float("nan"), 2.0], [1.0, 2.0], 1),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0),  # the run itself refuses it
    ],
)
def test_gradients_are_compared_by_parameter(found, expected, count):
    as_tensors = [
        [None if g is None else torch.full((3,), g) for g in gradients]
        for gradients in (found, expected)
    ]
    assert count_differences(*as_tensors, 0.01) == count


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"), [("fashion-mnist", "UNet2DModel"), ("fashion-text", "UNet2DConditionModel")]
)
def test_a_network_that_is_prepared_for_training_has_the_plain_gradients(name, kind, autocast):
    options = json.loads((ZOO / name / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    plain = getattr(diffusers, kind).from_config(options).train()
    prepared = copy.deepcopy(plain)
    prepare_for_training(prepared)
    size = options["sample_size"]
    inputs = [torch.randn(2, options["in_channels"], size, size), torch.tensor([10, 900])]
    if kind == "UNet2DConditionModel":
        inputs.append(torch.randn(2, 5, options["cross_attention_dim"]))

    def gradients(network):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = network(*inputs, return_dict=False)[0].float()
        output.square().mean().backward()
        return [p.grad for p in network.parameters()]

    tolerance = 0.1 if autocast else 1e-3
    assert count_differences(gradients(prepared), gradients(plain), tolerance) == 0
    assert any(isinstance(layer, Faster) for layer in prepared.modules())
    copied = copy.deepcopy(prepared)  # as the average of a run is
    assert [type(layer) for layer in copied.modules()] == [type(x) for x in plain.modules()]
    assert list(prepared.state_dict()) == list(plain.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's compiler, about itself
@pytest.mark.parametrize(
    ("name", "kind"), [("fashion-mnist", "UNet2DModel"), ("fashion-text", "UNet2DConditionModel")]
)
def test_compiled_networks_of_real_structure_have_the_eager_gradients(name, kind):
    options = json.loads((ZOO / name / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    network = getattr(diffusers, kind).from_config(options)
    size = options["sample_size"]
    inputs = [torch.randn(2, options["in_channels"], size, size), torch.tensor([10, 900])]
    if kind == "UNet2DConditionModel":
        inputs.append(torch.randn(2, 5, options["cross_attention_dim"]))

    def gradients(call):
        network.zero_grad()
        call(*inputs, return_dict=False)[0].square().mean().backward()
        return [p.grad.clone() for p in network.parameters()]

    expected = gradients(network)
    assert count_differences(gradients(compiled(network, torch.device("cpu"))), expected, 1e-3) == 0
