"""Uses of tables as beads: which hang on one string by their shard keys, and which are nailed to values. Pure.

An equality that every row of the result meets puts two beads on one string. One that only says which rows are looked
up for a row that is kept in any case, the condition of an outer join or of a subquery, is a *bond*: it brings what is
looked up to the rows that are kept, never two kept ones to each other. `a, b LEFT JOIN c ON c.key = a.key AND
c.key = b.key` has pairs of a and b from different shards, whatever c holds.
"""

from dataclasses import dataclass, field

from headrace.database.planning.key_terms import Term


@dataclass(slots=True)
class Bond:
    """What one outer join, or one subquery, looks up, and for which rows."""

    both_kept: bool = False
    """A FULL JOIN keeps the rows of both sides."""
    kept: set[int] = field(default_factory=set)
    looked_up: set[int] = field(default_factory=set)
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, kept: int, looked_up: int) -> None:
        """The key of one bead is looked up by that of another."""
        self.kept.add(kept)
        self.looked_up.add(looked_up)
        self.pairs.append((kept, looked_up))


@dataclass(frozen=True, slots=True)
class Reach:
    """Of which sources the condition of an outer join filters rows; what it says of keys goes into the bond."""

    filtered: set[str]
    right: set[str]
    """The sources of the right side."""
    bond: Bond


class Beads:
    """The strings, nails and bonds of one statement."""

    def __init__(self) -> None:
        self.nails: dict[int, tuple[Term, ...]] = {}
        self._strings: list[int] = []
        self._flows: set[tuple[int, int]] = set()
        self._bonds: list[Bond] = []

    def add(self) -> int:
        """One more bead, on a string of its own; its number."""
        self._strings.append(len(self._strings))
        return len(self._strings) - 1

    def string(self, bead: int) -> int:
        """The string that a bead hangs on, by the number of one of its beads."""
        while self._strings[bead] != bead:
            bead = self._strings[bead]
        return bead

    def tie(self, one: int, other: int) -> None:
        """Put two beads on one string."""
        self._strings[self.string(one)] = self.string(other)

    def bond(self, *, both_kept: bool = False) -> Bond:
        """A bond to fill; it counts from `settle` on."""
        self._bonds.append(Bond(both_kept))
        return self._bonds[-1]

    def nail(self, bead: int, terms: tuple[Term, ...]) -> None:
        """The rows of a bead have one of these keys."""
        known = self.nails.get(bead)
        if known is None or len(terms) < len(known):
            self.nails[bead] = terms

    def flow(self, source: int, target: int) -> None:
        """What nails one bead nails another."""
        self._flows.add((source, target))

    def is_placed(self, bead: int) -> bool:
        """Whether anything says where the rows of a bead are."""
        return bead in self.nails or any(target == bead for _, target in self._flows)

    def settle(self) -> None:
        """Follow the flows, and tie what the bonds allow."""
        changed = True
        while changed:
            changed = False
            for source, target in self._flows:
                if source in self.nails and target not in self.nails:
                    self.nails[target] = self.nails[source]
                    changed = True
        waiting = [bond for bond in self._bonds if bond.pairs]
        while ready := [bond for bond in waiting if self._is_sound(bond)]:
            for bond in ready:
                for one, other in bond.pairs:
                    self.tie(one, other)
            waiting = [bond for bond in waiting if bond not in ready]

    def _is_sound(self, bond: Bond) -> bool:
        sides = (bond.kept, bond.looked_up) if bond.both_kept else (bond.kept,)
        return all(len({self.string(bead) for bead in side}) == 1 for side in sides)
