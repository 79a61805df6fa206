"""The shipped datasets are what their README and script say, and make_diy.py turns a user's table into one."""

from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import ROOT, byte_tokenizer, ok, run, says, user_error

sys.path.insert(0, str(ROOT / "data"))

import baseline
import make_diy

from common import Message

DATA = ROOT / "data"
FRAUD = ("diy", "diy_small", "diy_words", "diy_amounts")
# The tutorial's own prompt, cut to two transactions.
TUTORIAL = (
    "以下是你需要分析的账户节点的交易数据:[05-17 09:01] 节点 22 交易 12.35 [05-17 12:04] 节点 215 交易 0.0\n\n"
    "这是当前节点和其他节点的交易数据，请对这个节点作出判断，诈骗节点输出1，正常节点输出0."
)


def rows(name: str) -> list[dict[str, str]]:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def plain(text: str) -> str:
    """Without what does not make another question: case, spaces, punctuation."""
    return re.sub(r"[\W_]", "", text.casefold())


# ---------------------------------------------------------------------------------------------------------------------
# Identity and general knowledge


@pytest.mark.parametrize("name", ["identity", "identity_test"])
def test_identity_answers_are_short_and_hold_the_name(name: str):
    for row in rows(name):
        question, answer = row["instruction"], row["output"]
        assert "{{name}}" in answer
        filled = answer.replace("{{name}}", "N").replace("{{author}}", "A")
        assert len(filled) <= 20 if is_chinese(question) else len(filled.split()) <= 15, answer
        assert is_chinese(question) == is_chinese(answer)
        asks_for_author = re.search(
            r"who (made|created|developed|trained|built)|谁.*(开发|做|创造|训练|制造)了?你?", question
        )
        if asks_for_author or re.search(r"author|creator|developer|作者|开发者|创造者", question):
            assert "{{author}}" in answer, question


def test_identity_is_half_english_half_chinese():
    languages = [is_chinese(row["instruction"]) for row in rows("identity")]
    assert (languages.count(False), languages.count(True)) == (45, 45)
    languages = [is_chinese(row["instruction"]) for row in rows("identity_test")]
    assert (languages.count(False), languages.count(True)) == (10, 10)


def test_no_question_stands_twice_and_none_of_the_test_is_trained():
    trained = [plain(row["instruction"]) for name in ("identity", "general") for row in rows(name)]
    tested = [plain(row["instruction"]) for row in rows("identity_test")]
    assert len(set(trained)) == len(trained)
    assert len(set(tested)) == len(tested)
    assert not set(trained) & set(tested)


def test_general_knowledge_does_not_answer_what_the_quickstart_asks():
    for row in rows("general"):
        assert "france" not in row["instruction"].casefold() and "法国" not in row["instruction"]
        assert "Paris" not in row["output"] and "巴黎" not in row["output"]
        assert "{{" not in row["output"]


@pytest.mark.slow
def test_tokens_of_the_readme_and_the_estimate(embedded_model: Path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(embedded_model / "tokenizer.json"))
    counts = {}
    for name, *_ in readme_table("entry"):
        lengths = []
        for row in rows("diy_small" if name == "fintech" else name):
            tokens = 0
            for answer in (row[key] for key in ("output", "chosen", "rejected") if key in row):
                answer = answer.replace("{{name}}", "Nova").replace("{{author}}", "Orbit Lab")
                text = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
                tokens += len(tokenizer.encode(text, add_special_tokens=False).ids)
            lengths.append(tokens)
        counts[name] = [f"{sum(lengths):,}", f"{max(lengths):,}"]
    assert counts == {name: [tokens, longest] for name, _, tokens, longest, _ in readme_table("entry")}
    assert sum(int(counts[name][0].replace(",", "")) for name in ("identity", "general")) <= 5000
    for row in rows("diy_small"):
        exact = len(tokenizer.encode(row["instruction"], add_special_tokens=False).ids)
        assert exact <= make_diy.estimate_tokens(row["instruction"]) <= 1.05 * exact


