import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ddim.core.noise import SeededNoise, make_generators, randn_each, seeded_randn
from ddim.errors import DDIMError


def test_noise_of_a_seed_does_not_depend_on_its_batch():
    together = seeded_randn((3, 8, 8), [5, 6, 7])
    assert torch.equal(together[1:2], seeded_randn((3, 8, 8), [6]))
    assert torch.equal(together.flip(0), seeded_randn((3, 8, 8), [7, 6, 5]))
    assert not torch.equal(together[0], together[1])


def test_the_stream_gives_x_t_first_and_equals_diffusers_list_of_generators():
    stream, generators = (
        SeededNoise([3, 4], (2, 4, 4)),
        [torch.Generator().manual_seed(s) for s in (3, 4)],
    )
    assert torch.equal(SeededNoise([3, 4], (2, 4, 4))(), seeded_randn((2, 4, 4), [3, 4]))
    for _ in range(3):
        assert torch.equal(stream(), randn_tensor((2, 2, 4, 4), generator=generators))


def test_noise_is_drawn_in_float32_and_cast():
    half = SeededNoise([1], (4,), dtype=torch.bfloat16)()
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, seeded_randn((4,), [1]).bfloat16())


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    SeededNoise([1, 2], (8,))()
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_may_be_whole_numbers_of_any_type():
    expected = seeded_randn((4,), [3, 2**32 - 1])
    for seeds in (
        np.array([3, 2**32 - 1]),
        [np.int64(3), np.uint64(2**32 - 1)],
        [torch.tensor(3), 2**32 - 1],
    ):
        assert torch.equal(seeded_randn((4,), seeds), expected)
        assert torch.equal(SeededNoise(seeds, (4,))(), expected)


@pytest.mark.parametrize(
    "seed", [2.5, float("nan"), float("inf"), "a", "5", None, True, 2**32, [1]]
)
def test_what_is_no_seed_is_refused(seed):
    for use in (seeded_randn, lambda shape, seeds: SeededNoise(seeds, shape)):
        with pytest.raises(
            DDIMError, match=r"a seed must be a whole number from 0 to 2\^32 - 1; got "
        ):
            use((4,), [1, seed])
    with pytest.raises(
        DDIMError, match="seeds must be a list of whole numbers, one an image; got 5"
    ):
        seeded_randn((4,), 5)


def test_edges_and_errors():
    assert randn_each((2, 3), []).shape == (0, 2, 3)
    with pytest.raises(
        DDIMError, match=r"a seed must be a whole number from 0 to 2\^32 - 1; got -1"
    ):
        make_generators([-1])
    with pytest.raises(DDIMError, match="got 1.5"):
        make_generators([1.5])
    with pytest.raises(DDIMError, match="seeds and generators cannot be mixed"):
        SeededNoise([1, torch.Generator()], (2,))
