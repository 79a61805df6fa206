"""The page Export: what is made of a run to be used elsewhere, with its sizes and what was verified."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import common
from common import UserError
from runs.target import missing_from_model
from runs.texts import Translator
from training import memory
from web import control, jobs, widgets
from web.control import read_json, run_folder
from web.widgets import QUIET, heading, link, note, size, table

# GGUF types in the order of their size, with bits a weight; quantize.py --help has all.
TYPES = {"f16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9, "iq4_xs": 4.5, "q3_k_m": 4.0, "q2_k": 3.2}
USUAL = "q4_k_m"
BLOCK = 256  # a row's length must be a multiple of it for the types below q8_0


def base_of(folder: Path) -> Path:
    return Path((control.read_run(folder) or {}).get("model", common.EMBEDDED_MODEL))


def type_choices(name: str | None, t: Translator) -> list[tuple[str, str]]:
    """The GGUF types with their expected sizes and a word on each."""
    words = {"f16": t("16 bit, exact"), "q8_0": t("nearly exact"), USUAL: t("the usual choice"), "q2_k": t("coarse")}
    shapes = memory.tensor_shapes(base_of(run_folder(name))).values() if name else ()
    count = sum(math.prod(shape) for shape in shapes)
    ragged = any(shape[-1] % BLOCK for shape in shapes if len(shape) > 1)
    labels = []
    for kind, bits in TYPES.items():
        least = ragged and bits < 8.5  # llama.cpp gives such rows a coarser type, of more bits
        about = f"{t('at least') if least else t('about')} {size(count * bits / 8)}" if count else ""
        labels.append((" · ".join(filter(None, (kind, about, words.get(kind, "")))), kind))
    return labels


def files_html(name: str | None, t: Translator) -> str:
    """Everything a run can be used as, with its size: base, adapter, merged model, GGUF files."""
    if not name:
        return widgets.train_first(t)
    folder = run_folder(name)
    base, merged, ggufs = base_of(folder), folder / "merged", read_json(folder / "gguf" / "gguf.json").get("files", {})
    whole = memory.model_bytes(base)

    def share(count: float) -> str:
        return f"{count / whole:.0%}" if whole else "–"

    rows = []
    if whole:
        rows.append([t("base model"), f"<code>{escape(str(base))}</code>", size(whole), "100%"])
    adapter = folder / "adapter_model.safetensors"
    count = adapter.stat().st_size
    rows.append([t("adapter"), link(adapter, adapter.name, download=True), size(count), share(count)])
    if missing_from_model(merged) == []:
        files = " ".join(link(f, f.name, download=True) for f in sorted(merged.glob("*.safetensors")))
        count = memory.model_bytes(merged)
        rows.append([t("merged model"), f"<code>{escape(str(merged))}</code><br>{files}", size(count), share(count)])
    for file, record in sorted(ggufs.items(), key=lambda item: -item[1]["bytes"]):
        path = folder / "gguf" / file
        if path.is_file():
            modelfile = path.with_suffix(".Modelfile")
            more = " · " + link(modelfile, "Modelfile", download=True) if modelfile.is_file() else ""
            links = link(path, file, download=True) + more
            rows.append([f"GGUF {escape(record['type'])}", links, size(record["bytes"]), share(record["bytes"])])
    return table(["", t("files"), t("size"), t("of the base")], rows, first_left=2)


def proof_html(name: str | None, t: Translator) -> str:
    """What merge.py and quantize.py measured of the files they made."""
    if not name:
        return ""
    folder = run_folder(name)
    merge, ggufs = read_json(folder / "merged" / "merge.json"), read_json(folder / "gguf" / "gguf.json")
    return merge_html(merge, t) + gguf_html(list(ggufs.get("files", {}).values()), t)


def merge_html(merge: dict[str, Any], t: Translator) -> str:
    """What merge.json says of the merged model."""
    if not merge:
        return ""
    rows = [[t("tensors of the adapter, each used exactly once"), f"{merge['adapter_tensors']}"]]
    rows.append([t("type of the weights"), escape(merge["dtype"])])
    if proof := merge.get("proof"):
        rows += [
            [t("prompts compared with base + adapter"), f"{proof['prompts']}"],
            [t("difference of the logits (rms)"), f"{proof['difference']:.2g}"],
            [t("difference from rounding alone"), f"{proof['rounding']:.2g}"],
            [t("same first token"), f"{proof['same_first_choice']:.1%}"],
        ]
    else:
        rows.append([t("answers compared"), t("no")])
    return heading(t("Merged model: what was verified"), table(["", ""], rows))


def gguf_html(records: list[dict[str, Any]], t: Translator) -> str:
    """What gguf.json says of the GGUF files, the largest first."""
    if not records:
        return ""
    head = [t("type"), t("same tokens"), t("KL divergence"), t("same first token"), t("perplexity"), t("tokens/s")]
    rows = []
    if measured := [record for record in records if record.get("verified")]:
        rows.append([t("16-bit model"), "", "", "", f"{measured[0]['reference_perplexity']:.3f}", ""])
    for record in sorted(records, key=lambda record: -record["bytes"]):
        if record.get("verified"):
            cells = ["✓" if record.get("tokens_equal") else "✗", f"{record['kl_divergence']:.4f}"]
            cells += [f"{record['top1_agreement']:.1%}", f"{record['perplexity']:.3f}"]
            rows.append([escape(record["type"]), *cells, f"{record['tokens_per_second']:.0f}"])
        else:
            rows.append([escape(record["type"]), t("not verified"), "", "", "", ""])
    return heading(t("GGUF: measured with llama.cpp"), table(head, rows))


def modelfile_text(name: str | None) -> str:
    """The Modelfile of the run's newest GGUF."""
    if not name:
        return ""
    found = sorted((run_folder(name) / "gguf").glob("*.Modelfile"), key=lambda path: path.stat().st_mtime)
    return found[-1].read_text(encoding="utf-8") if found else ""


