"The command: exit codes, one-line errors, pipes, JSON for machines."
import io, json, os, subprocess, sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracebook.cli import main
from tracebook.memento import build_memento

CLEAN = build_memento([("one two three", "one"), ("four five six", "four")], "\n\nThe answer.")
COMMANDS = ("book", "stats", "parse")
ALL_COMMANDS = (*COMMANDS, "compress", "context", "sft", "template")
ESCAPES = "\x1b[31m\x1b]0;owned\x07\x9b31m\x7f"


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    "Run the command in an empty folder: (exit code, output, errors)."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    def run(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False))
        code = main([str(a) for a in args])
        out, err = capfd.readouterr()
        return code, out, err
    return run

def put(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path.name

def strict(text): return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))

def is_one_line(err): return err.startswith("tracebook: error: ") and err.count("\n") == 1 and "Traceback" not in err and len(err) < 2000


def test_help_and_version(call):
    for args in (["--help"], *([c, "--help"] for c in ALL_COMMANDS)):
        code, out, err = call(*args)
        assert code == 0 and not err and "usage: tracebook" in out
    for command in COMMANDS:
        out = call(command, "--help")[1]
        for flag in ("SOURCE", "--limit", "--sample", "--seed", "--column-map", "--json", "--out", "standard input"): assert flag in " ".join(out.split())
    assert call("--version")[0] == 0

@pytest.mark.parametrize("args", [[], ["read"], ["book", "--nope"], ["book", "--limit", "x"], ["book", "--limit", "-1"], ["book", "--limit", "²"], ["book", "--sample", "all"], ["book", "--column-map", "response"],
    ["book", "--column-map", "answer=x"], ["stats", "--by", "x"], ["stats", "--out", "a.xyz"], ["parse", "--width", "x"], ["book", "a", "b"]], ids=" ".join)
def test_a_wrong_call_is_2(call, args):
    code, out, err = call(*args)
    assert code == 2 and not out and "tracebook" in err and "Traceback" not in err and "_natural" not in err

BAD = {"empty.jsonl": b"", "blank.jsonl": b"\n \n", "empty.txt": b"", "cols.jsonl": b'{"cot": "x"}\n', "u16.jsonl": '{"response": "x"}\n'.encode("utf-16"), "latin.txt": b"caf\xe9", "bad.json": b'[{"response": "a',
    "cut.jsonl.gz": __import__("gzip").compress(os.urandom(3000))[:900], "no.parquet": b"x", "no.arrow": b"x", "a.csv": b"x", "int.jsonl": b'{"response": "x", "difficulty": ' + b"1" * 5000 + b"}"}

@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_1_and_one_line(call, tmp_path, command, name):
    (tmp_path / name).write_bytes(BAD[name])
    code, out, err = call(command, name)
    assert code == 1 and is_one_line(err) and name in err and not out, err[-300:]

@pytest.mark.parametrize("command", COMMANDS)
def test_a_source_that_is_not_there(call, tmp_path, command):
    for name in ("missing.jsonl", "missing.txt", "*.jsonl", "sub/", "missing.csv"):
        code, out, err = call(command, name)
        assert code == 1 and is_one_line(err) and name.strip("/") in err and "Hub" not in err, err

def test_a_missing_name_leaves_one_line_also_when_the_hub_cannot_be_reached(tmp_path):
    code = "import socket, sys\ndef refuse(*_, **__): raise OSError('no network')\nsocket.getaddrinfo = socket.socket.connect = refuse\nimport time; time.sleep = lambda s: None\nfrom tracebook.cli import main\nsys.exit(main(['stats', 'missing_folder']))"
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env)
    assert p.returncode == 1 and is_one_line(p.stderr), p.stderr[-400:]

@pytest.mark.parametrize("columns", [dict(sentences=3), dict(blocks=[[2**70, 0]]), dict(sentences=["\ud800"])], ids=range(3))
def test_a_row_of_full_with_wrong_types(call, tmp_path, columns):
    code, out, err = call("stats", put(tmp_path / "a.jsonl", dict(response="x"), dict(response="x") | columns), "--config", "full", "--json")
    assert code == 0 and strict(out) and err.count("\n") == 1 and "Traceback" not in err

def test_two_columns_of_one_name(call, tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["response", "response"]), tmp_path / "a.parquet")
    code, out, err = call("stats", "a.parquet")
    assert code == 1 and is_one_line(err)

