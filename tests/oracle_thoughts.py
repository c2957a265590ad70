"""A second, deliberately slow reading of thought trees, to check the parser against.

Nothing here is clever on purpose: the text is walked character by character, fathers are looked up in the whole
list of nodes. `reference_read` follows the grammar and the table of malformed rows of the format one by one.

Where the format leaves a choice, the reading leaves it too, in one of three ways.

*Alternatives.* A node may have several right parents, texts or hints, and a defect several right codes:

- type tags directly after the type: they may stay in the text or not; another tag than the first is `type_repeated`
  or `type_in_text`, and so is any tag later in the text of a node that has a type;
- a father id that is the node's own id and also that of an earlier node: the earlier node, or `self_father`;
- several later nodes with the father's id and no earlier one: any of them;
- fathers in a ring: one link of the ring at least is cut, under any of the codes for fathers;
- a hint after white space or after an unrated thought: `hint_between_nodes` or not (glued to a rating: always).

*Allowed codes.* They may be reported or not: `duplicate_id` on the first holder of an id, `empty_thought` for
white space only or where the thought was not closed, `missing_thought_end` where a header was doubled and only one end
follows, `multiple_roots` where one node has the father -1 and others found none, `missing_root` for an empty text,
what the father of a node would entail whose father is no integer, `root_rated` for a bad rating. How often a code is
reported for one node is left open, and where exactly, as long as it is at the defect and inside the node.

*No reading* (`definite` is False: only the nodes before the trouble are given, without their fathers, and what they need
by themselves): tokens that stand where the grammar has
none and the table no row (a stray end, a half header, two ratings, two thoughts, an unclosed rating or hint, a token
other than a type inside a thought, a header without a thought, a thought before the first header that is not the rest
of a header), text between nodes, a doubled header outside the root or without its `<start_of_thought>`, a tuple whose
second half has another form or that stands inside the root's thought, white space inside headers and ratings, digits
that are not ASCII, ids of more than 64 characters, local ids of -1. Such texts must still be reported (`broken`), unless
only white space or digits make them differ from the grammar.

By the letter, and therefore demanded: a type tag after a space is text (`type_in_text`); an unclosed thought goes up to
the next header or rating, white space included; such a node has `missing_rating` too if none follows; `missing_root`
means that no node has the father -1, `multiple_roots` that several have, whatever other nodes have no parent; ids are
`-?[0-9]+`, so `+1`, `1_0` and the empty id are `bad_id`; a thought without a type that begins with `<word>`, at most two
edits from a type, has `unknown_type_tag`.
"""

import functools
import itertools
import re
from typing import NamedTuple

F, F_END, L, L_END = "<start_of_father_id>", "<end_of_father_id>", "<start_of_local_id>", "<end_of_local_id>"
T, T_END, R, R_END = "<start_of_thought>", "<end_of_thought>", "<start_of_rating>", "<end_of_rating>"
RATINGS = ("<positive_rating>", "<negative_rating>", "<unknown_rating>")
TYPES = ("<problem>", "<critic>", "<refine>", "<conclusion>", "<expansion>")
HINT, HINT_END = "<hint>", "</hint>"
PUBLISHED = (F, F_END, L, L_END, T, T_END, R, R_END, *RATINGS, *TYPES[:4])
TOKENS = (*PUBLISHED, TYPES[4], HINT, HINT_END)
WORDS = {"True": "positive", "False": "negative", "None": "unknown"}
MISSPELLED = "<unknow_rating>"

NODE_CODES = frozenset(
    "doubled_header duplicate_id forward_father orphan_father self_father bad_id rating_misspelled rating_word bad_rating "
    "missing_rating root_rated missing_thought_end empty_thought type_repeated type_in_text hint_between_nodes "
    "unknown_type_tag".split()
)
TREE_CODES = frozenset("tuple_root missing_root multiple_roots left_truncated".split())
FILE_CODES = frozenset("json_truncated empty_file".split())
FATHER_CODES = frozenset("forward_father orphan_father self_father".split())


