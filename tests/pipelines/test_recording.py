"""Recorded calls compute what calls compute, are dropped when the network changes, and are not made
where a replay could differ; on the CPU, by a recorder that keeps the operators of a call."""

import gc
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tests.conftest import ours, tiny_unet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ddim import ImageToImagePipeline, TextToImagePipeline, UnconditionalPipeline, scheduler_base
from ddim.pipelines import recording
from ddim.pipelines.network_calls import NetworkCalls
from ddim.pipelines.recording import MOST, TRIED, Recordings, network_call

QUIET = {"progress": False, "output_type": "pt"}
PROMPT = "a red square on a black background"


class Tape(TorchDispatchMode):
    """The operators of a call on memory that stays, as a graph of kernels has them: what Python
    decided, and numbers that it computed, are fixed; weights are read anew."""

    nbytes = 1

    def __init__(self, inputs):
        super().__init__()
        self.inputs, self.steps = [tensor.clone() for tensor in inputs], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more of it")
        found = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, found))
        return found

    def replay(self, inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        now = {}

        def current(value):
            return now.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, kept in self.steps:
            found = func(*tree_map(current, args), **tree_map(current, kwargs))
            now |= zip(map(id, tree_flatten(kept)[0]), tree_flatten(found)[0], strict=True)
        return now[id(self.output)].clone()


class TapeRecorder:
    """Stands in for a device's recorder."""

    limit = 100
    setting = None

    def __init__(self):
        self.tapes = []

    def record(self, call, inputs):
        tape = Tape(inputs)
        with tape:
            tape.output = call(tape.inputs)
        self.tapes.append(weakref.ref(tape))
        return tape

    def surroundings(self, device):
        return self.setting

    def capacity(self, device):
        return self.limit

    @property
    def made(self):
        return len(self.tapes)

    @property
    def alive(self):
        gc.collect()
        return sum(tape() is not None for tape in self.tapes)


@pytest.fixture
def recorder(monkeypatch):
    """Records on the CPU."""
    monkeypatch.setattr(scheduler_base, "_logged", set())
    made = TapeRecorder()
    monkeypatch.setitem(recording.RECORDERS, "cpu", made)
    return made


@pytest.fixture
def told(caplog, monkeypatch):
    """What was logged of calls that are not recorded."""
    caplog.set_level(logging.WARNING, "diffusers.ddim")
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    return lambda: [m for m in caplog.messages if "launched one by one" in m]


def inputs(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return x, torch.full((count,), 300 + seed)


def same(network, call, **options):
    """Whether calls, and then replays, give what the network gives."""
    with torch.no_grad():
        for seed in range(3):
            x, t = inputs(seed=seed)
            expected = network(x, t, **options, return_dict=False)[0]
            if not torch.equal(call(x, t), expected):
                return False
    return True


def test_a_call_is_recorded_once_and_replayed_for_other_numbers(recorder):
    network = tiny_unet()
    assert same(network, network_call(network))
    assert recorder.made == 1
    assert same(network, network_call(network))  # of the next walk
    assert recorder.made == 1


def test_an_output_stays_when_the_next_is_replayed(recorder):
    network = tiny_unet()
    call = network_call(network)
    with torch.no_grad():
        outputs = [call(*inputs(seed=seed)) for seed in range(4)]
        for seed, output in enumerate(outputs):
            assert torch.equal(output, network(*inputs(seed=seed)).sample)


def test_shapes_dtypes_arguments_and_surroundings_have_recordings_of_their_own(recorder):
    network = tiny_unet(num_class_embeds=4)
    labels = {n: torch.arange(n) for n in (1, 2)}
    with torch.no_grad():
        for count in (1, 2, 1, 2):
            network_call(network, class_labels=labels[count])(*inputs(count))
        assert recorder.made == 2
        network_call(network, class_labels=labels[2].int())(*inputs())
        assert recorder.made == 3
        recorder.setting = "another stream"
        network_call(network, class_labels=labels[2])(*inputs())
        assert recorder.made == 4
    with torch.inference_mode():
        network_call(network, class_labels=labels[2])(*inputs())
    assert recorder.made == 5


def test_the_recording_that_was_used_longest_ago_goes_first(recorder):
    network = tiny_unet()
    call = network_call(network)
    with torch.no_grad():
        for count in range(1, MOST + 1):
            call(*inputs(count))
        call(*inputs(1))
        call(*inputs(MOST + 1))
        assert (recorder.made, recorder.alive) == (MOST + 1, MOST)
        call(*inputs(1))
        assert recorder.made == MOST + 1
        call(*inputs(2))
        assert recorder.made == MOST + 2


def test_recordings_hold_no_more_memory_than_they_may(recorder, told):
    network = tiny_unet()
    recorder.limit = 2
    call = network_call(network)
    with torch.no_grad():
        for count in (1, 2, 3):
            call(*inputs(count))
        assert (recorder.made, recorder.alive) == (3, 2)
        recorder.limit = 0
        call(*inputs(4))
        call(*inputs(4))
    assert recorder.made == 4
    assert "MiB are allowed" not in told()[0]
    assert "it takes 0 MiB, and 0 are allowed" in told()[0]


def in_place(network):
    network.conv_in.weight.data.mul_(1.0)
    network.conv_in.weight.mul_(2)


def replaced(network):
    network.conv_in.weight = nn.Parameter(2 * network.conv_in.weight)


def moved(network):
    network.conv_in.weight.data = 2 * network.conv_in.weight.data


def loaded(network):
    network.load_state_dict({name: 1.1 * w for name, w in network.state_dict().items()})


def another_layer(network):
    old = network.conv_in
    network.conv_in = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)


def another_number(network):
    network.mid_block.resnets[0].output_scale_factor = 2.0


def a_new_number(network):
    network.time_proj.note = 1.0


def another_number_in_a_list(network):
    network.kept[0] = 2.0


def another_processor(network):
    network.mid_block.attentions[0].set_processor(AttnProcessor())


CHANGES = [in_place, replaced, moved, loaded, another_layer, another_number, a_new_number]
CHANGES += [another_number_in_a_list, another_processor]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_changed_network_is_recorded_anew(change, recorder):
    network = tiny_unet()
    network.kept = [1.0]
    call = network_call(network)
    assert same(network, call)
    with torch.no_grad():
        change(network)
    assert same(network, call)
    assert (recorder.made, recorder.alive) == (2, 1)


def test_weights_that_change_unseen_act_in_a_replay(recorder):
    network = tiny_unet()
    call = network_call(network)
    assert same(network, call)
    network.conv_in.weight.data.mul_(2)
    assert same(network, call)
    assert recorder.made == 1


def test_a_copy_of_weights_is_renewed_for_the_next_walk(recorder, tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    before = pipe(seeds=[0], num_inference_steps=3, **QUIET).images
    pipe.unet.conv_in.weight.data.mul_(1.5)
    after = pipe(seeds=[0], num_inference_steps=3, **QUIET).images
    pipe.record_kernels(False)
    assert torch.equal(after, pipe(seeds=[0], num_inference_steps=3, **QUIET).images)
    assert not torch.equal(after, before)


class Counting(nn.Module):
    """A layer that is another at each call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def hooked(network):
    network.mid_block.register_forward_hook(lambda *given: None)


def hooked_before(network):
    network.register_forward_pre_hook(lambda *given: None)


def patched(network):
    network.mid_block.forward = type(network.mid_block).forward.__get__(network.mid_block)


def of_a_user(network):
    network.conv_act = Counting()


class Processor:
    """An attention that a user wrote."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


def attended(network):
    network.mid_block.attentions[0].processor = Processor()


def offloaded(network):
    from accelerate import cpu_offload

    cpu_offload(network, execution_device="cpu")


REFUSED = {
    hooked: "has hooks",
    hooked_before: "has hooks",
    patched: "has a forward of its own",
    of_a_user: "a Counting, whose code is not known here",
    attended: "a Processor, whose code is not known here",
    offloaded: "are moved or cast at its calls",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda c: c.__name__)
def test_what_a_replay_could_miss_is_not_recorded_and_told_once(change, recorder, told):
    network = tiny_unet()
    change(network)
    call = network_call(network)
    with torch.no_grad():
        for seed in range(3):
            call(*inputs(seed=seed))
    assert recorder.made == 0
    (sentence,) = told()
    assert REFUSED[change] in sentence


def test_a_hook_that_comes_later_acts_and_one_that_goes_lets_record(recorder):
    network, seen = tiny_unet(), []
    call = network_call(network)
    with torch.no_grad():
        call(*inputs())
        hook = network.mid_block.register_forward_hook(lambda *given: seen.append(1))
        call(*inputs())
        call(*inputs())
        assert (len(seen), recorder.made) == (2, 1)
        hook.remove()
        call(*inputs())
    assert (len(seen), recorder.made) == (2, 2)


def test_a_replay_that_differs_from_the_call_is_not_used(recorder, told, monkeypatch):
    network = tiny_unet()
    true = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape, given: true(tape, given) * 1.001)
    assert same(network, network_call(network))
    assert recorder.made == 1
    assert "a replay differs from the call" in told()[0]


def test_a_call_that_looks_at_its_numbers_is_told_in_one_line(recorder, told, monkeypatch):
    network = tiny_unet()
    true = nn.SiLU.forward
    monkeypatch.setattr(nn.SiLU, "forward", lambda act, x: true(act, x) if x.sum() < 1e9 else x)
    assert same(network, network_call(network))
    assert recorder.made == 0
    assert told()[0].endswith("not permitted when stream is capturing.")


def test_calls_that_all_differ_are_soon_no_longer_recorded(recorder, told):
    network = tiny_unet()
    call = network_call(network)
    with torch.no_grad():
        for count in range(1, TRIED + 4):
            call(*inputs(count))
    assert recorder.made == TRIED
    assert "differ from one another" in told()[0]


def test_autograd_and_what_follows_operators_see_the_call(recorder):
    network = tiny_unet()
    call = network_call(network)
    x, t = inputs()
    call(x, t).sum().backward()
    assert network.conv_in.weight.grad is not None
    with torch.no_grad(), Tape([]) as tape:
        call(x, t)
    assert len(tape.steps) > 10
    assert recorder.made == 0


def test_arguments_that_are_neither_tensors_nor_plain_are_not_recorded(recorder, told):
    network = tiny_unet()
    recordings = Recordings(recorder)
    call = recording._Call.of(network, inputs(), {"more": object()})
    assert call.reason == "an argument is a object"
    with torch.no_grad(), pytest.raises(TypeError):
        recordings(network, inputs(), {"more": object()})
    assert recorder.made == 0


def test_numbers_among_arguments_are_a_part_of_the_kind():
    kinds = [
        recording._Call.of(None, inputs(), {"cross_attention_kwargs": {"scale": scale}}).kind
        for scale in (0.5, 0.5, 1.0)
    ]
    assert kinds[0] == kinds[1] != kinds[2]


def test_those_who_count_calls_count_replays(recorder):
    network, before = tiny_unet(), []
    call = network_call(network)
    with torch.no_grad(), NetworkCalls(network, lambda: before.append(1)) as counted:
        for seed in range(4):
            call(*inputs(seed=seed))
    assert (counted.images, len(before), recorder.made) == (8, 4, 1)
    assert same(network, call)


def test_a_counter_may_stop_a_walk_of_replays(recorder):
    class Stop(Exception): ...

    def stop():
        raise Stop

    network = tiny_unet()
    call = network_call(network)
    assert same(network, call)
    with torch.no_grad(), NetworkCalls(network, stop), pytest.raises(Stop):
        call(*inputs())


def test_recordings_go_with_the_network_and_with_a_move(recorder, tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe(seeds=[0], num_inference_steps=2, **QUIET)
    assert recorder.alive == 1
    pipe.to("cpu")
    assert recorder.alive == 0
    pipe(seeds=[0], num_inference_steps=2, **QUIET)
    assert recorder.alive == 1
    pipe.record_kernels(False)
    assert recorder.alive == 0
    pipe(seeds=[0], num_inference_steps=2, **QUIET)
    assert recorder.made == 2
    pipe.record_kernels()(seeds=[0], num_inference_steps=2, **QUIET)
    assert recorder.alive == 1
    del pipe
    assert recorder.alive == 0


def test_threads_take_turns(recorder):
    network, barrier = tiny_unet(), threading.Barrier(4)
    call = network_call(network)
    expected = {}
    with torch.no_grad():
        for seed in range(4):
            expected[seed] = network(*inputs(seed=seed)).sample

    def many(seed):
        barrier.wait()
        with torch.no_grad():
            return all(torch.equal(call(*inputs(seed=seed)), expected[seed]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))
    assert recorder.made == 1


# Pipelines


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eta": 1.0},
        {"order": 2},
        {"clip": "dynamic"},
        {"sampler": "o-belm"},
        {"sampler": "bdia"},
    ],
    ids=str,
)
def test_images_are_the_same_recorded(options, tiny, recorder):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    states, images = [[], []], []
    for found, records in zip(states, (False, True), strict=True):
        call = pipe.record_kernels(records)
        options |= {"seeds": [3, 4], "num_inference_steps": 5, "callback": found.append}
        images.append(call(**options, **QUIET).images)
    assert torch.equal(*images)
    assert recorder.made == 1
    for one, other in zip(*states, strict=True):
        assert torch.equal(one.x_s, other.x_s)
        assert torch.equal(one.eps, other.eps)


