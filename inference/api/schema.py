"""What clients may post: every field is honoured, ignored because the answer stays the same, or refused by name.

`null` is as good as left out. Besides OpenAI's fields, `top_k`, `min_p` and `repetition_penalty` are known, as vLLM has
them.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic

from common import Message, UserError, nearest_word
from inference.api.errors import ApiError, refuse
from inference.engine import Engine
from inference.request import Settings

Name = Annotated[str, pydantic.Field(min_length=1)]
Stops = Annotated[
    list[Name],
    pydantic.BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
    pydantic.Field(max_length=16),
]
NO_MODERATION = Message("there is no moderation here; leave it out")
TEXT_ONLY = Message("only text is read and written here")
NO_EFFORT = Message("only none can be set here; leave it out")
NO_VERBOSITY = Message("this model's verbosity cannot be set; say it in the system message")


class Refused(ValueError):
    """Why an object of a request is refused, for pydantic, which knows where it stands; `field`: of the object."""

    def __init__(self, field: str, reason: Message, code: str = "invalid_value") -> None:
        super().__init__(field)
        self.field, self.reason, self.code = field, reason, code


class Form(pydantic.BaseModel):
    """An object in a request."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    ignored: ClassVar[frozenset[str]] = frozenset()  # fields that change no answer
    refused: ClassVar[dict[str, Message]] = {}  # fields that would change it and cannot be honoured

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = [field.alias or name for name, field in cls.model_fields.items()]
        found = {name: value for name, value in given.items() if value is not None and name not in cls.ignored}
        for name, value in found.items():
            if name in cls.refused:
                raise Refused(name, cls.refused[name], "unsupported_parameter")
            if name not in known and value not in ("", []):
                near = nearest_word(name, known)
                raise Refused(name, Message("is not known here{near:suggestion}", near=near), "unknown_parameter")
        return {name: value for name, value in found.items() if name in known}


def only_none(effort: Any) -> Any:
    if effort not in (None, "none"):
        raise Refused("", NO_EFFORT, "unsupported_parameter")
    return effort


Effort = Annotated[str | None, pydantic.BeforeValidator(only_none)]


class StreamOptions(Form):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; nothing is padded here


class TemplateSettings(Form):
    """What a request sets of the chat template, as vLLM has it."""

    enable_thinking: bool | None = None


class Body(Form):
    """What all endpoints know."""

    ignored = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"})
    prompt_field: ClassVar[str]  # where the prompt stands
    limit_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)  # that limit the reply's tokens; the usual one last

    model: str
    seed: int | None = None
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Annotated[float, pydantic.Field(ge=-100, le=100)]] = {}
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] = {}
    chat_template_kwargs: TemplateSettings = TemplateSettings()

    @pydantic.model_validator(mode="after")
    def _check_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options", Message("needs stream: true"))
        return self

    @property
    def effort(self) -> str | None:
        """How much the model shall think, as the endpoint's form says it; only "none" can be honoured."""
        return None

    @property
    def thinking(self) -> bool | None:
        """Whether the model shall think before it answers; None: as it is set."""
        return False if self.effort == "none" else self.chat_template_kwargs.enable_thinking

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def kept_logprobs(self) -> int | None:
        """Alternatives whose log-probabilities are wanted with each token; None: no log-probabilities."""
        raise NotImplementedError

    def settings(self, engine: Engine) -> Settings:
        """The model's own settings, and those of the request before them. Raises ApiError that names the field."""
        own = Settings.of(engine.config)
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.top_k == -1:  # vLLM's value for all
            given["top_k"] = 0
        if self.seed is not None:
            given["seed"] = self.seed % (1 << 64)
        limits = [name for name in self.limit_fields if getattr(self, name) is not None]
        if limits:
            given["max_new_tokens"] = getattr(self, limits[0])
        given |= {"stop": tuple(self.stop), "logit_bias": tuple(self._bias(engine)), "logprobs": self.kept_logprobs}
        try:
            return dataclasses.replace(own, **given)
        except UserError as error:
            name = error.fields["name"]
            field = limits[0] if name == "max_new_tokens" else name
            reason = Message(error.sentence, **{**error.fields, "name": field})
            raise ApiError(400, reason, param=field, code="invalid_value") from None

    def _bias(self, engine: Engine) -> list[tuple[int, float]]:
        last = engine.vocabulary_size - 1
        for token in self.logit_bias:
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) <= last):
                reason = Message("'{token}' is no token id of this model (0 to {last})", token=token[:40], last=last)
                raise refuse("logit_bias", reason, "invalid_value")
        return [(int(token), value) for token, value in self.logit_bias.items()]


AnyBody = TypeVar("AnyBody", bound=Body)


def read(raw: bytes, form: type[AnyBody]) -> AnyBody:
    """The body of a request. Raises ApiError that names the field at fault."""
    try:
        content = json.loads(raw, parse_constant=_refuse_constant)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, Message("the body has half a character (a lone surrogate)")) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, Message("the body is not JSON ({reason})", reason=error)) from None
    if not isinstance(content, dict):
        raise ApiError(400, Message("the body is not a JSON object"))
    try:
        return form.model_validate(content)
    except pydantic.ValidationError as error:
        raise _fault(error.errors()[0]) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _fault(fault: Any) -> ApiError:
    """The ApiError of a fault that pydantic found."""
    path = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in fault["loc"])
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, Refused):
        field = cause.field if cause.field[:1] in ("", "[") else f".{cause.field}"
        return refuse((path + field).lstrip("."), cause.reason, cause.code)
    if fault["type"] == "missing":
        return refuse(path.lstrip("."), Message("is missing"), "missing_required_parameter")
    return refuse(path.lstrip("."), Message("{reason}", reason=fault["msg"]), "invalid_value")


# ---------------------------------------------------------------------------------------------------------------------
# Formats of the reply


class Schema(Form):
    """A JSON schema with its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = pydantic.Field(None, alias="schema")
    strict: bool | None = None


class Format(Schema):
    """The format of the reply; the schema stands in `json_schema` in chats, and here in responses."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @pydantic.model_validator(mode="after")
    def _check_schema(self) -> Format:
        if (self.type == "json_schema") != ((self.json_schema or self).schema_ is not None):
            raise Refused("", Message("type json_schema and a schema go together"))
        return self

    @property
    def held_to(self) -> dict[str, Any] | None:
        """The JSON schema of the reply; None: any text."""
        return {"type": "object"} if self.type == "json_object" else (self.json_schema or self).schema_