# ---------------------------------------------------------------------------------------------------------------------
# The fraud task


def shipped(name: str):
    return make_diy.parse([*make_diy.SHIPPED[name].split(), "--out", name])


@pytest.mark.parametrize("name", FRAUD)
def test_shipped_files_are_what_the_seed_makes(name: str, tmp_path: Path):
    ok(run("data/make_diy.py", *make_diy.SHIPPED[name].split(), "--out", str(tmp_path / name)))
    for file in (f"{name}.json", f"{name}_test.json"):
        assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes()


@pytest.mark.parametrize("name", FRAUD)
def test_split_shares_no_account_and_no_time(name: str):
    args = shipped(name)
    train, test = make_diy.build(*make_diy.draw_accounts(args.accounts, args.seed), args)
    assert not {w.account for w in train} & {w.account for w in test}
    assert max(t.time for w in train for t in w.transactions) < args.split_time
    assert min(t.time for w in test for t in w.transactions) >= args.split_time
    for part, file in ((train, name), (test, f"{name}_test")):
        texts = [make_diy.FORMS[args.form](w.transactions, args.digits) for w in part]
        assert texts == [r["instruction"] for r in rows(file)]
        assert [str(w.label) for w in part] == [r["output"] for r in rows(file)]


def test_prompt_is_the_tutorials():
    def moment(*when: int) -> float:
        return datetime(2024, *when, tzinfo=UTC).timestamp()

    transactions = [
        make_diy.Transaction(moment(5, 17, 9, 1), "a", 12.351),
        make_diy.Transaction(moment(5, 17, 12, 4), "b", 0),
    ]
    own = TUTORIAL.replace("节点 22 ", "节点 1 ").replace("节点 215 ", "节点 2 ")
    assert make_diy.prompt(transactions, digits=4) == own
    form = re.escape(make_diy.HEAD) + rf"({baseline.LINE.pattern} ?)+" + re.escape(make_diy.QUESTION)
    assert re.fullmatch(form, TUTORIAL)
    for name in ("diy", "diy_test", "diy_small", "diy_small_test"):
        assert all(re.fullmatch(form, row["instruction"]) for row in rows(name))


def test_the_same_in_words():
    start = datetime(2024, 5, 17, 5, 59, tzinfo=UTC).timestamp()
    amounts = [("a", 0.5), ("b", 0.0), ("a", 12.35), ("b", 100.0), ("c", 0.0512)]
    moments = [start, start + 60, start + 3660, start + 3660 + 86400, start + 2 * 86400]
    transactions = [make_diy.Transaction(moment, *rest) for moment, rest in zip(moments, amounts, strict=True)]
    assert make_diy.words(transactions, digits=4).split("\n") == [
        "night new round small",
        "day minutes new zero",
        "day hours known large",
        "day days known round huge",
        "night hours new tiny",
        "Fraud?",
    ]
    values = dict(zip(baseline.WORDS, baseline.features(make_diy.words(transactions, 4)), strict=True))
    assert values == {
        **dict.fromkeys(("night", "hours", "known", "round"), 0.4),
        **dict.fromkeys(("minutes", "zero", "tiny", "small", "large", "huge"), 0.2),
    }


def test_the_sizes_of_the_amounts_alone():
    transactions = [make_diy.Transaction(0, "a", amount) for amount in (0.5, 0.0, 12.35, 100.0, 0.0512, 1.0)]
    text = make_diy.amounts(transactions)
    assert text == "small zero large huge tiny medium\nFraud?"
    values = dict(zip(baseline.WORDS, baseline.features(text), strict=True))
    assert {word for word, share in values.items() if share} == {"small", "zero", "large", "huge", "tiny"}
    assert values["zero"] == pytest.approx(1 / 6)


