"""Reads the data of a run, says all that is wrong with it, counts its tokens, and shows what a few samples teach.

python preview.py [DATASETS] [RECIPE] [key=value ...]

DATASETS are names of dataset_info.json or files, with commas; without them the recipe's.
"""

from __future__ import annotations

from pathlib import Path

import common
from preprocessing import dataset
from preprocessing.data_report import format_report, show_sample


def main(argv: list[str]) -> None:
    """Prints the report of DATASETS and a few samples."""
    if "--help" in argv or "-h" in argv:
        print(common.help_text(__doc__))
        return
    plain = [a for a in argv if "=" not in a and not a.startswith("-")]
    if plain and Path(plain[0]).suffix not in (".yaml", ".yml"):
        argv = [a for a in argv if a != plain[0]] + [f"dataset={plain[0]}"]
    config = common.load_config(argv).config
    dataset.check(config)
    from preprocessing.chat_template import load_template
    from preprocessing.tokenizer import load_base_tokenizer

    tokenizer = load_base_tokenizer(config)
    prepared = dataset.prepare(config, tokenizer, load_template(config.template, tokenizer))
    print(format_report(prepared.report))
    count = len(prepared.train)
    for index in sorted({0, count // 2, count - 1}):
        print(f"\n--- sample {index + 1} of {count:,} ---\n{show_sample(tokenizer, prepared.train[index])}")


if __name__ == "__main__":
    common.run_script(main)
