"""The names of the figures in metrics.json, for tables in the terminal, the report and the board."""

from __future__ import annotations

from typing import NamedTuple

from common import user_language


class MetricName(NamedTuple):
    """`short` is a column's head in an English terminal; `en` and `zh` stand on pages."""

    short: str
    en: str
    zh: str

    @property
    def head(self) -> str:
        """A column's head in the terminal, in the user's language."""
        return self.zh if user_language() == "zh" else self.short


# Keys of trainer_log.jsonl where rewards are learned, and with eval_ before them.
REWARDS = {
    "reward": MetricName("reward", "reward", "奖励"),
    "reward_margin": MetricName("margin", "reward margin", "奖励间隔"),
    "reward_accuracy": MetricName("accuracy", "reward accuracy", "奖励准确率"),
}
METRICS = {
    "accuracy": MetricName("accuracy", "accuracy", "准确率"),
    "balanced_accuracy": MetricName("balanced", "balanced accuracy", "平衡准确率"),
    "precision": MetricName("precision", "precision", "精确率"),
    "recall": MetricName("recall", "recall", "召回率"),
    "f1": MetricName("F1", "F1", "F1"),
    "roc_auc": MetricName("ROC AUC", "ROC AUC", "ROC AUC"),
    "average_precision": MetricName("AP", "average precision", "平均精度"),
    "tpr_at_fpr_10": MetricName("TPR@10%", "true-positive rate at 10 % false positives", "误报率 10% 时的检出率"),
    "tpr_at_fpr_1": MetricName("TPR@1%", "true-positive rate at 1 % false positives", "误报率 1% 时的检出率"),
    "brier": MetricName("Brier", "Brier score (lower is better)", "Brier 分数（越低越好）"),
    "log_loss": MetricName("log loss", "log loss", "对数损失"),
    "ece": MetricName("ECE", "calibration error (lower is better)", "校准误差（越低越好）"),
    "mass": MetricName("mass", "probability of all labels together", "全部标签的概率之和"),
    "exact_match": MetricName("exact match", "exact match", "完全一致"),
    "bleu": MetricName("BLEU", "BLEU", "BLEU"),
    "chrf": MetricName("chrF", "chrF", "chrF"),
    "rouge1": MetricName("ROUGE-1", "ROUGE-1", "ROUGE-1"),
    "rouge2": MetricName("ROUGE-2", "ROUGE-2", "ROUGE-2"),
    "rougeL": MetricName("ROUGE-L", "ROUGE-L", "ROUGE-L"),
    "preference_accuracy": MetricName("preference accuracy", "preference accuracy", "偏好准确率"),
    "preference_accuracy_per_token": MetricName(
        "per token", "preference accuracy, per token", "偏好准确率（按 token 平均）"
    ),
    "margin": MetricName("margin", "mean log-probability margin", "对数概率差均值"),
    "reward": MetricName("reward", "mean reward", "平均奖励"),
    "loss": MetricName("loss", "loss", "损失"),
    "perplexity": MetricName("perplexity", "perplexity", "困惑度"),
    "tokens": MetricName("tokens", "tokens", "token 数"),
    "seconds": MetricName("seconds", "seconds", "秒"),
}
