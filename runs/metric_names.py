"""The names of the figures in metrics.json, for tables in the terminal, the report and the board."""

from __future__ import annotations

from typing import NamedTuple

from common import Message, user_language


class MetricName(NamedTuple):
    """`short` is a column's head in an English terminal; `name` stands on pages and in a Chinese terminal."""

    short: str
    name: Message | str  # a str is the same in every language

    @property
    def head(self) -> str:
        """A column's head in the terminal, in the user's language."""
        return str(self.name) if user_language() == "zh" else self.short


# Keys of trainer_log.jsonl where rewards are learned, and with eval_ before them.
REWARDS = {
    "reward": Message("reward"),
    "reward_margin": Message("reward margin"),
    "reward_accuracy": Message("reward accuracy"),
}
METRICS = {
    "accuracy": MetricName("accuracy", Message("accuracy")),
    "balanced_accuracy": MetricName("balanced", Message("balanced accuracy")),
    "precision": MetricName("precision", Message("precision")),
    "recall": MetricName("recall", Message("recall")),
    "f1": MetricName("F1", "F1"),
    "roc_auc": MetricName("ROC AUC", "ROC AUC"),
    "average_precision": MetricName("AP", Message("average precision")),
    "tpr_at_fpr_10": MetricName("TPR@10%", Message("true-positive rate at 10 % false positives")),
    "tpr_at_fpr_1": MetricName("TPR@1%", Message("true-positive rate at 1 % false positives")),
    "brier": MetricName("Brier", Message("Brier score (lower is better)")),
    "log_loss": MetricName("log loss", Message("log loss")),
    "ece": MetricName("ECE", Message("calibration error (lower is better)")),
    "mass": MetricName("mass", Message("probability of all labels together")),
    "exact_match": MetricName("exact match", Message("exact match")),
    "bleu": MetricName("BLEU", "BLEU"),
    "chrf": MetricName("chrF", "chrF"),
    "rouge1": MetricName("ROUGE-1", "ROUGE-1"),
    "rouge2": MetricName("ROUGE-2", "ROUGE-2"),
    "rougeL": MetricName("ROUGE-L", "ROUGE-L"),
    "preference_accuracy": MetricName("preference accuracy", Message("preference accuracy")),
    "preference_accuracy_per_token": MetricName("per token", Message("preference accuracy, per token")),
    "margin": MetricName("margin", Message("mean log-probability margin")),
    "reward": MetricName("reward", Message("mean reward")),
    "loss": MetricName("loss", Message("loss")),
    "perplexity": MetricName("perplexity", Message("perplexity")),
    "tokens": MetricName("tokens", Message("tokens")),
    "seconds": MetricName("seconds", Message("seconds")),
}
