"""Does an NLVR v1 statement hold of a picture? Answered from its `structured_rep`, or left open.

A text is rewritten into a small vocabulary, the grammar turns that into a test (the whole text must
match), and the test is put to the picture under all `READINGS`. Any doubt gives None, a wrong label
being worse: words outside the grammar, readings that differ, blocks in a picture without towers.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import Any, NamedTuple

COLOURS = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}  # as written -> as spoken
SHAPES = ("square", "circle", "triangle")
BOX_PX = 100
APART_PX = 150  # from one box of a picture to the next
STEP_PX = 21  # from block to block of a tower
BLOCKS = [("square", 40, 80 - STEP_PX * level, 20) for level in range(4)]  # from the base up


@dataclass(frozen=True)
class Item:
    """One drawn object; (x, y) is the top-left corner of its bounding square, in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


class Reading(NamedTuple):
    """One way to take what the statements leave vague."""

    near_px: int  # an item this far from a wall still touches it
    exact: bool  # "2 towers": exactly two, else at least two; "none of": even of nothing
    adjacent: bool  # "over": right on top, else anywhere above
    alone: bool  # "only 2 black items": and nothing else; "only black and blue": both of them


READINGS = tuple(Reading(*flags) for flags in product((0, 2), *[(True, False)] * 3))
Box = tuple[Item, ...]
Test = Callable[[Sequence[Box], Reading], bool]
ItemTest = Callable[[Item, Box, Reading], bool]
Quantity = Callable[[int, int, Reading], bool]  # so many hold, of so many


def read_boxes(structured_rep: Any) -> tuple[Box, ...]:
    """The three boxes of a picture; ValueError names what is wrong with `structured_rep`."""
    boxes = structured_rep if isinstance(structured_rep, list) else []
    if len(boxes) != 3 or not all(isinstance(box, list) for box in boxes):
        raise ValueError(f"structured_rep must hold three lists of objects, got {structured_rep!r}")
    return tuple(tuple(_read_item(entry) for entry in box) for box in structured_rep)


def drawn_at(boxes: Sequence[Box], order: int) -> list[tuple[float, float, float, float]]:
    """x0 y0 x1 y1 of every item of a picture, in pixels.

    Parameters
    ----------
    boxes : sequence of boxes
        From `read_boxes`.
    order : int
        Which of the six permutations of the boxes it shows; the last number of its file's name.
    """
    placed = []
    for place, number in enumerate(list(permutations(range(3)))[order]):
        left = place * APART_PX
        for item in boxes[number]:
            right, bottom = min(item.x + item.size, BOX_PX), min(item.y + item.size, BOX_PX)
            placed.append((left + item.x, item.y, left + right, bottom))
    return placed


def decide(text: str, boxes: Sequence[Box]) -> bool | None:
    """Whether an NLVR v1 statement surely holds of a picture.

    Parameters
    ----------
    text : str
        The statement, as published.
    boxes : sequence of boxes
        The picture, from `read_boxes`. The order of the boxes makes no difference.

    Returns
    -------
    bool or None
        None where the statement is not surely understood, or not surely true or false.
    """
    words = _normalise(text)
    test = _statement(words)
    needs_towers = re.search(r"tower|block|\bat (top|base|bottom)|over|under", words)
    if test is None or (needs_towers and not _towers(boxes)):
        return None
    answers = {test(boxes, reading) for reading in READINGS}
    return answers.pop() if len(answers) == 1 else None


def _read_item(entry: Any) -> Item:
    keys = ("type", "color", "x_loc", "y_loc", "size")
    if not isinstance(entry, dict) or not entry.keys() >= set(keys):
        raise ValueError(f"an object must be a dict with {', '.join(keys)}; got {entry!r}")
    shape, colour, *numbers = (entry[key] for key in keys)
    if shape not in SHAPES or colour not in list(COLOURS):
        known = f"types: {', '.join(SHAPES)}; colors: {', '.join(COLOURS)}"
        raise ValueError(f"unknown type or color: {shape!r}, {colour!r}; known {known}")
    for key, number in zip(keys[2:], numbers, strict=True):
        if type(number) not in (int, float) or not 0 <= number <= BOX_PX:
            raise ValueError(f"{key} must be a number from 0 to {BOX_PX}, got {number!r}")
    return Item(shape, COLOURS[colour], *numbers)


