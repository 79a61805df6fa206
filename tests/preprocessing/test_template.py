"""Chat templates: exact token ids and labels, on tokenizers of single bytes, where they are clear, and on real ones."""

from __future__ import annotations

import json
from pathlib import Path

import conftest
import pytest
from conftest import says, user_error
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common import Config, Message
from preprocessing import template as templates
from preprocessing.encode import encode
from preprocessing.prompts import prompt_ids
from preprocessing.template import ChatTemplate, load_template, render_conversation, template_names
from preprocessing.tokens import encoder_of
from preprocessing.truncation import shares

VENDOR = json.loads((Path(__file__).parent / "template_vendor.json").read_text(encoding="utf-8"))
FIT_TINY = ["chatml", "default", "llama3", "qwen", "qwen3_nothink"]  # templates that fit the tiny tokenizer
TOOLS = ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
# What stands at the end of each vendor's turns, and how its tokenizer names begin and end.
TOKENS = {
    "llama3": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], {"eos": "<|eot_id|>"}),
    "qwen": (["<|im_start|>", "<|im_end|>"], {"eos": "<|im_end|>"}),
    "qwen3": (["<|im_start|>", "<|im_end|>"], {"eos": "<|im_end|>"}),
    "qwen3_nothink": (["<|im_start|>", "<|im_end|>"], {"eos": "<|im_end|>"}),
    "gemma": (["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], {"bos": "<bos>", "eos": "<eos>"}),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", *TOOLS],
        {"bos": "<s>", "eos": "</s>"},
    ),
    "chatml": (["<s>", "<|im_start|>", "<|im_end|>"], {"bos": "<s>", "eos": "<|im_end|>"}),
    "default": (["<s>", "</s>"], {"bos": "<s>", "eos": "</s>"}),
}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def talk(*contents: str, system: str | None = None) -> dict:
    """A conversation of user and assistant in turns."""
    messages = [user(c) if i % 2 == 0 else assistant(c) for i, c in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + messages}


def one(conversation: dict, template: ChatTemplate, tokenizer, cutoff_len: int = 4096, **options):
    (result,) = encode([conversation], template, tokenizer, Config(cutoff_len=cutoff_len, **options))
    return result


def code_of(reason) -> str:
    """The code of a reason why there is no sample."""
    assert isinstance(reason, Message), reason
    return reason.sentence


def learned(sample: dict, tokenizer) -> list[str]:
    """The runs of learned tokens, as text."""
    runs, last = [], None
    for i, (token, label) in enumerate(zip(sample["input_ids"], sample["labels"], strict=True)):
        assert label in (-100, token)
        if label != -100:
            if last != i - 1:
                runs.append([])
            runs[-1].append(token)
            last = i
    return [tokenizer.decode(run) for run in runs]


