"The two stages of Memento training: batches of both stages against losses computed document by document with the rule written out."
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config, Phi3Config, Qwen3Config

from tracebook.masking import MementoCollator, pack, prepare_sft
from tracebook.memento import build_memento
from tracebook.sources import sample_traces
from tracebook.tokens import make_tokenizer
from tracebook.trace import PHI4, QWEN3, VANILLA, ContextPolicy

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
POLICIES = [QWEN3, PHI4, ContextPolicy(1), ContextPolicy(0, keep_last_block_for_answer=True)]
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096, initializer_range=.3, pad_token_id=0)
FAMILIES = dict(llama=LlamaConfig, qwen3=lambda **k: Qwen3Config(**k, head_dim=16), phi3=Phi3Config, olmo3=lambda **k: Olmo3Config(**k | dict(num_key_value_heads=2), sliding_window=40))


@pytest.fixture(scope="module")
def tok():
    out = make_tokenizer(sample_traces()["response"], vocab_size=600)
    out.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|pad|>"], special_tokens=True)
    out.eos_token, out.pad_token, out.chat_template = "<|im_end|>", "<|pad|>", TEMPLATE
    return out

@pytest.fixture(scope="module")
def rows(tok):
    "Three short traces of several lengths, under each policy."
    words = sample_traces()[0]["response"].replace("<", "").split()
    said = lambda at, n: " ".join(words[at:at + n])
    texts = [build_memento([(said(20 * k + i, 8 + i), said(20 * k + i + 3, 4)) for k in range(2 + i)], "\n\n" + said(5, 3 + i)) for i in range(3)]
    traces = [dict(problem=said(i, 6), response=text) for i, text in enumerate(texts)]
    return {p.label: prepare_sft(traces, tok, visible_until=True, policy=p) for p in POLICIES}

@pytest.fixture(params=list(FAMILIES))
def model(request, tok, rows):
    torch.manual_seed(0)
    size = 1 + max(max(r["input_ids"]) for r in rows[QWEN3.label])
    return AutoModelForCausalLM.from_config(FAMILIES[request.param](**SHAPE, vocab_size=size, bos_token_id=None, eos_token_id=None), dtype=torch.float64, attn_implementation="sdpa").eval()


def alone(model, row, stage):
    "Sum of the losses of one document and how many there are, under a mask that is built query by query."
    ids, labels, n = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), len(row["input_ids"])
    at, until = torch.arange(n), torch.tensor(row["visible_until"]) if stage == 2 else torch.full((n,), n)
    def bias(window):
        mask = torch.full((n, n), torch.finfo(torch.float64).min, dtype=torch.float64)
        for q in range(n): mask[q, (at <= q) & (q < until) & (q - at < (window or n))] = 0
        return mask[None, None]
    window = getattr(model.config, "sliding_window", None) if model.config.model_type == "olmo3" else None
    mask = dict(full_attention=bias(None), sliding_attention=bias(window)) if window else bias(None)
    with torch.no_grad(): logits = model(input_ids=ids[None], attention_mask=mask, position_ids=at[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], labels[1:], reduction="sum").item(), int((labels[1:] != -100).sum())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("policy", [QWEN3, PHI4], ids=lambda p: p.label)
def test_loss_of_a_batch(model, rows, policy, stage):
    data = rows[policy.label]
    sums, counts = zip(*(alone(model, r, stage) for r in data))
    batch = MementoCollator(model, stage=stage, pad_to_multiple_of=8)(list(data))
    assert batch["input_ids"].shape[0] == 3 and batch["input_ids"].shape[1] % 8 == 0
    with torch.no_grad(): loss = model(**batch).loss.item()
    assert loss == pytest.approx(sum(sums) / sum(counts), abs=1e-5) # the model takes its loss in float32


def test_loss_of_packed_rows(model, rows):
    data = rows[QWEN3.label]
    longest = sum(len(r["input_ids"]) for r in data)
    packed = pack(data, longest)
    assert len(packed) == 1
    sums, counts = zip(*(alone(model, r, 2) for r in data))
    with torch.no_grad(): loss = model(**MementoCollator(model)(list(packed))).loss.item()
    assert loss == pytest.approx(sum(sums) / sum(counts), abs=1e-5) # the model takes its loss in float32
    assert abs(sum(alone(model, r, 1)[0] for r in data) - sum(sums)) > 1e-3 # the mask matters


def test_labels_do_not_know_the_stage_or_the_policy(model, rows):
    first = rows[QWEN3.label]
    for data in rows.values():
        assert (data["input_ids"], data["labels"]) == (first["input_ids"], first["labels"])
        for stage in (1, 2):
            batch, other = MementoCollator(model, stage=stage)(list(data)), MementoCollator(model)(list(first))
            for k in ("input_ids", "labels", "position_ids"): assert torch.equal(batch[k], other[k])
    assert len({tuple(map(tuple, d["visible_until"])) for d in rows.values()}) == len(POLICIES)


def test_under_vanilla_the_stages_are_one(tok, model):
    data = prepare_sft(sample_traces().select([0]), tok, visible_until=True, policy=VANILLA)
    with torch.no_grad(): one, two = (model(**MementoCollator(model, stage=s)(list(data))).loss.item() for s in (1, 2))
    assert one == pytest.approx(two, abs=1e-6)


def test_a_step_of_stage_two(model, rows):
    batch = MementoCollator(model)(list(rows[QWEN3.label]))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_what_a_model_would_misread_is_refused(rows):
    config = dict(**SHAPE, vocab_size=600, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**config, head_dim=16), attn_implementation="sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"): MementoCollator(model)(list(rows[QWEN3.label]))
    model.config._attn_implementation = "sdpa"
    row = {k: v for k, v in rows[QWEN3.label][0].items() if k != "visible_until"}
    with pytest.raises(ValueError, match="row 0 has no visible_until"): MementoCollator(model)([row])
    assert "attention_mask" not in MementoCollator(model, stage=1)([row]) or MementoCollator(model, stage=1)([row])["attention_mask"].min() == 1
    with pytest.raises(ValueError, match="stage=0"): MementoCollator(model, stage=0)
