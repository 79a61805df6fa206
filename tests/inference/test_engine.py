"""engine.py: replies are the model's own, whatever the cache, the settings and the shape of what is loaded."""

from __future__ import annotations

import contextlib
import itertools
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TALK, run, save_adapter, save_random_model, says, user_error

from common import Message, UserError
from inference import sampling
from inference.engine import PREFILL
from inference.load import load
from inference.reply import Event
from inference.request import Request, Settings
from inference.scheduler import QueueFull, Scheduler, SchedulerClosed
from inference.transformers_engine import TransformersEngine

CHINESE = TALK["hi"]
EXACT = ["infer_dtype=float32"]
GREEDY = Settings(temperature=0, max_new_tokens=60)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="session")
def engine_of_parrot(parrot: Path):
    return load(str(parrot), EXACT)


@pytest.fixture(scope="session")
def engine_of_tiny(tiny_model: Path):
    """A random model with a context of 2048 tokens: its replies do not end by themselves."""
    model = load(str(tiny_model), EXACT)
    model.context = 2048
    return model


class Told:
    """A reply that a scheduler decodes in its own thread, and what it tells meanwhile."""

    def __init__(self, model, request: Request) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.reply = model.reply(request, self.events.put)

    def text(self) -> str:
        """The whole text; raises what went wrong."""
        text, event = "", Event()
        while not event.end:
            event = self.events.get(timeout=120)
            text += event.text
        if event.error:
            raise event.error
        return text


@contextlib.contextmanager
def scheduling(model, slots: int, waiting: int = 64) -> Iterator[Scheduler]:
    scheduler = Scheduler(model.backend(slots), slots, waiting)
    scheduler.start()
    yield scheduler
    scheduler.close()


def at_once(model, conversations: list[list[dict]], settings: Settings | list[Settings]) -> list[str]:
    """The replies to several conversations, decoded side by side."""
    each = settings if isinstance(settings, list) else [settings] * len(conversations)
    told = [Told(model, model.request(talk, how)) for talk, how in zip(conversations, each, strict=True)]
    with scheduling(model, slots=4) as scheduler:
        scheduler.submit([one.reply for one in told])
        return [one.text() for one in told]


# ---------------------------------------------------------------------------------------------------------------------
# Replies


def test_reply_is_what_generate_gives(engine_of_tiny) -> None:
    import torch

    ids = engine_of_tiny.prompt_ids([user("tell me a story")])
    reply = engine_of_tiny.stream([user("tell me a story")], Settings(temperature=0, max_new_tokens=40, logprobs=2))
    list(reply)
    expected = engine_of_tiny.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
    assert [token.id for token in reply.logprobs] == expected.tolist()
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == (len(ids), 40, "length")


def test_end_of_turn_ends_the_reply_and_characters_come_whole(engine_of_parrot) -> None:
    reply = engine_of_parrot.stream([user("hi")], GREEDY)
    pieces = list(reply)
    assert "".join(pieces) == CHINESE
    assert pieces[:4] == ["你", "好", " ", "🙂"]  # three, three, one and four tokens
    assert reply.finish_reason == "stop"
    assert reply.completion_tokens == len(CHINESE.encode()) + 1
    assert 0 < reply.first_token_seconds < reply.seconds and reply.tokens_per_second > 0


def test_reply_cut_inside_a_character_ends_before_it(engine_of_parrot) -> None:
    for tokens, text in ((3, "你"), (4, "你"), (5, "你"), (6, "你好"), (10, "你好 "), (11, "你好 🙂")):
        reply = engine_of_parrot.stream([user("hi")], Settings(temperature=0, max_new_tokens=tokens))
        assert "".join(reply) == text
        assert reply.finish_reason == "length" and reply.completion_tokens == tokens


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("here",), "你好 🙂 stop "),
        (("nothing like it", "好 🙂 st"), "你"),
        (("here you", "please!"), CHINESE),
        (("please", "stop here p"), "你好 🙂 "),
        (("你",), ""),
    ],
)
def test_stop_texts_span_tokens_and_are_never_shown(engine_of_parrot, stop: tuple[str, ...], text: str) -> None:
    import dataclasses

    reply = engine_of_parrot.stream([user("hi")], dataclasses.replace(GREEDY, stop=stop))
    shown = ""
    for piece in reply:
        shown += piece
        assert text.startswith(shown)
    assert shown == text
    assert reply.finish_reason == "stop"