def test_book_says_where_it_lies_and_what_is_in_it(call, tmp_path):
    put(tmp_path / "a.jsonl", dict(response=CLEAN), "{bad", dict(response="<think>x"))
    code, out, err = call("book", "a.jsonl")
    assert code == 0 and str(tmp_path / "tracebook.html") in out and "2 traces" in out and "1 with issues" in out and "a.jsonl:2" in err and err.count("\n") == 1
    code, out, err = call("book", "a.jsonl", "--json", "--out", "b.html")
    made = strict(out)
    assert code == 0 and made["path"] == str(tmp_path / "b.html") and (made["traces"], made["unreadable"], made["size"]) == (2, 1, (tmp_path / "b.html").stat().st_size)

def test_one_row_that_cannot_be_read_is_no_plural(call, tmp_path):
    out = call("book", put(tmp_path / "a.jsonl", dict(response=CLEAN), "{bad"))[1]
    assert "1 traces" not in out and "1 rows" not in out

@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("rows", [[dict(response=CLEAN)], [dict(response="")], [dict(response="<think>"), dict(response="<|summary_start|>x", domain="all")], [dict(response=CLEAN, domain="all")]], ids=range(4))
def test_json_is_json(call, tmp_path, command, rows):
    code, out, err = call(command, put(tmp_path / "a.jsonl", *rows), "--json")
    lines = out.splitlines()
    assert code == 0 and not err and len(lines) == (len(rows) if command == "parse" else 1) and all(isinstance(strict(x), dict) for x in lines)

@pytest.mark.parametrize("command", COMMANDS)
def test_limits(call, tmp_path, command):
    put(tmp_path / "a.jsonl", *[dict(response=CLEAN)] * 3)
    for limit in (0, 2, 3, 10**20):
        code, out, err = call(command, "a.jsonl", "--limit", limit, "--json")
        assert code == 0 and not err
        n = len(out.splitlines()) if command == "parse" else strict(out)["traces"] if command == "book" else next(g["n"] for g in strict(out)["groups"] if g["group"] == "all")
        assert n == min(limit, 3)
        assert call(command, "a.jsonl", "--limit", limit)[0] == 0

@pytest.mark.parametrize("command", COMMANDS)
def test_no_escape_code_comes_out(call, tmp_path, command):
    row = {k: "a" + ESCAPES for k in ("problem", "response", "domain", "source")}
    put(tmp_path / "a.jsonl", row, dict(response=build_memento([(ESCAPES + "a", ESCAPES + "b")], ESCAPES + "c")), {"response": None, ESCAPES: 1}, ESCAPES)
    put(tmp_path / "b.jsonl", {ESCAPES: 1})
    for args in (["a.jsonl"], ["a.jsonl", "--json"], ["b.jsonl"], ["missing" + ESCAPES + ".jsonl"], ["a.jsonl", "--limit", ESCAPES], ["a.jsonl", "x" + ESCAPES]):
        code, out, err = call(command, *args)
        assert code in (0, 1, 2) and not set(ESCAPES[0] + "\x07\x9b\x7f") & set(out + err), (args, out[-200:], err[-200:])

def test_an_escape_code_in_the_name_of_the_page_does_not_come_out(call, tmp_path):
    code, out, err = call("book", put(tmp_path / "a.jsonl", dict(response=CLEAN)), "--out", f"b{ESCAPES}.html")
    assert code == 0 and not set("\x1b\x07\x9b\x7f") & set(out + err)

def test_out_that_cannot_be_written(call, tmp_path):
    put(tmp_path / "a.jsonl", dict(response=CLEAN))
    for command, name in (("book", "o.html"), ("stats", "o.csv"), ("parse", "o.txt")):
        for out in (f"none/{name}", f"a.jsonl/{name}"):
            code, _, err = call(command, "a.jsonl", "--out", out)
            assert code == 1 and is_one_line(err) and f".{name}." not in err, err
        code, _, err = call("book", "a.jsonl", "--out", ".")
        assert code == 1 and is_one_line(err)
    assert os.listdir(tmp_path) == ["a.jsonl"]

def test_tables_of_stats(call, tmp_path):
    put(tmp_path / "a.jsonl", dict(response=CLEAN, domain='q",\n;=1'), dict(response="<think>", domain="é"))
    for name in ("t.parquet", "t.csv", "t.jsonl"): assert call("stats", "a.jsonl", "--out", name)[0] == 0
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert [strict(x) for x in (tmp_path / "t.jsonl").read_text().splitlines()] == rows and len(rows) == 2
    import csv
    assert [r["domain"] for r in csv.DictReader(open(tmp_path / "t.csv", newline=""))] == ['q",\n;=1', "é"]

