"""The chat page: one conversation with a trained model, alone or side by side with the model before training.

The model is loaded into the process of the server, once for all browsers; one model at a time, one reply at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

import common
from common import UserError
from inference import tool_calls
from inference.engine import Engine, Reply, Settings
from inference.load import load
from runs.folder import run_folders
from runs.target import Source, find
from web import conversation, theme
from web.conversation import Turn

PAINT = 0.08  # seconds between two updates of the page: as smooth as eyes need, and cheap
LABELS = {"trained": "Trained", "base": "Before training"}

WORDS = {
    "Trained": "训练后",
    "Before training": "训练前",
    "Model": "模型",
    "a run, a model folder, a hub name or a GGUF": "训练结果、模型文件夹、模型库名称或 GGUF",
    "Refresh": "刷新",
    "Free its memory": "释放内存",
    "Message": "消息",
    "Write a message": "输入消息",
    "A user's message": "用户消息",
    "A tool's result": "工具结果",
    "Send as": "发送为",
    "Send": "发送",
    "Stop": "停止",
    "Answer again": "重新回答",
    "Delete the last turn": "删除最后一轮",
    "Delete turn {n}": "删除第 {n} 轮",
    "New conversation": "新对话",
    "System prompt": "系统提示",
    "what the model should know or how it should answer": "模型应知道什么、如何回答",
    "Side by side with the model before training": "与训练前的模型并排比较",
    "Sampling": "采样设置",
    "Temperature": "温度",
    "0: always the likeliest word": "0：总是最可能的词",
    "Top p": "Top p",
    "Top k": "Top k",
    "0: off": "0：不用",
    "Min p": "Min p",
    "Repetition penalty": "重复惩罚",
    "Presence penalty": "出现惩罚",
    "Frequency penalty": "频率惩罚",
    "Longest reply, in tokens": "回复的最大长度（词元）",
    "Seed": "随机种子",
    "empty: a new one each time": "留空：每次不同",
    "Stop texts": "停止文本",
    "one a line; the reply ends before any of them": "每行一个；回复在其之前结束",
    "Tools": "工具",
    "Functions the model may call, as JSON": "模型可调用的函数（JSON）",
    "Save as training data": "保存为训练数据",
    "Form": "格式",
    "Download": "下载",
    "Name of the dataset": "数据集名称",
    "Add to data/": "加入 data/",
    "Its line in dataset_info.json": "dataset_info.json 中的一行",
    "Conversations in {file}: {n}. To train on them: dataset={name}": "{file} 中的对话数：{n}。训练时写 dataset={name}",
    "{name} has its training in its weights, so the model before it is not there; choose the run itself.": (
        "{name} 的训练结果已并入权重，训练前的模型不在其中；请选择训练结果本身。"
    ),
    "this model's chat template has no tools; empty that field, or choose another model": (
        "这个模型的对话模板不支持工具；请清空该栏，或另选模型"
    ),
    "Thinking": "思考",
    "Tool call": "工具调用",
    "(an empty reply)": "（空回复）",
    "loading {name} ...": "正在载入 {name} ……",
    "another page is being answered; waiting ...": "正在回答另一个页面；请稍候……",
    "memory is free": "内存已释放",
    "{n} tokens": "{n} 个词元",
    "{speed:.1f} tokens/s": "每秒 {speed:.1f} 个词元",
    "first after {seconds:.2f} s": "首个词元 {seconds:.2f} 秒",
    "stopped": "已停止",
    "cut: the longest reply or the context is full": "已截断：达到最大长度或上下文已满",
    "the oldest {n} messages no longer fit and were left out": "最早的 {n} 条消息放不下，已略去",
    "There is no trained model in saves/ yet; train one, or name a model's folder.": (
        "saves/ 中还没有训练好的模型；请先训练，或填写模型文件夹。"
    ),
    "Say something, or begin with one of these": "说点什么，或从下面选一句",
    "Who are you?": "你是谁？",
    "What is the capital of France?": "法国的首都是哪里？",
    "Enter sends, Shift+Enter starts a new line. Click a message to choose its turn; the pencil changes it.": (
        "回车发送，Shift+回车换行。点击一条消息即选中该轮；铅笔可修改文字。"
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The one model in memory

_busy = threading.Lock()  # held while a model is loaded or answers
_loaded: tuple[object, Engine] | None = None
_asked: dict[str, Asked] = {}  # by the browser's session


@dataclasses.dataclass
class Asked:
    """What one browser waits for; `stop` ends it from another thread."""

    stopped: bool = False
    instead: Callable[[], dict[Any, Any]] | None = None  # what is shown now, as something else was asked meanwhile
    reply: Reply | None = None
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def stop(self) -> None:
        self.stopped = True
        if self.reply:
            self.reply.cancel()


def stop(request: gr.Request) -> None:
    """Ends the reply that this browser waits for: its Stop button, or it went away."""
    if asked := _asked.get(request.session_hash):
        asked.stop()


def _drop(request: gr.Request, instead: Callable[[], dict[Any, Any]]) -> bool:
    """Ends the reply that this browser waits for, if any; returns once it has ended.

    Its last word is what `instead` paints: Gradio may send that after all that the caller shows from now on.
    """
    asked = _asked.pop(request.session_hash, None)
    if asked:
        asked.instead = instead
        asked.stop()
        asked.ended.wait(10)
    return asked is not None


def unload() -> None:
    """Frees the memory of the model, once the reply it gives has ended."""
    with _busy:
        _forget()


def make_room() -> None:
    """Ends every reply and frees the memory of the model, for a script that needs the card."""
    for asked in list(_asked.values()):
        asked.stop()
    unload()


def _forget() -> None:
    global _loaded
    _loaded = None
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def _key(source: Source, with_base: bool) -> object:
    """Tells whether a loaded model is still what is meant: a run may have been trained again meanwhile."""
    file = Path(source.adapter, "adapter_model.safetensors") if source.adapter else Path(source.model)
    return source.name, str(source.config), file.stat().st_mtime_ns, with_base


def _engine(source: Source, with_base: bool) -> Engine:
    """The engine of a source; the one before is freed first, as two may not fit on a card. The caller holds `_busy`."""
    global _loaded
    key = _key(source, with_base)
    if _loaded is None or _loaded[0] != key:
        _forget()
        _loaded = key, load(source, with_base=with_base)
    return _loaded[1]


def is_loaded(source: Source, with_base: bool) -> bool:
    return _loaded is not None and _loaded[0] == _key(source, with_base)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """What a device says when its memory is full, as a sentence."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        _forget()
        raise UserError(
            "the model does not fit into the memory that is free; end a training that runs, or load it in 4 bit: "
            "quantization_bit=4"
        ) from None


