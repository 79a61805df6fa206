"""What the environment says about the server (LLaMA-Factory's names where it has them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common import UserError
from runs.network import is_loopback


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, and who may use it."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    model_name: str | None = None
    root_path: str = ""
    slots: int = 8  # replies computed at once
    cors_origins: tuple[str, ...] = ()  # web pages that may ask; "*": all
    allowed_hosts: tuple[str, ...] = ()  # host names of this server, in addition to the loopback names; "*": all

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ServerOptions:
        """Raises UserError for an impossible value, and for a host that others reach without a key."""
        options = cls(
            host=environment.get("API_HOST") or cls.host,
            port=_whole_number(environment, "API_PORT", cls.port, 0, 65535),
            key=environment.get("API_KEY") or None,
            model_name=environment.get("API_MODEL_NAME") or None,
            root_path=environment.get("FASTAPI_ROOT_PATH") or "",
            slots=_whole_number(environment, "MAX_CONCURRENT", cls.slots, 1, 256),
            cors_origins=_origins(environment),
            allowed_hosts=_words(environment, "API_ALLOWED_HOSTS"),
        )
        if not is_loopback(options.host) and not options.key:
            raise UserError("API_HOST={host} opens the model to others; set API_KEY too", host=options.host)
        return options


def _words(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(word.strip().lower() for word in environment.get(name, "").split(",") if word.strip())


def _origins(environment: Mapping[str, str]) -> tuple[str, ...]:
    origins = _words(environment, "API_CORS_ORIGINS")
    for origin in origins:
        scheme, _, host = origin.partition("://")
        if origin not in ("*", "null") and not (scheme and host and "/" not in host):
            raise UserError("API_CORS_ORIGINS: {origin} must be SCHEME://HOST, SCHEME://HOST:PORT or *", origin=origin)
    return origins


def _whole_number(environment: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
        raise UserError(
            "{name}={value} must be a whole number from {low} to {high}", name=name, value=text[:40], low=low, high=high
        )
    return int(text)