STDIN = [(b"", 1, 0), (b" \n", 1, 0), (b"\xff\xfe\0", 1, 0), (b"a\0b", 0, 1), (b'{"response": "a"}\n{"response": "b"}', 0, 2), (b'\xef\xbb\xbf\n{"response": "a"}\r\n\r\n', 0, 1), (CLEAN.encode(), 0, 1), (b'{"cot": "a"}', 1, 0),
    (b'{bad', 1, 0), (b'{"response": "a"}\n{bad', 0, 1), (b'[{"response": "a"}, {"response": "b"}]', 0, 2), (b'{\n  "response": "a"\n}', 0, 1), ("é".encode("latin-1"), 1, 0), (b"[" * 100_000, 0, 1), (b"[1, 2]", 0, 1)]

@pytest.mark.parametrize("raw, code, n", STDIN, ids=range(len(STDIN)))
def test_standard_input(call, raw, code, n):
    got, out, err = call("parse", "-", "--json", stdin=raw)
    assert got == code and len(out.splitlines()) == n and "Traceback" not in err
    assert (is_one_line(err) and "standard input" in err) if code else err.count("\n") <= 1

def test_a_byte_order_mark_is_no_part_of_the_response(call, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + CLEAN.encode())
    for args, raw in ((["-"], b"\xef\xbb\xbf" + CLEAN.encode()), (["a.txt"], b"")): assert strict(call("parse", *args, "--json", stdin=raw)[1])["text"] == CLEAN

def test_a_text_file_keeps_its_line_ends(call, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert strict(call("parse", "a.txt", "--json")[1])["text"] == "a\r\nb\rc\n"

def run(args, cwd, **k):
    return subprocess.run([sys.executable, "-c", "import sys; from tracebook.cli import main; sys.exit(main())", *args], capture_output=True, cwd=cwd, timeout=60, **k)

@pytest.mark.skipif(os.name != "posix", reason="a shell")
@pytest.mark.parametrize("extra", ["", "--json"])
def test_head_leaves_quietly(tmp_path, extra):
    text = build_memento([("one two", "one")] * 300, "end")
    put(tmp_path / "a.jsonl", *[dict(response=text)] * 20)
    command = f'set -o pipefail; "{sys.executable}" -c "import sys; from tracebook.cli import main; sys.exit(main())" parse a.jsonl {extra} | head -1'
    p = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert p.returncode == 0 and not p.stderr and p.stdout.count("\n") == 1

def test_a_terminal_that_is_not_utf8(tmp_path):
    put(tmp_path / "a.jsonl", dict(response=CLEAN, domain="é😀"))
    for args in (["parse", "a.jsonl"], ["parse", "a.jsonl", "--json"]):
        p = run(args, tmp_path, env=os.environ | dict(PYTHONIOENCODING="ascii"))
        assert p.returncode == 0 and not p.stderr and p.stdout.isascii()

def test_no_network(tmp_path):
    code = "import socket, sys\nused = []\ndef refuse(*a, **k): used.append(a); raise OSError('no network')\nsocket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse\nimport tracebook.book, tracebook.cli\ncode = tracebook.cli.main(['book', '--limit', '2'])\nsys.exit(code or len(used))"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert p.returncode == 0 and not p.stderr and (tmp_path / "tracebook.html").exists()

def test_a_killed_run_leaves_the_old_page(tmp_path):
    (tmp_path / "tracebook.html").write_text("old")
    code = "import os, signal, sys, tracebook.book as b\nb._figures = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nfrom tracebook.cli import main\nmain(['book', '--limit', '1'])"
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, timeout=60)
    assert p.returncode < 0 and (tmp_path / "tracebook.html").read_text() == "old"


# compress and context

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    "A folder with a small tokenizer."
    from tracebook.sources import sample_traces
    from tracebook.tokens import make_tokenizer
    folder = tmp_path_factory.mktemp("tok")/"small-bpe"
    make_tokenizer(sample_traces()["response"]).save_pretrained(folder)
    return folder

@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["compress", "context"])
def test_new_commands_on_bad_input(call, tmp_path, tokenizer, command, name):
    (tmp_path/name).write_bytes(BAD[name])
    code, out, err = call(command, name, *(["--tokenizer", tokenizer] if command == "context" else []))
    assert code == 1 and not out and is_one_line(err.splitlines(True)[-1]), (out, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]  # nothing half written

@pytest.mark.parametrize("args", [["--keep-last-k", "x"], ["--keep-last-k", "-2"], ["--keep-last-k", "1", "--policy", "phi4"], ["--policy", "gpt"], ["--out", "a.parquet"], ["--sample", "head"]], ids=" ".join)
def test_wrong_calls_of_compress(call, args):
    code, out, err = call("compress", *args)
    assert code == 2 and not out and "_keep" not in err and "_rows_file" not in err

