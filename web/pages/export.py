"""The pages Evaluate and Export: what a run has learned, and what is made of it to be used elsewhere."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import common
from common import UserError
from runs.target import missing_from_model
from training import preflight
from web import jobs, theme, widgets
from web.pages import train as train_page
from web.widgets import Translate, link, size, table

# GGUF types in the order of their size, with bits a weight; quantize.py --help has all.
TYPES = {"f16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9, "iq4_xs": 4.5, "q3_k_m": 4.0, "q2_k": 3.2}
USUAL = "q4_k_m"
BLOCK = 256  # a row's length must be a multiple of it for the types below q8_0


def read_json(path: Path) -> dict[str, Any]:
    """A record that a script left, or nothing where there is none yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def chosen_run(name: str | None) -> tuple[list[str], str | None]:
    """The runs that have an adapter, and the one that is looked at: `name`, or the newest."""
    names = widgets.trained(widgets.run_names())
    return names, name if name in names else next(iter(names), None)


# ---------------------------------------------------------------------------------------------------------------------
# Export


def base_of(folder: Path) -> Path:
    return Path((widgets.read_run(folder) or {}).get("model", common.EMBEDDED_MODEL))


def type_choices(name: str | None, t: Translate) -> list[tuple[str, str]]:
    """The GGUF types with their expected sizes and a word on each."""
    words = {"f16": t("16 bit, exact"), "q8_0": t("nearly exact"), USUAL: t("the usual choice"), "q2_k": t("coarse")}
    shapes = preflight.tensor_shapes(base_of(widgets.run_folder(name))).values() if name else ()
    count = sum(math.prod(shape) for shape in shapes)
    ragged = any(shape[-1] % BLOCK for shape in shapes if len(shape) > 1)
    labels = []
    for kind, bits in TYPES.items():
        least = ragged and bits < 8.5  # llama.cpp gives such rows a coarser type, of more bits
        about = f"{t('at least') if least else t('about')} {size(count * bits / 8)}" if count else ""
        labels.append((" · ".join(filter(None, (kind, about, words.get(kind, "")))), kind))
    return labels


def files_html(name: str | None, t: Translate) -> str:
    """Everything a run can be used as, with its size: base, adapter, merged model, GGUF files."""
    if not name:
        return widgets.train_first(t)
    folder = widgets.run_folder(name)
    base, merged, ggufs = base_of(folder), folder / "merged", read_json(folder / "gguf" / "gguf.json").get("files", {})
    whole = preflight.model_bytes(base)

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
        count = preflight.model_bytes(merged)
        rows.append([t("merged model"), f"<code>{escape(str(merged))}</code><br>{files}", size(count), share(count)])
    for file, record in sorted(ggufs.items(), key=lambda item: -item[1]["bytes"]):
        path = folder / "gguf" / file
        if path.is_file():
            modelfile = path.with_suffix(".Modelfile")
            more = " · " + link(modelfile, "Modelfile", download=True) if modelfile.is_file() else ""
            links = link(path, file, download=True) + more
            rows.append([f"GGUF {escape(record['type'])}", links, size(record["bytes"]), share(record["bytes"])])
    return table(["", t("files"), t("size"), t("of the base")], rows, first_left=2)


def proof_html(name: str | None, t: Translate) -> str:
    """What merge.py and quantize.py measured of the files they made."""
    if not name:
        return ""
    folder = widgets.run_folder(name)
    merge = read_json(folder / "merged" / "merge.json")
    ggufs = read_json(folder / "gguf" / "gguf.json").get("files", {})
    parts = []
    if merge:
        used = f"{merge['adapter_tensors_used_once']} / {merge['adapter_tensors']}"
        rows = [
            [t("tensors of the adapter, each used exactly once"), used],
            [t("type of the weights"), escape(merge["dtype"])],
        ]
        if proof := merge.get("proof"):
            rows += [
                [t("prompts compared with base + adapter"), f"{proof['prompts']}"],
                [t("difference of the logits (rms)"), f"{proof['difference']:.2g}"],
                [t("what rounding alone makes"), f"{proof['rounding']:.2g}"],
                [t("same first choice"), f"{proof['same_first_choice']:.1%}"],
            ]
        else:
            rows.append([t("answers compared"), t("no")])
        parts.append(f"<h3>{t('Merged model: what was verified')}</h3>" + table(["", ""], rows))
    measured = [record for record in ggufs.values() if record.get("verified")]
    if ggufs:
        head = [t("type"), t("same tokens"), t("KL divergence"), t("same first choice"), t("perplexity")]
        head += [t("tokens/s")]
        rows = []
        if measured:
            rows.append([t("16-bit model"), "", "", "", f"{measured[0]['reference_perplexity']:.3f}", ""])
        for record in sorted(ggufs.values(), key=lambda record: -record["bytes"]):
            if record.get("verified"):
                cells = [t("yes") if record.get("tokens_equal") else t("no"), f"{record['kl_divergence']:.4f}"]
                cells += [f"{record['top1_agreement']:.1%}", f"{record['perplexity']:.3f}"]
                rows.append([escape(record["type"]), *cells, f"{record['tokens_per_second']:.0f}"])
            else:
                rows.append([escape(record["type"]), t("not verified"), "", "", "", ""])
        parts.append(f"<h3>{t('GGUF: measured with llama.cpp')}</h3>" + table(head, rows))
    return "".join(parts)


