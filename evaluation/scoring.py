"""How likely given answers are to a model, and what it answers, many prompts at a time.

    scorer = scorer_for(load(source))
    scorer.choices(prompts, answers)      log-probabilities of given answers to each prompt
    scorer.losses(samples)                -log p of the learned tokens of samples
    scorer.replies(prompts, 64)           the greedy reply

Prompts, answers and samples are token ids, so the same code serves a model of transformers and a GGUF.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from inference.engine import Engine
from inference.request import Request, Settings

Ids = Sequence[int]
Sample = dict[str, list[int]]  # {"input_ids", "labels"}: -100 where a token does not count
Loss = tuple[float, int]  # the sum of -log p over the tokens that count, in nats, and how many these are
CPU_TOKENS, GPU_TOKENS = 2048, 16384  # of a batch, padding included
MAX_ROWS = 64  # of a batch: the tokens of a reply come one at a time for all of them
MAX_LOGITS = 1 << 30  # bytes of the logits of a batch, where it can be split


def scorer_for(engine: Engine) -> TransformersScorer | LlamaCppScorer:
    """The scorer of a loaded engine."""
    return TransformersScorer(engine) if hasattr(engine, "tokenizer") else LlamaCppScorer(engine)


def batches(lengths: Sequence[int], tokens: int, rows: int = MAX_ROWS) -> list[list[int]]:
    """The numbers of all rows in batches of rows of similar length, the longest first: too long a batch fails at once.

    A batch holds at most `tokens` tokens with its padding (or one row), and `rows` rows.
    """
    made: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if made and len(made[-1]) < rows and lengths[made[-1][0]] * (len(made[-1]) + 1) <= tokens:
            made[-1].append(row)
        else:
            made.append([row])
    return made


def batched_losses(scorer: Any, samples: Sequence[Sample]) -> list[Loss]:
    """The loss of every sample, in their order; computed in batches that fit into the memory."""
    found: dict[int, Loss] = {}
    for batch in batches([len(sample["input_ids"]) for sample in samples], scorer.tokens):
        found |= zip(batch, scorer.losses([samples[i] for i in batch]), strict=True)
    return [found[i] for i in range(len(samples))]


def joined(prompt: list[int], answer: list[int]) -> Sample:
    """A sample whose answer counts."""
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def first_learned(labels: Ids) -> int:
    """Where the learned tokens of a sample begin; the very first token is never one: nothing predicts it."""
    return next((i for i, label in enumerate(labels) if i and label != -100), len(labels))


class TransformersScorer:
    """By a model of transformers. The output layer is computed in float32 whatever the weights are.

    In bfloat16 a logit near 20 is a multiple of 1/8: probabilities would tie, and a ROC curve would have steps.
    """

    def __init__(self, engine: Any) -> None:
        import torch

        self.engine, self.model, self.torch = engine, engine.model, torch
        self.tokens = GPU_TOKENS if self.model.device.type == "cuda" else CPU_TOKENS
        self.vocabulary = self.model.config.get_text_config().vocab_size
        head = self.model.get_output_embeddings()
        if type(head) is torch.nn.Linear and head.weight.dtype != torch.float32:
            head.forward = lambda hidden: _float32_product(hidden, head.weight, head.bias)

    def choices(self, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """log p(answer | prompt) for every answer of every prompt, in nats: the sum over the answer's tokens.

        One pass over the prompts; a short one more on their keys and values for each answer of several tokens.
        """
        torch = self.torch
        longer = any(len(answer) > 1 for row in answers for answer in row)
        with torch.inference_mode():
            inputs = self._padded(prompts)
            cache = self._cache() if longer else None
            first = self._logits(inputs, cache, keep=1)[:, -1].log_softmax(-1)
            sums = [[float(first[row, answer[0]]) for answer in answers[row]] for row in range(len(prompts))]
            for number in range(max(map(len, answers))):
                rest = [row[number] if number < len(row) else row[0] for row in answers]
                if max(map(len, rest)) > 1:
                    for row, more in enumerate(self._continued(inputs, cache, rest)):
                        if number < len(answers[row]):
                            sums[row][number] += more
        return sums

    def _continued(self, inputs: dict[str, Any], cache: Any, answers: Sequence[Ids]) -> list[float]:
        """log p of what follows the first token of each answer; the cache is left as it was."""
        torch = self.torch
        width = max(map(len, answers)) - 1
        ids = torch.tensor([[*answer[:-1], *[0] * (width - len(answer) + 1)] for answer in answers])
        ids = ids.to(self.model.device)
        seen = inputs["attention_mask"]
        mask = torch.cat([seen, torch.ones_like(ids)], 1)
        positions = seen.sum(1, keepdim=True) + torch.arange(width, device=ids.device)
        croppable = cache.is_croppable and not any(cache.is_linear)  # a convolution's state goes one way
        used = cache if croppable else copy.deepcopy(cache)
        following = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        known = self._logits(following, used, keep=width).log_softmax(-1)
        if croppable:
            cache.crop(-width)  # negative: tokens to remove from the end
        return [sum(float(known[row, i, token]) for i, token in enumerate(a[1:])) for row, a in enumerate(answers)]

    def losses(self, samples: Sequence[Sample]) -> list[Loss]:
        """For each sample the sum of -log p over its learned tokens, in nats, and how many these are."""
        torch = self.torch
        widest = max(len(sample["labels"]) - first_learned(sample["labels"]) for sample in samples) + 1
        if len(samples) > 1 and 4 * len(samples) * widest * self.vocabulary > MAX_LOGITS:
            half = len(samples) // 2
            return [*self.losses(samples[:half]), *self.losses(samples[half:])]
        with torch.inference_mode():
            inputs = self._padded([sample["input_ids"] for sample in samples])
            width = inputs["input_ids"].shape[1]
            labels = torch.full((len(samples), width), -100)
            for row, sample in enumerate(samples):
                labels[row, width - len(sample["labels"]) :] = torch.tensor(list(sample["labels"]))
            labels[:, 0] = -100  # nothing stands before it
            learned = (labels != -100).any(0).nonzero()[:, 0]
            keep = width - int(learned[0]) + 1
            logits = self._logits(inputs, None, keep=keep)
            wanted = labels[:, 1 - keep :].to(logits.device)
            loss = torch.nn.functional.cross_entropy  # row by row: it makes a copy as large as what it is given
            nats = [
                float(loss(row[:-1], right, reduction="none").double().sum())
                for row, right in zip(logits, wanted, strict=True)
            ]
        return list(zip(nats, (wanted != -100).sum(1).tolist(), strict=True))

    def replies(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[str]:
        """The greedy reply to each prompt: what the engine streams at temperature 0."""
        from transformers import GenerationConfig

        engine = self.engine
        ends = sorted(engine.stop_ids)
        settings = GenerationConfig(
            max_new_tokens=min(max_new_tokens, engine.context - max(map(len, prompts))),
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        with self.torch.inference_mode():
            inputs = self._padded(prompts)
            del inputs["position_ids"]  # generate makes its own
            made = self.model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
        return [self._text(reply) for reply in made.tolist()]

    def _text(self, reply: list[int]) -> str:
        end = next((i for i, token in enumerate(reply) if token in self.engine.stop_ids), len(reply))
        text = self.engine.detokenizer()  # as the engine streams: a character without its end is not shown
        return "".join(text(token) for token in reply[:end])

    def _padded(self, prompts: Sequence[Ids]) -> dict[str, Any]:
        """input_ids (rows × longest) padded on the left, with a mask and positions."""
        torch, width = self.torch, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        ids = ids.to(self.model.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        positions = torch.arange(width, device=ids.device) - (width - lengths[:, None])
        return {"input_ids": ids, "attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}

    def _logits(self, inputs: dict[str, Any], cache: Any, *, keep: int) -> Any:
        """float32 logits (rows × keep × vocabulary) of the last `keep` positions."""
        self.engine.set_adapter()
        kept = {"logits_to_keep": keep} if self.engine.last_logits_only else {}
        output = self.model(**inputs, past_key_values=cache, use_cache=cache is not None, **kept)
        return output.logits[:, -keep:].float()

    def _cache(self) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        return cache if any(cache.is_linear) else DynamicCache()  # keeps what a window would drop: it can be cropped


def _float32_product(hidden: Any, weight: Any, bias: Any, rows: int = 16384) -> Any:
    """hidden @ weight.T + bias in float32, `rows` rows of the weight at a time: a copy of all may take gigabytes."""
    import torch

    hidden = hidden.float()
    logits = hidden.new_empty(*hidden.shape[:-1], len(weight))
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float()
        logits[..., start : start + rows] = torch.nn.functional.linear(hidden, part)
    return logits if bias is None else logits.add_(bias.float())


class LlamaCppScorer:
    """By llama.cpp, one prompt after the other; what a prompt shares with the one before is not computed again."""

    tokens = 1

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def choices(self, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[list[float]]:
        """As TransformersScorer.choices."""
        return [
            [-self.losses([joined(list(prompt), list(answer))])[0][0] for answer in row]
            for prompt, row in zip(prompts, answers, strict=True)
        ]

    def losses(self, samples: Sequence[Sample]) -> list[Loss]:
        """As TransformersScorer.losses."""
        found = []
        for sample in samples:
            ids, labels = list(sample["input_ids"]), list(sample["labels"])
            learned = [i for i in range(1, len(ids)) if labels[i] != -100]
            after = self.engine.logits_after
            nats = -sum(float(after(ids[:i]).double().log_softmax(-1)[ids[i]]) for i in learned)
            found.append((nats, len(learned)))
        return found

    def replies(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[str]:
        """As TransformersScorer.replies."""
        settings = Settings(temperature=0.0, max_new_tokens=max_new_tokens)
        return ["".join(self.engine.answer(Request(list(prompt), settings))) for prompt in prompts]
