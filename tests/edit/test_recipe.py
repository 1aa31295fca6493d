"""A recipe is read as written or refused in one line, and what it comes to can be written down and read again."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from excise.demo.vocabulary import KEPT, WEAPONS, caption
from excise.edit.parameters import PARAMETERS
from excise.edit.presets import preset_names
from excise.edit.recipe import EpochScales, Recipe, Sites, explain, load_recipe, resolve
from excise.errors import UsageError
from excise.strict_yaml import LIMIT

SLOW_TO_DRAW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def written(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# Random recipes.

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
SCALE = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "preset": st.sampled_from(preset_names()),
    "note": TEXT,
    "method": st.sampled_from(sorted(PARAMETERS)),
    "erase": st.lists(TEXT, max_size=4),
    "to": st.lists(TEXT, max_size=2),
    "keep": st.lists(TEXT, max_size=3),
    "keep_files": st.lists(TEXT, max_size=2),
    "expand": st.sampled_from(["artist", "object", "none"]),
    "erase_scale": POSITIVE,
    "keep_scale": SCALE | st.just("auto"),
    "regularization": POSITIVE,
    "epochs": st.integers(0, 1000) | st.just("auto"),
    "ridge": POSITIVE,
    "epoch_scales": st.fixed_dictionaries({}, optional={"erase": POSITIVE, "keep": SCALE, "regularization": POSITIVE}),
    "technique": st.sampled_from(["replace", "tensor"]),
    "anchor": st.sampled_from(["current", "original"]),
    "rule": st.sampled_from(["last-subject", "all"]),
    "sites": st.fixed_dictionaries(
        {},
        optional={
            "projections": st.sampled_from(["both", "k", "v"]),
            "layers": st.sampled_from([None, r"up_blocks\.[12]", "no", "1e3", "#"]),
            "conditional_only": st.booleans(),
        },
    ),
    "parameters": st.dictionaries(st.sampled_from(["rho", "lambda", "null_threshold"]), POSITIVE),
}
OTHERS = {name: drawn for name, drawn in FIELDS.items() if name not in ("erase", "to")}
ANY: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80, suppress_health_check=SLOW_TO_DRAW)
@given(
    recipe=st.fixed_dictionaries({}, optional=FIELDS),
    overrides=st.fixed_dictionaries({"erase": st.just(["gun", "a gun"]), "to": st.just(["cat"])}, optional=OTHERS),
    name=st.none() | st.sampled_from(preset_names()),
)
def test_what_is_resolved_is_written_down_and_read_again(
    file: Path, recipe: dict[str, Any], overrides: dict[str, Any], name: str | None
) -> None:
    written(file, yaml.safe_dump({"version": 1, **recipe}, allow_unicode=True))
    try:
        resolved = resolve(name, load_recipe(file), overrides)
    except UsageError:
        return
    text = explain(resolved)
    again = resolve(None, load_recipe(written(file, text)), {})
    assert again == resolved
    assert resolve(None, again, {}) == resolved
    # The same but for the comments.
    assert yaml.safe_load(text).keys() == Recipe.model_fields.keys()
    assert [line.partition("  # ")[0] for line in explain(again).splitlines()] == [
        line.partition("  # ")[0] for line in text.splitlines()
    ]


@settings(deadline=None, max_examples=150, suppress_health_check=SLOW_TO_DRAW)
@given(document=st.dictionaries(st.sampled_from([*Recipe.model_fields, "epoch"]), ANY, max_size=4), valid=st.booleans())
def test_any_values_give_a_recipe_or_a_usage_error(file: Path, document: dict[str, Any], valid: bool) -> None:
    if valid:
        document = {**document, "version": 1}
    written(file, yaml.safe_dump(document, allow_unicode=True))
    refusal = "none"
    try:
        assert isinstance(resolve(None, load_recipe(file), {}), Recipe)
    except UsageError as error:
        refusal = str(error)
    assert refusal.isprintable()


@settings(deadline=None, max_examples=150, suppress_health_check=SLOW_TO_DRAW)
@given(
    content=st.binary(max_size=60) | st.text("version: 1\n-[]{}&*!?|>'\"#%@`,~<=x0eE.+_", max_size=60).map(str.encode)
)
def test_any_bytes_give_a_recipe_or_a_usage_error(file: Path, content: bytes) -> None:
    for start in (b"", b"version: 1\n", b"version: 1\nerase: "):
        file.write_bytes(start + content)
        with contextlib.suppress(UsageError):
            assert isinstance(load_recipe(file), Recipe)


# Where values come from.


def test_command_line_before_recipe_before_preset_before_default(file: Path) -> None:
    text = "version: 1\npreset: nudity\nridge: 0.2\nsites: {projections: v}\nepoch_scales:\n  keep: 1\n"
    overrides = {"keep_scale": 0.3, "sites": {"layers": "mid", "projections": None}, "epochs": None}
    resolved = resolve(None, load_recipe(written(file, text)), overrides)
    expected: dict[str, tuple[object, str]] = {
        "keep_scale": (0.3, "command line"),
        "sites.layers": ("mid", "command line"),
        "sites.projections": ("v", f"recipe {file}"),
        "ridge": (0.2, f"recipe {file}"),
        "epoch_scales.keep": (1.0, f"recipe {file}"),
        "epoch_scales.erase": (1.0, "default"),
        "erase": (("nudity",), "preset nudity"),
        "epochs": (3, "preset nudity"),
        "preset": ("nudity", f"recipe {file}"),
        "rule": ("last-subject", "default"),
        "sites.conditional_only": (False, "default"),
    }
    for path, (value, name) in expected.items():
        found: Any = resolved
        for part in path.split("."):
            found = getattr(found, part)
        assert (path, found, resolved.source(path).name) == (path, value, name)
    lines = explain(resolved).splitlines()
    assert f"ridge: 0.2  # recipe {file}" in lines
    assert "  layers: mid  # command line" in lines
    assert "epochs: 3  # preset nudity" in lines


def test_the_command_lines_preset_takes_the_place_of_the_recipes(file: Path) -> None:
    recipe = load_recipe(written(file, "version: 1\npreset: nudity\nepochs: 7\n"))
    resolved = resolve("unsafe", recipe, {})
    assert (resolved.preset, len(resolved.erase), resolved.epochs) == ("unsafe", 11, 7)
    assert resolved.source("preset").name == "command line"


def test_a_level_replaces_all_concepts_and_all_that_is_kept(tmp_path: Path, file: Path) -> None:
    (tmp_path / "concepts.txt").write_text("gun\naxe\n")
    (tmp_path / "kept.csv").write_text("id,text\n1,cat\n2,dog\n")
    text = "version: 1\npreset: nudity\nerase_files: concepts.txt\nkeep_files: ['kept.csv:text']\n"
    recipe = load_recipe(written(file, text))
    resolved = resolve(None, recipe, {})
    # Relative to the recipe, not to the current folder.
    assert resolved.pairs() == (("gun", " "), ("axe", " "))
    assert list(resolved.kept()) == ["cat", "dog"]
    assert resolved.erase == resolved.keep == ()
    given = resolve(None, recipe, {"erase": ["bomb"], "keep": ["owl"]})
    assert given.pairs() == (("bomb", " "),)
    assert list(given.kept()) == ["owl"]


def test_another_method_drops_the_parameters(file: Path) -> None:
    recipe = load_recipe(written(file, "version: 1\nerase: gun\nmethod: speed\nparameters: {rho: 2}\n"))
    assert resolve(None, recipe, {}).parameters == {"rho": 2.0, "lambda": 0.5, "null_threshold": 0.1}
    both = resolve(None, recipe, {"parameters": {"lambda": 0.1}})
    assert both.parameters == {"rho": 2.0, "lambda": 0.1, "null_threshold": 0.1}
    assert f"  rho: 2.0  # recipe {file}\n  lambda: 0.1  # command line\n  null_threshold: 0.1  # default" in explain(
        both
    )
    assert resolve(None, recipe, {"method": "uce"}).parameters == {}
    assert "epochs: 1  # default; not read by speed" in explain(both)


def test_auto_weighs_by_the_number_kept() -> None:
    """The released code's ``max(0.1, 1 / n)``."""
    artist = resolve("artist", None, {"erase": ["Van Gogh"]})
    assert [artist.keep_weight(n) for n in (0, 1, 4, 10, 1000)] == [1.0, 1.0, 0.25, 0.1, 0.1]
    assert Recipe(keep_scale=0.7).keep_weight(4) == 0.7


