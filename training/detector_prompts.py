"""Tokenizer and processor of the embedded detector."""

from collections.abc import Iterable
from typing import Any

from service.inference.embedded_detector import GRID, NUM_BINS
from service.synthesis.backbone import IMAGE_PIXELS

VOCABULARY = 600
"""Byte-level BPE tokens, before the location tokens."""

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<image>")


def build_processor(texts: Iterable[str]) -> Any:
    """A Florence-2 processor with a byte-level BPE learned from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, Florence2Processor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=200,
    )
    fast.add_tokens([f"<loc_{i}>" for i in range(NUM_BINS)])
    images: Any = CLIPImageProcessor(
        size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    images.image_seq_length = GRID * GRID
    return Florence2Processor(images, fast)
