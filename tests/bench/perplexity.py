"""Perplexity of one domain by lm-evaluation-harness over HTTP, beside `icm-lora evaluate`'s own.

    python -m tests.bench.perplexity --task recipes

Both score the same held-out windows under the adapter generated from the same words: `evaluate`
in its own process, the harness through `/v1/completions` of a served bundle. The harness takes
texts, not tokens, so only windows count whose text becomes the same tokens again: a window may
begin within a word, or with a space, which the harness moves over to what it scores.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from service.inference.base_model import BaseModel, load_base_model, prepare_embedded_model
from service.settings import Settings
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.attachment import Attachment
from service.synthesis.bundle import Bundle, read_bundle
from service.synthesis.synthesizer import Synthesizer, build_synthesizer
from tests.bench.measurement import Measurement, conclude
from tests.fixtures.harness import run_harness, write_task
from tests.fixtures.http_service import serve_in_thread
from training.adapters import cut_windows, tokenize_documents
from training.evaluation.report import name_bundle
from training.evaluation.text import sum_window_nll
from training.recipe import Recipe
from training.tasks.text import load_text_tasks

MAX_DIFFERENCE = 0.005
"""Largest relative difference of the two perplexities."""

OUT = Path("training/results/text-smollm2/harness.json")
_PROCESS_RESULTS = '''\
def process_results(doc, results):
    """Nats per token, so that the harness's `perplexity` is that of tokens."""
    [(logprob, _)] = results
    return {"perplexity": logprob / doc["num_tokens"]}
'''


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 where the difference is too large."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.perplexity")
    parser.add_argument("--task", default="recipes", help="domain (default: recipes)")
    parser.add_argument("--windows", type=int, default=200, help="held-out windows (200)")
    parser.add_argument("--window-tokens", type=int, default=65, help="tokens of each (65)")
    parser.add_argument("--seed", type=int, default=0, help="of the windows' choice (0)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"file to write ({OUT})")
    args = parser.parse_args(arguments)

    settings = Settings(detection_bundle=None)
    assert settings.bundle is not None, "a text bundle is served by default"
    bundle = read_bundle(settings.bundle)
    recipe = Recipe.model_validate(bundle.provenance["recipe"])
    [task] = load_text_tasks(recipe.tasks.source, [args.task])
    words = task.heldout_descriptions[0]
    base = load_base_model(bundle.base_reference, device="cpu", dtype=recipe.base.dtype)
    windows = cut_windows(
        tokenize_documents(base, task.test), args.windows, args.window_tokens, args.seed
    )
    docs = [doc for window in windows.tolist() if (doc := describe_window(window, base))]
    kept = torch.tensor([doc.pop("ids") for doc in docs])
    own = {
        "generated": measure_perplexity(bundle, base, words, kept),
        "base": measure_perplexity(bundle, base, None, kept),
    }
    del base
    models = {"generated": f"task:{words}", "base": "base"}
    found = ask_harness(settings, bundle, models, docs)
    rows = []
    for name in models:
        difference = abs(found[name] / own[name] - 1)
        rows += [
            Measurement(f"{name}: perplexity by icm-lora evaluate", own[name], ""),
            Measurement(f"{name}: perplexity by the harness over HTTP", found[name], ""),
            Measurement(f"{name}: relative difference", difference, "", MAX_DIFFERENCE, True),
        ]
    setup = {
        "task": args.task,
        "words": words,
        "bundle": name_bundle(bundle),
        "recipe_digest": bundle.provenance["recipe_digest"],
        "dtype": recipe.base.dtype,
        "windows": {"drawn": len(windows), "scored": len(docs), "tokens": args.window_tokens},
        "seed": args.seed,
    }
    return conclude(
        rows,
        args.out,
        title="Perplexity by lm-evaluation-harness over HTTP and by icm-lora evaluate",
        setup=setup,
    )


def describe_window(ids: list[int], base: BaseModel) -> dict[str, Any] | None:
    """The harness's document of a window, and its tokens; None where its text has others."""
    tokenizer = base.tokenizer
    context, continuation = (
        tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[:1], ids[1:])
    )
    again = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    first = tokenizer(context, add_special_tokens=False)["input_ids"]
    if again != ids or first != ids[:1] or context != context.rstrip():
        return None
    return {
        "context": context,
        "continuation": continuation,
        "num_tokens": len(ids) - 1,
        "ids": ids,
    }


def measure_perplexity(
    bundle: Bundle, base: BaseModel, words: str | None, windows: Int[Tensor, "windows tokens"]
) -> float:
    """Perplexity as `icm-lora evaluate --suite text` computes it; no words are the base."""
    vector = None
    if words is not None:
        synthesizer: Synthesizer = build_synthesizer(bundle, "cpu")
        recipe = AdapterRecipe.build(task=words, bundle_digest=bundle.digest)
        vector = synthesizer.synthesize(recipe).vector.float()
    attachment = Attachment(base.model, bundle.bases)
    nll = float(sum_window_nll(base, attachment, vector, windows).sum())
    attachment.detach(base.model)
    return math.exp(nll / (len(windows) * (windows.shape[1] - 1)))


def ask_harness(
    settings: Settings, bundle: Bundle, models: dict[str, str], docs: list[dict[str, Any]]
) -> dict[str, float]:
    """Perplexities by the harness, of a service started for it."""
    tokenizer = prepare_embedded_model(bundle.base_reference)
    with tempfile.TemporaryDirectory() as name, serve_in_thread(settings) as client:
        folder = Path(name)
        write_task(
            folder,
            "domain",
            docs,
            output_type="loglikelihood",
            doc_to_text="{{context}}",
            doc_to_target="{{continuation}}",
            metric_list=[{"metric": "perplexity", "aggregation": "perplexity"}],
            process_results="!function score.process_results",
        )
        (folder / "score.py").write_text(_PROCESS_RESULTS)
        perplexities = {}
        for name, model in models.items():
            found = run_harness(
                folder,
                str(client.base_url),
                model,
                tokenizer,
                ["domain"],
                tokenized_requests=True,
                batch_size=8,
            )
            perplexities[name] = float(found["results"]["domain"]["perplexity,none"])
    return perplexities


if __name__ == "__main__":
    sys.exit(main())
