"""Ollama's Modelfile: a GGUF, the trained chat template in Ollama's own language, and where to stop.

Ollama uses the template inside a GGUF only where it is one of those it knows, else it sends the words without any; so
the Modelfile carries the template, translated by rendering placeholders: whatever Jinja a template is written in.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from common import Message, print_notes


def modelfile(file: str, name: str, tokenizer: Any, stop: tuple[str, ...], adds_bos: bool) -> str:
    """The text of the Modelfile for a GGUF beside it; `adds_bos`: llama.cpp itself begins with the token for it."""
    made = shlex.quote(f"{file.removesuffix('.gguf')}.Modelfile")
    lines = [f"# ollama create {shlex.quote(name)} -f {made}", f"FROM ./{file}"]
    shape = template_shape(tokenizer)
    if shape is None:
        note = Message(
            "the chat template cannot be written in Ollama's template language; write TEMPLATE into the Modelfile"
        )
        print_notes([note])
        lines.append(f"# {note}")
    else:
        if adds_bos and tokenizer.bos_token:
            shape["head"] = shape["head"].removeprefix(tokenizer.bos_token)
        lines.append(f'TEMPLATE """{go_template(shape)}"""')
        if shape["default"]:
            lines.append(f'SYSTEM """{shape["default"]}"""')
    return "\n".join([*lines, *(f'PARAMETER stop "{token}"' for token in stop)]) + "\n"


def template_shape(tokenizer: Any) -> dict[str, str] | None:
    """What a chat template writes around the words, found by rendering placeholders; None where that is not all.

    `head`, then around each turn `user`/`user_end`, `assistant`/`assistant_end`, `system`/`system_end`, and `prompt`
    for the answer to come. `joint` is what follows a system message that stands inside the `place` (first or last)
    user's turn, and `default` the system message of conversations without one.
    """
    words = {"system": "SYSTEMWORDS", "user": "USERWORDS", "assistant": "ANSWERWORDS"}

    def render(*roles: str, prompt: bool = False) -> str:
        messages = [{"role": role, "content": words[role]} for role in roles]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def pieces(*roles: str, prompt: bool = False) -> list[str]:
        return re.split("|".join(words.values()), render(*roles, prompt=prompt))

    def right(shape: dict[str, str]) -> bool:
        cases = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))
        expanded = (_expand(shape, [(role, words[role]) for role in roles]) for roles in cases)
        return all(text == render(*roles, prompt=True) for text, roles in zip(expanded, cases, strict=True))

    try:
        before, shape = (found := pieces("user"))[0], {"user_end": found[1]}
        shape["assistant_end"] = pieces("user", "assistant")[2]
        _, answering, asking, _ = pieces("user", "assistant", "user")
        shape["assistant"] = _without(answering, start=shape["user_end"])
        shape["user"] = _without(asking, start=shape["assistant_end"])
        shape["head"] = _without(before, end=shape["user"])
        shape["prompt"] = _without(pieces("user", prompt=True)[1], start=shape["user_end"])
        shape |= _system_shape(shape, *pieces("system", "user"))
    except (IndexError, ValueError):
        return None
    fitting = (shape | {"place": place} for place in ("first", "last"))
    return next((s for s in fitting if right(s) and '"""' not in "".join(s.values())), None)


def _without(text: str, start: str = "", end: str = "") -> str:
    if not (text.startswith(start) and text.endswith(end)):
        raise ValueError("the pieces of the template overlap")
    return text[len(start) : len(text) - len(end)]


def _system_shape(shape: dict[str, str], before: str, joint: str, after: str) -> dict[str, str]:
    if after != shape["user_end"]:
        raise ValueError("a system message changes the user's turn")
    if before == shape["head"] + shape["user"]:  # inside the user's turn
        return {"system": "", "system_end": "", "joint": joint, "default": ""}
    end = _without(joint, end=shape["user"])
    if before.startswith(shape["head"]):
        return {"system": _without(before, start=shape["head"]), "system_end": end, "joint": "", "default": ""}
    default = _without(shape["head"], start=before, end=end)  # the head held a system message of the template's own
    return {"head": "", "system": before, "system_end": end, "joint": "", "default": default}


def _expand(shape: dict[str, str], messages: list[tuple[str, str]]) -> str:
    """The text of messages as `go_template(shape)` and SYSTEM make it, with the prompt for an answer."""
    if shape["default"] and messages[0][0] != "system":
        messages = [("system", shape["default"]), *messages]
    waiting = ""
    if shape["joint"] and messages[0][0] == "system":
        waiting, messages = messages[0][1] + shape["joint"], messages[1:]
    text, place = shape["head"], 0 if shape["place"] == "first" else len(messages) - 1
    for number, (role, words) in enumerate(messages):
        text += shape[role] + (waiting if number == place else "") + words + shape[f"{role}_end"]
    return text + shape["prompt"]


def go_template(shape: dict[str, str]) -> str:
    """The shape in the language of Ollama's templates (Go's text/template)."""
    text = {key: value.replace("{{", '{{ "{{" }}') for key, value in shape.items()}
    start, opening = "", ""
    if shape["joint"]:
        start = "{{ $system := .System }}"
        last = " (eq (len (slice $.Messages $i)) 1)" if shape["place"] == "last" else ""
        test = f"and $system{last}" if last else "$system"
        opening = f'{{{{ if {test} }}}}{{{{ $system }}}}{text["joint"]}{{{{ $system = "" }}}}{{{{ end }}}}'
    turn = {
        "system": "" if shape["joint"] else f"{text['system']}{{{{ .Content }}}}{text['system_end']}",
        "user": f"{text['user']}{opening}{{{{ .Content }}}}{text['user_end']}",
        "assistant": f"{text['assistant']}{{{{ .Content }}}}{text['assistant_end']}",
    }
    turns = " else ".join(f'if eq .Role "{role}" }}}}{words}{{{{' for role, words in turn.items())
    messages = f"{{{{ range $i, $_ := .Messages }}}}{{{{ {turns} end }}}}{{{{ end }}}}"
    return f"{start}{text['head']}{messages}{text['prompt']}"