def test_counterparties_are_numbered_as_the_window_meets_them():
    transactions = [make_diy.Transaction(2e9, name, 1) for name in ("bob", "eve", "bob", "mallory")]
    assert re.findall(r"节点 (\d+) ", make_diy.prompt(transactions, 4)) == ["1", "2", "1", "3"]


@pytest.mark.parametrize(
    ("amount", "digits", "text"),
    [
        (0, 4, "0.0"),
        (60, 4, "60.0"),
        (12.35736465, 4, "12.36"),
        (0.0065305, 3, "0.00653"),
        (5.6886497743838e-05, 4, "0.00005689"),
        (123456, 3, "123000.0"),
        (999.96, 4, "1000.0"),
    ],
)
def test_amount_text(amount: float, digits: int, text: str):
    assert make_diy.amount_text(amount, digits) == text


def readme_table(first_heading: str) -> list[list[str]]:
    """The cells of the README's table whose first heading that is, without backquotes."""
    lines = iter((DATA / "README.md").read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith(f"| {first_heading} |"))
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            return table
        table.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return table


def test_counts_of_the_readme():
    registry = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))
    table = readme_table("entry")
    assert [row[0] for row in table] == sorted(registry, key=[row[0] for row in table].index)
    for name, count, _, _, purpose in table:
        content = rows(Path(registry[name]["file_name"]).stem)
        assert int(count) == len(content)
        if "fraud," in purpose:
            fraud, normal = map(int, re.search(r"(\d+) fraud, (\d+) normal", purpose).groups())
            outputs = [row["output"] for row in content]
            assert (outputs.count("1"), outputs.count("0")) == (fraud, normal)


def test_baseline_is_the_readmes_and_the_task_is_neither_trivial_nor_hopeless():
    figures = []
    for name in FRAUD:
        train, test = (baseline.read(DATA / f"{name}{end}.json") for end in ("", "_test"))
        measured, alone = baseline.measure(train, test)
        for method, of in measured.items():
            interval = "{:.3f} to {:.3f}".format(*of["accuracy_interval"])
            shown = [f"{of['accuracy']:.3f}", interval, f"{of['f1']:.3f}", f"{of['roc_auc']:.3f}"]
            figures.append([f"{name}_test", method, *shown])
        majority, regression = measured["majority vote"], measured["logistic regression"]
        assert majority["accuracy"] < 0.6
        assert regression["accuracy_interval"][0] > majority["accuracy_interval"][1]  # they do not even touch
        assert (0.7 if name == "diy_amounts" else 0.84) < regression["roc_auc"] < 0.93
        assert max(alone.values()) < 0.8
        assert f"{max(alone.values()):.2f} (`{name}_test`)" in (DATA / "README.md").read_text(encoding="utf-8")
    assert figures == readme_table("held-out part")


def test_features_of_a_prompt():
    lines = "[05-17 00:30] 节点 1 交易 10.0 [05-17 00:40] 节点 2 交易 0.0 [05-18 12:00] 节点 1 交易 1.5 "
    values = dict(zip(baseline.FEATURES, baseline.features(lines), strict=True))
    assert values["night"] == pytest.approx(2 / 3)
    assert values["burst"] == pytest.approx(1 / 2)
    assert values["repeated"] == pytest.approx(1 / 3)
    assert values["round"] == pytest.approx(1 / 2)
    assert values["zero"] == pytest.approx(1 / 3)


def test_baseline_names_the_row_that_is_not_of_the_task():
    result = run("data/baseline.py", "data/identity.json", "data/diy_test.json")
    assert result.returncode == 2
    sentence = "data/identity.json, row 1 is not of the fraud task; make it with data/make_diy.py"
    assert result.stderr == f"error: {sentence}\n"


# ---------------------------------------------------------------------------------------------------------------------
# A user's own table

START = 1709251200  # 2024-03-01, UTC