def _towers(boxes: Sequence[Box]) -> bool:
    """Whether every box holds one tower; the other pictures are scattered items."""
    columns = [sorted(((i.shape, i.x, i.y, i.size) for i in box), reverse=True) for box in boxes]
    return all(column and column == BLOCKS[: len(column)] for column in columns)


def _touches(item: Item, where: str, near_px: int) -> bool:
    right, bottom = BOX_PX - item.x - item.size, BOX_PX - item.y - item.size
    gaps = {"left": item.x, "top": item.y, "right": right, "bottom": bottom}
    near = [wall for wall, gap in gaps.items() if gap <= near_px]
    return {"edge": len(near) > 0, "corner": len(near) == 2}.get(where, where in near)


C = "(?:black|yellow|blue)"
# as written, as read, two by two; "ll" has lost the first letter of its text
SPELLING = """squere square cirlce circle traingle triangle blcok block blcck block ll all boxe box
    object item colour color above over below under bellow under
    one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9""".split()
REWRITES = [
    *((rf"\b{a}(s?)\b", rf"{b}\1") for a, b in zip(SPELLING[::2], SPELLING[1::2], strict=True)),
    (r"\b(square|circle|triangle|block|item|tower|edge|color|box)s\b", r"\1"),
    (r"[.]| in it\b|\bdifferent (?=color)|\bclosely (?=touch)|^there (is|are) ", ""),
    (r"^(a?t ?)?least |\batleast ", "at least "),
    (r"\bgrey (box|square)\b", "box"),
    (r"(?<!^)\bthe ", ""),  # "the tower with ..." may be one of two: left open
    (r"^the (top|base) ", r"\1 "),
    (r"^none of ", "none "),
    (r"^(.*[1-9]) of (?:3 )?(?=tower|box)", r"\1 "),
    (r"^(all|each) 3 (?=tower|box)", r"all "),
    (r",? ?\b(that |which |and it |and )?(ha|has|have|having|contains?)\b", " with"),
    (r" (that )?(is|are) (not )?touching", r" \3touching"),
    (r"touching (an? |any )?(edge|wall)\b", "touching edge"),
    (r"touching (base|bottom)( edge)?( of a box)?", "touching bottom"),
    (r"touching (a )?(box )?corner( of a box)?", "touching corner"),
    (r"touching right wall( of a box)?", "touching right"),
    (rf"\b(on top of|on)(?= a {C})", "over"),
    (r"\b(as|on) (?=top\b|base\b)", "at "),
    (rf"\ba ({C}) base\b", r"a \1 block at base"),
    (rf"({C}) and ({C})", r"\1+\2"),
    (rf"^(top|base) of (a .*tower) is ({C})$", r"\2 with a \3 block at \1"),
    (r"^((?!no).*) in each box$", r"each box with \1"),
    (r"(\d) block tower", r"tower with \1 block"),
    (rf"({C}) tower", r"tower with only \1 block"),
    (rf"(\d item) of (?=(only )?(all 3|\d|{C}\S*) color)", r"\1 with "),
]  # in this order


@lru_cache(maxsize=4096)
def _normalise(text: str) -> str:
    text = " ".join(text.lower().split())
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split())


# The grammar: each rule returns a test, or None for words it does not know
COMPARE = {"at least": operator.ge, "at most": operator.le, "more than": operator.gt}
COMPARE |= {"less than": operator.lt, "exactly": operator.eq, "only": operator.eq}
Q = rf"(?:(?P<how>{'|'.join(COMPARE)}|all|each) ?)?(?P<number>an?|none|no|\d)?\b ?"
NOUN = rf"(?:(?P<colour>{C}) )?(?P<noun>square|circle|triangle|block|item)"