class Node(NamedTuple):
    "A node as the reference reads it; alternatives are tuples."
    start: int  # of its header
    end: int  # of the next header, or of the text
    local_id: int | None
    parent_id: int | None
    type: str
    texts: tuple  # right texts
    rating: str | None
    hints: tuple  # right hints
    complete: bool | None  # None: left open


class Need(NamedTuple):
    "An issue that has to be reported: one of `codes`, in the node `index` (None: of the tree), touching [start, end]."
    codes: frozenset
    index: int | None
    start: int
    end: int


class Read(NamedTuple):
    nodes: list  # of Node; only the first ones if the reading is not definite
    parents: list  # for each node the tuple of right parents (indexes or None)
    needs: list  # of Need
    allowed: set  # of (code, index or None): may be reported too
    definite: bool  # False: the rest of the nodes, the fathers and other codes are open
    broken: bool  # True: at least one issue has to be reported


class Undecided(Exception):
    "The format has no reading for this."


# ---------------------------------------------------------------------------------------------------- pieces


def token_at(text, i):
    "The token that starts at offset `i`, or None."
    for token in TOKENS:
        if text[i] == "<" and text[i : i + len(token)] == token:
            return token
    return None


def pieces_of(text):
    "[(token or None, start, end)]: tokens and the texts between them (None), in order."
    pieces, begin, i = [], 0, 0
    while i < len(text):
        token = token_at(text, i)
        if token is None:
            i += 1
            continue
        if begin < i:
            pieces.append((None, begin, i))
        pieces.append((token, i, i + len(token)))
        i = begin = i + len(token)
    if begin < len(text):
        pieces.append((None, begin, len(text)))
    return pieces


class Cursor:
    "A place in the list of pieces."

    def __init__(self, text):
        self.text, self.pieces, self.i = text, pieces_of(text), 0

    def token(self, ahead=0):
        "The token here; None for a text, '' at the end."
        return self.pieces[self.i + ahead][0] if self.i + ahead < len(self.pieces) else ""

    def offset(self):
        return self.pieces[self.i][1] if self.i < len(self.pieces) else len(self.text)

    def words(self):
        "The text here; '' before a token and at the end."
        if self.token() is not None:
            return ""
        _, start, end = self.pieces[self.i]
        return self.text[start:end]

    def header(self):
        "(father's id, local id, pieces taken) as printed if a full header starts here, or None."
        ids, at = [], 0
        for opening, closing in ((F, F_END), (L, L_END)):
            if self.token(at) != opening:
                return None
            at += 1
            if self.token(at) is None:
                _, start, end = self.pieces[self.i + at]
                ids.append(self.text[start:end])
                at += 1
            else:
                ids.append("")
            if self.token(at) != closing:
                return None
            at += 1
        return ids[0], ids[1], at


def is_blank(text):
    return text.strip() == ""


def number(printed):
    "The id as an integer, or None for what is no integer."
    if printed.removeprefix("-").isdigit() and not printed.isascii() or printed != printed.strip() and printed.strip():
        raise Undecided("an id that some may take for an integer")
    if len(printed) > 64:
        raise Undecided("an id that not every integer type holds")
    if not re.fullmatch("-?[0-9]+", printed):
        return None
    return int(printed)


# ---------------------------------------------------------------------------------------------------- the grammar

_INT = r"\s*-?\d+\s*"
_TEXT = "(?:(?!" + "|".join(map(re.escape, TOKENS)) + ")[\\s\\S])*"
_HEADER = rf"{F}{_INT}{F_END}\s*{L}{_INT}{L_END}"
_RATED = rf"\s*{R}\s*(?:{'|'.join(RATINGS)})\s*{R_END}"
_NODE = rf"{_HEADER}\s*{T}(?:{'|'.join(TYPES)})?{_TEXT}{T_END}(?:{_RATED})?(?:\s*{HINT}{_TEXT}{HINT_END})?"
LOOSE = re.compile(rf"{_TEXT}{_NODE}(?:\s*{_NODE})*\s*")  # the grammar, with white space wherever some may read over it