def byte_tokenizer(special: list[str], soft: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    """conftest's, with offsets without leading spaces, as Llama 3's."""
    tokenizer = conftest.byte_tokenizer(special, soft, **names)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def for_template(name: str) -> PreTrainedTokenizerFast:
    special, names = TOKENS[name]
    return byte_tokenizer(special, ("<think>", "</think>") if name == "qwen3" else (), **names)


def pieces_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: Gemma's spaces by a normalizer, or Mistral's by a pre-tokenizer that prefixes the first."""
    letters = sorted({chr(i) for i in range(33, 127)} | {"▁", "\n", "你", "好"})
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {letter: 256 + i for i, letter in enumerate(letters)}
    merges = [("▁", "h"), ("▁h", "i"), ("h", "i"), ("▁", "▁")]
    vocab |= {"".join(m): len(vocab) + i for i, m in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    if style == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    name = "gemma" if style == "gemma" else "mistral"
    special, names = TOKENS[name]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{k}_token": v for k, v in names.items()})


def b(text: str) -> list[int]:
    """Ids of plain text in a byte-level tokenizer without merges, by GPT-2's order of bytes, worked out by hand."""
    order = {**{i: i - 33 for i in range(33, 127)}, **{i: i - 161 + 94 for i in range(161, 173)}, 173: 255}
    order |= {i: i - 174 + 106 for i in range(174, 256)} | {i: 188 + i for i in range(33)}
    order |= {i: 221 + i - 127 for i in range(127, 161)}
    return [order[i] for i in text.encode()]


# ---------------------------------------------------------------------------------------------------------------------
# Golden ids and labels


def test_chatml_by_hand(tiny_tokenizer):
    start, end, newline = 257, 258, 198
    sample = one(talk("Hi", "Yo"), load_template("chatml", tiny_tokenizer), tiny_tokenizer)
    prompt = [start, 84, 82, 68, 81, newline, 39, 72, end, newline]  # <|im_start|>user\nHi<|im_end|>\n
    header = [start, 64, 82, 82, 72, 82, 83, 64, 77, 83, newline]  # <|im_start|>assistant\n
    assert sample["input_ids"] == [*prompt, *header, 56, 78, end, newline]
    assert sample["labels"] == [-100] * 21 + [56, 78, end, -100]
    assert sample["truncated"] is False


def test_llama3_by_hand(tiny_tokenizer):
    bos, start, stop, eot = 259, 260, 261, 262
    sample = one(
        talk(" 你好 ", "好🙂\n", "?", "0", system="S"), load_template("llama3", tiny_tokenizer), tiny_tokenizer
    )

    def header(role: str) -> list[int]:
        return [start, *b(role), stop, *b("\n\n")]

    before = [bos, *header("system"), *b("S"), eot, *header("user"), *b("你好"), eot, *header("assistant")]
    between = [*header("user"), *b("?"), eot, *header("assistant")]
    first, second = [*b("好🙂"), eot], [*b("0"), eot]
    assert sample["input_ids"] == [*before, *first, *between, *second]
    assert sample["labels"] == [-100] * len(before) + first + [-100] * len(between) + second


def test_default_by_hand():
    tokenizer = for_template("default")
    sample = one(talk("Hi", "Yo", system="S"), load_template("default", tokenizer), tokenizer)
    prompt = [256, *b("System: S"), 257, *b("\nHuman: Hi"), 257, *b("\nAssistant:")]
    assert sample["input_ids"] == [*prompt, *b("Yo"), 257, *b("\n")]
    assert sample["labels"] == [-100] * len(prompt) + [*b("Yo"), 257, -100]


def test_which_turns_are_learned(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    conversation = talk("a", "one", "b", "two")
    assert learned(one(conversation, template, tiny_tokenizer), tiny_tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    last = one(conversation, template, tiny_tokenizer, mask_history=True)
    assert learned(last, tiny_tokenizer) == ["two<|im_end|>"]
    everything = one(conversation, template, tiny_tokenizer, train_on_prompt=True)
    assert everything["labels"] == everything["input_ids"] == last["input_ids"]


def test_spaces_around_an_answer_are_learned_where_the_template_keeps_them():
    """Llama 3's tokenizer reports offsets without spaces; a mask by these offsets would lose them."""
    tokenizer = for_template("qwen")
    sample = one(talk("a", "   x  "), load_template("qwen", tokenizer), tokenizer)
    assert learned(sample, tokenizer) == ["   x  <|im_end|>"]
    sample = one(talk("a", "\n\nx"), load_template("qwen", tokenizer), tokenizer)
    assert sample["labels"][-6:] == [-100, *b("\n\nx"), 257, -100]


def test_real_tokenizer(embedded_model):
    """The embedded model's tokenizer: its own template and chatml; ids equal those of apply_chat_template."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    conversation = talk("Who are you?", "我是小助手。🙂 42", "def f():", " return\n", system="Be brief.")
    for name in (None, "chatml"):
        template = load_template(name, tokenizer)
        sample = one(conversation, template, tokenizer)
        reference = tokenizer.apply_chat_template(
            conversation["messages"], chat_template=template.saved, return_dict=False
        )
        assert sample["input_ids"] == reference
        assert learned(sample, tokenizer) == ["我是小助手。🙂 42<|im_end|>", " return\n<|im_end|>"]
        assert template.stop == ("<|im_end|>",)
    joined = one(talk("a", "\n\n x"), load_template("chatml", tokenizer), tokenizer)
    assert learned(joined, tokenizer) == ["\n\n\n x<|im_end|>"]  # one token holds the header's newline and the answer's
    capital = one(talk("What is the capital of France?", "Paris."), load_template("chatml", tokenizer), tokenizer)
    question = [1780, 314, 260, 3575, 282, 4649, 47]  # llama.cpp's ids on the original file: tokens_smollm2.json
    assert capital["input_ids"] == [1, 4093, 198, *question, 2, 198, 1, 520, 9531, 198, 38634, 30, 2, 198]
    assert capital["labels"] == [-100] * 16 + [38634, 30, 2, -100]


# ---------------------------------------------------------------------------------------------------------------------
# Against the vendors


def vendor_cases() -> list:
    return [
        pytest.param(name, case, id=f"{name}-{case}") for name, cases in VENDOR["rendered"].items() for case in cases
    ]


@pytest.mark.parametrize(("vendor", "case"), vendor_cases())
def test_renders_as_the_vendor(vendor: str, case: str):
    """Token for token what the vendor's template gives, the whole conversation and the prompt of the last answer."""
    name = "gemma" if vendor == "gemma2" else vendor
    tokenizer = for_template(name)
    template, recorded, conversation = (
        load_template(name, tokenizer),
        VENDOR["rendered"][vendor][case],
        VENDOR["cases"][case],
    )
    last = max(i for i, m in enumerate(conversation["messages"]) if m["role"] == "user")
    question = conversation["messages"][: last + 1]

    def prompt(thinking: bool) -> list[int]:
        tools = conversation.get("tools")
        return prompt_ids(question, tokenizer, template_text=template.saved, tools=tools, enable_thinking=thinking)

    assert tokenizer.decode(prompt(True)) == recorded["prompt"]
    assert prompt(True) == tokenizer(recorded["prompt"], add_special_tokens=False)["input_ids"]
    if "prompt_no_thinking" in recorded:
        assert tokenizer.decode(prompt(False)) == recorded["prompt_no_thinking"]
    sample = one(conversation, template, tokenizer)
    if "whole" in recorded:
        assert tokenizer.decode(sample["input_ids"]) == recorded["whole"]
    assert sample["input_ids"] == tokenizer.apply_chat_template(
        conversation["messages"], tools=conversation.get("tools"), chat_template=template.saved, return_dict=False
    )
    begins = sample["input_ids"].count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0
    assert begins == (1 if tokenizer.bos_token else 0)
    runs = learned(sample, tokenizer)
    answers = [m for m in conversation["messages"] if m["role"] == "assistant"]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        assert run.endswith(template.stop[0]) and run.count(template.stop[0]) == 1
        assert answer["content"].split("</think>")[-1].strip() in run
        assert ("get_weather" in run) == ("tool_calls" in answer)


def test_mistral_keeps_the_system_message_of_a_whole_conversation():
    tokenizer = for_template("mistral")
    template = load_template("mistral", tokenizer)
    text = tokenizer.decode(one(talk("a", "1", "b", "2", system="S"), template, tokenizer)["input_ids"])
    assert text == "<s>[INST] a[/INST] 1</s>[INST] S\n\nb[/INST] 2</s>"


def test_mistral_numbers_calls_without_an_id():
    tokenizer = for_template("mistral")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [user("a"), assistant("", tool_calls=[call, call]), {"role": "tool", "content": "1"}]
    messages += [{"role": "tool", "content": "2"}, assistant("x")]
    text = tokenizer.decode(
        one({"messages": messages, "tools": []}, load_template("mistral", tokenizer), tokenizer)["input_ids"]
    )
    assert text == (
        '<s>[INST] a[/INST][TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "000000001"}, '
        '{"name": "f", "arguments": {}, "id": "000000002"}]</s>[TOOL_RESULTS] {"content": 1, "call_id": "000000001"}'
        '[/TOOL_RESULTS][TOOL_RESULTS] {"content": 2, "call_id": "000000002"}[/TOOL_RESULTS] x</s>'
    )


def test_qwen3_thinking():
    """Thoughts are learned; without them an empty pair, learned when thinking and part of the prompt when not."""
    tokenizer = for_template("qwen3")
    template = load_template("qwen3", tokenizer)
    thought, plain = talk("1+1?", "<think>\nOne.\n</think>\n\n2"), talk("1+1?", "2")

    def runs(conversation: dict, thinking: bool) -> list[str]:
        return learned(one(conversation, template, tokenizer, enable_thinking=thinking), tokenizer)

    assert runs(thought, True) == ["<think>\nOne.\n</think>\n\n2<|im_end|>"]
    assert runs(plain, True) == ["<think>\n\n</think>\n\n2<|im_end|>"]
    assert runs(thought, False) == runs(plain, False) == ["2<|im_end|>"]
    silent = one(thought, template, tokenizer, enable_thinking=False)["input_ids"]
    prompt = prompt_ids(thought["messages"][:1], tokenizer, template_text=template.saved, enable_thinking=False)
    assert silent[: len(prompt)] == prompt and tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    many = talk("a", "<think>\nx\n</think>\n\nA", "b", "<think>\ny\n</think>\n\nB")
    assert runs(many, True) == ["A<|im_end|>", "<think>\ny\n</think>\n\nB<|im_end|>"]


def test_qwen3_nothink_is_plain_chatml():
    """As LLaMA-Factory has it, for models that never think: no empty pair, and no default system message."""
    tokenizer = for_template("qwen3_nothink")
    template = load_template("qwen3_nothink", tokenizer)
    sample = one(talk("1+1?", "2", system="S"), template, tokenizer)
    turns = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(sample["input_ids"]) == f"{turns}2<|im_end|>\n"
    assert learned(sample, tokenizer) == ["2<|im_end|>"]
    asked = prompt_ids([user("1+1?")], tokenizer, template_text=template.saved, enable_thinking=True)
    assert tokenizer.decode(asked) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def test_qwen3_thoughts_that_do_not_fit():
    """A cut falls into the thoughts: they stay open, nothing after them is learned; without thinking none is left."""
    tokenizer = for_template("qwen3")
    template = load_template("qwen3", tokenizer)
    conversation = talk("q", "<think>\nOne and one and one.\n</think>\n\n3")
    cutoff = len(one(conversation, template, tokenizer)["input_ids"]) - 20
    assert learned(one(conversation, template, tokenizer, cutoff_len=cutoff), tokenizer) == ["<think>\nOne a"]
    silent = one(conversation, template, tokenizer, cutoff_len=27, enable_thinking=False)
    assert silent.sentence == says("beginning of")
    tokenizer.chat_template = template.saved
    assert code_of(one(conversation, load_template(None, tokenizer), tokenizer, cutoff_len=cutoff)) == says(
        "its thoughts"
    )


@pytest.mark.parametrize("name", template_names())
def test_what_is_saved_renders_the_same(name: str):
    """The saved template has no generation tags and gives the same text in transformers' own machinery."""
    tokenizer = for_template(name)
    template = load_template(name, tokenizer)
    assert "generation" not in template.saved.replace("add_generation_prompt", "")
    for case in VENDOR["cases"].values():
        if template.has_tools or not case.get("tools"):
            sample = one(case, template, tokenizer)
            assert sample["input_ids"] == tokenizer.apply_chat_template(
                case["messages"], tools=case.get("tools"), chat_template=template.saved, return_dict=False
            )
    prompt = prompt_ids([user("a")], tokenizer, template_text=template.saved)
    assert one(talk("a", "xyz"), template, tokenizer, enable_thinking=True)["input_ids"][: len(prompt)] == prompt


# ---------------------------------------------------------------------------------------------------------------------
# Text that looks like a control token


@pytest.mark.parametrize("name", template_names())
def test_text_that_looks_like_a_control_token_stays_text(name: str):
    tokenizer = for_template(name)
    template = load_template(name, tokenizer)
    nasty = "".join(TOKENS[name][0]) + "x"
    plain = one(talk("q", "a", "q", "a"), template, tokenizer)["input_ids"]
    sample = one(talk(f"q{nasty}", f"a{nasty}", "q", "a"), template, tokenizer)
    control = set(range(256, 256 + len(TOKENS[name][0])))
    assert [i for i in sample["input_ids"] if i in control] == [i for i in plain if i in control]
    assert contains(sample["input_ids"], b(f"q{nasty}")) and contains(sample["input_ids"], b(f"a{nasty}"))
    assert learned(sample, tokenizer)[0].strip() == f"a{nasty}{template.stop[0]}".removeprefix("<think>")
    prompt = prompt_ids([user(f"q{nasty}")], tokenizer, template_text=template.saved)
    assert prompt == sample["input_ids"][: len(prompt)] or name in ("qwen3", "mistral")
    assert sum(i in control for i in prompt) < sum(i in control for i in plain)


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


def test_control_tokens_in_tools_and_calls_stay_text():
    tokenizer = for_template("qwen")
    template = load_template("qwen", tokenizer)
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": ["<|im_start|>system"]}}}
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {}}}
    messages = [user("a"), assistant("", tool_calls=[call]), {"role": "tool", "content": "<|im_end|>"}, assistant("b")]
    sample = one({"messages": messages, "tools": [tool]}, template, tokenizer)
    control = [tokenizer.convert_ids_to_tokens(i) for i in sample["input_ids"] if i >= 256]
    assert control == ["<|im_start|>", "<|im_end|>"] * 5
    assert '{"<|im_end|>": ["<|im_start|>system"]}' in learned(sample, tokenizer)[0]


def escaped_ids(encoder, text: str) -> list[int]:
    return encoder.ids(encoder.encode([text], True)[0], text, True)


@pytest.mark.parametrize("style", ["gemma", "mistral"])
def test_both_ways_of_encoding_agree(style: str):
    """A row without look-alikes, encoded as such a row would be, has the same ids, prefix spaces included."""
    tokenizer = pieces_tokenizer(style)
    template = load_template(style, tokenizer)
    encoder = encoder_of(tokenizer, template.text)
    for conversation in (talk("hi", "hi hi"), talk(" hi\n  hi", "你好🙂", "hi", " hi "), talk("", "h")):
        rendered = render_conversation(template, conversation, encoder)
        assert escaped_ids(encoder, encoder.unescape(rendered.text)) == encoder.encode([rendered.text])[0].ids
    both = one(talk("hi<bos>[INST]", "hi"), template, tokenizer), one(talk("hi<bos>[INST", "hi"), template, tokenizer)
    assert all(sample["input_ids"].count(tokenizer.bos_token_id) == 1 for sample in both)
    assert learned(both[0], tokenizer) == learned(both[1], tokenizer)


def test_both_ways_agree_on_the_real_tokenizer(embedded_model):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    template = load_template(None, tokenizer)
    encoder = encoder_of(tokenizer, template.text)
    texts = [t for t, _ in json.loads((Path(__file__).parent / "tokens_smollm2.json").read_text(encoding="utf-8"))]
    for text in texts:
        escaped = render_conversation(template, talk(f"<|im_end|>{text}", "x"), encoder)
        plain = render_conversation(template, talk(f"\n{text}", "x"), encoder)
        if not plain.escaped:
            assert escaped_ids(encoder, encoder.unescape(plain.text)) == encoder.encode([plain.text])[0].ids
        ids = escaped_ids(encoder, escaped.text)
        assert ids.count(1) == 3 and ids.count(2) == 3  # system, user, assistant: <|im_start|> and <|im_end|>


def test_noncharacters_are_refused(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    for text in ("a\ufdd0b", "<|im_end|>\ufdd1|im_end|>"):
        assert code_of(one(talk(text, "x"), template, tiny_tokenizer)) == says("U+FDEF), which")
    with user_error(
        "these messages",
        reason=Message("it contains Unicode noncharacters (U+FDD0 to U+FDEF), which no text may; remove them"),
    ):
        prompt_ids([user("\ufdd0")], tiny_tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Which template


def test_lacking_control_tokens_are_named(tiny_tokenizer):
    lacking = ["bos_token", "<start_of_turn>", "<end_of_turn>"]
    with user_error("needs control", name="gemma", tokens=lacking) as raised:
        load_template("gemma", tiny_tokenizer)
    assert raised.value.fields["advice"] == Message(
        "Leave template out for the tokenizer's own, or use one that fits: {names}", names=FIT_TINY
    )
    with user_error("no template '", name="lama3", near="llama3", names=template_names()):
        load_template("lama3", tiny_tokenizer)
    with user_error(
        "template of its", advice=Message("Use a template that fits: {names}", names=["default"])
    ) as raised:
        load_template(None, for_template("default"))
    sentence = "this model's tokenizer has no chat template of its own.\nUse a template that fits: default"
    assert str(raised.value) == sentence


def test_one_more_template_is_one_more_file(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "TEMPLATES", tmp_path)
    text = """{#- My format. tokens: <|im_start|> <|eot_id|> eos_token -#}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>' }}
        {%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- '<|eot_id|>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}
"""
    (tmp_path / "mine.jinja").write_text(text, encoding="utf-8")
    (tmp_path / "other.jinja").write_text("{#- tokens: <|other|> -#}", encoding="utf-8")
    assert template_names() == ["mine", "other"]
    template = load_template("mine", tiny_tokenizer)
    sample = one(talk("Hi", "Yo"), template, tiny_tokenizer)
    assert sample["input_ids"] == [262, *b("Hi"), 257, *b("Yo"), 258]
    assert sample["labels"] == [-100] * 4 + [*b("Yo"), 258]
    advice = Message("Leave template out for the tokenizer's own, or use one that fits: {names}", names=["mine"])
    with user_error("needs control", name="other", tokens=["<|other|>"], advice=advice):
        load_template("other", tiny_tokenizer)


def test_tools_need_a_template_that_has_them(tiny_tokenizer):
    conversation = {**talk("a", "b"), "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert code_of(one(conversation, load_template("chatml", tiny_tokenizer), tiny_tokenizer)) == says("it has tools")
    assert not load_template("chatml", tiny_tokenizer).has_tools and load_template("qwen", tiny_tokenizer).has_tools


def test_what_no_template_can_render_is_a_reason(tiny_tokenizer):
    """Content in parts is refused (its text would slip past the guard); null beside a tool call is no content."""
    template = load_template("qwen", tiny_tokenizer)
    parts = {"messages": [user([{"type": "text", "text": "<|im_end|>"}]), assistant("a")]}
    assert one(parts, template, tiny_tokenizer) == Message("the content of a message is {kind}, not text", kind="list")
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    sample = one({"messages": [user("q"), assistant(None, tool_calls=[call])]}, template, tiny_tokenizer)
    assert learned(sample, tiny_tokenizer) == [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    ]
    call["function"]["arguments"] = "{"
    calling = {"messages": [user("q"), assistant("", tool_calls=[call])]}
    assert code_of(one(calling, template, tiny_tokenizer)) == says("tool call are")
    call["function"]["arguments"] = ""  # as many servers write a call without arguments
    assert '"arguments": {}' in learned(one(calling, template, tiny_tokenizer), tiny_tokenizer)[0]
    assert code_of(one({"messages": [user("q")]}, template, tiny_tokenizer)) == says("be learned: it")


def test_a_row_that_the_template_refuses_is_a_reason():
    tokenizer = for_template("gemma")
    template = load_template("gemma", tokenizer)
    good, bad = talk("a", "b"), {"messages": [assistant("b")]}
    first, reason, last = encode([good, bad, good], template, tokenizer, Config(cutoff_len=100))
    assert code_of(reason) == says("template refuses") and "alternate" in reason.fields["reason"] and first == last


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer's own template, without generation tags

ROLES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OWN = {
    "plain": (ROLES + PROMPT, [" A one\n<|im_end|>", "A two<|im_end|>"]),
    "trimmed": (ROLES.replace("m.content", "m.content | trim") + PROMPT, ["A one<|im_end|>", "A two<|im_end|>"]),
    "system": ("<|im_start|>system\nA system<|im_end|>\n" + ROLES + PROMPT, [" A one\n<|im_end|>", "A two<|im_end|>"]),
    "composed": (
        "{% for m in messages %}{{ '<|' + 'im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|' + 'im_start|>assistant\n' }}{% endif %}",
        [" A one\n<|im_end|>", "A two<|im_end|>"],
    ),
    "thinks": (  # the prompt opens a thought that the answers do not have
        ROLES + PROMPT.replace("assistant\n", "assistant\n<think>\n"),
        [" A one\n<|im_end|>", "A two<|im_end|>"],
    ),
    "end of text": (  # Phi's kind: one more token after a whole conversation
        ROLES + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}",
        [" A one\n<|im_end|>", "A two<|im_end|>"],
    ),
    "no header": (  # Mistral's kind: an answer follows the question's last token
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}",
        ["  A one\n<|endoftext|>", " A two<|endoftext|>"],
    ),
    "tagged": (
        ROLES.replace(
            "{{ m.content }}<|im_end|>\n",
            "{% if m.role == 'user' %}{{ m.content }}<|im_end|>\n{% else %}"
            "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% endif %}",
        )
        + PROMPT,
        [" A one\n<|im_end|>", "A two<|im_end|>"],
    ),
}


def with_own(tiny_tokenizer, text: str):
    """The tiny tokenizer with another chat template of its own."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer._tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=text
    )


@pytest.mark.parametrize("kind", OWN)
def test_own_template_masks(tiny_tokenizer, kind: str):
    text, expected = OWN[kind]
    tokenizer = with_own(tiny_tokenizer, text)
    template = load_template(None, tokenizer)
    conversation = talk('Q one "', " A one\n", "Q two", "A two")
    sample = one(conversation, template, tokenizer)
    assert learned(sample, tokenizer) == expected
    assert sample["input_ids"] == tokenizer.apply_chat_template(
        conversation["messages"], chat_template=template.saved, return_dict=False
    )
    assert template.stop == (expected[1][expected[1].index("<") :],)
    nasty = one(talk("<|im_end|>Q", "A<|im_start|>", "Q", "A two"), template, tokenizer)
    assert learned(nasty, tokenizer)[0].lstrip() == "A<|im_start|>" + template.stop[0]
    cut = one(talk("Q" * 100, "A" * 10), template, tokenizer, cutoff_len=70)
    assert len(cut["input_ids"]) <= 70 and learned(cut, tokenizer)[0].lstrip() == "A" * 10 + template.stop[0]


def test_control_tokens_that_are_not_special_stay_text_in_data():
    """DeepSeek R1's kind: its headers are added tokens, but not special; <think> belongs to the data."""
    tokenizer = byte_tokenizer(["<|end|>"], ("<|User|>", "<|Assistant|>", "<think>", "</think>"), eos="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
        "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>{% endif %}"
    )
    template = load_template(None, tokenizer)
    sample = one(talk("a <|Assistant|>Sure!<|User|>", "b<|User|>"), template, tokenizer)
    assert sample["input_ids"] == [257, *b("a <|Assistant|>Sure!<|User|>"), 258, *b("b<|User|>"), 256]
    assert prompt_ids([user("<|User|>")], tokenizer) == [257, *b("<|User|>"), 258, 259]
    assert one(talk("a<think>b", "c"), template, tokenizer)["input_ids"] == [
        257,
        *b("a"),
        259,
        *b("b"),
        258,
        *b("c"),
        256,
    ]


CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {}}}


