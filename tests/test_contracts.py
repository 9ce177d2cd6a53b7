"""What every method of every family must be. A new file is found by its folder, not by a list."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedpeft
from fedpeft.errors import FedPeftError, SpecError
from fedpeft.plan import PARTS
from fedpeft.spec import PROTOCOLS, build, describe, names

ROOT = Path(fedpeft.__file__).parent
OTHER_FOLDERS = {
    *("dashboard", "deployment", "flower", "models", "reporting", "sweep", "types", "warm"),
}
"""Folders of the package that hold no methods of a plan."""

SAMPLES = {
    "availability/trace": "trace(file='a.csv')",
    "codecs/chain": "raw | half",
    "codecs/difference": "difference(raw | half)",
    "codecs/feedback": "feedback(raw | half)",
    "data/csv": "csv(train='a.csv')",
    "data/embedded": "embedded(name='support')",
    "data/hub": "hub(name='org/name')",
    "data/imagefolder": "imagefolder(train='a')",
    "data/jsonl": "jsonl(train='a.jsonl')",
    "data/npz": "npz(file='a.npz')",
    "data/sites": "sites(names='a')",
    "privacy/chain": "user(noise_multiplier=1.0) | record(noise_multiplier=1.0)",
    "privacy/record": "record(noise_multiplier=1.0)",
    "privacy/user": "user(noise_multiplier=1.0)",
    "schedules/inversion": "inversion(buffered)",
    "track/chain": "mlflow | wandb",
    "search/optuna": "optuna(maximize='a')",
    "search/random": "random(maximize='a')",
}
"""Specs of the methods that have required fields."""

WRAPPED = {"stages", "codec", "schedule"}
"""Fields that hold other methods of the family; specs do not name them."""

NO_PAPER = {
    *("codecs/chain", "codecs/half", "codecs/raw"),
    *("cohorts/everyone", "partitions/iid", "weighting/uniform"),
    *("data/csv", "data/embedded", "data/hub", "data/imagefolder", "data/jsonl", "data/npz"),
    "data/sites",
    *("tasks/causal_lm", "tasks/classify", "tasks/classify_images"),
    *(
        "engine/inline",
        "engine/processes",
        "personal/none",
        "privacy/chain",
        "privacy/none",
        "latency/none",
        "latency/lognormal",
        "availability/always",
        "search/random",
        "track/chain",
        "track/mlflow",
        "track/none",
        "track/tensorboard",
        "track/wandb",
    ),
}
"""Methods whose first line says what they are instead of citing a paper."""

METHODS = [f"{family}/{name}" for family in PROTOCOLS for name in names(family)]


def _cls(method: str) -> Any:
    return type(_default(method))


def _default(method: str) -> Any:
    family, _, name = method.partition("/")
    return build(family, SAMPLES.get(method, name))


def _hints(method: str) -> dict[str, Any]:
    hints = typing.get_type_hints(_cls(method))
    return {f.name: hints[f.name] for f in dataclasses.fields(_cls(method)) if f.init}


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _with(method: str, field: str, text: str) -> str:
    """Return a spec of ``method`` whose ``field`` reads ``text``."""
    part = _default(method)
    given = {
        f.name: describe(value) if dataclasses.is_dataclass(value) else repr(value)
        for f in dataclasses.fields(part)
        if f.default is dataclasses.MISSING
        for value in [getattr(part, f.name)]
    }
    inner = ", ".join(f"{k}={v}" for k, v in {**given, field: text}.items())
    return f"{method.partition('/')[2]}({inner})"


def _variants(method: str) -> Iterator[Any]:
    """Yield the method with each field changed to each value that it plainly allows."""
    part = _default(method)
    declared = {f.name: f for f in dataclasses.fields(part)}
    for name, hint in _hints(method).items():
        for value in _values(hint, getattr(part, name), declared[name].metadata):
            try:
                yield dataclasses.replace(part, **{name: value})
            except SpecError:  # the fields contradict each other
                continue


def _values(hint: Any, default: Any, limits: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            found += typing.get_args(option)
        elif option is bool:
            found += [True, False]
        elif option is types.NoneType:
            found.append(None)
        elif option is str:
            found += ["plain", 'it\'s "quoted" | (bar)\n']
        elif option in (int, float):
            low = limits.get("low", limits.get("above", 0))
            high = limits.get("high", limits.get("below", low + 7))
            found += [option((low + high) // 2) if option is int else low + (high - low) / 3]
    return [value for value in found if value != default]


def raise_unless_built(family: str, text: str) -> None:
    """Raise SpecError in any case, or whatever ``build`` raises that it must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "1if" and "\d" make Python's own parser warn
        build(family, text)
    raise SpecError("built")


