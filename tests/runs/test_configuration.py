"""The configuration: LLaMA-Factory's files unchanged, all faults at once."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import typing
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, says, user_error

import common
from common import Config, Message
from runs.compatibility import compatibility
from runs.configuration import check_training_asked_for, join_settings, load_config
from runs.setting_checks import SCHEDULE_VALUES
from training.rewards import BUILT_IN

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
    assert loaded.notes == [], "only what changes something for this user is said"
    assert loaded.config.trust_remote_code is False
    assert [note.sentence for note in load_config(["trust_remote_code=true"]).notes] == [says("with your rights")]


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
        ("use_swanlab: true\nreport_to: none", "report_to", ("swanlab",)),
        ("report_to: [wandb]\nuse_swanlab: true", "report_to", ("wandb", "swanlab")),
        ("report_to: TensorBoard", "report_to", ("tensorboard",)),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("max_samples: 1e3", "max_samples", 1000),
        ("stage: SFT", "stage", "sft"),
        ("packing: TRUE", "packing", True),
        ("scale_rewards: none", "scale_rewards", "none"),
        ("scale_rewards:", "scale_rewards", "group"),
        ("lora_rank: 12", "alpha", 24),
        ("lora_rank: 12\nlora_alpha: 5", "alpha", 5),
        ("dpo_beta: 0.3\ndpo_loss: ipo", "pref_beta", 0.3),
        ("dpo_ftx: 1.0", "pref_ftx", 1.0),
        ("stage: orpo\norpo_beta: 0.05", "stage", "dpo"),
        ("stage: orpo\norpo_beta: 0.05", "pref_loss", "orpo"),
        ("stage: orpo\norpo_beta: 0.05", "pref_beta", 0.05),
        ("booster: auto", "seed", 42),
        ("optim: sgd\noptim_args: momentum=0.9", "optim_args", "momentum=0.9"),
        ("seed: 1", "output_dir", "saves/recipe"),
    ],
)
def test_keys_with_their_meaning(recipe, line, name, value):
    assert getattr(load_config([recipe(line)]).config, name) == value


def test_command_line_wins_wherever_it_stands(recipe):
    path = recipe("lora_rank: 4\nseed: 1")
    assert load_config(["lora_rank=32", path]).config.lora_rank == 32
    assert load_config([path, "--lora-rank=32"]).config.lora_rank == 32
    assert load_config(["scale_rewards=None"]).config.scale_rewards == "none"


def faults_of(arguments: list[str]) -> dict[str | None, Message]:
    """The faults of a configuration: what is wrong by key (None: settings taken together)."""
    with user_error("the configuration") as raised:
        load_config(arguments)
    faults = raised.value.fields["faults"]
    assert raised.value.fields["count"] == len(faults)
    return {fault.fields.get("key"): fault.fields.get("problem", fault) for fault in faults}


def test_all_faults_at_once(recipe):
    text = "lerning_rate: 1\nlora_rank: x\nstage: rm\nval_size: -1\ncutoff_len: 2.5\nseed: .nan\n"
    text += "create_new_adapter: true\n"
    text += "mask_history: true\ntrain_on_prompt: true\noptim: adamw_torchh\nfinetuning_type: freeze\nplot_loss: 3\n"
    found = faults_of([recipe(text)])
    assert {key: problem.sentence for key, problem in found.items()} == {
        "lerning_rate": says("is not a known"),
        "lora_rank": says("must be a finite"),
        "stage": says("no reward models"),
        "finetuning_type": says("raise lora_rank"),
        "val_size": says("must be at least {minimum:g}"),
        "cutoff_len": says("must be a whole number"),
        "create_new_adapter": says("is not supported: {reason}"),
        "seed": says("must be a finite"),
        "optim": says("must be one of {choices}{near:suggestion}"),
        "plot_loss": says("must be true or"),
        None: says("exclude each"),
    }
    assert found["lerning_rate"].fields["near"] == "learning_rate"
    assert found["optim"].fields["near"] == "adamw_torch"
    for key in ("messages", "user_tag", "dataset_lost", "zzz"):  # only near words are suggested
        assert faults_of([f"{key}=1"])[key].fields == {"near": None}
    assert faults_of([f"lora_rank={'x' * 300}"])["lora_rank"].sentence == says("must be a finite")


def test_an_empty_value_means_the_default(recipe):
    text = "".join(f"{name}:\n" for name in common.OPTIONS if name not in ("dataset", "name", "author"))
    loaded = load_config([recipe(text)])
    unset = {name: None for name, kind in typing.get_type_hints(Config).items() if type(None) in typing.get_args(kind)}
    assert loaded.config == dataclasses.replace(Config(), **unset | {"output_dir": "saves/recipe", "packing": False})
    assert load_config(["name=", "author=None"]).config.author == "None"


def test_every_key_of_llama_factory_and_transformers_is_known_and_silent_at_its_default(recipe):
    content = yaml.safe_load((ROOT / "configs/compat/llamafactory.yaml").read_text(encoding="utf-8"))
    defaults = dict(content["no_effect"])
    for part in ("noted", "refused"):
        for keys in content[part].values():
            defaults |= {key: value[0] if isinstance(value, list) else value for key, value in keys.items()}
    loaded = load_config([recipe(yaml.safe_dump(defaults))])
    assert (loaded.notes, loaded.given) == ([], {"output_dir"})
    known = {*defaults, *content["renamed"], *content["means"], *common.OPTIONS}
    assert common.OPTIONS.keys() & {*defaults, *content["renamed"], *content["means"]} == {"stage"}
    source = Path(importlib.util.find_spec("transformers").origin).parent
    for file in ("training_args.py", "training_args_seq2seq.py"):
        for node in ast.walk(ast.parse((source / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("TrainingArguments"):
                fields = {f.target.id for f in node.body if isinstance(f, ast.AnnAssign)}
                assert {name for name in fields - known if not name.startswith("_")} == set()


@pytest.mark.parametrize("off", ["false", "0", "0.0", "none", '"null"', "[]"])
def test_foreign_keys_that_are_off_are_accepted(recipe, off):
    assert load_config([recipe(f"neftune_noise_alpha: {off}\nlabel_smoothing_factor: {off}\nfp8: {off}")]).notes == []


def test_foreign_keys_away_from_their_default_are_noted_or_refused_with_a_reason(recipe):
    loaded = load_config([recipe("deepspeed: ds.json\nexport_device: auto\nddp_timeout: 18000000\nmax_length: 99")])
    assert loaded.notes == [
        Message(
            "{key}: {value}: {reason}",
            key="deepspeed",
            value="ds.json",
            reason=Message("not used; every GPU holds the whole model"),
        ),
        Message(
            "{key}: {value}: {reason}",
            key="max_length",
            value=99,
            reason=Message("not used; cutoff_len limits samples, max_new_tokens limits replies"),
        ),
    ]
    found = faults_of(
        [recipe("train_size: 0.9\nuse_galore: yes\ndisable_shuffling: true\nnum_beams: 4\nrope_scaling: {type: yarn}")]
    )
    assert {key: problem.fields["reason"].sentence for key, problem in found.items()} == {
        "train_size": says("how many are held out"),
        "use_galore": says("optimizer is"),
        "disable_shuffling": says("shuffled; take"),
        "num_beams": says("without beam"),
        "rope_scaling": says("length; take"),
    }


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["val_size=0.1", "eval_dataset=a"], says("exclude each")),
        (["dataset=a,b", "interleave_probs=1.0"], says("give one for each")),
        (["optim_args=eps=1e-6"], says("set adam_beta1")),
        (["adapter_name_or_path=saves/a,saves/b"], says("several adapters")),
        ([r"output_dir=D:\runs\a"], says("Windows drive")),
        (["lora_target=embed_tokens"], says("names only embeddings")),
        (["dataset="], says("dataset names no data")),
        (
            ["lr_scheduler_type=linear", "lr_scheduler_kwargs={num_cycles: 2}"],
            says("lr_scheduler_kwargs: {schedule} takes none"),
        ),
        (
            ['lr_scheduler_kwargs={"num_cycle": 2}'],
            says("it takes {known}"),
        ),
        (["lr_scheduler_kwargs={num_cycles: x}"], says("must be a number")),
        (["lr_scheduler_type=cosine_with_min_lr"], says("needs exactly")),
        (["lr_scheduler_type=polynomial", "lr_scheduler_kwargs={lr_end: 1e-3}"], says("must be below learning_rate")),
        (["embedding_learning_rate=1e-5", "additional_target=norm"], says("no embedding is")),
        (["pissa_init=true", "quantization_bit=4"], says("quantized weights exactly")),
        (["pissa_init=true", "use_dora=true"], says("exclude each")),
        (["lora_bias=true", "use_dora=true"], says("exclude each")),
        (["pissa_init=true", "stage=dpo"], says("is for stage")),
        (["neftune_noise_alpha=5", "stage=kto"], says("is for stage")),
        (["lora_bias=all", "stage=dpo"], says("is for stage")),
        (["beta=0.5", "stage=dpo"], says("a setting of stage: grpo")),
        (["epsilon=1e-6"], says("a setting of stage: grpo")),
    ],
)
def test_settings_that_do_not_go_together(arguments, code):
    assert code in [fault.sentence for fault in faults_of(arguments).values()]


def test_values_of_a_schedule_are_read_as_yaml_and_json(recipe):
    for text in ("{min_lr_rate: 1e-1}", "'{\"min_lr_rate\": 0.1}'", "\n  min_lr_rate: 0.1"):
        loaded = load_config([recipe(f"lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {text}")])
        assert loaded.config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
        again = load_config([recipe(common.dump_config(loaded.config), "again.yaml")])
        assert again.config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert faults_of(["lr_scheduler_kwargs=x"])["lr_scheduler_kwargs"].sentence == says("their values")


def test_the_values_of_each_schedule_are_those_that_transformers_takes():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for schedule in common.OPTIONS["lr_scheduler_type"].metadata["choices"]:
        takes = set(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[schedule]).parameters) - given
        assert set(SCHEDULE_VALUES.get(schedule, ())) == takes, schedule


def test_embeddings_of_lora_target_learn_whole():
    loaded = load_config(["lora_target=all,embed_tokens", "additional_target=norm"])
    assert (loaded.config.lora_target, loaded.config.additional_target) == (("all",), ("norm", "embed_tokens"))
    assert loaded.notes == [
        Message(
            "{modules} of lora_target: trained in full, as in additional_target",
            modules=("embed_tokens",),
        )
    ]


def test_an_upload_is_told_once_with_its_command(recipe):
    notes = load_config(
        [recipe("push_to_hub: true\nhub_model_id: me/it\nhub_strategy: end\nhub_private_repo: true")]
    ).notes
    assert notes == [
        Message(
            "{keys}: nothing is uploaded by itself; after training: merge.py RUN --push {repo} (private if new)",
            keys=["push_to_hub"],
            repo="me/it",
        )
    ]
    assert load_config([recipe("hub_model_id: me/it\nhub_token: x")]).notes == []


def test_a_prediction_beside_a_training_is_told():
    assert check_training_asked_for(load_config(["do_train=true", "do_predict=true"])) == [
        Message("replies are generated by evaluate.py, which do_predict starts after the training")
    ]
    assert check_training_asked_for(load_config(["seed=1"])) == []
    assert [note.sentence for note in check_training_asked_for(load_config([]))] == [says("no recipe is")]
    with user_error("no data to do it on", key="do_predict"):
        check_training_asked_for(load_config(["do_train=true", "do_predict=true", "val_size=0"]))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["do_train=false"], says("set do_train")),
        (["do_train=0", "overwrite_output_dir=true"], says("set do_train")),
        (["do_predict=true", "dataset=identity"], says("set do_train")),
        (["do_eval=true"], says("set do_train")),
        (["compute_accuracy=true"], says("not measured")),
        (["do_train=true", "do_eval=true", "val_size=0"], says("no data to do it on")),
    ],
)
def test_a_recipe_that_asks_for_no_training_is_refused_by_a_training(arguments, code):
    with user_error(code):
        check_training_asked_for(load_config(arguments))
    check_training_asked_for(load_config(["do_train=true", "do_eval=true", "do_predict=true"]))
    check_training_asked_for(load_config(["do_eval=false"]))


def test_recipes_of_other_kinds_are_told_from_those_of_a_training(recipe):
    with user_error("of LLaMA-Factory v1", keys=["micro_batch_size", "peft_config"]):
        load_config([recipe("model: x\npeft_config: {name: lora}\nmicro_batch_size: 1")])
    with user_error("has an export_dir"):
        check_training_asked_for(load_config([recipe("model_name_or_path: x\nexport_dir: out")]))


def test_paths_are_those_that_a_shell_would_make_of_them(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WORK", "/work")
    config = load_config([recipe("output_dir: ~/out\ndataset: ${WORK}/a.json,b\nmodel_name_or_path: models\\qwen\\x")])
    assert config.config.output_dir == "/home/me/out"
    assert config.config.dataset == ("/work/a.json", "b")
    assert config.config.model_name_or_path == "models/qwen/x"
    monkeypatch.delenv("WORK")
    assert faults_of(["export_dir=${WORK}/x"])["export_dir"] == Message(
        "names the environment variable {variable}, which is not set", variable="WORK"
    )


def test_dataset_dir_is_looked_for_above_the_recipe_and_in_the_kit(recipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config([]).config.dataset_dir == str(ROOT / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text("{}")
    (tmp_path / "examples/lora").mkdir(parents=True)
    loaded = load_config([recipe("seed: 1", "examples/lora/a.yaml")])
    assert loaded.config.dataset_dir == str(tmp_path / "data")
    assert "dataset_dir" not in loaded.given
    assert load_config(["dataset_dir=nowhere"]).config.dataset_dir == "nowhere"


@pytest.mark.parametrize(
    ("arguments", "joined"),
    [
        (["--lora_rank", "4", "a.yaml"], ["lora_rank=4", "a.yaml"]),
        (["--lora-rank=4", "seed=1"], ["lora_rank=4", "seed=1"]),
        (["--config", "a.yaml"], ["a.yaml"]),
        (["--config=a.yaml"], ["a.yaml"]),
        (["--dry_run"], ["--dry-run"]),
        (["--do_train", "--use_galore", "True", "a.yaml"], ["do_train=true", "use_galore=True", "a.yaml"]),
        (["--packing", "a.yaml"], ["packing=true", "a.yaml"]),
        (["--max_steps", "-1"], ["max_steps=-1"]),
        (["--tf32", "--use_dora"], ["tf32=true", "use_dora=true"]),
        (["--tf32", "a.yaml"], ["tf32=true", "a.yaml"]),
        (["--gradient_checkpointing", "--max_steps", "2"], ["gradient_checkpointing=true", "max_steps=2"]),
        (["--gradient_checkpointing", "auto", "--lr", "1"], ["gradient_checkpointing=auto", "lr=1"]),
        (["--port", "80", "-p", "--", "x"], ["--port", "80", "-p", "--", "x"]),
    ],
)
def test_settings_are_typed_as_people_are_used_to(arguments, joined):
    assert join_settings(arguments) == joined


@pytest.mark.parametrize("arguments", [["--flash_attn", "--use_dora"], ["--config", "--use_dora"], ["--seed"]])
def test_a_setting_never_takes_the_next_flag_for_its_value(arguments):
    with user_error("has no value", argument=arguments[0]):
        join_settings(arguments)


def test_what_people_call_an_option_is_suggested_and_never_accepted():
    words = {"batch_size": "per_device_train_batch_size", "lr": "learning_rate", "epochs": "num_train_epochs"}
    words |= {"bs": "per_device_train_batch_size", "rank": "lora_rank", "max_seq_length": "cutoff_len"}
    words |= {"model": "model_name_or_path", "data": "dataset", "output": "output_dir", "save_dir": "output_dir"}
    found = faults_of([f"{word}=4" for word in words])
    assert {word: problem.fields["near"] for word, problem in found.items()} == words
    assert [note.fields["key"] for note in load_config(["max_length=1024"]).notes] == ["max_length"]
    known = compatibility()
    assert set(known.synonyms.values()) <= common.OPTIONS.keys()
    others = {*common.OPTIONS, *known.renamed, *known.means, *known.no_effect, *known.noted, *known.refused}
    assert not known.synonyms.keys() & {*others, "base", "runs", "compare", "push", "type", "host", "port", "overwrite"}


def test_a_regex_that_is_typed_keeps_its_commas():
    assert set(common.REWARDS.split("|")) == BUILT_IN.keys()
    typed = "length,regex: ^a{1,2},b$, json_valid,regex: x,own.py:points,lenght"
    found = load_config([f"reward_funcs={typed}"]).config.reward_funcs
    assert found == ("length", "regex: ^a{1,2},b$", "json_valid", "regex: x", "own.py:points", "lenght")


def test_report_to_all_is_what_is_installed(recipe, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in ("wandb", "mlflow") or None)
    loaded = load_config([recipe("report_to: all")])
    assert loaded.config.report_to == ("wandb", "mlflow")
    assert loaded.notes == [
        Message("report_to: all means what is installed: {reporters}", reporters=("wandb", "mlflow"))
    ]


def test_the_command_line_wins_over_another_spelling_in_the_file(recipe):
    path = recipe("evaluation_strategy: steps\ndisable_gradient_checkpointing: true\nseed: 3")
    loaded = load_config([path, "eval_strategy=no", "gradient_checkpointing=true"])
    assert (loaded.config.eval_strategy, loaded.config.gradient_checkpointing) == ("no", "true")
    assert loaded.given == {"eval_strategy", "gradient_checkpointing", "seed", "output_dir"}
    assert loaded.typed == {"eval_strategy", "gradient_checkpointing"}
    assert faults_of([recipe("evaluation_strategy: steps\neval_strategy: epoch")])[None] == Message(
        "{place}: {first} and {second} are the same setting; keep one",
        place=path,
        first="evaluation_strategy",
        second="eval_strategy",
    )


def test_a_key_that_stands_twice_is_told_with_its_line(recipe):
    path = recipe("learning_rate: 1e-4\nseed: 1\nlearning_rate: 1e-2\n")
    with user_error(
        "{recipe}, {faults}",
        recipe=path,
        faults=[
            Message("line {line}: {key} is already set in line {first}; keep one", key="learning_rate", line=3, first=1)
        ],
    ):
        load_config([path])


def test_broken_recipes(recipe, tmp_path):
    fault = Message(
        "line {line}, column {column}: {problem}; write one `key: value` a line",
        line=2,
        column=10,
        problem="mapping values are not allowed in this context",
    )
    with user_error("{recipe}, {faults}", faults=[fault]):
        load_config([recipe("seed: 1\nepochs: 3: 4\n")])
    for text in ('seed: 1\nname: "Nova\nlora_rank: 8\n', "seed: 1\nname: 'Nova\nlora_rank: 8\n"):
        with user_error(
            "{recipe}, {faults}",
            faults=[Message("line {line}: a quotation mark that opens here is not closed", line=2)],
        ):
            load_config([recipe(text)])
    with user_error("settings; write"):
        load_config([recipe("- a\n- b\n")])
    recipe("seed: 1", "mine.yaml")
    with user_error("is no recipe", near=tmp_path / "mine.yaml"):
        load_config([str(tmp_path / "min.yaml")])
    with user_error("is no recipe", near=None):
        load_config([str(tmp_path / "other.yaml")])
    recipe('[{"instruction": "q", "output": "a"}]', "rows.json")
    recipe('{"instruction": "q", "output": "a"}\n', "rows.jsonl")
    for name in ("rows.json", "rows.jsonl"):
        with user_error("not settings", file=tmp_path / name):
            load_config([str(tmp_path / name)])
    (tmp_path / "utf16.yaml").write_bytes("seed: 1".encode("utf-16"))
    with user_error("UTF-8 text"):
        load_config([str(tmp_path / "utf16.yaml")])


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("seed：1", says("Chinese colon")),
        ("seed:\u00a01", says("no-break space")),
        ("\u00a0seed: 1", says("no-break space")),
        ("seed:1", says("after the colon")),
    ],
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("# a:b\nlora_rank: 4\n", "\nval_size: 0.1\n")])
def test_a_line_that_is_nearly_a_setting_is_named(recipe, line, code, before, after):
    number = before.count("\n") + 1
    with user_error("{recipe}, {faults}", faults=[Message(code, line=number, text=line.strip())]):
        load_config([recipe(f"{before}{line}{after}")])


def test_resolved_configuration_reads_back_the_same(recipe):
    config = load_config([recipe(SECOND), "val_size=0.1", "report_to=tensorboard"]).config
    assert load_config([recipe(common.dump_config(config), "config.yaml")]).config == config


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


def test_a_name_longer_than_file_systems_have_is_a_fault_of_its_setting():
    long = "a" * 256
    faults = faults_of([f"model_name_or_path={long}", f"dataset=a,b/{long}.json", f"output_dir={'好' * 86}"])
    assert {faults[name] for name in ("model_name_or_path", "dataset", "output_dir")} == {
        Message("has a name longer than the {most} bytes that file systems allow", most=255)
    }