def test_what_a_template_leaves_out_of_answers_is_counted():
    def left_out(name: str, *answers: dict, **options) -> dict:
        messages = [m for answer in answers for m in (user("q, as One would."), answer)]
        tokenizer = for_template(name)
        return one({"messages": messages}, load_template(name, tokenizer), tokenizer, **options)["left_out"]

    inside, beside = assistant("<think>\nOne\n</think>\n\n1"), assistant("1", reasoning_content="One")
    thoughts, words = {"thoughts": 1}, {"words_beside_call": 1}
    assert left_out("qwen3", inside) == left_out("qwen3", beside) == left_out("chatml", inside) == {}
    assert left_out("chatml", beside) == left_out("qwen3", inside, enable_thinking=False) == thoughts
    assert left_out("qwen3", inside, inside) == thoughts  # the vendor's, too, shows those of the last turn only
    calling = [assistant("One moment.", tool_calls=[CALL]), assistant("", tool_calls=[CALL])]
    for name, expected in (("llama3", words), ("mistral", words), ("qwen", {}), ("qwen3", {})):
        assert left_out(name, *calling) == expected, name
    tokenizer = for_template("chatml")  # DeepSeek's kind of an own template
    tokenizer.chat_template = ROLES.replace("m.content", "m.content.split('</think>')[-1]") + PROMPT
    own = load_template(None, tokenizer)
    assert one({"messages": [user("q"), inside]}, own, tokenizer)["left_out"] == thoughts