def targets() -> list[tuple[str, str]]:
    """What can be talked to, newest first: (what is shown, the path) of runs, their merged models and GGUF files."""
    found = []
    for run in run_folders():
        places = [run] if (run / "adapter_config.json").is_file() else []
        places += [run / "merged"] if (run / "merged" / "config.json").is_file() else []
        found += [
            (str(path.relative_to(common.SAVES)), str(path)) for path in (*places, *sorted(run.glob("gguf/*.gguf")))
        ]
    models = sorted(path.parent for path in Path("models").glob("[!.]*/config.json"))
    return found + [(str(path), str(path)) for path in models]


# ---------------------------------------------------------------------------------------------------------------------
# A reply


def _pieces(reply: Reply) -> Iterator[str]:
    """What came of a reply since the last time, every PAINT seconds; the model goes on while the page is painted."""
    came: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for piece in reply:
                came.put(piece)
            came.put(None)
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that paints
            came.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        text, painted = "", time.monotonic()
        while (piece := came.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            if time.monotonic() - painted >= PAINT:
                yield text
                text, painted = "", time.monotonic()
        if text:
            yield text
    finally:
        reply.cancel()
        thread.join()


def summary(reply: Reply, t: Callable[..., str]) -> str:
    """How a reply came, in one line."""
    told = [t("{n} tokens", n=reply.completion_tokens)]
    if reply.tokens_per_second:
        told.append(t("{speed:.1f} tokens/s", speed=reply.tokens_per_second))
    if reply.completion_tokens:
        told.append(t("first after {seconds:.2f} s", seconds=reply.first_token_seconds))
    if reply.finish_reason == "cancelled":
        told.append(t("stopped"))
    if reply.finish_reason == "length":
        told.append(t("cut: the longest reply or the context is full"))
    if reply.dropped_messages:
        told.append(t("the oldest {n} messages no longer fit and were left out", n=reply.dropped_messages))
    return " · ".join(told)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(language: str, source: Source | None = None, tab: gr.Tab | None = None) -> None:
    """The page's components, inside an open gr.Blocks or gr.Tab. `source`: the only target; None: one is chosen.

    Whenever `tab` is opened, what was trained meanwhile can be chosen.
    """
    ChatPage(language, source, tab)


class ChatPage:
    """The components of one language's page and what they do; what belongs to a browser is in gr.State alone."""

    def __init__(self, language: str, source: Source | None, tab: gr.Tab | None) -> None:
        self.t = theme.translator(language, WORDS)
        self.source, self.tab = source, tab
        self.titles = {
            "thought": self.t("Thinking"),
            "call": self.t("Tool call"),
            "result": self.t("A tool's result"),
            "empty": self.t("(an empty reply)"),
        }
        self.turns = gr.State([])
        self.chosen = gr.State(None)  # the number of a turn that was clicked
        self.offered = gr.State([])  # the targets that the page has offered
        with gr.Row(elem_classes="chat-columns"):
            with gr.Column(scale=3, min_width=320):
                self.place_talk()
            with gr.Column(scale=1, min_width=290):
                self.place_controls()
        self.connect()

    # ---- components

    def place_talk(self) -> None:
        t = self.t
        examples = [{"text": t(text)} for text in ("Who are you?", "What is the capital of France?")]
        with gr.Row(elem_classes="voices"):
            self.voices = {}
            for voice in ("base", "trained"):
                self.voices[voice] = gr.Chatbot(
                    label=t(LABELS[voice]),
                    show_label=False,
                    visible=voice == "trained",
                    height="calc(100dvh - 300px)",
                    min_height=320,
                    min_width=280,
                    editable="all",
                    feedback_options=None,
                    buttons=["copy"],
                    allow_tags=False,
                    placeholder=t("Say something, or begin with one of these"),
                    examples=examples,
                    elem_id=f"chat-{voice}",
                    elem_classes="talk",
                )
        self.loading = gr.HTML(elem_classes="said", elem_id="chat-loading")
        self.remark = gr.HTML(elem_classes="said", elem_id="chat-remark")
        self.fault = gr.HTML(elem_classes="said", elem_id="chat-fault")
        self.role = gr.Radio(
            [(t("A user's message"), "user"), (t("A tool's result"), "tool")],
            value="user",
            label=t("Send as"),
            visible=False,
            elem_id="chat-role",
        )
        self.box = gr.Textbox(
            label=t("Message"),
            show_label=False,
            placeholder=t("Write a message"),
            lines=1,
            max_lines=10,
            submit_btn=t("Send"),
            autofocus=True,
            elem_id="chat-box",
        )
        with gr.Row(elem_classes="small-buttons"):
            self.again = gr.Button(t("Answer again"), size="sm", elem_id="chat-again")
            self.delete = gr.Button(t("Delete the last turn"), size="sm", elem_id="chat-delete")
            self.new = gr.Button(t("New conversation"), size="sm", elem_id="chat-new")
        hint = "Enter sends, Shift+Enter starts a new line. Click a message to choose its turn; the pencil changes it."
        gr.HTML(theme.note(t(hint)), elem_classes="said")

    def place_controls(self) -> None:
        t = self.t
        if self.source is None:
            choices = targets()
            with gr.Group():
                self.target = gr.Dropdown(
                    choices,
                    value=choices[0][1] if choices else None,
                    label=t("Model"),
                    info=t("a run, a model folder, a hub name or a GGUF"),
                    allow_custom_value=True,
                    elem_id="chat-target",
                )
            with gr.Row(elem_classes="small-buttons"):
                self.refresh = gr.Button(t("Refresh"), size="sm")
                self.free = gr.Button(t("Free its memory"), size="sm")
        else:
            self.target = gr.State(None)
        self.with_base = gr.Checkbox(label=t("Side by side with the model before training"), elem_id="chat-with-base")
        self.system = gr.Textbox(
            label=t("System prompt"),
            placeholder=self.default_system() or t("what the model should know or how it should answer"),
            lines=2,
            max_lines=8,
            elem_id="chat-system",
        )
        with gr.Accordion(t("Sampling"), open=False):
            self.place_sampling()
        with gr.Accordion(t("Tools"), open=False):
            self.tools = gr.Code(
                label=t("Functions the model may call, as JSON"), language="json", lines=4, elem_id="chat-tools"
            )
        with gr.Accordion(t("Save as training data"), open=False):
            self.place_saving()

    def default_system(self) -> str | None:
        return self.source.config.default_system if self.source else None

    def place_sampling(self) -> None:
        t, first = self.t, self.first_settings()
        self.sampling = {
            "temperature": gr.Slider(
                0, 2, first.temperature, step=0.05, label=t("Temperature"), info=t("0: always the likeliest word")
            ),
            "top_p": gr.Slider(0, 1, first.top_p, step=0.01, label=t("Top p")),
            "top_k": gr.Slider(0, 200, first.top_k, step=1, label=t("Top k"), info=t("0: off")),
            "min_p": gr.Slider(0, 0.5, first.min_p, step=0.01, label=t("Min p")),
            "repetition_penalty": gr.Slider(0.5, 2, first.repetition_penalty, step=0.01, label=t("Repetition penalty")),
            "presence_penalty": gr.Slider(-2, 2, first.presence_penalty, step=0.1, label=t("Presence penalty")),
            "frequency_penalty": gr.Slider(-2, 2, first.frequency_penalty, step=0.1, label=t("Frequency penalty")),
            "max_new_tokens": gr.Number(
                first.max_new_tokens, label=t("Longest reply, in tokens"), precision=0, minimum=1
            ),
            "seed": gr.Textbox(label=t("Seed"), info=t("empty: a new one each time")),
            "stop": gr.Textbox(
                label=t("Stop texts"), info=t("one a line; the reply ends before any of them"), lines=1, max_lines=5
            ),
        }

    def first_settings(self) -> Settings:
        """The settings that the page starts with: those of the target's configuration."""
        with contextlib.suppress(UserError):
            return Settings.of((self.source or find()).config)
        return Settings()

    def place_saving(self) -> None:
        t = self.t
        self.form = gr.Radio(list(conversation.FORMS), value="openai", label=t("Form"), elem_id="chat-form")
        self.download = gr.Button(t("Download"), size="sm", elem_id="chat-download")
        self.name = gr.Textbox("chats", label=t("Name of the dataset"), elem_id="chat-name")
        self.add = gr.Button(t("Add to data/"), size="sm", elem_id="chat-add")
        self.line = gr.Code(
            label=t("Its line in dataset_info.json"), language="json", wrap_lines=True, lines=2, elem_id="chat-line"
        )
        self.saved = gr.HTML(elem_classes="said", elem_id="chat-saved")
        self.file = gr.Textbox(visible=False)

    # ---- what happens

    def connect(self) -> None:
        asking = {self.turns, self.chosen, self.target, self.with_base, self.system, self.tools, self.box, self.role}
        asking |= set(self.sampling.values())
        painted = [*self.voices.values(), self.turns, self.chosen, self.remark, self.fault, self.box, self.role]
        painted += [self.delete]
        run = {"inputs": asking, "outputs": painted, "show_progress": "hidden", "concurrency_limit": None}
        self.box.submit(self.say, **run)
        self.again.click(self.say_again, **run)
        self.box.stop(stop, None, None, queue=False, show_progress="hidden")
        self.delete.click(self.delete_turn, [self.turns, self.chosen], painted, show_progress="hidden")
        self.new.click(self.start_anew, None, painted, show_progress="hidden")
        for voice, chatbot in self.voices.items():
            chatbot.retry(self.say_again, **run)
            chatbot.undo(self.delete_turn, [self.turns, self.chosen], painted, show_progress="hidden")
            chatbot.clear(self.start_anew, None, painted, show_progress="hidden")
            chatbot.example_select(self.say_example, **run)
            chatbot.select(self.chooser(voice), self.turns, [self.chosen, self.delete], show_progress="hidden")
            chatbot.edit(self.editor(voice), **{**run, "concurrency_limit": 1})
        self.with_base.change(self.show_voices, self.with_base, [*self.voices.values()], show_progress="hidden")
        self.tools.change(lambda text: gr.update(visible=bool(text)), self.tools, self.role, show_progress="hidden")
        self.connect_saving()
        if self.source is None:
            self.connect_targets()
        else:
            gr.context.Context.root_block.load(self.load, self.with_base, self.loading, show_progress="hidden")

    def show_voices(self, with_base: bool) -> list[Any]:
        """One voice without its name, or two with theirs."""
        return [gr.update(visible=with_base or voice == "trained", show_label=with_base) for voice in self.voices]

    def connect_targets(self) -> None:
        self.refresh.click(lambda: gr.update(choices=targets()), None, self.target, show_progress="hidden")
        self.free.click(self.free_memory, None, self.remark)
        opened = {"fn": self.first_target, "inputs": self.offered}
        opened["outputs"] = [self.target, self.offered, self.fault]
        gr.context.Context.root_block.load(**opened)
        if self.tab:
            self.tab.select(**opened, show_progress="hidden")
        self.target.change(self.settings_of, self.target, [self.fault, *self.sampling.values()], show_progress="hidden")

    def connect_saving(self) -> None:
        row = [self.turns, self.system, self.tools, self.form, self.name]
        save = "(text, name) => { if (!text) return; const a = document.createElement('a');"
        save += "a.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));"
        save += "a.download = `${name || 'chats'}.json`; a.click(); URL.revokeObjectURL(a.href); }"
        made = self.download.click(self.make_file, row, [self.file, self.line, self.saved], show_progress="hidden")
        made.then(None, [self.file, self.name], None, js=save)
        self.add.click(self.add_to_data, row, [self.line, self.saved], show_progress="hidden")

    def say(self, given: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Puts the message of the box to every voice."""
        text = given[self.box].strip()
        if not text:
            yield {self.fault: ""}
            return
        role = given[self.role] if given[self.tools] else "user"
        yield from self.answer([*given[self.turns], {"role": role, "text": text}], given, request)

    def say_example(self, given: dict[Any, Any], event: gr.SelectData, request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from self.answer([{"role": "user", "text": event.value["text"]}], given, request)

    def say_again(self, given: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Answers the chosen turn again, or the last; what came after it is gone."""
        turns, chosen = given[self.turns], given[self.chosen]
        if not turns:
            yield {self.fault: ""}
            return
        number = len(turns) - 1 if chosen is None else min(chosen, len(turns) - 1)
        yield from self.answer([*turns[:number], _unanswered(turns[number])], given, request)

    def editor(self, voice: str) -> Callable[..., Iterator[dict[Any, Any]]]:
        """A changed question is answered again; a changed answer stays as it was written."""

        def edit(given: dict[Any, Any], event: gr.EditData, request: gr.Request) -> Iterator[dict[Any, Any]]:
            turns = [dict(turn) for turn in given[self.turns]]
            number, part = conversation.place(turns, voice, event.index)
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
            number, _ = conversation.place(turns, voice, event.index)
            return number, gr.update(value=self.t("Delete turn {n}", n=number + 1))

        return choose

    def delete_turn(self, turns: list[Turn], chosen: int | None, request: gr.Request) -> dict[Any, Any]:
        """Takes out the chosen turn, or the last; one that is being answered is the last."""
        if _drop(request, lambda: self.paint(turns) | {self.remark: ""}):
            return self.paint(turns) | {self.remark: ""}
        number = len(turns) - 1 if chosen is None else chosen
        return self.paint([turn for i, turn in enumerate(turns) if i != number]) | {self.remark: ""}

    def start_anew(self, request: gr.Request) -> dict[Any, Any]:
        _drop(request, lambda: self.paint([]) | {self.remark: ""})
        return self.paint([]) | {self.remark: ""}

    def paint(self, turns: list[Turn], streaming: bool = False) -> dict[Any, Any]:
        """Every component that shows the conversation, as it now is."""
        made: dict[Any, Any] = {
            chatbot: conversation.shown(turns, voice, self.titles, streaming) for voice, chatbot in self.voices.items()
        }
        if not streaming:
            last = turns[-1].get("trained", "") if turns else ""
            made[self.role] = gr.update(value="tool" if conversation.calls(last) else "user")
            made |= {self.turns: turns, self.chosen: None, self.fault: ""}
            made |= {self.delete: gr.update(value=self.t("Delete the last turn")), self.box: self.ready()}
        return made

    def ready(self, **changes: Any) -> Any:
        """The box when nothing is being answered."""
        return gr.update(submit_btn=self.t("Send"), stop_btn=False, **changes)

    def answer(self, turns: list[Turn], given: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Every voice answers the last turn; where that cannot be, it is taken back and its text stands in the box."""

        def begin() -> dict[Any, Any]:
            waiting = gr.update(value="", submit_btn=False, stop_btn=self.t("Stop"))
            return self.paint(turns, streaming=True) | {self.box: waiting, self.fault: "", self.remark: ""}

        _drop(request, begin)
        asked = _asked[request.session_hash] = Asked()
        try:
            yield begin()
            yield from self.growing(turns, given, asked)
        finally:
            asked.ended.set()
            if _asked.get(request.session_hash) is asked:
                del _asked[request.session_hash]

    def growing(self, turns: list[Turn], given: dict[Any, Any], asked: Asked) -> Iterator[dict[Any, Any]]:
        """The answers as they grow, and at last how the page stays."""
        before, told = given[self.turns], ""
        try:
            settings = self.read_settings(given)
            tools = conversation.read_tools(given[self.tools])
            with _in_words():
                for painted, told in self.replies(turns, given, settings, tools, asked):
                    if asked.instead:
                        break
                    yield self.paint(painted, streaming=True) | {self.remark: theme.note(told)}
                    turns = painted
            last = self.paint(turns) | {self.remark: theme.note(told)}
        except UserError as error:
            box = self.ready(value=turns[-1]["text"]) if len(turns) > len(before) else self.ready()
            last = self.paint(before) | {self.box: box, self.fault: theme.fault(error), self.remark: ""}
        yield asked.instead() if asked.instead else last

    def replies(
        self, turns: list[Turn], given: dict[Any, Any], settings: Settings, tools: Any, asked: Asked
    ) -> Iterator[tuple[list[Turn], str]]:
        """The conversation as the answers to its last turn grow, and what is told about it."""
        t, with_base = self.t, given[self.with_base]
        source = self.find(given[self.target])
        if with_base and source.adapter is None:
            text = "{name} has its training in its weights, so the model before it is not there; choose the run itself."
            raise UserError(t(text, name=source.name))
        while not _busy.acquire(timeout=0.3):
            if _loaded is None:
                yield turns, t("loading {name} ...", name=source.name)
            else:
                yield turns, t("another page is being answered; waiting ...")
            if asked.stopped:
                return
        try:
            if not is_loaded(source, with_base):
                yield turns, t("loading {name} ...", name=source.name)
            model = _engine(source, with_base)
            if tools and tool_calls.style_of(model) is None:
                raise UserError(t("this model's chat template has no tools; empty that field, or choose another model"))
            told = []
            for voice in ("base", "trained") if with_base else ("trained",):
                speaker, said = model.base if voice == "base" else model, ""
                heard = conversation.messages(turns[:-1], voice, given[self.system])
                heard.append({"role": turns[-1]["role"], "content": turns[-1]["text"]})
                reply = asked.reply = speaker.stream(heard, settings, tools)
                if asked.stopped:
                    reply.cancel()
                for piece in _pieces(reply):
                    said += piece
                    yield [*turns[:-1], {**turns[-1], voice: said}], "\n".join(told)
                turns = [*turns[:-1], {**turns[-1], voice: said}]
                told.append(f"{t(LABELS[voice])}: {summary(reply, t)}" if with_base else summary(reply, t))
                yield turns, "\n".join(told)
        finally:
            _busy.release()

    def read_settings(self, given: dict[Any, Any]) -> Settings:
        """The sampling settings; raises UserError for one that is out of range."""
        values = {name: given[component] for name, component in self.sampling.items()}
        seed = str(values["seed"] or "").strip()
        if seed and not seed.isdecimal():
            raise UserError(f"the seed {seed!r} is not a whole number; give one, or leave it empty")
        values["seed"] = int(seed) if seed else None
        values["stop"] = tuple(line for line in (values["stop"] or "").splitlines() if line)
        return Settings(**values)

    def find(self, target: str | None) -> Source:
        if self.source:
            return self.source
        if not target:
            raise UserError(self.t("There is no trained model in saves/ yet; train one, or name a model's folder."))
        return find(target)

    def load(self, with_base: bool) -> Iterator[str]:
        """Loads the only target when the page opens, so that the first reply need not wait for it.

        What it says has a place of its own: it may come after the first message was sent.
        """
        source = self.find(None)
        if is_loaded(source, with_base):
            yield ""
            return
        yield theme.note(self.t("loading {name} ...", name=source.name))
        try:
            with _busy, _in_words():
                _engine(source, with_base)
            yield ""
        except UserError as error:
            yield theme.fault(error)

    def first_target(self, offered: list[str]) -> tuple[Any, list[str], Any]:
        """When the page opens: what can be talked to by now; the newest is chosen where it was not offered before."""
        choices = targets()
        paths = [path for _, path in choices]
        chosen = {"value": paths[0]} if paths and paths[0] not in offered else {}
        nothing = self.t("There is no trained model in saves/ yet; train one, or name a model's folder.")
        told = theme.note(nothing) if not choices else gr.skip() if offered else ""
        return gr.update(choices=choices, **chosen), paths, told

    def settings_of(self, target: str | None) -> list[Any]:
        """The fault of a target, if it has one, and the settings of its configuration."""
        try:
            first = dataclasses.asdict(Settings.of(self.find(target).config))
        except UserError as error:
            return [theme.fault(error), *(gr.skip() for _ in self.sampling)]
        kept = ("seed", "stop")  # a configuration has none
        return ["", *(gr.skip() if name in kept else gr.update(value=first[name]) for name in self.sampling)]

    def free_memory(self) -> str:
        unload()
        return theme.note(self.t("memory is free"))

    # ---- training data

    def make_file(self, turns: list[Turn], system: str, tools: str, form: str, name: str) -> tuple[str, str, str]:
        """The conversation as the text of a data file, the line that registers it, and what is wrong."""
        try:
            row = conversation.row(turns, system, conversation.read_tools(tools), form)
        except UserError as error:
            return "", "", theme.fault(error)
        return conversation.file_text([row]), conversation.registry_line(name or "chats", form, "tools" in row), ""

    def add_to_data(self, turns: list[Turn], system: str, tools: str, form: str, name: str) -> tuple[str, str]:
        try:
            row = conversation.row(turns, system, conversation.read_tools(tools), form)
            count = conversation.add_to_data(row, name, form, folder := Path(common.Config.dataset_dir))
        except UserError as error:
            return "", theme.fault(error)
        text = "Conversations in {file}: {n}. To train on them: dataset={name}"
        told = theme.note(self.t(text, file=folder / f"{name}.json", n=count, name=name))
        return conversation.registry_line(name, form, "tools" in row), told


def _unanswered(turn: Turn) -> Turn:
    return {"role": turn["role"], "text": turn["text"]}


CSS = """
.talk { border-radius: 10px !important; }
.talk .message { font-size: 15px !important; line-height: 1.6; border: none !important; box-shadow: none !important; }
.talk .user.message { background: #e3f2ef !important; border-radius: 12px !important; padding: 8px 14px !important; }
.dark .talk .user.message { background: #123b37 !important; }
.talk .bot.message { background: none !important; padding: 2px 0 !important; }
.talk .message-buttons .icon-button-wrapper { border: none; background: none; box-shadow: none; }
.talk .code_wrap pre { font-size: 13px; }
.voices .talk { min-width: 280px; }
.caption { font-weight: 600; font-size: 14px; }
.voices:has(#chat-base) .talk .bubble-wrap { margin-top: 28px; }
#chat-box textarea { background: none; border: none; box-shadow: none; }
#chat-box button { background: var(--button-primary-background-fill); color: #fff; }
@media (max-width: 640px) { .talk { height: 60dvh !important; } }
"""
