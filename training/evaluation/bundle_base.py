"""The base model of a bundle that is evaluated."""

from service.inference.base_model import BaseModel, load_base_model
from service.synthesis.bundle import Bundle
from training.recipe import Recipe
from training.tasks.cache import default_cache_dir


def open_bundle_base(bundle: Bundle) -> tuple[BaseModel, Recipe]:
    """A bundle's base, checked against it, and the recipe that made the bundle.

    Raises:
        BaseModelMismatchError: the base is not the bundle's.
    """
    recipe = Recipe.model_validate(bundle.provenance["recipe"])
    base = load_bundle_base(bundle, recipe)
    bundle.check_base(base.digest)
    return base, recipe


def load_bundle_base(bundle: Bundle, recipe: Recipe) -> BaseModel:
    """Loads a bundle's base in the dtype of the recipe that made the bundle."""
    return load_base_model(
        bundle.base_reference,
        dtype=recipe.base.dtype,
        cache_dir=default_cache_dir(),
        bundle_folder=bundle.folder,
    )