def test_labels_of_a_class_act_in_a_replay(tiny_classes, recorder):
    pipe = UnconditionalPipeline.from_pretrained(tiny_classes)
    found = {}
    for records in (False, True):
        pipe.record_kernels(records)
        found[records] = [
            pipe(seeds=[0], class_labels=n, num_inference_steps=3, **QUIET).images for n in range(4)
        ]
    assert recorder.made == 1
    assert all(map(torch.equal, found[False], found[True]))


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({}, 1),
        ({"guidance_batched": False}, 1),
        ({"guidance_scale": 1.0}, 1),
        ({"guidance_rescale": 0.7, "eta": 1.0}, 1),
        ({"cross_attention_kwargs": {"scale": 0.5}}, 1),
    ],
    ids=str,
)
def test_images_of_prompts_are_the_same_recorded(options, made, tiny_text, recorder):
    if "cross_attention_kwargs" in options:
        pytest.importorskip("peft")
    pipe, images = TextToImagePipeline.from_pretrained(tiny_text), []
    for records in (False, True):
        pipe.record_kernels(records)
        for prompt in (PROMPT, "a blue square"):
            given = {"seeds": [0], "num_inference_steps": 4, **QUIET, **options}
            images.append(pipe(prompt, **given).images)
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])
    assert recorder.made == made


