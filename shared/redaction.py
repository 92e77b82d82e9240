"""Access tokens and passwords: what they look like, and texts without them."""

import re

COMMIT = r"(?<![\w/\\])[0-9a-f]{40}(?![\w/\\])"
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|A[KS]IA[A-Z0-9]{16}|sk-(?:[a-z]+-)?[A-Za-z0-9]{20,}|gh[pousr]_\w{30,}|wandb_v1_\w{20,})\b"
    r"|(?:(?<=://)|(?<=:/))[^/\s@:]*:(?!\d{1,5}/)\S+(?=@)"  # a `Path` has one slash there
    r"|(?:(?<=http://|ttps://)|(?<=http:/|ttps:/))[^/\s]+(?=@)"
    r"|(?<=[?&])(?:sig|token|access_token|api_key|password|X-Amz-Signature)=[^&\s'\"]+",
    re.IGNORECASE,
)
"""Access tokens of the hub, S3, OpenAI, GitHub and Weights & Biases, and what logs in within a URL."""
SECRET = re.compile(rf"{TOKEN.pattern}|{COMMIT}", re.IGNORECASE)
"""Also 40 hex digits, a key of Weights & Biases or a commit."""
HAS_SECRET = "has an access token or password; give it through a login or an environment variable"


def redacted(text: str) -> str:
    """Return the text with *** for every `TOKEN`."""
    return TOKEN.sub("***", text)