def _quantity(how: str | None, number: str | None) -> Quantity | None:
    wanted = int(number) if number and number.isdigit() else 1
    if how in COMPARE and number not in (None, "no", "none"):
        return lambda count, total, r: COMPARE[how](count, wanted)
    if how in ("all", "each") and number is None:
        return lambda count, total, r: count == total
    if how:
        return None
    if number in ("no", "none"):
        return lambda count, total, r: count == 0 and (total > 0 or r.exact or number == "no")
    vague = number not in (None, "a", "an")
    return lambda count, total, r: count == wanted if vague and r.exact else count >= wanted


@lru_cache(maxsize=4096)
def _statement(words: str) -> Test | None:
    m = re.fullmatch(rf"{Q}(?:tower|box)(?: with (?P<rest>.+))?", words)
    if m is None:
        return _phrase(words)
    quantity, clauses = _quantity(m["how"], m["number"]), _clauses(m["rest"])
    if quantity is None or clauses is None:
        return None
    return lambda boxes, r: quantity(sum(clauses([box], r) for box in boxes), len(boxes), r)


def _clauses(words: str | None) -> Test | None:
    """What one box or tower is said to hold, joined by and."""
    parts = re.split(r",? and (?:with )?|, | with ", words) if words else []
    tests = [_clause(part) for part in parts]
    return None if None in tests else lambda boxes, r: all(test(boxes, r) for test in tests)


def _clause(words: str) -> Test | None:
    if m := re.fullmatch(rf"(?:item of )?only ({C}(?:\+{C})*) (?:color|item|block)", words):
        named = set(m[1].split("+"))
        return lambda boxes, r: _colours(boxes) == named if r.alone else _colours(boxes) <= named
    if m := re.fullmatch(r"(?:(?:item|block) of )?(all |only )?(\d) color", words):
        quantity = _quantity("exactly" if m[1] else None, m[2])
        return lambda boxes, r: quantity(len(_colours(boxes)), 3, r)
    return None if re.search(r"[2-9] .*at (top|base|bottom)", words) else _phrase(words)


def _colours(boxes: Sequence[Box]) -> set[str]:
    return {item.colour for box in boxes for item in box}


def _phrase(words: str) -> Test | None:
    """So many items of a kind, and what is said of them: "2 black circle touching edge"."""
    m = re.fullmatch(rf"{Q}{NOUN}(?: (?P<rest>.+))?", words)
    if m is None or not (m["how"] or m["number"] or re.match("at |over|under", m["rest"] or "")):
        return None  # "black circles touch the wall": some or all?
    if m["how"] in ("all", "each"):
        return None  # "all circles do not touch the wall": not all, or none?
    quantity, predicate = _quantity(m["how"], m["number"]), _predicate(m["rest"])
    if quantity is None or predicate is None:
        return None
    shapes = {"block": ("square",), "item": SHAPES}.get(m["noun"], (m["noun"],))
    only = m["how"] == "only" and m["rest"] is None

    def holds(boxes: Sequence[Box], r: Reading) -> bool:
        pairs = [(item, box) for box in boxes for item in box]
        named = [(i, b) for i, b in pairs if i.shape in shapes and m["colour"] in (None, i.colour)]
        others = only and r.alone and len(named) < len(pairs)
        return not others and quantity(sum(predicate(i, b, r) for i, b in named), len(named), r)

    return holds


def _predicate(words: str | None) -> ItemTest | None:
    if words is None:
        return lambda item, box, r: True
    if m := re.fullmatch(r"(not )?touching (edge|bottom|right|corner)", words):
        return lambda item, box, r: _touches(item, m[2], r.near_px) != bool(m[1])
    if m := re.fullmatch(rf"(over|under) a ({C}) (?:block|item)", words):
        return lambda item, box, r: _next_to(item, box, 1 if m[1] == "over" else -1, m[2], r)
    m = re.fullmatch(r"at (top|base|bottom)(?: of a tower(?: with (.+))?)?", words)
    if m is None or (rest := _clauses(m[2])) is None:
        return None
    end = min if m[1] == "top" else max  # y runs downwards
    return lambda i, b, r: i.y == end(other.y for other in b) and rest([b], r)


def _next_to(item: Item, box: Box, up: int, colour: str, reading: Reading) -> bool:
    steps = [up * (other.y - item.y) for other in box if other.colour == colour]
    return STEP_PX in steps if reading.adjacent else max(steps, default=0) > 0
