"""A reward function of one's own, for configs/fraud-grpo-cpu.yaml."""

WORDS = {"1": "Yes", "0": "No"}  # what the rows call fraud and not → what the model is to reply


def right_word(completions: list, answer: list, **_: object) -> list[float]:
    """1 where the reply is the word for the row's answer, else 0."""
    replies = (completion[0]["content"].strip() for completion in completions)
    return [float(reply == WORDS[row]) for reply, row in zip(replies, answer, strict=True)]
