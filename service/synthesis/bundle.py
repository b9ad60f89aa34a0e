"""The bundle: everything training hands to serving, as JSON and safetensors.

    bundle.json                 format version, base digest, encoder, layout, tasks, provenance,
                                and the sha256 of every other file
    decoder.safetensors         the generator's decoder (float16)
    bases.safetensors           frozen bases shared by all adapters (float16)
    statistics.safetensors      normaliser: mean adapter, scale per tensor
    task_vectors.safetensors    training descriptions' task vectors, row i of task `owner[i]`
    example_vectors.safetensors training tasks by example, in bundles for tasks by example texts
    base/                       the base model, where the bundle ships its own

The bundle's digest is the sha256 of bundle.json, which pins every byte of it. No adapter that
was trained for a single task is inside.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from service.errors import (
    BaseModelMismatchError,
    IcmLoraError,
    InvalidBundleError,
    InvalidInputError,
    TaskEncoderMismatchError,
)
from service.synthesis.bases import AdapterBases
from service.synthesis.cvae import build_decoder
from service.synthesis.example_tasks import MAX_EXAMPLE_TOKENS, ExampleVectors
from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.layout import AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.task_encoder import identify_hidden_states

FORMAT_VERSION = 1

BASE_FOLDER = "base"
"""Folder inside a bundle that ships its own base model (reference `bundle:base`)."""

_FILES = ("decoder", "bases", "statistics", "task_vectors")

_EXAMPLES = "example_vectors"
"""The file that a bundle may have besides."""


@dataclass(frozen=True)
class BundleTask:
    """A task that the generator was trained on."""

    name: str
    title: str
    descriptions: tuple[str, ...]


@dataclass(frozen=True)
class Bundle:
    """A validated bundle in memory.

    Attributes:
        folder: where it lies.
        name: of the bundle, for people.
        version: of the bundle, for people.
        modality: what its base answers with: `text` or `detection`.
        digest: sha256 of bundle.json.
        base_reference: base model that training loaded.
        base_digest: sha256 of that base's source weights.
        encoder_id: encoder that made the task vectors.
        encoder_spec: how to build that encoder again.
        layout: adapter layout.
        bases: frozen bases.
        normalizer: statistics of the training set.
        generator: configuration of the networks.
        decoder: in eval mode, float32.
        tasks: training tasks.
        task_vectors: one unit row per training description.
        owner: index into `tasks` for each row of `task_vectors`.
        similarity_quantiles: sorted similarities of left-out training wordings to their own
            task's other wordings.
        provenance: recipe, seeds and commit that made it.
        examples: the training tasks by example; None in a bundle that takes no example texts.
    """

    folder: Path
    name: str
    version: str
    modality: str
    digest: str
    base_reference: str
    base_digest: str
    encoder_id: str
    encoder_spec: Mapping[str, Any]
    layout: AdapterLayout
    bases: AdapterBases
    normalizer: AdapterNormalizer
    generator: GeneratorConfig
    decoder: nn.Module
    tasks: tuple[BundleTask, ...]
    task_vectors: Float[Tensor, "wordings dim"]
    owner: Int[Tensor, " wordings"]
    similarity_quantiles: Float[Tensor, " quantiles"]
    provenance: Mapping[str, Any]
    examples: ExampleVectors | None = None

    def check_base(self, base_digest: str) -> None:
        """Refuses a base model other than the one that training used.

        Raises:
            BaseModelMismatchError: the digests differ.
        """
        if base_digest != self.base_digest:
            raise BaseModelMismatchError(
                f"bundle {self.name} fits base {self.base_digest[:12]} ({self.base_reference}), "
                f"not {base_digest[:12]}: load that base or another bundle"
            )

    def check_encoder(self, encoder_id: str) -> None:
        """Refuses a task encoder other than the one that training used.

        Raises:
            TaskEncoderMismatchError: the identifiers differ.
        """
        if encoder_id != self.encoder_id:
            raise TaskEncoderMismatchError(
                f"bundle {self.name} needs encoder {self.encoder_id}, not {encoder_id}"
            )


def write_bundle(
    folder: Path,
    *,
    name: str,
    version: str,
    modality: str,
    base_reference: str,
    base_digest: str,
    encoder_id: str,
    encoder_spec: Mapping[str, Any],
    bases: AdapterBases,
    normalizer: AdapterNormalizer,
    generator: GeneratorConfig,
    decoder: nn.Module,
    tasks: tuple[BundleTask, ...],
    task_vectors: Float[Tensor, "wordings dim"],
    owner: Int[Tensor, " wordings"],
    similarity_quantiles: Float[Tensor, " quantiles"],
    provenance: Mapping[str, Any],
    examples: ExampleVectors | None = None,
) -> Bundle:
    """Writes a bundle and reads it back; bundle.json is written last, so half a bundle is none.

    Raises:
        InvalidBundleError: what was written does not read back as a valid bundle.
    """
    layout = bases.layout
    half = {key: value.to(torch.float16) for key, value in decoder.state_dict().items()}
    contents = {
        "decoder": half,
        "bases": bases.state_dict(),
        "statistics": normalizer.state_dict(layout),
        "task_vectors": {
            "task_vectors": task_vectors.float(),
            "owner": owner.to(torch.int32),
            "similarity_quantiles": similarity_quantiles.float(),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "bundle.json"
    manifest.unlink(missing_ok=True)
    (folder / f"{_EXAMPLES}.safetensors").unlink(missing_ok=True)
    digests: dict[str, str] = {}
    for stem in _FILES:
        digests[f"{stem}.safetensors"] = _write_file(folder, stem, contents[stem])
    for path in _list_base(folder):
        digests[path.relative_to(folder).as_posix()] = _hash_file(path)
    document = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "version": version,
        "modality": modality,
        "base": {"reference": base_reference, "digest": base_digest},
        "encoder": {"id": encoder_id, "spec": dict(encoder_spec)},
        "layout": layout.to_json(),
        "generator": generator.to_json(),
        "tasks": [
            {"name": t.name, "title": t.title, "descriptions": list(t.descriptions)} for t in tasks
        ],
        "provenance": dict(provenance),
        "files": digests,
    }
    if examples is not None:
        _add_examples(folder, document, examples)
    _write_manifest(folder, document)
    return read_bundle(folder)


def extend_bundle(
    folder: Path, examples: ExampleVectors, *, version: str, provenance: Mapping[str, Any]
) -> Bundle:
    """Adds example vectors to a bundle, which becomes another one: of a new version and digest.

    Args:
        folder: of a valid bundle without any.
        examples: of its tasks, in their order.
        version: of what it becomes.
        provenance: what made the vectors; put beside what made the bundle, as `examples`.

    Raises:
        InvalidBundleError: the bundle is not valid, before or afterwards.
        InvalidInputError: it has example vectors.
    """
    if read_bundle(folder).examples is not None:
        raise InvalidInputError(f"the bundle in {folder} has example vectors already")
    document = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    document["version"] = version
    document["provenance"]["examples"] = dict(provenance)
    _add_examples(folder, document, examples)
    _write_manifest(folder, document)
    return read_bundle(folder)


def _add_examples(folder: Path, document: dict[str, Any], examples: ExampleVectors) -> None:
    digest = _write_file(folder, _EXAMPLES, examples.state_dict())
    document["files"][f"{_EXAMPLES}.safetensors"] = digest
    document["examples"] = {"encoder": examples.encoder_id}


def _write_file(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Writes one file of tensors and returns its sha256."""
    body = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
    (folder / f"{stem}.safetensors").write_bytes(body)
    return hashlib.sha256(body).hexdigest()