# Presets.


def test_presets_are_the_published_ones() -> None:
    """λ, epochs, target, kept, λ₂ and λ₁ by kind of concept."""
    table: dict[str, tuple[object, ...]] = {
        "nudity": (1e-1, 3, (" ",), (" ",), 0.5, 1.0),
        "unsafe": (1e-1, 2, (" ",), (" ",) * 11, 0.5, 1.0),
        "artist": (1e-3, 1, ("art",), ("",), 0.5, "auto"),
        "object-hard": (1e-3, 1, (" ",), ("",), 0.5, 1.0),
        "object-easy": (1e-1, 1, (" ",), ("",), 0.5, 1.0),
    }
    assert set(preset_names()) == {*table, "weapons"}
    for name, expected in table.items():
        found = resolve(name, None, {} if name in ("nudity", "unsafe") else {"erase": ["church"]})
        assert (found.ridge, found.epochs, found.to, found.keep, found.regularization, found.keep_scale) == expected
        assert (found.method, found.anchor, found.technique, found.rule) == (
            "rece",
            "current",
            "replace",
            "last-subject",
        )
        assert (found.epoch_scales, found.erase_scale, found.sites) == (EpochScales(), 1.0, Sites())
        assert found.note
    default = resolve(None, None, {"erase": ["church"]})
    assert default.model_dump(exclude={"preset", "note"}) == resolve(
        "object-easy", None, {"erase": ["church"]}
    ).model_dump(exclude={"preset", "note"})