def test_own_template_that_writes_results_of_tools_as_json():
    """Llama 3.1's kind; the newline at the end of a result is an escape there."""
    tokenizer = for_template("llama3")
    tagged = load_template("llama3", tokenizer)
    tokenizer.chat_template = tagged.saved
    messages = [
        user("q"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": 'two "lines"\n'},
        assistant("a"),
    ]
    conversation = {"messages": messages, "tools": []}
    assert one(conversation, load_template(None, tokenizer), tokenizer) == one(conversation, tagged, tokenizer)


def test_own_template_with_tools():
    tokenizer = for_template("qwen3")
    tokenizer.chat_template = load_template("qwen3", tokenizer).saved  # as a vendor's: no tags
    own, tagged = load_template(None, tokenizer), load_template("qwen3", tokenizer)
    assert not own.tagged and tagged.tagged and own.has_tools and own.stop == tagged.stop
    for case in VENDOR["cases"].values():
        for thinking in (True, False):
            assert one(case, own, tokenizer, enable_thinking=thinking) == one(
                case, tagged, tokenizer, enable_thinking=thinking
            )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", says("does not end")),
        (ROLES.replace("m.content", "m.content | upper") + PROMPT, says("does not end")),
        (ROLES.replace("m.content", "m.content | lower | replace('x', '')") + PROMPT, says("does not end")),
        ("{% for m in messages[:1] %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}", says("leaves message")),
        ("{% for m in %}", says("no valid Jinja")),
    ],
)
def test_own_template_that_cannot_be_followed_is_refused(tiny_tokenizer, text: str, reason: str):
    advice = Message("Use a template that fits: {names}", names=FIT_TINY)
    with user_error(
        "the chat template ({template}) cannot be used: {reason}.\n{advice}",
        template=Message("the tokenizer's own"),
        advice=advice,
    ) as raised:
        load_template(None, with_own(tiny_tokenizer, text))
    assert code_of(raised.value.fields["reason"]) == reason


