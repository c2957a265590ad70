"""A second, deliberately slow reading of what a context policy leaves of a text, to check the compressor against.

`blocks_of` follows the recovery and pairing rules of the format one by one (flat nesting, adjacent pairing), and
`play` lives through the text character by character: something may happen where a memento ends or a block starts.
"""

THINK, END_THINK = "<think>", "</think>"
BLOCK, END_BLOCK = "<|block_start|>", "<|block_end|>"
MEMENTO, END_MEMENTO = "<|summary_start|>", "<|summary_end|>"
MARKERS = (THINK, END_THINK, BLOCK, END_BLOCK, MEMENTO, END_MEMENTO)


def markers_of(text):
    "Every marker in the text as (marker, start, end); no marker overlaps another."
    found = []
    for marker in MARKERS:
        at = text.find(marker)
        while at >= 0:
            found.append((marker, at, at + len(marker)))
            at = text.find(marker, at + 1)
    return sorted(found, key=lambda m: m[1])


def blocks_of(text):
    """The blocks, in order, each as (first, start, end, last, done).

    `first`: where its start marker starts; `start`, `end`: its content; `last`: where its end marker ends, None if it
    has none; `done`: where the end marker of its memento ends, None if its memento is missing or never closed.
    """
    marks = markers_of(text)
    blocks = []
    waiting = None  # the block that the next memento may take: the last one, if it has no memento yet
    owner = None  # the block whose memento is open, None for an orphan
    now = "outside"  # outside | thinking | block | memento | answer
    for i, (mark, start, end) in enumerate(marks):
        rest = [m for m, _, _ in marks[i + 1 :]]
        if now == "outside":
            if mark == THINK:
                now = "thinking"
                continue
            if mark in (END_BLOCK, END_MEMENTO):
                continue
            now = "thinking"  # the opening tag stood in the prompt
        elif now == "answer":
            if mark == THINK and END_THINK in rest:
                now = "thinking"
            continue
        if mark == THINK:
            continue
        if mark == END_THINK:
            closer = {"block": END_BLOCK, "memento": END_MEMENTO}.get(now)
            others = [m for m in rest if m != END_THINK]
            if closer is not None and others[:1] == [closer]:
                continue  # quoted
            if now == "block":
                blocks[-1]["end"] = start
            now = "answer"
        elif mark == BLOCK:
            if now == "block":
                blocks[-1]["end"] = start
            blocks.append(dict(first=start, start=end, end=len(text), last=None, done=None))
            waiting = blocks[-1]
            now = "block"
        elif mark == END_BLOCK:
            if now == "block":
                blocks[-1].update(end=start, last=end)
                now = "thinking"
        elif mark == MEMENTO:
            if now == "block":
                blocks[-1]["end"] = start
            owner, waiting = waiting, None
            now = "memento"
        elif now == "memento":
            if owner is not None:
                owner["done"] = end
            now = "thinking"
    return [tuple(block[k] for k in ("first", "start", "end", "last", "done")) for block in blocks]


def blocks_of_trace(trace):
    "The same five numbers for the pairs that a trace says it has (nested ones, pairs that reach back, links set by hand)."
    out = []
    for pair in trace.pairs:
        block, memento = pair.block, pair.memento
        first = block.start - len(BLOCK)
        assert trace.text[first : block.start] == BLOCK
        last = done = None
        if block.complete:
            last = block.end + len(END_BLOCK)
            assert trace.text[block.end : last] == END_BLOCK
        if memento is not None and memento.complete:
            done = memento.end + len(END_MEMENTO)
            assert trace.text[memento.end : done] == END_MEMENTO
        out.append((first, block.start, block.end, last, done))
    return out


def play(length, blocks, keep, mask_delimiters, keep_last_block_for_answer=False):
    "(which characters are gone at the end, which blocks were evicted), as two lists of truth values."
    gone, evicted = [False] * length, [False] * len(blocks)
    remembered = []  # summarised blocks still in view, oldest summary first

    def evict(i):
        first, start, end, last, _ = blocks[i]
        evicted[i] = True
        for at in range(first, last) if mask_delimiters else range(start, end):
            gone[at] = True

    for at in range(length + 1):
        for i, (_, _, _, last, done) in enumerate(blocks):
            if done == at and last is not None:
                remembered.append(i)
        if keep_last_block_for_answer:
            due = len(remembered) if any(first == at for first, *_ in blocks) else 0
        else:
            due = 0 if keep == -1 else len(remembered) - keep
        for _ in range(due):
            evict(remembered.pop(0))
    return gone, evicted


def compress(text, keep=1, mask_delimiters=True, keep_last_block_for_answer=False):
    "The characters that survive."
    gone, _ = play(len(text), blocks_of(text), keep, mask_delimiters, keep_last_block_for_answer)
    return "".join(c for c, is_gone in zip(text, gone) if not is_gone)


def complete_pairs(text):
    "How many blocks can be evicted at all."
    return sum(last is not None and done is not None for _, _, _, last, done in blocks_of(text))
