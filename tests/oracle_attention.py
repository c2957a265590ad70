"""A second, deliberately slow reading of block attention, to check `tracebook.attention` against.

Nothing here is clever on purpose. A sequence is played one token at a time as a serving engine would do it: the KV
cache is a set of positions, a query sees what lies in the cache when it is fed (itself included), and an evicted block
is really taken out of the set. Sequences are strings in which every letter is a token and the four markers are
`(` block_start, `)` block_end, `[` summary_start, `]` summary_end.
"""


class Replay:
    "What every query saw: `rows[q]` is the set of the keys that were in the cache when token q had been fed."

    def __init__(self, rows, blocks, prompt_length):
        self.rows = rows
        self.blocks = blocks  # dicts with the positions of the markers and "evicted_by", in opening order
        self.prompt_length = prompt_length

    @property
    def matrix(self):
        "matrix[q][k]: may query q see key k?"
        n = len(self.rows)
        return [[k in self.rows[q] for k in range(n)] for q in range(n)]

    @property
    def visible_until(self):
        "For each key the first query, from its own on, that does not see it; the length if there is none."
        n = len(self.rows)
        answer = []
        for k in range(n):
            q = k
            while q < n and k in self.rows[q]:
                q += 1
            assert all(k not in self.rows[later] for later in range(q, n)), "a key came back"
            answer.append(q)
        return answer

    @property
    def spans(self):
        "(block_start, block_end, summary_start, summary_end) of each block."
        return [(block["("], block[")"], block["["], block["]"]) for block in self.blocks]

    @property
    def triggers(self):
        "For each block the position of the marker that evicts it, or None."
        return [block["evicted_by"] for block in self.blocks]

    @property
    def occupancy(self):
        return [len(row) for row in self.rows]

    @property
    def peak(self):
        "The largest cache from the end of the prefill on."
        largest = 0
        for t, occupied in enumerate(self.occupancy):
            if t >= self.prompt_length - 1:
                largest = max(largest, occupied)
        return largest

    @property
    def auc(self):
        return sum(occupied for t, occupied in enumerate(self.occupancy) if t >= self.prompt_length)

    @property
    def mean(self):
        generated = len(self.rows) - self.prompt_length
        return self.auc / generated if generated else None

    @property
    def evictions(self):
        "(step, tokens): so many keys that the step before still had are gone at this step."
        answer = []
        for t in range(1, len(self.rows)):
            gone = self.rows[t - 1] - self.rows[t]
            if gone:
                answer.append((t, len(gone)))
        return answer

    def windowed(self, window):
        "The occupancy of a layer in which a query reaches back `window` positions, its own included."
        return [len([k for k in row if t - k < window]) for t, row in enumerate(self.rows)]


def play(text, keep_last_n_blocks=0, mask_delimiters=False, keep_last_block_for_answer=False, restart=False, summary_end_sees_block=True, prompt_length=0):
    """Play `text` token by token; the first `prompt_length` tokens are fed without a look at their markers.

    `summary_end_sees_block`: the marker that triggers an eviction is fed first and the block goes after it (True), or
    the block goes first (False). With `restart` the summary is written over as if the block, with its delimiters, had
    gone at the summary_start.
    """
    blocks = []  # every block, in opening order
    open_blocks = []  # innermost last
    current = None  # the block whose summary is being written
    waiting = []  # completed blocks that are still in the cache, oldest completion first
    cache = set()
    rows = []

    def positions_of(block):
        "What goes when this block goes: everything between its delimiters, with them or without."
        if mask_delimiters or restart:
            return set(range(block["("], block[")"] + 1))
        return set(range(block["("] + 1, block[")"]))

    for t, token in enumerate(text):
        due = []  # the blocks that this token evicts
        if t >= prompt_length:
            if token == "(":
                block = {"(": t, ")": None, "[": None, "]": None, "evicted_by": None}
                blocks.append(block)
                open_blocks.append(block)
                if keep_last_block_for_answer:
                    due, waiting = waiting, []
            elif token == ")":
                if open_blocks:
                    open_blocks.pop()[")"] = t
            elif token == "[":
                candidates = [block for block in blocks if block[")"] is not None and block["["] is None]
                if candidates:
                    current = candidates[-1]
                    current["["] = t
            elif token == "]":
                if current is not None:
                    current["]"] = t
                    waiting.append(current)
                    current = None
                    if keep_last_n_blocks >= 0 and not keep_last_block_for_answer:
                        while len(waiting) > keep_last_n_blocks:
                            due.append(waiting.pop(0))

        for block in due:
            block["evicted_by"] = t
        if not summary_end_sees_block:
            for block in due:
                cache -= positions_of(block)
        cache.add(t)
        rows.append(set(cache))
        if summary_end_sees_block:
            for block in due:
                cache -= positions_of(block)
        if restart:
            for block in due:
                cache -= positions_of(block)
                for q in range(block["["], t + 1):
                    rows[q] -= positions_of(block)

    return Replay(rows, blocks, prompt_length)
