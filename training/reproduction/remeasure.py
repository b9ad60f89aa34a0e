"""One task of a committed evaluation, measured again on this machine."""

import random
from dataclasses import dataclass

from service.synthesis.attachment import Attachment
from service.synthesis.synthesizer import Synthesizer, load_synthesizer
from training.adapters import cut_windows, tokenize_documents
from training.detection_examples import encode_scenes
from training.evaluation.average_precision import score_category
from training.evaluation.boxes import find_boxes
from training.evaluation.bundle_base import open_bundle_base
from training.evaluation.text import sum_window_nll
from training.reproduction.committed import Evaluation, read_evaluation
from training.shipped import BUNDLES_DIR, SUITES
from training.tasks.detection import load_detection_data
from training.tasks.text import load_text_tasks


@dataclass(frozen=True)
class Remeasured:
    """The generated adapter of one task.

    Attributes:
        task: its name.
        live: AP50 or perplexity here and now.
        committed: the same in the committed evaluation.
    """

    task: str
    live: float
    committed: float


def remeasure_suite(suite: str, draw: random.Random) -> Remeasured:
    """Generates and scores a task that is drawn, on all windows or scenes of the evaluation.

    Raises:
        InvalidInputError: no evaluation is committed.
        MissingDependencyError: the base or the data cannot be had here.
    """
    evaluation = read_evaluation(suite)
    synthesizer = load_synthesizer(BUNDLES_DIR / SUITES[suite])
    if suite == "text":
        return _remeasure_text(evaluation, synthesizer, draw)
    return _remeasure_detection(evaluation, synthesizer, draw)


def _remeasure_text(
    evaluation: Evaluation, synthesizer: Synthesizer, draw: random.Random
) -> Remeasured:
    before = draw.choice(evaluation.text)
    base, recipe = open_bundle_base(synthesizer.bundle)
    (task,) = load_text_tasks(recipe.tasks.source, [before.name])
    settings = evaluation.document["settings"]
    windows = cut_windows(
        tokenize_documents(base, task.test),
        settings["num_windows"],
        settings["window_tokens"],
        settings["seed"],
    )
    attachment = Attachment(base.model, synthesizer.bundle.bases)
    vector = synthesizer.synthesize_words(before.description).vector.float()
    nll = sum_window_nll(base, attachment, vector, windows)
    live = float((nll.sum() / before.tokens).exp())
    return Remeasured(before.name, live, before.scores["generated"].ppl)


def _remeasure_detection(
    evaluation: Evaluation, synthesizer: Synthesizer, draw: random.Random
) -> Remeasured:
    before = draw.choice(evaluation.detection)
    base, recipe = open_bundle_base(synthesizer.bundle)
    data = load_detection_data(recipe.tasks.source, [before.name])
    objects = data.test.objects[: evaluation.document["settings"]["num_scenes"]]
    features = encode_scenes(base, data.test, range(len(objects)))
    attachment = Attachment(base.model, synthesizer.bundle.bases)
    vector = synthesizer.synthesize_words(before.description).vector.float()
    found = find_boxes(base, attachment, vector, features, before.description)
    live = score_category(found, objects, before.name).ap50
    return Remeasured(before.name, live, before.ap50["generated"].value)
