"""The frame of a command: --help, one sentence and status 2 for what the user can fix, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, refused, run

import common


@pytest.mark.parametrize(
    "script", ["train.py", "chat.py", "api.py", "webui.py", "evaluate.py", "merge.py", "quantize.py"]
)
def test_a_python_without_the_packages_is_told_which_has_them(script):
    result = subprocess.run([sys.executable, "-S", ROOT / script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("lacks this kit's packages; run make setup, then .venv/bin/python\n")


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["preview.py"], "jinja2"),
        (["webui.py", "--port", "0"], "httpx"),
        (["download.py", "ORG/NAME"], "httpx"),
        (["data/baseline.py"], "sklearn"),
    ],
)
def test_a_python_with_pyyaml_alone_is_told_too(tmp_path, command, package):
    (tmp_path / "yaml").symlink_to(Path(yaml.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    told = f"{sys.executable} lacks {package}, which this kit needs; run make setup, then .venv/bin/python"
    assert result.stderr == f"error: {told}\n"


def test_help_lists_every_key_in_half_a_second():
    used = os.times().children_user
    result = run("train.py", "--help")
    assert os.times().children_user - used < 0.5
    assert result.returncode == 0
    for name in common.OPTIONS:
        assert f"  {name} " in result.stdout
    assert "(default: 0.0001)" in result.stdout


def test_faults_end_with_status_2_and_one_sentence_each(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lerning_rate: 1\nlora_rank: x")
    result = run("train.py", str(path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: the configuration has 2 faults:\n  {path}: lerning_rate: 1 is not a known key (did you mean "
        f"'learning_rate'?)\n  {path}: lora_rank: x must be a finite number\npython train.py --help lists every key.\n"
    )


def test_ctrl_c_works_in_a_command_started_in_the_background():
    code = "import signal, common; common.run_script(lambda _: (print('on', flush=True), signal.pause()))"
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as the shell does for `command &`
    )
    assert started.stdout.readline() == "on\n"
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=20)[1] == "\nstopped\n"
    assert started.returncode == 130


def test_commands_work_as_they_are_printed(tmp_path, monkeypatch):
    """From any folder, with .venv activated or not, whatever the names."""
    said = []
    for active, folder in ((sys.prefix, ROOT), (None, ROOT), (None, tmp_path), ("/elsewhere", ROOT)):
        monkeypatch.setenv("VIRTUAL_ENV", active) if active else monkeypatch.delenv("VIRTUAL_ENV", raising=False)
        monkeypatch.chdir(folder)
        said.append(common.command("chat.py", "saves/my run"))
    assert said == [
        "python chat.py 'saves/my run'",
        ".venv/bin/python chat.py 'saves/my run'",
        f"{ROOT}/.venv/bin/python {ROOT}/chat.py 'saves/my run'",
        ".venv/bin/python chat.py 'saves/my run'",
    ]


def test_the_hub_is_not_told_of_a_training():
    code = "import common; common.run_script(lambda _: None); from huggingface_hub import constants as c; "
    code += "print(c.HF_HUB_DISABLE_TELEMETRY)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "True\n", result.stderr


def test_a_path_that_no_command_can_use_is_one_sentence():
    refused(run("preview.py", f"{'a' * 256}.json"), "the configuration")
    refused(run("chat.py", "a" * 256), "{path} cannot be used: {problem}")


def test_a_terminal_that_lacks_a_character_shows_another():
    code = "import common; common.run_script(lambda _: print('\\u27e6x\\u27e7'))"
    environment = {**os.environ, "PYTHONIOENCODING": "gbk"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"?x?\n"), done.stderr


def test_ctrl_c_before_a_command_runs_is_no_traceback():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background has none
    )
    code += "import common, os, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_a_cache_that_cannot_be_written_is_replaced_by_the_users(tmp_path):
    (tmp_path / "file").touch()
    code = "import common; common.run_script(lambda _: print(common.CACHE))"
    places = {"ONECARD_CACHE": str(tmp_path / "file/below"), "XDG_CACHE_HOME": str(tmp_path / "mine")}
    environment = {**os.environ, **places}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/mine/onecard\n" and "cannot be written" in done.stderr, done.stderr
