"What `tokenize_chats` makes is trained on as it is, by TRL and by transformers, and the loss is the one that its labels say."
import copy

import pytest
import torch
import torch.nn.functional as F

from tracebook.masking import collate, pack, tokenize_chats
from tracebook.sources import sample_traces
from tracebook.tokens import make_tokenizer

pytest.importorskip("accelerate")
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

TEMPLATE = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LENGTHS = (3, 60, 17, 8, 31, 1, 44)  # of the answers, in words
MAX_LENGTH = 400


@pytest.fixture(scope="module")
def tok():
    out = make_tokenizer(sample_traces()["response"], vocab_size=600)
    out.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|pad|>"], special_tokens=True)
    out.eos_token, out.pad_token, out.chat_template = "<|im_end|>", "<|pad|>", TEMPLATE
    return out


@pytest.fixture(scope="module")
def data(tok):
    "Chats of several lengths: one turn or two, with reasoning and without."
    words = sample_traces()[0]["response"].split()
    chats = []
    for i, n in enumerate(LENGTHS):
        answer = dict(role="assistant", content=" ".join(words[i:i + n]))
        if i % 2: answer["reasoning_content"] = " ".join(words[-n - 5:])
        chats.append([dict(role="user", content=f"Question {i}?"), answer] + [dict(role="user", content="Why?"), dict(role="assistant", content=" ".join(words[:i + 2]))] * (i % 3 == 0))
    made = tokenize_chats(tok, chats)
    assert len(made) == len(chats) and 100 < max(map(len, made["input_ids"])) < MAX_LENGTH
    return made


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tok):
    "Qwen3 with two layers and weights of chance, large enough that what a token sees makes a difference."
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                         max_position_embeddings=512, initializer_range=.3, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None, attn_implementation=request.param)
    return Qwen3ForCausalLM(config).eval()


def logits_of(model, ids):
    "Of one document, alone."
    with torch.no_grad(): return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def loss_by_hand(model, rows):
    "Mean over all trained tokens of the rows, each read alone; token t is told by what stands before it."
    total, count = 0., 0
    for ids, labels in zip(rows["input_ids"], rows["labels"]):
        log_probs, wanted = F.log_softmax(logits_of(model, ids)[:-1].double(), -1), torch.tensor(labels)[1:]
        trained = (wanted != -100).nonzero()[:, 0]
        total, count = total - log_probs[trained, wanted[trained]].sum().item(), count + len(trained)
    return total / count


def recording(kind):
    "A trainer that keeps its batches and losses."
    class Recording(kind):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batch = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
            out = super().compute_loss(model, inputs, *args, **kwargs)
            self.__dict__.setdefault("seen", []).append((batch, (out[0] if isinstance(out, tuple) else out).item()))
            return out
    return Recording


def arguments(folder, **more):
    "Three steps, all rows in each, so that no order of rows matters; no dropout is in the model."
    return dict(output_dir=str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=len(LENGTHS), max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0) | more


def train(trainer):
    "The batches and the losses."
    trainer.train()
    batches, losses = zip(*trainer.seen)
    assert len(losses) == 3 and losses[2] < losses[0]
    return batches, losses


def sft(model, tok, data, folder, **more):
    "TRL's trainer."
    trl = pytest.importorskip("trl")
    config = trl.SFTConfig(**arguments(folder, bf16=False, max_length=MAX_LENGTH) | more)
    return recording(trl.SFTTrainer)(model=copy.deepcopy(model), args=config, train_dataset=data, processing_class=copy.deepcopy(tok))


def documents(batch):
    "(first, end) of the documents of a batch in one line."
    positions = batch["position_ids"][0]
    firsts = (positions == 0).nonzero()[:, 0].tolist()
    return list(zip(firsts, [*firsts[1:], len(positions)]))


def test_by_hand_is_not_by_chance(model, data):
    "The loss by hand tells labels that are shifted twice, and tokens that should not be trained."
    right, rows = loss_by_hand(model, data), list(data)
    twice = dict(input_ids=data["input_ids"], labels=[[*r["labels"][1:], -100] for r in rows])
    everything = dict(input_ids=data["input_ids"], labels=data["input_ids"])
    assert all(abs(loss_by_hand(model, d) - right) > 1e-2 for d in (twice, everything))


