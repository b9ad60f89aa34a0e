"""`icm-lora`: train generators, evaluate them, make adapters, serve."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service.client.errors import ClientError
from service.errors import IcmLoraError, InvalidInputError
from training.reproduction.command import add_reproduce_command
from training.server_commands import (
    add_policy_option,
    add_server_commands,
    add_server_options,
    generate_on_server,
)
from training.shipped import BUNDLES_DIR, RESULTS_DIR, SUITES

if TYPE_CHECKING:
    from training.pipeline import Pipeline

REPOSITORY_BUNDLE = BUNDLES_DIR / SUITES["text"]

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns 0, 1 for a failed check or error, 2 for wrong usage."""
    arguments = build_parser().parse_args(argv)
    if getattr(arguments, "threads", None):
        import torch

        torch.set_num_threads(arguments.threads)
    command: Command = arguments.command
    try:
        return command(arguments)
    except (IcmLoraError, ClientError) as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="icm-lora", description="A task in words becomes a LoRA that answers at once."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    prepare = add("prepare", _prepare, "write an embedded base model into the cache (once)")
    prepare.add_argument("--base", default="embedded:smollm2-135m-instruct", metavar="REFERENCE")

    data = add("data", _data, "fetch and prepare the data of the shipped bundles (once)")
    data.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="text domains, `families`, `composites` or `composites:wide`; default: all domains",
    )

    train = add("train", _train, "run all stages of a recipe; resumes where it was stopped")
    train.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
    train.add_argument("--out", type=Path, metavar="RUN", help="folder of the run")
    train.add_argument(
        "--dry-run", action="store_true", help="only count parameters, memory (GiB), time (hours)"
    )
    train.add_argument(
        "--flops",
        type=float,
        default=3e11,
        metavar="RATE",
        help="--dry-run: sustained floating-point operations per second (default 3e11)",
    )
    for name, stage, text in (
        ("base", _base, "stage 0: train the embedded detector, where the recipe has one"),
        ("adapters", _adapters, "stage 1: fine-tune one adapter per task (may run in parallel)"),
        ("vectors", _vectors, "stage 2: encode the task descriptions"),
        ("generator", _generator, "stage 3: train the conditional VAE"),
    ):
        sub = add(name, stage, text)
        sub.add_argument("recipe", help="a TOML file, or the name of a shipped recipe")
        sub.add_argument("--out", type=Path, required=True, metavar="RUN")
        _add_threads(sub)
    _add_threads(train)

    bundle = commands.add_parser("bundle", help="make or inspect bundles")
    actions = bundle.add_subparsers(required=True, metavar="ACTION")
    make = actions.add_parser("make", help="stage 4: write the bundle of a finished run")
    make.add_argument("run", type=Path, metavar="RUN")
    make.set_defaults(command=_make_bundle)
    inspect = actions.add_parser("inspect", help="validate a bundle and say what is in it")
    inspect.add_argument("bundle", type=Path, nargs="?", default=REPOSITORY_BUNDLE)
    inspect.set_defaults(command=_inspect_bundle)

    extend = actions.add_parser(
        "add-examples",
        help="have a text bundle take tasks by example: reads its training texts with its base",
    )
    extend.add_argument("bundle", type=Path, metavar="BUNDLE", help="becomes another version")
    extend.add_argument(
        "--samples", type=int, default=16, metavar="N", help="training documents per task"
    )
    extend.set_defaults(command=_add_examples)
    _add_threads(extend)

    evaluate = add("evaluate", _evaluate, "score a bundle on held-out data")
    evaluate.add_argument("--suite", choices=sorted(SUITES), default="text")
    evaluate.add_argument("--bundle", type=Path, help="default: the shipped one of the suite")
    evaluate.add_argument(
        "--own",
        type=Path,
        metavar="FILE",
        help="own adapters to compare with (default: the committed ones of the bundle)",
    )
    evaluate.add_argument("--tasks", nargs="+", metavar="TASK", help="a subset of the tasks")
    evaluate.add_argument("--windows", type=int, default=200, help="text: windows per task")
    evaluate.add_argument("--window-tokens", type=int, default=65, help="text: tokens per window")
    evaluate.add_argument("--seed", type=int, default=0, help="text: of the choice of windows")
    evaluate.add_argument(
        "--scenes", type=int, metavar="N", help="detection: the first N test scenes (default: all)"
    )
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="write JSON, tables, figures")
    evaluate.add_argument(
        "--check", action="store_true", help="fail where a target of the suite is missed"
    )
    _add_threads(evaluate)

    unseen = add(
        "unseen", _unseen, "score the tasks of a run as tasks that nothing was trained for"
    )
    unseen.add_argument("run", type=Path, metavar="RUN")
    unseen.add_argument(
        "--methods",
        nargs="+",
        default=["in_context", "soup", "top_k", "nearest", "pca_ridge"],
        metavar="METHOD",
        help="the first is judged; NAME+description, NAME+examples: adapters behind a prompt",
    )
    unseen.add_argument(
        "--windows", type=int, default=80, help="held-out windows per text task (80)"
    )
    unseen.add_argument("--window-tokens", type=int, default=65, help="tokens per window (65)")
    unseen.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="each method is fitted so often"
    )
    unseen.add_argument(
        "--folds", type=int, metavar="N", help="leave the families out in N parts (default: singly)"
    )
    unseen.add_argument("--out", type=Path, metavar="DIR", help="write JSON, a table, a figure")
    _add_threads(unseen)

    _add_threads(add_reproduce_command(add))

    generate = add(
        "generate", _generate, "make an adapter: here, as a PEFT directory, or on a server"
    )
    generate.add_argument(
        "task", nargs="?", help='for example "Continue in the style of a recipe."'
    )
    generate.add_argument(
        "--example",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="--server: texts like those to write, instead of words or beside them",
    )
    generate.add_argument(
        "--refine-steps", type=int, default=0, help="--example: gradient steps with the texts"
    )
    generate.add_argument("--out", type=Path, metavar="DIR", help="needed without --server")
    generate.add_argument("--bundle", type=Path, help="without --server: which generator")
    generate.add_argument("--mode", choices=["mode", "sample"], default="mode")
    generate.add_argument("--seed", type=int, default=0, help="--mode sample: of z")
    generate.add_argument("--temperature", type=float, default=1.0, help="std of z, 0 to 2")
    generate.add_argument("--strength", type=float, default=1.0, help="update factor, 0 to 4")
    add_policy_option(generate)
    add_server_options(generate, default=None)
    add_server_commands(add, commands)

    add("serve", _serve, "serve HTTP; settings come from ICM_LORA_* variables (see README)")
    keys = commands.add_parser("keys", help="make API keys")
    key_actions = keys.add_subparsers(required=True, metavar="ACTION")
    new_key = key_actions.add_parser("new", help="print a new key, and its entry for the file")
    new_key.add_argument("--tenant", required=True, help="who owns what is made with the key")
    new_key.add_argument(
        "--scope",
        action="append",
        required=True,
        choices=["infer", "generate", "admin"],
        help="what the key allows; may be given more than once",
    )
    new_key.set_defaults(command=_new_key)
    add("demo", _demo, "start the service, generate an adapter, compare it with the base")
    return parser


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")


