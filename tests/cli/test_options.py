"""Every option of every command, from its declaration: what is out of range, empty, given twice, or
without what it needs is refused in one line, and nothing is loaded or written."""

import dataclasses
import importlib
import math
import typing

import pytest

from ddim.cli import COMMANDS, main
from ddim.errors import DDIMError
from ddim.options import check_request, declarations

REQUESTS = {
    name: importlib.import_module(f"ddim.cli.{name.replace('-', '_')}").Request for name in COMMANDS
}
NEEDED = {"data": "d", "out": "new", "reference": "r", "model": "m"}
NEEDED |= {"folder": "d", "source": "m", "checkpoint": "m", "prompt": "p", "to": "q"}
FIELDS = [(name, field) for name, kind in REQUESTS.items() for field in declarations(kind)]


def plain(name):
    """A request of which only what must be given is given."""
    fields = dataclasses.fields(REQUESTS[name])
    missing = dataclasses.MISSING
    must = [f.name for f in fields if f.default is missing and f.default_factory is missing]
    return REQUESTS[name](**{field: NEEDED[field] for field in must})


def leaves(hint):
    """The types and names that a type is made of."""
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    parts = typing.get_args(hint)
    return {hint} if not parts else set().union(*map(leaves, parts))


def kinds(name, field):
    return leaves(typing.get_type_hints(REQUESTS[name])[field]) - {type(None), ...}


def is_list(name, field):
    return "tuple" in str(typing.get_type_hints(REQUESTS[name])[field])


def refusal(name, field, value, **others):
    """The sentence that refuses a value of an option."""
    request, given = plain(name), {field: value, **others}
    for option, chosen in given.items():
        chosen = (chosen,) if is_list(name, option) and chosen != () else chosen
        object.__setattr__(request, option, chosen)  # past the checks of a constructor
    with pytest.raises(DDIMError) as error:
        check_request(request, given)
    text = str(error.value)
    assert len(text) < 200, text
    return text


def a_value(name, field):
    """A value that the option takes."""
    mark, found = declarations(REQUESTS[name])[field], kinds(name, field)
    if mark.choices is not None:
        return mark.choices.names[0]
    if found & {int, float}:
        return max(mark.range.low, 0) + (0.5 if float in found else 0)
    return True if found == {bool} else "x" if str in found else min(map(str, found))


def is_bounded(name, field):
    """Whether there is a value of its type that the option does not take."""
    mark, found = declarations(REQUESTS[name])[field], kinds(name, field)
    is_text = str in found and not mark.may_be_empty and field != "prompt"
    return bool(found & {int, float}) or mark.choices or is_list(name, field) or is_text


BOUNDED = [(name, field) for name, field in FIELDS if is_bounded(name, field)]


@pytest.mark.parametrize(("name", "field"), BOUNDED)
def test_what_an_option_does_not_take_is_refused(name, field):
    mark, found = declarations(REQUESTS[name])[field], kinds(name, field)
    option, low, high = mark.option, mark.range.low, mark.range.high
    if int in found:
        assert -1 < low < high < 10**13, option
        for value in (low - 1, high + 1, 10**25, 10**400, -(10**400)):
            assert refusal(name, field, value).startswith(f"{option} must be "), value
    if float in found:
        below = low if mark.range.above else low - 1e-9
        above = high if mark.range.below else high + 1e-9
        for value in (math.nan, math.inf, -math.inf, 1e308, below, above):
            assert refusal(name, field, value).startswith(f"{option} must be "), value
    if mark.choices is not None:
        assert refusal(name, field, "mars").startswith(f"{option} must name some of ")
    if is_list(name, field):
        assert refusal(name, field, ()) == f"{option} must name at least one value."
    elif str in found and not mark.may_be_empty and field != "prompt":
        assert refusal(name, field, "") == f"{option} must not be empty."


NEEDS = [(n, f, need) for n, f in FIELDS for need in declarations(REQUESTS[n])[f].needs]


def is_unmet_by_some(name, need):
    """Whether a request alone, without its model, can fail to meet a need."""
    known = declarations(REQUESTS[name])
    if need.option not in known or need.unless is not None:
        return need.without in known or need.unless is not None
    values = need.value if isinstance(need.value, tuple) else (need.value,)
    is_off = need.value is None and not getattr(plain(name), need.option)
    return is_off or None not in values


UNMET = [(name, field, need) for name, field, need in NEEDS if is_unmet_by_some(name, need)]


