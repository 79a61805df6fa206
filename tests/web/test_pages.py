"""The board's pages: jobs, settings, what they tell of a run folder, uploads. test_browser.py has the pages."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, says, user_error, write_jsonl

import common
from common import Message, UserError
from preprocessing import dataset
from runs.configuration import load_config
from runs.files import write_json
from runs.texts import Translator
from web import control, fields, jobs, widgets
from web.pages import data as data_page
from web.pages import evaluate as evaluate_page
from web.pages import export as export_page
from web.pages import train as train_page

t = Translator("en")
zh = Translator("zh")


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a registry of no datasets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    return tmp_path


def wait_for(what, seconds: float = 20):
    """The first true answer of `what`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come about in time")


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def ended(job: jobs.Job) -> str:
    return wait_for(lambda: jobs.state(job) != "running" and jobs.state(job))


# ---------------------------------------------------------------------------------------------------------------------
# Scripts that outlive the page


def test_a_job_is_known_by_its_folder_alone(workdir: Path) -> None:
    jobs.start(workdir / "job", [script(workdir, "print('中文', flush=True)"), "a=b c"])
    job = jobs.find(workdir / "job")
    assert ended(job) == "done" and jobs.error(job) is None
    assert jobs.tail(job.log) == "中文"
    assert job.shell_line.endswith("script.py 'a=b c'")


def test_a_job_lives_in_a_session_of_its_own(workdir: Path) -> None:
    job = jobs.start(workdir / "job", [script(workdir, "import time; time.sleep(60)")])
    assert os.getsid(job.process) == job.process != os.getsid(0)
    with user_error("still running", command=job.shell_line):
        jobs.start(workdir / "job", job.command)
    jobs.send_signal(job, signal.SIGKILL)
    assert ended(job) == "killed" and jobs.error(job) == Message(
        "{command} was killed, ran out of memory, or the machine went down",
        command=job.shell_line,
    )


def test_of_boards_that_start_the_same_at_once_one_does(workdir: Path) -> None:
    command = [script(workdir, "import time; time.sleep(60)")]

    def start(_: int) -> jobs.Job | None:
        try:
            return jobs.start(workdir / "job", command)
        except UserError as error:
            assert error.sentence == says("still running")
            return None

    with ThreadPoolExecutor(4) as boards:
        (job,) = filter(None, boards.map(start, range(4)))
    assert jobs.find(workdir / "job") == job
    jobs.send_signal(job, signal.SIGKILL)
    assert ended(job) == "killed"


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupted_job_can_save_before_it_ends(workdir: Path, handler: Any) -> None:
    """Also where the board ignores Ctrl-C, as one that `nohup ... &` started does."""
    text = "import time\nprint('ready', flush=True)\n"
    text += "try: time.sleep(60)\nexcept KeyboardInterrupt: print('saved'); exit(130)"
    before = signal.signal(signal.SIGINT, handler)
    try:
        job = jobs.start(workdir / "job", [script(workdir, text)])
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: jobs.tail(job.log) == "ready")
    jobs.send_signal(job)
    assert ended(job) == "stopped" and jobs.error(job) is None
    assert jobs.tail(job.log) == "ready\nsaved"


def test_a_failed_job_has_the_commands_own_message_in_the_language_of_the_page(workdir: Path) -> None:
    text = "import sys; sys.path.insert(0, '{root}'); import common\n"
    text += "said = '{{folder}} holds a run; choose another name, resume it, or tick start over'\n"
    text += "def main(argv): raise common.UserError(said, folder='saves/x')\ncommon.run_script(main)"
    job = jobs.start(workdir / "job", [script(workdir, text.format(root=ROOT))], "zh")
    assert ended(job) == "failed"
    assert jobs.error(job) == Message(
        "{folder} holds a run; choose another name, resume it, or tick start over", folder="saves/x"
    )
    assert "saves/x 已有训练结果" in widgets.job_box(job, zh) and "已有训练结果" in jobs.tail(job.log)
    assert "saves/x holds a run" in widgets.job_box(job, t)
    job = jobs.start(workdir / "job", ["train.py", "lerning_rate=1"])
    assert ended(job) == "failed"
    assert "did you mean 'learning_rate'" in t.message(jobs.error(job))


