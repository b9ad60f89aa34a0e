"""The bundle on disk: what is written reads back, and nothing that is altered does."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from service.errors import (
    BaseModelMismatchError,
    InvalidBundleError,
    InvalidInputError,
    TaskEncoderMismatchError,
)
from service.synthesis.bundle import Bundle, extend_bundle, read_bundle
from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.layout import AdapterKind
from tests.fixtures.kernel import (
    BASE_DIGEST,
    TASKS,
    draw_example_vectors,
    normal,
    write_word_bundle,
)

FILES = ("decoder", "bases", "statistics", "task_vectors")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_word_bundle(tmp_path_factory.mktemp("pristine") / "bundle")


@pytest.fixture
def folder(pristine: Bundle, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy of a valid bundle, to be spoiled."""
    source = next(tmp_path_factory.getbasetemp().glob("pristine*/bundle"))
    return Path(shutil.copytree(source, tmp_path / "bundle"))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "bundle.json").read_text())
    edit(document)
    (folder / "bundle.json").write_text(json.dumps(document))


def edit_bytes(folder: Path, stem: str, edit: Callable[[bytes], bytes]) -> None:
    """Changes a file and its sha256 with it, so that only its content is wrong."""
    path = folder / f"{stem}.safetensors"
    body = edit(path.read_bytes())
    path.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    edit_manifest(folder, lambda document: document["files"].update({path.name: digest}))


