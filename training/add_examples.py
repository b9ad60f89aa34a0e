"""Job `icm-lora bundle add-examples`: a bundle that is finished comes to take tasks by example."""

from pathlib import Path

from pydantic import ValidationError

from service.errors import InvalidBundleError, InvalidInputError
from service.inference.base_model import load_base_model
from service.synthesis.bundle import Bundle, extend_bundle, read_bundle
from training.example_vectors import encode_examples
from training.pipeline import describe_commit
from training.recipe import Recipe
from training.tasks.cache import default_cache_dir
from training.tasks.text import load_text_tasks


def add_examples(folder: Path, num_samples: int) -> Bundle:
    """Makes a text bundle take tasks by example: of the texts that its own recipe trained on.

    The bundle is rewritten in its place with the next minor version, and so gets another digest:
    adapters that were cached or recorded for the old one are not the new one's.

    Raises:
        InvalidBundleError: the bundle or its recipe cannot be trusted.
        InvalidInputError: it is not for text, or has example vectors, or its version is no number;
            or the texts of its tasks are not there.
    """
    if num_samples < 2:
        raise InvalidInputError("read two or more documents per task, so that one can be left out")
    bundle = read_bundle(folder)
    if bundle.modality != "text" or bundle.examples is not None:
        what = "is not for text" if bundle.modality != "text" else "has example vectors already"
        raise InvalidInputError(f"bundle {bundle.name} {what}")
    version = _raise_version(bundle.version)
    recipe = _read_recipe(bundle)
    tasks = load_text_tasks(recipe.tasks.source, [task.name for task in bundle.tasks])
    base = load_base_model(
        recipe.base.reference,
        dtype=recipe.base.dtype,
        cache_dir=default_cache_dir(),
        bundle_folder=folder,
    )
    bundle.check_base(base.digest)
    return extend_bundle(
        folder,
        encode_examples(base, tasks, num_samples),
        version=version,
        provenance={
            "commit": describe_commit(),
            "num_samples": num_samples,
            "added_to": bundle.digest,
        },
    )


def _read_recipe(bundle: Bundle) -> Recipe:
    try:
        return Recipe.model_validate(bundle.provenance["recipe"])
    except (LookupError, TypeError, ValidationError) as error:
        raise InvalidBundleError(
            f"bundle {bundle.name} does not say which texts it was trained on"
        ) from error


def _raise_version(version: str) -> str:
    """The next minor version."""
    numbers = version.split(".")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        raise InvalidInputError(f"version {version!r} is not of the form 1.2.3")
    return f"{numbers[0]}.{int(numbers[1]) + 1}.0"