def test_a_job_that_fails_otherwise_shows_its_last_line(workdir: Path) -> None:
    job = jobs.start(workdir / "job", [script(workdir, "print('error: no message'); exit(1)")])
    assert ended(job) == "failed"
    assert jobs.error(job) == Message("{command} failed: {line}", command=job.shell_line, line="error: no message")
    job = jobs.start(workdir / "job", [script(workdir, "exit(1)")])
    assert ended(job) == "failed" and jobs.error(job) == Message(
        "{command} failed and printed nothing", command=job.shell_line
    )


def test_a_bar_is_shown_in_its_last_state(workdir: Path) -> None:
    (workdir / "log").write_bytes(b"start\n\rtrain:  10%|#    | 1/10\rtrain:  50%|#####| 5/10 [00:05, loss=1.2]")
    assert jobs.progress(workdir / "log") == (50, "train: 5/10 [00:05, loss=1.2]")
    assert jobs.lines(workdir / "log") == ["start", "train:  50%|#####| 5/10 [00:05, loss=1.2]"]
    (workdir / "log").write_text("train: 100%|#####| 10/10\nfinished\n")
    assert jobs.progress(workdir / "log") is None


# ---------------------------------------------------------------------------------------------------------------------
# Settings and recipes


def page_fields(**changes: Any) -> dict[str, Any]:
    """The fields as the page has them when nothing was touched, with changes."""
    names = [n for n in common.OPTIONS if n not in fields.DECIDED_BY_PAGE]
    plain = {n: "" if fields.is_text(n) else fields.field_value(n, common.OPTIONS[n].default) for n in names}
    return {**plain, "dataset": ["identity"], **changes}


def test_a_recipe_lists_only_what_differs_and_means_the_same(workdir: Path) -> None:
    chosen = page_fields(learning_rate="1e-3", packing=True, val_size="0.1", quantization_bit="4", lora_rank="8")
    config = fields.read_settings(chosen, "mine").config
    text = control.recipe_text(config)
    assert {line.split(":")[0] for line in text.splitlines()} == {
        "dataset", "learning_rate", "packing", "val_size", "quantization_bit", "output_dir"
    }  # fmt: skip
    (workdir / "recipe.yaml").write_text(text, encoding="utf-8")
    assert load_config(["recipe.yaml"]).config == config
    assert load_config(control.train_command(config)[1:]).config == config


def test_all_faults_of_the_fields_are_given_at_once() -> None:
    with user_error("{faults:lines}") as error:
        fields.read_settings(page_fields(learning_rate="fast", lora_rank="0"), "..")
    assert error.value.fields["faults"][0] == Message(
        "{name} cannot be a run's name; use letters, digits, - and _ (200 bytes)",
        name="'..'",
    )
    assert [(f.sentence, f.fields.get("key")) for f in error.value.fields["faults"][1:]] == [
        (says("{place}: {key}: {value} {problem}"), "learning_rate"),
        (says("{place}: {key}: {value} {problem}"), "lora_rank"),
    ]
    assert "this page: learning_rate: fast must be" in t.message(error.value)
    assert "本页：learning_rate: fast" in zh.message(error.value)
    with user_error("{faults:lines}", faults=[Message("no dataset is chosen; choose one on the page Model and data")]):
        fields.read_settings(page_fields(dataset=[]), "mine")


def test_every_option_of_a_training_has_a_field_in_its_group() -> None:
    """New options of Config appear by themselves; those with one choice, and what the page decides, do not."""
    shown = [name for names in fields.folded_groups().values() for name in names]
    hidden = {n for n in common.OPTIONS if len(fields.choices_of(n)) == 1} | set(fields.DECIDED_BY_PAGE)
    missing = set(common.OPTIONS) - hidden - set(shown)
    assert len(shown) == len(set(shown)) and not hidden & set(shown)
    assert "temperature" in missing and not missing & set(fields.first_labels(t))
    assert {"chat", "export", "evaluation"} == set(fields.NOT_TRAINING)