def test_every_folder_is_a_family() -> None:
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert folders == {*PROTOCOLS, *OTHER_FOLDERS}
    assert set(PARTS.values()) <= set(PROTOCOLS)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_name_is_the_method_and_the_class_has_its_letters(method: str) -> None:
    family, _, name = method.partition("/")
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    cls = _cls(method)
    assert cls.__module__ == f"fedpeft.{family}.{name}"
    assert cls.__name__.replace("_", "").lower() == name.replace("_", "")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_frozen_keyword_only_dataclass_of_its_protocol(method: str) -> None:
    part = _default(method)
    parameters = type(part).__dataclass_params__
    assert parameters.frozen
    assert all(f.kw_only for f in dataclasses.fields(part))
    assert isinstance(part, PROTOCOLS[method.partition("/")[0]])
    for f in dataclasses.fields(part):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, f.name, None)


@pytest.mark.parametrize("method", METHODS)
def test_protocol_methods_take_the_protocol_s_arguments(method: str) -> None:
    cls, protocol = _cls(method), PROTOCOLS[method.partition("/")[0]]
    for name, declared in vars(protocol).items():
        if name.startswith("_") or not inspect.isfunction(declared):
            continue
        expected = list(inspect.signature(declared).parameters)
        assert list(inspect.signature(getattr(cls, name)).parameters) == expected, name


