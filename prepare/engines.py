"""Two ways to ask a model about pictures: a local model of transformers, or a server that speaks OpenAI's protocol."""

import base64
import io
import json
import os
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shared.errors import UsageError, require_extra

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ANSWER_TOKENS = 512
KEY_VARIABLE = "OPENAI_API_KEY"
REFUSAL = re.compile(r"(i.?m sorry|sorry,|i can(no|.)t |i.?m unable|i am unable|as an ai\b)", re.IGNORECASE)
"""Beginnings of an answer that is no description."""
THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


class NoAnswer(Exception):
    """A clip that got no answer, and why; `transient` if the same question may succeed later."""

    def __init__(self, reason: str, *, transient: bool) -> None:
        super().__init__(reason)
        self.transient = transient


@dataclass(frozen=True, slots=True)
class Answer:
    """One text of a model, and how it ended."""

    text: str
    cut_off: bool = False
    refused: bool = False

    def checked(self) -> str:
        """Return the text as one line. Raises `NoAnswer` for an answer that is empty, cut off or a refusal."""
        text = " ".join(THOUGHTS.sub("", self.text).split()).strip("\"'`* ")
        if self.refused or REFUSAL.match(text):
            raise NoAnswer(f"refused: {text[:80] or 'by the content filter'}", transient=False)
        if self.cut_off:
            raise NoAnswer(f"cut off after {MAX_ANSWER_TOKENS} tokens: {text[:80]}", transient=False)
        if not text:
            raise NoAnswer("empty answer", transient=False)
        return text


Ask = Callable[[Sequence["Image"], str], Answer]
"""Pictures, none for a text model, and a prompt to an answer.

Raises `NoAnswer` for one clip, `UsageError` where no clip would succeed.
"""


def server(model: str, url: str | None, tries: int, deadline_seconds: float) -> Ask:
    """Return an `Ask` for a chat model behind `url` (None: OPENAI_BASE_URL, or OpenAI's own server).

    The `openai` package tries a request `tries` times and waits `deadline_seconds` for a server that sends nothing.
    The key is read from OPENAI_API_KEY and stands in no message. Raises `UsageError` if the URL cannot be used.
    """
    require_extra("openai", "--engine openai", "prepare")
    import openai

    key = os.environ.get(KEY_VARIABLE, "")
    url = url or os.environ.get("OPENAI_BASE_URL")
    if not url and not key:
        raise UsageError(f"--engine openai: give the server's --url, or set {KEY_VARIABLE}")
    if url and (urlsplit(url).scheme not in ("http", "https") or "@" in urlsplit(url).netloc):
        raise UsageError(f"--url: expected http(s)://host/v1 without user or password; the key is {KEY_VARIABLE}")
    client = openai.OpenAI(api_key=key or "none", base_url=url, max_retries=tries - 1, timeout=deadline_seconds)

    def shown(error: BaseException) -> str:
        text = str(error).replace(key, "***") if key else str(error)
        return f"{' '.join(text.split())[:200] or type(error).__name__} (tries: {tries})"

    def ask(images: Sequence["Image"], prompt: str) -> Answer:
        content: list[Any] = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        messages: list[Any] = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        try:
            response = client.chat.completions.with_raw_response.create(
                model=model, messages=messages, max_tokens=MAX_ANSWER_TOKENS, temperature=0
            )
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                raise UsageError(f"--model {model}: {shown(error)}; check --url and {KEY_VARIABLE}") from None
            transient = error.status_code >= 500 or error.status_code in (408, 409, 429)
            raise NoAnswer(shown(error), transient=transient) from None
        except openai.APIConnectionError as error:
            raise NoAnswer(shown(error.__cause__ or error), transient=True) from None
        return _parse(response.content)

    weakref.finalize(ask, client.close)
    return ask


def _parse(body: bytes) -> Answer:
    """Return the answer in a chat completion. Raises `NoAnswer` for anything else."""
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content") or message.get("refusal") or "", message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NoAnswer("the answer is no chat completion", transient=True) from None
    return Answer(str(text), finish == "length", finish == "content_filter" or bool(refusal))


def _data_url(image: "Image") -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def local_model(model: str, takes_images: bool) -> Ask:
    """Return an `Ask` for a model by its hub name or folder, one for images and text or one for text.

    The checkpoint's own precision, on the GPU if there is one, greedy decoding. Raises `UsageError` if loading fails.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        processor = (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(model)
        kind = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
        network = kind.from_pretrained(model, dtype="auto").to(device).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(f"--model {model}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if not processor.chat_template:
        raise UsageError(f"--model {model}: has no chat template; take an instruction-tuned model")
    tokenizer = processor.tokenizer if takes_images else processor
    ends = network.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @torch.inference_mode()
    def ask(images: Sequence["Image"], prompt: str) -> Answer:
        pictures = [{"type": "image", "image": image} for image in images]
        content = [*pictures, {"type": "text", "text": prompt}] if takes_images else prompt
        messages = [{"role": "user", "content": content}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(messages, **options).to(device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(network.dtype)
        try:
            output = network.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        except torch.OutOfMemoryError:
            raise UsageError(f"--model {model}: out of GPU memory; take fewer --frames or a smaller model") from None
        made = output[0, inputs["input_ids"].shape[1] :].tolist()
        cut_off = len(made) >= MAX_ANSWER_TOKENS and made[-1] not in stops
        return Answer(tokenizer.decode(made, skip_special_tokens=True), cut_off)

    return ask