def follows_grammar(text):
    "Is this a tree by the grammar, or one by it but for white space and the kind of digits?"
    return LOOSE.fullmatch(text) is not None


# ---------------------------------------------------------------------------------------------------- one node


@functools.cache
def edits(a, b):
    "Least number of letters to put in, leave out or change."
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def near_tag(text):
    "The tag that a thought begins with and that is nearly one of a type; None if there is none."
    word = re.match(r"<([^\W\d_]\w*)>", text)
    return word[0] if word and len(word[1]) < 20 and any(edits(word[1], kind[1:-1]) <= 2 for kind in TYPES) else None


def read_node(cursor, index, needs, allowed, tuple_open):
    "Read the node whose header is here; returns (start, local_id, parent_id, type, texts, rating, hints, complete, rated)."
    start = cursor.offset()
    father, local, taken = cursor.header()
    cursor.i += taken
    parent_id, local_id = number(father), number(local)

    def need(codes, begin, end):
        needs.append(Need(frozenset(codes.split()), index, begin, end))

    if parent_id is None or local_id is None:
        need("bad_id", start, cursor.offset())
    if local_id == -1:
        raise Undecided("-1 as a local id is also what a root prints as its father")
    if cursor.token() != T:
        raise Undecided("a header without a thought")
    cursor.i += 1

    doubled = False
    if cursor.header() and cursor.header()[:2] == (father, local):
        if parent_id != -1:
            raise Undecided("a doubled header outside the root")
        begin = cursor.offset()
        cursor.i += cursor.header()[2]
        if cursor.token() != T:
            raise Undecided("a doubled header without its thought")
        doubled = True
        cursor.i += 1
        need("doubled_header", begin, cursor.offset())
        if cursor.header() and cursor.header()[:2] == (father, local):
            raise Undecided("a header three times")

    kind, opening = "expansion", cursor.offset()
    typed = cursor.token() in TYPES
    if typed:
        kind = cursor.token()[1:-1]
        opening += len(cursor.token())
        cursor.i += 1
    begin, repeated = opening, []
    while typed and cursor.token() in TYPES:
        repeated.append(cursor.token())
        cursor.i += 1
    texts_from = [begin]
    for tag in repeated:
        texts_from.append(texts_from[-1] + len(tag))
    if repeated:
        need("type_repeated" if set(repeated) == {f"<{kind}>"} else "type_repeated type_in_text", start, cursor.offset())
        if set(repeated) != {f"<{kind}>"}:
            allowed |= {("type_repeated", index), ("type_in_text", index)}

    while True:  # up to the end of the thought
        if cursor.token() in TYPES:
            tag_at = cursor.offset()
            need("type_repeated type_in_text" if typed else "type_in_text", tag_at, tag_at + len(cursor.token()))
            if typed:
                allowed |= {("type_repeated", index), ("type_in_text", index)}
            cursor.i += 1
        elif cursor.token() is None:
            if parent_id == -1 and cursor.words().strip() in ("('", '("') and cursor.token(1) == F:
                raise Undecided("a tuple inside the root's thought")
            cursor.i += 1
        else:
            break
    end = cursor.offset()
    texts = tuple(cursor.text[a:end] for a in texts_from)
    if not typed and (word := near_tag(texts[0])):
        need("unknown_type_tag", opening, opening + len(word))
    closed = cursor.token() == T_END
    if not closed and not (cursor.token() in ("", R) or cursor.header()):
        raise Undecided("a token that no thought may hold")
    if closed:
        cursor.i += 1
        if not any(texts):
            need("empty_thought", start, cursor.offset())
        elif any(map(is_blank, texts)):
            allowed.add(("empty_thought", index))
        if doubled and cursor.token() == T_END:
            cursor.i += 1
        elif doubled:
            allowed.add(("missing_thought_end", index))
            closed = None
    else:
        need("missing_thought_end", start, end)
        if any(map(is_blank, texts)):
            allowed.add(("empty_thought", index))
    if closed and repeated and is_blank(texts[-1]):
        needs[:] = [n for n in needs if n.index != index or "empty_thought" not in n.codes]
        allowed.add(("empty_thought", index))

    if tuple_open and closed and not doubled and cursor.token() is None:
        wrapper = cursor.words().rstrip()
        if not is_blank(wrapper):
            if not re.fullmatch(r"""['"], (?:'[^'\\]*'|"[^"\\]*"|None)\)""", wrapper) or parent_id != -1:
                raise Undecided("text after the root that is no second half of a tuple")
            needs.append(Need(frozenset(["tuple_root"]), None, 0, cursor.offset() + len(wrapper)))
            cursor.i += 1
            if cursor.token() in (R, HINT):
                raise Undecided("a rating after the second half of a tuple")
            return start, local_id, parent_id, kind, texts, None, (None,), closed, False

    rating, rated = None, False
    after_blank = cursor.token() is None and is_blank(cursor.words())
    if cursor.token() == R or after_blank and cursor.token(1) == R:
        cursor.i += after_blank
        rating_at, rated = cursor.offset(), True
        cursor.i += 1
        value_at = cursor.offset()
        while cursor.token() is None or cursor.token() in RATINGS:
            cursor.i += 1
        value = cursor.text[value_at : cursor.offset()]
        if cursor.token() != R_END:
            raise Undecided("a rating that is not closed, or holds other tokens")
        cursor.i += 1
        if value in RATINGS:
            rating = value[1:].removesuffix("_rating>")
        elif value == MISSPELLED:
            rating = "unknown"
            need("rating_misspelled", rating_at, cursor.offset())
        elif value in WORDS:
            rating = WORDS[value]
            need("rating_word", rating_at, cursor.offset())
        elif value.strip() in (*RATINGS, MISSPELLED, *WORDS):
            raise Undecided("a rating between white space")
        else:
            need("bad_rating", rating_at, cursor.offset())
        if parent_id == -1:
            if rating is None:
                allowed.add(("root_rated", index))
            else:
                need("root_rated", rating_at, cursor.offset())

    hints = (None,)
    after_blank = cursor.token() is None and is_blank(cursor.words())
    if cursor.token() == HINT or after_blank and cursor.token(1) == HINT:
        cursor.i += after_blank
        hint_at = cursor.offset()
        cursor.i += 1
        hint = cursor.words()
        cursor.i += cursor.token() is None
        if cursor.token() != HINT_END:
            raise Undecided("a hint that is not closed, or holds tokens")
        cursor.i += 1
        if rated and not after_blank:
            need("hint_between_nodes", hint_at, cursor.offset())
        else:
            allowed.add(("hint_between_nodes", index))
        hints = (hint, None) if after_blank else (hint,)
    return start, local_id, parent_id, kind, texts, rating, hints, closed, rated