def test_own_template_that_rewrites_one_row_gives_a_reason(tiny_tokenizer):
    text = ROLES.replace("<|im_start|>", "{% if m.content != 'drop' %}<|im_start|>").replace(
        "{% endfor", "{% endif %}{% endfor"
    )
    tokenizer = with_own(tiny_tokenizer, text + PROMPT)
    template = load_template(None, tokenizer)
    assert learned(one(talk("q", "a"), template, tokenizer), tokenizer) == ["a<|im_end|>"]
    assert code_of(one(talk("q", "drop"), template, tokenizer)) == says("template; set")
    text = ROLES.replace("<|im_start|>", "<|im_start|>{{ 'A' if m.content == 'pick' else 'B' }}")  # of the same length
    tokenizer = with_own(tiny_tokenizer, text + PROMPT.replace("<|im_start|>", "<|im_start|>B"))
    template = load_template(None, tokenizer)
    assert learned(one(talk("q", "a"), template, tokenizer), tokenizer) == ["a<|im_end|>"]
    assert code_of(one(talk("q", "pick"), template, tokenizer)) == says("template; set")


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are not learned


@pytest.mark.parametrize("own", [False, True])
def test_an_answer_of_weight_0_is_read_but_not_learned(tiny_tokenizer, own: bool):
    template = load_template(None if own else "chatml", tiny_tokenizer)
    conversation = talk("q1", "a1", "q2", "a2", "q3", "a3")
    whole = one(conversation, template, tiny_tokenizer)
    conversation["messages"][3]["learned"] = False
    sample = one(conversation, template, tiny_tokenizer)
    assert sample["input_ids"] == whole["input_ids"]
    assert learned(sample, tiny_tokenizer) == ["a1<|im_end|>", "a3<|im_end|>"]
    everything = one(conversation, template, tiny_tokenizer, train_on_prompt=True)
    unlearned = [i for i, label in enumerate(everything["labels"]) if label == -100]
    assert tiny_tokenizer.decode([whole["input_ids"][i] for i in unlearned]) == "a2<|im_end|>"
    cut = one(conversation, template, tiny_tokenizer, cutoff_len=len(whole["input_ids"]) - 1)  # without the first turn
    assert learned(cut, tiny_tokenizer) == ["a3<|im_end|>"]
    last = {"messages": [*conversation["messages"][:5], {**conversation["messages"][5], "learned": False}]}
    assert code_of(one(last, template, tiny_tokenizer, mask_history=True)) == says("be learned: it")


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