def test_image_to_image_replays_what_text_to_image_recorded(tiny_text, recorder):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    pictures = pipe(PROMPT, seeds=[0], num_inference_steps=4, **QUIET).images
    other = ImageToImagePipeline(**pipe.components)
    images = []
    for records in (True, False):
        other.record_kernels(records)
        options = {"image": pictures, "seeds": [0], "num_inference_steps": 4, **QUIET}
        images.append(other(PROMPT, **options).images)
    assert torch.equal(*images)
    assert recorder.made == 1


def test_a_network_that_is_put_in_its_place_is_another(tiny, recorder):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    options = {"seeds": [0], "num_inference_steps": 3, **QUIET}
    first = pipe(**options).images
    torch.manual_seed(1)
    other = tiny_unet()
    with torch.no_grad():
        other.conv_out.weight.mul_(3)
    pipe.unet = other
    second = pipe(**options).images
    assert (recorder.made, recorder.alive) == (2, 1)
    assert torch.equal(
        second, UnconditionalPipeline(other, ours()).record_kernels(False)(**options).images
    )
    assert not torch.equal(first, second)


def test_a_callback_that_changes_the_network_between_two_steps_acts(tiny, recorder):
    images = []
    for records in (False, True):
        pipe = UnconditionalPipeline.from_pretrained(tiny).record_kernels(records)

        def change(state, pipe=pipe):
            if state.number == 2:
                with torch.no_grad():
                    pipe.unet.conv_out.weight.mul_(2)

        images.append(pipe(seeds=[0], num_inference_steps=5, callback=change, **QUIET).images)
    assert torch.equal(*images)
    assert recorder.made == 2


def test_an_adapter_and_its_scale_act(tiny_text, recorder):
    peft = pytest.importorskip("peft")
    pipe, found = TextToImagePipeline.from_pretrained(tiny_text), {}
    options = {"seeds": [0], "num_inference_steps": 3, **QUIET}
    pipe(PROMPT, **options)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "one"
    )
    for records in (True, False):
        pipe.record_kernels(records)
        images = []
        for weight in (1.0, 0.25, 1.0):
            pipe.unet.set_adapters("one", weight)
            images.append(pipe(PROMPT, **options).images)
        pipe.unet.disable_lora()
        images.append(pipe(PROMPT, **options).images)
        pipe.unet.enable_lora()
        found[records] = images
    assert recorder.made >= 4
    assert all(map(torch.equal, found[True], found[False]))
    assert not torch.equal(found[True][0], found[True][1])
    assert torch.equal(found[True][0], found[True][2])


def test_nothing_is_recorded_where_there_is_no_recorder(tiny):
    assert set(recording.RECORDERS) == {"cuda"}
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe(seeds=[0], num_inference_steps=2, **QUIET)
    assert pipe.unet not in recording._recordings
