"""api.py as its clients see it: the openai package and curl against the real server, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, TALK, make_run, ok, run, user_error

from common import Message

HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "北京"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Server:
    """A running api.py, which ends well, and with the block in any case; `client` is OpenAI's."""

    def __init__(
        self, log: Path, *arguments: str, cwd: Path = ROOT, script: str = str(ROOT / "api.py"), **environment: str
    ) -> None:
        env = {**os.environ, "API_PORT": "0", **environment}
        self.log = log
        with open(log, "w", encoding="utf-8") as stderr:
            command = [sys.executable, script, *arguments]
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stderr=stderr, stdout=subprocess.DEVNULL)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + 120
        while " answers at " not in (text := self.log.read_text(encoding="utf-8")):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(text)
            time.sleep(0.1)
        before, _, after = text.partition(" answers at ")
        self.model, self.url = before.split("\n")[-1], after.split()[0]
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            status = self.process.wait(30)
        finally:
            self.process.kill()
        if kind is None:
            assert status == 0 and "Traceback" not in self.log.read_text(encoding="utf-8")

    def client(self, kind: str = "OpenAI", **options: typing.Any) -> typing.Any:
        import openai

        return getattr(openai, kind)(base_url=self.url, api_key="none", max_retries=0, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url.removesuffix("/v1") + path, timeout=30)

    def gauge(self, name: str) -> float:
        return float(self.get("/metrics").text.partition(f"\n{name} ")[2].split("\n")[0])

    def wait_for(self, name: str, value: float, seconds: float) -> None:
        """Until a gauge has a value; it fails after `seconds`."""
        started = time.monotonic()
        while self.gauge(name) != value:
            assert time.monotonic() - started < seconds, f"{name} is {self.gauge(name)}, not {value}"
            time.sleep(0.02)

    def post(self, body: typing.Any, path: str = "/chat/completions") -> tuple[int, typing.Any]:
        """The status, and the JSON of the answer."""
        data = body if isinstance(body, str) else json.dumps(body)
        answer = httpx.post(self.url + path, content=data.encode(), timeout=120)
        return answer.status_code, answer.json()

    def chat(self, content: str = "hi", **fields: typing.Any) -> tuple[int, typing.Any]:
        return self.post({"model": self.model, "messages": [{"role": "user", "content": content}], **fields})


