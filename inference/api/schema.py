"""OpenAI's request forms: every field is honoured, ignored because the answer stays the same, or refused by name.

`null` is as good as left out. Besides OpenAI's fields, `top_k`, `min_p` and `repetition_penalty` are known, as vLLM has
them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pydantic

from common import Message, UserError, nearest_word
from inference.api.errors import ApiError, refuse, unknown_field
from inference.engine import Engine
from inference.request import Settings

MAX_STOPS = 16  # texts in `stop`


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; nothing is padded here


class Request(pydantic.BaseModel):
    """What all endpoints know."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    prompt_field: ClassVar[str]  # where the prompt stands
    refused: ClassVar[dict[str, Message]] = {}  # fields that would change the answer and cannot be honoured
    limit_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)  # that limit the reply's tokens; the usual one last

    model: str
    seed: int | None = None
    stop: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    # ignored: they change what a provider stores, caches or charges, never the answer
    metadata: dict[str, Any] | None = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    n: int = pydantic.Field(1, ge=1, le=128)

    def check(self) -> None:
        """Raises ApiError for a field that another one would leave without effect."""
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", Message("they are for streamed replies; set stream, or leave them out"))

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that limits the reply's tokens, as the client wrote it, and its value."""
        fields = [(name, getattr(self, name)) for name in self.limit_fields]
        return next((field for field in fields if field[1] is not None), fields[-1])

    @property
    def kept_logprobs(self) -> int | None:
        """Alternatives whose log-probabilities are wanted with each token; None: no log-probabilities."""
        raise NotImplementedError


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    prompt_field = "messages"
    limit_fields = ("max_completion_tokens", "max_tokens")
    refused: ClassVar[dict[str, Message]] = {
        "audio": Message("only text is read and written here"),
        "function_call": Message("it was replaced by {field}; use that", field="tool_choice"),
        "functions": Message("it was replaced by {field}; use that", field="tools"),
        "moderation": Message("there is no moderation here; leave it out"),
        "prediction": Message("predicted output is not used here; leave it out"),
        "reasoning_effort": Message("this model's effort cannot be set; leave it out"),
        "verbosity": Message("this model's verbosity cannot be set; say it in the system message"),
        "web_search_options": Message("nothing is searched here; leave it out"),
    }

    messages: list[Any] = pydantic.Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    modalities: list[Literal["text"]] | None = pydantic.Field(None, min_length=1)
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] = False
    tool_choice: Any = None
    tools: list[Any] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", Message("they come with log-probabilities; set logprobs, or leave them out"))
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refuse(
                "max_tokens", Message("{field} means the same; give one of them", field="max_completion_tokens")
            )
        if not self.tools and self.parallel_tool_calls is not None:
            raise refuse(
                "parallel_tool_calls", Message("there are no tools in this request; give tools, or leave it out")
            )
        if not self.tools and self.tool_choice not in (None, "none"):
            raise refuse(
                "tool_choice",
                Message("there are no tools in this request; give tools, or leave it out"),
                "invalid_value",
            )

    @property
    def kept_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    """POST /v1/completions: prompts without a conversation."""

    prompt_field = "prompt"
    refused: ClassVar[dict[str, Message]] = {
        "suffix": Message("this model cannot fill in text before a suffix; leave it out")
    }

    prompt: Any = None
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = pydantic.Field(None, ge=0, le=5)
    max_tokens: int = pydantic.Field(16, ge=1)

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n):
            raise refuse(
                "best_of", Message("best_of larger than n is not supported; leave it out, or give it the value of n")
            )
        if self.echo and self.logprobs is not None:
            raise refuse("echo", Message("the prompt's log-probabilities are not computed; take echo or logprobs"))

    @property
    def kept_logprobs(self) -> int | None:
        return self.logprobs


def read_request(raw: bytes, form: type[Request]) -> Any:
    """The request in the body `raw`. Raises ApiError that names the field at fault."""
    try:
        content = json.loads(raw, parse_constant=_refuse_constant)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, Message("the body has half a character (a lone surrogate); send whole characters")
        ) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, Message("the body is not JSON ({reason}); send a JSON object in UTF-8", reason=error)
        ) from None
    if not isinstance(content, dict):
        raise ApiError(400, Message("the body is not a JSON object"))
    given = {name: value for name, value in content.items() if value is not None}
    known = form.model_fields
    for name in content:
        if name in form.refused:
            if name in given:
                raise refuse(name, form.refused[name], "unsupported_parameter")
        elif name not in known:
            raise unknown_field(name, nearest_word(name, known))
    try:
        request = form.model_validate({name: value for name, value in given.items() if name in known})
    except pydantic.ValidationError as error:
        raise _invalid(error.errors()[0]) from None
    request.check()
    return request


