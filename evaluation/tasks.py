"""What is measured of a dataset: a class for each task, from rows to token ids, answers of a model and figures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from common import Config, Message, UserError
from evaluation import metrics
from evaluation.scoring import Loss, Sample, batched_losses, joined
from preprocessing.encode_stages import encode_batch
from preprocessing.faults import TooLong

FORMAT = 3  # of predictions.jsonl and how they are made: another number makes the old ones invalid
MIN_REPLY_LIMIT = 64  # tokens that a reply may always have

Conversation = dict[str, Any]
Predictions = dict[str, list[dict[str, Any]]]  # the lines of predictions.jsonl, by model


@dataclass(frozen=True)
class Item:
    """A row as token ids, cut and rendered exactly as in training."""

    row: int  # its number in the dataset
    answer: str = ""  # the reference
    prompt: list[int] = field(default_factory=list)
    choices: list[list[int]] = field(default_factory=list)  # the labels, as they would be learned after the prompt
    samples: list[Sample] = field(default_factory=list)  # whose likelihood is asked for

    @property
    def length(self) -> int:
        return max(len(self.prompt), *(len(sample["input_ids"]) for sample in self.samples), 0)


@dataclass(frozen=True)
class Encoded:
    """The rows of a dataset that fit into cutoff_len."""

    items: list[Item]
    reply_limit: int = 0  # longest reply in tokens; 0: none is wanted

    @property
    def fingerprint(self) -> str:
        facts = [FORMAT, [vars(item) for item in self.items], self.reply_limit]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class EvalDataset:
    """The rows of one dataset, and what is measured of them."""

    name: str
    rows: list[Conversation]
    folder: Path  # of the results
    task: Task
    left_out: int = 0  # rows that were trained on


class Task:
    """What is measured of a dataset.

    `name` stands in metrics.json; `main` and `others` are the figures of the table: the first with their intervals.
    """

    name: ClassVar[str]
    main: ClassVar[tuple[str, ...]] = ()
    others: ClassVar[tuple[str, ...]] = ()
    labels: tuple[str, ...] = ()  # of a closed set of answers

    def describe(self) -> Message:
        """For people, in a word or two."""
        return Message("perplexity")

    def encode(self, data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> list[Item]:
        """The rows that fit. Raises UserError where a row cannot be encoded, or none fits."""
        raise NotImplementedError

    def reply_limit(self, items: list[Item], config: Config, given: set[str]) -> int:  # noqa: ARG002
        """Tokens that a reply may have; `given`: the settings that were asked for."""
        return 0

    def score(self, items: Sequence[Item], scorer: Any, reply_limit: int) -> list[dict[str, Any]]:
        """The results of these rows for predictions.jsonl. `scorer`: see scoring.py."""
        raise NotImplementedError

    def measure(self, data: EvalDataset, predictions: Predictions, tokenizer: Any) -> dict[str, Any]:
        """The figures by model under "models", how they differ, and samples, as metrics.json has them."""
        raise NotImplementedError

    @classmethod
    def columns(cls, models: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:  # noqa: ARG003
        """`main` and `others`, as they stand in the "models" of a metrics.json."""
        return cls.main, cls.others


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def answer_of(row: Conversation) -> str:
    """The text of the last answer of a conversation, or the chosen one; a tool call and a document have none."""
    if "text" in row or "chosen" in row:
        return row.get("chosen", {}).get("content", "").strip()
    if "columns" in row:
        return (row["answer"] or "").strip()
    return row["messages"][-1]["content"].strip()


def question_of(row: Conversation) -> str:
    """The message that is answered last, or a document, for people."""
    if "text" in row:
        return row["text"]
    if "chosen" in row or "columns" in row:
        return row["messages"][-1]["content"]
    return next(m["content"] for m in reversed(row["messages"][:-1]) if m["role"] != "assistant")


def fitting(data: EvalDataset, encoded: Sequence[Any], *more: Sequence[Any]) -> list[int]:
    """The numbers of the rows that have samples in all encodings. Raises UserError for one that cannot be encoded."""
    for number, samples in enumerate(encoded, 1):
        if isinstance(samples, Message) and not isinstance(samples, TooLong):
            raise UserError("{dataset}, row {row}: {reason}; remove it", dataset=data.name, row=number, reason=samples)
    rows = zip(encoded, *more, strict=True)
    kept = [i for i, found in enumerate(rows) if not any(isinstance(samples, Message) for samples in found)]
    if not kept:
        raise UserError("no row of {dataset} fits into cutoff_len; raise it: cutoff_len=...", dataset=data.name)
    if left_out := len(encoded) - len(kept):
        text = "note: {count:,} row{count:plural} of {dataset} longer than cutoff_len left out"
        print(Message(text, count=left_out, dataset=data.name))
    return kept


def last_answers(rows: list[Conversation], config: Config, tokenizer: Any, template: Any) -> list[Any]:
    """The samples of conversations in which only the last answer is learned, or the Message why there is none."""
    settings = dataclasses.replace(config, mask_history=True, train_on_prompt=False)
    return encode_batch("sft", rows, settings, template, tokenizer)


def split(sample: Sample) -> tuple[list[int], list[int]]:
    """Prompt and answer of a sample in which only the last answer is learned."""
    labels = sample["labels"]
    first = next(i for i, label in enumerate(labels) if label != -100)
    return sample["input_ids"][:first], [label for label in labels[first:] if label != -100]


def without_end(choices: list[list[int]]) -> list[list[int]]:
    """The labels' tokens without the end of the turn, unless one is then the beginning of another."""
    words = [tokens[:-1] for tokens in choices]
    begins = any(a == b[: len(a)] for i, a in enumerate(words) for j, b in enumerate(words) if i != j)
    return choices if begins else words


