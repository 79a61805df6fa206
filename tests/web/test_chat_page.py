"""The chat page: the conversation as data, and what the page does with a model; test_browser.py is the page itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from conftest import make_run, says, user_error

import common
from preprocessing import dataset
from runs.target import find_target
from runs.texts import Translator
from web import chat_model
from web import conversation as talk
from web.pages import chat

TITLES = {"thought": "Thinking", "call": "Tool call", "result": "Result", "empty": "(empty)"}
WEATHER = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
TALK = [
    {"role": "user", "text": "Weather in 北京?", "trained": f"<think>\nAsk the tool.\n</think>\n\n{CALL}"},
    {"role": "tool", "text": '{"sky": "clear"}', "trained": "It is clear."},
]


# ---------------------------------------------------------------------------------------------------------------------
# The conversation as data


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hello.", [("text", "Hello.")]),
        ("<think>\nHm.\n</think>\n\nYes.", [("thought", "Hm."), ("text", "Yes.")]),
        ("Hm.\n</think>\n\nYes.", [("thought", "Hm."), ("text", "Yes.")]),  # opened by the prompt
        ("<think>\nHm", [("thought", "Hm")]),  # not yet closed
        ('Let me see. <tool_call>{"name": "f"', [("text", "Let me see."), ("call", '{"name": "f"')]),
        ('{"name": "f", "parameters": {}}', [("call", '{"name": "f", "parameters": {}}')]),  # Llama 3
        ('[{"name": "f", "arguments": {"x": 1}}]', [("call", '[{"name": "f", "arguments": {"x": 1}}]')]),  # Mistral
        ('{"name": "Ada", "age": 3}', [("text", '{"name": "Ada", "age": 3}')]),  # JSON that is an answer
        ("", []),
    ],
)
def test_an_answer_is_cut_into_thoughts_calls_and_text(text: str, parts: list) -> None:
    assert talk.parts(text) == parts


def test_a_changed_part_leaves_the_others_as_they_were() -> None:
    changed = talk.with_part(TALK[0]["trained"], 0, "It is about the weather.")
    assert talk.parts(changed) == [("thought", "It is about the weather."), talk.parts(CALL)[0]]
    assert talk.calls(changed) == [{"name": "weather", "arguments": {"city": "北京"}}]
    assert talk.with_part("Hello.", 0, "Good day.") == "Good day."


def test_every_message_on_the_page_knows_its_turn() -> None:
    shown = talk.shown(TALK, "trained", TITLES)
    folded = [message.get("metadata", {}).get("title") for message in shown]
    assert folded == [None, "Thinking", "Tool call", "Result", None]
    places = [talk.find_message(TALK, "trained", index) for index in range(len(shown))]
    assert places == [(0, None), (0, 0), (0, 1), (1, None), (1, 0)]


def test_the_model_reads_tool_calls_in_the_form_that_templates_take() -> None:
    sent = talk.messages(TALK, "trained", "Be brief.")
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "tool", "assistant"]
    assert sent[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "北京"}}
    assert sent[2]["content"].startswith("<think>")


def test_a_saved_conversation_is_a_dataset_that_reads_back(tmp_path: Path) -> None:
    tools = talk.read_tools(WEATHER)
    for count in (1, 2):
        made = talk.row(TALK, "Be brief.", tools)
        assert talk.add_to_data(made, "chats", tmp_path) == count
    config = common.Config(dataset=("chats",), dataset_dir=str(tmp_path), val_size=0)
    conversation = dataset.read_conversations(config)[0][1]
    sent = talk.messages(TALK, "trained", "Be brief.")
    assert [message["role"] for message in conversation["messages"]] == [message["role"] for message in sent]
    assert conversation["messages"][0]["content"] == "Be brief."
    assert conversation["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"city": "北京"}
    assert "Ask the tool." in json.dumps(conversation["messages"][2], ensure_ascii=False)
    assert conversation["messages"][-1]["content"] == "It is clear."
    assert conversation["tools"][0]["function"]["name"] == "weather"


def test_registering_leaves_the_other_lines_of_the_registry_alone(tmp_path: Path) -> None:
    registry = tmp_path / "dataset_info.json"
    registry.write_text('{\n  "mine": {"file_name": "mine.json"}\n}\n', encoding="utf-8")
    talk.add_to_data({"messages": []}, "chats", tmp_path)
    lines = registry.read_text(encoding="utf-8").splitlines()
    assert lines[1] == '  "mine": {"file_name": "mine.json"},'
    assert len(lines) == 4
    assert json.loads("\n".join(lines))["chats"]["file_name"] == "chats.json"


def test_no_other_dataset_is_touched(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}', encoding="utf-8")
    (tmp_path / "loose.json").write_text("[]", encoding="utf-8")
    refused = [("mine", says("has another dataset")), ("loose", says("not a dataset")), ("../x", says("dataset; use"))]
    for name, code in refused:
        with user_error(code):
            talk.add_to_data({"messages": []}, name, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info.json", "loose.json"]


@pytest.mark.parametrize(
    ("text", "code"),
    [("{", says("are not JSON")), ('[{"x": 1}]', says('"...", "parameters"')), ("3", says('"...", "parameters"'))],
)
def test_faulty_tools_are_refused(text: str, code: str) -> None:
    with user_error(code) as error:
        talk.read_tools(text)
    assert error.value.message.text("zh") != error.value.message.text("en") != code


def test_a_turn_without_an_answer_is_no_training_data() -> None:
    with user_error("and training", number=2):
        talk.row([*TALK[:1], {"role": "user", "text": "hi", "trained": " "}], "", None)
    with user_error("said yet; send"):
        talk.row([], "", None)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_a_model_that_is_not_whole_yet_is_not_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("whole", ".whole.new.7.tmp"):
        (Path("models") / name).mkdir(parents=True)
        (Path("models") / name / "config.json").write_text("{}")
    assert chat_model.targets() == [("models/whole", "models/whole")]


class Visitor:
    """A browser on a chat page: `given` holds the value of every component, `do` what an event brings to it."""

    def __init__(self, page: chat.ChatPage, name: str) -> None:
        self.page, self.request = page, SimpleNamespace(session_hash=name)
        self.given = {c: c.value for c in vars(page).values() if isinstance(c, gr.components.Component)}
        self.given |= {slider: slider.value for slider in page.sampling.values()} | {page.turns: [], page.system: ""}
        self.given |= {chatbot: [] for chatbot in page.voices.values()}
        self.given |= {page.sampling["temperature"]: 0, page.sampling["max_new_tokens"]: 8}

    def do(self, updates: Iterator[dict[Any, Any]] | dict[Any, Any]) -> Iterator[None]:
        for painted in [updates] if isinstance(updates, dict) else updates:
            for component, update in painted.items():
                is_update = isinstance(update, dict) and "__type__" in update
                if not is_update or "value" in update:
                    self.given[component] = update["value"] if is_update else update
            yield

    def all(self, updates: Iterator[dict[Any, Any]] | dict[Any, Any]) -> None:
        list(self.do(updates))

    def saying(self, text: str) -> Iterator[None]:
        """The answer to a message as it grows."""
        self.given[self.page.box] = text
        return self.do(self.page.say(self.given, self.request))

    def said(self, who: str = "user", voice: str = "trained") -> list[str]:
        shown = self.given[self.page.voices[voice]]
        return [message["content"] for message in shown if message["role"] == who]


@pytest.fixture
def page(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[chat.ChatPage]:
    """The page for a run whose adapter changes nothing."""
    monkeypatch.chdir(tmp_path)
    make_run(tiny_model, tmp_path / "saves" / "demo", noise=0.0)
    with gr.Blocks() as blocks:
        made = chat.ChatPage(Translator("en"), find_target("saves/demo"))
        made.connect(blocks)
    yield made
    chat_model.free()


def test_a_conversation_is_led_mended_and_saved(page: chat.ChatPage, tmp_path: Path) -> None:
    me = Visitor(page, "me")
    for text in ("one", "two", "three"):
        list(me.saying(text))
    assert me.said() == ["one", "two", "three"] and len(me.said("assistant")) == 3
    assert me.given[page.box] == "" and "8 tokens" in me.given[page.remark]
    answer = SimpleNamespace(index=1, value="<think>\nHm.\n</think>\n\nFine.")
    me.all(page.editor("trained")(me.given, answer, me.request))
    assert me.said("assistant")[:2] == ["Hm.", "Fine."]
    me.given[page.chosen], _ = page.chooser("trained")(me.given[page.turns], SimpleNamespace(index=3))
    me.all(page.delete_turn(me.given[page.turns], me.given[page.chosen], me.request))
    assert me.said() == ["one", "three"]
    me.all(page.editor("trained")(me.given, SimpleNamespace(index=3, value="four"), me.request))
    assert me.said() == ["one", "four"]
    last = me.said("assistant")[-1]
    me.all(page.say_again(me.given, me.request))
    assert me.said("assistant")[-1] == last  # greedy
    me.given[page.turns][-1]["trained"] = "Four."
    assert "dataset=chats" in page.add_to_data(me.given[page.turns], "Be brief.", "", "chats")
    [row] = json.loads((tmp_path / "data" / "chats.json").read_text(encoding="utf-8"))
    assert [message["content"] for message in row["messages"]] == [
        "Be brief.", "one", "<think>\nHm.\n</think>\n\nFine.", "four", "Four."
    ]  # fmt: skip
    me.all(page.start_anew(me.request))
    assert me.said() == me.given[page.turns] == []


class Endless:
    """An engine and its reply: words until it is cancelled."""

    dropped_messages, cancelled = 0, False

    def stream(self, *_: Any) -> Endless:
        return Endless()

    def __iter__(self) -> Iterator[str]:
        while not self.cancelled:
            time.sleep(0.01)
            yield "word "

    def cancel(self) -> None:
        self.cancelled = True

    def summary(self) -> list[str]:
        return ["stopped"] if self.cancelled else []


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_model, "engine", lambda *_: Endless())
    monkeypatch.setattr(chat_model, "is_any_loaded", lambda: True)


@pytest.mark.usefixtures("endless")
def test_a_reply_is_stopped_and_what_came_stays(page: chat.ChatPage) -> None:
    me = Visitor(page, "me")
    for _ in me.saying("Tell me a long story."):
        if me.said("assistant") and me.said("assistant")[0] != "…":
            chat.stop(me.request)
    assert me.said("assistant")[0].startswith("word word") and "stopped" in me.given[page.remark]
    assert len(me.given[page.turns]) == 1


@pytest.mark.usefixtures("endless")
def test_a_new_conversation_ends_the_reply_of_the_old(page: chat.ChatPage) -> None:
    me = Visitor(page, "me")
    growing = me.saying("Tell me a long story.")
    while not me.said("assistant") or me.said("assistant")[0] == "…":
        next(growing)
    waiting = chat_model.requests["me"]
    waiting.ended.set()  # this test is the thread of both
    me.all(page.start_anew(me.request))
    list(growing)
    assert me.said() == me.said("assistant") == [] and waiting.stopped
    assert not chat_model.busy.locked()


@pytest.mark.usefixtures("endless")
def test_who_goes_away_frees_the_model_for_the_next(page: chat.ChatPage) -> None:
    me, other = Visitor(page, "me"), Visitor(page, "other")
    growing = other.saying("Tell me a long story.")
    while not other.said("assistant") or other.said("assistant")[0] == "…":
        next(growing)
    waiting = me.saying("hi")
    while "another page is being answered" not in str(me.given[page.remark]):
        next(waiting)
    chat.stop(other.request)
    list(growing)
    while not me.said("assistant") or me.said("assistant")[0] == "…":
        next(waiting)
    assert me.said() == ["hi"] and me.said("assistant")[0].startswith("word")
    chat.stop(me.request)
    list(waiting)


def test_base_and_trained_stand_side_by_side(page: chat.ChatPage) -> None:
    me = Visitor(page, "me")
    me.given[page.with_base] = True
    list(me.saying("hi"))
    assert me.said("assistant", "base") == me.said("assistant", "trained") != []  # this adapter changes nothing
    assert "Before training: " in me.given[page.remark]


def test_what_is_wrong_is_told_and_the_message_is_not_lost(page: chat.ChatPage) -> None:
    me = Visitor(page, "me")
    me.given[page.sampling["seed"]] = "abc"
    list(me.saying("hello"))
    assert "the seed &#x27;abc&#x27; is not a whole number" in me.given[page.fault]
    assert me.given[page.box] == "hello" and me.said() == []
    me.given |= {page.sampling["seed"]: "7", page.tools: '[{"name": "weather"}]', page.role: "user"}
    list(me.saying("hello"))
    assert "has no tools" in me.given[page.fault]