def modelfile_text(name: str | None) -> str:
    """The Modelfile of the run's newest GGUF."""
    if not name:
        return ""
    found = sorted((widgets.run_folder(name) / "gguf").glob("*.Modelfile"), key=lambda path: path.stat().st_mtime)
    return found[-1].read_text(encoding="utf-8") if found else ""


def start_export(
    name: str | None, what: str, kinds: Sequence[str], overwrite: bool, verify: bool, t: Translate
) -> None:
    """Starts merge.py or quantize.py for a run; raises UserError where nothing is chosen."""
    if not name:
        raise UserError(t("No trained run yet. Train one first."))
    if what == "quantize" and not kinds:
        raise UserError(t("no GGUF type is chosen; choose one"))
    folder = widgets.run_folder(name)
    script = ["merge.py", str(folder)] if what == "merge" else ["quantize.py", str(folder), "--type", ",".join(kinds)]
    flags = ["--overwrite"] * overwrite + ["--no-verify"] * (not verify)
    widgets.start_script(train_page.job_folder(folder, what), [*script, *flags], t)


def newest_job(name: str | None, kinds: Sequence[str]) -> jobs.Job | None:
    """The script of `kinds` that was started last for a run."""
    if not name:
        return None
    folder = widgets.run_folder(name)
    jobs = [job for kind in kinds if (job := jobs.find(train_page.job_folder(folder, kind)))]
    return max(jobs, key=lambda job: job.created, default=None)


def export_page(t: Translate) -> Callable[[Any], None]:
    """The components of the page Export inside an open gr.Tab. Returns what connects the events, given the tab."""
    import gradio as gr

    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=330):
            run = gr.Dropdown([], label=t("Run"), elem_id="export-run")
            gr.HTML(
                f"<h3>{t('Merge')}</h3>" + theme.note(t("One 16-bit model for transformers and vLLM.")),
                padding=False,
            )
            merge = gr.Button(t("Merge"), variant="primary", elem_id="export-merge")
            gr.HTML(
                "<h3>GGUF</h3>" + theme.note(t("For llama.cpp and Ollama; merges first where needed.")),
                padding=False,
            )
            kinds = gr.CheckboxGroup(type_choices(None, t), value=[USUAL], label=t("Types"), elem_id="gguf-types")
            quantize = gr.Button(t("Make GGUF"), variant="primary", elem_id="export-gguf")
            with gr.Accordion(t("Options"), open=False, elem_id="export-options"):
                verify = gr.Checkbox(True, label=t("Verify: compare the answers with the trained model's"))
                overwrite = gr.Checkbox(False, label=t("Replace files that are there"))
            stop = gr.Button(t("Stop"), variant="stop", elem_id="export-stop", visible=False)
        with gr.Column(scale=7, min_width=330):
            told = gr.HTML(elem_id="export-fault", padding=False)
            files = gr.HTML(elem_id="export-files", padding=False)
            doing = gr.HTML(elem_id="export-state", padding=False)
            proof = gr.HTML(elem_id="export-proof", padding=False)
            with gr.Accordion("Modelfile", open=False, visible=False) as fold:
                modelfile = gr.Code(language=None, label="Modelfile", buttons=["copy"], wrap_lines=True)
    seen, acted, timer = gr.State(dict), gr.State(0.0), gr.Timer(2)

    def watch(name: str | None, shown: dict[str, Any]) -> list[Any]:
        names, chosen = chosen_run(name)
        job, text = newest_job(chosen, ("merge", "quantize")), modelfile_text(chosen)
        now = {
            "run": (names, chosen),
            "told": widgets.at_work(t),
            "kinds": type_choices(chosen, t),
            "files": files_html(chosen, t),
            "doing": widgets.job_box(job, t),
            "proof": proof_html(chosen, t),
            "fold": bool(text),
            "modelfile": text,
            "stop": bool(job) and jobs.state(job) == "running",
        }
        sent = dict(zip(now, widgets.only_changes(shown, **now), strict=True))
        if isinstance(sent["run"], tuple):
            sent["run"] = widgets.offer(names, chosen, name)
        sent["told"] = widgets.outdated(sent["told"])
        if isinstance(sent["kinds"], list):
            sent["kinds"] = gr.CheckboxGroup(choices=now["kinds"])
        if isinstance(sent["fold"], bool):
            sent["fold"] = gr.Accordion(visible=sent["fold"])
        if isinstance(sent["stop"], bool):
            sent["stop"] = gr.Button(visible=sent["stop"])
        return [*sent.values(), shown]

    def begin(what: str) -> Callable[..., tuple[str, float]]:
        def beginning(name: str | None, types: list[str], over: bool, proving: bool) -> tuple[str, float]:
            try:
                start_export(name, what, types, over, proving, t)
            except UserError as error:
                return theme.fault(error), time.time()
            return "", time.time()

        return beginning

    def end(name: str | None) -> None:
        if job := newest_job(name, ("merge", "quantize")):
            jobs.interrupt(job)

    def connect(tab: gr.Tab) -> None:
        from gradio.context import Context

        quiet = {"show_progress": "hidden"}
        for button, what in ((merge, "merge"), (quantize, "quantize")):
            button.click(begin(what), [run, kinds, overwrite, verify], [told, acted], **quiet)
        stop.click(end, run, **quiet)
        watched = [run, told, kinds, files, doing, proof, fold, modelfile, stop, seen]
        # one event for all: of two at a time the older answer could come last
        moments = [Context.root_block.load, tab.select, timer.tick, run.change, acted.change]
        gr.on(moments, watch, [run, seen], watched, trigger_mode="always_last", **quiet)

    return connect
