"""webui.py and its chat page: the conversation as data, refusals, security, and what a person does in a browser."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Server, browsing, serving
from conftest import ROOT, make_run, ok, refused, run, says, user_error

import common
from preprocessing import dataset
from web import conversation as talk

TITLES = {"thought": "Thinking", "call": "Tool call", "result": "Result", "empty": "(empty)"}
WEATHER = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
TALK = [
    {"role": "user", "text": "Weather in 北京?", "trained": f"<think>\nAsk the tool.\n</think>\n\n{CALL}"},
    {"role": "tool", "text": '{"sky": "clear"}', "trained": "It is clear."},
]


def test_a_model_that_is_not_whole_yet_is_not_offered(tmp_path, monkeypatch):
    from web import chat_model

    monkeypatch.chdir(tmp_path)
    for name in ("whole", ".whole.new.7.tmp"):
        (Path("models") / name).mkdir(parents=True)
        (Path("models") / name / "config.json").write_text("{}")
    assert chat_model.targets() == [("models/whole", "models/whole")]


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
# Arguments


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--host", "0.0.0.0"], says("others reach")),
        (["--port", "x"], says("a port; give")),
        (["learning_rate=1"], says("board, where")),
        (["--prot", "9000"], says("see --help")),
        (["--host", "256.1.1.1", "--password"], says("cannot listen")),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(arguments: list[str], code: str) -> None:
    result = run("webui.py", *arguments, input="secret\n")
    assert (result.returncode, result.stdout, result.error.sentence) == (2, "", code)
    assert result.stderr == f"error: {result.error}\n"


@pytest.mark.parametrize("target", ["nowhere", "x.gguf"])
def test_a_model_that_is_not_there_is_refused_at_once(target: str) -> None:
    result = run("webui.py", "--chat", target)
    assert (result.returncode, result.stdout) == (2, "") and target in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("webui.py", "--port", str(taken.getsockname()[1]))
    refused(result, "cannot listen")
    assert "choose another port: --port" in result.stderr


@pytest.mark.parametrize("module", ["torch", "transformers", "peft", "matplotlib", "datasets"])
def test_the_board_starts_without_what_only_a_training_or_a_chat_needs(module: str, built_board: str) -> None:
    assert module not in built_board.split()


@pytest.fixture(scope="module")
def built_board(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packages that are imported once the board could be served."""
    code = "import sys; from web import app; app.build(None, None, '127.0.0.1'); print(*sys.modules)"
    folder, path = tmp_path_factory.mktemp("board"), {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=path, capture_output=True, text=True, check=True
    ).stdout


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def desk(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with a run of the embedded model whose adapter changes nothing."""
    folder = tmp_path_factory.mktemp("desk")
    make_run(embedded_model, folder / "saves" / "demo", noise=0.0)
    return folder


@pytest.fixture(scope="module")
def server(desk: Path) -> Iterator[Server]:
    with serving("--chat", "saves/demo", "temperature=0", "max_new_tokens=16", cwd=desk) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as opened:
        yield opened


@pytest.fixture
def page(server: Server, browser: Browser) -> Iterator[Any]:
    """The chat page in English, with the model loaded."""
    opened = open_page(browser, server.url)
    yield opened
    opened.context.close()
    assert browser.foreign == []
    assert browser.faults == []


def open_page(browser: Browser, url: str) -> Any:
    opened = browser.page(f"{url}/en/")
    opened.set_default_timeout(180_000)
    opened.locator("#chat-box textarea").wait_for()
    return opened


def write(page: Any, text: str) -> None:
    page.locator("#chat-box textarea").fill(text)
    page.locator("#chat-box textarea").press("Enter")


def start(page: Any, text: str) -> None:
    """Sends a message whose reply takes long; it has begun when this returns."""
    write(page, text)
    page.locator("#chat-box button", has_text="Stop").wait_for()


def finish(page: Any) -> None:
    page.locator("#chat-box button", has_text="Send").wait_for()
    page.locator("#chat-remark", has_text="tokens").wait_for()


def send(page: Any, text: str) -> None:
    replies = len(said(page, "bot"))
    write(page, text)
    page.locator("#chat-trained [data-testid=bot]").nth(replies).wait_for()  # a short reply hardly shows "Stop"
    finish(page)


def said(page: Any, who: str, voice: str = "trained") -> list[str]:
    """The texts of the messages of "user" or "bot"."""
    return page.locator(f"#chat-{voice} [data-testid={who}]").all_inner_texts()


def change(page: Any, number: int, text: str) -> None:
    """Changes a message by its pencil."""
    page.locator("#chat-trained").get_by_title("Edit").nth(number).click()
    page.locator("#chat-trained textarea").last.fill(text)
    page.locator("#chat-trained").get_by_title("Submit").click()
    page.locator("#chat-trained textarea").wait_for(state="detached")


def set_longest(page: Any, tokens: int) -> None:
    if not page.get_by_label("Longest reply").is_visible():
        page.get_by_role("button", name="Sampling").click()
    page.get_by_label("Longest reply").fill(str(tokens))
    page.get_by_label("Longest reply").blur()


@pytest.mark.slow
def test_a_conversation_is_led_mended_and_saved(page: Any, desk: Path) -> None:
    page.get_by_text("What is the capital of France?").click()  # the empty page offers it
    finish(page)
    assert said(page, "user") == ["What is the capital of France?"]
    assert "Paris" in said(page, "bot")[0]
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s", page.locator("#chat-remark").inner_text())

    change(page, 1, "<think>\nEasy.\n</think>\n\nIt is **Paris**.\n\n```python\nprint('Paris')\n```")
    page.get_by_role("button", name="Thinking").wait_for()
    page.locator("#chat-trained strong", has_text="Paris").wait_for()
    page.locator("#chat-trained pre code", has_text="print('Paris')").wait_for()
    assert not page.get_by_text("Easy.").is_visible()  # folded

    send(page, "And of Italy?")
    send(page, "And of Spain?")
    page.locator("#chat-trained [data-testid=user]").nth(1).click()
    page.locator("#chat-delete", has_text="Delete turn 2").click()
    page.locator("#chat-delete", has_text="Delete the last turn").wait_for()
    assert said(page, "user") == ["What is the capital of France?", "And of Spain?"]

    change(page, 2, "And of Germany?")
    page.locator("#chat-trained [data-testid=user]", has_text="Germany").wait_for()
    finish(page)
    assert said(page, "user") == ["What is the capital of France?", "And of Germany?"]
    answer = said(page, "bot")[-1]
    page.locator("#chat-again").click()
    page.locator("#chat-box button", has_text="Stop").wait_for()
    finish(page)
    assert said(page, "bot")[-1] == answer  # greedy, and only the last turn was answered again
    page.locator("#chat-system textarea").fill("Be brief.")

    page.get_by_role("button", name="Save as training data").click()
    with page.expect_download() as download:
        page.locator("#chat-download").click()
    assert download.value.suggested_filename == "chats.json"
    page.locator("#chat-add").click()
    page.locator("#chat-saved", has_text="dataset=chats").wait_for()
    [row] = json.loads((desk / "data" / "chats.json").read_text(encoding="utf-8"))
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8")) == [row]
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][2]["content"].startswith("<think>\nEasy.\n</think>")
    ok(run("preview.py", "chats", f"model_name_or_path={ROOT / common.EMBEDDED_MODEL}", cwd=desk))

    page.locator("#chat-new").click()
    page.get_by_text("Write something").wait_for()
    assert said(page, "user") == []


@pytest.mark.slow
def test_a_reply_is_stopped_and_what_came_stays(page: Any) -> None:
    set_longest(page, 2000)
    start(page, "Tell me a very long story about the sea.")
    page.locator("#chat-trained [data-testid=bot]").wait_for()
    page.wait_for_function("document.querySelector('#chat-trained [data-testid=bot]').innerText.length > 20")
    page.locator("#chat-box button", has_text="Stop").click()
    page.locator("#chat-remark", has_text="stopped").wait_for(timeout=20_000)
    finish(page)
    assert len(said(page, "bot")[0]) > 20
    set_longest(page, 4)
    send(page, "Go on.")
    assert len(said(page, "user")) == 2


@pytest.mark.slow
def test_a_new_conversation_ends_the_reply_of_the_old(page: Any) -> None:
    set_longest(page, 2000)
    start(page, "Tell me a very long story about the sea.")
    page.locator("#chat-trained [data-testid=bot]").wait_for()
    page.locator("#chat-new").click()
    page.get_by_text("Write something").wait_for()
    page.locator("#chat-box button", has_text="Send").wait_for()
    page.wait_for_timeout(500)  # in which the old reply's last words would have come
    assert said(page, "user") == []
    set_longest(page, 4)
    send(page, "hi")  # would wait for the old reply, were it still going on
    assert said(page, "user") == ["hi"]


@pytest.mark.slow
def test_who_goes_away_frees_the_model_for_the_next(page: Any, server: Server, browser: Browser) -> None:
    other = open_page(browser, server.url)
    set_longest(other, 8000)
    start(other, "Tell me a very long story about the sea.")  # hundreds of tokens; other questions end soon
    start(page, "hi")
    page.get_by_text("another page is being answered").wait_for()
    other.context.close()
    finish(page)
    assert said(page, "user") == ["hi"]


@pytest.mark.slow
def test_base_and_trained_stand_side_by_side(page: Any) -> None:
    page.locator("#chat-with-base input").check()
    page.locator("#chat-base").wait_for()
    send(page, "What is the capital of France?")
    assert "Paris" in said(page, "bot", "base")[0]
    assert said(page, "bot", "base") == said(page, "bot", "trained")  # this adapter changes nothing
    assert "Before training: " in page.locator("#chat-remark").inner_text()


@pytest.mark.slow
def test_what_is_wrong_is_told_and_the_message_is_not_lost(page: Any) -> None:
    page.get_by_role("button", name="Sampling").click()
    page.get_by_label("Seed").fill("abc")
    page.locator("#chat-box textarea").fill("hello")
    page.locator("#chat-box textarea").press("Enter")
    page.locator("#chat-fault", has_text="the seed 'abc' is not a whole number").wait_for()
    assert page.locator("#chat-box textarea").input_value() == "hello"
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Tools").click()
    page.locator("#chat-tools .cm-content").click()
    page.keyboard.type('[{"name": "weather"}]')
    page.locator("#chat-role").wait_for()
    page.locator("#chat-box textarea").press("Enter")
    page.locator("#chat-fault", has_text="has no tools").wait_for()


@pytest.mark.slow
def test_the_page_speaks_chinese_and_knows_the_dark(page: Any) -> None:
    """The language and the colours are kept when the page is loaded again."""
    page.locator("a.language").click()
    page.get_by_text("输入消息，或").wait_for()
    page.get_by_text("你是谁？").click()
    page.locator("#chat-remark", has_text="个 token").wait_for()
    page.get_by_role("button", name="重试").wait_for()  # Gradio's own words, too, though the browser is English
    page.get_by_role("button", name="新对话").click()
    page.get_by_text("输入消息，或").wait_for()
    assert page.title().startswith("与 ")
    page.locator("button.theme").click()
    assert "dark" in page.locator("body").get_attribute("class")
    page.reload()
    page.get_by_text("输入消息，或").wait_for()
    assert "dark" in page.locator("body").get_attribute("class")
    english = page.locator("a.language")
    english.click()
    page.get_by_text("Write something").wait_for()


@pytest.mark.slow
def test_without_the_password_nobody_gets_in(tiny_model: Path, browser: Browser) -> None:
    import httpx

    with serving("--chat", str(tiny_model), "--host", "0.0.0.0", env={"WEBUI_PASSWORD": "门 secret"}) as server:
        for path in ("/en/", "/en/config", "/zh/gradio_api/info", "/en/gradio_api/queue/join", "/files/run.json"):
            assert httpx.get(server.url + path).status_code in (303, 401), path
            assert httpx.post(server.url + path, json={}).status_code in (303, 401), path
        page = browser.page(server.url)
        assert page.url.endswith("/login")
        page.locator("#password").fill("guess")
        page.locator("button").click()
        page.get_by_text("The password is wrong.").wait_for()
        page.locator("#password").fill("门 secret")
        page.locator("button").click()
        page.locator("#chat-box textarea").wait_for()
        page.context.close()


@pytest.mark.slow
def test_the_loopback_address_that_was_asked_for_answers(tiny_model: Path) -> None:
    import httpx

    with serving("--chat", str(tiny_model), "--host", "127.0.0.2") as other:
        assert other.url.startswith("http://127.0.0.2:")
        assert httpx.get(f"{other.url}/en/").status_code == 200
