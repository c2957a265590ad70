"Sources under bad and hostile input: a clear error or a right result, and nothing lost silently."
import gzip, json, os, resource, struct, subprocess, sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from hypothesis import given, settings, strategies as st

from tracebook.sources import load_report, load_traces, write_whole

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GOOD = b'{"response": "<think>a</think>b"}\n'


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)

def stream(rows): return IterableDataset.from_generator(lambda: iter(rows))

def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


# ---- text files
@pytest.mark.parametrize("name, content", [("a.jsonl", b""), ("a.json", b""), ("a.parquet", b""), ("a.arrow", b""), ("a.jsonl.gz", gzip.compress(b"")),
    ("a.jsonl", b"\n  \n"), ("a.json", b" \n"), ("a.jsonl", b"\xef\xbb\xbf")], ids=range(8))
def test_a_file_without_a_row_is_an_error_that_names_it(tmp_path, name, content):
    with pytest.raises(ValueError, match=f"{name}.*empty"): load_traces(put(tmp_path / name, content))

@pytest.mark.parametrize("content", [b'{"cot": "x", "text": "y"}\n', b'{"cot": "x", "text": "y"}'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_wrong_columns_name_what_is_missing_and_what_is_there(tmp_path, name, content):
    with pytest.raises(ValueError) as e: load_traces(put(tmp_path / name, content))
    for word in (name, "'response'", "cot", "text", "column_map"): assert word in str(e.value)

def test_wrong_columns_of_parquet_and_arrow(tmp_path):
    with pytest.raises(ValueError, match="a.parquet has no column 'response'; it has: cot.*column_map"): load_traces(table(tmp_path / "a.parquet", cot=["x"]))
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), (t := pa.table(dict(cot=["x"]))).schema) as f: f.write_table(t)
    with pytest.raises(ValueError, match="a.arrow has no column 'response'; it has: cot.*column_map"): load_traces(str(tmp_path / "a.arrow"))

def test_column_map_to_a_missing_column(tmp_path):
    with pytest.raises(ValueError, match="no column 'cot'; it has: response"): load_traces(put(tmp_path / "a.jsonl", GOOD), column_map={"response": "cot"})

def test_column_map_renames(tmp_path):
    rows = load_traces(put(tmp_path / "a.jsonl", '{"cot": "x", "response": "old"}\n'), column_map={"response": "cot", "problem": "response"})
    assert (rows[0]["response"], rows[0]["problem"]) == ("x", "old")
    with pytest.raises(ValueError, match="unknown columns"): load_traces([], column_map={"answer": "x"})

@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_row_without_response_is_counted_wherever_it_stands(tmp_path, at):
    lines = [GOOD, GOOD]
    lines.insert(at, b'{"error": "timeout"}\n')
    rows = load_traces(put(tmp_path / "a.jsonl", b"".join(lines)))
    assert len(rows) == 2 and [(u.where, u.code) for u in load_report(rows).unreadable] == [(f"a.jsonl:{at + 1}", "no_response")]

BAD = [b"{bad", b"[1, 2]", b"3", b'"text"', b"null", b'{"response": 3}', b'{"response": null}', b'{"response": "\xff"}', b'{"response": "\\ud800"}', b'{"response": "a", "domain": "\\udfff"}',
    b"\xff\xfe", b"\x00", b"[" * 100_000, b'{"response": "a', b'{"response"', b'{"response": "x", "difficulty": ' + b"1" * 5000 + b"}"]

@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_counted_with_its_number_and_the_rest_goes_on(tmp_path, bad):
    rows = load_traces(put(tmp_path / "a.jsonl", GOOD + b"\n" + bad + b"\n" + GOOD))
    report = load_report(rows)
    assert len(rows) == report.rows == 2 and [u.where for u in report.unreadable] == ["a.jsonl:3"]
    assert "\n" not in report.unreadable[0].reason

