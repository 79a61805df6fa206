"""chat.py as people use it: in a terminal, in a pipe, and with what they get wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from conftest import ROOT, TALK, make_run, ok, run, says

GREEDY = ("do_sample=false", "infer_dtype=float32", "max_new_tokens=60")
PROMPT = "\x1b\\[1m> "  # as it comes out of the terminal


class Terminal(pexpect.spawn):
    """chat.py in a terminal of 100 columns."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        command = [str(ROOT / "chat.py"), *arguments]
        env = {**os.environ, "ONECARD_CACHE": str(cwd / "cache"), "TERM": "xterm", "LANG": "C.UTF-8"}
        super().__init__(
            sys.executable, command, cwd=str(cwd), env=env, encoding="utf-8", timeout=120, dimensions=(30, 100)
        )
        self.expect(PROMPT)

    def ask(self, text: str) -> str:
        """Types a line; what comes until the next prompt, without colours and without the line itself."""
        self.sendline(text)
        self.expect(PROMPT)
        lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.before).replace("\r\n", "\n").split("\n")
        return "\n".join(lines[1:]).strip()

    def end(self) -> int:
        """Ctrl-D; the exit status."""
        self.sendeof()
        self.expect(pexpect.EOF)
        self.close()
        return self.exitstatus


def test_help_comes_at_once_and_lists_the_chat_settings() -> None:
    started = time.process_time()
    result = run("chat.py", "--help")
    assert result.returncode == 0 and time.process_time() - started < 0.5
    assert "python chat.py saves/NAME" in result.stdout
    assert "  temperature " in result.stdout and "  template " in result.stdout
    assert "learning_rate" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["a", "b"], says("targets; give")),
        (["nobody/nothing"], says("there is no model")),
        ([str(ROOT / "tests")], says("no config.json")),
        (["tempratur=1"], says("the configuration")),
        (["temperature=hot"], says("the configuration")),
        (["--bse"], says("see --help")),
    ],
)
def test_wrong_arguments_are_reported_at_once(arguments: list[str], code: str) -> None:
    result = run("chat.py", *arguments, input="", timeout=30)
    assert result.returncode == 2 and result.stdout == ""
    assert result.error.sentence == code and "Traceback" not in result.stderr
    if code == says("see --help"):
        assert result.error.fields["near"] == "--base"


def test_an_error_as_the_user_sees_it(tiny_model: Path) -> None:
    result = run("chat.py", str(tiny_model), "-p", "-", input="", timeout=30)
    assert result.stderr == "error: -p has no text and nothing is piped in; write the message after -p\n"


def test_an_empty_message_with_no_pipe_is_reported_before_the_model_is_loaded(tiny_model: Path) -> None:
    result = run("chat.py", str(tiny_model), "-p", "", input="")
    assert result.returncode == 2 and "loading" not in result.stderr
    assert result.error.sentence == says("message after")


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which $CHAT is chat.py."""
    env = {**os.environ, "CHAT": f"{sys.executable} {ROOT / 'chat.py'}", **environment}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("$CHAT MODEL -p hi >&-", "standard output is closed"),
        ("$CHAT MODEL <&-", "standard input is closed"),
        ("$CHAT MODEL -p - <&-", "standard input is closed"),
    ],
)
def test_closed_streams_are_one_sentence(line: str, message: str, tmp_path: Path) -> None:
    result = shell(line, tmp_path)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_one_answer_from_a_pipe(parrot: Path, tmp_path: Path) -> None:
    result = run("chat.py", str(parrot), "-p", "-", *GREEDY, input="hi\n", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, TALK["hi"] + "\n"), result.stderr
    assert re.search(r"\[29 tokens, [\d.]+ tokens/s, first after [\d.]+ s\]", result.stderr)
    assert "\x1b" not in result.stderr  # no colours outside a terminal
    lines = run("chat.py", str(parrot), *GREEDY, input="hi\n/clear\ncount\n/nonsense\n/exit now\nhi", cwd=tmp_path)
    assert (lines.returncode, lines.stdout) == (0, f"{TALK['hi']}\n{TALK['count']}\n")
    assert "there is no command /nonsense" in lines.stderr
    unclosed = run("chat.py", str(parrot), *GREEDY, input='"""hi', cwd=tmp_path)
    assert (unclosed.returncode, unclosed.stdout) == (0, f"{TALK['hi']}\n")
    assert shell(f"$CHAT {parrot} {' '.join(GREEDY)} -p hi <&-", tmp_path).stdout == f"{TALK['hi']}\n"


@pytest.mark.slow
def test_piped_text_stands_after_that_of_the_option(parrot: Path, tmp_path: Path) -> None:
    from inference.load import load

    too_long = run("chat.py", str(parrot), "-p", "first", input="w" * 9000, cwd=tmp_path)
    tokens = len(load(str(parrot)).prompt_ids([{"role": "user", "content": "first\n\n" + "w" * 9000}]))
    assert too_long.returncode == 2 and too_long.stdout == ""
    assert (too_long.error.sentence, too_long.error.fields["tokens"]) == (says("the last message makes"), tokens)


