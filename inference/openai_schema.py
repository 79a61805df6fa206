"""OpenAI's forms: what a request may say, and what is said back.

Every field of a request is honoured or refused by name; `null` is as good as left out. Besides OpenAI's fields,
`top_k`, `min_p` and `repetition_penalty` are known, as vLLM has them.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import secrets
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic

from common import UserError, nearest
from inference.engine import Engine, Settings, TokenLogprob
from inference.scheduler import Event
from inference.tool_calls import Call, CallReader

LEAST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON does not have
STOPS = 16  # texts in `stop`


class ApiError(Exception):
    """An answer that is no reply: an HTTP status, and OpenAI's error body."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Any = None
    ) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        self.kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refuse(param: str, reason: str, code: str = "unsupported_value") -> ApiError:
    return ApiError(400, f"{param}: {reason}", param, code)


# ---------------------------------------------------------------------------------------------------------------------
# Requests


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(pydantic.BaseModel):
    """What both endpoints know."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    model: str
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = pydantic.Field(None, ge=1)
    n: int = pydantic.Field(1, ge=1, le=128)
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def check(self) -> None:
        """Raises ApiError for a field that another one would leave without effect."""
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "they are for streamed replies; set stream, or leave them out")


class ChatRequest(_Request):
    messages: list[Any] = pydantic.Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    modalities: list[Literal["text"]] | None = pydantic.Field(None, min_length=1)
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] = False
    tool_choice: Any = None
    tools: list[Any] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "they are told with log-probabilities; set logprobs, or leave them out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refuse("max_tokens", "max_completion_tokens says the same; give one of them")
        if not self.tools and self.parallel_tool_calls is not None:
            raise refuse("parallel_tool_calls", "there are no tools to call")
        if not self.tools and self.tool_choice not in (None, "none"):
            raise refuse("tool_choice", "there are no tools to choose from", "invalid_value")

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def kept_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    prompt: Any = None
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = pydantic.Field(None, ge=0, le=5)

    @property
    def longest(self) -> int:
        return self.max_tokens or 16

    @property
    def kept_logprobs(self) -> int | None:
        return self.logprobs


# Fields of OpenAI's that this server does not have, and what to do.
REFUSED = {
    "audio": "only text is read and written here",
    "function_call": "it was replaced by tool_choice; use that",
    "functions": "they were replaced by tools; use these",
    "metadata": "nothing is stored here, so there is nothing to attach it to",
    "moderation": "there is no moderation here",
    "prediction": "predicted output is not used here",
    "prompt_cache_key": "there is one cache, and every prompt is looked up in it",
    "prompt_cache_options": "there is one cache, and every prompt is looked up in it",
    "prompt_cache_retention": "how long a prompt is cached cannot be chosen here",
    "reasoning_effort": "this model's effort cannot be set; leave it out",
    "suffix": "this model cannot fill in text; leave it out",
    "verbosity": "this model's verbosity cannot be set; say it in the system message",
    "web_search_options": "nothing is searched here",
}


def read_request(raw: bytes, form: type[_Request]) -> Any:
    """The request in the body `raw`. Raises ApiError that names the field at fault."""
    try:
        content = json.loads(raw, parse_constant=_no_constant)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a character (a lone surrogate); send whole ones") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({error}); send a JSON object in UTF-8") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is no JSON object")
    given = {name: value for name, value in content.items() if value is not None}
    for name in content:
        if name in REFUSED and name not in form.model_fields:
            if name in given:
                raise refuse(name, REFUSED[name], "unsupported_parameter")
        elif name not in form.model_fields:
            raise refuse(name, f"there is no such field{nearest(name, form.model_fields)}", "unknown_parameter")
    try:
        request = form.model_validate({name: value for name, value in given.items() if name in form.model_fields})
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        param = _path(fault["loc"])
        missing = fault["type"] == "missing"
        raise ApiError(
            400, f"{param}: {fault['msg']}", param, "missing_required_parameter" if missing else "invalid_value"
        ) from None
    request.check()
    return request


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _path(places: Sequence[str | int]) -> str:
    text = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places)
    return text.lstrip(".")


def settings_of(request: Any, engine: Engine) -> Settings:
    """How the reply is drawn: the model's own settings, and those of the request before them."""
    own = Settings.of(engine.config)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.top_k == -1:  # vLLM's word for all
        given["top_k"] = 0
    if request.seed is not None:
        given["seed"] = request.seed % (1 << 64)
    given["stop"] = _stops(request.stop)
    given["logit_bias"] = _bias(request.logit_bias, engine)
    given["max_new_tokens"] = request.longest or own.max_new_tokens
    try:
        return dataclasses.replace(own, **given, logprobs=request.kept_logprobs)
    except UserError as error:
        raise ApiError(400, str(error), error.fields["name"], "invalid_value") from None


def _stops(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts) or len(texts) > STOPS:
        raise refuse("stop", f"give a text, or a list of at most {STOPS} that are not empty", "invalid_value")
    return tuple(texts)


