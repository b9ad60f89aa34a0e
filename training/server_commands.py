"""Commands of `icm-lora` that ask a running service, through the Python client and nothing else."""

import argparse
import io
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import InvalidInputError

if TYPE_CHECKING:
    from service.client import Client
    from service.client.results import Result

DEFAULT_SERVER = "http://127.0.0.1:8000"
API_KEY_VARIABLE = "ICM_CLIENT_API_KEY"
"""Not `ICM_LORA_*`: those are settings, and the service refuses settings that it does not know."""

Command = Callable[[argparse.Namespace], int]
Adder = Callable[[str, Command, str], argparse.ArgumentParser]


def add_server_commands(add: Adder, commands: Any) -> None:
    """Adds `infer`, `aliases` and `served` to a command line.

    Args:
        add: adds a command.
        commands: the subparsers that commands with actions are added to.
    """
    infer = add("infer", _infer, "complete a prompt, or find objects in an image, on a server")
    infer.add_argument("prompt", nargs="?", help="text to continue; with --image: what to find")
    source = infer.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", help="words whose adapter answers")
    source.add_argument("--adapter", metavar="ID", help="an adapter's id, or `base`")
    source.add_argument("--alias", help="a name: see `icm-lora aliases`")
    infer.add_argument("--image", type=Path, metavar="FILE", help="answer with boxes in a picture")
    infer.add_argument("--picture", type=Path, metavar="FILE", help="--image: write it with boxes")
    infer.add_argument("--max-tokens", type=int, metavar="N")
    infer.add_argument("--temperature", type=float, metavar="T", help="default: 0, greedy")
    infer.add_argument("--seed", type=int, metavar="N")
    add_policy_option(infer)
    add_server_options(infer)

    actions = _add_group(commands, "aliases", "names of adapters on a server")
    _add_action(actions, "list", _list_aliases, "all of yours")
    for name, command, text in (
        ("get", _get_alias, "what a name stands for"),
        ("put", _put_alias, "give a name to an adapter, or to the adapter of a task"),
        ("delete", _delete_alias, "free a name; the adapter stays"),
    ):
        _add_action(actions, name, command, text).add_argument("name")
    put = actions.choices["put"]
    target = put.add_mutually_exclusive_group(required=True)
    target.add_argument("--task", help="words; the adapter is generated")
    target.add_argument("--adapter", metavar="ID")
    put.add_argument("--pinned", action="store_true", help="keep the adapter in memory")
    put.add_argument("--ttl-seconds", type=int, metavar="N", help="default: no end")
    for each in (put, actions.choices["delete"]):
        each.add_argument(
            "--expected-generation", type=int, metavar="N", help="fail where it has another"
        )

    actions = _add_group(commands, "served", "adapters on a server")
    _add_action(actions, "list", _list_adapters, "the most recently used first")
    for name, command, text in (
        ("get", _get_adapter, "what is known about one"),
        ("delete", _delete_adapter, "forget one"),
        ("download", _download_adapter, "write one as a PEFT directory"),
    ):
        _add_action(actions, name, command, text).add_argument("adapter", metavar="ID")
    actions.choices["download"].add_argument("--out", type=Path, required=True, metavar="DIR")
    upload = _add_action(actions, "upload", _upload_adapter, "send a PEFT LoRA trained elsewhere")
    upload.add_argument("folder", type=Path, metavar="DIR", help="a PEFT directory")
    upload.add_argument("--modality", choices=["text", "detection"])
    upload.add_argument("--ttl-seconds", type=int, metavar="N")


def add_server_options(
    parser: argparse.ArgumentParser, default: str | None = DEFAULT_SERVER
) -> None:
    """Which server, and how its answers are printed."""
    parser.add_argument(
        "--server",
        default=default,
        metavar="URL",
        help=f"default: {default}; its key is read from {API_KEY_VARIABLE}"
        if default
        else f"ask this service; its key is read from {API_KEY_VARIABLE}",
    )
    parser.add_argument("--json", action="store_true", help="print the whole answer as JSON")


def add_policy_option(parser: argparse.ArgumentParser) -> None:
    """What the server does with words that are unlike all training tasks."""
    parser.add_argument(
        "--out-of-distribution",
        choices=["reject", "nearest", "base", "generate"],
        help="for words unlike all training tasks; default: the server's",
    )


def open_client(arguments: argparse.Namespace) -> "Client":
    """The client for `--server`, with the key of the environment."""
    from service.client import Client

    return Client(arguments.server, os.environ.get(API_KEY_VARIABLE) or None)


def generate_on_server(arguments: argparse.Namespace) -> int:
    """`icm-lora generate --server URL`: the adapter stays there, ready to answer."""
    options: dict[str, Any] = {"mode": arguments.mode, "strength": arguments.strength}
    if arguments.mode == "sample":
        options |= {"seed": arguments.seed, "temperature": arguments.temperature}
    if arguments.out_of_distribution is not None:
        options["out_of_distribution"] = arguments.out_of_distribution
    if arguments.refine_steps:
        options["refine_steps"] = arguments.refine_steps
    if arguments.task is None and arguments.example is None:
        raise InvalidInputError("describe the task in words, or name files with --example")
    examples = None if arguments.example is None else _read_texts(arguments.example)
    with open_client(arguments) as client:
        adapter = client.generate(arguments.task, examples=examples, **options)
        if arguments.out is not None:
            _unpack(client.download_adapter(adapter.adapter_id), arguments.out)
    nearest = ", ".join(f"{task.name} {task.similarity:.3f}" for task in adapter.nearest[:3])
    lines = [
        f"adapter {adapter.adapter_id}",
        f"{adapter.modality}, cache {adapter.cache}, {adapter.milliseconds['total']:.1f} ms",
        f"nearest: {nearest}; in-distribution score {adapter.in_distribution or 0:.3f}",
    ]
    refined = adapter.refinement
    if refined is not None:
        lines.append(
            f"refined in {refined.steps} steps: examples {refined.loss_before:.3f} to "
            f"{refined.loss_after:.3f} nats a token"
        )
    if arguments.out is not None:
        lines.append(f"PEFT directory in {arguments.out}")
    _print_result(arguments, adapter, "\n".join(lines))
    return 0


