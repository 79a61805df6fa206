"""Evaluates a model on data that it was not trained on, before and after its training.

python evaluate.py                     the newest run, on the data it held out
python evaluate.py saves/NAME          a run, its merged folder, a FILE.gguf of it, a model's folder or hub name, or a
                                       recipe: of a run, or one of LLaMA-Factory with do_predict or do_eval
    dataset=NAME    on this data instead; rows that the run was trained on are left out
    labels=0,1      the answers to choose from (of two, the last is the positive one); unset: found in the data
    --base          only the model before training
    --no-base       not the model before training
python evaluate.py --runs              all runs with their key figures
python evaluate.py --compare A B       what differs between two runs, and which predicts the same rows better

All results are in eval/ of the run folder; those of LLaMA-Factory's do_predict and do_eval (predict_results.json,
generated_predictions.jsonl, eval_results.json) in the recipe's output_dir. Ctrl-C stops; the same command continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import Message, print_notes
from evaluation import llamafactory
from evaluation.compare import describe_two_runs, runs_table
from evaluation.job import plan_evaluation
from evaluation.predict import only_evaluation, predict
from evaluation.results import describe_results, write_results
from preprocessing.data_report import format_table
from runs import report
from runs.configuration import run_command
from runs.target import read_arguments


def main(argv: list[str]) -> None:
    flags, target, settings = parse(argv)
    if flags.runs:
        print(format_table(runs_table()))
    elif flags.compare:
        print(describe_two_runs(*map(Path, flags.compare)))
    else:
        evaluate(flags, target, settings)


def evaluate(flags: argparse.Namespace, target: str | None, settings: list[str]) -> None:
    evaluation = plan_evaluation(target, settings, only_base=flags.base, no_base=flags.no_base)
    print_notes(evaluation.notes)
    print(evaluation.describe())
    with only_evaluation(evaluation):
        for model in evaluation.models:
            predict(evaluation, model)
        for data in evaluation.datasets:
            print(describe_results(write_results(evaluation, data), data.folder))
        files = llamafactory.write_files(evaluation)
    if files:
        print("\n", Message("as LLaMA-Factory writes them: {files}", files=files), sep="")
    if evaluation.run:
        print("\n", Message("the report: {file}", file=report.write(evaluation.run)), sep="")


def parse(argv: list[str]) -> tuple[argparse.Namespace, str | None, list[str]]:
    """The flags, the target, and the settings (`key=value`)."""
    parser = argparse.ArgumentParser(prog="evaluate.py", add_help=False, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true")
    which.add_argument("--no-base", action="store_true")
    which.add_argument("--runs", action="store_true")
    which.add_argument("--compare", nargs=2, metavar=("A", "B"))
    parser.add_argument("rest", nargs="*")
    flags, unknown = parser.parse_known_args(argv)
    return flags, *read_arguments([*flags.rest, *unknown])


if __name__ == "__main__":
    run_command(main, __doc__, ("model", "data", "evaluation"))
