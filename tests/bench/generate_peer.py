"""transformers' `generate` in this process: what one stream is compared with."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.inference.base_model import EMBEDDED_SMOLLM2, BaseModel, load_base_model


@dataclass(frozen=True)
class GeneratePeer:
    """The base model in bfloat16, plain, and with one adapter by PEFT.

    Attributes:
        base: the embedded SmolLM2.
        adapted: another copy of it with the adapter, unmerged, as a server would have it.
    """

    base: BaseModel
    adapted: Any

    def rate(self, prompt: str, tokens: int, *, adapted: bool) -> float:
        """Tokens per second of one greedy completion of exactly so many tokens, prefill and all."""
        model = self.adapted if adapted else self.base.model
        inputs = self.base.tokenizer(prompt, return_tensors="pt")
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                **inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
            )
        seconds = time.perf_counter() - started
        grown = output.shape[1] - inputs["input_ids"].shape[1]
        assert grown == tokens, f"{grown} tokens, not {tokens}"
        return tokens / seconds


def load_generate_peer(adapter: Path) -> GeneratePeer:
    """Loads both models.

    Args:
        adapter: a PEFT directory.
    """
    from peft import PeftModel

    plain = load_base_model(EMBEDDED_SMOLLM2, device="cpu", dtype="bfloat16")
    other = load_base_model(EMBEDDED_SMOLLM2, device="cpu", dtype="bfloat16")
    adapted = PeftModel.from_pretrained(
        other.model, str(adapter), autocast_adapter_dtype=False, torch_dtype=torch.bfloat16
    ).to(torch.bfloat16)
    return GeneratePeer(plain, adapted.eval())
