"""A stateful random walk over everything a cache may go through, checked against recomputation."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field

import torch

from hf_memory.evaluation.properties_cache import cache_repeat, cache_select
from hf_memory.evaluation.properties_forward import idle_rows, middle_padding
from hf_memory.evaluation.properties_report import Result, Worst
from hf_memory.evaluation.properties_subject import Stream, Subject, deviation


_MAX_ROWS = 4
_MAX_GROUPS = 3
# A check costs a long forward pass for each row, more than most steps, and every group is checked at its end anyway.
_CHECK_RATE = 0.05
# Moves that not every model allows, with the properties that speak of each.
_ON_ITS_OWN = {"read_padded": (middle_padding, idle_rows), "repeat": (cache_repeat,), "select": (cache_select,)}


@dataclass
class _Group:
    """Rows read side by side: their cache, each row's valid tokens, and each row's last logits."""

    stream: Stream
    histories: list[list[int]]
    last_logits: list[torch.Tensor | None]
    steps: list[str] = field(default_factory=list)

    def map_rows(self, origin: list[int]) -> None:
        self.histories = [list(self.histories[i]) for i in origin]
        self.last_logits = [self.last_logits[i] for i in origin]


class _Walk:
    """
    The walk. Groups are forked, left and taken up again, so that copies that share memory show; a group starts anew
    when a row has read `walk_length` tokens.
    """

    def __init__(self, subject: Subject, left_out: list[str]):
        # Loading a saved model replaces the model under test, which stays the caller's.
        self.subject = copy.copy(subject)
        self.groups: list[_Group] = []
        self.current = self.start()
        self.worst = Worst(subject.tolerance)
        self.checks = 0
        self.step = 0
        # Saving costs ten times the rest and has a property of its own: rare.
        moves = {
            "read": 24, "read_padded": 24, "read_singly": 24, "reorder": 8, "repeat": 4, "select": 4, "fork": 8,
            "switch": 8, "save_and_load": 1,
        }  # fmt: skip
        self.moves = {name: weight for name, weight in moves.items() if name not in left_out}

    def start(self) -> _Group:
        rows = self.subject.integer(1, 3)
        group = _Group(self.subject.stream(masked=True), [[] for _ in range(rows)], [None] * rows)
        self.groups = [*self.groups, group][-_MAX_GROUPS:]
        return group

    def feed(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        group = self.current
        logits = group.stream.feed(tokens, mask)
        for row, history in enumerate(group.histories):
            valid = mask[row].bool()
            history += tokens[row][valid].tolist()
            if valid.any():
                group.last_logits[row] = logits[row][valid][-1]

    def read(self) -> None:
        tokens = self.subject.tokens(len(self.current.histories), self.subject.integer(1, 12))
        self.feed(tokens, torch.ones_like(tokens))

    def read_padded(self) -> None:
        tokens = self.subject.tokens(len(self.current.histories), self.subject.integer(1, 12))
        mask = (torch.rand(tokens.shape, generator=self.subject.random) < 0.6).long().to(tokens.device)
        if self.subject.integer(0, 2) == 0:
            mask[self.subject.integer(0, len(mask) - 1)] = 0
        self.feed(tokens, mask)

    def read_singly(self) -> None:
        for _ in range(self.subject.integer(1, 6)):
            tokens = self.subject.tokens(len(self.current.histories), 1)
            self.feed(tokens, torch.ones_like(tokens))

    def reorder(self) -> None:
        rows = len(self.current.histories)
        origin = [self.subject.integer(0, rows - 1) for _ in range(rows)]
        self.rearrange("reorder", torch.tensor(origin, device=self.subject.device), origin)

    def repeat(self) -> None:
        rows = len(self.current.histories)
        if 2 * rows <= _MAX_ROWS:
            self.rearrange("repeat", 2, [i // 2 for i in range(2 * rows)])

    def select(self) -> None:
        rows = len(self.current.histories)
        origin = torch.randperm(rows, generator=self.subject.random).tolist()[: self.subject.integer(1, rows)]
        self.rearrange("select", torch.tensor(origin, device=self.subject.device), origin)

    def rearrange(self, operation: str, argument: torch.Tensor | int, origin: list[int]) -> None:
        if self.current.stream.cache is not None:
            getattr(self.current.stream, operation)(argument)
            self.current.map_rows(origin)

    def fork(self) -> None:
        group = self.current
        if group.stream.cache is not None:
            twin = _Group(group.stream.fork(), [], [], list(group.steps))
            twin.histories, twin.last_logits = [list(row) for row in group.histories], list(group.last_logits)
            self.groups = [*self.groups, twin][-_MAX_GROUPS:]
            self.current = twin

    def switch(self) -> None:
        self.current = self.groups[self.subject.integer(0, len(self.groups) - 1)]

    def save_and_load(self) -> None:
        model = self.subject.model
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, dtype="auto").to(model.device).eval()
        self.subject.model = loaded
        for group in self.groups:
            group.stream.subject = self.subject

    def check(self) -> None:
        self.checks += 1
        group = self.current
        for row, history in enumerate(group.histories):
            if history:
                tokens = torch.tensor([history], device=self.subject.device)
                value = deviation(group.last_logits[row], self.subject.forward(tokens)[0, -1])
                since = " > ".join(group.steps[-4:])
                self.worst.add(value, f"step {self.step} (after {since}), row of {len(history)} tokens")

    def run(self) -> None:
        weights = torch.tensor([float(weight) for weight in self.moves.values()])
        for step in range(self.subject.budget.walk_steps):
            self.step = step
            move = list(self.moves)[int(torch.multinomial(weights, 1, generator=self.subject.random))]
            getattr(self, move)()
            self.current.steps.append(move)
            longest = max(len(history) for history in self.current.histories)
            slots = 0 if self.current.stream.mask is None else self.current.stream.mask.shape[1]
            full = longest >= self.subject.budget.walk_length or slots >= 2 * self.subject.budget.walk_length
            if full or float(torch.rand((), generator=self.subject.random)) < _CHECK_RATE:
                self.check()
                if self.worst.failing:
                    return
            if full:
                self.groups = [group for group in self.groups if group is not self.current]
                self.current = self.start()


def random_walk(subject: Subject) -> Result:
    """
    A random walk of reading, padding, forking, reordering, saving and loading stays where recomputation is.

    Padding, repeating and selecting are left out, and named, where the property about them fails already.
    """
    left_out: list[str] = []
    try:
        walk = _walked(subject, left_out)
        broken = bool(walk.worst.failing)
    except Exception:
        broken = True
    if broken:
        left_out = [move for move in _ON_ITS_OWN if not _works_alone(subject, move)]
        walk = _walked(subject, left_out)
    result = walk.worst.result()
    without = f" without {', '.join(left_out)} (fail alone)" if left_out else ""
    summary = f"{walk.step + 1} steps{without}, {walk.checks} checks; {result.detail}"
    return Result("", result.status, result.measured, result.tolerance, summary)


def _walked(subject: Subject, left_out: list[str]) -> _Walk:
    walk = _Walk(subject, left_out)
    walk.run()
    walk.check()
    return walk


def _works_alone(subject: Subject, move: str) -> bool:
    """Whether a move passes the properties about it alone; if not, they report it, and it would end every walk."""
    for check in _ON_ITS_OWN[move]:
        try:
            if check(subject).status != "pass":
                return False
        except Exception:
            return False
    return True