def test_the_weapons_are_the_demo_models() -> None:
    """The words as users write them, each to the same words of a sunflower; every other object is kept."""
    phrases = ("{object}", "a {object}", "{a} {object}", "a picture of {a} {object}")
    weapons = resolve("weapons", None, {})
    pairs = [(caption(p, object=w), caption(p, object="sunflower")) for w in WEAPONS for p in phrases]
    assert weapons.pairs() == tuple(dict.fromkeys(pairs))
    assert list(weapons.kept()) == ["", *dict.fromkeys(caption(p, object=name) for name in KEPT for p in phrases)]
    assert (weapons.epochs, weapons.ridge, weapons.keep_scale) == (2, 0.1, 0.1)
    assert (weapons.regularization, weapons.anchor) == (0.1, "original")


# The names are those of the closed forms.


def test_names_are_the_closed_forms_own() -> None:
    from excise.edit.rece import EPOCH_SCALES, Anchor
    from excise.edit.tokens import RULES
    from excise.edit.uce import Technique

    fields = Recipe.model_fields
    assert set(get_args(fields["rule"].annotation)) == set(RULES)
    assert get_args(fields["anchor"].annotation) == get_args(Anchor)
    assert get_args(fields["technique"].annotation) == get_args(Technique)
    assert set(get_args(fields["method"].annotation)) == set(PARAMETERS)
    scales = EpochScales()
    assert (scales.erase, scales.keep, scales.regularization) == (
        EPOCH_SCALES.erase,
        EPOCH_SCALES.keep,
        EPOCH_SCALES.ridge,
    )


def test_the_json_schema_describes_every_field() -> None:
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert schema["properties"].keys() == Recipe.model_fields.keys()
    assert schema["additionalProperties"] is False
    assert all(field["description"] for field in schema["properties"].values())
    assert schema["properties"]["epochs"]["anyOf"][0] == {"maximum": 1000, "minimum": 0, "type": "integer"}


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().epochs = 2
    assert Recipe(erase=("gun",)) == Recipe.model_validate({"erase": "gun"})
    assert Recipe(erase=("gun",)) != Recipe(erase=("axe",))
    assert Recipe() != "recipe"
    assert (Recipe(epochs=2).source("epochs").name, Recipe(epochs=2).source("ridge").name) == ("given", "default")


# Refusals.