@pytest.mark.slow
def test_a_conversation_in_a_terminal(parrot: Path, tmp_path: Path) -> None:
    chat = Terminal(str(parrot), *GREEDY, cwd=tmp_path)
    assert chat.ask("hi").startswith(TALK["hi"] + "\n[29 tokens, ")
    assert "temperature         0.0" in chat.ask("/set")
    assert chat.ask("/set temperature 0.2") == "temperature = 0.2"
    assert "temperature         0.2" in chat.ask("/set")
    assert "temperature must be from 0 to 100, not -3" in chat.ask("/set temperature -3")
    assert "'hot' is not a number" in chat.ask("/set temperature hot")
    assert "did you mean 'top_p'?" in chat.ask("/set topp 1")
    chat.ask("/set temperature 0")
    assert chat.ask("/set stop stop") == "stop = stop"
    assert chat.ask("/retry").startswith("你好 🙂 \n[")
    chat.ask("/set stop")
    assert chat.ask("/history").split("\n")[:4] == ["user", "hi", "[assistant]", "你好 🙂"]
    assert chat.ask("/undo") == "taken back; 0 messages are left"
    assert "nothing has been said yet" in chat.ask("/undo")
    assert "nothing has been said yet" in chat.ask("/save it.json")
    assert "(no system message)" in chat.ask("/system")
    assert chat.ask("/system 你是一个助手") == ""
    assert chat.ask("/system") == "你是一个助手"
    assert chat.ask("/clear") == "a new conversation"
    chat.ask("hi")
    assert "saved it.json" in chat.ask("/save it.json")
    assert "it.json exists already" in chat.ask("/save it.json")
    saved = json.loads((tmp_path / "it.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in saved[0]["messages"]] == ["system", "user", "assistant"]
    assert "saved d.json; as training data: dataset=d.json" in chat.ask("/save d")
    (tmp_path / "kept").mkdir()
    assert re.search(r"saved kept/chat-\d+-\d+.json", chat.ask("/save kept"))
    assert "cannot be written" in chat.ask("/save gone/")
    assert "[" in chat.ask("/root/a.txt is a file")
    assert "user\n/root/a.txt is a file\n" in chat.ask("/history")
    assert chat.ask("/system -") == ""
    assert "did you mean '/help'?" in chat.ask("/hlep")
    assert "/retry" in chat.ask("/help")
    chat.sendline('"""count')
    chat.sendline("")
    chat.expect_exact("... ")
    assert "tokens" in chat.ask('these lines"""')
    assert "user\ncount\n\nthese lines\n[assistant]" in chat.ask("/history")
    chat.ask("/set top_k 3")
    assert chat.ask("\x1b[A") == "top_k = 3"  # one line up
    assert chat.end() == 0
    assert "/system 你是一个助手" in (tmp_path / "cache" / "chat_history").read_text(encoding="utf-8").split("\n")


@pytest.mark.slow
def test_ctrl_c_stops_the_reply_and_keeps_the_chat(tiny_model: Path, tmp_path: Path) -> None:
    chat = Terminal(str(tiny_model), "max_new_tokens=100000", "do_sample=false", cwd=tmp_path)
    chat.sendline("go on")
    chat.expect(r"go on\r\n.{0,20}\r?\n?.")
    time.sleep(0.3)
    chat.sendintr()
    chat.expect(r"\[\d+ tokens, .*stopped\]")
    chat.expect(PROMPT)
    assert "go on" in chat.ask("/history")
    chat.send("half a line")
    chat.expect_exact("half a line")
    # readline loses a Ctrl-C that comes while it handles a key; a person presses again
    for _ in range(6):
        chat.sendintr()
        if chat.expect([PROMPT, pexpect.TIMEOUT], timeout=10) == 0:
            break
    assert chat.isalive()
    assert chat.end() == 0


@pytest.mark.slow
def test_base_answers_beside_the_trained_model(parrot: Path, tmp_path: Path) -> None:
    make_run(parrot, tmp_path / "saves" / "mine")
    result = ok(run("chat.py", "--base", "-p", "hi", *GREEDY, input="", cwd=tmp_path))
    before, trained = result.stdout.split("[trained]\n")
    assert before == f"[before training]\n{TALK['hi']}\n"
    assert trained.strip() and trained.strip() != TALK["hi"]
    assert result.stderr.count(" tokens/s") == 2
    merged = run("chat.py", str(parrot), "--base", "-p", "hi", input="", cwd=tmp_path)
    assert merged.returncode == 2 and merged.error.sentence == says("no adapter to switch off")