def test_settings_draw_as_they_say(engine_of_tiny) -> None:
    def ids(**settings) -> list[int]:
        reply = engine_of_tiny.stream([user("x")], Settings(max_new_tokens=30, logprobs=0, **settings))
        list(reply)
        return [token.id for token in reply.logprobs]

    greedy = ids(temperature=0)
    assert ids(temperature=5, top_k=1) == ids(temperature=5, top_p=0) == ids(temperature=5, min_p=1) == greedy
    assert ids(temperature=1, seed=7) == ids(temperature=1, seed=7)
    assert ids(temperature=1, seed=7) != ids(temperature=1, seed=8)
    assert len(set(ids(temperature=0, presence_penalty=2))) > len(set(greedy))
    assert len(set(ids(temperature=0, frequency_penalty=2))) > len(set(greedy))
    assert len(set(ids(temperature=0, repetition_penalty=50.0))) == 30


def test_count_penalty_is_openais() -> None:
    import torch

    ids = torch.tensor([[0, 1, 3, 3, 3, 2]])
    scores = sampling.CountPenalty(0.5, 0.25, prompt_tokens=2)(ids, torch.zeros(1, 5))
    assert scores.tolist() == [[0, 0, -0.75, -1.25, 0]]  # the prompt's 0 and 1 do not count


def test_logprobs_are_the_models_own(engine_of_tiny) -> None:
    import torch

    reply = engine_of_tiny.stream([user("x")], Settings(temperature=2, seed=1, max_new_tokens=5, logprobs=3))
    list(reply)
    ids = engine_of_tiny.prompt_ids([user("x")])
    for token in reply.logprobs:
        expected = engine_of_tiny.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [i for i, _ in token.top] == expected.topk(3).indices.tolist()
        ids.append(token.id)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 1.5}, {"top_k": 0.5}, {"max_new_tokens": 0}, {"seed": True}, {"stop": ("",)}],
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(UserError) as caught:
        Settings(**wrong)
    assert caught.value.fields["name"] == next(iter(wrong))