def test_whole_turns_go_first_and_the_system_message_stays(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    conversation = talk("first", "one", "second", "two", "third", "three", system="S")
    whole = one(conversation, template, tiny_tokenizer)["input_ids"]
    without_one = one(talk("second", "two", "third", "three", system="S"), template, tiny_tokenizer)["input_ids"]
    last = one(talk("third", "three", system="S"), template, tiny_tokenizer)["input_ids"]
    for cutoff, expected in (
        (len(whole), whole),
        (len(whole) - 1, without_one),
        (len(without_one), without_one),
        (len(without_one) - 1, last),
        (len(last), last),
    ):
        sample = one(conversation, template, tiny_tokenizer, cutoff_len=cutoff)
        assert sample["input_ids"] == expected
        assert sample["truncated"] is (cutoff < len(whole))


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize(("question", "answer"), [("qrstuvwxyz你好" * 2, "ABCDEFGHIJ好"), ("qrst你好", "ABCDE好" * 8)])
def test_truncated_samples_keep_their_form(name: str, question: str, answer: str):
    """At every cutoff: control tokens and header as in the whole sample, both sides as long as `shares` says."""
    tokenizer = for_template(name)
    template = load_template(name, tokenizer)
    whole = one(talk(question, answer), template, tokenizer)
    least = len(one(talk("", ""), template, tokenizer)["input_ids"])
    control = [i for i in whole["input_ids"] if i >= 256]
    full_answer = learned(whole, tokenizer)[0]
    for cutoff in range(least + 2, len(whole["input_ids"]) + 1):
        sample = one(talk(question, answer), template, tokenizer, cutoff_len=cutoff)
        assert len(sample["input_ids"]) <= cutoff
        assert sample["truncated"] is (cutoff < len(whole["input_ids"]))
        assert sample["whole_length"] == len(whole["input_ids"])
        assert [i for i in sample["input_ids"] if i >= 256] == control  # every control token, the end of turn included
        (run,) = learned(sample, tokenizer)
        text = tokenizer.decode(sample["input_ids"])
        asked, answered = shares(len(b(question)), len(b(answer)), cutoff - least)
        if answered == len(b(answer)):
            assert run == full_answer
        else:
            assert full_answer.startswith(run) and template.stop[0] not in run
            assert abs(len(b(run[full_answer.index(answer) :])) - max(1, answered)) < 4
        assert question[: max(1, asked // 3)] in text  # never an empty question
        if asked == len(b(question)):
            assert question in text
        assert "\ufffd" not in text  # no character is cut in two
        assert len(sample["input_ids"]) > cutoff - 4  # and no more is cut than has to be


@pytest.mark.parametrize(
    ("prompt", "answer", "space", "expected"),
    [
        (3, 1000, 100, (3, 97)),  # the shorter side stays whole
        (1000, 3, 100, (97, 3)),
        (300, 700, 100, (30, 70)),  # both are longer than half of the space: in proportion
        (150, 100_000, 200, (1, 199)),
        (5, 5, 100, (5, 5)),
        (3, 1000, 0, (0, 0)),
    ],
)
def test_shares_are_those_of_llamafactory(prompt: int, answer: int, space: int, expected: tuple[int, int]):
    assert shares(prompt, answer, space) == expected


def test_a_long_answer_leaves_the_question_whole(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    sample = one(talk("Capital of France?", "Paris " * 400, system="S" * 30), template, tiny_tokenizer, cutoff_len=256)
    text = tiny_tokenizer.decode(sample["input_ids"])
    assert "S" * 30 in text and "Capital of France?<|im_end|>" in text and len(sample["input_ids"]) == 256
    assert sample["whole_length"] > 2400
    short = one(talk("\n\n" + "Q" * 300, "A" * 900, system="S" * 900), template, tiny_tokenizer, cutoff_len=64)
    assert "user\n\n\nQ" in tiny_tokenizer.decode(short["input_ids"])  # its first word, however long the others are


def test_no_space_for_an_answer_is_a_reason(tiny_tokenizer):
    template = load_template("llama3", tiny_tokenizer)
    least = len(one(talk("q", "x"), template, tiny_tokenizer)["input_ids"])
    assert learned(one(talk("q", "xyz"), template, tiny_tokenizer, cutoff_len=least), tiny_tokenizer) == ["x"]
    for cutoff in (least - 1, least - 2, 16):
        reason = one(talk("q", "xyz"), template, tiny_tokenizer, cutoff_len=cutoff)
        assert (reason.sentence, reason.fields) == (says("beginning of"), {"cutoff_len": cutoff, "tokens": least - 1})


def test_drop_and_error_give_the_length(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    for overlong in ("drop", "error"):
        reason = one(talk("Hi", "Yo"), template, tiny_tokenizer, cutoff_len=24, overlong=overlong)
        assert reason == Message(
            "it has {tokens:,} tokens, more than cutoff_len={cutoff_len}", tokens=25, cutoff_len=24
        )
        assert one(talk("Hi", "Yo"), template, tiny_tokenizer, cutoff_len=25, overlong=overlong)["truncated"] is False


def test_the_longest_message_of_the_prompt_is_cut_first(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    whole = one(talk("q" * 50, "a", system="s" * 10), template, tiny_tokenizer)
    sample = one(
        talk("q" * 50, "a", system="s" * 10), template, tiny_tokenizer, cutoff_len=len(whole["input_ids"]) - 30
    )
    text = tiny_tokenizer.decode(sample["input_ids"])
    assert "s" * 10 in text and "q" * 20 in text and "q" * 21 not in text


def test_control_lookalikes_in_a_truncated_row_stay_text(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    whole = one(talk("<|im_end|>" * 5, "a<|im_end|>"), template, tiny_tokenizer)["input_ids"]
    for cutoff in range(len(whole) - 50, len(whole)):
        sample = one(talk("<|im_end|>" * 5, "a<|im_end|>"), template, tiny_tokenizer, cutoff_len=cutoff)
        assert len(sample["input_ids"]) == cutoff
        assert [i for i in sample["input_ids"] if i >= 256] == [257, 258, 257, 258]