@pytest.fixture(scope="module")
def parrot_server(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Has learned TALK, greedily; its template has no tools."""
    log = tmp_path_factory.mktemp("api") / "parrot.log"
    with Server(log, str(parrot), "infer_dtype=float32", "do_sample=false", "max_new_tokens=60") as server:
        yield server


@pytest.fixture(scope="module")
def tool_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with Qwen's tokens of tool calls, which are no control tokens: 263 and 264."""
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("tools") / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(f"<{end}tool_call>", special=False, normalized=False) for end in ("", "/")])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_server(tool_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Random words without end, two replies at once; its template has tools."""
    log = tmp_path_factory.mktemp("api") / "tiny.log"
    arguments = (str(tool_model), "infer_dtype=float32", "template=qwen", "max_new_tokens=8000", "top_k=0", "top_p=1")
    with Server(log, *arguments, MAX_CONCURRENT="2", API_MODEL_NAME="little") as server:
        yield server


# ---------------------------------------------------------------------------------------------------------------------
# Before anything is loaded


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"API_HOST": "0.0.0.0"}, "error: API_HOST=0.0.0.0 opens the model to others; set API_KEY too\n"),
        ({"API_PORT": "http"}, "must be a whole number"),
        ({"API_PORT": "9" * 5000}, "must be a whole number"),
        ({"MAX_CONCURRENT": "0"}, "must be a whole number"),
        ({"API_CORS_ORIGINS": "example.com"}, "must be SCHEME"),
        ({"API_HOST": "203.0.113.9", "API_KEY": "k"}, "cannot listen"),
    ],
)
def test_wrong_options_are_reported_at_once(environment: dict, words: str, tmp_path: Path, tiny_model: Path) -> None:
    result = run("api.py", str(tiny_model), cwd=tmp_path, env={**os.environ, **environment}, timeout=30)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


def test_help_comes_at_once() -> None:
    result = run("api.py", "--help")
    assert result.returncode == 0 and "API_KEY" in result.stdout and "  temperature " in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The forms


@pytest.mark.parametrize("kind", ["chat", "completion", "responses"])
def test_every_field_of_openai_is_known_or_refused(kind: str) -> None:
    from openai.types import chat, completion_create_params, responses

    from inference.api.chat import ChatBody, CompletionBody
    from inference.api.errors import ApiError
    from inference.api.responses import ResponsesBody
    from inference.api.schema import read

    form, module, name = {
        "chat": (ChatBody, chat.completion_create_params, "Completion"),
        "completion": (CompletionBody, completion_create_params, "Completion"),
        "responses": (ResponsesBody, responses.response_create_params, "Response"),
    }[kind]
    ways = [getattr(module, f"{name}CreateParams{way}") for way in ("NonStreaming", "Streaming")]
    fields, prompt = {field for way in ways for field in typing.get_type_hints(way)}, form.prompt_field
    assert {"model", "stream", "temperature", prompt} <= fields and len(fields) > 15
    whole = {"model": "m", prompt: [{"role": "user", "content": "hi"}] if kind == "chat" else "hi"}
    for name in fields:
        assert [name in known for known in (form.model_fields, form.refused, form.ignored)].count(True) == 1, name
        if name not in whole:
            read(json.dumps({**whole, name: None}).encode(), form)  # null is as good as left out
        if name in form.refused:
            with pytest.raises(ApiError) as caught:
                read(json.dumps({**whole, name: {"a": 1}}).encode(), form)
            assert caught.value.status_code == 400 and caught.value.param == name
    with pytest.raises(ApiError) as caught:
        read(json.dumps({**whole, "temprature": 1}).encode(), form)
    assert caught.value.message.fields["reason"] == Message("is not known here{near:suggestion}", near="temperature")


def test_calls_are_read_out_of_every_split() -> None:
    from inference.tools import LIST, OBJECT, TAGS, XML, Call, CallReader

    call, body = Call("f", '{"x": "a</b>"}'), '{"name": "f", "arguments": {"x": "a</b>"}}'
    other = '<tool_call>{"name": "g", "arguments": {}}</tool_call> x'
    xml = "<function=f>\n<parameter=s>\n42\n</parameter>\n<parameter=n>\n42\n</parameter>\n<parameter=m>\na\nb\n"
    xml += "</parameter>\n</function>"
    numbered = body.replace("}}", '}, "id": "123456789"}')
    cases = [
        (TAGS, f"let me see\n<tool_call>\n{body}\n</tool_call>", ["let me see", call]),
        (TAGS, f"<tool_call>{body}</tool_call>\n<tool_call>{body}</tool_call>", [call, call]),
        (XML, f"so\n<tool_call>\n{xml}\n</tool_call>", ["so", Call("f", '{"s": "42", "n": 42, "m": "a\\nb"}')]),
        (TAGS, other, [other]),
        (TAGS, 'a <tool_call>{"name": ', ['a <tool_call>{"name": ']),
        (TAGS, "1 < 2 <tool", ["1 < 2 <tool"]),
        (LIST, f"[TOOL_CALLS] [{numbered}, {body}]", [call, call]),
        (LIST, f"[TOOL_CALLS] [{body}] and now", [call, "and now"]),
        (LIST, "no [TOOL call", ["no [TOOL call"]),
        (OBJECT, body.replace("arguments", "parameters"), [call]),
        (OBJECT, "<|python_tag|>" + body.replace("arguments", "parameters"), [call]),
        (OBJECT, '{"name": "none"} is JSON', ['{"name": "none"} is JSON']),
        (OBJECT, "plain {}", ["plain {}"]),
        (OBJECT, '{"name": "f"', ['{"name": "f"']),
    ]
    for style, text, expected in cases:
        for size in (1, 2, 3, 5, len(text)):
            reader, parts = CallReader(style, ["f"], frozenset({("f", "s")})), []
            for at in range(0, len(text), size):
                parts += reader.feed(text[at : at + size])
            parts += reader.end()
            joined: list = []
            for part in parts:
                if isinstance(part, str) and joined and isinstance(joined[-1], str):
                    joined[-1] += part
                else:
                    joined.append(part)
            assert joined == expected, (style.name, size)


# ---------------------------------------------------------------------------------------------------------------------
# Replies


@pytest.mark.slow
@pytest.mark.parametrize("opened", [True, False])
def test_a_call_that_is_only_thought_of_is_no_call(opened: bool) -> None:
    from inference.api.chat import chat_deltas, chat_message
    from inference.reply import Reply
    from inference.request import Request, Settings
    from inference.tools import TAGS, ToolUse

    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    text = f"{'' if opened else '<think>'}\nPerhaps {call}\n</think>\n\nNo.{call}"
    for size in (1, 2, 5, len(text)):
        events, pieces = [], [text[i : i + size] for i in range(0, len(text), size)]
        request = Request([0], Settings(), thoughts=True, opened=opened, tools=ToolUse(TAGS, ("f",)))
        facts = {"stop_ids": frozenset({-1}), "visible": {}, "max_new_tokens": 10**6}
        reply = Reply(request, events.append, sample=lambda *_: (-1, None), detokenize=str, **facts)
        for piece in pieces:
            reply._tell(piece)
        reply.finish("stop")
        message = chat_message(reply)
        assert (message["reasoning_content"], message["content"]) == (f"Perhaps {call}", "No.")
        assert len(message["tool_calls"]) == 1 and reply.finish_reason == "tool_calls"
        deltas = [delta for event in events for delta in chat_deltas(event.parts)]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == f"Perhaps {call}"


def test_client_gets_replies_usage_and_models(parrot_server: Server) -> None:
    client = parrot_server.client()
    assert [model.id for model in client.models.list()] == ["parrot"] and client.models.retrieve("parrot").id
    ask = functools.partial(client.chat.completions.create, model="parrot", messages=HI)
    reply = ask(seed=1, user="me", presence_penalty=0)
    assert reply.choices[0].message.content == TALK["hi"] and reply.choices[0].finish_reason == "stop"
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.created > 1.7e9
    usage = reply.usage
    assert usage.completion_tokens == len(TALK["hi"].encode()) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > usage.completion_tokens
    again = ask()
    assert again.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    raw = client.chat.completions.with_raw_response.create(model="parrot", messages=HI, max_tokens=4)
    assert raw.parse().choices[0].finish_reason == "length" and raw.parse().choices[0].message.content == "你"

    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and len({chunk.created for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TALK["hi"]
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])

    several = ask(n=3, stop=["here"], temperature=0)
    assert [choice.message.content for choice in several.choices] == ["你好 🙂 stop "] * 3
    assert several.usage.completion_tokens > 3 * 10 and several.usage.prompt_tokens == usage.prompt_tokens
    known = ask(logprobs=True, top_logprobs=2)
    content = known.choices[0].logprobs.content
    assert bytes(b for token in content for b in token.bytes).decode() == TALK["hi"]
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob == t.logprob <= 0 for t in content)
    streamed = ask(logprobs=True, stream=True)
    told = [token for c in streamed for token in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert [token.bytes for token in told] == [token.bytes for token in content]
    for stream in (False, True):  # "st" is held back until it is no "sto!", "he" until it is "here"
        reply = ask(logprobs=True, stop=["sto!", "here"], stream=stream)
        known = [chunk.choices[0].logprobs for chunk in reply] if stream else [reply.choices[0].logprobs]
        spelled = bytes(b for part in known if part for token in part.content for b in token.bytes)
        assert spelled.decode() == "你好 🙂 stop "
    assert ask(extra_body={"top_k": -1}).choices
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask(reasoning_effort="none").choices and ask(extra_body=off).choices
    assert parrot_server.get("/v1/models/").json() == parrot_server.get("/v1/models").json()


REFUSED = {
    "/chat/completions": [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"modalities": []}, "modalities"),
        ({"top_k": -2}, "top_k"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"tools": [WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
         "response_format"),
        ({"store": True}, "store"),
        ({"functions": []}, "functions"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "mood": "sad"}]}, "messages[0].mood"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"max_completion_tokens": 1 << 40}, "max_completion_tokens"),
        ({"top_k": 1 << 40}, "top_k"),
        ({"top_p": 2}, "top_p"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "w" * 9000}]}, "messages"),
        ({"model": None}, "model"),
        ({"made_up": 1}, "made_up"),
    ],
    "/responses": [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"max_output_tokens": 1 << 40}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"input": [{"role": "user", "content": "w" * 6000}, {"role": "assistant", "content": "x" * 3000},
                    {"role": "user", "content": "hi"}], "truncation": "disabled"}, "input"),
        ({"input": "w" * 9000}, "input"),
    ],
    "/completions": [({"best_of": 3}, "best_of"), ({"suffix": "x"}, "suffix"), ({"prompt": []}, "prompt")],
}  # fmt: skip
LEAST = {"/chat/completions": {"messages": HI}, "/responses": {"input": "hi"}, "/completions": {"prompt": "x"}}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "fields", "param"), [(path, *case) for path in REFUSED for case in REFUSED[path]])
def test_what_cannot_be_done_is_a_400_that_names_it(parrot_server: Server, path: str, fields: dict, param: str) -> None:
    status, body = parrot_server.post({"model": "parrot", **LEAST[path], **fields}, path)
    assert status == 400 and set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["param"], body["error"]["type"]) == (param, "invalid_request_error")
    if param in ("messages", "input") and fields[param]:
        assert body["error"]["code"] == "context_length_exceeded" and "shorten it" in body["error"]["message"]
    else:
        assert param in body["error"]["message"]


@pytest.mark.slow
def test_messages_that_the_template_cannot_hold_are_a_400(parrot: Path, tmp_path: Path) -> None:
    """After the end of a turn of the assistant the template `default` writes no header for another answer."""
    messages = [*HI, {"role": "assistant", "content": "Sure,"}]
    with Server(tmp_path / "log", str(parrot), "template=default", "max_new_tokens=4") as server:
        status, body = server.chat(messages=messages)
        assert (status, body["error"]["param"], body["error"]["code"]) == (400, "messages", "invalid_value")
        assert "the last message is the assistant's" in body["error"]["message"]
        assert server.chat(messages=messages + HI)[0] == 200


def test_malformed_bodies_and_wrong_places(parrot_server: Server) -> None:
    for body in ("", "{", "[]", '{"a": NaN}', "[" * 100_000, '{"model": "parrot", "messages": "\\ud800"}'):
        status, answer = parrot_server.post(body)
        assert status == 400 and answer["error"]["message"], body[:20]
    assert parrot_server.chat("x" * (2 << 20))[0] == 413
    status, answer = parrot_server.post({"model": "gpt-5", "messages": HI})
    assert status == 404 and answer["error"]["code"] == "model_not_found" and "'parrot'" in answer["error"]["message"]
    assert parrot_server.post({}, "/nothing")[0] == 404 and parrot_server.post({}, "/models")[0] == 405
    assert parrot_server.get("/v1/models/made-up").status_code == 404
    metrics = parrot_server.get("/metrics").text  # one line a route, whatever is asked for
    assert 'path="/v1/models/{name:path}",status="404"' in metrics and "made-up" not in metrics
    assert parrot_server.get("/health").json() == {"status": "ok"}
    assert parrot_server.chat()[1]["choices"][0]["message"]["content"] == TALK["hi"]


@pytest.mark.slow
def test_plain_completions(parrot_server: Server) -> None:
    client = parrot_server.client()
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    reply = client.completions.create(model="parrot", prompt=prompt, max_tokens=60)
    assert reply.choices[0].text == TALK["hi"] and reply.object == "text_completion"
    short = client.completions.create(model="parrot", prompt=[prompt, prompt.replace("hi", "count")], echo=True, n=2)
    counted = prompt.replace("hi", "count") + TALK["count"]
    assert [c.text for c in short.choices] == [prompt + "你好 🙂 stop"] * 2 + [counted] * 2  # 16 tokens
    assert [c.finish_reason for c in short.choices] == ["length", "length", "stop", "stop"]
    pieces = client.completions.create(model="parrot", prompt=prompt, max_tokens=60, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == TALK["hi"]
    asked = {"model": "parrot", "prompt": prompt, "logprobs": 5, "max_tokens": 60}
    known = client.completions.create(**asked).choices[0].logprobs
    assert len(known.tokens) == len(known.token_logprobs) == len(TALK["hi"].encode())
    assert known.tokens[:3] == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"] and known.tokens[-1] == "e"
    assert all(len(top) == 5 and token in top for token, top in zip(known.tokens, known.top_logprobs, strict=True))
    assert known.text_offset == [len(TALK["hi"].encode()[:n].decode(errors="ignore")) for n in range(len(known.tokens))]
    told = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **asked)]
    for part in ("tokens", "text_offset"):
        assert [one for chunk in told if chunk for one in getattr(chunk, part)] == getattr(known, part)
    stopped = client.completions.create(stop="here", **asked).choices[0]
    assert stopped.text == "你好 🙂 stop " and stopped.logprobs.tokens[-1] == " "


@pytest.mark.slow
def test_dropped_turns_are_told(parrot_server: Server) -> None:
    old = [{"role": "user", "content": "w" * 6000}, {"role": "assistant", "content": "x" * 3000}]
    raw = parrot_server.client().chat.completions.with_raw_response.create(model="parrot", messages=old + HI)
    assert raw.headers["x-dropped-messages"] == "2"
    assert raw.parse().choices[0].message.content == TALK["hi"]


# ---------------------------------------------------------------------------------------------------------------------
# Forms of replies, tools


@pytest.mark.slow
def test_replies_are_held_to_a_schema(tiny_server: Server) -> None:
    import pydantic

    class Answer(pydantic.BaseModel):
        city: typing.Literal["Paris", "北京"]
        sure: bool
        years: list[typing.Literal[1999, 2026]] = pydantic.Field(min_length=1, max_length=3)

    talk = [{"role": "user", "content": "Where?"}]
    client = tiny_server.client()
    for seed in range(3):
        parsed = client.chat.completions.parse(model="little", messages=talk, response_format=Answer, seed=seed)
        assert isinstance(parsed.choices[0].message.parsed, Answer), parsed
        assert parsed.choices[0].finish_reason == "stop"
    asked = {"model": "little", "response_format": {"type": "json_object"}, "seed": 5, "max_tokens": 40}
    same = [client.chat.completions.create(messages=talk, **asked).choices[0].message.content for _ in range(2)]
    assert same[0][0] == "{" and same[0] == same[1]


@pytest.mark.slow
def test_tools_are_called(tiny_server: Server) -> None:
    create = tiny_server.client().chat.completions.create
    talk = [{"role": "user", "content": "How is the weather?"}]
    asked = {"model": "little", "tools": [WEATHER], "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        reply = create(messages=talk, tool_choice=choice, seed=3, **asked).choices[0]
        assert reply.finish_reason == "tool_calls" and reply.message.content is None
        (call,) = reply.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" and call.type == "function" and len(call.id) == 9
        assert arguments["city"] in ("Paris", "北京") and arguments["days"] in (1, 2)
    chunks = list(create(messages=talk, tool_choice="required", seed=3, stream=True, **asked))
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert deltas[0].id and deltas[0].function.name == "weather"
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)

    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = create(messages=[*talk, reply.message, result], max_tokens=3, **asked)
    without = create(messages=talk, max_tokens=3, model="little", tools=[WEATHER], tool_choice="none")
    assert after.usage.prompt_tokens > without.usage.prompt_tokens + 50
    strict = {"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}], "parallel_tool_calls": False}
    free = {"model": "little", "messages": talk, "max_tokens": 200, "seed": 1}
    for token, reason in ((263, "tool_calls"), (258, "stop")):  # <tool_call>, and the end of the turn
        reply = create(**free, **strict, logit_bias={str(token): 100}).choices[0]
        assert reply.finish_reason == reason
        for call in reply.message.tool_calls or []:
            assert json.loads(call.function.arguments)["city"] in ("Paris", "北京")
    for wrong, param in (
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": "weather"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather", "x": 1}}}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools[0].function.parameters"),
    ):
        status, body = tiny_server.chat(**{"tools": [WEATHER], **wrong})
        assert status == 400 and body["error"]["param"] == param


@pytest.mark.slow
def test_arguments_are_held_to_nested_schemas(tiny_server: Server) -> None:
    import enum

    import openai
    import pydantic

    class Unit(enum.Enum):
        celsius = "C"
        fahrenheit = "F"

    class Place(pydantic.BaseModel):
        unit: Unit

    class Weather(pydantic.BaseModel):
        places: list[Place] = pydantic.Field(min_length=1, max_length=2)

    class Home(pydantic.BaseModel):
        at: Place

    tools = [openai.pydantic_function_tool(form) for form in (Weather, Home)]
    assert "$defs" in tools[0]["function"]["parameters"] and tools[0]["function"]["strict"]
    talk = [{"role": "user", "content": "How is the weather?"}]
    asked = {"model": "little", "messages": talk, "tools": tools, "parallel_tool_calls": False, "seed": 2}
    named = [{"type": "function", "function": {"name": form.__name__}} for form in (Weather, Home)]
    called = set()
    for choice in (*named, "required"):
        reply = tiny_server.client().chat.completions.parse(tool_choice=choice, **asked)
        (call,) = reply.choices[0].message.tool_calls
        called.add(type(call.function.parsed_arguments))
    assert called == {Weather, Home}


# ---------------------------------------------------------------------------------------------------------------------
# What clients write beside


def call_of(name: str, arguments: str = "{}") -> dict:
    call = {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def read_talk(*messages: dict, has_tools: bool = False) -> list[dict]:
    """The messages of a chat as its template takes them."""
    from inference.api.chat import ChatBody
    from inference.api.messages import read_messages
    from inference.api.schema import read

    return read_messages(read(json.dumps({"model": "m", "messages": messages}).encode(), ChatBody).messages, has_tools)


def test_what_changes_no_answer_is_accepted() -> None:
    from inference.api.errors import ApiError

    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "id": "p1"}
    assert read_talk({"role": "user", "content": [part], "name": "Li", "id": "m1"}) == HI
    assert read_talk({"role": "developer", "content": [part, part]}) == [{"role": "system", "content": "hihi"}]
    assert read_talk({"role": "assistant", "content": None}) == [{"role": "assistant", "content": ""}]
    for name in ("reasoning_content", "reasoning"):
        kept = read_talk({"role": "assistant", "content": "x", name: "hm"})
        assert kept == [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]
    beside = {"annotations": [{"type": "url_citation"}], "refusal": None, "audio": None, "function_call": None}
    assert read_talk({"role": "assistant", "content": "x", **beside})[0]["content"] == "x"
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    for name in ({}, {"name": "weather"}):  # the name of its call, whether the client gives it or not
        talk = read_talk(call_of("weather", arguments=""), {**result, **name}, has_tools=True)
        assert talk[0]["tool_calls"][0]["function"]["arguments"] == {}
        assert talk[1] == {**result, "name": "weather"}
    with pytest.raises(ApiError) as caught:
        read_talk(call_of("weather"), {**result, "name": "time"}, has_tools=True)
    assert caught.value.param == "messages[1].name"
    assert caught.value.message.fields["reason"].fields == {"name": "time", "call": "c1", "called": "weather"}
    with pytest.raises(ApiError) as caught:
        read_talk(call_of("weather", arguments="[1]"), has_tools=True)
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_the_cause_of_a_refused_pattern_is_given() -> None:
    from inference import grammar

    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?=b)b$"}}, "required": ["a"]}
    with user_error("replies cannot") as caught:
        grammar.checked_grammar(types.SimpleNamespace(grammar_vocabulary=None), grammar.json_grammar(schema))
    reason = caught.value.fields["reason"]
    assert "^(?=b)b$" in reason and "look-ahead" in reason and "not supported" in reason


# ---------------------------------------------------------------------------------------------------------------------
# /v1/responses


@pytest.mark.slow
def test_responses_text_and_stream(parrot_server: Server) -> None:
    client = parrot_server.client()
    reply = client.responses.create(model="parrot", input="hi")
    assert reply.output_text == TALK["hi"] and reply.status == "completed" and reply.store is False
    assert reply.id.startswith("resp_") and reply.usage.total_tokens == reply.usage.input_tokens + 29
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, *reply.output]
    after = client.responses.create(
        model="parrot", input=[*items, {"role": "user", "content": "count"}], instructions="be brief", temperature=0
    )
    assert after.usage.input_tokens > reply.usage.total_tokens and after.instructions == "be brief"
    cut = client.responses.create(model="parrot", input="hi", max_output_tokens=4)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")

    events = list(client.responses.create(model="parrot", input="hi", stream=True))
    kinds = [event.type for event in events]
    begins = ("created", "in_progress", "output_item.added", "content_part.added")
    ends = ("output_text.done", "content_part.done", "output_item.done", "completed")
    assert kinds[:4] == [f"response.{kind}" for kind in begins]
    assert kinds[-4:] == [f"response.{kind}" for kind in ends]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TALK["hi"] and len(deltas) > 5
    assert events[-1].response.output_text == TALK["hi"] and events[-1].response.usage.output_tokens == 29
    with client.responses.stream(model="parrot", input="count") as stream:
        assert stream.get_final_response().output_text == TALK["count"]
    known = client.responses.create(model="parrot", input="hi", include=["message.output_text.logprobs"])
    spelled = bytes(b for token in known.output[0].content[0].logprobs for b in token.bytes)
    assert spelled.decode() == TALK["hi"]


@pytest.mark.slow
def test_responses_tools_and_formats(tiny_server: Server) -> None:
    import pydantic

    class Answer(pydantic.BaseModel):
        city: typing.Literal["Paris", "北京"]

    client = tiny_server.client()
    parsed = client.responses.parse(model="little", input="Where?", text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)
    function = {"type": "function", **WEATHER["function"], "strict": True}
    asked = {"model": "little", "tools": [function], "parallel_tool_calls": False}
    question = [{"role": "user", "content": "How is the weather?"}]
    for choice in ("required", {"type": "function", "name": "weather"}):
        (call,) = client.responses.create(input=question, tool_choice=choice, **asked).output
        assert (call.type, call.name) == ("function_call", "weather")
        assert json.loads(call.arguments)["city"] in ("Paris", "北京")
    events = list(client.responses.create(input=question, tool_choice="required", stream=True, **asked))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done[0].arguments)["days"] in (1, 2) and events[-1].response.output[0].name == "weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = client.responses.create(input=[*question, call, result], max_output_tokens=3, **asked)
    assert after.usage.input_tokens > 50


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask


@pytest.mark.slow
def test_the_client_knows_errors_by_their_class_and_unknown_places_name_the_known(parrot_server: Server) -> None:
    import openai

    client = parrot_server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="parrot", messages=HI, n=0)
    assert caught.value.param == "n"
    for path in ("/responses/resp_1/cancel", "/embeddings"):
        status, body = parrot_server.post({}, path)
        assert status == 404 and body["error"]["code"] == "unknown_url" and "/v1/responses" in body["error"]["message"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> typing.Any:
    from inference.load import load

    return load(str(tiny_model), ["infer_dtype=float32"])


def application(engine: typing.Any, **environment: str) -> tuple[typing.Any, typing.Any]:
    """The server and a client of it, in this process."""
    from starlette.testclient import TestClient

    from inference.api.options import ServerOptions
    from inference.api.server import ApiServer

    server = ApiServer(engine, ServerOptions.from_environment(environment))
    return server, TestClient(server.application(), "http://127.0.0.1", raise_server_exceptions=False)


PAGE, EVIL = "https://page.example", "https://evil.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}


def test_foreign_hosts_and_origins_are_refused_unless_they_are_allowed(engine: typing.Any) -> None:
    _, alone = application(engine)
    for host in ("127.0.0.1", "localhost:9", "[::1]"):
        assert alone.get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "["):  # DNS rebinding
        assert alone.get("/v1/models", headers={"Host": host}).json()["error"]["code"] == "host_not_allowed"
    _, opened = application(engine, API_CORS_ORIGINS=f"{PAGE}, http://localhost:3000", API_ALLOWED_HOSTS="my.host")
    assert opened.get("/v1/models", headers={"Host": "my.host:80"}).status_code == 200
    assert opened.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    for client, origin in ((alone, PAGE), (opened, EVIL)):
        answers = [
            client.get("/v1/models", headers={"Origin": origin}),
            client.options("/v1/models", headers={"Origin": origin, **PREFLIGHT}),
        ]
        for answer in answers:
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
            assert answer.json()["error"]["code"] == "origin_not_allowed"
    answer = opened.options("/v1/models", headers={"Origin": PAGE, **PREFLIGHT})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    answer = opened.get("/v1/models", headers={"Origin": PAGE})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["vary"] == "Origin"


def test_a_failure_tells_the_client_nothing_of_the_machine(engine: typing.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/secret/place")

    server, client = application(engine)
    monkeypatch.setattr(server.generator, "growth", fail)
    with client:
        asked = {"model": server.model_name, "messages": HI}
        answer = client.post("/v1/chat/completions", json=asked)
    expected = "the server failed at this request; its log says why"
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, expected)


@pytest.mark.slow
def test_slow_clients_are_cut_off(parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits of a second instead of a minute: heads and bodies that do not come, answers that are not taken."""
    limits = "import inference.api.guard as g, api, sys\n"
    limits += "g.HEAD_SECONDS = g.PART_SECONDS = 1\napi.main(sys.argv[1:])\n"
    (tmp_path / "api_quick.py").write_text(limits)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def answer(sent: bytes) -> tuple[bytes, float]:
        started, port = time.monotonic(), int(server.url.rpartition(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(sent)
            got = b""
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(4096):
                    got += part
        return got, time.monotonic() - started

    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
    with Server(tmp_path / "log", str(parrot), script=str(tmp_path / "api_quick.py")) as server:
        for sent in (b"", head):  # no head, half a head
            got, seconds = answer(sent)
            assert got == b"" and seconds < 15
        got, seconds = answer(head + b"\r\n{")  # half a body
        assert b" 408 " in got.split(b"\r\n")[0] and b"request_timeout" in got and seconds < 15
        got, _ = answer(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n")
        assert b" 431 " in got.split(b"\r\n")[0] or b" 400 " in got.split(b"\r\n")[0] or got == b""
        assert server.chat()[0] == 200


# ---------------------------------------------------------------------------------------------------------------------
# Many at once


@pytest.mark.slow
def test_replies_at_once_are_those_alone(tiny_server: Server) -> None:
    async def ask(client: typing.Any, i: int) -> str:
        settings = {"temperature": 0} if i % 2 else {"seed": i, "temperature": 1.0}
        talk = [{"role": "user", "content": f"{'word ' * (7 * i)} {i}"}]
        endless = {"max_tokens": 20 + i, "logit_bias": {"258": -100}}  # the end of the turn
        reply = await client.chat.completions.create(model="little", messages=talk, **endless, **settings)
        assert reply.usage.completion_tokens == 20 + i
        return reply.choices[0].message.content

    async def ask_all(at_once: bool) -> list[str]:
        async with tiny_server.client("AsyncOpenAI") as client:
            asked = [ask(client, i) for i in range(8)]
            return await asyncio.gather(*asked) if at_once else [await one for one in asked]

    assert asyncio.run(ask_all(True)) == asyncio.run(ask_all(False))


@pytest.mark.slow
def test_full_line_is_429_and_who_goes_away_frees_the_place(tiny_server: Server) -> None:
    import openai

    talk = [{"role": "user", "content": "go on"}]
    client = tiny_server.client(timeout=60)
    endless = {"model": "little", "messages": talk, "max_tokens": 8000, "logit_bias": {"258": -100}}
    streams = [client.chat.completions.create(stream=True, **endless) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    tiny_server.wait_for("onecard_active_replies", 2, 5)
    body = json.dumps({**endless, "n": 16})
    command = ["curl", "-s", "--data-binary", body, tiny_server.url + "/chat/completions"]
    waiting = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    tiny_server.wait_for("onecard_waiting_replies", 16, 10)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="little", messages=[{"role": "user", "content": "w" * 9000}])  # unread
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    waiting.kill()
    waiting.wait()
    tiny_server.wait_for("onecard_waiting_replies", 0, 3)
    streams[0].close()
    tiny_server.wait_for("onecard_active_replies", 1, 3)
    streams[1].close()
    tiny_server.wait_for("onecard_active_replies", 0, 3)
    with contextlib.suppress(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(**endless)
    tiny_server.wait_for("onecard_active_replies", 0, 3)
    assert tiny_server.chat(max_tokens=2)[0] == 200


@pytest.mark.slow
def test_key_root_path_and_the_training_recipe(parrot: Path, tmp_path: Path) -> None:
    import openai

    folder = make_run(parrot, tmp_path / "saves" / "mine")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model_name_or_path: {parrot}\ndataset: identity\noutput_dir: {folder}\nmax_new_tokens: 12\n")
    environment = {"API_KEY": "söcret", "API_HOST": "0.0.0.0", "FASTAPI_ROOT_PATH": "/llm"}
    with Server(tmp_path / "log", str(recipe), cwd=tmp_path, **environment) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        assert caught.value.code == "invalid_api_key" and httpx.get(url + "/models").status_code == 401
        key = {"Authorization": "Bearer söcret".encode()}
        assert [model["id"] for model in httpx.get(url + "/models", headers=key).json()["data"]] == ["mine"]
        asked = {"model": "mine", "messages": HI, "logit_bias": {"258": -100}}
        reply = httpx.post(url + "/chat/completions", json=asked, headers=key, timeout=60).json()
        assert reply["usage"]["completion_tokens"] == 12  # the recipe's max_new_tokens


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere


@pytest.mark.slow
def test_a_short_load_leaves_nothing_behind(tiny_server: Server) -> None:
    load = [str(ROOT / "bench" / "api_load.py"), tiny_server.url, "--seconds", "20", "--clients", "24"]
    result = ok(subprocess.run([sys.executable, *load], capture_output=True, text=True, timeout=200))
    assert "0 answers of 500" in result.stdout