def test_text_like_a_control_token_stays_text(engine_of_parrot) -> None:
    ids = engine_of_parrot.prompt_ids([user("a <|im_end|> b")])
    assert ids.count(engine_of_parrot.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert "a <|im_end|> b" in engine_of_parrot.tokenizer.decode(ids)


def test_default_system_is_put_before_conversations_without_one(parrot: Path, engine_of_parrot) -> None:
    model = load(str(parrot), [*EXACT, "default_system=be kind"])
    with_it = len(engine_of_parrot.prompt_ids([{"role": "system", "content": "be kind"}, user("hi")]))
    assert model.stream([user("hi")]).prompt_tokens == with_it
    assert model.stream([{"role": "system", "content": ""}, user("hi")]).prompt_tokens == with_it - len("be kind")


# ---------------------------------------------------------------------------------------------------------------------
# The cache, and the context


def test_tenth_turn_does_not_compute_nine(engine_of_parrot, parrot: Path) -> None:
    messages, computed = [], []
    for turn in range(10):
        messages.append(user(f"question number {turn}"))
        reply = engine_of_parrot.stream(messages, Settings(temperature=0, max_new_tokens=16))
        text = "".join(reply)
        computed.append(reply.prompt_tokens - reply.cached_tokens)
        assert text == "".join(load_once(parrot).stream(messages, Settings(temperature=0, max_new_tokens=16)))
        messages.append(assistant(text))
    assert max(computed[1:]) < 100 < reply.prompt_tokens
    again = engine_of_parrot.stream(messages[:-1], Settings(temperature=0, max_new_tokens=16))
    assert "".join(again) == text and again.cached_tokens == again.prompt_tokens - 1


_once: dict[Path, TransformersEngine] = {}


def load_once(folder: Path) -> TransformersEngine:
    """An engine that has no cache to use."""
    model = _once.setdefault(folder, None) or load(str(folder), EXACT)
    _once[folder] = model
    model.scheduler.backend.finished.clear()
    return model


def test_prompt_longer_than_one_piece(engine_of_tiny) -> None:
    import torch

    messages = [user("many words " * 120)]
    ids = engine_of_tiny.prompt_ids(messages)
    assert len(ids) > 2 * PREFILL
    reply = engine_of_tiny.stream(messages, Settings(temperature=0, max_new_tokens=5, logprobs=0))
    list(reply)
    expected = engine_of_tiny.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert [token.id for token in reply.logprobs] == expected.tolist()


def test_cache_of_a_sliding_window(tiny_model: Path, tmp_path: Path) -> None:
    save_random_model(tmp_path, tiny_model, "Mistral", intermediate_size=64, sliding_window=24)
    model, fresh = load(str(tmp_path), EXACT), load(str(tmp_path), EXACT)
    messages = []
    for turn in range(4):
        messages.append(user(f"a question of some length {turn}"))
        reply = model.stream(messages, Settings(temperature=0, max_new_tokens=12))
        text = "".join(reply)
        fresh.scheduler.backend.finished.clear()
        assert text == "".join(fresh.stream(messages, Settings(temperature=0, max_new_tokens=12)))
        assert turn == 0 or reply.cached_tokens > 20
        messages.append(assistant(text))


def test_two_replies_at_once_do_not_disturb_each_other(engine_of_parrot) -> None:
    one, two = (engine_of_parrot.stream([user(question)], GREEDY) for question in TALK)
    pieces = list(itertools.zip_longest(one, two, fillvalue=""))
    assert tuple("".join(column) for column in zip(*pieces, strict=True)) == tuple(TALK.values())


def test_cancelled_reply_ends_at_the_next_token_and_harms_nothing(engine_of_tiny) -> None:
    messages = [user("go on and on")]
    whole = "".join(engine_of_tiny.stream(messages, GREEDY))
    reply = engine_of_tiny.stream(messages, GREEDY)
    text = ""
    for piece in reply:
        text += piece
        if reply.completion_tokens >= 5:
            reply.cancel()
    assert reply.finish_reason == "cancelled" and reply.completion_tokens <= 6
    assert whole.startswith(text)
    assert "".join(engine_of_tiny.stream(messages, GREEDY)) == whole
    abandoned = iter(engine_of_tiny.stream(messages, GREEDY))
    next(abandoned)
    abandoned.close()
    assert "".join(engine_of_tiny.stream(messages, GREEDY)) == whole


def test_oldest_turns_go_where_the_context_ends(engine_of_tiny) -> None:
    system = {"role": "system", "content": "stay"}
    old = [message for i in range(9) for message in (user(f"{i}" * 200), assistant("yes" * 20))]
    messages = [system, *old, user("last")]
    reply = engine_of_tiny.stream(messages, Settings(max_new_tokens=100))
    assert reply.dropped_messages == 6  # three turns of 281 tokens
    kept = engine_of_tiny.prompt_ids([system, *old[6:], user("last")])
    assert reply.prompt_tokens == len(kept) <= 2048 - 100
    assert len(engine_of_tiny.prompt_ids([system, *old[4:], user("last")])) > 2048 - 100
    assert engine_of_tiny.stream([system, user("last")]).dropped_messages == 0


def test_reply_ends_with_the_context(engine_of_tiny) -> None:
    reply = engine_of_tiny.stream([user("w" * 2000)], Settings(temperature=0, max_new_tokens=500))
    list(reply)
    assert reply.finish_reason == "length"
    assert reply.prompt_tokens + reply.completion_tokens == 2048


def test_message_longer_than_the_context_is_an_error(engine_of_tiny) -> None:
    with user_error("the last message makes", context=2048):
        engine_of_tiny.stream([user("short"), assistant("short"), user("w" * 3000)])


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_adapter_answers_as_peft_has_it(tiny_model: Path, tmp_path: Path, lora: dict) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save_adapter(tiny_model, tmp_path / "adapter", **lora)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = [5, 17, 99, 200]
    before = base(torch.tensor([ids])).logits[0, -1]
    expected = PeftModel.from_pretrained(base, folder)(torch.tensor([ids])).logits[0, -1]
    assert (expected - before).abs().max() > 0.1
    model = load(str(folder), EXACT)
    assert torch.allclose(model.logits_after(ids), expected, atol=1e-4)
    both = load(str(folder), EXACT, with_base=True)
    assert torch.allclose(both.logits_after(ids), expected, atol=1e-4)
    assert torch.allclose(both.base.logits_after(ids), before, atol=1e-4)
    assert torch.allclose(both.logits_after(ids), expected, atol=1e-4)


@pytest.mark.slow
def test_adapter_of_a_base_whose_layers_are_transposed(tmp_path: Path, tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_random_model(tmp_path / "base", tiny_model, "GPT2", pad_token_id=None)
    folder = save_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    expected = peft(torch.tensor([[5, 17, 99, 200]])).logits[0, -1]
    assert torch.allclose(load(str(folder), EXACT).logits_after([5, 17, 99, 200]), expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Several at once


def test_rows_of_a_batch_are_what_they_are_alone(engine_of_tiny) -> None:
    from inference.transformers_backend import FlatBackend

    talks = [[user("word " * (n * n * 9) + str(n))] for n in range(7)]
    settings = [Settings(temperature=0.9 * (n % 2), seed=n, max_new_tokens=25 + n) for n in range(7)]
    alone = ["".join(engine_of_tiny.stream(talk, how)) for talk, how in zip(talks, settings, strict=True)]
    assert isinstance(engine_of_tiny.backend(4), FlatBackend)
    assert at_once(engine_of_tiny, talks, settings) == alone
    assert ["".join(engine_of_tiny.stream(talk, how)) for talk, how in zip(talks, settings, strict=True)] == alone


def test_rows_of_a_sliding_window_and_of_two_adapters(tiny_model: Path, parrot: Path, tmp_path: Path) -> None:
    from inference.transformers_backend import FlatBackend

    save_random_model(tmp_path / "window", tiny_model, "Mistral", intermediate_size=64, sliding_window=24)
    both = load(str(save_adapter(parrot, tmp_path / "adapter")), EXACT, with_base=True)
    for model in (load(str(tmp_path / "window"), EXACT), both, both.base):
        assert isinstance(model.backend(4), FlatBackend)
        talks = [[user("a question of some length " * n)] for n in (1, 4, 2, 1)]
        how = Settings(temperature=0, max_new_tokens=12)
        assert at_once(model, talks, how) == ["".join(model.stream(talk, how)) for talk in talks]


def test_rows_of_a_model_that_cannot_be_flat(tiny_model: Path) -> None:
    from inference.transformers_backend import SerialBackend

    model = load(str(tiny_model), EXACT)
    model.model.set_attn_implementation("eager")
    assert isinstance(model.backend(4), SerialBackend)
    talks = [[user("x" * n)] for n in (1, 90, 20)]
    how = Settings(temperature=0, max_new_tokens=12)
    assert at_once(model, talks, how) == ["".join(model.stream(talk, how)) for talk in talks]


HYBRID = {
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "FalconH1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    "RecurrentGemma": {"lru_width": 64, "num_hidden_layers": 3, "attention_window_size": 64},
    "MiniMax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "head_dim": 16},
    "Llama4Text": {"attention_chunk_size": 64, "num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 64},
    "Qwen3_5Text": {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "Gemma2": {"sliding_window": 64, "head_dim": 16, "query_pre_attn_scalar": 16},
    "DeepseekV3": {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
                   "qk_rope_head_dim": 16, "v_head_dim": 8, "first_k_dense_replace": 2, "n_group": 1},
    "Mamba": {"state_size": 8, "time_step_rank": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRID)
def test_turns_and_rows_are_what_a_pass_without_a_cache_gives(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """Greedy ids of two turns and of two rows at once, prompts longer than windows and chunks."""
    import torch

    model = load(str(save_random_model(tmp_path, tiny_model, name, **HYBRID[name])), EXACT)
    with torch.no_grad():
        for weight in model.model.parameters():
            weight += 0.05 * torch.randn_like(weight) if weight.ndim == 2 else 0

    def pairs(backend, prompts: list[list[int]], taken: int = 0) -> list[list[int]]:
        sequences = [backend.open(ids, 300) for ids in prompts]
        assert len(sequences[0].ids) == taken
        for _ in range(4):
            work = [(one, ids[len(one.ids) :], True) for one, ids in zip(sequences, prompts, strict=True)]
            if len(work[0][1]) > 50:  # a piece before the rest
                backend.forward([(sequences[0], work[0][1][:50], False)])
                work[0] = (sequences[0], work[0][1][50:], True)
            found = [int(logits.argmax()) for logits in backend.forward(work)]
            with torch.inference_mode():
                whole = [model.model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prompts]
            assert found == [int(logits.argmax()) for logits in whole]
            prompts = [[*ids, token] for ids, token in zip(prompts, found, strict=True)]
        for sequence in sequences:
            backend.close(sequence)
        return prompts

    ids = [7 * i * i % 250 for i in range(150)]
    alone = model.backend(1)
    [first] = pairs(alone, [ids])
    pairs(alone, [[*first, *ids[:20]]], taken=len(first) - 1 if alone.continues else 0)
    assert alone.continues is (name not in ("RecurrentGemma", "MiniMax", "Mamba"))
    batch = model.backend(4)
    assert type(batch).__name__ == ("FlatBackend" if name in ("Gemma2", "DeepseekV3") else "SerialBackend")
    pairs(batch, [ids, ids[100:120]])


def test_what_fits_is_known_before_the_first_reply(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inference import transformers_backend

    monkeypatch.setattr(transformers_backend, "free_memory", lambda _: 10**6)
    model = load(str(tiny_model), EXACT)
    config = model.model.config
    token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4  # keys, values; float32
    backend = model.backend(8)
    assert backend.capacity == 10**6 // token
    backend.open([5] * 20, backend.capacity)
    assert not backend.fits(1)


def test_a_reply_that_fails_harms_no_other(engine_of_tiny) -> None:
    how = Settings(temperature=0, max_new_tokens=30)
    requests = [engine_of_tiny.request([user(f"number {n} " * 9)], how) for n in range(4)]
    requests[1].ids[-3] = 10**6  # no token: the model fails at it, and with it the whole step
    told = [Told(engine_of_tiny, request) for request in requests]
    told[2].reply.extend = lambda _: 1 // 0
    expected = "".join(engine_of_tiny.answer(requests[0]))
    with scheduling(engine_of_tiny, slots=3, waiting=1) as scheduler:
        with pytest.raises(QueueFull):
            scheduler.submit([one.reply for one in [*told, told[0]]])
        scheduler.submit([one.reply for one in told])
        assert told[0].text() == expected and len(told[3].text()) > 0
        for one, error in ((told[1], IndexError), (told[2], ZeroDivisionError)):
            with pytest.raises(error):
                one.text()
        deadline = time.monotonic() + 60
        while scheduler.active and time.monotonic() < deadline:  # a reply tells its end before it leaves
            time.sleep(0.01)
        assert scheduler.alive and not scheduler.active and not scheduler.queue and not scheduler.backend.opened
        last = Told(engine_of_tiny, requests[0])
        scheduler.submit([last.reply])
        assert last.text() == expected and last.reply.cached_tokens == len(requests[0].ids) - 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_reply_waits_where_the_scheduler_fails(engine_of_tiny) -> None:
    def ask(tokens: int) -> Told:
        how = Settings(temperature=0, max_new_tokens=tokens)
        told = Told(engine_of_tiny, engine_of_tiny.request([user("x")], how))
        scheduler.submit([told.reply])
        return told

    def fail(*_) -> None:
        raise MemoryError

    with scheduling(engine_of_tiny, slots=2) as scheduler:
        first, own = ask(1500), scheduler.backend.open
        first.events.get(timeout=60)
        scheduler.backend.open = fail
        with pytest.raises(MemoryError):
            ask(5).text()
        scheduler.backend.open = own
        assert len(ask(5).text()) > 0 and scheduler.alive
        scheduler.step = fail  # the thread itself
        with pytest.raises(MemoryError):
            first.text()
        scheduler._thread.join()
        with pytest.raises(SchedulerClosed):
            ask(5)
        assert not scheduler.alive


def test_a_cancelled_reply_leaves_at_once(engine_of_tiny) -> None:
    how = Settings(temperature=0, max_new_tokens=1500)
    long = engine_of_tiny.request([user("x")], how)
    first, second = Told(engine_of_tiny, long), Told(engine_of_tiny, long)
    last = Told(engine_of_tiny, engine_of_tiny.request([user("x")], Settings(temperature=0, max_new_tokens=2)))
    with scheduling(engine_of_tiny, slots=1) as scheduler:
        scheduler.submit([first.reply, second.reply, last.reply])
        first.events.get(timeout=60)
        second.reply.cancel()  # while it waits
        assert second.text() == "" and second.reply.finish_reason == "cancelled"
        first.reply.cancel()
        first.text()
        assert first.reply.finish_reason == "cancelled" and first.reply.completion_tokens < 1500
        last.text()
        assert last.reply.finish_reason == "length"


def test_replies_are_held_to_a_grammar(engine_of_tiny) -> None:
    from inference import grammar, tools

    lark = grammar.json_grammar({"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]})
    held = grammar.checked_grammar(engine_of_tiny, lark)
    for seed in range(3):
        how = Settings(temperature=1, seed=seed, max_new_tokens=60, grammar=held)
        text = "".join(engine_of_tiny.stream([user("x")], how))
        assert text.startswith('{"a": 1') or text.startswith('{"a": 22')
    call = [{"type": "function", "function": {"name": "f"}}]
    lark = grammar.call_grammar(tools.TAGS, call, engine_of_tiny, required=True, single=True)
    held = grammar.checked_grammar(engine_of_tiny, lark)
    text = "".join(engine_of_tiny.stream([user("x")], Settings(temperature=1, seed=1, grammar=held)))
    assert text == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'  # no token of this tokenizer
    held = grammar.checked_grammar(engine_of_tiny, grammar.after_thought(lark, engine_of_tiny))
    thought = "".join(engine_of_tiny.stream([user("x")], Settings(temperature=1, seed=1, grammar=held)))
    assert "</think>" not in thought or thought.partition("</think>")[2].strip() == text
    with user_error("reply cannot"):
        "".join(engine_of_tiny.stream([user("x")], Settings(grammar="no grammar")))
    biased = Settings(temperature=0, max_new_tokens=5, logit_bias=((65, 1000.0),), logprobs=0)
    reply = engine_of_tiny.stream([user("x")], biased)
    list(reply)
    assert [token.id for token in reply.logprobs] == [65] * 5


def test_layers_of_a_gguf_on_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import types

    import common
    from inference.llamacpp_engine import COMPUTE_BYTES, _cache_bytes, _layers_on_card

    numbers = {"block_count": 32, "embedding_length": 4096, "attention.head_count": 32, "attention.head_count_kv": 8}
    about = {"general.architecture": "llama", **{f"llama.{key}": str(value) for key, value in numbers.items()}}
    assert _cache_bytes(about, 8192) == 1 << 30  # Llama 3 8B: 128 KiB a token
    assert _cache_bytes({**about, "llama.attention.head_count_kv": str([8, 0] * 16)}, 8192) == 1 << 29
    assert _cache_bytes({**about, "llama.attention.head_count": "0"}, 8192) == 0
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    lib = types.SimpleNamespace(llama_supports_gpu_offload=lambda: True)
    for gib, layers in ((4, -1), (0.5, 15), (0, 0)):
        card = common.Gpu("card", "1", (12, 8), (8, 9), 8 << 30, COMPUTE_BYTES + int(gib * (1 << 30)))
        monkeypatch.setattr(common, "find_gpu", lambda card=card: card)
        assert _layers_on_card(lib, file, about, 8192) == layers
    assert capsys.readouterr().err == ""
    lib.llama_supports_gpu_offload = lambda: False
    assert _layers_on_card(lib, file, about, 8192) == 0 and "llama.cpp is built without CUDA" in capsys.readouterr().err


def test_base_of_a_merged_model_is_refused(parrot: Path) -> None:
    with user_error("no adapter to switch off", name=str(parrot)):
        load(str(parrot), with_base=True)


@pytest.mark.slow
def test_gguf_answers_as_the_model_does(embedded_model: Path, tmp_path: Path) -> None:
    from inference import llamacpp_build

    file = tmp_path / "embedded-f32.gguf"
    convert = [sys.executable, str(llamacpp_build.converter()), str(embedded_model), "--outfile", str(file)]
    subprocess.run([*convert, "--outtype", "f32"], check=True, capture_output=True)
    model, exact = load(str(file)), load(str(embedded_model), EXACT)
    tricky = [{"role": "system", "content": "x <|im_start|>"}, user("a <|im_end|> b\n<|im_start|>user 12 🙂 你")]
    assert model.prompt_ids(tricky) == exact.prompt_ids(tricky)
    assert model.stop_ids >= exact.stop_ids and model.context == 8192
    ids = range(model.vocabulary_size)  # tokens of more than 32 bytes, too: "-" * 64
    assert [model.token_bytes(i) for i in ids] == [exact.token_bytes(i) for i in ids]
    ruled = f"{' ' * 40}x\n{'-' * 64}\n{'=' * 64}\n"
    piece, ids = model.detokenizer(), exact.text_ids(ruled)
    assert "".join(map(piece, ids)) == model.text_of(ids) == ruled
    for noncharacters in ("\ufdd099999\ufdd1", "\ufdd03\ufdd1"):  # what stands for control tokens while rendering
        with user_error(
            "these messages",
            reason=Message("it contains Unicode noncharacters (U+FDD0 to U+FDEF), which no text may; remove them"),
        ):
            model.prompt_ids([user(noncharacters)])
    own, lines = model._template, "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    model._template = model._compile(lines, "x.gguf")
    assert model.text_of(model.prompt_ids([user("as it is")])) == "as it is"
    for fault, code in (
        ("messages[0]['content'] + messages[0]['x']", says("template refuses")),
        ("none + 'x'", says("cannot render")),
        ("raise_exception('no')", says("template refuses")),
    ):
        model._template = model._compile(f"{{{{ {fault} }}}}", "x.gguf")
        with user_error("these messages") as raised:
            model.prompt_ids([user("x")])
        assert raised.value.fields["reason"].sentence == code
    with user_error("the chat template in", file="x.gguf"):
        model._compile("{% if %}", "x.gguf")
    model._template = own
    question = [user("What is the capital of France?")]
    settings = Settings(temperature=0, max_new_tokens=30, logprobs=2)
    replies = [engine.stream(question, settings) for engine in (model, exact)]
    texts = ["".join(reply) for reply in replies]
    assert texts[0] == texts[1] and "Paris" in texts[0]
    assert [r.finish_reason for r in replies] == ["stop", "stop"]
    ours, theirs = (reply.logprobs for reply in replies)
    assert [token.id for token in ours] == [token.id for token in theirs]
    assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=0.05)
    assert [i for token in ours for i, _ in token.top] == [i for token in theirs for i, _ in token.top]

    assert at_once(model, [question, [user("Name a colour.")], question], settings)[::2] == [texts[0], texts[0]]

    talk = [*question, assistant(texts[0]), user("请用中文回答 🙂")]
    drawn = Settings(temperature=1, seed=5, max_new_tokens=20)
    first, again = model.stream(talk, drawn), model.stream(talk, drawn)
    assert first.dropped_messages == 0
    text = "".join(first)
    assert first.cached_tokens > 40 and "\ufffd" not in text
    assert "".join(again) == text and again.cached_tokens == again.prompt_tokens - 1
    stopped = model.stream(question, Settings(temperature=0, stop=("of Fra",)))
    assert "".join(stopped) == texts[0].partition("of Fra")[0] and stopped.finish_reason == "stop"
    with user_error("the last message makes", context=8192):
        model.stream([user("w " * 9000)])


@pytest.mark.slow
def test_broken_gguf_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF" + bytes(range(200)))
    result = run("chat.py", str(file), "-p", "hi", input="")
    assert result.returncode == 2 and result.error.sentence == says("llama.cpp cannot load")
    assert "llama.cpp cannot load" in result.stderr and "Traceback" not in result.stderr