def _invalid(fault: Any) -> ApiError:
    """The ApiError of a pydantic fault."""
    param = _path(fault["loc"])
    missing = fault["type"] == "missing"
    reason = Message("is missing; give it") if missing else Message("{reason}", reason=fault["msg"])
    return refuse(param, reason, "missing_required_parameter" if missing else "invalid_value")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _path(places: Sequence[str | int]) -> str:
    text = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places)
    return text.lstrip(".")


def sampling_settings(request: Request, engine: Engine) -> Settings:
    """The model's own settings, and those of the request before them. Raises ApiError that names the field."""
    own = Settings.of(engine.config)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.top_k == -1:  # vLLM's value for all
        given["top_k"] = 0
    if request.seed is not None:
        given["seed"] = request.seed % (1 << 64)
    given["stop"] = _stops(request.stop)
    given["logit_bias"] = _bias(request.logit_bias, engine)
    limit_field, most = request.limit
    given["max_new_tokens"] = most or own.max_new_tokens
    try:
        return dataclasses.replace(own, **given, logprobs=request.kept_logprobs)
    except UserError as error:
        name = error.fields["name"]
        param = limit_field if name == "max_new_tokens" else name
        raise ApiError(
            400, Message(error.sentence, **{**error.fields, "name": param}), param=param, code="invalid_value"
        ) from None


def _stops(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    wrong = not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts)
    if wrong or len(texts) > MAX_STOPS:
        raise refuse(
            "stop",
            Message("give a text, or a list of at most {most} texts that are not empty", most=MAX_STOPS),
            "invalid_value",
        )
    return tuple(texts)


def _bias(bias: dict[str, float] | None, engine: Engine) -> tuple[tuple[int, float], ...]:
    for token, value in (bias or {}).items():
        number = int(token) if token.isascii() and token.isdigit() and len(token) < 10 else None
        if number is None or number >= engine.vocabulary_size:
            last = engine.vocabulary_size - 1
            raise refuse(
                "logit_bias",
                Message("'{token}' is no token id of this model (0 to {last})", token=token[:40], last=last),
                "invalid_value",
            )
        if not -100 <= value <= 100:
            raise refuse(
                "logit_bias",
                Message("{value} is out of range; it must be from -100 to 100", value=value),
                "invalid_value",
            )
    return tuple((int(token), float(value)) for token, value in (bias or {}).items())


def read_schema(response_format: dict[str, Any] | None) -> Any:
    """The JSON schema that the reply is held to; None: any text."""
    response_format = {"type": "text"} if response_format is None else response_format
    kind = response_format.get("type")
    known = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    if kind not in known:
        raise refuse("response_format", Message("its type must be text, json_object or json_schema"))
    if unknown := set(response_format) - known[kind]:
        raise unknown_field(f"response_format.{min(unknown)}")
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    return read_named_schema(response_format.get("json_schema"), "response_format.json_schema")


def read_named_schema(named: Any, where: str) -> dict[str, Any]:
    """The schema of {"name": ..., "schema": {...}}."""
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise refuse(f"{where}.schema", Message("must be a JSON schema (an object)"), "invalid_value")
    if unknown := set(named) - {"name", "description", "schema", "strict"}:
        raise unknown_field(f"{where}.{min(unknown)}")
    return named["schema"]


def read_prompts(prompt: Any, engine: Engine) -> list[list[int]]:
    """The prompts of a completion as token ids: a text, texts, ids, or lists of ids."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_id(prompt[0])):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise refuse("prompt", Message("give a text, a list of texts, or token ids"), "missing_required_parameter")
    found = []
    for i, one in enumerate(prompt):
        if isinstance(one, str):
            found.append(engine.text_ids(one) or sorted(engine.stop_ids)[:1])
        elif isinstance(one, list) and one and all(_is_id(token) for token in one):
            if max(one) >= engine.vocabulary_size or min(one) < 0:
                raise refuse(f"prompt[{i}]", Message("has a token id that this model does not have"), "invalid_value")
            found.append(one)
        else:
            raise refuse(f"prompt[{i}]", Message("must be text, or a list of token ids"), "invalid_value")
        if len(found[-1]) >= engine.context:
            reason = Message(
                "has {tokens} tokens, and the model reads {context}; shorten it",
                tokens=len(found[-1]),
                context=engine.context,
            )
            raise refuse("prompt", reason, "context_length_exceeded")
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