@pytest.mark.parametrize(("name", "field", "need"), UNMET)
def test_an_option_without_what_it_needs_is_refused(name, field, need):
    known, value = declarations(REQUESTS[name]), a_value(name, field)
    option = known[field].option
    if need.without in known:
        other = {need.without: a_value(name, need.without)}
        text = (
            f"{option} has no effect with {known[need.without].option}; leave out one of the two."
        )
        assert refusal(name, field, value, **other) == text
    values = need.value if isinstance(need.value, tuple) else (need.value,)
    if need.unless is not None:
        other = f"{known[need.option].option} {need.unless}"
        text = f"{option} has no effect with {other}; leave out one of the two."
        assert refusal(name, field, value, **{need.option: need.unless}) == text
    elif need.option in known and None not in values:
        text = f"{option} acts only with {known[need.option].option}"
        others = [n for n in known[field].needs if n.option in known and n is not need]
        met = {n.option: a_value(name, n.option) for n in others}
        met |= {need.option: min(kinds(name, need.option) - set(values), key=str)}
        assert refusal(name, field, value, **met).startswith(text)
    elif need.option in known:  # whose default is off
        either = [known[name].option for name in (need.option, need.alternative) if name]
        text = f"{option} acts only with {' or '.join(either)}; give both, or leave out"
        assert refusal(name, field, value) == f"{text} {option}."


def test_every_need_names_an_option_and_every_command_has_options():
    names = {field for _, field in FIELDS} | {None}
    assert {need.option for *_, need in NEEDS} | {need.without for *_, need in NEEDS} <= names
    assert {name for name, _ in FIELDS} == set(COMMANDS)


WRONG = [
    ("sample --steps=0", "--steps must be at least 1; got 0."),
    (f"sample --count={'9' * 25}", f"--count must be at most 4294967296; got {'9' * 25}."),
    (f"sample --seed={'9' * 400}", "--seed must be at most 4294967295; got a number of 400 digits"),
    (f"sample --seed={'9' * 5000}", "--seed: it must be a whole number; got '99999"),
    (f"sample --eta={'9' * 400}", "--eta must be a finite number; got inf."),
    ("sample --guidance-scale -3", "--guidance-scale must be from 0 to 1000; got -3.0."),
    ("sample --timesteps=", "--timesteps must name at least one value."),
    ("sample --timesteps 5,-1", "--timesteps must be at least 0; got -1."),
    ("sample --sampler edict --eta 0.5", "--eta acts only with --sampler ddim; give both, or"),
    ("sample --seed 1 --seed 2", "--seed is given 2 times; give it once."),
    ("sample --batch_size=2 --batch-size 2", "--batch-size is given 2 times; give it once."),
    ("sample --out=", "--out must not be empty."),
    ("train --data d --out o --snr-gamma 5", "--snr-gamma acts only with --weighting min-snr;"),
    ("train --data d --out o --resolution " + "9" * 25, "--resolution must be at most 16384; got"),
    ("train --data d --out o --seed 1 --seed=2", "--seed is given 2 times; give it once."),
    ("train --data d --out=", "--out must not be empty."),
    ("encode --images=", "--images must name at least one value."),
    ("encode --images a.png --count 1", "--count acts only with --data; give both, or leave out"),
    ("encode --images a.png --seed 0", "--seed acts only with --data; give both, or leave out"),
    ("decode --code=", "--code must not be empty."),
    ("interpolate --seeds 1,2 --method ddim", "--method acts only with --images; give both, or"),
    ("interpolate --seeds 1,2,3,4 --grid --gif", "--gif has no effect with --grid; leave out one"),
    (f"interpolate --seeds 1,2 --count {'9' * 25}", "--count must be from 2 to 1000; got 9999999"),
    ("reconstruct --data d --method mars", "--method must name some of o-belm, bdia, edict,"),
    (f"consistency --count {'9' * 25}", "--count must be at most 1000000; got 999999999999999999"),
    ("evaluate m --reference=", "--reference must not be empty."),
    ("evaluate  --reference r", "SAMPLES_OR_MODEL must not be empty."),
    (f"table --reference r --repeats {'9' * 25}", "--repeats must be from 1 to 1000; got 9999999"),
    (f"fit-steps --held-out {'9' * 25}", "--held-out must be at most 1000000; got 99999999999999"),
    ("doctor m --guidance-scale nan", "--guidance-scale must be a finite number; got nan."),
    ("doctor m --steps 2 --timesteps 999,1", "--steps has no effect with --timesteps; leave out"),
    ("doctor m --plot=", "--plot must not be empty."),
    ("doctor m --count 8", "--count acts only with --show; give both, or leave out --count."),
    ("convert m new --beta-start nan", "--beta-start must be a finite number; got nan."),
    ("convert m new --sample-size -1", "--sample-size must be at least 1; got -1."),
    ("convert m new --beta-end .1 --beta-schedule laplace", "--beta-end acts only with --beta-sch"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_command_says_it_in_one_line_and_leaves_nothing(
    words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(words.split(" ")) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"ddim: {message}"), err
    assert (out, err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])
    assert len(err) < 200


def test_texts_and_lists_of_texts_may_be_empty_or_given_again_where_that_means_something():
    from ddim.cli.arguments import parse

    words = ["--prompt=", "--prompt=a", "--negative-prompt="]
    request = parse(REQUESTS["sample"], name="sample", arguments=words)
    assert (request.prompt, request.negative_prompt) == (["", "a"], "")
