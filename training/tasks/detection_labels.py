"""Labels of detection data sets: which mean the same, and wordings where nobody wrote any."""

import difflib
from collections.abc import Iterable

from training.tasks.text_task import Wordings

ALIASES = (
    ("airplane", "aeroplane", "plane"),
    ("bicycle", "bike"),
    ("car", "automobile"),
    ("cell phone", "mobile phone"),
    ("couch", "sofa"),
    ("donut", "doughnut"),
    ("hair drier", "hair dryer"),
    ("motorcycle", "motorbike"),
    ("potted plant", "houseplant"),
    ("refrigerator", "fridge"),
    ("tv", "tv monitor", "television"),
)
"""Labels of one meaning, a row each; case, spaces and underscores make no difference."""

TEMPLATES = (
    "Detect the {label} in the image.",
    "Detect every {label} in the picture.",
    "Find each {label} in this photo.",
    "Locate any {label}.",
    "Draw a box around each {label}.",
    "{label} detection",
    "Where is the {label}?",
    "Mark the position of the {label}.",
    "I need bounding boxes of every {label}.",
    "Is there any {label} here? Then box it.",
)

HELDOUT_TEMPLATES = (
    "Show me where the {label} is.",
    "Put bounding boxes on any {label}.",
    "Spot the {label} in this scene.",
    "Object detection for the class {label}",
)


def identify_label(label: str) -> str:
    """What two labels of the same meaning have in common: `Couch` and `sofa`."""
    squeezed = _squeeze(label)
    return _FIRST_ALIAS.get(squeezed, squeezed)


def find_nearest(label: str, known: Iterable[str]) -> list[str]:
    """At most three known labels that look like this one; where none does, all of them."""
    names = sorted(set(known))
    squeezed = {_squeeze(name): name for name in names}
    near = difflib.get_close_matches(_squeeze(label), squeezed, n=3, cutoff=0.5)
    return [squeezed[key] for key in near] or names


def name_label(label: str) -> str:
    """Task name of a label: `dining_table`."""
    return "_".join(label.lower().split())


def word_label(label: str) -> Wordings:
    """Generic wordings of a label, for data sets that come without any."""
    return Wordings(
        title=label[:1].upper() + label[1:],
        descriptions=tuple(words.format(label=label) for words in TEMPLATES),
        heldout_descriptions=tuple(words.format(label=label) for words in HELDOUT_TEMPLATES),
    )


def _squeeze(label: str) -> str:
    return "".join(char for char in label.casefold() if char.isalnum())


_FIRST_ALIAS = {_squeeze(label): _squeeze(row[0]) for row in ALIASES for label in row}
