"""A vision-language model of transformers' own classes with random weights, its processor and a chat template."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)
WORDS = [
    "a",
    "dog",
    "runs",
    "over",
    "the",
    "grass",
    "in",
    "warm",
    "light",
    "while",
    "camera",
    "follows",
    "it",
    "slowly",
]


def save_vlm(folder: Path, *, ends: bool = True) -> Path:
    """Write the model and its processor to `folder`; it answers with about ten of `WORDS`, or never ends."""
    vocabulary = {name: number for number, name in enumerate(["<pad>", "</s>", "<unk>", "<image>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **special)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=32),
        text_config=LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=len(vocabulary), max_position_embeddings=512
        ),
        image_token_index=vocabulary["<image>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    never = [0, 2, 3] if ends else [0, 1, 2, 3]
    growing = (8, 2.0) if ends else None
    model.generation_config.update(
        eos_token_id=1, pad_token_id=0, suppress_tokens=never, exponential_decay_length_penalty=growing
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