@given(st.lists(st.one_of(st.just(GOOD.strip()), st.just(b""), st.just(b"  \t"), st.sampled_from(BAD)), max_size=12), st.sampled_from([b"\n", b"\r\n"]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_rows_and_unreadable_are_all_lines_that_are_not_blank(tmp_path_factory, lines, end):
    path = put(tmp_path_factory.mktemp("lines") / "a.jsonl", end.join([GOOD.strip(), *lines]))
    rows = load_traces(path)
    report = load_report(rows)
    want = [f"a.jsonl:{i}" for i, x in enumerate(lines, 2) if x in BAD]
    assert len(rows) == report.rows == 1 + lines.count(GOOD.strip()) and [u.where for u in report.unreadable] == want

def test_a_cut_line_has_the_code_of_a_cut_line(tmp_path):
    rows = load_traces(put(tmp_path / "a.jsonl", GOOD + b'{"response": "abc'))
    assert [u.code for u in load_report(rows).unreadable] == ["json_truncated"]

def test_bom_and_crlf(tmp_path):
    rows = load_traces(put(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"response": "a\\r\\nb"}\r\n{"response": "c"}\r\n'))
    assert rows["response"][:] == ["a\r\nb", "c"] and not load_report(rows).unreadable
    assert load_traces(put(tmp_path / "b.json", b'\xef\xbb\xbf[{"response": "a"}]'))[0]["response"] == "a"

@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_other_encodings_are_refused_by_name(tmp_path, name, encoding):
    with pytest.raises(ValueError, match=name.replace(".", r"\.")): load_traces(put(tmp_path / name, '{"response": "é"}\n'.encode(encoding)))

def test_a_line_of_50_megabytes(tmp_path):
    text = "x<think>é\\" * 5_000_000
    rows = load_traces(put(tmp_path / "a.jsonl", json.dumps(dict(response=text), ensure_ascii=False) + "\n"))
    assert rows[0]["response"] == text

@pytest.mark.parametrize("text", ["\0", "a\0b", "\r", "\r\n", "\ufeff", "\x1b[31m", "\x85\u2028\u2029", "<script>", "\U0010ffff", "\ufffe", "  \n "])
def test_strange_texts_come_through_untouched(tmp_path, text):
    row = dict(problem=text, response=text, domain=text, source=text, difficulty=None)
    for ascii in (True, False): assert load_traces(put(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=ascii)))[0] == row
    assert load_traces([row])[0] == row

def test_line_numbers_of_json_lines_in_a_json_file_count_blank_lines(tmp_path):
    rows = load_traces(put(tmp_path / "a.json", b"\n\n" + GOOD + b"bad\n"))
    assert [u.where for u in load_report(rows).unreadable] == ["a.json:4"]

@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("content, n", [(json.dumps(dict(response="x"), indent=2), 1), (json.dumps([dict(response="x"), dict(response="y")], indent=2), 2),
    ('{"response": "x"}\n{"response": "y"}\n', 2), ('{"response": "x"}', 1), ('{"response":\r"x"}\r{"response": "y"}'.replace("}\r", "}\n"), 2)], ids=range(5))
def test_json_documents_and_lines(tmp_path, name, content, n):
    raw = content.encode()
    rows = load_traces(put(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw))
    assert len(rows) == n and rows[0]["response"] == "x" and not load_report(rows).unreadable

@pytest.mark.parametrize("raw", [b'[{"response": "a"}, {"response": "b', b'[{"response": "a"},', b'[{"response": "\xe9"}]', b"[" * 100_000, b"hello", b"[1" + b"1" * 5000 + b"]"], ids=range(6))
def test_a_broken_json_document_is_an_error_that_names_the_file(tmp_path, raw):
    with pytest.raises(ValueError, match=r"broken\.json"): load_traces(put(tmp_path / "broken.json", raw))

def test_truncated_gzip_is_read_as_far_as_it_goes(tmp_path):
    raw = gzip.compress(b"".join(b'{"response": "%d"}\n' % (i * 7919 % 10007) for i in range(5000)))
    with pytest.warns(UserWarning, match=r"t\.jsonl\.gz"): rows = load_traces(put(tmp_path / "t.jsonl.gz", raw[:len(raw) // 2]))
    assert 0 < len(rows) < 5000 and rows[0]["response"] == "0"
    assert load_report(rows).unreadable[-1].code == "damaged_file"
    with pytest.raises(ValueError, match=r"t\.json\.gz"): load_traces(put(tmp_path / "t.json.gz", raw[:len(raw) // 2]))

def test_broken_gzip_is_an_error_that_names_the_file(tmp_path):
    raw = bytearray(gzip.compress(os.urandom(5000)))
    raw[12:40] = b"\xff" * 28
    for content in (bytes(raw), b"hello"):
        with pytest.raises((ValueError, OSError), match=r"t\.jsonl\.gz"): load_traces(put(tmp_path / "t.jsonl.gz", content))

def test_gzip_holds_what_plain_holds(tmp_path):
    for name in ("a.jsonl.gz", "a.ndjson.gz"): assert len(load_traces(put(tmp_path / name, gzip.compress(GOOD * 3)))) == 3


# ---- values
def deep(n):
    a = []
    for _ in range(n): a = [a]
    return a

def test_nested_values():
    assert load_traces([dict(response="x", domain={"a": [1, "é"]})])[0]["domain"] == '{"a": [1, "é"]}'
    ring = []
    ring.append(ring)
    for value in (deep(50_000), ring):
        rows = load_traces([dict(response="y"), dict(response="x", domain=value)])
        assert len(rows) + len(load_report(rows).unreadable) == 2

@pytest.mark.parametrize("value, want", [(3, 3), (3.0, 3), (2.5, None), (float("nan"), None), (float("inf"), None), ("easy", None), (True, None), ([1], None), ({}, None), (2**63, None), (-10**30, None)])
def test_difficulty_of_any_type(value, want):
    rows = load_traces([dict(response="x", difficulty=value), dict(response="y", difficulty=7)])
    assert rows["difficulty"][:] == [want, 7]
    assert sum(load_report(rows).notes.values()) == (want is None)

@pytest.mark.parametrize("values", [["1", "2", "easy"], [1.0, 2.5, float("nan")], [True, False, None]])
def test_difficulty_in_parquet_is_that_of_json_lines(tmp_path, values):
    rows = [dict(response="x", difficulty=v) for v in values]
    assert load_traces(table(tmp_path / "a.parquet", response=["x"] * 3, difficulty=values))["difficulty"][:] == load_traces(rows)["difficulty"][:]

def test_a_bad_difficulty_does_not_take_its_neighbours_along(tmp_path):
    assert load_traces(table(tmp_path / "a.parquet", response=["x"] * 3, difficulty=[1.0, 2.5, 3.0]))["difficulty"][:] == [1, None, 3]

@pytest.mark.parametrize("bad", [dict(sentences="abc"), dict(sentences=3), dict(sentences=["\ud800"]), dict(blocks=[["a", 1]]), dict(blocks=[[2**70, 1]]), dict(block_summaries=[{}]), dict(blocks=4)])
def test_columns_of_full_with_wrong_types_are_counted(bad):
    good = dict(response="x", sentences=["a"], blocks=[[0, 0]], block_summaries=["b"])
    rows = load_traces([good, good | bad, good], config="full")
    report = load_report(rows)
    assert len(rows) + len(report.unreadable) == 3 and (len(report.unreadable) == 1 or report.notes)


# ---- Parquet and Arrow
TEXT = ["string()", "large_string()", "string_view()", "dictionary(pa.int32(), pa.string())", "dictionary(pa.int8(), pa.large_string())"]

def write(path, t, kind):
    if kind == "parquet": pq.write_table(t, path)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), t.schema) as f: f.write_table(t)
    return str(path)

@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("type", TEXT)
def test_text_columns_of_every_kind(tmp_path, type, kind):
    texts = ["<think>a</think>", None, "é\0😀", "<think>a</think>"]
    t = pa.table(dict(response=pa.array(texts).cast(eval(f"pa.{type}"))))
    rows = load_traces(write(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"), t, kind))
    assert rows["response"][:] == [x for x in texts if x is not None]
    assert [(u.where.endswith("[1]"), u.code) for u in load_report(rows).unreadable] == [(True, "no_response")]

@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("column", [pa.array([b"a"]), pa.array([1]), pa.array([["a"]]), pa.array([{"a": "b"}])], ids=["binary", "int", "list", "struct"])
def test_a_response_that_is_no_text_is_an_error(tmp_path, column, kind):
    with pytest.raises(ValueError, match=r"a\.(parquet|arrow).*'response' is .*, not text"): load_traces(write(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"), pa.table(dict(response=column)), kind))

def test_null_rows_are_numbered_across_row_groups(tmp_path):
    pq.write_table(pa.table(dict(response=["a", "b", "c", None, "e", None])), tmp_path / "a.parquet", row_group_size=2)
    rows = load_traces(str(tmp_path / "a.parquet"))
    assert [u.where for u in load_report(rows).unreadable] == ["a.parquet[3]", "a.parquet[5]"] and rows["response"][:] == ["a", "b", "c", "e"]
    with pytest.raises(ValueError, match="no row could be read"): load_traces(table(tmp_path / "b.parquet", response=pa.nulls(3, pa.string())))

def test_broken_parquet_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "b.parquet"
    pq.write_table(pa.table(dict(response=[f"{i * 7919 % 10007} " * 20 for i in range(5000)])), path, compression="NONE", use_dictionary=False)
    raw = path.read_bytes()
    middle, header = bytearray(raw), bytearray(raw)
    middle[len(raw) // 2:len(raw) // 2 + 50] = b"\xff" * 50
    header[4:60] = b"\xff" * 56
    for content in (b"no parquet", b"PAR1" + b"x" * 100 + b"PAR1", raw[:len(raw) // 2], bytes(middle), bytes(header)):
        with pytest.raises((ValueError, OSError), match=r"b\.parquet"): load_traces(put(path, content))

def test_broken_arrow_is_an_error_that_names_the_file(tmp_path):
    path, t = tmp_path / "b.arrow", pa.table(dict(response=["x" * 100] * 1000))
    contents = [b"no arrow at all"]
    for kind in ("stream", "file"):
        write(path, t, kind)
        contents.append(path.read_bytes()[:50_000])
    for content in contents:
        with pytest.raises((ValueError, OSError), match=r"b\.arrow"): load_traces(put(path, content))

def test_parquet_text_that_is_not_utf8_is_counted(tmp_path):
    bad = pa.StringArray.from_buffers(3, pa.py_buffer(struct.pack("<4i", 0, 2, 4, 6)), pa.py_buffer(b"ab\xff\xfecd"))
    rows = load_traces(table(tmp_path / "a.parquet", response=bad))
    assert [r["response"] for r in rows] == ["ab", "cd"] and [(u.where, u.code) for u in load_report(rows).unreadable] == [("a.parquet[1]", "not_utf8")]

def test_an_arrow_file_with_lying_offsets_is_refused_and_does_not_crash(tmp_path):
    path = tmp_path / "h.arrow"
    write(path, pa.table(dict(response=["ab", "cdefgh"])), "stream")
    raw, offsets = path.read_bytes(), struct.pack("<3i", 0, 2, 8)
    assert raw.count(offsets) == 1
    path.write_bytes(raw.replace(offsets, struct.pack("<3i", 0, 2, 2_000_000_000)))
    code = "import sys\nfrom tracebook.sources import load_traces\ntry: print([r['response'] for r in load_traces(sys.argv[1])])\nexcept (ValueError, OSError) as e: print('refused', e)"
    p = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert p.returncode == 0 and p.stdout.startswith("refused"), (p.returncode, p.stderr[-300:])

def test_two_columns_of_the_same_name(tmp_path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["response", "response"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet.*response"): load_traces(str(tmp_path / "a.parquet"))


# ---- files
def test_folder_and_glob(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.json", "note.txt"): put(tmp_path / name, json.dumps(dict(response=name)))
    assert load_traces(str(tmp_path))["response"][:] == ["a.jsonl", "b.jsonl", "deep/c.json"]
    assert load_traces(str(tmp_path / "*.jsonl"))["response"][:] == ["a.jsonl", "b.jsonl"]
    assert load_traces(str(tmp_path / "**" / "*.json"))["response"][:] == ["deep/c.json"]
    assert load_traces(tmp_path)["response"][:] == load_traces(str(tmp_path) + "/")["response"][:]

def test_a_folder_whose_name_ends_like_a_file(tmp_path):
    (tmp_path / "sub.jsonl").mkdir()
    put(tmp_path / "a.jsonl", GOOD)
    put(tmp_path / "sub.jsonl" / "b.jsonl", GOOD)
    assert len(load_traces(str(tmp_path))) == 2
    assert len(load_traces(str(tmp_path / "sub.jsonl"))) == 1

def test_no_file_at_all(tmp_path):
    for source in (tmp_path, tmp_path / "*.jsonl", tmp_path / "a.jsonl", tmp_path / "sub" / "missing"):
        with pytest.raises(OSError, match="no trace file"): load_traces(str(source))
    with pytest.raises(ValueError, match="no known kind"): load_traces(put(tmp_path / "a.csv", b"x"))
    with pytest.raises((ValueError, OSError)): load_traces("a\0b.jsonl")

def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
    put(tmp_path / "a.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)): load_traces("")

def test_the_ending_may_be_in_capitals(tmp_path):
    assert len(load_traces(put(tmp_path / "A.JSONL", GOOD))) == 1

def test_a_missing_local_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    import tracebook.sources as s
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(s, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    for name in ("missing.csv", "missing.txt", "./missing", "missing/"):
        with pytest.raises((ValueError, OSError)): load_traces(name)

def test_saved_datasets(tmp_path):
    d = Dataset.from_list([dict(response="x")])
    d.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=d, test=Dataset.from_list([dict(response="y")])).save_to_disk(str(tmp_path / "two"))
    assert load_traces(str(tmp_path / "one"))["response"][:] == ["x"]
    assert load_traces(str(tmp_path / "two"))["response"][:] == ["x"]
    assert load_traces(str(tmp_path / "two"), split="test")["response"][:] == ["y"]

def test_shards_of_more_files_than_can_be_open(tmp_path):
    for i in range(150): put(tmp_path / f"{i:03}.jsonl", json.dumps(dict(response=str(i))))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60 if os.path.exists("/proc/self/fd") else 120, hard))
    try: rows = load_traces(str(tmp_path), limit=150, sample="shards")
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rows["response"][:] == [str(i) for i in range(150)]

@pytest.mark.slow
def test_more_than_two_gigabytes_of_texts_in_a_row():
    text = "x" * 50_000_000 # one text, many times: the rows share it, the columns do not
    assert len(load_traces([dict(response=text)] * 44)) == 44


# ---- rows in memory, streams, sampling
ROWS = [dict(response=str(i), domain="d", problem=None, source=None, difficulty=i) for i in range(600)]

@pytest.mark.parametrize("make", [list, iter, lambda r: (x for x in r), tuple, Dataset.from_list, lambda r: Dataset.from_list(r).to_iterable_dataset(), lambda r: DatasetDict(train=Dataset.from_list(r)), stream])
def test_every_kind_of_rows(make):
    rows = load_traces(make(ROWS))
    assert [r["response"] for r in rows] == [r["response"] for r in ROWS] and next(iter(load_traces(make(ROWS)))) == ROWS[0]
    assert [r["response"] for r in load_traces(make(ROWS), limit=3)] == ["0", "1", "2"]
    assert list(load_traces(make(ROWS), limit=0)) == []
    assert len(list(load_traces(make(ROWS), limit=10**25 if make is list else 1000))) == 600

def test_dict_of_streams_and_missing_split():
    rows = IterableDatasetDict(train=stream(ROWS[:2]))
    assert [r["response"] for r in load_traces(rows)] == ["0", "1"]
    with pytest.raises(ValueError, match="train.*test|test.*train"): load_traces(DatasetDict(test=Dataset.from_list(ROWS[:2])))

@pytest.mark.parametrize("source", [None, 3, dict(response="x"), b"abc", "", ["a response"]])
def test_what_is_no_source_is_a_clear_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError, TypeError), match="row|source|trace file"): load_traces(source)

@pytest.mark.parametrize("bad", [dict(limit=-1), dict(sample="random"), dict(config="x")])
def test_wrong_arguments(bad):
    with pytest.raises(ValueError): load_traces(ROWS, **bad)

def test_limit_larger_than_the_source(tmp_path):
    path = put(tmp_path / "a.jsonl", GOOD * 5)
    for sample in ("head", "shards", "reservoir"): assert len(load_traces(path, limit=99, sample=sample)) == 5

def test_head_reports_nothing_beyond_the_limit():
    rows = load_traces([*ROWS[:2], dict(response=3)], limit=2)
    assert len(rows) == 2 and not load_report(rows).unreadable

def parquet(tmp_path):
    paths = []
    for k in range(3):
        paths.append(str(tmp_path / f"{k}.parquet"))
        pq.write_table(pa.table(dict(response=[f"{k}-{i}" for i in range(50)])), paths[-1], row_group_size=10)
    return paths

def test_sampling_is_decided_by_the_seed(tmp_path):
    paths = parquet(tmp_path)
    opened = lambda: load_dataset("parquet", data_files=dict(train=paths), split="train", streaming=True)
    for source in (lambda: str(tmp_path), opened):
        draw = lambda **k: [r["response"] for r in load_traces(source(), **k)]
        first = draw(limit=20, sample="reservoir", seed=1)
        assert first == draw(limit=20, sample="reservoir", seed=1) != draw(limit=20, sample="reservoir", seed=2)
        assert len(set(first)) == 20 and first == sorted(first, key=lambda x: [int(y) for y in x.split("-")])
        shards = draw(limit=6, sample="shards")
        assert shards == draw(limit=6, sample="shards") and {x[0] for x in shards} <= set("012") and len(set(shards)) == 6
        assert draw(limit=2) == ["0-0", "0-1"]
    assert [r["response"] for r in load_traces(opened(), limit=20, sample="reservoir", seed=1)] == [r["response"] for r in load_traces(str(tmp_path), limit=20, sample="reservoir", seed=1)]
    assert {r["response"][0] for r in load_traces(opened(), limit=3, sample="shards")} == set("012")

def test_streamed_parquet_stays_a_stream(tmp_path):
    rows = load_traces(load_dataset("parquet", data_files=dict(train=parquet(tmp_path)), split="train", streaming=True))
    assert isinstance(rows, IterableDataset) and len(list(rows)) == 150 and load_report(rows).rows == 150

@pytest.mark.parametrize("bad, code", [(dict(response=None), "no_response"), (dict(x="b"), "no_response"), (dict(response=3), "not_text"), (dict(response="\ud800"), "lone_surrogate"), (dict(response="x", domain="\ud800"), "lone_surrogate")])
def test_a_stream_counts_the_rows_that_a_list_counts(bad, code):
    source = [dict(response="a"), bad, dict(response="c")]
    for rows in (load_traces(source), load_traces(stream(source))):
        assert [r["response"] for r in rows] == ["a", "c"]
        assert [u.code for u in load_report(rows).unreadable] == [code] and load_report(rows).rows == 2

def test_a_stream_has_the_values_of_a_list():
    source = [dict(response="a", problem=3, difficulty="easy"), dict(response="b", problem="x", difficulty=2.0)]
    assert list(load_traces(stream(source))) == list(load_traces(source))

def test_a_stream_that_is_read_twice_is_counted_once():
    rows = load_traces(stream([dict(response=None), dict(response="a"), dict(response="b")]))
    next(iter(rows)); list(rows); list(rows)
    assert load_report(rows).rows == 2 and len(load_report(rows).unreadable) == 1


# ---- writing
def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "o.html"
    path.write_text("old")
    with pytest.raises(ValueError): write_whole(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["o.html"]
    assert write_whole(path, "a\r\nb\n").read_bytes() == b"a\r\nb\n" and os.listdir(tmp_path) == ["o.html"]

def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "o.html"
    path.write_text("old")
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["o.html"]

def test_a_missing_folder_is_named_and_no_hidden_file_is(tmp_path):
    with pytest.raises(OSError) as e: write_whole(tmp_path / "none" / "o.html", "x")
    assert "none" in str(e.value) and ".o.html." not in str(e.value)

def test_a_name_as_long_as_a_name_can_be(tmp_path):
    assert write_whole(tmp_path / ("a" * 250 + ".html"), "x").read_text() == "x"

def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(path, "x")
        assert os.read(reader, 10) == b"x" and path.is_fifo()
    finally: os.close(reader)

def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"

def test_the_rights_of_the_old_file_stay(tmp_path):
    path = tmp_path / "o"
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600