# ---------------------------------------------------------------------------------------------------- fathers


def resolve(ids):
    """Fathers of nodes with `ids`, a list of (local_id, parent_id).

    Returns (parents, needs, allowed): for each node the tuple of right parents (indexes or None), the codes that each
    node needs as (set of codes, index), and codes that are allowed as (code, index).
    """
    parents, needs, allowed = [], [], set()
    for k, (local, father) in enumerate(ids):
        earlier = [j for j in range(k) if ids[j][0] == father]
        later = [j for j in range(k + 1, len(ids)) if ids[j][0] == father]
        if father is None:
            parents.append((None,))
            allowed.add(("orphan_father", k))
        elif father == -1:
            parents.append((None,))
        elif father == local:
            if earlier:
                parents.append((earlier[-1], None))
                allowed.add(("self_father", k))
            else:
                parents.append((None,))
                needs.append(({"self_father"}, k))
        elif earlier:
            parents.append((earlier[-1],))
        elif later:
            parents.append(tuple(later))
            needs.append(({"forward_father"}, k))
        else:
            parents.append((None,))
            needs.append(({"orphan_father"}, k))
        if local is not None and any(ids[j][0] == local for j in range(k)):
            needs.append(({"duplicate_id"}, k))
        elif local is not None and any(ids[j][0] == local for j in range(k + 1, len(ids))):
            allowed.add(("duplicate_id", k))

    ringed = [k for k in range(len(ids)) if k in reachable(k, parents)]
    for k in ringed:
        parents[k] = (*parents[k], *({None} - set(parents[k])))
        allowed |= {(code, k) for code in FATHER_CODES}
        needs = [(set(FATHER_CODES), j) if j == k and codes == {"forward_father"} else (codes, j) for codes, j in needs]
    return parents, needs, allowed