def edit_tensors(
    folder: Path, stem: str, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    edit_bytes(
        folder, stem, lambda body: safetensors.torch.save(edit(safetensors.torch.load(body)))
    )


def replace_last(tensors: dict[str, Tensor], edit: Callable[[Tensor], Tensor]) -> Any:
    name = max(key for key in tensors if tensors[key].is_floating_point())
    return tensors | {name: edit(tensors[name]).contiguous()}


def put_value(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[-1] = value
    return tensor


def test_the_copied_bundle_is_valid(folder: Path, pristine: Bundle) -> None:
    assert read_bundle(folder).digest == pristine.digest


@pytest.mark.parametrize("kind", AdapterKind)
def test_round_trip(tmp_path: Path, kind: AdapterKind) -> None:
    written = write_word_bundle(tmp_path / "bundle", kind)
    bundle = read_bundle(tmp_path / "bundle")

    for field in ("name", "version", "modality", "digest", "base_reference", "base_digest"):
        assert getattr(bundle, field) == getattr(written, field)
    assert (
        bundle.digest == hashlib.sha256((tmp_path / "bundle/bundle.json").read_bytes()).hexdigest()
    )
    assert (bundle.encoder_id, bundle.encoder_spec) == ("words/16", {"kind": "words"})
    assert bundle.layout.kind is kind
    assert bundle.tasks == TASKS
    assert bundle.owner.tolist() == [0, 0, 1, 1, 2, 2]
    assert bundle.provenance == {"made_by": "a test"}
    torch.testing.assert_close(bundle.similarity_quantiles, torch.tensor([0.1, 0.3, 0.5, 0.9]))


def test_what_is_read_decodes_as_what_was_written(folder: Path, tmp_path: Path) -> None:
    decoder = read_bundle(folder).decoder
    again = write_word_bundle(tmp_path / "again", decoder=decoder)  # float16 already: no loss
    z, condition = normal(2, 3), normal(2, 16)

    assert torch.equal(decoder(z, condition), again.decoder(z, condition))
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_the_same_content_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_word_bundle(tmp_path / "again")

    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(["bundle.json", *(f"{stem}.safetensors" for stem in FILES)])
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_writing_over_a_bundle_leaves_none_when_it_is_cut_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.write_bytes

    def write_until_statistics(path: Path, body: bytes) -> int:
        if path.name == "statistics.safetensors":
            raise KeyboardInterrupt
        return original(path, body)

    monkeypatch.setattr(Path, "write_bytes", write_until_statistics)
    with pytest.raises(KeyboardInterrupt):
        write_word_bundle(folder, name="other")

    with pytest.raises(InvalidBundleError, match=r"bundle\.json is missing"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["bundle.json", *(f"{stem}.safetensors" for stem in FILES)])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(InvalidBundleError, match=f"{name} is missing"):
        read_bundle(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match="no bundle in"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize("stem", FILES)
@pytest.mark.parametrize("position", [0, 0.5, 1])
def test_an_altered_byte_is_refused(folder: Path, stem: str, position: float) -> None:
    path = folder / f"{stem}.safetensors"
    body = bytearray(path.read_bytes())
    body[int(position * (len(body) - 1))] ^= 1
    path.write_bytes(body)

    with pytest.raises(InvalidBundleError, match="does not match its sha256"):
        read_bundle(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version_is_refused(folder: Path, version: Any) -> None:
    edit_manifest(folder, lambda document: document.update(format_version=version))

    with pytest.raises(InvalidBundleError, match="bundle format"):
        read_bundle(folder)


@pytest.mark.parametrize("stem", FILES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_refused(folder: Path, stem: str, value: float) -> None:
    edit_tensors(folder, stem, lambda tensors: replace_last(tensors, lambda t: put_value(t, value)))

    with pytest.raises(InvalidBundleError, match="is not finite"):
        read_bundle(folder)


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"alpha": 4.0}, {"kind": "lora"}, {"digest": "0" * 64}]
)
def test_a_changed_layout_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_manifest(folder, lambda document: document["layout"].update(change))

    with pytest.raises(InvalidBundleError, match="does not match its digest"):
        read_bundle(folder)


@pytest.mark.parametrize("stem", FILES)
def test_a_wrong_shape_is_refused(folder: Path, stem: str) -> None:
    edit_tensors(folder, stem, lambda tensors: replace_last(tensors, lambda t: t[: t.shape[0] - 1]))

    with pytest.raises(InvalidBundleError):
        read_bundle(folder)


@pytest.mark.parametrize("stem", FILES)
def test_a_tensor_too_few_is_refused(folder: Path, stem: str) -> None:
    edit_tensors(folder, stem, lambda tensors: dict(sorted(tensors.items())[1:]))

    with pytest.raises(InvalidBundleError):
        read_bundle(folder)


@pytest.mark.parametrize("stem", ["decoder", "bases", "statistics"])
def test_a_tensor_too_many_is_refused(folder: Path, stem: str) -> None:
    edit_tensors(folder, stem, lambda tensors: tensors | {"extra.A": torch.zeros(1)})

    with pytest.raises(InvalidBundleError):
        read_bundle(folder)


@pytest.mark.parametrize("stem", FILES)
@pytest.mark.parametrize("edit", [lambda body: body[:-1], lambda body: b"pickle" + body])
def test_a_file_that_is_no_safetensors_is_refused(
    folder: Path, stem: str, edit: Callable[[bytes], bytes]
) -> None:
    edit_bytes(folder, stem, edit)

    with pytest.raises(InvalidBundleError, match=stem):
        read_bundle(folder)


@pytest.mark.parametrize("owner", [[0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 1, 1], [-1, 0, 1, 1, 2, 2]])
def test_task_vectors_of_unknown_or_missing_tasks_are_refused(
    folder: Path, owner: list[int]
) -> None:
    tensor = torch.tensor(owner, dtype=torch.int32)
    edit_tensors(folder, "task_vectors", lambda tensors: tensors | {"owner": tensor})

    with pytest.raises(InvalidBundleError, match="do not belong"):
        read_bundle(folder)


def test_a_bundle_without_a_reference_for_the_score_is_refused(folder: Path) -> None:
    empty = {"similarity_quantiles": torch.zeros(0)}
    edit_tensors(folder, "task_vectors", lambda tensors: tensors | empty)

    with pytest.raises(InvalidBundleError, match="quantiles"):
        read_bundle(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "diffusion"},
        {"preset": "paper"},
        {"preset": "paper", "depth": 0},
        {"colour": "red"},
        {"depth": "12"},
        {"depth": 3},
        {"width": -8},
        {"chunk_size": 0},
        {"condition_dim": 17},
        {"latent_dim": None},
    ],
)
def test_networks_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_manifest(folder, lambda document: document["generator"].update(change))

    with pytest.raises(InvalidBundleError):
        read_bundle(folder)


@pytest.mark.parametrize(
    "key",
    ["name", "version", "modality", "base", "encoder", "layout", "generator", "tasks", "files"],
)
def test_a_missing_key_is_refused(folder: Path, key: str) -> None:
    edit_manifest(folder, lambda document: document.pop(key))

    with pytest.raises(InvalidBundleError, match=key):
        read_bundle(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"bundle"', '{"format_version": 1}'])
def test_a_manifest_that_is_no_bundle_is_refused(folder: Path, text: str) -> None:
    (folder / "bundle.json").write_text(text)

    with pytest.raises(InvalidBundleError):
        read_bundle(folder)


def test_a_manifest_of_no_text_is_refused(folder: Path) -> None:
    (folder / "bundle.json").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(InvalidBundleError):
        read_bundle(folder)


def test_weights_too_large_for_float16_are_not_written(tmp_path: Path, pristine: Bundle) -> None:
    with torch.no_grad():
        decoder = write_word_bundle(tmp_path / "first").decoder
        next(decoder.parameters()).fill_(1e6)

    with pytest.raises(InvalidBundleError, match="not finite"):
        write_word_bundle(tmp_path / "second", decoder=decoder)


def test_a_generator_of_other_sizes_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError):
        write_word_bundle(tmp_path / "bundle", generator=GeneratorConfig("token", 16, 4))


