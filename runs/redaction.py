"""Keys and tokens that somebody typed: they stand in no record, report or error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

REDACTED = "***"
_NAME = re.compile(r"(^|[_.-])(token|api_?key|access_?key|password|passwd|secret)$", re.IGNORECASE)
# Tokens of Hugging Face, of ModelScope, of OpenAI and those that follow it, and of GitHub; a password in an address.
_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|ms-[0-9a-f]{8}-[0-9a-f-]{20,}|sk-[A-Za-z0-9_-]{16,}|gh[opsu]_[A-Za-z0-9]{16,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, as hf_hub_token does."""
    return bool(_NAME.search(name))


def redact(text: str) -> str:
    """`text` without the tokens that are known by their form, and without passwords in addresses."""
    return _VALUE.sub(REDACTED, text)


def typed_command() -> list[str]:
    """The command line of this process as run.json and metrics.json record it, without secrets."""
    return ["python", Path(sys.argv[0]).name, *redact_arguments(sys.argv[1:])]


def redact_arguments(arguments: list[str]) -> list[str]:
    """Arguments without secrets, typed as name=VALUE, --name=VALUE or --name VALUE."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        before = shown[-1] if shown else ""
        if equals and is_secret(name):
            argument = f"{name}={REDACTED}"
        elif before.startswith("--") and "=" not in before and is_secret(before):
            argument = REDACTED
        shown.append(redact(argument))
    return shown
