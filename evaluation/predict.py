"""The predictions of each model for each dataset: predictions.jsonl grows row by row and can be continued."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import common
from common import Message, UserError
from evaluation import scoring
from evaluation.job import EvalModel, Evaluation, compute_dtype
from evaluation.tasks import EvalDataset, Item, question_of
from inference.load import load
from preprocessing.rows import fingerprint
from runs.files import on_disk_full, read_json, read_jsonl, sha256, write_json, write_jsonl
from runs.folder import locked
from runs.target import Target


def predict(evaluation: Evaluation, model: EvalModel) -> None:
    """Makes the predictions of one model that are not there yet; a model with none left to make is not loaded."""
    todo = [(data, missing) for data in evaluation.datasets if (missing := missing_rows(evaluation, model, data))]
    if not todo:
        print(Message("{model}: all predictions are there already", model=model.label))
        return
    print(Message("loading {model} ...", model=model.source.name), flush=True)
    scorer = scoring.scorer_for(load(model.source))
    for data, missing in todo:
        started, batches = time.monotonic(), 0
        try:
            with open(predictions_file(data, model.label), "a", encoding="utf-8") as file:
                for lines in predicted_rows(evaluation, model, data, missing, scorer):
                    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                    file.flush()
                    batches += 1
        finally:  # the time of an interrupted evaluation counts, too
            _add_time(data, model.label, time.monotonic() - started, batches)
        _finish(model, data)
    del scorer
    gc.collect()


def predicted_rows(
    evaluation: Evaluation, model: EvalModel, data: EvalDataset, missing: list[Item], scorer: Any
) -> Iterator[list[dict[str, Any]]]:
    """The lines of predictions.jsonl, a batch at a time."""
    from tqdm import tqdm

    limit = evaluation.encoded(data).reply_limit
    lengths = [max(item.length, len(item.prompt) + limit) for item in missing]
    with tqdm(total=len(missing), desc=f"{model.label}, {data.name}", unit=" rows", file=sys.stderr) as bar:
        for batch in scoring.batches(lengths, scorer.tokens):
            items = [missing[i] for i in batch]
            answers = data.task.score(items, scorer, limit)
            yield [_row_facts(data, item) | answer for item, answer in zip(items, answers, strict=True)]
            bar.update(len(batch))


def _row_facts(data: EvalDataset, item: Item) -> dict[str, Any]:
    """What identifies a row: its number, a hash of the whole conversation, its last question and reference answer."""
    row = data.rows[item.row]
    conversation = f"{fingerprint(row) % 2**64:016x}"
    return {"row": item.row, "conversation": conversation, "prompt": question_of(row), "label": item.answer}


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def only_evaluation(evaluation: Evaluation) -> Iterator[None]:
    """Raises UserError where another process evaluates into the same folder (each would undo the other's work), and
    where the disk is full within the block."""
    folder = evaluation.datasets[0].folder.parent
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except UserError as error:
            facts = {"folder": folder, "process": error.fields["process"]}
            raise UserError("process {process} is evaluating into {folder}; wait until it ends", **facts) from None
        with on_disk_full(folder, _needed_space(evaluation)):
            yield


def _needed_space(evaluation: Evaluation) -> int:
    """About the bytes of all results: each model's predictions and their copies, and the pictures."""
    rows = [row for data in evaluation.datasets for row in data.rows]
    return 2 * len(evaluation.models) * sum(len(json.dumps(row)) + 1000 for row in rows) + (4 << 20)


def predictions_file(data: EvalDataset, label: str) -> Path:
    return data.folder / ("predictions.jsonl" if label in ("trained", "model") else f"predictions.{label}.jsonl")


def read_state(data: EvalDataset) -> dict[str, Any]:
    """state.json: what is known of the predictions there, by model."""
    return read_json(data.folder / "state.json", default={})


def _write_state(data: EvalDataset, label: str, facts: dict[str, Any]) -> None:
    write_json(data.folder / "state.json", read_state(data) | {label: facts})


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a predictions.jsonl in the order of the rows, each row once."""
    found = {line["row"]: line for line in read_jsonl(file)}
    return [found[row] for row in sorted(found)]


def missing_rows(evaluation: Evaluation, model: EvalModel, data: EvalDataset) -> list[Item]:
    """The rows that are still to be predicted; predictions of other rows or weights are deleted."""
    rows, file = evaluation.encoded(data), predictions_file(data, model.label)
    key = hashlib.sha256(f"{rows.fingerprint} {weights_key(model.source)}".encode()).hexdigest()[:32]
    data.folder.mkdir(parents=True, exist_ok=True)
    if read_state(data).get(model.label, {}).get("key") != key:
        # in this order, so that a kill leaves neither figures nor predictions that belong to something else
        (data.folder / "metrics.json").unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        facts = {"key": key, "rows": rows.fingerprint, "model": model.source.name, "seconds": 0.0, "batches": 0}
        _write_state(data, model.label, facts | {"dtype": compute_dtype(model.source.config)})
    lines = read_predictions(file if file.exists() else _shared_file(key))
    write_jsonl(file, lines)
    done = {line["row"] for line in lines}
    missing = [item for item in rows.items if item.row not in done]
    if done and missing:
        facts = {"model": model.label, "dataset": data.name, "done": len(done), "total": len(rows.items)}
        print(Message("{model}, {dataset}: going on after {done:,} of {total:,} rows", **facts))
    return missing


def _shared_file(key: str) -> Path:
    """Where the predictions of a base model are kept for every run on it."""
    return common.CACHE / "eval" / f"{key}.jsonl"


def weights_key(source: Target) -> str:
    """What the answers of a model depend on, apart from the rows: its weights and the dtype of the computation."""
    path = Path(source.model)
    files = [path] if path.is_file() else [*sorted(path.glob("*.safetensors")), path / "config.json"]
    facts: list[Any] = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    if source.adapter:
        facts += [sha256(source.adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return json.dumps([facts, compute_dtype(source.config), source.config.quantization_bit])


def _add_time(data: EvalDataset, label: str, seconds: float, batches: int) -> None:
    """Adds the time of these predictions to that of those before an interruption."""
    state = read_state(data)[label]
    spent = {"seconds": round(state["seconds"] + seconds, 1), "batches": state["batches"] + batches}
    _write_state(data, label, state | spent)


def _finish(model: EvalModel, data: EvalDataset) -> None:
    """Puts the predictions into the order of the rows, and those of a base where other runs find them."""
    file, state = predictions_file(data, model.label), read_state(data)[model.label]
    lines = read_predictions(file)
    write_jsonl(file, lines)
    if model.label == "base":
        shared = _shared_file(state["key"])
        shared.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(shared, lines)