def test_compress_keeps_all_columns(call, tmp_path):
    from tracebook.compress import compress_trace
    rows = [dict(id=7, cot=CLEAN, votes=[1, None], meta=dict(a="é")), dict(id=8, cot=None, votes=[], meta=None), dict(id=9, cot="plain", votes=None, meta=dict(a=None))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/"rows.parquet")
    code, out, err = call("compress", "rows.parquet", "--column-map", "response=cot", "--policy", "qwen3")
    assert code == 0 and not err and "3 rows" in out and "no response" in out and "no blocks" in out
    assert [strict(l) for l in (tmp_path/"compressed.jsonl").read_text(encoding="utf-8").splitlines()] == [rows[0] | dict(cot=compress_trace(CLEAN, policy="qwen3")), *rows[1:]]

def test_compress_to_a_column_and_onto_itself(call, tmp_path):
    put(tmp_path/"a.jsonl", dict(response=CLEAN), "broken", dict(response=CLEAN + "\ud83d"))
    code, out, err = call("compress", "a.jsonl", "--column", "short", "--out", "a.jsonl", "--json")
    said = strict(out)
    assert code == 0 and "warning: a.jsonl: 2 rows read, 1 unreadable; a.jsonl:2" in err
    rows = [strict(l) for l in (tmp_path/"a.jsonl").read_text().splitlines()]
    assert [r["response"] for r in rows] == [CLEAN, CLEAN + "\ud83d"] and all(len(r["short"]) < len(r["response"]) for r in rows)
    assert said["rows"] == 2 and said["blocks"] == dict(summarised=2, newest=2) and said["chars_after"] == sum(len(r["short"]) for r in rows)
    assert [u["where"] for u in said["unreadable"]] == ["a.jsonl:2"]
    code, out, err = call("compress", "a.jsonl", "--column", "short")
    assert code == 1 and "has a column 'short' already" in err

def test_compress_through_a_pipe(call):
    code, out, err = call("compress", "-", "--keep-last-k", "-1", "--out", "-", stdin=CLEAN.encode())
    assert code == 0 and strict(out) == dict(response=CLEAN) and "100.0 %" in err

def test_compress_a_damaged_file(call, tmp_path):
    import gzip
    whole = gzip.compress(b"".join(json.dumps(dict(response=CLEAN, n=i, pad=os.urandom(200).hex())).encode() + b"\n" for i in range(500)))
    (tmp_path/"cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    code, out, err = call("compress", "cut.jsonl.gz", "--json")
    assert code == 0 and 50 < strict(out)["rows"] < 500 and strict(out)["unreadable"][-1]["code"] == "damaged_file"
    assert len((tmp_path/"compressed.jsonl").read_text().splitlines()) == strict(out)["rows"]

def test_context_is_the_library(call, tmp_path, tokenizer):
    from tracebook.attention import context_curve
    from tracebook.sources import sample_traces
    from tracebook.tokens import load_tokenizer
    from transformers import Qwen3Config
    Qwen3Config(num_hidden_layers=36, num_key_value_heads=8, head_dim=128).save_pretrained(tmp_path/"model")
    code, out, err = call("context", "--tokenizer", tokenizer, "--policy", "qwen3", "--policy", "vanilla", "--model", "model", "--json", "--out", "c.jsonl", "--limit", 5)
    said = strict(out)
    assert code == 0 and said["tokenizer"] == "small-bpe" and said["kv_bytes_per_token"] == "147456" and said["caveats"]
    want = context_curve(sample_traces().select(range(5)), load_tokenizer(tokenizer), ["qwen3", "vanilla"], model=Qwen3Config(num_hidden_layers=36, num_key_value_heads=8, head_dim=128))
    assert [strict(l) for l in (tmp_path/"c.jsonl").read_text().splitlines()] == want.to_pylist()
    peaks = sorted(r["peak"] for r in want.to_pylist() if r["policy"] == "qwen3")
    assert [g["peak"] for g in said["groups"] if (g["domain"], g["policy"]) == ("all", "qwen3")] == [peaks[2]]
    code, out, err = call("context", "--tokenizer", tokenizer, "--prompt", "--limit", 3)
    assert code == 0 and "small-bpe" in out and not err

def test_context_without_a_tokenizer(call, monkeypatch):
    monkeypatch.setattr("tracebook.tokens.cached_tokenizer", lambda: None)
    code, out, err = call("context")
    assert code == 1 and is_one_line(err) and "--tokenizer Qwen/Qwen3-8B" in err