def _write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    scratch = folder / ".bundle.json.partial"
    scratch.write_text(
        json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    scratch.replace(folder / "bundle.json")


def read_bundle(folder: Path) -> Bundle:
    """Reads and validates a bundle.

    Raises:
        InvalidBundleError: a file is missing or altered, the format version is unknown, a layout
            or network does not fit, or a value is not finite.
    """
    manifest = folder / "bundle.json"
    if not manifest.is_file():
        raise InvalidBundleError(f"no bundle in {folder}: bundle.json is missing")
    raw = manifest.read_bytes()
    try:
        document = json.loads(raw)
        if document["format_version"] != FORMAT_VERSION:
            raise InvalidBundleError(
                f"bundle format {document['format_version']} is not {FORMAT_VERSION}: "
                "use the release that wrote it, or train it again"
            )
        has_examples = f"{_EXAMPLES}.safetensors" in document["files"]
        stems = [*_FILES, *([_EXAMPLES] if has_examples else [])]
        state = {stem: _read_file(folder, stem, document["files"]) for stem in stems}
        _check_base_files(folder, document["files"])
        return _assemble(folder, document, state, hashlib.sha256(raw).hexdigest())
    except InvalidBundleError:
        raise
    except IcmLoraError as error:
        raise InvalidBundleError(f"bundle in {folder}: {error}") from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise InvalidBundleError(f"malformed bundle in {folder}: {error!r}") from error


def _read_file(folder: Path, stem: str, digests: Mapping[str, str]) -> dict[str, Tensor]:
    path = folder / f"{stem}.safetensors"
    if not path.is_file():
        raise InvalidBundleError(f"bundle in {folder}: {path.name} is missing")
    body = path.read_bytes()
    if hashlib.sha256(body).hexdigest() != digests[path.name]:
        raise InvalidBundleError(f"bundle in {folder}: {path.name} does not match its sha256")
    try:
        tensors = load(body)
    except SafetensorError as error:
        raise InvalidBundleError(f"bundle in {folder}: {path.name}: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidBundleError(f"bundle in {folder}: {path.name}: {name} is not finite")
    return tensors


def _list_base(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / BASE_FOLDER).rglob("*") if path.is_file())


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_base_files(folder: Path, digests: Mapping[str, str]) -> None:
    """A base that lies in the bundle is exactly the one that was written with it."""
    found = {path.relative_to(folder).as_posix(): _hash_file(path) for path in _list_base(folder)}
    wanted = {name: value for name, value in digests.items() if name.startswith(f"{BASE_FOLDER}/")}
    if wrong := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
        raise InvalidBundleError(f"bundle in {folder}: {wrong[0]} is missing, altered or unknown")


def _assemble(
    folder: Path,
    document: Mapping[str, Any],
    state: Mapping[str, dict[str, Tensor]],
    digest: str,
) -> Bundle:
    layout = AdapterLayout.from_json(document["layout"])
    generator = GeneratorConfig.from_json(document["generator"])
    decoder = build_decoder(layout, generator)
    decoder.load_state_dict({key: value.float() for key, value in state["decoder"].items()})
    tasks = tuple(
        BundleTask(task["name"], task["title"], tuple(task["descriptions"]))
        for task in document["tasks"]
    )
    vectors, owner = state["task_vectors"]["task_vectors"], state["task_vectors"]["owner"].long()
    if vectors.shape != (len(owner), generator.condition_dim):
        raise InvalidBundleError(f"task vectors have shape {tuple(vectors.shape)}")
    if set(owner.tolist()) != set(range(len(tasks))):
        raise InvalidBundleError("task vectors do not belong to the bundle's tasks")
    quantiles = state["task_vectors"]["similarity_quantiles"]
    if quantiles.ndim != 1 or not len(quantiles):
        raise InvalidBundleError(f"similarity quantiles have shape {tuple(quantiles.shape)}")
    return Bundle(
        folder=folder,
        name=document["name"],
        version=document["version"],
        modality=document["modality"],
        digest=digest,
        base_reference=document["base"]["reference"],
        base_digest=document["base"]["digest"],
        encoder_id=document["encoder"]["id"],
        encoder_spec=document["encoder"]["spec"],
        layout=layout,
        bases=AdapterBases.from_state_dict(layout, state["bases"]),
        normalizer=AdapterNormalizer.from_state_dict(layout, state["statistics"]),
        generator=generator,
        decoder=decoder.eval().requires_grad_(False),
        tasks=tasks,
        task_vectors=vectors,
        owner=owner,
        similarity_quantiles=quantiles.sort().values,
        provenance=document["provenance"],
        examples=_read_examples(document, state[_EXAMPLES]) if _EXAMPLES in state else None,
    )


def _read_examples(document: Mapping[str, Any], state: Mapping[str, Tensor]) -> ExampleVectors:
    """The example vectors of a bundle, which serving must be able to make alike."""
    examples = ExampleVectors.from_state_dict(state, document["examples"]["encoder"])
    encoder_id = identify_hidden_states(document["base"]["digest"], MAX_EXAMPLE_TOKENS)
    if examples.encoder_id != encoder_id:
        raise InvalidBundleError(
            f"the example vectors were made by {examples.encoder_id}, not {encoder_id}"
        )
    if len(examples.vectors) != len(document["tasks"]):
        raise InvalidBundleError("the example vectors do not belong to the bundle's tasks")
    return examples