def test_sft_trainer(model, tok, data, tmp_path):
    "TRL, a row for each document."
    by_hand = loss_by_hand(model, data)
    batches, losses = train(sft(model, tok, data, tmp_path))
    assert losses[0] == pytest.approx(by_hand, abs=1e-5)
    assert sorted(n for n in batches[0]["attention_mask"].sum(1).tolist()) == sorted(map(len, data["input_ids"]))
    assert int((batches[0]["labels"] != -100).sum()) == data.ledger.trained


@pytest.mark.parametrize("options", [dict(packing=True, packing_strategy="bfd"), dict(padding_free=True, max_length=None)], ids=["packed", "padding-free"])
def test_sft_trainer_without_padding(model, tok, data, tmp_path, options):
    "TRL, documents one after another in one row: they do not see each other, so loss and logits are as of each alone."
    by_hand = loss_by_hand(model, data)
    batches, losses = train(sft(model, tok, data, tmp_path, **options))
    batch = batches[0]
    assert losses[0] == pytest.approx(by_hand, abs=1e-5)
    assert "attention_mask" not in batch and batch["input_ids"].shape == (1, data.ledger.tokens)
    assert int((batch["labels"] != -100).sum()) == data.ledger.trained
    with torch.no_grad(): packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    found = []
    for a, b in documents(batch):
        ids = batch["input_ids"][0, a:b].tolist()
        torch.testing.assert_close(packed[a:b], logits_of(model, ids), atol=1e-5, rtol=1e-5)
        found.append((ids, batch["labels"][0, a:b].tolist()))
    assert sorted(found) == sorted(zip(data["input_ids"], data["labels"]))


def test_an_attention_mask_undoes_the_separation(model, tok, data, tmp_path):
    "With a mask of ones beside the positions documents do see each other: the comparison above can fail."
    batch = next(iter(sft(model, tok, data, tmp_path, packing=True, packing_strategy="bfd").get_train_dataloader()))
    with torch.no_grad(): mixed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits[0]
    a, b = documents(batch)[1]
    assert (mixed[a:b] - logits_of(model, batch["input_ids"][0, a:b].tolist())).abs().max() > 1e-2


def padded(tok):
    "A collator of the plainest kind."
    def collate(rows):
        n = max(len(r["input_ids"]) for r in rows)
        fill = lambda key, value: torch.tensor([r[key] + [value] * (n - len(r[key])) for r in rows])
        return dict(input_ids=fill("input_ids", tok.pad_token_id), labels=fill("labels", -100), attention_mask=torch.tensor([[1] * len(r["input_ids"]) + [0] * (n - len(r["input_ids"])) for r in rows]))
    return collate


@pytest.mark.parametrize("kind", ["own", "seq2seq"])
def test_trainer(model, tok, data, tmp_path, kind):
    "transformers' trainer, with an own collator and with the one of transformers that pads labels."
    from transformers import DataCollatorForSeq2Seq
    by_hand = loss_by_hand(model, data)
    collate = padded(tok) if kind == "own" else DataCollatorForSeq2Seq(tok, padding=True)
    keep = data if kind == "own" else data.select_columns(["input_ids", "labels"])  # tokenizer.pad knows no other columns
    trainer = recording(Trainer)(model=copy.deepcopy(model), args=TrainingArguments(**arguments(tmp_path)), train_dataset=keep, data_collator=collate)
    batches, losses = train(trainer)
    assert losses[0] == pytest.approx(by_hand, abs=1e-5)
    assert int((batches[0]["labels"] != -100).sum()) == data.ledger.trained


