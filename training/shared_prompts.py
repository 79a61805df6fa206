"""Several replies to one prompt without computing the prompt for each: in generation and in a training pass.

The training pass lays a prompt and all of its replies into one row, with an attention mask in which a reply sees the
prompt and itself. The prompt's last token is repeated before each reply, as each has its own first token to predict.
"""

from __future__ import annotations

from typing import Any

import torch


class PromptGroups:
    """A batch of replies (rows × tokens, prompts padded on the left, replies on the right) laid out by prompt.

    `replies`: for each row of the batch, the row and the first place of its reply in the layout.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, reply_width: int) -> None:
        self.ids, self.width = input_ids, reply_width
        self.lengths = attention_mask[:, -reply_width:].sum(1).tolist()  # tokens of each reply
        prompts = [
            tuple(row[seen.bool()].tolist())
            for row, seen in zip(input_ids[:, :-reply_width], attention_mask[:, :-reply_width], strict=True)
        ]
        self.prompts = list(dict.fromkeys(prompts))
        ends = [len(prompt) - 1 for prompt in self.prompts]
        self.replies: list[tuple[int, int]] = []
        for prompt, length in zip(prompts, self.lengths, strict=True):
            row = self.prompts.index(prompt)
            self.replies.append((row, ends[row]))
            ends[row] += length
        self.size = (len(self.prompts), max(ends))

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model takes: ids, positions, a mask (rows × 1 × places × places), and the token after each place."""
        rows, places = self.size
        ids = torch.zeros(rows, places, dtype=torch.long)
        positions, following = torch.zeros_like(ids), torch.full_like(ids, -100)
        mask = torch.ones(places, places, dtype=torch.bool).tril().repeat(rows, 1, 1)
        for row, prompt in enumerate(self.prompts):
            ids[row, : len(prompt) - 1] = torch.tensor(prompt[:-1])
            positions[row, : len(prompt) - 1] = torch.arange(len(prompt) - 1)
        for number, ((row, start), length) in enumerate(zip(self.replies, self.lengths, strict=True)):
            prompt, reply = self.prompts[row], self.ids[number, -self.width :][:length]
            part = slice(start, start + length)
            ids[row, part] = torch.cat([torch.tensor(prompt[-1:]), reply[:-1]])[:length]
            positions[row, part] = torch.arange(length) + len(prompt) - 1
            following[row, part] = reply
            mask[row, part, len(prompt) - 1 : start] = False
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": mask[:, None],
            "shift_labels": following,
        }

    def by_reply(self, values: torch.Tensor) -> torch.Tensor:
        """Values of places (rows × places) as those of the replies' tokens (replies × tokens), 0 after their ends."""
        rows = torch.tensor([row for row, _ in self.replies])[:, None]
        starts, lengths = torch.tensor([start for _, start in self.replies]), torch.tensor(self.lengths)
        tokens = torch.arange(self.width)
        places = (starts[:, None] + tokens).clamp(max=self.size[1] - 1)
        return values[rows, places] * (tokens < lengths[:, None])


def generate(model: Any, prompts: list[list[int]], settings: Any) -> list[list[int]]:
    """A reply to each prompt, its end of turn included, as `model.generate` makes it with these settings.

    Equal prompts, which stand side by side, are read once, into a cache that is then copied.
    """
    from transformers import DynamicCache

    unique = [prompt for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    each = len(prompts) // len(unique)
    if unique != prompts[::each] or each * len(unique) != len(prompts):  # by chance, equal ones among the unique
        unique, each = prompts, 1
    ids, mask = padded(unique, settings.pad_token_id)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        if ids.shape[1] > 1:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(each)
        made = model.generate(
            input_ids=ids.repeat_interleave(each, 0),
            attention_mask=mask.repeat_interleave(each, 0),
            past_key_values=cache,
            generation_config=settings,
        )[:, ids.shape[1] :].tolist()
    ends = {settings.eos_token_id} if isinstance(settings.eos_token_id, int) else set(settings.eos_token_id)
    return [reply[: next((i + 1 for i, token in enumerate(reply) if token in ends), len(reply))] for reply in made]


def padded(prompts: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (rows × longest) padded on the left, and the mask of what is no padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