def _prepare(arguments: argparse.Namespace) -> int:
    from service.inference.base_model import prepare_embedded_model
    from training.tasks.cache import default_cache_dir

    print(prepare_embedded_model(arguments.base, default_cache_dir()))
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from training.tasks.composites import load_composites
    from training.tasks.text_domains import prepare_domains
    from training.tasks.text_families import prepare_families

    whole_sources: dict[str, Callable[[], object]] = {
        "composites": load_composites,
        "composites:wide": partial(load_composites, wide=True),
        "families": prepare_families,
    }
    for source, prepare in whole_sources.items():
        if source in arguments.names:
            prepare()
    names = [name for name in arguments.names if name not in whole_sources]
    if names or not arguments.names:
        prepare_domains(names=names or None)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from training.recipe import read_recipe

    recipe = read_recipe(arguments.recipe)
    if arguments.dry_run:
        from training.estimate import count_tasks, estimate_recipe

        num_tasks = count_tasks(recipe)
        print(estimate_recipe(recipe, num_tasks).render(arguments.flops, num_tasks))
        return 0
    if arguments.out is None:
        raise InvalidInputError("--out RUN is needed, unless with --dry-run")
    bundle = _open_pipeline(arguments).run_all()
    print(f"bundle {bundle.name} {bundle.version} {bundle.digest} in {arguments.out / 'bundle'}")
    return 0


def _open_pipeline(arguments: argparse.Namespace) -> "Pipeline":
    from training.pipeline import Pipeline
    from training.recipe import read_recipe
    from training.run_dir import RunDir

    return Pipeline(RunDir.open(arguments.out, read_recipe(arguments.recipe)))


def _base(arguments: argparse.Namespace) -> int:
    _open_pipeline(arguments).train_base()
    return 0


def _adapters(arguments: argparse.Namespace) -> int:
    _open_pipeline(arguments).fine_tune_adapters()
    return 0


def _vectors(arguments: argparse.Namespace) -> int:
    _open_pipeline(arguments).encode_task_vectors()
    return 0


def _generator(arguments: argparse.Namespace) -> int:
    _open_pipeline(arguments).train_generator()
    return 0


def _make_bundle(arguments: argparse.Namespace) -> int:
    from training.pipeline import Pipeline
    from training.run_dir import RunDir

    bundle = Pipeline(RunDir.read(arguments.run)).make_bundle()
    print(f"bundle {bundle.name} {bundle.version} {bundle.digest} in {arguments.run / 'bundle'}")
    return 0


def _add_examples(arguments: argparse.Namespace) -> int:
    from training.add_examples import add_examples

    bundle = add_examples(arguments.bundle, arguments.samples)
    print(f"bundle {bundle.name} {bundle.version} {bundle.digest} in {arguments.bundle}")
    return 0