@pytest.mark.parametrize(
    "recipe", sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "tests/tutorial").glob("*.yaml")])
)
def test_a_loaded_recipe_fills_the_fields_and_comes_out_the_same(recipe: Path) -> None:
    loaded = load_config([str(recipe)])
    filled = fields.fields_of(loaded, list(page_fields()))
    others = fields.without_field(loaded, list(page_fields()))
    assert fields.read_settings(filled, fields.run_name_of(loaded), others).config == loaded.config


def test_settings_of_a_recipe_that_have_no_field_are_kept(workdir: Path) -> None:
    (workdir / "my.yaml").write_text(
        "dataset: identity\ntemperature: 0.3\nresume_from_checkpoint: saves/x/checkpoint-5\ndo_sample: false\n"
        "output_dir: saves/mine\nlearning_rate: 1e-3\n"
    )
    loaded = load_config(["my.yaml"])
    shown = ["dataset", "learning_rate"]
    others = fields.without_field(loaded, shown)
    assert others == {"temperature": "0.3", "resume_from_checkpoint": "saves/x/checkpoint-5", "do_sample": "false"}
    assert fields.read_settings(fields.fields_of(loaded, shown), "mine", others).config == loaded.config


@pytest.mark.usefixtures("workdir")
def test_a_run_cannot_be_put_outside_saves(tmp_path_factory: pytest.TempPathFactory) -> None:
    common.SAVES.mkdir()
    (common.SAVES / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    for name in ("../x", "/etc", "a/../../b", "", ".web", "uploads", "a\\b", "a\nb", "训" * 67, "link", "link/x"):
        with user_error("cannot be a run's name", name=repr(name)):
            control.run_folder(name)
        assert not control.exists(name)
    assert control.run_folder("LLaMA3/lora/训练") == Path("saves/LLaMA3/lora/训练")


# ---------------------------------------------------------------------------------------------------------------------
# What a run folder tells


def make_folder(name: str, status: str | None, pid: int = 0, created: float = 0, lines: int = 0) -> Path:
    folder = common.SAVES / name
    folder.mkdir(parents=True)
    if status:
        run = {"status": status, "pid": pid, "created": created, "started": "2026-11-23T10:00:00+00:00"}
        write_json(folder / "run.json", run)
    fixed = {"total_steps": 20, "learning_rate": 1e-4, "tokens_per_second": 50, "remaining": 1}
    log = [{**fixed, "step": n, "loss": 3 / n, "elapsed": n} for n in range(1, lines + 1)]
    write_jsonl(folder / "trainer_log.jsonl", log)
    return folder


@pytest.mark.usefixtures("workdir")
def test_the_state_of_a_run_is_read_from_its_folder() -> None:
    assert control.run_state(make_folder("done", "finished")) == "finished"
    assert control.run_state(make_folder("half", "interrupted")) == "interrupted"
    # the number belongs to another program by now: this one
    assert control.run_state(make_folder("gone", "running", os.getpid())) == "killed"
    assert control.run_state(make_folder("nothing", None)) == "none"
    assert control.run_names() == ["gone", "half", "done"]
    assert control.training_now() is None


def test_a_training_that_a_terminal_started_is_found_and_can_be_paused(workdir: Path) -> None:
    (workdir / "train.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    job = jobs.start(workdir / "elsewhere", [str(workdir / "train.py")])
    # before that its child may still be a fork of the shell, or a Python that is not yet up: Ctrl-C is lost on both
    wait_for(lambda: jobs.tail(job.log) == "ready")
    (child,) = psutil.Process(job.process).children()
    folder = make_folder("terminal", "running", child.pid, child.create_time())
    wait_for(lambda: control.run_state(folder) == "running")
    assert control.training_now() == "terminal"
    with user_error("training; one", name="terminal"):
        control.start_run(dataclasses.replace(common.Config(), output_dir="saves/other"), False, "en")
    control.pause(folder)
    ended(job)
    assert control.run_state(folder) == "killed"  # it had no time to say that it was interrupted


@pytest.mark.usefixtures("workdir")
def test_odd_folders_below_saves_spoil_no_page() -> None:
    foreign = make_folder("LLaMA3/lora/sft", None)  # of LLaMA-Factory
    write_jsonl(foreign / "trainer_log.jsonl", [{"current_steps": 5, "total_steps": 100, "loss": 1.2, "lr": 1e-4}])
    control.job_folder(foreign).mkdir(parents=True)
    write_json(control.job_folder(foreign) / "job.json", {"command": ["train.py"], "process": 0, "created": 0})
    for name in ("uploads/x", ".trash/old", "a\\b"):
        make_folder(name, "finished")
    for number, text in enumerate(['{"id": 3}', "[1]", '{"status": "finished", "started": 3}', "{"]):
        (make_folder(f"odd{number}", None) / "run.json").write_text(text)
    assert control.run_names()[-1:] + sorted(control.run_names())[1:] == [
        "LLaMA3/lora/sft", "odd0", "odd1", "odd2", "odd3"
    ]  # fmt: skip
    assert train_page.runs_html(t).count("<tr>") == 6
    for name in control.run_names():
        assert name in train_page.status_html(name, t)
        assert control.exists(name)
    assert "starts with the first step" in train_page.plots_html(["LLaMA3/lora/sft"], t)
    with user_error("name, resume it", folder="saves/LLaMA3/lora/sft"):
        control.start_run(dataclasses.replace(common.Config(), output_dir=str(foreign)), False, "en")
    assert control.choose_trained(None) == ([], None)


def test_one_script_at_a_time_has_the_memory(workdir: Path) -> None:
    folder = make_folder("one", "finished")
    job = jobs.start(control.job_folder(folder, "evaluate"), [script(workdir, "import time; time.sleep(60)")])
    with user_error("still running", command=job.shell_line):
        control.start_run(dataclasses.replace(common.Config(), output_dir="saves/other"), False, "en")
    with user_error("still running", command=job.shell_line):
        export_page.start_export("one", "merge", [], False, True, "en")
    assert not (common.SAVES / "other").exists()
    jobs.send_signal(job, signal.SIGKILL)
    ended(job)
    assert control.device_user() is None


def test_two_boards_on_one_folder_start_one_training(workdir: Path) -> None:
    (workdir / "train.py").write_text("import time; time.sleep(60)")
    text = (
        "import dataclasses, sys; from pathlib import Path; sys.path.insert(0, {root!r}); import common\n"
        "common.ROOT = Path.cwd()\nfrom web import control\n"
        "config = dataclasses.replace(common.Config(), output_dir='saves/' + sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: control.start_run(config, False, 'en')\n"
        "except common.UserError as error: sys.exit(error.sentence)\n"
    )
    start = [sys.executable, "-c", text.format(root=str(ROOT))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    boards = [subprocess.Popen([*start, name], **pipes) for name in ("one", "two", "three")]
    for board in boards:
        assert board.stdout.readline() == "ready\n"
    for board in boards:
        board.stdin.write("\n")
        board.stdin.flush()
    ends = [board.communicate()[1].strip() for board in boards]
    assert sorted(ends) == ["", says("training; one"), says("training; one")]
    [job] = [jobs.find(path.parent) for path in common.SAVES.rglob("job.json")]
    jobs.send_signal(job, signal.SIGKILL)


def test_what_was_aborted_was_no_accident(workdir: Path) -> None:
    folder = common.SAVES / "mine"
    job = jobs.start(control.job_folder(folder), [script(workdir, "import time; time.sleep(60)")])
    assert control.device_user() == Message(
        "{name} is training; one run at a time: wait for it, pause it or abort it", name="mine"
    )
    control.abort(folder)
    ended(job)
    assert control.run_state(folder) == "aborted"
    assert ">aborted</span>" in train_page.status_html("mine", t) and "ended" not in train_page.status_html("mine", t)
    job = jobs.start(control.job_folder(folder), [script(workdir, "import os; os.kill(os.getppid(), 9)")])
    ended(job)
    assert control.run_state(folder) == "killed"


@pytest.fixture
def started(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:  # noqa: ARG001
    """The commands that a page starts, none of which is run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(jobs, "start", lambda _folder, command, _language: commands.append(command))
    return commands


def test_a_users_own_recipe_in_the_folder_is_left_alone(started: list[list[str]]) -> None:
    folder = make_folder("mine", None)
    (folder / "trainer_log.jsonl").unlink()
    (folder / "recipe.yaml").write_text("mine")
    control.start_run(dataclasses.replace(common.Config(), output_dir=str(folder)), False, "en")
    control.go_on(folder, "en")
    assert (folder / "recipe.yaml").read_text() == "mine"
    assert [command[1] for command in started] == ["saves/mine/.web/recipe.yaml"] * 2


@pytest.mark.usefixtures("workdir")
def test_several_runs_stand_on_one_plot() -> None:
    make_folder("one", "finished", lines=12)
    make_folder("two", "interrupted", lines=7)
    plots = train_page.plots_html(["one", "two"], t)
    curves = re.findall(r'<polyline class="(c\d)( faint)?" points="([^"]*)"', plots.partition('<div class="two">')[0])
    assert [(colour, len(points.split())) for colour, faint, points in curves if not faint] == [("c0", 12), ("c1", 7)]
    assert ">one</span>" in plots and ">two</span>" in plots
    assert plots.count('class="plot"') == 3
    rewarded = make_folder("rewarded", "finished", lines=1)
    line = json.loads((rewarded / "trainer_log.jsonl").read_text(encoding="utf-8"))
    write_jsonl(rewarded / "trainer_log.jsonl", [line | {"reward_margin": 0.5, "eval_reward_accuracy": 0.75}])
    plots = train_page.plots_html(["rewarded", "two"], t)
    assert plots.count('class="plot"') == 5 and "reward margin" in plots and ">rewarded: held out</span>" in plots
    status = train_page.status_html("one", t)
    assert "12 / 20" in status and "0.2500" in status


def test_only_files_of_runs_are_served(workdir: Path) -> None:
    folder = make_folder("mine", "finished")
    (folder / "report.html").write_text("<p>")
    (folder / ".web").mkdir()
    (folder / ".web" / "job.json").write_text("{}")
    (workdir / "secret.html").write_text("no")
    (folder / "link.html").symlink_to(workdir / "secret.html")
    (folder / "link.json").symlink_to((folder / ".web" / "job.json").absolute())
    (folder / "folder").symlink_to(workdir)
    assert widgets.servable("saves/mine/report.html")
    for path in (
        "saves/../secret.html",
        "secret.html",
        "/etc/passwd",
        "saves/mine/link.html",
        "saves/mine/.web/job.json",
        "saves/mine/link.json",
        "saves/mine/folder/secret.html",
        "saves/mine/\x00.html",
        "saves/" + "x" * 5000 + ".html",
    ):
        assert widgets.servable(path) is None
    assert widgets.servable("saves/mine") is None


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_samples_are_escaped_and_what_is_learned_is_marked(tiny_tokenizer: Any) -> None:
    from preprocessing.encode import encode
    from preprocessing.template import load_template

    talk = {
        "messages": [{"role": "user", "content": "<script>x</script>"}, {"role": "assistant", "content": "<b>好</b>"}]
    }
    (sample,) = encode([talk], load_template("chatml", tiny_tokenizer), tiny_tokenizer, common.Config(cutoff_len=500))
    html = data_page.sample_html(tiny_tokenizer, sample, 3, t)
    assert "<script>" not in html and "&lt;script&gt;x&lt;/script&gt;" in html
    learned = re.findall(r'<span class="learned[^"]*">(.*?)</span>', html)
    assert "".join(learned) == "&lt;b&gt;好&lt;/b&gt;&lt;|im_end|&gt;"
    count = sum(label != -100 for label in sample["labels"])
    assert f"{count} of {len(sample['labels'])} tokens are learned" in html


def test_an_upload_keeps_its_name_and_replaces_its_forerunner(workdir: Path) -> None:
    sent = workdir / "我的 数据.jsonl"
    for text in ("1", "2"):
        sent.write_text(text)
        kept = data_page.keep_upload(sent, lambda _: None)
    assert kept == Path("saves/uploads/我的_数据.jsonl") and kept.read_text() == "2"
    assert data_page.datasets() == [str(kept)]
    for name in ("program.exe", "...json"):
        with user_error("unknown type", file=name):
            data_page.keep_upload(workdir / name, lambda _: None)


def test_an_upload_replaces_the_demonstration_data_and_is_added_to_a_choice() -> None:
    demonstration = list(common.Config.dataset)
    assert data_page.with_upload(demonstration, "saves/uploads/a.json") == ["saves/uploads/a.json"]
    assert data_page.with_upload(demonstration[::-1], "a.json") == ["a.json"]
    assert data_page.with_upload(["a.json"], "b.json") == ["a.json", "b.json"]
    assert data_page.with_upload(["a.json", "b.json"], "a.json") == ["b.json", "a.json"]
    assert data_page.with_upload([*demonstration, "mine"], "a.json") == [*demonstration, "mine", "a.json"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/x.json", "_.._etc_x.json"),
        ("run.json", "data.json"),
        ("训" * 100 + ".csv", "训" * 66 + ".csv"),
        ("a\x00b.jsonl", "a_b.jsonl"),
    ],
)
def test_an_upload_is_kept_in_its_folder_whatever_its_name(name: str, kept: str) -> None:
    assert data_page.upload_name(name) == kept


@pytest.mark.parametrize("name", ["..", ".", "/etc", "../../x", "a" * 300, "org/模型"])
def test_a_download_has_its_job_in_its_folder(name: str) -> None:
    assert data_page.download_folder(name).parent == data_page.DOWNLOADS
    assert data_page.download_folder(name).name[0] != "."


def test_uploads_follow_no_link(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sent = write_jsonl(workdir / "mine.jsonl", [{"instruction": "a", "output": "b"}])
    secret = workdir / "secret.jsonl"
    secret.write_text("secret")
    data_page.UPLOADS.mkdir(parents=True)
    (data_page.UPLOADS / "mine.jsonl").symlink_to(secret)
    kept = data_page.keep_upload(sent, lambda _: None)
    assert secret.read_text() == "secret" and not kept.is_symlink()
    shutil.rmtree(data_page.UPLOADS)
    data_page.UPLOADS.symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with user_error("leads out of saves"):
        data_page.keep_upload(sent, lambda _: None)


def test_a_refused_upload_leaves_the_file_that_is_there(workdir: Path) -> None:
    good, faulty = [{"instruction": "a", "output": "b"}], [{"instruction": "a", "output": None}]

    def check(path: Path) -> None:
        dataset.check(load_config([f"dataset={path}"]).config)

    kept = data_page.keep_upload(write_jsonl(workdir / "mine.jsonl", good), check)
    before = kept.read_text()
    with pytest.raises(UserError, match=r" saves/uploads/mine\.jsonl, row 1: output is null"):
        data_page.keep_upload(write_jsonl(workdir / "mine.jsonl", faulty), check)
    with pytest.raises(UserError):
        data_page.keep_upload(write_jsonl(workdir / "other.jsonl", faulty), check)
    assert kept.read_text() == before and data_page.datasets() == [str(kept)]
    assert list(data_page.UPLOADS.iterdir()) == [kept]


def test_the_embedded_model_is_fetched_without_a_hub(started: list[list[str]]) -> None:
    data_page.start_download(" ", "hub", "en")
    data_page.start_download("org/model", "modelscope", "en")
    assert started == [["download.py"], ["download.py", "org/model", "--modelscope"]]


def test_memory_is_estimated_for_what_is_chosen(tiny_model: Path) -> None:
    config = load_config([f"model_name_or_path={tiny_model}", "output_dir=saves/x"]).config
    small = train_page.memory_html(config, t)
    assert "at the peak" in small and "free" in small and "fault" not in small
    huge = train_page.memory_html(dataclasses.replace(config, per_device_train_batch_size=10**7), t)
    assert 'class="fault"' in huge
    assert "known once" in train_page.memory_html(dataclasses.replace(config, model_name_or_path="models/none"), t)


def test_odd_models_are_told_of(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    chosen = dataclasses.replace(common.Config(), model_name_or_path=str(model))
    inner = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", {"model_type": "gemma3", "text_config": inner})
    assert "at the peak" in train_page.memory_html(chosen, t)
    assert "context of 8,192 tokens" in data_page.model_facts(str(model), t)
    (model / "config.json").write_text("{broken")
    assert "cannot be estimated" in train_page.memory_html(chosen, t)
    assert "config.json is broken" in data_page.model_facts(str(model), t)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_the_gguf_types_of_the_page_are_those_of_quantize() -> None:
    import quantize

    assert {kind: quantize.TYPES[kind].bits for kind in export_page.TYPES} == export_page.TYPES


@pytest.mark.usefixtures("workdir")
def test_rows_that_do_not_divide_make_the_sizes_a_lower_bound(tiny_model: Path) -> None:
    folder = make_folder("mine", "finished")
    run = {"status": "finished", "started": "2026-11-23T10:00:00+00:00", "model": str(tiny_model)}
    write_json(folder / "run.json", run)
    labels = {kind: label for label, kind in export_page.type_choices("mine", t)}
    assert labels["q4_k_m"].startswith("q4_k_m · at least ") and labels["q8_0"].startswith("q8_0 · about ")


@pytest.mark.usefixtures("workdir")
def test_exported_files_stand_with_their_sizes_and_what_was_verified() -> None:
    folder = make_folder("mine", "finished")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(2_000_000))
    (folder / "gguf").mkdir()
    (folder / "gguf" / "mine-q8_0.gguf").write_bytes(b"GGUF")
    (folder / "gguf" / "mine-q8_0.Modelfile").write_text("FROM mine-q8_0.gguf")
    measured = {"kl_divergence": 0.0052, "top1_agreement": 0.975, "perplexity": 13.5, "reference_perplexity": 13.4}
    measured |= {"tokens_equal": True, "tokens_per_second": 36.1, "verified": True, "type": "q8_0", "bytes": 5_000_000}
    write_json(folder / "gguf" / "gguf.json", {"files": {"mine-q8_0.gguf": measured}})
    proof = {"prompts": 8, "difference": 0.0023, "rounding": 0.0022, "same_first_choice": 1.0}
    merged = {"adapter_tensors": 420, "dtype": "float16", "proof": proof}
    (folder / "merged").mkdir()
    write_json(folder / "merged" / "merge.json", merged)
    files = export_page.files_html("mine", t)
    assert "2.0 MB" in files and "5.0 MB" in files and files.count(" download>") == 3
    told = export_page.proof_html("mine", t)
    assert re.findall(r"<td>([^<]*)</td>", told)[-6:] == ["q8_0", "✓", "0.0052", "97.5%", "13.500", "36"]
    assert "<td>420</td>" in told and "100.0%" in told
    assert export_page.modelfile_text("mine") == "FROM mine-q8_0.gguf"


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (
            {"prediction": "<b>", "nats": 3.0, "tokens": 2},
            {"prediction": "4 ", "nats": 1.0, "tokens": 2},
            ["<b>", "4  ✓"],
        ),
        (
            {"prediction": "3", "probabilities": {"3": 0.9, "4": 0.1}},
            {"prediction": "4", "probabilities": {"3": 0.25, "4": 0.75}},
            ["3 · 90%", "4 · 75% ✓"],
        ),
        ({"nats": 0.0, "tokens": 3}, {"nats": 3 * math.log(2), "tokens": 3}, ["perplexity 1.00", "perplexity 2.00"]),
    ],
)
def test_predictions_of_every_task_stand_beside_those_of_the_base(
    before: dict, after: dict, shown: list[str], tmp_path: Path
) -> None:
    row = {"row": 0, "prompt": "2 and 2?", "label": "4"}
    write_jsonl(tmp_path / "predictions.base.jsonl", [{**row, **before}])
    write_jsonl(tmp_path / "predictions.jsonl", [{**row, **after}])
    assert evaluate_page.predictions(tmp_path, t) == [["2 and 2?", "4", *shown]]
