"""The result files of LLaMA-Factory's do_eval and do_predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation import metrics
from evaluation.data import GENERAL
from evaluation.job import Evaluation
from evaluation.predict import predictions_file, read_predictions, read_state
from evaluation.tasks import EvalDataset
from runs.files import read_json, write_json, write_jsonl


def write_files(evaluation: Evaluation) -> list[Path]:
    """Writes for the target model what do_eval and do_predict ask for; returns the files.

    eval_results.json with the loss; predict_results.json and generated_predictions.jsonl with the model's own texts;
    all_results.json with all figures.
    """
    folder = evaluation.output or evaluation.run or evaluation.datasets[0].folder.parent
    results: dict[str, dict[str, float]] = {}
    files = []
    if evaluation.config.do_eval:
        results["eval"] = losses(evaluation)
    if evaluation.config.do_predict or evaluation.config.predict_with_generate:
        lines, results["predict"] = predictions(evaluation)
        if lines:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / "generated_predictions.jsonl")
            write_jsonl(files[0], lines)
    for name, figures in results.items():
        if figures:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{name}_results.json")
            write_json(files[-1], figures)
            everything = folder / "all_results.json"
            write_json(everything, read_json(everything, default={}) | figures)
    return files


def losses(evaluation: Evaluation) -> dict[str, float]:
    """The figures of eval_results.json over all datasets that were asked for: nats a token. Empty where a dataset was
    measured as a choice among labels, which has no loss."""
    scored = [line for _, lines in _asked_for(evaluation) for line in lines if "nats" in line]
    if not scored:
        return {}
    figures = metrics.perplexity([(line["nats"], line["tokens"]) for line in scored])
    found = {"eval_loss": figures["loss"], "eval_perplexity": figures["perplexity"]}
    return found | _speed("eval", evaluation, len(scored))


def predictions(evaluation: Evaluation) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The lines of generated_predictions.jsonl, and the figures of predict_results.json."""
    lines = []
    for data, made in _asked_for(evaluation):
        for item, line in zip(evaluation.encoded(data).items, made, strict=True):
            if "prediction" in line:
                prompt = evaluation.tokenizer.decode(item.prompt, skip_special_tokens=False)
                lines.append({"prompt": prompt, "predict": line["prediction"], "label": line["label"]})
    if not lines:
        return [], {}
    figures = text_figures([line["predict"] for line in lines], [line["label"] for line in lines])
    return lines, figures | _speed("predict", evaluation, len(lines))


def text_figures(texts: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """BLEU-4 over characters and ROUGE as LLaMA-Factory has them: means over rows, from 0 to 100."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    bleu = [
        sentence_bleu([list(t)], list(p), smoothing_function=smoothing) if p else 0.0
        for p, t in zip(texts, truth, strict=True)
    ]
    rouge = metrics.rouge(texts, truth)
    names = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
    found = {"bleu-4": sum(bleu) / len(bleu)} | {name: rouge[key] for name, key in names.items()}
    return {f"predict_{name}": round(100 * value, 4) for name, value in found.items()}


def _asked_for(evaluation: Evaluation) -> list[tuple[EvalDataset, list[dict[str, Any]]]]:
    """The datasets that were asked for, with the target model's lines of predictions.jsonl."""
    datasets = [data for data in evaluation.datasets if data.name != GENERAL] or evaluation.datasets
    return [(data, read_predictions(predictions_file(data, evaluation.models[-1].label))) for data in datasets]


def _speed(prefix: str, evaluation: Evaluation, rows: int) -> dict[str, float]:
    """Seconds, rows a second and steps (batches) a second."""
    states = [read_state(data)[evaluation.models[-1].label] for data, _ in _asked_for(evaluation)]
    seconds, batches = (sum(state[key] for state in states) for key in ("seconds", "batches"))
    return {
        f"{prefix}_runtime": round(seconds, 4),
        f"{prefix}_samples_per_second": round(rows / seconds, 3) if seconds else 0.0,
        f"{prefix}_steps_per_second": round(batches / seconds, 3) if seconds else 0.0,
    }