def write_table(path: Path, transactions: list[tuple], header: str = "from,to,amount,time") -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(transactions)
    return path


@pytest.fixture
def table(tmp_path: Path) -> list[str]:
    """Arguments: 40 accounts, every fourth fraudulent, 10 others without a label, 2,000 transactions in 200 days."""
    draw = random.Random(0)
    names = [f"0x{number:04x}" for number in range(50)]
    transactions = [
        (*draw.sample(names, 2), round(draw.expovariate(0.1), 6), START + i * 200 * 86400 // 2000) for i in range(2000)
    ]
    write_table(tmp_path / "tx.csv", transactions)
    write_table(tmp_path / "labels.csv", [(n, int(i % 4 == 0)) for i, n in enumerate(names[:40])], "account,label")
    return f"--table {tmp_path / 'tx.csv'} --labels {tmp_path / 'labels.csv'} --out {tmp_path / 'my'}".split()


def test_own_table_end_to_end(table: list[str], tmp_path: Path):
    extra = ["--window", "64", "--max-tokens", "1024", "--split-time", "2024-06-01", "--balance", "1"]
    result = ok(run("data/make_diy.py", *table, *extra))
    assert "7 fraud, 7 normal" in result.stdout and "3 fraud, 9 normal" in result.stdout
    train, test = (json.loads((tmp_path / f"my{end}.json").read_text(encoding="utf-8")) for end in ("", "_test"))
    assert (len(train), len(test)) == (14, 12)
    for part in (train, test):
        for row in part:
            assert make_diy.estimate_tokens(row["instruction"]) <= 1024 - make_diy.TEMPLATE_TOKENS
            assert "0x" not in row["instruction"]  # no account's name
    months = [{m for row in part for m in re.findall(r"\[(\d\d)-", row["instruction"])} for part in (train, test)]
    assert max(months[0]) == "05" and min(months[1]) >= "06"
    assert "is there already" in run("data/make_diy.py", *table).stderr


@pytest.mark.slow
def test_baseline_of_an_own_table(table: list[str], tmp_path: Path):
    make_diy.main(table)
    result = ok(run("data/baseline.py", str(tmp_path / "my.json"), str(tmp_path / "my_test.json")))
    assert f"{tmp_path / 'my.json'}: 28 samples, held out 12, 3 of them fraud\n" in result.stdout
    assert re.search(r"majority vote +0\.750   0\.468 to 0\.911 .*0\.500   0\.500 to 0\.500\n", result.stdout)


def read_windows(arguments: list[str]):
    args = make_diy.parse(arguments)
    labels = make_diy.read_labels(args.labels, args.columns)
    return args, make_diy.read_table(args.table, args.columns, labels), labels


def test_transactions_count_for_both_labelled_accounts(tmp_path: Path, table: list[str]):
    write_table(tmp_path / "tx.csv", [("0x0000", "0x0001", 5, START), ("0x0031", "0x0001", 7, START + 60)])
    _, accounts, _ = read_windows(table)
    assert accounts == {
        "0x0000": [(START, "0x0001", 5.0)],
        "0x0001": [(START, "0x0000", 5.0), (START + 60, "0x0031", 7.0)],
    }


@pytest.mark.parametrize(
    "when",
    [
        "2024-03-01",
        "2024-03-01 00:00",
        "2024-03-01T00:00:00Z",
        "2024-03-01T08:00:00+08:00",
        "1709251200",
        "1709251200.0",
        "2024/03/01 00:00:00",
        "2024/3/1 0:00",
        "2024/3/1",
    ],
)
def test_times(when: str):
    assert make_diy.read_time("here", when) == START


def test_labelled_accounts_that_the_table_writes_otherwise_are_told(table: list[str], tmp_path: Path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text(labels.read_text(encoding="utf-8").replace("0x000a", "0x000A"), encoding="utf-8")
    make_diy.main([*table, "--min-transactions", "1"])
    said = capsys.readouterr().out
    assert str(Message(says("labelled accounts that"), count=1, first="0x000A")) in said
    assert "left out" not in said


def test_parquet_gives_the_same_as_csv(table: list[str], tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    _, from_csv, _ = read_windows(table)
    with open(tmp_path / "tx.csv", encoding="utf-8") as file:
        content = list(csv.DictReader(file))
    columns = {
        "sender": [row["from"] for row in content],
        "receiver": [row["to"] for row in content],
        "amount": [float(row["amount"]) for row in content],
        "date": [datetime.fromtimestamp(int(row["time"]), UTC) for row in content],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "tx.parquet")
    table[1] = str(tmp_path / "tx.parquet")
    _, from_parquet, _ = read_windows([*table, "--columns", "from=sender", "to=receiver", "time=date"])
    assert from_parquet == from_csv


def test_windows_of_one_account_do_not_overlap(table: list[str]):
    args, accounts, labels = read_windows([*table, "--window", "10", "--windows", "3", "--split-time", "2024-06-01"])
    train, test = make_diy.build(accounts, labels, args)
    for name in {w.account for w in (*train, *test)}:
        moments = [t.time for w in (*train, *test) if w.account == name for t in w.transactions]
        assert len(moments) == len(set(moments))
    assert {len([w for w in train if w.account == name]) for name in {w.account for w in train}} == {3}
    assert all(len(w.transactions) <= 10 for w in (*train, *test))


def test_exact_tokens_by_a_tokenizer(table: list[str], tmp_path: Path):
    byte_tokenizer([]).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))  # a token a byte
    limit = ["--max-tokens", "1000", "--split-time", "2024-06-01", "--tokenizer", str(tmp_path)]
    args, accounts, labels = read_windows([*table, *limit])
    for window in make_diy.build(accounts, labels, args)[0]:
        room = 1000 - make_diy.TEMPLATE_TOKENS
        assert len((make_diy.prompt(window.transactions, 4) + "1").encode()) <= room
        longer = [t for t in accounts[window.account] if t.time < args.split_time][-len(window.transactions) - 1 :]
        assert len((make_diy.prompt(longer, 4) + "1").encode()) > room


HEADER = "from,to,amount,time\n"
ROW = "0x0000,0x0001,5,2024-03-01 00:00\n"


@pytest.mark.parametrize(
    ("content", "code", "fields"),
    [
        ("", says("by --columns"), {"column": "from", "columns": [], "near": None}),
        ("form,to,amount,time\n", says("by --columns"), {"near": "form", "columns": ["form", "to", "amount", "time"]}),
        (HEADER, says("labels is in"), {}),
        (HEADER + ROW + "0x0000,0x0001,5\n", says("values where"), {"values": 3, "columns": 4, "line": 3}),
        (HEADER + ROW + "0x0000,0x0001,-5,2024-03-01\n", says("the amount '"), {"amount": "-5", "line": 3}),
        (HEADER + "0x0000,0x0001,nan,2024-03-01\n", says("the amount '"), {"amount": "nan", "line": 2}),
        (HEADER + "0x0000,0x0001,,2024-03-01\n", says("the amount '"), {"amount": "", "line": 2}),
        (HEADER + "0x0000,0x0001,5,yesterday\n", says("is not a time"), {"value": "yesterday", "line": 2}),
        (HEADER + "0x0000,0x0001,5,20240301\n", says("is not a time"), {"value": "20240301"}),
        (
            HEADER + "0x0000,0x0001,5,1709251200000\n",
            says("is not a time"),
            {"advice": Message("it looks like milliseconds since 1970: divide it by 1000")},
        ),
        (HEADER + "0x0000,,5,2024-03-01\n", says("in or delete"), {"key": "to", "line": 2}),
        (HEADER + '0x0000,"0x0"01,5,2024-03-01\n', says("is broken CSV"), {"line": 2}),
        (HEADER + ROW, says("--split-time"), {"part": Message("training")}),
    ],
)
def test_faulty_table(table: list[str], tmp_path: Path, content: str, code: str, fields: dict[str, object]):
    file = tmp_path / "tx.csv"
    file.write_text(content, encoding="utf-8")
    if line := fields.pop("line", None):
        fields["place"] = Message("{file}, line {line}", file=file, line=line)
    with user_error(code, **fields):
        make_diy.main(table)
    assert not list(tmp_path.glob("my*"))


@pytest.mark.parametrize(
    ("content", "code", "fields"),
    [
        ("account,lable\n", says("by --columns"), {"column": "label", "near": "lable"}),
        ("account,label\n0x0000,fraud\n", says("' is neither"), {"label": "fraud"}),
        ("account,label\n0x0000,1\n0x0000,0\n", says("another; keep"), {"account": "0x0000"}),
    ],
)
def test_faulty_labels(table: list[str], tmp_path: Path, content: str, code: str, fields: dict[str, object]):
    (tmp_path / "labels.csv").write_text(content, encoding="utf-8")
    with user_error(code, **fields):
        make_diy.main(table)


def test_a_broken_file_is_named(table: list[str], tmp_path: Path):
    for name, content, code in (
        ("tx.parquet", b"PAR1", says("not a parquet")),
        ("tx.xlsx", b"", says("neither .csv")),
        ("tx.csv", HEADER.encode() + "节点,b,1,2024-03-01\n".encode("gbk"), says("CSV in UTF-8")),
    ):
        (tmp_path / name).write_bytes(content)
        with user_error(code, file=tmp_path / name):
            make_diy.main(["--table", str(tmp_path / name), *table[2:]])


@pytest.mark.parametrize(
    ("arguments", "code", "fields"),
    [
        (["--window", "0"], says("be at least 1"), {"flag": "--window", "value": 0}),
        (["--window", "3"], says("above --window"), {"least": 5, "window": 3}),
        (["--test-share", "1"], says("be between 0"), {"value": 1.0}),
        (["--balance", "0"], says("above 0, like"), {"value": 0.0}),
        (["--columns", "form=x"], says("KEY=NAME, KEY"), {"pair": "form=x", "near": "from"}),
        (["--split-time", "2024"], says("is not a time"), {"place": "--split-time", "value": "2024"}),
        (["--split-time", "2030-01-01"], says("--split-time"), {"part": Message("held-out"), "samples": 0}),
        (["--max-tokens", "150"], says("--max-tokens"), {"max_tokens": 150}),
        (["--tokenizer", "nowhere"], says("--tokenizer out"), {"file": "nowhere/tokenizer.json"}),
        (["--labels", "labls.csv"], says(".parquet file"), {"file": "labls.csv"}),
    ],
)
def test_arguments_that_make_no_sense(table: list[str], arguments: list[str], code: str, fields: dict[str, object]):
    with user_error(code, **fields):
        make_diy.main([*table, *arguments])


def test_an_error_is_one_sentence_and_exit_status_2(table: list[str], tmp_path: Path):
    (tmp_path / "tx.csv").write_text(HEADER + "0x0000,0x0001,5,soon\n", encoding="utf-8")
    result = run("data/make_diy.py", *table)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {tmp_path / 'tx.csv'}, line 2: 'soon' is not a time; "
        "write it like 2024-05-17 09:01, or as seconds since 1970\n"
    )
    assert result.stdout == ""


def test_the_scripts_import_nothing_heavy():
    heavy = {"torch", "pyarrow", "sklearn", "tokenizers", "transformers"}
    code = f"import sys, make_diy, baseline; print({heavy} & set(sys.modules) or 'none')"
    result = subprocess.run([sys.executable, "-c", code], cwd=DATA, capture_output=True, text=True)
    assert result.stdout == "none\n", result.stderr