def test_another_base_is_refused(pristine: Bundle) -> None:
    pristine.check_base(BASE_DIGEST)

    with pytest.raises(BaseModelMismatchError, match="load that base or another bundle"):
        pristine.check_base("f" * 64)


def test_another_encoder_is_refused(pristine: Bundle) -> None:
    pristine.check_encoder("words/16")

    with pytest.raises(TaskEncoderMismatchError, match="needs encoder words/16, not words/17"):
        pristine.check_encoder("words/17")


# ---------------------------------------------------------------- tasks by example

EXAMPLES = "example_vectors"


def extend(folder: Path) -> Bundle:
    return extend_bundle(
        folder, draw_example_vectors(), version="0.1.0", provenance={"made_by": "this test"}
    )


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_example_vectors_come_back(tmp_path: Path, pristine: Bundle) -> None:
    written = write_word_bundle(tmp_path / "bundle", examples=draw_example_vectors())
    bundle, known = read_bundle(tmp_path / "bundle"), draw_example_vectors()

    assert bundle.digest == written.digest != pristine.digest
    assert bundle.examples is not None
    assert bundle.examples.encoder_id == f"hidden_states/{BASE_DIGEST}/256"
    for name in ("vectors", "spread", "nonsense", "left_out"):
        torch.testing.assert_close(getattr(bundle.examples, name), getattr(known, name))
    assert bundle.examples.temperature == pytest.approx(known.temperature)
    body = (tmp_path / "bundle" / f"{EXAMPLES}.safetensors").read_bytes()
    listed = json.loads((tmp_path / "bundle/bundle.json").read_text())["files"]
    assert listed[f"{EXAMPLES}.safetensors"] == hashlib.sha256(body).hexdigest()


def test_a_bundle_without_example_vectors_says_nothing_of_them(folder: Path) -> None:
    assert read_bundle(folder).examples is None
    assert "example" not in (folder / "bundle.json").read_text()


def test_a_bundle_written_without_them_over_one_with_them_has_none(
    folder: Path, tmp_path: Path
) -> None:
    write_word_bundle(tmp_path / "again", examples=draw_example_vectors())
    write_word_bundle(tmp_path / "again")
    assert read_files(tmp_path / "again") == read_files(folder)


def test_an_extended_bundle_is_another_one_and_its_other_files_are_the_same(folder: Path) -> None:
    before, files = read_bundle(folder), read_files(folder)

    after = extend(folder)

    assert after.digest != before.digest
    assert (after.version, after.name) == ("0.1.0", before.name)
    assert after.examples is not None
    assert after.provenance == {"made_by": "a test", "examples": {"made_by": "this test"}}
    changed = {name for name, body in read_files(folder).items() if files.get(name) != body}
    assert changed == {"bundle.json", f"{EXAMPLES}.safetensors"}
    with pytest.raises(InvalidInputError, match="has example vectors already"):
        extend(folder)


@pytest.mark.parametrize("name", ["example_vectors.safetensors", "bundle.json"])
def test_an_extension_that_is_cut_short_leaves_the_bundle_as_it_was(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_bundle(folder).digest

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace" if name == "bundle.json" else "write_bytes", fail)
        with pytest.raises(KeyboardInterrupt):
            extend(folder)

    assert read_bundle(folder).digest == before
    assert extend(folder).examples is not None


def test_example_vectors_that_cannot_be_trusted_are_refused(folder: Path) -> None:
    extend(folder)
    path = folder / f"{EXAMPLES}.safetensors"
    body, manifest = path.read_bytes(), (folder / "bundle.json").read_text()

    path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(InvalidBundleError, match="does not match its sha256"):
        read_bundle(folder)
    path.unlink()
    with pytest.raises(InvalidBundleError, match="is missing"):
        read_bundle(folder)
    path.write_bytes(body)
    edit_manifest(folder, lambda document: document["examples"].update(encoder="another"))
    with pytest.raises(InvalidBundleError, match="were made by another, not hidden_states/"):
        read_bundle(folder)
    for edit, message in (
        (lambda state: state | {"vectors": state["vectors"][:2].clone()}, "the bundle's tasks"),
        (lambda state: state | {"nonsense": state["nonsense"][:, :2].clone()}, "of shapes"),
        (lambda state: state | {"temperature": torch.tensor(0.0)}, "temperature 0"),
        (lambda state: state | {"spread": torch.zeros(5)}, "of shapes"),
        (lambda state: state | {"left_out": torch.tensor([torch.nan])}, "is not finite"),
        (lambda state: {"vectors": state["vectors"]}, "malformed"),
    ):
        path.write_bytes(body)
        (folder / "bundle.json").write_text(manifest)
        edit_tensors(folder, EXAMPLES, edit)
        with pytest.raises(InvalidBundleError, match=message):
            read_bundle(folder)
