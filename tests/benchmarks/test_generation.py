"Generation with eviction against plain generate of the same tokens: python -m pytest tests/benchmarks/test_generation.py --slow -q."
import random
import time

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, Olmo3Config, Olmo3ForCausalLM, Qwen3Config, Qwen3ForCausalLM, StoppingCriteria

from tracebook.attention import kv_bytes_per_token, kv_occupancy, visible_until
from tracebook.generate import MementoDecoding
from tracebook.memento import parse_memento_ids
from tracebook.sources import sample_traces
from tracebook.tokens import add_memento_tokens, make_tokenizer, memento_token_ids
from tracebook.trace import QWEN3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]
N, AFTER, ROUNDS, WINDOW = 2500, 2000, 3, 512
TOK = make_tokenizer(sample_traces()["response"], 300)
add_memento_tokens(TOK)
IDS = memento_token_ids(TOK)
PROMPT = [7] * 8


def model_of(name):
    "A model with random weights: four layers that see everything, or three of them with a window."
    shape = dict(vocab_size=len(TOK), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=16384, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    torch.manual_seed(0)
    return (Olmo3ForCausalLM(Olmo3Config(**shape, sliding_window=WINDOW)) if name == "hybrid" else Qwen3ForCausalLM(Qwen3Config(**shape))).eval()


def text_of(block, memento=60):
    "Tokens to write: blocks of one length, each with its memento. The last token is never read, so one more is written."
    r, out = random.Random(block), []
    word = lambda k: [r.randrange(5, 250) for _ in range(k)]
    while len(out) <= N: out += [IDS["block_start"], *word(block), IDS["block_end"], IDS["summary_start"], *word(memento), IDS["summary_end"]]
    return out[:N + 1]


class Script(LogitsProcessor):
    "Makes a model write given tokens, one list a row."
    def __init__(self, texts): self.texts, self.rows = torch.tensor(texts), torch.arange(len(texts))

    def __call__(self, ids, scores):
        scores[self.rows, self.texts[:, ids.shape[1] - len(PROMPT)]] = 1e9
        return scores


class Watch(StoppingCriteria):
    "Notes for each token how long it took and what the cache holds then, and ends nothing; to look at the cache takes no time."
    def __init__(self, cache): self.cache, self.times, self.bytes, self.last = cache, [], [], None

    def __call__(self, ids, scores, **kwargs):
        now = time.process_time()  # of this process: what else runs on the machine does not count
        if self.last is not None: self.times.append(now - self.last)
        held = [x for layer in self.cache().layers if layer.is_initialized for x in (layer.keys, layer.values)]
        self.bytes.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}.values()))  # of the storage: a view frees nothing
        self.last = time.process_time()
        return torch.zeros(len(ids), dtype=torch.bool)


def plain(model, texts):
    "Stock `generate`."
    cache = DynamicCache(config=model.config)
    watch = Watch(lambda: cache)
    return write(model, texts, watch, past_key_values=cache), watch


def evict(model, texts):
    "What `generate_memento(policy=QWEN3)` calls, with the cache at hand."
    decoding = MementoDecoding(QWEN3, IDS)
    watch = Watch(lambda: decoding.run.cache)
    return write(model, texts, watch, custom_generate=decoding), watch


def write(model, texts, watch, **more):
    prompt = torch.tensor([PROMPT] * len(texts))
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=N + 1, logits_processor=[Script(texts)], stopping_criteria=[watch], **more)


def predicted(model, texts):
    "Bytes of the cache after each token, from the tokens alone; rows lie side by side in one tensor, which is as long as the longest."
    def sizes(text, window):
        ids = PROMPT + text[:N]
        curve = kv_occupancy(visible_until(parse_memento_ids(ids, IDS), len(ids), QWEN3), len(PROMPT))
        return (curve if window is None else curve.windowed(window)).occupancy.numpy()[len(PROMPT) - 1:]
    kinds = kv_bytes_per_token(model, model.dtype).groups
    return sum(len(texts) * size * np.max([sizes(t, window) for t in texts], axis=0) for _, window, size in kinds)


@pytest.mark.parametrize("name, blocks", [("one sequence", [400]), ("a batch of 4 that forget at different times", [400, 363, 326, 289]), ("hybrid", [400])])
def test_generate(benchmark, row, name, blocks):
    "2,500 tokens after a short prompt, the same for both, with blocks of some 400 tokens and mementos of 60; three of the hybrid's four layers see 512 tokens."
    model, texts, found = model_of(name), [text_of(b) for b in blocks], dict(plain=[], evict=[])

    def both():  # in turn, so that a slow minute is slow for both
        for way in (plain, evict):
            ids, watch = way(model, texts)
            assert ids[:, len(PROMPT):].tolist() == texts
            found[way.__name__].append(watch)

    benchmark.pedantic(both, rounds=ROUNDS)
    late = {way: [watch.times[AFTER:] for watch in watches] for way, watches in found.items()}
    median, mean = ({way: min(f(times) for times in rounds) * 1000 for way, rounds in late.items()} for f in (np.median, np.mean))
    what, beside = f"`generate_memento`, {name}, a token after {AFTER:,}", "plain `generate`"
    row(what, f"{median['evict']:.2f} ms", f"{beside}: {median['plain']:.2f} ms", median["evict"] / median["plain"], "at most 1")
    row(f"{what}, evictions included", f"{mean['evict']:.2f} ms", f"{beside}: {mean['plain']:.2f} ms", mean["evict"] / mean["plain"], "at most 1")
    (ours, *_), (theirs, *_), told = found["evict"], found["plain"], predicted(model, texts)
    what = f"its cache at the peak, {name}"
    row(what, f"{max(ours.bytes):,} bytes", f"the prediction of `kv_occupancy`: {told.max():,} bytes", max(ours.bytes) / told.max(), "exactly 1")
    row(what, f"{max(ours.bytes):,} bytes", f"{beside}: {max(theirs.bytes):,} bytes", max(ours.bytes) / max(theirs.bytes), "below 1")
    row(f"its cache at the end, {name}", f"{ours.bytes[-1]:,} bytes", f"the prediction of `kv_occupancy`: {told[-1]:,} bytes", ours.bytes[-1] / told[-1], "exactly 1")
    assert ours.bytes == told.tolist()
    assert max(ours.bytes) < max(theirs.bytes)
    assert median["evict"] <= median["plain"]
    assert mean["evict"] <= mean["plain"]
