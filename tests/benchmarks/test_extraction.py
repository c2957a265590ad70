"Extraction of hidden states against the bare decoder and against the usual loop: python -m pytest tests/benchmarks/test_extraction.py --slow -q."
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tracebook import extract
from tracebook.extract import extract_hidden_states
from tracebook.sources import read_rows, sample_traces
from tracebook.tokens import make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]
ROUNDS, TRACES, BUDGET, AT_ONCE, VOCABULARY = 9, 96, 4096, 8, 8192


@pytest.fixture(scope="module")
def tok(): return make_tokenizer(sample_traces()["response"], 2000)


@pytest.fixture(scope="module")
def model():
    "A Llama of width 256 and eight blocks; its vocabulary is to its width about as that of an 8B model is."
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def rows(tok):
    "Texts with lengths from a log-normal distribution with sigma 1."
    ids, at, out = tok.encode("\n".join(sample_traces()["response"])), 0, []
    for n in np.random.default_rng(0).lognormal(5, 1, TRACES).astype(int).clip(8, 4000).tolist():
        out.append(dict(response=tok.decode(ids[at:at + n])))
        at = (at + n) % (len(ids) - 4100)
    return out


def seconds(f):
    "CPU time of the process, all threads together: what else runs on the machine does not count."
    start = time.process_time()
    f()
    return time.process_time() - start


def ours(model, rows, tok, folder): return extract_hidden_states(model, rows, folder, tokenizer=tok, chat=False, max_tokens_per_batch=BUDGET, progress=False)


def batches(rows, tok, folder):
    "The rectangles that an extraction computes."
    census = extract._Census(folder).fill(read_rows(rows), tok, False, None, VOCABULARY, True).done()
    some = [b for w in extract._windows(census.rows, 10 ** 9 // 512, 8 * BUDGET) for b in extract._bucketed(range(w.first, w.last), census.fed, BUDGET)]
    return [extract._feed(b, census, False).inputs["input_ids"] for b in some], int(census.fed.sum())


@torch.inference_mode()
def bare(model, rectangles):
    for ids in rectangles: model.model(ids, use_cache=False)


@torch.inference_mode()
def usual(model, rows, tok):
    "Fixed batches in the order of the input, padded, all hidden states asked for and kept, scores of all words computed."
    kept = []
    for at in range(0, len(rows), AT_ONCE):
        ids = [tok.encode(r["response"]) for r in rows[at:at + AT_ONCE]]
        width = max(map(len, ids))
        mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in ids])
        out = model(torch.tensor([x + [0] * (width - len(x)) for x in ids]), attention_mask=mask, output_hidden_states=True)
        kept.append([h[mask.bool()].bfloat16() for h in out.hidden_states])
    return kept


def test_speed(benchmark, row, model, rows, tok, tmp_path):
    "Everything that the call does counts: reading and tokenizing rows, the start-up test, hashing, writing."
    rectangles, tokens = batches(rows, tok, tmp_path)
    times, number = dict(ours=[], bare=[], usual=[]), iter(range(99))
    ways = dict(ours=lambda: ours(model, rows, tok, tmp_path/str(next(number))), bare=lambda: bare(model, rectangles), usual=lambda: usual(model, rows, tok))
    ways["bare"]()

    def turn():  # in turn, so that a slow minute is slow for all
        for name in ("ours", "bare"): times[name].append(seconds(ways[name]))
        if len(times["usual"]) < 2: times["usual"].append(seconds(ways["usual"]))

    benchmark.pedantic(turn, rounds=ROUNDS)
    speed = {name: tokens / min(t) for name, t in times.items()}
    what, filling = f"`extract_hidden_states`, {TRACES} texts of {tokens:,} tokens", 1 - tokens / sum(x.numel() for x in rectangles)
    row(what, f"{speed['ours']:,.0f} tokens/s", f"the decoder alone on the same batches: {speed['bare']:,.0f} tokens/s", speed["ours"] / speed["bare"], "at least 0.95")
    row(what, f"{speed['ours']:,.0f} tokens/s, {filling:.0%} filling", f"{AT_ONCE} rows at a time, all layers, logits: {speed['usual']:,.0f} tokens/s", speed["ours"] / speed["usual"], "at least 2.5")
    here = load_file(tmp_path/"0"/"hidden_states_layer7_shard00000.safetensors")["hidden_states"]
    assert len(here) == tokens
    assert speed["ours"] >= .95 * speed["bare"]
    assert speed["ours"] >= 2.5 * speed["usual"]


MEMORY = """
    import gc, json, sys, threading, time
    from pathlib import Path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from tracebook.extract import extract_hidden_states
    from tracebook.sources import sample_traces
    from tracebook.tokens import make_tokenizer
    torch.set_num_threads(1)
    blocks, rows, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    tok = make_tokenizer(sample_traces()["response"], 1000)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=blocks, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).eval()
    text = "12 + 30 = 42. " * 30
    some = ({"response": text} for _ in range(rows))  # a stream: no list of rows is in memory
    def held(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    extract_hidden_states(model, [{"response": text}] * 2, folder/"first", tokenizer=tok, chat=False, progress=False)
    gc.collect()
    before, most, on = held(), 0, True
    def watch():
        global most
        while on:
            most = max(most, held())
            time.sleep(.001)
    thread = threading.Thread(target=watch)
    thread.start()
    extract_hidden_states(model, some, folder/"second", tokenizer=tok, chat=False, dtype="float32", shard_size="4MB", max_tokens_per_batch=2048, progress=False)
    on = False
    thread.join()
    print(json.dumps([before, most]))
"""


def memory(tmp_path, blocks, rows):
    "Bytes above what the process held before it began, weights included in that."
    script = tmp_path/"memory.py"
    script.write_text(textwrap.dedent(MEMORY))
    done = subprocess.run([sys.executable, script, str(blocks), str(rows), tmp_path/f"{blocks} {rows}"], capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent.parent), OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="100000"))
    assert done.returncode == 0, done.stderr[-2000:]
    before, most = eval(done.stdout)
    return most - before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory(benchmark, row, tmp_path):
    "Peak of resident memory above the weights: four times the blocks, and four times the rows."
    found = {}
    def measure(): found.update({(b, n): memory(tmp_path, b, n) for b, n in ((2, 96), (8, 96), (2, 384))})
    benchmark.pedantic(measure, rounds=1)
    few, deep, many = found.values()
    what, says = "peak memory of `extract_hidden_states` above the weights", lambda n: f"{n / 1e6:.0f} MB"
    row(f"{what}, 8 blocks", says(deep), f"2 blocks: {says(few)}", deep / few, "at most 1.05")
    row(f"{what}, 384 rows", says(many), f"96 rows: {says(few)}", many / few, "at most 1.05")
    assert deep <= 1.05 * few
    assert many <= 1.05 * few