def _read_texts(paths: Sequence[Path]) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"an example cannot be read: {error}") from error


def _add_group(commands: Any, name: str, text: str) -> Any:
    return commands.add_parser(name, help=text, description=text).add_subparsers(
        required=True, metavar="ACTION"
    )


def _add_action(actions: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    add_server_options(parser)
    return parser


def _infer(arguments: argparse.Namespace) -> int:
    source = {"task": arguments.task, "adapter_id": arguments.adapter, "alias": arguments.alias}
    source["out_of_distribution"] = arguments.out_of_distribution
    options: dict[str, Any] = {name: value for name, value in source.items() if value is not None}
    tuning = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed")}
    given = {name: value for name, value in tuning.items() if value is not None}
    if arguments.image is None:
        if arguments.prompt is None or arguments.picture is not None:
            raise InvalidInputError("give a PROMPT to continue, or an --image; --picture needs it")
        with open_client(arguments) as client:
            answer = client.infer(arguments.prompt, **options, **given)
        _print_result(arguments, answer, answer.text)
        print(f"answered by {answer.receipt.adapter_id}", file=sys.stderr)
        return 0
    if given:
        raise InvalidInputError(f"leave out {', '.join(given)}: without meaning with an --image")
    if arguments.prompt is not None:
        options["prompt"] = arguments.prompt
    with open_client(arguments) as client:
        found = client.detect(arguments.image, render=arguments.picture is not None, **options)
    lines = [f"{each.label}\t{each.score:.3f}\t{list(each.box)}" for each in found.boxes]
    _print_result(arguments, found, "\n".join(lines))
    print(f"answered by {found.receipt.adapter_id}", file=sys.stderr)
    if (picture := found.picture) is not None:
        arguments.picture.write_bytes(picture)
    return 0


def _list_aliases(arguments: argparse.Namespace) -> int:
    with open_client(arguments) as client:
        page = client.list_aliases(limit=1000)
    lines = [f"{each.name}\t{each.generation}\t{each.adapter_id}" for each in page.aliases]
    return _print_result(arguments, page, "\n".join(lines))


def _get_alias(arguments: argparse.Namespace) -> int:
    with open_client(arguments) as client:
        return _print_result(arguments, client.get_alias(arguments.name))


def _put_alias(arguments: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        "task": arguments.task,
        "adapter_id": arguments.adapter,
        "pinned": arguments.pinned or None,
        "ttl_seconds": arguments.ttl_seconds,
        "expected_generation": arguments.expected_generation,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with open_client(arguments) as client:
        return _print_result(arguments, client.put_alias(arguments.name, **given))


def _delete_alias(arguments: argparse.Namespace) -> int:
    with open_client(arguments) as client:
        gone = client.delete_alias(arguments.name, arguments.expected_generation)
    return _print_result(arguments, gone)


def _list_adapters(arguments: argparse.Namespace) -> int:
    with open_client(arguments) as client:
        page = client.list_adapters(limit=1000)
    lines = [
        f"{each.adapter_id}\t{each.modality}\t{(each.recipe or {}).get('task', '')}"
        for each in page.adapters
    ]
    return _print_result(arguments, page, "\n".join(lines))


def _get_adapter(arguments: argparse.Namespace) -> int:
    with open_client(arguments) as client:
        return _print_result(arguments, client.get_adapter(arguments.adapter))


def _delete_adapter(arguments: argparse.Namespace) -> int:
    with open_client(arguments) as client:
        return _print_result(arguments, client.delete_adapter(arguments.adapter))


def _download_adapter(arguments: argparse.Namespace) -> int:
    with open_client(arguments) as client:
        _unpack(client.download_adapter(arguments.adapter), arguments.out)
    print(arguments.out)
    return 0


def _upload_adapter(arguments: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        "modality": arguments.modality,
        "ttl_seconds": arguments.ttl_seconds,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not (arguments.folder / "adapter_config.json").is_file():
        raise InvalidInputError(f"{arguments.folder} is no PEFT directory")
    with open_client(arguments) as client:
        adapter = client.upload_adapter(arguments.folder, **given)
    return _print_result(arguments, adapter, adapter.adapter_id)


def _unpack(content: bytes, folder: Path) -> None:
    """Writes a PEFT archive into a folder that is empty or does not exist."""
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInputError(f"{folder} is not empty: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)


def _print_result(arguments: argparse.Namespace, result: "Result", text: str | None = None) -> int:
    """JSON where `--json` asks for it or there is no shorter way to say it."""
    if arguments.json or text is None:
        text = result.model_dump_json(indent=2)
    if text:
        print(text)
    return 0