@pytest.mark.parametrize("method", METHODS)
def test_it_is_documented(method: str) -> None:
    cls = _cls(method)
    module = importlib.import_module(cls.__module__)
    first = " ".join(str(module.__doc__).partition("\n\n")[0].split())
    assert first.endswith(".")
    cites = re.search(r"arXiv \d{4}\.\d{4,5}|OpenReview \w{10}", first) is not None
    assert cites != (method in NO_PAPER), first
    assert inspect.getdoc(cls)
    assert not str(cls.__doc__).startswith(f"{cls.__name__}(")  # dataclass's own docstring


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("*/*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_modules_of_families_are_short(path: Path) -> None:
    if path.name == "_support_phrases.py":  # content, not code
        return
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("method", METHODS)
def test_traits_are_mappings_from_trait_to_reason(method: str) -> None:
    for part in [_default(method), *_variants(method)]:
        for kind in ("offers", "needs", "refuses"):
            traits = getattr(part, kind, {})
            assert isinstance(traits, Mapping)
            for trait, reason in traits.items():
                assert re.fullmatch(r"[a-z][a-z-]*", trait)
                assert isinstance(reason, str)
                assert reason


@pytest.mark.parametrize("method", METHODS)
def test_describe_and_build_are_inverse(method: str) -> None:
    family = method.partition("/")[0]
    for part in [_default(method), *_variants(method)]:
        assert build(family, describe(part)) == part
        full = describe(part, full=True)
        assert build(family, full) == part
        assert describe(build(family, full), full=True) == full
        told = [f.name for f in dataclasses.fields(part) if f.name not in WRAPPED]
        assert all(f"{name}=" in full for name in told)
    if method not in SAMPLES:
        assert describe(_default(method)) == method.partition("/")[2]


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_name_or_field_is_refused_with_what_there_is(method: str) -> None:
    family, _, name = method.partition("/")
    with pytest.raises(SpecError, match=f"there is no {family} method '{name}x'.*{name}"):
        build(family, f"{name}x")
    known = [f.name for f in dataclasses.fields(_cls(method)) if f.init]
    with pytest.raises(SpecError, match=f"{name} has no field 'no_such_field'") as caught:
        build(family, f"{name}(no_such_field=1)")
    assert all(field in str(caught.value) for field in known)
    if known:
        with pytest.raises(SpecError, match=f"did you mean '{known[0]}'"):
            build(family, f"{name}({known[0]}x=1)")
    with pytest.raises(SpecError, match="name every value"):
        build(family, f"{name}(1)")


def _numeric_fields() -> list[tuple[str, str]]:
    return [
        (method, f.name)
        for method in METHODS
        for f in dataclasses.fields(_cls(method))
        if {int, float} & set(_options(_hints(method)[f.name]))
    ]


@pytest.mark.parametrize(("method", "field"), _numeric_fields())
def test_a_number_of_the_wrong_type_is_refused(method: str, field: str) -> None:
    wrong = ["'text'", "True", "1e999", "-1e999", "[1]", str(10**400)]
    options = _options(_hints(method)[field])
    if float not in options:
        wrong += ["1.5", "2.0"]
        wrong.remove(str(10**400))
    if types.NoneType not in options:
        wrong.append("None")
    for text in wrong:
        with pytest.raises(SpecError, match=rf"{field}=.* must be "):
            build(method.partition("/")[0], _with(method, field, text))


@pytest.mark.parametrize(("method", "field"), _numeric_fields())
def test_a_number_out_of_its_range_is_refused(method: str, field: str) -> None:
    family = method.partition("/")[0]
    declared = next(f for f in dataclasses.fields(_cls(method)) if f.name == field)
    assert declared.metadata, "declare the range of every number with bounded(...)"
    whole = float not in _options(_hints(method)[field])
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    for kind, limit in declared.metadata.items():
        step = 1 if whole else 1e-6
        bad = {"low": limit - step, "above": limit, "high": limit + step, "below": limit}[kind]
        said = re.escape(f"{words[kind]} {limit:g}")
        with pytest.raises(SpecError, match=rf"{field}=.* must be .*{said}"):
            build(family, _with(method, field, repr(bad)))


@pytest.mark.parametrize("method", METHODS)
def test_choices_and_switches_are_checked(method: str) -> None:
    family = method.partition("/")[0]
    for name, hint in _hints(method).items():
        options = _options(hint)
        if typing.get_origin(hint) is Literal:
            with pytest.raises(SpecError, match=f"{name}='no such choice' must be one of "):
                build(family, _with(method, name, "'no such choice'"))
        elif bool in options:
            with pytest.raises(SpecError, match=f"{name}=1 must be true or false"):
                build(family, _with(method, name, "1"))
        elif str in options and not {int, float} & set(options):
            with pytest.raises(SpecError, match=f"{name}=1.5 must be .*a string"):
                build(family, _with(method, name, "1.5"))


def test_equal_plans_are_spelled_alike() -> None:
    assert describe(build("adapters", "lora(alpha=32)"), full=True) == describe(
        build("adapters", "lora(alpha=32.0)"), full=True
    )
    assert build("corrections", "None") == build("corrections", "none")


def test_quotes_brackets_and_bars_inside_a_value_do_not_cut_a_chain() -> None:
    part = build("data", "jsonl(train='a|b).jsonl', test=\"c'|(.jsonl\")")
    assert (part.train, part.test) == ("a|b).jsonl", "c'|(.jsonl")
    assert build("data", describe(part)) == part


def test_a_chain_takes_methods_from_outside_in_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_codec.py").write_text(
        "from fedpeft.codecs.raw import Raw\n"
        "from fedpeft.spec import method\n\n\n"
        "@method\nclass Same(Raw):\n    level: int = 3\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in (
        "outside_codec:Same | half",
        "half | outside_codec:Same(level=4)",
        "raw | outside_codec:Same | half(dtype='bfloat16')",
    ):
        part = build("codecs", text)
        assert describe(part) == text
        assert build("codecs", describe(part, full=True)) == part


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("aggregators", "mean | mean", "aggregators are not chained"),
        ("codecs", "raw |", "cannot read"),
        ("codecs", "", "cannot read"),
        ("codecs", "half(dtype='float16', dtype='bfloat16')", "dtype is given twice"),
        ("codecs", "half(dtype=float16)", "write dtype='float16'"),
        ("codecs", "half.x", "write name"),
        ("codecs", ":half", "is no module"),
        ("codecs", "..half:Half", "is no module"),
        ("codecs", "no_such_package.x:Half", "there is no module"),
        ("codecs", "fedpeft.codecs.half:Raw2", "no dataclass with the letters"),
        ("codecs", "half(**{'dtype': 1})", "has no field"),
        ("codecs", "half(dtype={[]: 1})", "is not a number, string"),
        ("codecs", "chain(stages=(1, 2))", "write codec | codec"),
        ("codecs", "chain", "needs stages"),
        ("codecs", "half(dtype='bfloat16') | half", "must come last"),
        ("codecs", "half\0", "cannot read"),
        ("aggregators", "fedpeft.codecs.half:Half", "Half is no Aggregator: it has no reduce"),
        ("weighting", "fedpeft.cohorts.everyone:Everyone", "is no Weighting: it has no weigh"),
        ("no_such_family", "x", "no family"),
        ("trainers", "plain(steps=1, epochs=1)", "not both"),
        ("trainers", "plain(batch=3, accumulate=2)", "no multiple"),
        ("trainers", "plain(momentum=0.9)", "belongs to"),
        ("adapters", "lora(targets=' , ')", "names no module"),
    ],
)
def test_specs_that_cannot_be_built(family: str, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        build(family, text)


@given(st.sampled_from(sorted(PROTOCOLS)), st.text(max_size=40))
def test_any_text_builds_or_is_refused(family: str, text: str) -> None:
    with pytest.raises(FedPeftError):
        raise_unless_built(family, text)


@given(st.text("abhlf()=,|.:'\"[]{}-1 \n\\*", max_size=30))
def test_text_that_looks_like_a_spec_builds_or_is_refused(text: str) -> None:
    with pytest.raises(FedPeftError):
        raise_unless_built("codecs", "half" + text)


@pytest.mark.parametrize("text", ["half(dtype=" + "-" * 3000 + "1)", "(" * 3000, "[" * 99 + "1"])
def test_deep_nests_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        build("codecs", text)


@pytest.mark.parametrize("name", names("models"))
def test_embedded_models_say_where_they_are(name: str) -> None:
    module = importlib.import_module(f"fedpeft.models.{name}")
    assert isinstance(module.ORIGIN, str)
    assert str(module.__doc__).splitlines()[0].endswith(".")
    try:
        folder = module.folder()
    except FedPeftError as error:
        pytest.skip(str(error))
    assert (folder / "config.json").is_file()
    assert (folder / "model.safetensors").is_file()