def _inspect_bundle(arguments: argparse.Namespace) -> int:
    from service.synthesis.bundle import read_bundle

    bundle = read_bundle(arguments.bundle)
    files = [path for path in arguments.bundle.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    layout = bundle.layout
    rows = [
        ("name", f"{bundle.name} {bundle.version} ({bundle.modality})"),
        ("digest", bundle.digest),
        ("base", f"{bundle.base_reference} ({bundle.base_digest[:12]})"),
        ("encoder", bundle.encoder_id),
        ("adapters", f"{layout.kind} r={layout.rank} alpha={layout.alpha:g}"),
        ("target modules", f"{', '.join(layout.roles)} x {len(layout.modules)}"),
        ("parameters", f"{layout.num_params:,} ({layout.num_params * 2 / 1000:,.1f} kB float16)"),
        ("generator", f"{bundle.generator.preset}, depth {bundle.generator.depth}"),
        ("size", f"{size / 1e6:.2f} MB"),
        ("commit", str(bundle.provenance.get("commit"))),
        ("recipe", str(bundle.provenance.get("recipe_digest"))),
        ("tasks", ", ".join(task.name for task in bundle.tasks)),
        ("by example", "no" if bundle.examples is None else bundle.examples.encoder_id),
    ]
    print("\n".join(f"{name:<16} {value}" for name, value in rows))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from service.synthesis.synthesizer import load_synthesizer
    from training.evaluation.run import evaluate_detection_bundle, evaluate_text_bundle

    synthesizer = load_synthesizer(arguments.bundle or BUNDLES_DIR / SUITES[arguments.suite])
    bundle = synthesizer.bundle
    if bundle.modality != arguments.suite:
        raise InvalidInputError(f"bundle {bundle.name} is for --suite {bundle.modality}")
    own_path = arguments.own or RESULTS_DIR / bundle.name / "own_adapters.safetensors"
    if not own_path.exists():
        raise InvalidInputError(f"no own adapters in {own_path}: name them with --own FILE")
    names = arguments.tasks or [task.name for task in bundle.tasks]
    if arguments.suite == "detection":
        missed = evaluate_detection_bundle(
            synthesizer, own_path, names, num_scenes=arguments.scenes, out=arguments.out
        )
    else:
        missed = evaluate_text_bundle(
            synthesizer,
            own_path,
            names,
            num_windows=arguments.windows,
            window_tokens=arguments.window_tokens,
            seed=arguments.seed,
            out=arguments.out,
        )
    if not arguments.check:
        return 0
    for line in missed:
        print(f"MISSED {line}", file=sys.stderr)
    print(f"check: {len(missed)} targets missed for {len(names)} tasks")
    return 1 if missed else 0


def _unseen(arguments: argparse.Namespace) -> int:
    from training.evaluation.run import evaluate_unseen
    from training.evaluation.unseen import UnseenSettings
    from training.run_dir import RunDir

    evaluate_unseen(
        RunDir.read(arguments.run),
        arguments.methods,
        UnseenSettings(tuple(arguments.seeds), arguments.folds),
        num_windows=arguments.windows,
        window_tokens=arguments.window_tokens,
        out=arguments.out,
    )
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.server is not None:
        if arguments.bundle is not None:
            raise InvalidInputError("leave out --bundle: the server has its own")
        return generate_on_server(arguments)
    if arguments.out is None or arguments.json or arguments.out_of_distribution:
        raise InvalidInputError("name a folder with --out, or a service with --server")
    if arguments.example is not None or arguments.refine_steps:
        raise InvalidInputError("examples are read by a service: name one with --server")
    if arguments.task is None:
        raise InvalidInputError("describe the task in words")
    from service.adapters.peft_format import write_peft_directory
    from service.synthesis.adapter_recipe import AdapterRecipe
    from service.synthesis.synthesizer import load_synthesizer

    synthesizer = load_synthesizer(arguments.bundle or REPOSITORY_BUNDLE)
    bundle = synthesizer.bundle
    recipe = AdapterRecipe.build(
        task=arguments.task,
        bundle_digest=bundle.digest,
        mode=arguments.mode,
        seed=arguments.seed,
        temperature=arguments.temperature,
        strength=arguments.strength,
    )
    adapter = synthesizer.synthesize(recipe)
    write_peft_directory(
        arguments.out, bundle.layout, bundle.bases, adapter.vector, bundle.base_reference
    )
    nearest = adapter.nearest[0]
    print(f"adapter {adapter.adapter_id} in {arguments.out}")
    print(f"nearest training task {nearest.name} ({nearest.similarity:.3f})", end=", ")
    print(f"in-distribution score {adapter.in_distribution:.3f}")
    return 0


def _serve(_: argparse.Namespace) -> int:
    from service.__main__ import main as serve

    return serve()


def _new_key(arguments: argparse.Namespace) -> int:
    from service.api.keys import make_key

    key, entry = make_key(arguments.tenant, arguments.scope)
    print(f"{key}\nis shown this once. The entry for the list in ICM_LORA_API_KEYS_FILE:\n{entry}")
    return 0


def _demo(_: argparse.Namespace) -> int:
    from service.demo import run_demo

    return run_demo()


if __name__ == "__main__":
    sys.exit(main())
