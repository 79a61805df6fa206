"""Reads the data of a run, says all that is wrong with it, counts its tokens, and shows what a few samples teach.

python preview.py [DATASETS] [RECIPE] [key=value ...]

DATASETS are names of dataset_info.json or files, with commas; without them the recipe's. RECIPE is a YAML file.
"""

from __future__ import annotations

from pathlib import Path

from common import Message
from preprocessing import dataset
from preprocessing.data_report import format_report, show_sample
from runs.configuration import load_config, run_command
from training.prepare import prepare_data


def main(argv: list[str]) -> None:
    """Prints the report of DATASETS and a few samples."""
    config = load_config(name_datasets(argv)).config
    dataset.check(config)
    tokenizer, _, data = prepare_data(config)
    print(format_report(data.report))
    count = len(data.train)
    for index in sorted({0, count // 2, count - 1}):
        title = Message("--- sample {number} of {count:,} ---", number=index + 1, count=count)
        print(f"\n{title}\n{show_sample(tokenizer, data.train[index])}")


def name_datasets(argv: list[str]) -> list[str]:
    """The arguments with DATASETS, the first that is neither a setting nor a recipe, as a setting."""
    for index, argument in enumerate(argv):
        is_setting = argument.startswith("-") or ("=" in argument and not Path(argument).exists())
        if not is_setting and Path(argument).suffix.lower() not in (".yaml", ".yml"):
            return [*argv[:index], *argv[index + 1 :], f"dataset={argument}"]
    return argv


if __name__ == "__main__":
    run_command(main, __doc__, ("model", "data"))