def document_windows(ids: Sequence[int], length: int) -> list[Sample]:
    """A document as samples of at most `length` tokens, in which every token but the first counts exactly once.

    Each sample after the first begins with half a window of what came before, which does not count.
    """
    stride = max(1, length // 2)
    windows = [{"input_ids": list(ids[:length]), "labels": [-100, *ids[1:length]]}]
    for end in range(length, len(ids), stride):
        start, last = max(0, end + stride - length), min(end + stride, len(ids))
        labels = [-100] * (end - start) + list(ids[end:last])
        windows.append({"input_ids": list(ids[start:last]), "labels": labels})
    return windows


def side_by_side(predictions: Predictions, count: int = 10) -> list[dict[str, Any]]:
    """Rows spread evenly over the data, with what every model predicts."""
    first = next(iter(predictions.values()))
    positions = sorted({i * len(first) // min(count, len(first)) for i in range(min(count, len(first)))})
    return [
        {key: first[i][key] for key in ("row", "prompt", "label")}
        | {"predictions": {label: lines[i]["prediction"] for label, lines in predictions.items()}}
        for i in positions
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


@dataclass(frozen=True)
class Classification(Task):
    """Answers from a closed set: what the model gives to each of them."""

    labels: tuple[str, ...]
    trained_answers: tuple[str, ...] = ()  # of the part of this dataset that was trained on

    name: ClassVar[str] = "classification"
    main: ClassVar[tuple[str, ...]] = ("accuracy",)
    others: ClassVar[tuple[str, ...]] = (
        "balanced_accuracy", "precision", "recall", "f1", "roc_auc", "average_precision", "tpr_at_fpr_10",
        "tpr_at_fpr_1", "brier", "ece",
    )  # fmt: skip

    def describe(self) -> Message:
        if len(self.labels) != 2:
            return Message("choose among {labels}", labels=self.labels)
        text = "choose among {labels}; positive is {last} (to swap: {swap})"
        swap = shlex.quote(f"labels={','.join(reversed(self.labels))}")
        return Message(text, labels=self.labels, last=self.labels[1], swap=swap)

    def encode(self, data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> list[Item]:
        """Each row's prompt, and every label as the tokens that would be learned.

        The end of the turn counts only where a label is the beginning of another. A prompt that has to be cut is cut as
        for the longest label, so that it does not depend on the right one.
        """
        by_label = []
        for label in self.labels:
            last = [{**row["messages"][-1], "content": label} for row in data.rows]
            rows = [{**row, "messages": [*row["messages"][:-1], m]} for row, m in zip(data.rows, last, strict=True)]
            by_label.append(last_answers(rows, config, tokenizer, template))
        items = []
        for i in fitting(data, *by_label):
            pairs = [split(samples[i][0]) for samples in by_label]
            prompt, _ = max(pairs, key=lambda pair: len(pair[1]))
            items.append(Item(i, answer_of(data.rows[i]), prompt, without_end([answer for _, answer in pairs])))
        return items

    def score(self, items: Sequence[Item], scorer: Any, _: int) -> list[dict[str, Any]]:
        """Prediction and probabilities: what the model gives to each label, made to sum to 1."""
        import numpy as np
        from scipy.special import softmax

        logs = np.array(scorer.choices([item.prompt for item in items], [item.choices for item in items]))
        return [
            {
                "prediction": self.labels[int(row.argmax())],
                "probabilities": dict(zip(self.labels, row.tolist(), strict=True)),
                "mass": float(np.exp(log).sum()),  # of all labels together, among everything that it could answer
            }
            for row, log in zip(softmax(logs, axis=1), logs, strict=True)
        ]

    def measure(self, _: EvalDataset, predictions: Predictions, __: Any) -> dict[str, Any]:
        """The figures of every model, of a majority vote, and how each differs from the base."""
        import numpy as np

        truth = [line["label"] for line in next(iter(predictions.values()))]
        shares = {"majority vote": metrics.majority(self.trained_answers, truth, self.labels)}
        for label, lines in predictions.items():
            shares[label] = np.array([[line["probabilities"][name] for name in self.labels] for line in lines])
        models = {label: metrics.classification(truth, p, self.labels) for label, p in shares.items()}
        for label, lines in predictions.items():
            models[label]["mass"] = float(np.mean([line["mass"] for line in lines]))
        chosen = {label: [self.labels[i] for i in p.argmax(1)] for label, p in shares.items()}
        pairs = [(a, b) for b in predictions for a in ("majority vote", "base") if a in chosen and b not in (a, "base")]
        return {
            "models": models,
            "paired": {f"{b} - {a}": metrics.paired(truth, chosen[a], chosen[b]) for a, b in pairs},
        }


class Likelihood(Task):
    """How likely the samples of each row are."""

    others = ("loss", "perplexity")

    def score(self, items: Sequence[Item], scorer: Any, _: int) -> list[dict[str, Any]]:
        sums = ([sum(part) for part in zip(*losses, strict=True)] for losses in losses_of(items, scorer))
        return [{"nats": nats, "tokens": tokens} for nats, tokens in sums]

    def measure(self, _: EvalDataset, predictions: Predictions, __: Any) -> dict[str, Any]:
        """Loss and perplexity of every model."""
        pairs = {label: [(line["nats"], line["tokens"]) for line in lines] for label, lines in predictions.items()}
        return {"models": {label: {"rows": len(pairs[label])} | metrics.perplexity(pairs[label]) for label in pairs}}


def losses_of(items: Sequence[Item], scorer: Any) -> list[list[Loss]]:
    """The losses of each item's samples."""
    losses = iter(batched_losses(scorer, [sample for item in items for sample in item.samples]))
    return [[next(losses) for _ in item.samples] for item in items]


class Answers(Likelihood):
    """How likely the answers of conversations are."""

    name = "loss"

    def encode(self, data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> list[Item]:
        """Each row's prompt, and the whole row as it would be learned."""
        last = last_answers(data.rows, config, tokenizer, template)
        kept = fitting(data, last)
        settings = dataclasses.replace(config, train_on_prompt=False)
        whole = encode_batch("sft", [data.rows[i] for i in kept], settings, template, tokenizer)
        items = []
        for i, (sample,) in zip(kept, whole, strict=True):
            prompt, learned = split(last[i][0])
            answer = answer_of(data.rows[i])
            if data.rows[i]["messages"][-1].get("tool_calls"):  # as the template writes it
                answer = tokenizer.decode(learned, skip_special_tokens=True).strip()
            items.append(Item(i, answer, prompt, samples=[{key: sample[key] for key in ("input_ids", "labels")}]))
        return items


class Texts(Answers):
    """The likelihood of the reference answers, and the model's own replies."""

    name = "text"
    main = ("exact_match",)
    others = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "loss", "perplexity")

    def describe(self) -> Message:
        return Message("texts")

    def reply_limit(self, items: list[Item], config: Config, given: set[str]) -> int:
        """max_new_tokens where it was asked for; else twice the longest answer: a longer reply is wrong anyway."""
        if "max_new_tokens" in given:
            return config.max_new_tokens
        longest = max(len(item.samples[0]["input_ids"]) - len(item.prompt) for item in items)
        return min(config.max_new_tokens, max(MIN_REPLY_LIMIT, 2 * longest))

    def score(self, items: Sequence[Item], scorer: Any, reply_limit: int) -> list[dict[str, Any]]:
        replies = scorer.replies([item.prompt for item in items], reply_limit)
        losses = super().score(items, scorer, reply_limit)
        return [{"prediction": reply.strip()} | loss for reply, loss in zip(replies, losses, strict=True)]

    def measure(self, data: EvalDataset, predictions: Predictions, tokenizer: Any) -> dict[str, Any]:
        """The figures of every model's own texts and of the likelihood of the reference texts, and ten samples."""
        models = super().measure(data, predictions, tokenizer)["models"]
        for name, lines in predictions.items():
            models[name] |= metrics.texts([line["prediction"] for line in lines], [line["label"] for line in lines])
        return {"models": models, "samples": side_by_side(predictions)}


# ---------------------------------------------------------------------------------------------------------------------
# Data of other stages


class Documents(Likelihood):
    """Documents, which are not cut but read in windows of `cutoff_len`."""

    name = "documents"
    main, others = ("perplexity",), ("loss",)

    def encode(self, data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> list[Item]:
        found = encode_batch("pt", data.rows, config, template, tokenizer)
        whole = {i: [token for sample in found[i] for token in sample["input_ids"]] for i in fitting(data, found)}
        return [Item(i, samples=document_windows(ids, config.cutoff_len)) for i, ids in whole.items()]


class Judged(Likelihood):
    """Answers that were judged good or bad."""

    name = "judged"
    others = ("roc_auc",)

    def describe(self) -> Message:
        return Message("likelihood of good and bad answers")

    def encode(self, data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> list[Item]:
        found, items = encode_batch("kto", data.rows, config, template, tokenizer), []
        for i in fitting(data, found):
            (sample,), judgement = found[i], "good" if data.rows[i]["good"] else "bad"
            prompt = sample["prompt_ids"]
            items.append(Item(i, judgement, prompt, samples=[joined(prompt, sample["completion_ids"])]))
        return items

    def measure(self, data: EvalDataset, predictions: Predictions, _: Any) -> dict[str, Any]:
        """How well the likelihood of an answer, per token, tells good from bad ones (area under the ROC curve).

        Raises UserError where all answers are of one kind.
        """
        from sklearn.metrics import roc_auc_score

        models = {}
        for name, lines in predictions.items():
            good = [line["label"] == "good" for line in lines]
            if len(set(good)) == 1:
                raise UserError("{dataset}: all answers are good, or all are bad; name other data", dataset=data.name)
            likelihoods = [-line["nats"] / line["tokens"] for line in lines]
            models[name] = {"rows": len(lines), "roc_auc": float(roc_auc_score(good, likelihoods))}
        return {"models": models}


class Pairs(Task):
    """Pairs of answers, of which the chosen one should be the likelier."""

    name = "pairs"
    main, others = ("preference_accuracy",), ("preference_accuracy_per_token", "margin")

    def describe(self) -> Message:
        return Message("preference accuracy")

    def encode(self, data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> list[Item]:
        found, items = encode_batch("dpo", data.rows, config, template, tokenizer), []
        for i in fitting(data, found):
            (sample,) = found[i]
            answers = [joined(sample["prompt_ids"], sample[name]) for name in ("chosen_ids", "rejected_ids")]
            items.append(Item(i, answer_of(data.rows[i]), sample["prompt_ids"], samples=answers))
        return items

    def score(self, items: Sequence[Item], scorer: Any, _: int) -> list[dict[str, Any]]:
        """The losses of both answers; only the answers' tokens count."""
        pairs = losses_of(items, scorer)
        return [{"prediction": preferred(pair), "chosen": pair[0], "rejected": pair[1]} for pair in pairs]

    def measure(self, _: EvalDataset, predictions: Predictions, __: Any) -> dict[str, Any]:
        """Preference accuracy of every model, and how each differs from the base on the same pairs."""
        pairs = {name: [(line["chosen"], line["rejected"]) for line in lines] for name, lines in predictions.items()}
        chosen = {name: [line["prediction"] for line in lines] for name, lines in predictions.items()}
        paired = metrics.against_base(chosen, lambda base, own: metrics.paired(["chosen"] * len(own), base, own))
        return {"models": {name: preference_figures(pairs[name]) for name in pairs}, "paired": paired}


def preferred(pair: Sequence[Loss], *, per_token: bool = False) -> str:
    """Which answer of a pair is likelier: "chosen", "rejected", or "neither" of two that are equally likely.

    By log p of the whole answer, as DPO compares them, or `per_token`, as SimPO and ORPO do: a whole answer is the less
    likely the longer it is.
    """
    chosen, rejected = (nats / max(tokens, 1) if per_token else nats for nats, tokens in pair)
    return "neither" if chosen == rejected else "chosen" if chosen < rejected else "rejected"


def preference_figures(pairs: Sequence[Sequence[Loss]]) -> dict[str, Any]:
    """The share of pairs whose chosen answer is likelier, with Wilson's 95 % interval, by both ways of `preferred`.

    `margin`: the mean of log p(chosen) - log p(rejected), in nats.
    """
    found: dict[str, Any] = {"rows": len(pairs)}
    for name, per_token in (("preference_accuracy", False), ("preference_accuracy_per_token", True)):
        right = sum(preferred(pair, per_token=per_token) == "chosen" for pair in pairs)
        found |= {name: right / len(pairs), f"{name}_interval": metrics.wilson(right, len(pairs))}
    return found | {"margin": sum(rejected - chosen for (chosen, _), (rejected, _) in pairs) / len(pairs)}


@dataclass(frozen=True)
class Rewarded(Task):
    """Replies to prompts, and what the reward functions of a run of stage grpo give for them."""

    config: Config

    name: ClassVar[str] = "rewarded"

    def describe(self) -> Message:
        return Message("rewards of replies")

    def encode(self, data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> list[Item]:
        found = encode_batch("grpo", data.rows, config, template, tokenizer)
        kept = fitting(data, found)
        return [Item(i, data.rows[i]["answer"] or "", found[i][0]["prompt_ids"]) for i in kept]

    def reply_limit(self, _: list[Item], config: Config, given: set[str]) -> int:
        return config.max_new_tokens if "max_new_tokens" in given else config.max_completion_length

    def score(self, items: Sequence[Item], scorer: Any, reply_limit: int) -> list[dict[str, Any]]:
        """The greedy replies."""
        return [{"prediction": reply} for reply in scorer.replies([item.prompt for item in items], reply_limit)]

    def measure(self, data: EvalDataset, predictions: Predictions, tokenizer: Any) -> dict[str, Any]:
        """The mean reward of every model, in all and by function, and how each differs from the base on the same
        prompts. Raises UserError where a reward function is wrong."""
        from training.rewards import find_rewards, with_labels

        rewards = with_labels(self.config, find_rewards(self.config), [row["answer"] for row in data.rows])
        values: dict[str, dict[str, list[float]]] = {}
        for label, lines in predictions.items():
            rows = [data.rows[line["row"]] for line in lines]
            columns = self._columns([line["prediction"] for line in lines], rows, tokenizer)
            by_name = {reward.name: [value or 0.0 for value in reward(**columns)] for reward in rewards}
            weighted = [[reward.weight * value for value in by_name[reward.name]] for reward in rewards]
            values[label] = {"reward": list(map(sum, zip(*weighted, strict=True)))}
            values[label] |= {f"reward_{name}": found for name, found in by_name.items()}
        models = {
            label: {"rows": len(found["reward"])} | {k: v for name in found for k, v in metrics.mean(name, found[name])}
            for label, found in values.items()
        }
        differences = metrics.against_base(
            values, lambda base, found: {name: metrics.paired_means(base[name], found[name]) for name in found}
        )
        return {"models": models, "rewards": differences, "samples": side_by_side(predictions)}

    def _columns(self, texts: list[str], rows: list[Conversation], tokenizer: Any) -> dict[str, list[Any]]:
        """What a reward function is called with, for one reply to each of these rows.

        The replies' ids are those of their texts, with an end.
        """
        names = sorted({name for row in rows for name in row["columns"]})
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
        return {name: [row["columns"].get(name) for row in rows] for name in names} | {
            "prompts": [row["messages"] for row in rows],
            "completions": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": [reply[: self.config.max_completion_length] for reply in ids],
            "answer": [row["answer"] for row in rows],
        }

    @classmethod
    def columns(cls, models: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The reward and those by function."""
        figures = next(iter(models.values()), {})
        return tuple(k for k in figures if k.startswith("reward") and not k.endswith("_interval")), ()


TASKS = {task.name: task for task in (Classification, Answers, Texts, Documents, Judged, Pairs, Rewarded)}