REFUSED = [
    ("epochs: -1", r":2: epochs = -1: give a whole number from 0"),
    ("epochs: 1001", "epochs = 1001"),
    ("epochs: 1.5", "epochs = 1.5: give a whole number"),
    ("epochs: yes", "epochs = true: give a whole number"),
    ("keep_scale: much", "keep_scale = 'much': give a number of 0 or more"),
    ("keep_scale: -0.1", "keep_scale = -0.1: give a number of 0 or more"),
    ("ridge: 0", "ridge = 0: give a positive number"),
    ("erase_scale: 0", "erase_scale = 0: give a positive number"),
    ("regularization: .nan", "regularization = nan: give a positive number"),
    ("regularization: 1e999", "regularization = inf: give a positive number"),
    ("ridge: 0x" + "f" * 9000, "ridge = a number of thousands of digits: give"),
    ("ridge: " + "9" * 9000, "'99999.*can't be read"),
    ("ridge:", "ridge = null: give a positive number"),
    ("epoch_scales: {keep: x}", "epoch_scales.keep = 'x': give a number of 0 or more"),
    ("method: magic", "method = 'magic': give rece, uce, speed, dp, trce1 or leace"),
    ("rule: first", "rule = 'first': give last-subject or all"),
    ("technique: x", "technique = 'x': give replace or tensor"),
    ("anchor: x", "anchor = 'x': give current or original"),
    ("expand: x", "expand = 'x': give artist, object or none"),
    ("epoch: 1", ":2: epoch: unknown field: did you mean epochs?"),
    ("zzz: 1", "zzz: unknown field: give version, preset"),
    ("sites: {layer: x}", "sites.layer: unknown field: did you mean layers?"),
    ("sites: 1", "sites = 1: give fields projections"),
    ("sites:\n  layers: '('", r":3: sites.layers = '\(': not a regular expression \(missing \)"),
    ("sites: {layers: '[[a]'}", "not a regular expression"),
    ("sites: {conditional_only: 1}", "sites.conditional_only = 1: give true or false"),
    ("keep: [a,\n  1984]", ":3: keep = 1984: give text: put it in quotes"),
    ("keep: [no]", "keep = false: give text: put it in quotes"),
    ("keep: 2001-01-01", "'2001-01-01' is neither text nor a number: put text in quotes"),
    ("erase: 7", "erase = 7: give a list of texts: the concepts to erase"),
    ('note: "\\ud800"', "note = '.+ud800': .*surrogates not allowed: give text"),
    ("preset: none-such", ":2: preset = 'none-such': unknown preset: choose one of artist, nudity"),
    ("parameters: {rho: 1}", "parameters.rho: unknown field: there is none here"),
    ("method: speed\nparameters: {rh: 1}", ":3: parameters.rh: unknown field: did you mean rho?"),
    ("method: speed\nparameters: {lambda: -1}", ":3: parameters.lambda = -1: give a positive number"),
    ("erase: []", "nothing to erase: give --erase TEXT"),
    ("erase: ['  ']", "the concept '  ' is empty"),
    ("erase: [gun, axe, gun]", ":2: erase: the concept 'gun' is given twice: remove one"),
    ("erase: gun\nto: [gun]", "the concept 'gun' is its own target"),
    ("erase: gun\nto: [a, b]", "2 targets for 1 concepts"),
    ("erase: gun\nto: []", "0 targets for 1 concepts"),
    ("keep:\n- cat\n- erased", ":4: keep = 'erased': it is to be erased: remove it from one of the two"),
    ("expand: object\nkeep: photo of erased", "keep = 'photo of erased': it is to be erased"),
    ("keep: &a [x]\nerase: *a", "alias"),
    ("keep: &a [*a]", "alias"),
    ("note: !!python/name:os.system", "neither text nor a number"),
    ("keep: !!set {a}", "a value of the type 'tag:yaml.org,2002:set': remove the type"),
    ("note: !!bool x", "'x' can't be read: put text in quotes"),
    ("version: 1", ":2: 'version' is given twice: remove one"),
    ("<<: {epochs: 1}", "'<<' is no field's name"),
    ("1: 2", "'1' is no field's name"),
    ("epochs: [1", "recipe.yaml:3: not YAML"),
    ("note: \x07", "not YAML"),
    ("keep:\n " + "- " * 3000, "nested too deep"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text[:30] for text, _ in REFUSED])
