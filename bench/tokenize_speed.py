"""Rows to token ids and labels: this kit beside LLaMA-Factory 0.9.5, on the same rows, in tokens a CPU-second.

    python bench/tokenize_speed.py [ROWS] [--only kit]      default 20,000 rows of about 0.8 KB

Both read the same JSON lines (English, Chinese, code; made from a seed) from the disk into their own cache with the
same tokenizer (the embedded model's) and the same ChatML template, in a fresh process each. CPU seconds and memory are
of the reading alone, child processes included, imports excluded. LLaMA-Factory is installed from PyPI into a
throw-away environment beside this kit's packages, so both run the same tokenizers and datasets.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PEER = ["llamafactory==0.9.5", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3"]
CHINESE = (
    "这是当前账户和其他账户的交易数据请对它作出判断我们今天学习如何训练语言模型并且把它部署到服务器上数据的质量最重要"
)

MEASURE = """
import json, os, resource, sys, threading, time
def usage():
    both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in both)
def anonymous():  # MB this process and its children own; pages of mapped files can be dropped at any time
    pids, total = [os.getpid()], 0
    for pid in pids:
        try:
            pids += map(int, open(f"/proc/{pid}/task/{pid}/children").read().split())
            total += next(int(l.split()[1]) for l in open(f"/proc/{pid}/status") if l.startswith("RssAnon"))
        except (OSError, StopIteration):
            pass
    return total / 1024
peak, stop = [0.0], threading.Event()
def watch():
    while not stop.wait(0.2):
        peak[0] = max(peak[0], anonymous())
def measure(work):
    threading.Thread(target=watch, daemon=True).start()
    started, cpu = time.time(), usage()
    tokens, rows = work()
    cpu, seconds = usage() - cpu, time.time() - started
    stop.set()
    peak[0] = max(peak[0], anonymous())
    print("RESULT " + json.dumps({"tokens": tokens, "rows": rows, "cpu": cpu, "seconds": seconds, "peak": peak[0]}))
"""
KIT = """
sys.path.insert(0, {root!r})
from transformers import AutoTokenizer
import common, datasets, pathlib
from preprocessing import dataset
from preprocessing.template import load_template
common.CACHE = pathlib.Path({cache!r})
tokenizer = AutoTokenizer.from_pretrained({model!r})
chatml = load_template("chatml", tokenizer)
config = common.Config(dataset=({data!r},), dataset_dir="none", cutoff_len=2048, val_size=0)
def work():
    prepared = dataset.prepare(config, tokenizer, chatml)
    return int(prepared.train_lengths.sum()), len(prepared.train)
measure(work)
"""
LLAMA_FACTORY = """
from llamafactory.data.loader import get_dataset
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from transformers import AutoTokenizer
model, data, training, _, _ = get_train_args(dict(
    stage="sft", do_train=True, model_name_or_path={model!r}, template="chatml", dataset="rows", dataset_dir={folder!r},
    cutoff_len=2048, output_dir={cache!r} + "/out", cache_dir={cache!r}, preprocessing_num_workers={workers},
    finetuning_type="lora", report_to="none",
))
tokenizer = AutoTokenizer.from_pretrained({model!r})
template = get_template_and_fix_tokenizer(tokenizer, data)
def work():
    rows = get_dataset(template, model, data, training, "sft", tokenizer)["train_dataset"]
    return sum(len(batch) for part in rows.with_format("arrow").iter(1000) for batch in part["input_ids"]), len(rows)
measure(work)
"""


def write_rows(count: int, path: Path) -> None:
    """Alpaca rows: half English, a quarter Chinese, a quarter code; lengths vary, no two are alike."""
    rng = random.Random(0)
    code = (ROOT / "common.py").read_text(encoding="utf-8").split(" ")
    english = (ROOT / "bench" / "tokenize_speed.py").read_text(encoding="utf-8").split()
    vocabulary = sorted({word for word in english if word.isalpha()}) + ["the", "of", "and", "to", "in", "that"] * 20

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randrange(low, high)))

    def chinese(low: int, high: int) -> str:
        return "".join(rng.choices(CHINESE, k=rng.randrange(low, high)))

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            kind = number % 4
            if kind < 2:
                row = {"instruction": f"Question {number}: {words(8, 40)}", "input": "", "output": words(60, 300)}
            elif kind == 2:
                row = {"instruction": chinese(20, 60), "input": chinese(0, 40), "output": chinese(60, 300)}
            else:
                start = rng.randrange(len(code) - 200)
                row = {"instruction": f"Case {number}", "input": "", "output": " ".join(code[start : start + 160])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def peer_python(folder: Path) -> Path:
    """The interpreter of an environment with LLaMA-Factory on top of this one's packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        library = next((folder / "lib").glob("python*")) / "site-packages"
        (library / "kit.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
        (library / "torchaudio.py").touch()  # imported, never used for text
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PEER], check=True)
    return python


def run(python: Path | str, code: str) -> dict[str, float]:
    environment = os.environ | {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", MEASURE + code], capture_output=True, text=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(done.stderr[-3000:])
    return json.loads(found[0].removeprefix("RESULT "))


def main(argv: list[str]) -> None:
    count = next((int(argument) for argument in argv if argument.isdigit()), 20_000)
    with tempfile.TemporaryDirectory(prefix="tokenize-speed-") as temporary:
        folder = Path(temporary)
        data = folder / "rows.jsonl"
        write_rows(count, data)
        (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.jsonl"}}')
        facts = {"root": str(ROOT), "model": str(MODEL), "data": str(data), "folder": str(folder)}
        runs = [
            ("this kit, first run", sys.executable, KIT, {}, "kit"),
            ("this kit, from its cache", sys.executable, KIT, {}, "kit"),
        ]
        if "--only" not in argv:
            python = peer_python(Path(tempfile.gettempdir()) / "lf-venv")
            runs += [(f"LLaMA-Factory, {n} workers", python, LLAMA_FACTORY, {"workers": n}, f"lf{n}") for n in (1, 2)]
        print(f"{count:,} rows, {data.stat().st_size / 1e6:,.0f} MB of JSON lines, {os.cpu_count()} cores")
        print(f"{'':<28}{'rows':>10}{'tokens':>13}{'CPU s':>8}{'wall s':>8}{'tokens/CPU s':>14}{'own memory MB':>15}")
        for name, python, code, more, cache in runs:
            result = run(python, code.format(**facts, **more, cache=str(folder / cache)))
            rate = result["tokens"] / result["cpu"]
            print(
                f"{name:<28}{result['rows']:>10,}{result['tokens']:>13,}{result['cpu']:>8.1f}{result['seconds']:>8.1f}"
                f"{rate:>14,.0f}{result['peak']:>15,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
