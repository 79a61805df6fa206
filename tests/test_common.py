"""The configuration: LLaMA-Factory's files unchanged, all faults at once, in under a second."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, run, user_error

import common
from common import UserError, load_config
from runs.files import appearing, read_json, read_jsonl, sha256, write_json, write_jsonl, write_text
from runs.folder import newest_run, read_run
from runs.process import is_alive

# the two files of the tutorial, as its users bring them
FIRST = (ROOT / "tests/tutorial/train_2024-05-25.yaml").read_text(encoding="utf-8")
SECOND = (ROOT / "tests/tutorial/train_2024-07-09.yaml").read_text(encoding="utf-8")


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_first_tutorial_file(recipe):
    config = load_config([recipe(FIRST)]).config
    assert config.dataset == ("fintech", "identity")
    assert config.lora_target == ("q_proj", "v_proj")
    assert config.learning_rate == 2e-4
    assert config.warmup_steps == 0
    assert config.report_to == ("none",)
    assert config.fp16 is True
    assert config.output_dir == "saves/LLaMA3-8B-Chinese-Chat/lora/train_2024-05-25-20-27-47"


def test_second_tutorial_file(recipe):
    loaded = load_config([recipe(SECOND), "model_name_or_path=elsewhere"])
    assert loaded.config.model_name_or_path == "elsewhere"
    assert loaded.config.learning_rate == 5e-5
    assert loaded.config.lora_target == ("all",)
    assert any(note.startswith("ddp_timeout") for note in loaded.notes)


def test_numbers_that_yaml_reads_as_text(recipe):
    assert load_config([recipe("learning_rate: 1e-4")]).config.learning_rate == 1e-4
    assert load_config([recipe("max_samples: 1e3")]).config.max_samples == 1000


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("evaluation_strategy: epoch", "eval_strategy", "epoch"),
        ("warmup_steps: 0.1", "warmup_steps", 0.1),
        ("lora_target: [q_proj, v_proj]", "lora_target", ("q_proj", "v_proj")),
        ("report_to: [tensorboard, wandb]", "report_to", ("tensorboard", "wandb")),
        ("report_to: null", "report_to", ("none",)),
        ("quantization_bit: 4", "quantization_bit", 4),
        ("quantization_bit: none", "quantization_bit", None),
        ("gradient_checkpointing: true", "gradient_checkpointing", "true"),
        ("val_size: 0.1", "val_size", 0.1),
        ("val_size: 20", "val_size", 20.0),
        ("neat_packing: true", "packing", True),
        ("resume_from_checkpoint: false", "resume_from_checkpoint", "false"),
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("disable_gradient_checkpointing: true", "gradient_checkpointing", "false"),
        ("disable_gradient_checkpointing: false", "gradient_checkpointing", "auto"),
        ("report_to: swanlab", "report_to", ("swanlab",)),
    ],
)
def test_keys_with_their_meaning(recipe, line, name, value):
    assert getattr(load_config([recipe(line)]).config, name) == value


def test_alpha_is_twice_the_rank_when_unset():
    assert load_config(["lora_rank=12"]).config.alpha == 24
    assert load_config(["lora_rank=12", "lora_alpha=5"]).config.alpha == 5


def test_command_line_wins_wherever_it_stands(recipe):
    path = recipe("lora_rank: 4\nseed: 1")
    assert load_config(["lora_rank=32", path]).config.lora_rank == 32
    assert load_config([path, "--lora-rank=32"]).config.lora_rank == 32


def test_all_faults_at_once(recipe):
    text = "lerning_rate: 1\nlora_rank: x\nstage: dpo\nval_size: -1\ncutoff_len: 2.5\npissa_init: true\nseed: .nan\n"
    text += "mask_history: true\ntrain_on_prompt: true\noptim: adamw_torchh\n"
    with pytest.raises(UserError) as raised:
        load_config([recipe(text)])
    message = str(raised.value)
    assert "9 faults" in message
    assert "mask_history and train_on_prompt exclude each other" in message
    assert "(did you mean 'adamw_torch'?)" in message
    assert "lerning_rate (did you mean 'learning_rate'?)" in message
    for key in ("lora_rank", "stage", "val_size", "cutoff_len", "pissa_init", "seed"):
        assert f"{key}" in message
    assert "must be one of sft" in message


def test_keys_that_change_nothing_are_noted_and_foreign_ones_refused_only_when_set(recipe):
    loaded = load_config([recipe("deepspeed: ds.json\npissa_init: false\nexport_device: cpu")])
    assert [note.split(":")[0] for note in loaded.notes] == ["deepspeed", "export_device"]


@pytest.mark.parametrize("off", ["false", "0", "0.0", "none", '"null"', "[]"])
def test_foreign_keys_that_are_off_are_accepted(recipe, off):
    assert load_config([recipe(f"neftune_noise_alpha: {off}\nlabel_smoothing_factor: {off}\nfp8: {off}")]).notes == []


def test_keys_of_llama_factory_at_their_defaults_are_accepted(recipe):
    harmless = "use_swanlab: false\nmetric_for_best_model: eval_loss\npush_to_hub: false\nimage_max_pixels: 262144\n"
    harmless += "ray_storage_path: ./saves\nresources_per_worker:\n  GPU: 1\nhf_hub_token: null\ndata_seed: 1\n"
    harmless += "adam_beta1: 0.9\nadam_beta2: 0.999\nadam_epsilon: 1.0e-8\npissa_iter: 16\nnum_beams: 1\n"
    load_config([recipe(harmless)])
    with pytest.raises(UserError) as raised:
        load_config([recipe("adam_beta2: 0.95\ndisable_shuffling: true\nnum_beams: 4")])
    assert "3 faults" in str(raised.value)
    assert "adam_beta2 is always 0.999 here" in str(raised.value)


def test_report_to_all_is_what_is_installed(recipe, monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: name in ("wandb", "mlflow") or None)
    loaded = load_config([recipe("report_to: all")])
    assert loaded.config.report_to == ("wandb", "mlflow")
    assert "wandb, mlflow" in loaded.notes[0]


def test_the_command_line_wins_over_another_spelling_in_the_file(recipe):
    path = recipe("evaluation_strategy: steps\ndisable_gradient_checkpointing: true\nseed: 3")
    loaded = load_config([path, "eval_strategy=no", "gradient_checkpointing=true"])
    assert (loaded.config.eval_strategy, loaded.config.gradient_checkpointing) == ("no", "true")
    assert loaded.given == {"eval_strategy", "gradient_checkpointing", "seed", "output_dir"}
    assert loaded.typed == {"eval_strategy", "gradient_checkpointing"}
    with pytest.raises(UserError, match="evaluation_strategy and eval_strategy are the same setting"):
        load_config([recipe("evaluation_strategy: steps\neval_strategy: epoch")])


def test_a_key_that_stands_twice_is_told_with_its_line(recipe):
    with pytest.raises(UserError, match="line 3: learning_rate stands already in line 1"):
        load_config([recipe("learning_rate: 1e-4\nseed: 1\nlearning_rate: 1e-2\n")])


def test_settings_that_exclude_each_other(recipe):
    with pytest.raises(UserError, match="val_size and eval_dataset"):
        load_config([recipe("val_size: 0.1\neval_dataset: a")])
    with pytest.raises(UserError, match="interleave_probs has 1 values for 2 datasets"):
        load_config([recipe("dataset: a,b\ninterleave_probs: 1.0")])


def test_broken_recipes(recipe, tmp_path):
    with pytest.raises(UserError, match=r"line 2, column 10"):
        load_config([recipe("seed: 1\nepochs: 3: 4\n")])
    with pytest.raises(UserError, match="no settings"):
        load_config([recipe("- a\n- b\n")])
    with pytest.raises(UserError, match="there is no recipe"):
        load_config([str(tmp_path / "none.yaml")])
    (tmp_path / "utf16.yaml").write_bytes("seed: 1".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-8"):
        load_config([str(tmp_path / "utf16.yaml")])


def test_resolved_configuration_reads_back_the_same(recipe):
    config = load_config([recipe(SECOND), "val_size=0.1", "report_to=tensorboard"]).config
    assert load_config([recipe(common.dump_config(config), "config.yaml")]).config == config


def test_default_run_folder_is_named_after_the_recipe(recipe):
    assert load_config([recipe("seed: 1", "my-task.yaml")]).config.output_dir == str(Path("saves/my-task"))


def test_every_shipped_recipe_is_valid():
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert recipes
    for path in recipes:
        loaded = load_config([str(path)])
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#"), f"{path.name}: the header says command, card, time and memory"
        given = yaml.safe_load(text)
        defaults = load_config([]).config
        repeated = [key for key in given if getattr(loaded.config, key, None) == getattr(defaults, key, None)]
        assert not repeated, f"{path.name} repeats defaults: {repeated}"


@pytest.mark.parametrize(
    "script", ["train.py", "chat.py", "api.py", "webui.py", "evaluate.py", "merge.py", "quantize.py"]
)
def test_a_python_without_the_packages_is_told_which_has_them(script):
    result = subprocess.run([sys.executable, "-S", ROOT / script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("lacks this kit's packages; run make setup, then .venv/bin/python\n")


def test_help_lists_every_key_in_half_a_second():
    times = []
    for _ in range(3):
        started = time.process_time()
        before = time.monotonic()
        result = run("train.py", "--help")
        times.append(min(time.monotonic() - before, 60))
        assert time.process_time() - started < 1
    assert result.returncode == 0
    for name in common.OPTIONS:
        assert f"  {name} " in result.stdout
    assert "(default: 0.0001)" in result.stdout


def test_faults_end_with_status_2_and_no_traceback(recipe):
    result = run("train.py", recipe("lerning_rate: 1"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "did you mean 'learning_rate'?" in result.stderr


def test_files_appear_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"名": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "名": 1\n}\n'
    write_text(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_json_that_says_nothing_is_one_sentence(tmp_path):
    for text in ("{}", "[]", "{"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json is broken"):
            read_run(tmp_path)


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


def test_newest_run_is_the_one_last_written(tmp_path):
    for i, name in enumerate(("old", "nested/new", "unfinished")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {"status": "finished"})
        if name != "unfinished":
            (folder / "adapter_config.json").write_text("{}")
        os.utime(folder / "run.json", (i + 1, i + 1))
    assert newest_run(tmp_path) == tmp_path / "nested/new"
    with pytest.raises(UserError, match="make train"):
        newest_run(tmp_path / "nothing")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    names = {f".m[1].new.{ended.pid}.tmp", f".m[1].old.{ended.pid}.tmp"}
    kept = {f".m[1].new.{os.getppid()}.tmp", f".m1.new.{ended.pid}.tmp"}
    for name in names | kept:
        (tmp_path / name).mkdir()
    with appearing(tmp_path / "m[1]"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "m[1]"}


def test_a_number_given_to_a_later_process_is_not_the_earlier_one(monkeypatch):
    me = psutil.Process()
    assert is_alive(me.pid)
    assert is_alive(me.pid, me.create_time())
    assert not is_alive(me.pid, me.create_time() - 60)
    zombie = subprocess.Popen([sys.executable, "-S", "-c", ""], stdin=subprocess.DEVNULL)
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not is_alive(zombie.pid)
    zombie.wait()
    assert not is_alive(zombie.pid)

    def refuse(process: int, _: int) -> None:
        raise PermissionError(process)

    monkeypatch.setattr("os.kill", refuse)
    assert not is_alive(me.pid), "the number belongs to another user now"


def test_json_files_are_read_or_named(tmp_path):
    path = tmp_path / "a.json"
    with user_error("file_missing", file=path, folder=tmp_path):
        read_json(path)
    assert read_json(path, default={}) == {}
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path) == [1]
    for broken in (b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(broken)
        with user_error("json_unreadable", file=path):
            read_json(path, default={})


def test_json_lines_without_what_a_kill_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    write_jsonl(path, [{"a": "\u2028"}, {"b": 1}])
    with path.open("ab") as file:
        file.write('{"c": "名'.encode()[:-1])
    assert read_jsonl(path) == [{"a": "\u2028"}, {"b": 1}]


def test_sha256_of_a_part_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abcdef")
    assert sha256(path) == hashlib.sha256(b"abcdef").hexdigest()
    assert sha256(path, 2, 3, "x") == hashlib.sha256(b"xcde").hexdigest()