def test_trainer_one_row_at_a_time(model, data, tmp_path):
    "Without padding the collator that comes with transformers takes the rows as they are, positions included."
    from transformers import default_data_collator
    seen = []
    first = data.select([1])
    class Keep(recording(Trainer)):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(set(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)
    trainer = Keep(model=copy.deepcopy(model), args=TrainingArguments(**arguments(tmp_path, per_device_train_batch_size=1)), train_dataset=first, data_collator=default_data_collator)
    _, losses = train(trainer)
    assert seen[0] >= {"input_ids", "labels", "position_ids"} and losses[0] == pytest.approx(loss_by_hand(model, first), abs=1e-5)


# ------------------------------------------------------------------------------- packed and padded by `pack` and `collate`

@pytest.fixture(scope="module")
def packed(data):
    out = pack(data, MAX_LENGTH)
    assert 1 < len(out) < len(data)
    return out


def mean_loss(model, batch):
    "Of a batch, in one forward pass; labels are shifted here, and nowhere else."
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch}
    with torch.no_grad(): logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=-100).item()


def test_every_document_is_there_once(data, packed):
    found = []
    for r in packed:
        assert sum(r["seq_lengths"]) == len(r["input_ids"]) == len(r["labels"]) == len(r["position_ids"]) <= MAX_LENGTH
        at = 0
        for n in r["seq_lengths"]:
            assert r["position_ids"][at:at + n] == list(range(n)) and r["labels"][at] == -100
            found.append((r["input_ids"][at:at + n], r["labels"][at:at + n]))
            at += n
    assert sorted(i for i, _ in found) == sorted(data["input_ids"])
    assert sum(x != -100 for _, labels in found for x in labels) == data.ledger.trained


def test_without_padding(model, data, packed):
    "All in one line, no attention mask, positions that begin again."
    batch = collate(list(packed), padding_free=True)
    assert "attention_mask" not in batch and batch["input_ids"].shape == (1, data.ledger.tokens)
    assert mean_loss(model, batch) == pytest.approx(loss_by_hand(model, data), abs=1e-5)
    with torch.no_grad(): logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    parts = documents(batch)
    assert len(parts) == len(data)
    for a, b in parts: torch.testing.assert_close(logits[a:b], logits_of(model, batch["input_ids"][0, a:b].tolist()), atol=1e-5, rtol=1e-5)


def test_with_padding(model, data):
    "A row for each document, filled up to the longest."
    batch = collate(list(data), padding_free=False)
    longest = max(map(len, data["input_ids"]))
    assert batch["input_ids"].shape == (len(data), longest) and int((batch["labels"] != -100).sum()) == data.ledger.trained
    assert batch["attention_mask"].sum(1).tolist() == [len(i) for i in data["input_ids"]]
    assert mean_loss(model, batch) == pytest.approx(loss_by_hand(model, data), abs=1e-5)


def test_trainer_with_collate(model, data, packed, tmp_path):
    "transformers' trainer takes packed rows with this collator."
    from transformers import Trainer, TrainingArguments
    by_hand = loss_by_hand(model, data)
    trainer = recording(Trainer)(model=copy.deepcopy(model), args=TrainingArguments(**arguments(tmp_path, remove_unused_columns=False)), train_dataset=packed, data_collator=lambda rows: {k: v for k, v in collate(rows, padding_free=True).items() if k in ("input_ids", "labels", "position_ids")})
    _, losses = train(trainer)
    assert losses[0] == pytest.approx(by_hand, abs=1e-5)


def test_sft_trainer_on_packs(model, tok, data, packed, tmp_path):
    "TRL takes packed rows as they are: it reads `seq_lengths`."
    trl = pytest.importorskip("trl")
    by_hand = loss_by_hand(model, data)
    config = trl.SFTConfig(**arguments(tmp_path, bf16=False, padding_free=True, max_length=None, dataset_kwargs=dict(skip_prepare_dataset=True)))
    trainer = recording(trl.SFTTrainer)(model=copy.deepcopy(model), args=config, train_dataset=packed, processing_class=copy.deepcopy(tok))
    batches, losses = train(trainer)
    assert losses[0] == pytest.approx(by_hand, abs=1e-5)
    assert "attention_mask" not in batches[0] and len(documents(batches[0])) == len(LENGTHS)
