"""What people see of the data: the report of `dataset.prepare`, and samples with what is learned of them."""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any
from unicodedata import east_asian_width

from common import Message, user_language
from preprocessing.faults import fault_messages

COUNTS = ("rows", "samples", "tokens", "median", "longest", "learned", "truncated", "dropped", "duplicates", "skipped")


def _width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def table_head(names: Message) -> list[str]:
    """The head of a table, whose columns the sentence of `names` separates by |."""
    return str(names).split("|")


def format_table(rows: list[list[str]]) -> str:
    """Aligned columns, the first one to the left, the others to the right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first + " " * (widths[0] - _width(first))]
        cells += [" " * (width - _width(cell)) + cell for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def notes_of(report: dict[str, Any]) -> list[Message]:
    """The notes on all datasets of a report, and which rows were skipped and why."""
    every = report["datasets"] + report["eval_datasets"]
    notes = [
        Message("note: {name}: {note}", name=item["name"], note=Message.from_json(note))
        for item in every
        for note in item["notes"]
    ]
    return notes + [
        Message("skipped: {fault}", fault=fault) for item in every for fault in fault_messages(item["faults"])
    ]


def report_table(report: dict[str, Any], language: str) -> list[list[str]]:
    """The report of `dataset.prepare` as rows of cells, the head first."""
    every = report["datasets"] + report["eval_datasets"]
    head = Message("dataset|rows|samples|tokens|median|longest|learned|truncated|dropped|duplicates|skipped")
    table = [head.text(language).split("|")]
    for item in every:
        cells = {name: f"{item[name]:,}" for name in COUNTS}
        cells["learned"] = f"{item['learned'] / max(1, item['tokens']):.1%}"
        table.append([item["name"], *cells.values()])
    for part, label in (("train", Message("= train")), ("eval", Message("= held out"))):
        if part in report and (len(every) > 1 or "eval" in report):
            cells = [f"{report[part][name]:,}" if name in report[part] else "" for name in COUNTS]
            table.append([label.text(language), *cells])
    return table


def format_report(report: dict[str, Any]) -> str:
    """The report of `dataset.prepare` as an aligned table, with its notes and the rows that were skipped."""
    return "\n".join([format_table(report_table(report, user_language())), *map(str, notes_of(report))])


def show_sample(tokenizer: Any, sample: dict[str, list[int]]) -> str:
    """A sample as text, what is learned in green (between ⟦ ⟧ where there is no colour), and its share."""
    if "labels" not in sample:
        return _show_answers(tokenizer, sample)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    shown = []
    for learned, run in itertools.groupby(
        zip(sample["input_ids"], sample["labels"], strict=True), lambda t: t[1] != -100
    ):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        shown.append(f"{before}{text}{after}" if learned else text)
    count = sum(label != -100 for label in sample["labels"])
    total = len(sample["labels"])
    share = Message(
        "({learned} of {total} tokens are learned, {share:.0%})", learned=count, total=total, share=count / total
    )
    return "".join(shown).rstrip("\n") + f"\n{share}"


def _show_answers(tokenizer: Any, sample: dict[str, Any]) -> str:
    """A prompt and the answers to it that are compared or judged."""
    names = {"chosen_ids": Message("chosen"), "rejected_ids": Message("rejected")}
    if "row" in sample:
        sample = {"prompt_ids": sample["prompt_ids"]}
    names["completion_ids"] = Message("good") if sample.get("label") else Message("bad")
    text = {name: tokenizer.decode(ids, skip_special_tokens=False) for name, ids in sample.items() if name != "label"}
    return "\n".join(
        [text.pop("prompt_ids").rstrip("\n"), *(f"[{names[name]}] {shown}" for name, shown in text.items())]
    )