def test_refusals_name_file_line_field_and_value(file: Path, text: str, message: str) -> None:
    start = "version: 1\n"
    text = text if "erase:" in text else text + "\nerase: erased\n"
    with pytest.raises(UsageError, match=message) as refusal:
        resolve(None, load_recipe(written(file, start + text)), {})
    assert str(refusal.value).startswith(f"{file}")
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 400 + len(str(file))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epochs": -1}, "--epochs -1: give a whole number"),
        ({"sites": {"projections": "q"}}, "--projections 'q': give both, k or v"),
        ({"keep_scale": float("inf")}, "--keep-scale inf: give a number of 0 or more"),
        ({"erase": ("a", "a")}, "^the concept 'a' is given twice"),
        ({"keep": ("b", " gun ")}, "--keep ' gun ': it is to be erased"),
        ({"preset": "x"}, "--preset 'x': unknown preset"),
        ({"parameters": {"rho": 1}}, "--rho: unknown field"),
    ],
)
def test_refusals_name_the_option(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(None, None, {"erase": ("gun",), **overrides})
    with pytest.raises(UsageError, match="--preset 'none-such': unknown preset"):
        resolve("none-such", None, {"erase": ("gun",), "preset": "nudity"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no fields: write one a line, such as version: 1"),
        (b"- version: 1\n", "has no fields: write one a line, such as version: 1"),
        (b"erase: gun\n", "version is missing"),
        (b"version: 2\n", ":1: version = 2: give 1"),
        (b"version: true\n", "version is missing or no number"),
        (b"version: 1\nnote: \xff\n", r"isn't UTF-8 \(byte 17\)"),
        (b"version: 1\nnote: " + b"x" * LIMIT, "larger than 128 KiB: put long lists into files"),
    ],
)
def test_files_that_are_no_recipes(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_recipe(file)


def test_a_huge_file_is_not_read(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(UsageError, match="larger than"):
        load_recipe(file)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: name a recipe file"):
        load_recipe(tmp_path)
    with pytest.raises(UsageError, match=r"\\n\.yaml doesn't exist"):
        load_recipe(tmp_path / "a\n.yaml")
    with pytest.raises(UsageError, match="can't be read"):
        load_recipe(tmp_path / "a\0.yaml")


def test_files_are_checked_as_they_are_read(tmp_path: Path, file: Path) -> None:
    recipe = load_recipe(written(file, "version: 1\nerase: gun\nkeep_files: [kept.txt]\n"))
    resolved = resolve(None, recipe, {})
    with pytest.raises(UsageError, match=r"kept\.txt doesn't exist"):
        list(resolved.kept())
    (tmp_path / "kept.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"kept\.txt has no prompts"):
        list(resolved.kept())
    (tmp_path / "kept.txt").write_text("cat\ngun\n")
    kept = resolved.kept()
    assert next(kept) == "cat"
    with pytest.raises(UsageError, match=r":3: keep_files = 'gun': it is to be erased"):
        next(kept)
    (tmp_path / "concepts.txt").write_text("gun\ngun\n")
    twice = resolve(None, load_recipe(written(file, "version: 1\nerase_files: concepts.txt\n")), {})
    with pytest.raises(UsageError, match=r"recipe\.yaml.*: the concept 'gun' is given twice"):
        twice.pairs()


def test_concepts_at_hand_are_not_read_again(tmp_path: Path, file: Path) -> None:
    (tmp_path / "concepts.txt").write_text("gun\n")
    recipe = resolve(
        None, load_recipe(written(file, "version: 1\nerase_files: concepts.txt\nkeep: [cat, a  gun]\n")), {}
    )
    pairs = recipe.pairs()
    (tmp_path / "concepts.txt").unlink()
    assert list(recipe.kept(pairs)) == ["cat", "a  gun"]
    with pytest.raises(UsageError, match=r"keep.* = 'a  gun': it is to be erased"):
        list(recipe.kept([("a gun", "dog")]))
    with pytest.raises(UsageError, match=r"concepts\.txt doesn't exist"):
        list(recipe.kept())