def start_export(
    name: str | None, kind: str, types: Sequence[str], overwrite: bool, verify: bool, language: str
) -> None:
    """Starts merge.py or quantize.py (`kind`) for a run; raises UserError where nothing is chosen."""
    if not name:
        raise UserError("there is no trained run yet; train one first")
    if kind == "quantize" and not types:
        raise UserError("no GGUF type is chosen; choose one")
    folder = run_folder(name)
    script = ["merge.py", str(folder)] if kind == "merge" else ["quantize.py", str(folder), "--type", ",".join(types)]
    flags = ["--overwrite"] * overwrite + ["--no-verify"] * (not verify)
    control.start_command(control.job_folder(folder, kind), [*script, *flags], language)


class ExportPage:
    """The components, inside an open gr.Tab, and what they do."""

    def __init__(self, t: Translator) -> None:
        self.t = t
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=330):
                self.place_start()
            with gr.Column(scale=7, min_width=330):
                self.files = gr.HTML(elem_id="export-files", padding=False)
                self.job = gr.HTML(elem_id="export-state", padding=False)
                self.proof = gr.HTML(elem_id="export-proof", padding=False)
                with gr.Accordion("Modelfile", open=False, visible=False) as self.fold:
                    self.modelfile = gr.Code(language=None, label="Modelfile", buttons=["copy"], wrap_lines=True)
        self.seen, self.acted, self.timer = gr.State(dict), gr.State(0.0), gr.Timer(2)

    def place_start(self) -> None:
        t = self.t
        self.run = gr.Dropdown([], label=t("Run"), elem_id="export-run")
        gr.HTML(heading(t("Merge"), note(t("One 16-bit model for transformers and vLLM."))), padding=False)
        self.merge = gr.Button(t("Merge"), variant="primary", elem_id="export-merge")
        gr.HTML(heading("GGUF", note(t("For llama.cpp and Ollama; merges first where needed."))), padding=False)
        self.types = gr.CheckboxGroup(type_choices(None, t), value=[USUAL], label=t("Types"), elem_id="gguf-types")
        self.quantize = gr.Button(t("Make GGUF"), variant="primary", elem_id="export-gguf")
        with gr.Accordion(t("Options"), open=False, elem_id="export-options"):
            self.verify = gr.Checkbox(True, label=t("Verify: compare the answers with the trained model's"))
            self.overwrite = gr.Checkbox(False, label=t("Replace files that are there"))
        self.stop = gr.Button(t("Stop"), variant="stop", elem_id="export-stop", visible=False)

    def watch(self, name: str | None, shown: dict[str, Any]) -> dict[Any, Any]:
        """What has changed of the run's files."""
        t = self.t
        names, chosen = control.choose_trained(name)
        job, text = control.newest_job(chosen, ("merge", "quantize")), modelfile_text(chosen)
        now = {
            self.run: gr.update(choices=names, value=chosen),
            self.types: gr.update(choices=type_choices(chosen, t)),
            self.files: files_html(chosen, t),
            self.job: widgets.job_box(job, t),
            self.proof: proof_html(chosen, t),
            self.fold: gr.update(visible=bool(text)),
            self.modelfile: text,
            self.stop: gr.update(visible=jobs.is_running(job)),
        }
        return {**widgets.changes(shown, now, {self.run: name}), self.seen: shown}

    def begin(self, kind: str, name: str | None, types: list[str], overwrite: bool, verify: bool) -> float:
        """What the button does that starts merge.py or quantize.py."""
        return widgets.attempt(self.t, start_export, name, kind, types, overwrite, verify, self.t.language)

    def connect(self, blocks: gr.Blocks, tab: gr.Tab) -> None:
        """Connects the events; the page looks at the run every two seconds and when `tab` is opened."""
        chosen = [self.run, self.types, self.overwrite, self.verify]
        for button, kind in ((self.merge, "merge"), (self.quantize, "quantize")):
            button.click(functools.partial(self.begin, kind), chosen, self.acted, **QUIET)
        self.stop.click(lambda name: control.stop_newest(name, ("merge", "quantize")), self.run, **QUIET)
        watched = [self.run, self.types, self.files, self.job, self.proof, self.fold, self.modelfile]
        watched += [self.stop, self.seen]
        # one event for all: of two at a time the older answer could come last
        moments = [blocks.load, tab.select, self.timer.tick, self.run.change, self.acted.change]
        gr.on(moments, self.watch, [self.run, self.seen], watched, trigger_mode="always_last", **QUIET)
