"""Recipes: every shipped one parses, and a mistake is named by its key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidRecipeError
from service.synthesis.layout import AdapterKind
from tests.fixtures.tiny_training import TINY_RECIPE, make_recipe
from training.recipe import RECIPES_DIR, TRAINED_BASE, FinetuneSection, Recipe, read_recipe

SHIPPED = sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))


def write_toml(path: Path, body: dict[str, Any]) -> Path:
    """Tables one level deep are all that a recipe has."""

    def dump(value: Any) -> str:
        if isinstance(value, str):
            return f'"{value}"'
        if isinstance(value, list):
            return "[" + ", ".join(map(dump, value)) + "]"
        return str(value).lower() if isinstance(value, bool) else repr(value)

    lines = [f"{key} = {dump(v)}" for key, v in body.items() if not isinstance(v, dict)]
    for table, values in body.items():
        if isinstance(values, dict):
            lines += [f"[{table}]", *(f"{key} = {dump(v)}" for key, v in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def spoil(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    body = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY_RECIPE.items()}
    edit(body)
    return write_toml(path / "spoiled.toml", body)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_parses(name: str) -> None:
    recipe = read_recipe(name)

    assert recipe == read_recipe(f"{name}.toml") == read_recipe(RECIPES_DIR / f"{name}.toml")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.finetune.num_steps >= recipe.finetune.keep_last


def test_the_shipped_recipes_are_those_that_we_promise() -> None:
    assert {"text-embedded", "paper-text", "smoke", "llama3-8b-pile"} <= set(SHIPPED)
    assert {"detection-embedded", "florence2-coco"} <= set(SHIPPED)
    paper = read_recipe("paper-text")
    assert paper.adapter.kind is AdapterKind.LORA
    assert (paper.finetune.epochs, paper.finetune.keep_last) == (150, 50)
    assert (paper.generator.preset, paper.generator.epochs) == ("paper", 2000)
    assert (paper.generator.depth, paper.generator.kl_weight) == (12, 0.005)


def test_the_detection_recipes_are_those_that_we_promise() -> None:
    embedded, paper = read_recipe("detection-embedded"), read_recipe("florence2-coco")
    assert embedded.base.reference == TRAINED_BASE
    assert embedded.detector is not None
    assert embedded.detection is not None
    assert embedded.detection.images == "conse"
    assert paper.detector is None
    assert paper.tasks.source.startswith("coco:")
    assert (paper.finetune.epochs, paper.finetune.keep_last) == (150, 50)
    assert (paper.generator.preset, paper.generator.epochs) == ("paper", 2000)
    assert (paper.generator.depth, paper.generator.kl_weight) == (12, 0.005)
    assert (paper.encoder.model, paper.encoder.pretrained) == ("ViT-L-14", "openai")
    assert paper.adapter.alpha == 2 * paper.adapter.rank


DETECTOR = {
    "width": 32,
    "layers": 1,
    "heads": 2,
    "feed_forward": 64,
    "num_scenes": 40,
    "num_steps": 5,
    "batch_size": 4,
    "learning_rate": 1e-3,
}


def make_detection(body: dict[str, Any]) -> None:
    body["base"].update(reference=TRAINED_BASE)
    body["tasks"] = {"source": "composites"}
    body["detector"], body["detection"] = dict(DETECTOR), {}


def test_a_detection_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(spoil(tmp_path, make_detection))

    assert recipe.detector is not None
    assert recipe.detection is not None
    assert (recipe.detector.present_share, recipe.detector.smoothing_bins) == (0.75, 8.0)
    assert (recipe.detection.present_share, recipe.detection.own_prompt_share) == (0.6, 0.7)
    assert recipe.detection.images == ""


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body.pop("detector"), r"\[detector\] trains the base 'bundle:base'"),
        (lambda body: body["base"].update(reference="folder"), "give both or neither"),
        (lambda body: body.pop("detection"), r"\[detection\] goes with the sources composites"),
        (lambda body: body["tasks"].update(source="smoke"), r"\[detection\] goes with"),
        (lambda body: body["tasks"].update(source="folder:coco"), r"\[detection\] goes with"),
        (lambda body: body["detector"].update(width=8), r"detector\.width"),
        (lambda body: body["detector"].update(dropout=1.0), r"detector\.dropout"),
        (lambda body: body["detector"].update(depth=3), r"detector\.depth: .*not permitted"),
        (lambda body: body["detector"].pop("num_scenes"), r"detector\.num_scenes: Field required"),
        (lambda body: body["detection"].update(images="clip"), r"detection\.images"),
        (lambda body: body["detection"].update(present_share=0), r"detection\.present_share"),
        (lambda body: body["detection"].update(smoothing_bins=-1), r"detection\.smoothing_bins"),
    ],
)
def test_a_wrong_detection_recipe_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = spoil(tmp_path, lambda body: (make_detection(body), edit(body)))

    with pytest.raises(InvalidRecipeError, match=message):
        read_recipe(path)


@pytest.mark.parametrize("source", ["composites", "composites:wide", "coco:PATH", "voc:PATH"])
def test_any_detection_source_goes_with_a_base_from_elsewhere(tmp_path: Path, source: str) -> None:
    path = spoil(tmp_path, lambda body: body.update(detection={}, tasks={"source": source}))

    assert read_recipe(path).detector is None


def test_optional_sections_count_in_the_digest_only_where_they_are() -> None:
    text, detection = make_recipe(), read_recipe("detection-embedded")

    assert not {"detector", "detection"} & set(text.to_json())
    assert {"detector", "detection"} <= set(detection.to_json())
    assert detection.detector is not None
    longer = detection.detector.model_copy(update={"num_steps": 1})
    changed = detection.model_copy(update={"detector": longer})
    assert changed.digest != detection.digest
    assert changed.stage_digest("detector") != detection.stage_digest("detector")
    assert changed.stage_digest("generator") == detection.stage_digest("generator")


def test_a_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = read_recipe(spoil(tmp_path, lambda body: None))

    assert recipe == make_recipe()
    assert recipe.generator.kl_weight == 0.005
    assert recipe.finetune.seeds == (0,)
    assert recipe.finetune.steps_per_epoch == 4
    assert recipe.finetune.num_steps == 12


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda body: body.update(sed=1), "sed"),
        (lambda body: body["adapter"].update(rnak=1), "adapter.rnak"),
        (lambda body: body["generator"].update(beta=0.1), "generator.beta"),
        (lambda body: body.update(extra={"a": 1}), "extra"),
    ],
)
def test_an_unknown_key_is_named(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], key: str
) -> None:
    with pytest.raises(InvalidRecipeError, match=f"spoiled.toml: {key}: .*not permitted"):
        read_recipe(spoil(tmp_path, edit))


@pytest.mark.parametrize("section", [key for key in TINY_RECIPE if key != "seed"])
def test_a_missing_section_is_named(tmp_path: Path, section: str) -> None:
    with pytest.raises(InvalidRecipeError, match=f"{section}: Field required"):
        read_recipe(spoil(tmp_path, lambda body: body.pop(section)))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("base", "dtype", "float16"),
        ("base", "reference", 5),
        ("tasks", "names", "recipes"),
        ("adapter", "kind", "dora"),
        ("adapter", "rank", "sixteen"),
        ("adapter", "rank", 0),
        ("adapter", "rank", 2.5),
        ("adapter", "alpha", 0.0),
        ("adapter", "target_modules", []),
        ("finetune", "epochs", 0),
        ("finetune", "learning_rate", -0.1),
        ("finetune", "final_learning_rate_share", 1.5),
        ("finetune", "window_tokens", 4),
        ("finetune", "seeds", []),
        ("encoder", "kind", "words"),
        ("generator", "preset", "diffusion"),
        ("generator", "kl_weight", -1.0),
        ("generator", "latent_dim", "32 or so"),
        ("bundle", "name", "Not A Name"),
        ("bundle", "version", 1.0),
    ],
)
def test_a_wrong_type_or_value_is_named(tmp_path: Path, section: str, key: str, value: Any) -> None:
    path = spoil(tmp_path, lambda body: body[section].update({key: value}))

    with pytest.raises(InvalidRecipeError, match=rf"{section}\.{key}"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_windows": 7}, "multiple of batch_size"),
        ({"checkpoints_per_epoch": 3}, "must divide"),
        ({"keep_last": 7}, "keep_last exceeds"),
    ],
)
def test_impossible_combinations_are_refused(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    path = spoil(tmp_path, lambda body: body["finetune"].update(change))

    with pytest.raises(InvalidRecipeError, match=f"finetune: .*{message}"):
        read_recipe(path)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = spoil(
        tmp_path, lambda body: (body["adapter"].update(rank=0), body["base"].update(dtype="int8"))
    )

    with pytest.raises(InvalidRecipeError, match=r"base\.dtype.*adapter\.rank"):
        read_recipe(path)


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", b"[base"])
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.toml").write_bytes(content)

    with pytest.raises(InvalidRecipeError, match=r"broken\.toml is not valid TOML"):
        read_recipe(tmp_path / "broken.toml")


def test_a_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(InvalidRecipeError, match=r"no recipe 'no-such'; .*smoke"):
        read_recipe("no-such")


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smoke").mkdir()  # as `icm-lora train smoke --out smoke` leaves it
    monkeypatch.chdir(tmp_path)

    assert read_recipe("smoke").bundle.name == "smoke"


def test_digests_depend_on_what_they_should() -> None:
    recipe, other = make_recipe(), make_recipe(generator={"epochs": 31})

    assert recipe.digest == make_recipe().digest != other.digest
    assert recipe.stage_digest("adapter") == other.stage_digest("adapter")
    assert recipe.stage_digest("generator") != other.stage_digest("generator")
    reseeded = recipe.model_copy(update={"seed": 1})
    assert recipe.stage_digest("adapter") != reseeded.stage_digest("adapter")


def test_a_section_cannot_be_changed_once_read() -> None:
    section: FinetuneSection = make_recipe().finetune

    with pytest.raises(ValueError, match="frozen"):
        section.epochs = 5


def test_tasks_by_example_are_a_section_that_other_recipes_do_not_show(tmp_path: Path) -> None:
    plain = read_recipe("smoke")
    asked = read_recipe(spoil(tmp_path, lambda body: body.update(examples={})))
    assert plain.examples is None
    assert "examples" not in plain.to_json()
    assert asked.examples is not None
    assert asked.examples.num_samples == 16
    assert asked.digest != plain.digest

    def ask_for_detection(body: dict[str, Any]) -> None:
        make_detection(body)
        body["examples"] = {}

    with pytest.raises(InvalidRecipeError, match=r"\[examples\] goes with tasks of text"):
        read_recipe(spoil(tmp_path, ask_for_detection))
