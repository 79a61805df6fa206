"""What a person does with the board, in a real Chromium: one journey through its pages, languages and restarts."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import browsing, end, serving
from conftest import ROOT, write_jsonl

from runs.recipe import read_recipe
from web import control
from web.pages import train as train_page

LONG = 150_000  # milliseconds that a click, a training or an export may take on a busy machine


@pytest.fixture
def workshop(tmp_path: Path, embedded_model: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the kit's data, two models, and the run of another program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("dataset_info.json", "identity.json", "general.json"):
        shutil.copy(ROOT / "data" / name, tmp_path / "data")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / embedded_model.name).symlink_to(embedded_model)
    (tmp_path / "models" / "tiny").symlink_to(tiny_model)
    foreign = tmp_path / "saves" / "LLaMA3" / "sft"
    foreign.mkdir(parents=True)
    write_jsonl(foreign / "trainer_log.jsonl", [{"current_steps": 5, "total_steps": 100, "loss": 1.2, "lr": 1e-4}])
    (foreign / "run.json").write_text('{"id": 3}')
    return tmp_path


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def send_file(page: Any, button: str, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(str(file))


def field(page: Any, element: str) -> Any:
    return page.locator(f"#{element}").locator("input, textarea").first


def wait_for_state(page: Any, state: str) -> None:
    page.wait_for_selector(f'#status [data-state="{state}"]')


def wait_until(what: Any) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_the_whole_flow_in_both_languages_through_crashes_of_browser_and_server(workshop: Path) -> None:
    with browsing() as browser, serving(cwd=workshop) as server:
        page = browser.page(server.url + "/en/")
        page.set_default_timeout(LONG)
        choose_data(page, workshop)
        load_recipe(page, workshop)
        train(page, workshop)
        chat(page, workshop)
        export(page, workshop)
        train_on_and_on(page)
        assert browser.foreign == [] and browser.faults == []
        for process in psutil.Process().children(recursive=True):  # as when the visitor's power fails
            if "chrom" in process.name():
                process.kill()
        end(server.process)
    try:
        steps = len(train_page.read_log(Path("saves/long")))
        wait_until(lambda: len(train_page.read_log(Path("saves/long"))) > steps)
        assert control.training_now() == "long"
        with serving(cwd=workshop) as again, browsing() as browser:
            go_on_in_chinese(browser.page(again.url + "/zh/", language="zh-CN"))
            assert browser.foreign == [] and browser.faults == []
    finally:
        control.abort(Path("saves/long"))


def choose_data(page: Any, workshop: Path) -> None:
    """A faulty file is refused, with its row; corrected it is used, and its samples are shown."""
    rows = [{"instruction": f"What is {n} and {n}?", "output": f"It is {2 * n}."} for n in range(1, 13)]
    mine = write_jsonl(workshop / "mine.jsonl", [*rows[:4], {"instruction": "What is 0?", "output": None}, *rows[4:]])
    send_file(page, "#upload", mine)
    page.locator("#upload-state .fault", has_text="mine.jsonl, row 5: output is null").wait_for()
    assert "mine.jsonl" not in page.inner_text("#option-dataset")
    write_jsonl(mine, rows)
    send_file(page, "#upload", mine)
    page.get_by_text("mine.jsonl is well-formed; datasets: saves/uploads/mine.jsonl.").wait_for()
    page.locator("#report td", has_text="saves/uploads/mine.jsonl").wait_for()
    page.locator("#lengths .bars").wait_for()
    page.locator("#samples .learned", has_text="It is 2.").wait_for()
    page.locator("#samples-page input[type=number]").fill("3")
    page.locator("#samples .learned", has_text="It is 24.").wait_for()


def load_recipe(page: Any, workshop: Path) -> None:
    """What a recipe sets outlives the other language and a reload, also what has no field."""
    recipe = workshop / "my.yaml"
    recipe.write_text("dataset: saves/uploads/mine.jsonl\nnum_train_epochs: 7\ntemperature: 0.3\nname: Mira\n")
    open_tab(page, "Train")
    page.click("#recipe button")
    send_file(page, "#load", recipe)
    page.locator("#train-fault", has_text="without a field here: temperature=0.3").wait_for()
    field(page, "run-name").fill("LLaMA3/sft")
    page.locator("#start-over").wait_for()
    page.click("#train-start")
    page.get_by_text("saves/LLaMA3/sft holds a run").wait_for()
    page.locator("#status", has_text="not started").wait_for()
    page.locator("a.language").click()
    page.locator("#train-start", has_text="开始训练").wait_for()
    page.locator("button.theme").click()
    for _ in range(2):
        page.click("#recipe button")
        page.locator("#yaml .cm-content", has_text="temperature: 0.3").wait_for(state="attached")
        assert field(page, "option-num_train_epochs").input_value() == "7"
        assert field(page, "run-name").input_value() == "LLaMA3/sft"
        assert "dark" in page.locator("body").get_attribute("class")
        page.reload()
        page.locator("#train-start").wait_for()
    page.locator("a.language").click()
    page.locator("#train-start", has_text="Start").wait_for()


def train(page: Any, workshop: Path) -> None:
    page.locator("#all-settings button").first.click()
    for group in ("Training", "Output"):
        page.locator("#all-settings").get_by_role("button", name=group).first.click()
    field(page, "option-max_steps").fill("zwanzig")
    page.locator("#train-fault .fault", has_text="max_steps: zwanzig must be a").wait_for()
    for option, value in {"max_steps": "8", "logging_steps": "1", "per_device_train_batch_size": "1"}.items():
        field(page, f"option-{option}").fill(value)
    page.locator("#train-fault .fault").wait_for(state="detached")
    field(page, "run-name").fill("mine")
    page.locator("#memory", has_text="at the peak").wait_for()
    page.click("#train-start")
    wait_for_state(page, "running")
    page.reload()
    open_tab(page, "Train")
    wait_for_state(page, "finished")
    assert "8 / 8" in page.inner_text("#status")
    curve = page.locator("#plots polyline:not(.faint)").first.get_attribute("points")
    assert len(curve.split()) == 8
    recipe = read_recipe(workshop / "saves" / "mine" / ".web" / "recipe.yaml")
    assert recipe["name"] == "Mira" and recipe["dataset"] == "saves/uploads/mine.jsonl"


def chat(page: Any, workshop: Path) -> None:
    """A question, its answer stopped, changed by the pencil, with thoughts folded, and saved as training data."""
    page.get_by_role("button", name="Chat →").click()
    page.wait_for_function("document.querySelector('#chat-target input').value == 'mine'")
    page.get_by_role("button", name="Sampling").click()
    page.get_by_label("Longest reply").fill("4000")
    page.get_by_label("Longest reply").blur()
    page.fill("#chat-box textarea", "Who are you?")
    page.press("#chat-box textarea", "Enter")
    page.locator("#chat-box button", has_text="Stop").click()
    page.locator("#chat-remark", has_text="tokens").wait_for()
    page.locator("#chat-trained").get_by_title("Edit").nth(1).click()
    page.locator("#chat-trained textarea").last.fill("<think>\nEasy.\n</think>\n\nI am **Mira**.")
    page.locator("#chat-trained").get_by_title("Submit").click()
    page.locator("#chat-trained strong", has_text="Mira").wait_for()
    page.get_by_role("button", name="Thinking").wait_for()
    assert not page.get_by_text("Easy.").is_visible()  # folded
    page.get_by_role("button", name="Save as training data").click()
    page.click("#chat-add")
    page.locator("#chat-saved", has_text="dataset=chats").wait_for()
    [row] = json.loads((workshop / "data" / "chats.json").read_text(encoding="utf-8"))
    assert [m["content"][:8] for m in row["messages"]] == ["Who are ", "<think>\n"]
    page.click("#chat-new")
    page.get_by_text("Write something").wait_for()


def export(page: Any, workshop: Path) -> None:
    """And what came after the page was built can be chosen on Evaluate."""
    open_tab(page, "Evaluate")
    page.locator("#eval-data input").click()
    page.get_by_role("option", name="saves/uploads/mine.jsonl").wait_for()
    page.keyboard.press("Escape")
    part = workshop / "saves" / "mine" / "eval" / "d"
    part.mkdir(parents=True)
    figures = {"dataset": "d", "task": "text", "rows": 1, "left_out": 0, "models": {"trained": {"exact_match": 1.0}}}
    (part / "metrics.json").write_text(json.dumps(figures | {"command": ["python", "evaluate.py"]}))
    write_jsonl(part / "predictions.jsonl", [{"row": 0, "prompt": "2 and 2?", "label": "4", "prediction": "<b>4"}])
    page.locator("#eval-results td", has_text="exact match").wait_for()
    page.locator("#predictions button").first.click()
    page.locator("#eval-predictions").get_by_text("<b>4").locator("visible=true").first.wait_for()
    open_tab(page, "Export")
    page.locator("#gguf-types label", has_text="q4_k_m").locator("input").uncheck()
    page.locator("#gguf-types label", has_text="q8_0").locator("input").check()
    page.locator("#export-options button").first.click()
    page.get_by_label("Verify").uncheck()  # which takes minutes here, and is tested where it is made
    page.click("#export-gguf")
    link = page.locator("#export-files a", has_text=".gguf")
    link.wait_for()
    with page.expect_download() as arriving:
        link.click()
    assert Path(arriving.value.path()).read_bytes()[:4] == b"GGUF"
    page.locator("#export-files a", has_text="Modelfile").wait_for()
    page.locator("#export-proof", has_text="not verified").wait_for()


def train_on_and_on(page: Any) -> None:
    open_tab(page, "Model and data")
    page.locator("#option-model_name_or_path input").click()
    page.get_by_role("option", name="models/tiny").click()
    open_tab(page, "Train")
    page.locator("#all-settings button").first.click()
    page.locator("#all-settings").get_by_role("button", name="Training").first.click()
    field(page, "option-max_steps").fill("100000")
    field(page, "run-name").fill("long")
    page.locator("#memory", has_text="at the peak").wait_for()
    page.click("#train-start")
    wait_for_state(page, "running")
    page.locator("#plots polyline:not(.faint)").first.wait_for(state="attached")


def go_on_in_chinese(page: Any) -> None:
    """Pause, continue and abort a training that browser and server did not live through."""
    folder = Path("saves/long")
    page.set_default_timeout(LONG)
    open_tab(page, "训练")
    wait_for_state(page, "running")
    assert "运行中" in page.inner_text("#status")
    page.click("#train-pause")
    wait_for_state(page, "interrupted")
    assert any(folder.glob("checkpoint-*/trainer_state.json"))
    paused = train_page.read_log(folder)[-1]["step"]
    page.click("#train-go-on")
    wait_for_state(page, "running")
    wait_until(lambda: train_page.read_log(folder)[-1]["step"] > paused)
    page.click("#train-abort")
    wait_for_state(page, "aborted")
    assert "可从最近的检查点继续" in page.inner_text("#status")
    assert not control.training_now()
