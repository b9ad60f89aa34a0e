"""Cached bytes give back the same record, and nothing altered passes for one."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.adapters.record import AdapterRecord
from service.errors import InvalidAdapterError
from service.synthesis.synthesizer import digest_vector
from tests.fixtures.adapter_records import LAYOUT, make_record


def test_record_survives_the_round_trip() -> None:
    record = make_record()

    back = AdapterRecord.from_bytes(record.to_bytes(), LAYOUT)

    assert torch.equal(back.vector, record.vector)
    assert replace(back, vector=record.vector).__dict__ == record.__dict__
    assert back.adapter_id == record.adapter_id
    assert back.size_bytes == 2 * LAYOUT.num_params


def test_bytes_are_deterministic() -> None:
    assert make_record().to_bytes() == make_record().to_bytes()


def test_values_that_are_not_finite_are_refused() -> None:
    vector = make_record().vector.clone()
    vector[3] = float("nan")
    record = replace(make_record(), vector=vector, vector_sha256=digest_vector(vector))

    with pytest.raises(InvalidAdapterError, match="not finite"):
        AdapterRecord.from_bytes(record.to_bytes(), LAYOUT)


def test_an_altered_value_is_refused() -> None:
    content = bytearray(make_record().to_bytes())
    content[-1] ^= 1

    with pytest.raises(InvalidAdapterError, match="sha256"):
        AdapterRecord.from_bytes(bytes(content), LAYOUT)


def test_another_layout_is_refused() -> None:
    with pytest.raises(InvalidAdapterError, match="another adapter layout"):
        AdapterRecord.from_bytes(make_record().to_bytes(), replace(LAYOUT, alpha=8.0))


@pytest.mark.parametrize(
    "vector", [torch.zeros(31, dtype=torch.float16), torch.zeros(32, dtype=torch.float32)]
)
def test_another_shape_or_dtype_is_refused(vector: torch.Tensor) -> None:
    header = json.loads(read_metadata(make_record().to_bytes()))
    header["vector_sha256"] = digest_vector(vector)
    content = safetensors.torch.save({"vector": vector}, {"record": json.dumps(header)})

    with pytest.raises(InvalidAdapterError, match=r"expected torch\.float16 of shape"):
        AdapterRecord.from_bytes(content, LAYOUT)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not safetensors",
        make_record().to_bytes()[:-1],
        safetensors.torch.save({"vector": torch.zeros(32)}),
        safetensors.torch.save({"vector": torch.zeros(32)}, {"record": "[]"}),
        safetensors.torch.save({"vector": torch.zeros(32)}, {"record": "[" * 100_000}),
        safetensors.torch.save({"other": torch.zeros(32)}, {"record": "{}"}),
    ],
    ids=["empty", "text", "truncated", "no metadata", "not an object", "deep", "no vector"],
)
def test_malformed_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidAdapterError, match="malformed"):
        AdapterRecord.from_bytes(content, LAYOUT)


@given(position=st.integers(0, len(make_record().to_bytes()) - 1), mask=st.integers(1, 255))
def test_no_flipped_byte_raises_anything_else(position: int, mask: int) -> None:
    content = bytearray(make_record().to_bytes())
    content[position] ^= mask
    try:
        back = AdapterRecord.from_bytes(bytes(content), LAYOUT)
    except InvalidAdapterError:
        return
    assert torch.equal(back.vector, make_record().vector)


def read_metadata(content: bytes) -> str:
    """The record's JSON, straight from the header."""
    length = int.from_bytes(content[:8], "little")
    text: str = json.loads(content[8 : 8 + length])["__metadata__"]["record"]
    return text