def reachable(k, parents):
    "All nodes that may be above node `k`."
    found, todo = set(), [p for p in parents[k] if p is not None]
    while todo:
        j = todo.pop()
        if j not in found:
            found.add(j)
            todo += [p for p in parents[j] if p is not None]
    return found


# ---------------------------------------------------------------------------------------------------- a whole text


def reference_read(text):
    "Read `text` by the rules; see `Read`."
    cursor, needs, allowed, raw = Cursor(text), [], set(), []
    broken = not is_blank(text) and not follows_grammar(text)
    undecided = Read([], [], [], set(), False, broken)

    while cursor.token() != "" and not cursor.header():  # the prefix
        cursor.i += 1
    if cursor.token() == "":
        if len(cursor.pieces) > 1 or cursor.pieces and cursor.pieces[0][0]:
            return undecided
        if is_blank(text):
            return Read([], [], [], {("missing_root", None)}, True, False)
        return Read([], [], [Need(frozenset(["missing_root"]), None, 0, len(text))], set(), True, True)
    first = cursor.offset()
    before = [token for token, _, end in cursor.pieces if end <= first and token is not None]
    if before:
        if before[0] not in (F_END, L, L_END):
            return undecided
        needs.append(Need(frozenset(["left_truncated"]), None, 0, first))
    tuple_open = text[:first] in ("('", '("')
    if tuple_open:
        allowed.add(("tuple_root", None))

    try:
        while cursor.token() != "":
            raw.append(read_node(cursor, len(raw), needs, allowed, tuple_open and not raw))
            if cursor.token() is None and is_blank(cursor.words()):
                cursor.i += 1
            if cursor.token() != "" and not cursor.header():
                raise Undecided("text or a token between nodes")
    except Undecided:
        sure = max(len(raw) - 1, 0)  # nodes that were followed by another that could be read
        nodes = [Node(row[0], after[0], *row[1:8]) for row, after in itertools.pairwise(raw)]
        return undecided._replace(nodes=nodes, needs=[n for n in needs if n.index is None or n.index < sure])

    starts = [row[0] for row in raw] + [len(text)]
    nodes = [Node(row[0], starts[k + 1], *row[1:8]) for k, row in enumerate(raw)]
    parents, more, more_allowed = resolve([(node.local_id, node.parent_id) for node in nodes])
    needs += [Need(frozenset(codes), k, nodes[k].start, nodes[k].end) for codes, k in more]
    allowed |= more_allowed

    for k, (node, row) in enumerate(zip(nodes, raw)):
        if node.parent_id is None:
            allowed |= {("missing_rating", k), ("root_rated", k)}
        elif node.parent_id != -1 and not row[8]:
            needs.append(Need(frozenset(["missing_rating"]), k, node.start, node.end))
    roots = sum(node.parent_id == -1 for node in nodes)
    if roots == 0 and any(node.parent_id is None for node in nodes):
        allowed.add(("missing_root", None))
    elif roots == 0:
        needs.append(Need(frozenset(["missing_root"]), None, 0, len(text)))
    if roots > 1:
        needs.append(Need(frozenset(["multiple_roots"]), None, 0, len(text)))
    elif sum(None in options for options in parents) > 1:
        allowed.add(("multiple_roots", None))
    return Read(nodes, parents, needs, allowed, True, bool(needs))
