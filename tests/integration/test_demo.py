"""The README's first command, on the shipped bundle."""

import pytest

from service.demo import run_demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_demo_shows_two_different_answers(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_demo() == 0
    output = capfd.readouterr().out
    by_example = output.split("examples instead of words")[1].split("---")[0]
    nearest = by_example.split("nearest")[1].splitlines()[0]
    assert nearest.split('"')[1] == "recipes", nearest
    answers = output.split("--- POST /infer")[1:]
    assert len(answers) == 4  # text, then detection: base and adapter each
    assert answers[0].splitlines()[1] != answers[1].splitlines()[1]
    assert "sofa" not in answers[2].splitlines()[1]
    assert "sofa" in answers[3].splitlines()[1]
    assert "icm_lora_generated_tokens_total" in output
    assert '"recipes": ' in output
