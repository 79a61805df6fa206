"""The components of the chat page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from inference.request import Settings
from runs.target import Target
from runs.texts import Translator
from web import chat_model
from web.widgets import note

VOICES = ("base", "trained")


class ChatLayout:
    """The components, inside an open gr.Blocks or gr.Tab; what belongs to a browser is in gr.State alone."""

    def __init__(self, t: Translator, source: Target | None) -> None:
        self.t, self.source = t, source
        self.turns = gr.State([])
        self.chosen = gr.State(None)  # the number of a turn that was clicked
        self.offered = gr.State([])  # the targets that the page has offered
        with gr.Row(elem_classes="chat-columns"):
            with gr.Column(scale=3, min_width=320):
                self.place_conversation()
                self.place_box()
            with gr.Column(scale=1, min_width=290):
                self.place_target()
                self.place_controls()

    def voice_label(self, voice: str) -> str:
        return self.t("Before training") if voice == "base" else self.t("Trained")

    def place_conversation(self) -> None:
        t = self.t
        examples = [{"text": text} for text in (t("Who are you?"), t("What is the capital of France?"))]
        with gr.Row(elem_classes="voices"):
            self.voices = {}
            for voice in VOICES:
                self.voices[voice] = gr.Chatbot(
                    label=self.voice_label(voice),
                    show_label=False,
                    visible=voice == "trained",
                    height="calc(100dvh - 300px)",
                    min_height=320,
                    min_width=280,
                    editable="all",
                    feedback_options=None,
                    buttons=["copy"],
                    allow_tags=False,
                    placeholder=t("Write something, or begin with one of these"),
                    examples=examples,
                    elem_id=f"chat-{voice}",
                    elem_classes="talk",
                )
        self.loading = gr.HTML(elem_classes="said", elem_id="chat-loading")
        self.remark = gr.HTML(elem_classes="said", elem_id="chat-remark")
        self.fault = gr.HTML(elem_classes="said", elem_id="chat-fault")

    def place_box(self) -> None:
        t = self.t
        roles = [(t("A user's message"), "user"), (t("A tool's result"), "tool")]
        self.role = gr.Radio(roles, value="user", label=t("Send as"), visible=False, elem_id="chat-role")
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
        hint = t(
            "Enter sends, Shift+Enter starts a new line. Click a message to choose its turn; the pencil changes it."
        )
        gr.HTML(note(hint), elem_classes="said")

    def place_target(self) -> None:
        t = self.t
        if self.source is not None:
            self.target = gr.State(None)
            return
        choices = chat_model.targets()
        with gr.Group():
            self.target = gr.Dropdown(
                choices,
                value=choices[0][1] if choices else None,
                label=t("Model"),
                info=t("a run, a model folder, a hub name or a GGUF"),
                allow_custom_value=True,
                elem_id="chat-target",
            )
        self.free = gr.Button(t("Free its memory"), size="sm")

    def place_controls(self) -> None:
        t = self.t
        self.with_base = gr.Checkbox(label=t("Side by side with the model before training"), elem_id="chat-with-base")
        default_system = self.source.config.default_system if self.source else None
        self.system = gr.Textbox(
            label=t("System prompt"),
            placeholder=default_system or t("what the model should know or how it should answer"),
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

    def place_sampling(self) -> None:
        t, first = self.t, Settings.of(self.source.config) if self.source else Settings()
        greedy = t("0: always the likeliest token")
        stop = {"label": t("Stop texts"), "info": t("one a line; the reply ends before any of them")}
        longest = t("Longest reply, in tokens")
        self.sampling: dict[str, Any] = {
            "temperature": gr.Slider(0, 2, first.temperature, step=0.05, label=t("Temperature"), info=greedy),
            "top_p": gr.Slider(0, 1, first.top_p, step=0.01, label=t("Top p")),
            "top_k": gr.Slider(0, 200, first.top_k, step=1, label=t("Top k"), info=t("0: off")),
            "min_p": gr.Slider(0, 0.5, first.min_p, step=0.01, label=t("Min p")),
            "repetition_penalty": gr.Slider(0.5, 2, first.repetition_penalty, step=0.01, label=t("Repetition penalty")),
            "presence_penalty": gr.Slider(-2, 2, first.presence_penalty, step=0.1, label=t("Presence penalty")),
            "frequency_penalty": gr.Slider(-2, 2, first.frequency_penalty, step=0.1, label=t("Frequency penalty")),
            "max_new_tokens": gr.Number(first.max_new_tokens, label=longest, precision=0, minimum=1),
            "seed": gr.Textbox(label=t("Seed"), info=t("empty: a new one each time")),
            "stop": gr.Textbox(**stop, lines=1, max_lines=5),
        }

    def place_saving(self) -> None:
        t = self.t
        self.name = gr.Textbox("chats", label=t("Name of the dataset"), elem_id="chat-name")
        self.add = gr.Button(t("Add to data/"), size="sm", elem_id="chat-add")
        self.saved = gr.HTML(elem_classes="said", elem_id="chat-saved")
