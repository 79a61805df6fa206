"""The chat page: one conversation with a trained model, alone or side by side with the model before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import common
from common import UserError
from inference import grammar
from inference.engine import Engine
from inference.request import Settings
from runs.target import Target, find_target
from runs.texts import Translator
from web import chat_model, conversation, widgets
from web.chat_model import Request
from web.conversation import Turn
from web.pages.chat_layout import VOICES, ChatLayout
from web.widgets import QUIET, note

Updates = dict[Any, Any]  # component → its new value


def stop(request: gr.Request) -> None:
    """Ends the reply that this browser waits for: its Stop button, or it went away."""
    if waiting := chat_model.requests.get(request.session_hash):
        waiting.stop()


class ChatPage(ChatLayout):
    """What the components of ChatLayout do. `source`: the only target; None: one is chosen."""

    def __init__(self, t: Translator, source: Target | None = None) -> None:
        super().__init__(t, source)
        self.titles = {
            "thought": t("Thinking"),
            "call": t("Tool call"),
            "result": t("A tool's result"),
            "empty": t("(an empty reply)"),
        }

    # ---- events

    def connect(self, blocks: gr.Blocks, tab: gr.Tab | None = None) -> None:
        """Connects the events; whenever `tab` is opened, what was trained meanwhile can be chosen."""
        read = {self.turns, self.chosen, self.target, self.with_base, self.system, self.tools, self.box, self.role}
        read |= set(self.sampling.values())
        painted = [*self.voices.values(), self.turns, self.chosen, self.remark, self.fault, self.box, self.role]
        painted += [self.delete]
        answering = {"inputs": read, "outputs": painted, "concurrency_limit": None, **QUIET}
        self.box.submit(self.say, **answering)
        self.again.click(self.say_again, **answering)
        self.box.stop(stop, None, None, queue=False, **QUIET)
        self.delete.click(self.delete_turn, [self.turns, self.chosen], painted, **QUIET)
        self.new.click(self.start_anew, None, painted, **QUIET)
        for voice, chatbot in self.voices.items():
            chatbot.retry(self.say_again, **answering)
            chatbot.undo(self.delete_turn, [self.turns, self.chosen], painted, **QUIET)
            chatbot.clear(self.start_anew, None, painted, **QUIET)
            chatbot.example_select(self.say_example, **answering)
            chatbot.select(self.chooser(voice), self.turns, [self.chosen, self.delete], **QUIET)
            chatbot.edit(self.editor(voice), **{**answering, "concurrency_limit": 1})
        self.with_base.change(self.show_voices, self.with_base, [*self.voices.values()], **QUIET)
        self.tools.change(lambda text: gr.update(visible=bool(text)), self.tools, self.role, **QUIET)
        self.add.click(self.add_to_data, [self.turns, self.system, self.tools, self.name], self.saved, **QUIET)
        if self.source:
            blocks.load(self.load, self.with_base, self.loading, **QUIET)
        else:
            self.connect_targets(blocks, tab)

    def connect_targets(self, blocks: gr.Blocks, tab: gr.Tab | None) -> None:
        self.free.click(self.free_memory, None, self.remark)
        opened = {"fn": self.first_target, "inputs": self.offered}
        opened["outputs"] = [self.target, self.offered, self.fault]
        blocks.load(**opened)
        if tab:
            tab.select(**opened, **QUIET)
        self.target.change(self.settings_of, self.target, [self.fault, *self.sampling.values()], **QUIET)

    # ---- the conversation

    def say(self, given: Updates, request: gr.Request) -> Iterator[Updates]:
        """Sends the message of the box to every voice."""
        text = given[self.box].strip()
        if not text:
            yield {self.fault: ""}
            return
        role = given[self.role] if given[self.tools] else "user"
        yield from self.answer([*given[self.turns], {"role": role, "text": text}], given, request)

    def say_example(self, given: Updates, event: gr.SelectData, request: gr.Request) -> Iterator[Updates]:
        yield from self.answer([{"role": "user", "text": event.value["text"]}], given, request)

    def say_again(self, given: Updates, request: gr.Request) -> Iterator[Updates]:
        """Answers the chosen turn again, or the last; what came after it is gone."""
        turns, chosen = given[self.turns], given[self.chosen]
        if not turns:
            yield {self.fault: ""}
            return
        number = len(turns) - 1 if chosen is None else min(chosen, len(turns) - 1)
        yield from self.answer([*turns[:number], _unanswered(turns[number])], given, request)

    def editor(self, voice: str) -> Callable[..., Iterator[Updates]]:
        """A changed question is answered again; a changed answer stays as it was written."""

        def edit(given: Updates, event: gr.EditData, request: gr.Request) -> Iterator[Updates]:
            turns = [dict(turn) for turn in given[self.turns]]
            number, part = conversation.find_message(turns, voice, event.index)
            turn = turns[number]
            if part is None:
                turn["text"] = event.value
                yield from self.answer([*turns[:number], _unanswered(turn)], given, request)
                return
            turn[voice] = conversation.with_part(turn[voice], part, event.value)
            yield self.paint(turns)

        return edit

    def chooser(self, voice: str) -> Callable[..., tuple[int, Any]]:
        def choose(turns: list[Turn], event: gr.SelectData) -> tuple[int, Any]:
            number, _ = conversation.find_message(turns, voice, event.index)
            return number, gr.update(value=self.t("Delete turn {n}", n=number + 1))

        return choose

    def delete_turn(self, turns: list[Turn], chosen: int | None, request: gr.Request) -> Updates:
        """Takes out the chosen turn, or the last; one that is being answered is the last."""
        if self.replace_request(request, lambda: self.paint(turns) | {self.remark: ""}):
            return self.paint(turns) | {self.remark: ""}
        number = len(turns) - 1 if chosen is None else chosen
        return self.paint([turn for i, turn in enumerate(turns) if i != number]) | {self.remark: ""}

    def start_anew(self, request: gr.Request) -> Updates:
        self.replace_request(request, lambda: self.paint([]) | {self.remark: ""})
        return self.paint([]) | {self.remark: ""}

    def replace_request(self, request: gr.Request, instead: Callable[[], Updates]) -> bool:
        """Ends the reply that this browser waits for, if any, and waits for its end.

        The last that it sends is what `instead` paints: Gradio may send that after all that the caller shows.
        """
        waiting = chat_model.requests.pop(request.session_hash, None)
        if waiting:
            waiting.instead = instead
            waiting.stop()
            waiting.ended.wait(10)
        return waiting is not None

    def paint(self, turns: list[Turn], streaming: bool = False) -> Updates:
        """Every component that shows the conversation, as it now is."""
        made: Updates = {
            chatbot: conversation.shown(turns, voice, self.titles, streaming) for voice, chatbot in self.voices.items()
        }
        if not streaming:
            last = turns[-1].get("trained", "") if turns else ""
            made[self.role] = gr.update(value="tool" if conversation.calls(last) else "user")
            made |= {self.turns: turns, self.chosen: None, self.fault: ""}
            made |= {self.delete: gr.update(value=self.t("Delete the last turn")), self.box: self.ready_box()}
        return made

    def ready_box(self, **changes: Any) -> Any:
        """The box when nothing is being answered."""
        return gr.update(submit_btn=self.t("Send"), stop_btn=False, **changes)

    def show_voices(self, with_base: bool) -> list[Any]:
        """One voice without its name, or two with theirs."""
        return [gr.update(visible=with_base or voice == "trained", show_label=with_base) for voice in self.voices]

    # ---- replies

    def answer(self, turns: list[Turn], given: Updates, request: gr.Request) -> Iterator[Updates]:
        """Every voice answers the last turn; where that cannot be, it is taken back and its text stands in the box."""

        def begin() -> Updates:
            stop_box = gr.update(value="", submit_btn=False, stop_btn=self.t("Stop"))
            return self.paint(turns, streaming=True) | {self.box: stop_box, self.fault: "", self.remark: ""}

        self.replace_request(request, begin)
        waiting = chat_model.requests[request.session_hash] = Request()
        try:
            yield begin()
            yield from self.grow(turns, given, waiting)
        finally:
            waiting.ended.set()
            if chat_model.requests.get(request.session_hash) is waiting:
                del chat_model.requests[request.session_hash]

    def grow(self, turns: list[Turn], given: Updates, waiting: Request) -> Iterator[Updates]:
        """The answers as they grow, and at last how the page stays."""
        before, remark = given[self.turns], ""
        try:
            with chat_model.explaining_full_memory():
                for painted, remark in self.replies(turns, given, waiting):
                    if waiting.instead:
                        break
                    yield self.paint(painted, streaming=True) | {self.remark: note(remark)}
                    turns = painted
            last = self.paint(turns) | {self.remark: note(remark)}
        except UserError as error:
            box = self.ready_box(value=turns[-1]["text"]) if len(turns) > len(before) else self.ready_box()
            last = self.paint(before) | {self.box: box, self.fault: widgets.fault(error, self.t), self.remark: ""}
        yield waiting.instead() if waiting.instead else last

    def replies(self, turns: list[Turn], given: Updates, waiting: Request) -> Iterator[tuple[list[Turn], str]]:
        """The conversation as the answers to its last turn grow, and a remark about it."""
        t, with_base = self.t, given[self.with_base]
        settings, tools = self.read_settings(given), conversation.read_tools(given[self.tools])
        source = self.find(given[self.target])
        if with_base and source.adapter is None:
            raise UserError("{name} holds no base model of its own; choose the run itself", name=source.name)
        loading = t("loading {name} ...", name=source.name)
        while not chat_model.busy.acquire(timeout=0.3):
            answering = chat_model.is_any_loaded()
            yield turns, t("another page is being answered; waiting ...") if answering else loading
            if waiting.stopped:
                return
        try:
            if not chat_model.is_loaded(source, with_base):
                yield turns, loading
            engine = chat_model.engine(source, with_base)
            if tools and grammar.style_of(engine) is None:
                raise UserError("this model's chat template has no tools; empty that field, or choose another model")
            yield from self.stream(engine, turns, given, settings, tools, waiting)
        finally:
            chat_model.busy.release()

    def stream(
        self, engine: Engine, turns: list[Turn], given: Updates, settings: Settings, tools: Any, waiting: Request
    ) -> Iterator[tuple[list[Turn], str]]:
        """What `replies` gives once the engine is there: one voice after the other."""
        with_base, remarks = given[self.with_base], []
        for voice in VOICES if with_base else ("trained",):
            messages = conversation.messages(turns[:-1], voice, given[self.system])
            messages.append({"role": turns[-1]["role"], "content": turns[-1]["text"]})
            reply = waiting.reply = (engine.base if voice == "base" else engine).stream(messages, settings, tools)
            if waiting.stopped:
                reply.cancel()
            text = ""
            for piece in chat_model.pieces(reply):
                text += piece
                yield [*turns[:-1], {**turns[-1], voice: text}], "\n".join(remarks)
            turns = [*turns[:-1], {**turns[-1], voice: text}]
            line = " · ".join(map(self.t.message, reply.summary()))
            remarks.append(f"{self.voice_label(voice)}: {line}" if with_base else line)
            yield turns, "\n".join(remarks)

    def read_settings(self, given: Updates) -> Settings:
        """The sampling settings; raises UserError for one that is out of range."""
        values = {name: given[component] for name, component in self.sampling.items()}
        seed = str(values["seed"] or "").strip()
        if seed and not seed.isdecimal():
            raise UserError("the seed '{seed}' is not a whole number; give one, or leave it empty", seed=seed)
        values["seed"] = int(seed) if seed else None
        values["stop"] = tuple(line for line in (values["stop"] or "").splitlines() if line)
        return Settings(**values)

    # ---- the target

    def find(self, target: str | None) -> Target:
        if self.source:
            return self.source
        if not target:
            raise UserError("there is no trained model in saves/ yet; train one, or name a model's folder")
        return find_target(target)

    def load(self, with_base: bool) -> Iterator[str]:
        """Loads the only target when the page opens, so that the first reply need not wait for it.

        What it shows has a place of its own: it may come after the first message was sent.
        """
        source = self.find(None)
        if chat_model.is_loaded(source, with_base):
            yield ""
            return
        yield note(self.t("loading {name} ...", name=source.name))
        try:
            with chat_model.busy, chat_model.explaining_full_memory():
                chat_model.engine(source, with_base)
            yield ""
        except UserError as error:
            yield widgets.fault(error, self.t)

    def first_target(self, offered: list[str]) -> tuple[Any, list[str], Any]:
        """When the page opens: what can be talked to by now; the newest is chosen where it was not offered before."""
        choices = chat_model.targets()
        paths = [path for _, path in choices]
        chosen = {"value": paths[0]} if paths and paths[0] not in offered else {}
        nothing = note(self.t("there is no trained model in saves/ yet; train one, or name a model's folder"))
        remark = nothing if not choices else gr.skip() if offered else ""
        return gr.update(choices=choices, **chosen), paths, remark

    def settings_of(self, target: str | None) -> list[Any]:
        """The error of a target, if it has one, and the settings of its configuration."""
        try:
            first = dataclasses.asdict(Settings.of(self.find(target).config))
        except UserError as error:
            return [widgets.fault(error, self.t), *(gr.skip() for _ in self.sampling)]
        kept = ("seed", "stop")  # a configuration has none
        return ["", *(gr.skip() if name in kept else gr.update(value=first[name]) for name in self.sampling)]

    def free_memory(self) -> str:
        chat_model.free()
        return note(self.t("memory is free"))

    # ---- training data

    def add_to_data(self, turns: list[Turn], system: str, tools: str, name: str) -> str:
        """Adds the conversation to a dataset: what was done or is wrong."""
        try:
            row = conversation.row(turns, system, conversation.read_tools(tools))
            count = conversation.add_to_data(row, name, folder := Path(common.Config.dataset_dir))
        except UserError as error:
            return widgets.fault(error, self.t)
        file = folder / f"{name}.json"
        return note(
            self.t("Conversations in {file}: {n}. To train on them: dataset={name}", file=file, n=count, name=name)
        )


def _unanswered(turn: Turn) -> Turn:
    return {"role": turn["role"], "text": turn["text"]}