def _bias(bias: dict[str, float] | None, engine: Engine) -> tuple[tuple[int, float], ...]:
    for token, value in (bias or {}).items():
        if not (token.isascii() and token.isdigit() and int(token) < engine.vocabulary_size):
            raise refuse("logit_bias", f"{token!r} is no token of this model (0 to {engine.vocabulary_size - 1})")
        if not -100 <= value <= 100:
            raise refuse("logit_bias", f"{value} must be from -100 to 100", "invalid_value")
    return tuple((int(token), float(value)) for token, value in (bias or {}).items())


def read_messages(messages: list[Any], has_tools: bool) -> list[dict[str, Any]]:
    """The conversation as templates take it. Raises ApiError that names the message and its field."""
    return [_message(message, f"messages[{i}]", has_tools) for i, message in enumerate(messages)]


_ROLES = ("system", "developer", "user", "assistant", "tool")


def _message(message: Any, where: str, has_tools: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise refuse(where, "a message is an object with role and content", "invalid_value")
    role = message.get("role")
    if role not in _ROLES:
        raise refuse(f"{where}.role", f"must be one of {', '.join(_ROLES)}", "invalid_value")
    known = {"system": (), "user": (), "developer": (), "assistant": ("tool_calls",), "tool": ("tool_call_id",)}[role]
    for name, value in message.items():
        if name not in ("role", "content", *known) and value not in (None, [], ""):
            raise refuse(f"{where}.{name}", "this model's templates have no place for it", "unsupported_parameter")
    content = message.get("content")
    if content is None and role != "assistant":
        raise refuse(f"{where}.content", "only an assistant's may be null", "invalid_value")
    read = {"role": "system" if role == "developer" else role, "content": _text(content, f"{where}.content")}
    if role == "tool" or message.get("tool_calls"):
        if not has_tools:
            raise refuse(where, "this model's chat template has no tools")
        if role == "tool":
            read["tool_call_id"] = _string(message.get("tool_call_id"), f"{where}.tool_call_id")
        else:
            read["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    return read


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise refuse(where, "must be text, or a list of parts", "invalid_value")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise refuse(f"{where}[{i}]", "only parts of the type text are read, with their text")
        if unknown := [name for name in part if name not in ("type", "text") and part[name] is not None]:
            raise refuse(f"{where}[{i}].{unknown[0]}", "a part has type and text", "unsupported_parameter")
    return "".join(part["text"] for part in content)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise refuse(where, "must be text", "invalid_value")
    return value


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise refuse(where, "must be a list", "invalid_value")
    read = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        if not isinstance(call, dict) or call.get("type") != "function" or not isinstance(call.get("function"), dict):
            raise refuse(at, "a call has id, type: function, and function", "invalid_value")
        name = _string(call["function"].get("name"), f"{at}.function.name")
        try:
            arguments = json.loads(_string(call["function"].get("arguments"), f"{at}.function.arguments"))
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise refuse(f"{at}.function.arguments", "must be a JSON object, as text", "invalid_value")
        function = {"name": name, "arguments": arguments}
        read.append({"id": _string(call.get("id"), f"{at}.id"), "type": "function", "function": function})
    return read


@dataclass
class Tools:
    """What a reply may call: functions in OpenAI's form; `required`: it must, and `single`: once at most."""

    functions: list[dict[str, Any]]
    required: bool = False
    single: bool = False

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.functions]

    @property
    def strict(self) -> bool:
        return any(tool["function"].get("strict") for tool in self.functions)


def read_tools(request: ChatRequest, has_tools: bool) -> Tools:
    """The tools of a request, after its tool_choice."""
    for i, tool in enumerate(request.tools or []):
        _check_tool(tool, f"tools[{i}]")
    choice = request.tool_choice
    if not request.tools:
        return Tools([])
    if not has_tools:
        raise refuse("tools", "this model's chat template has none; take one that has (template=qwen)")
    if isinstance(choice, dict):
        named = [{"type": "function", "function": {"name": tool["function"]["name"]}} for tool in request.tools]
        chosen = [tool for tool, one in zip(request.tools, named, strict=True) if choice == one]
        if not chosen:
            raise refuse("tool_choice", "must be none, auto, required, or the function of one of the tools")
        return Tools(chosen, required=True, single=True)
    if choice not in (None, "none", "auto", "required"):
        raise refuse("tool_choice", "must be none, auto, required, or a function", "invalid_value")
    if choice == "none":
        return Tools([])
    return Tools(request.tools, required=choice == "required", single=request.parallel_tool_calls is False)


def _check_tool(tool: Any, where: str) -> None:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise refuse(where, "a tool has type: function, and a function")
    function = tool["function"]
    _string(function.get("name"), f"{where}.function.name")
    kinds = {"name": str, "description": str, "parameters": dict, "strict": bool}
    for name, value in function.items():
        if name not in kinds:
            raise refuse(f"{where}.function.{name}", "there is no such field", "unknown_parameter")
        if value is not None and not isinstance(value, kinds[name]):
            raise refuse(f"{where}.function.{name}", f"must be of the type {kinds[name].__name__}", "invalid_value")
    if unknown := set(tool) - {"type", "function"}:
        raise refuse(f"{where}.{min(unknown)}", "there is no such field", "unknown_parameter")


def plain_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as templates show it: without what is for the server."""
    function = {name: value for name, value in tool["function"].items() if name != "strict" and value is not None}
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": {"description": "", **function}}


def read_schema(response_format: dict[str, Any] | None) -> Any:
    """The JSON schema that the reply is held to; None: any text."""
    response_format = {"type": "text"} if response_format is None else response_format
    kind = response_format.get("type")
    known = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    if kind not in known:
        raise refuse("response_format", "its type must be text, json_object or json_schema")
    if unknown := set(response_format) - known[kind]:
        raise refuse(f"response_format.{min(unknown)}", "there is no such field", "unknown_parameter")
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    named = response_format.get("json_schema")
    where = "response_format.json_schema"
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise refuse(f"{where}.schema", "must be a JSON schema", "invalid_value")
    if unknown := set(named) - {"name", "description", "schema", "strict"}:
        raise refuse(f"{where}.{min(unknown)}", "there is no such field", "unknown_parameter")
    return named["schema"]


def read_prompts(prompt: Any, engine: Engine) -> list[list[int]]:
    """The prompts of a completion as token ids: a text, texts, ids, or lists of ids."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_id(prompt[0])):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise refuse("prompt", "give a text, a list of texts, or token ids", "missing_required_parameter")
    found = []
    for i, one in enumerate(prompt):
        if isinstance(one, str):
            found.append(engine.text_ids(one) or sorted(engine.stop_ids)[:1])
        elif isinstance(one, list) and one and all(_is_id(token) for token in one):
            if max(one) >= engine.vocabulary_size or min(one) < 0:
                raise refuse(f"prompt[{i}]", "a token id is none of this model's", "invalid_value")
            found.append(one)
        else:
            raise refuse(f"prompt[{i}]", "must be text, or a list of token ids", "invalid_value")
        if len(found[-1]) >= engine.context:
            reason = f"has {len(found[-1])} tokens, and the model reads {engine.context}; shorten it"
            raise refuse("prompt", reason, "context_length_exceeded")
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------------
# Replies


@dataclass
class Choice:
    """One of the replies to a request, as it grows."""

    index: int
    reader: CallReader | None = None
    single: bool = False  # one call at most
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0  # characters of the tokens whose log-probabilities were told
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    @property
    def satisfied(self) -> bool:
        """Whether it has all that was asked for before the model ends it."""
        return self.single and bool(self.calls)

    def take(self, event: Event, reason: str | None) -> list[dict[str, Any]]:
        """The deltas that an event makes; `reason` is how the reply ended, if it did."""
        self.logprobs += event.logprobs
        parts: list[str | Call] = [event.text] if event.text else []
        if self.reader:
            parts = self.reader.feed(event.text) + (self.reader.end() if event.end else [])
        deltas = []
        for part in parts:
            if not self.satisfied:
                deltas += [{"content": part}] if isinstance(part, str) else self._call(part)
                self.text += part if isinstance(part, str) else ""
        if self.satisfied:
            self.finish_reason = "tool_calls"
        elif event.end:
            self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason
        return deltas

    def _call(self, call: Call) -> list[dict[str, Any]]:
        head = {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": ""}}
        index = len(self.calls)
        self.calls.append({**head, "function": {"name": call.name, "arguments": call.arguments}})
        rest = {"index": index, "function": {"arguments": call.arguments}}
        return [{"tool_calls": [{"index": index, **head}]}, {"tool_calls": [rest]}]

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message |= {"content": self.text.strip() or None, "tool_calls": self.calls}
        return message


def call_id() -> str:
    """Nine letters and digits, as Mistral's template wants them."""
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(9))


def head(request_id: str, kind: str, model: str, created: int | None = None) -> dict[str, Any]:
    """What every answer and every chunk begins with."""
    return {"id": request_id, "object": kind, "created": created or int(time.time()), "model": model}


def chat_logprobs(tokens: Sequence[TokenLogprob], engine: Engine) -> dict[str, Any]:
    """OpenAI's form of log-probabilities in a chat; the end of the turn is no part of the text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = engine.token_bytes(token)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelled)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*one) for one in token.top]}
        for token in tokens
        if token.id not in engine.stop_ids
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], engine: Engine, choice: Choice, prefix: int) -> dict[str, Any]:
    """The older form, for the next `tokens` of a choice; `prefix` characters stand before its text."""
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        if token.id in engine.stop_ids:
            continue
        spelled = engine.token_bytes(token.id)
        told["tokens"].append(_named(spelled))
        told["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB))
        top = {_named(engine.token_bytes(i)): max(value, LEAST_LOGPROB) for i, value in token.top}
        told["top_logprobs"].append(top)
        told["text_offset"].append(prefix + choice.offset)
        choice.offset += len(choice.decoder.decode(spelled))
    return told


def _named(spelled: bytes) -> str:
    """A token as the older form names it; a part of a character by its bytes."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def usage(prompts: Sequence[int], cached: Sequence[int], completions: int) -> dict[str, Any]:
    """Token counts; `prompts` and `cached` have one entry a prompt, however many replies it has."""
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": completions,
        "total_tokens": sum(prompts) + completions,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
    }
