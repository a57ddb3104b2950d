"""What an evaluation consists of: a small TOML file that names rows, columns, removals and seeds.

    data = "fashion"
    seeds = [0, 1, 2]
    [rows.honeytrace-graded]                # a defence
    defence = "honeytrace"
    flips = false
    against = ["scores", "fine-tune-10"]    # columns, removals and sets that it meets; default: all of them
    why = "a graded mark is not in labels"  # why it does not meet the others, for the tables
    [sets]
    scores = ["random-soft"]                # a name for several columns and removals
    [columns.random-soft]                   # an attack on every row
    attack = "random"
    [removals.fine-tune-10]                 # what is done to the copy of one column afterwards
    removal = "fine-tune-10"
    column = "random-soft"

Every further entry of a row, column or removal is a setting of its function. A row with ``against`` must say
``why``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import honeytrace
from honeytrace.training import Precision
from honeytrace.world import SETTINGS, DataName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same module, before it came with Python

AnyPrecision: TypeAlias = Precision | Literal["fastest"]
_PRECISIONS: tuple[str, ...] = (*get_args(Precision), "fastest")

BUILT_IN = ("digits", "digits-small", "fashion")
"""Plans that come with the package."""


@dataclass(frozen=True)
class Cell:
    """One defence, one attack, perhaps one removal, one seed: what `run_cell` needs, and nothing else.

    Attributes:
        data, precision, alpha: as in the plan. What "fastest" was on the machine is among the figures.
        row, column, removal: names; removal is "" where the copy is judged as the attack left it.
        seed: of the world, the defence, the attack and the removal.
        row_settings, column_settings, removal_settings: the functions' names and settings, as JSON values.
    """

    data: DataName
    precision: AnyPrecision
    alpha: float
    row: str
    column: str
    removal: str
    seed: int
    row_settings: dict[str, Any] = field(hash=False)
    column_settings: dict[str, Any] = field(hash=False)
    removal_settings: dict[str, Any] = field(hash=False)

    @property
    def digest(self) -> str:
        """Names the cell by its content: 32 hexadecimal digits."""
        content = asdict(self)
        # Names are for people: a renamed column is the same cell.
        for name in ("row", "column", "removal"):
            del content[name]
        described = json.dumps([honeytrace.__version__, content], sort_keys=True)
        return hashlib.sha256(described.encode("utf-8")).hexdigest()[:32]

    @property
    def title(self) -> str:
        """For people: row, column, removal and seed."""
        return " / ".join(
            [self.row, self.column, *([self.removal] if self.removal else []), f"seed {self.seed}"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A matrix of cells.

    Attributes:
        name: of the plan.
        data: "digits" or "fashion".
        seeds: one world each.
        precision: of all trainings; "fastest" is what `training.fastest_precision` says of the device.
        alpha: false-claim probability of the verdicts.
        rows, columns, removals: name -> settings, in the order of the tables.
        attacks: all columns that removals may speak of, also those that are not run themselves.
        against: row -> the columns and removals that it meets; rows that are not there meet all.
        reasons: row -> why it does not meet the others.
    """

    name: str
    data: DataName
    seeds: tuple[int, ...]
    precision: AnyPrecision
    alpha: float
    rows: Mapping[str, dict[str, Any]]
    columns: Mapping[str, dict[str, Any]]
    removals: Mapping[str, dict[str, Any]]
    attacks: Mapping[str, dict[str, Any]]
    against: Mapping[str, frozenset[str]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def meets(self, row: str, name: str) -> bool:
        """Whether the plan puts the defence `row` to the attack or removal `name`."""
        return row not in self.against or name in self.against[row]

    def cells(self) -> Iterator[Cell]:
        """All cells: seeds outermost, so that a run that is cut short has whole tables of fewer seeds."""
        for seed in self.seeds:
            for row, row_settings in self.rows.items():
                for column, column_settings in self.columns.items():
                    if self.meets(row, column):
                        yield self._cell(row, row_settings, column, column_settings, "", {}, seed)
                for removal, settings in self.removals.items():
                    if not self.meets(row, removal):
                        continue
                    rest = {name: value for name, value in settings.items() if name != "column"}
                    column = settings["column"]
                    yield self._cell(row, row_settings, column, self.attacks[column], removal, rest, seed)

    def _cell(
        self,
        row: str,
        row_settings: dict[str, Any],
        column: str,
        column_settings: dict[str, Any],
        removal: str,
        removal_settings: dict[str, Any],
        seed: int,
    ) -> Cell:
        return Cell(
            data=self.data,
            precision=self.precision,
            alpha=self.alpha,
            row=row,
            column=column,
            removal=removal,
            seed=seed,
            row_settings=row_settings,
            column_settings=column_settings,
            removal_settings=removal_settings,
        )

    def narrowed(self, rows: str | None, columns: str | None, seeds: tuple[int, ...] | None) -> Plan:
        """The part with these rows, and these columns or removals: names or parts of names, comma-separated.

        Raises:
            ValueError: nothing is left.
        """
        kept_columns = _matching(self.columns, columns)
        kept_removals = _matching(self.removals, columns)
        kept_rows = _matching(self.rows, rows)
        kept_seeds = self.seeds if seeds is None else tuple(s for s in self.seeds if s in seeds)
        part = replace(self, rows=kept_rows, columns=kept_columns, removals=kept_removals, seeds=kept_seeds)
        if next(part.cells(), None) is None:
            raise ValueError(
                f"plan {self.name} has no cell with rows={rows!r}, columns={columns!r}, seeds={seeds!r}"
            )
        return part

    @classmethod
    def load(cls, source: str | Path) -> Plan:
        """A built-in plan by its name, or a TOML file.

        Raises:
            FileNotFoundError: there is no such file; ValueError: it is no plan, and what is wrong.
        """
        if str(source) in BUILT_IN:
            text = (resources.files(__package__) / "plans" / f"{source}.toml").read_text("utf-8")
            return cls.parse(text, str(source))
        path = Path(source)
        return cls.parse(path.read_text("utf-8"), path.stem)

    @classmethod
    def parse(cls, text: str, name: str) -> Plan:
        """Read a plan from TOML text. Raises ValueError for anything that is no plan."""
        from honeytrace.evaluation.names import check_names

        try:
            fields = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"plan {name} is no TOML file: {error}") from None
        except RecursionError:
            raise ValueError(f"plan {name} is no TOML file: it is nested too deeply") from None
        known = {"data", "seeds", "precision", "alpha", "rows", "columns", "removals", "sets"}
        if set(fields) - known:
            raise ValueError(
                f"plan {name}: unknown entries {sorted(set(fields) - known)}; known: {sorted(known)}"
            )
        for entry in ("data", "seeds", "rows", "columns"):
            if not fields.get(entry):
                raise ValueError(f"plan {name} must have {entry}")
        if fields["data"] not in SETTINGS:
            raise ValueError(
                f"plan {name}: data must be one of {', '.join(SETTINGS)}, got {fields['data']!r}"
            )
        seeds = fields["seeds"]
        if not isinstance(seeds, list) or not all(type(s) is int and 0 <= s < 2**31 for s in seeds):
            raise ValueError(
                f"plan {name}: seeds must be a list of integers from 0 to 2**31 - 1, got {seeds!r}"
            )
        precision, alpha = fields.get("precision", "float32"), fields.get("alpha", 1e-3)
        if precision not in _PRECISIONS:
            allowed = ", ".join(_PRECISIONS)
            raise ValueError(f"plan {name}: precision must be one of {allowed}, got {precision!r}")
        if not isinstance(alpha, float) or not 0 < alpha < 1:
            raise ValueError(f"plan {name}: alpha must be in (0, 1), got {alpha!r}")
        removals = fields.get("removals", {})
        check_names(name, fields["rows"], fields["columns"], removals)
        rows, against, reasons = _encounters(name, fields, {**fields["columns"], **removals})
        return cls(
            name=name,
            data=fields["data"],
            seeds=tuple(seeds),
            precision=precision,
            alpha=alpha,
            rows=rows,
            columns=fields["columns"],
            removals=removals,
            attacks=fields["columns"],
            against=against,
            reasons=reasons,
        )


def _encounters(
    plan: str, fields: Mapping[str, Any], names: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, frozenset[str]], dict[str, str]]:
    """The rows' own settings; what each row meets; why it meets no more. `names`: columns and removals."""
    sets = fields.get("sets", {})
    if not isinstance(sets, dict):
        raise ValueError(f"plan {plan}: sets must be a table, got {type(sets).__name__}")
    for name, members in sets.items():
        if name in names:
            raise ValueError(f"plan {plan}: sets.{name} has the name of a column or removal")
        _check_members(plan, f"sets.{name}", members, names)
    rows: dict[str, dict[str, Any]] = {}
    against: dict[str, frozenset[str]] = {}
    reasons: dict[str, str] = {}
    for row, entries in fields["rows"].items():
        rows[row] = {key: value for key, value in entries.items() if key not in ("against", "why")}
        if ("against" in entries) != isinstance(entries.get("why"), str):
            raise ValueError(
                f"plan {plan}: rows.{row} must have both against (a list of names) and why (a text), "
                "or neither"
            )
        if "against" in entries:
            _check_members(plan, f"rows.{row}.against", entries["against"], {**names, **sets})
            met = [sets.get(word, [word]) for word in entries["against"]]
            against[row] = frozenset(name for members in met for name in members)
            reasons[row] = entries["why"]
    return rows, against, reasons


def _check_members(plan: str, where: str, members: Any, known: Mapping[str, Any]) -> None:
    """Raise ValueError unless `members` is a list of known names with at least one entry."""
    if not isinstance(members, list) or not members:
        raise ValueError(f"plan {plan}: {where} must be a list of names, got {members!r}")
    for member in members:
        if not isinstance(member, str) or member not in known:
            raise ValueError(f"plan {plan}: {where} must name {', '.join(known)}; got {member!r}")


def _matching(entries: Mapping[str, dict[str, Any]], words: str | None) -> dict[str, dict[str, Any]]:
    """Entries with one of these names; for a word that is no name, those whose name contains it."""
    if words is None:
        return dict(entries)
    kept: set[str] = set()
    for word in filter(None, map(str.strip, words.split(","))):
        kept |= {word} if word in entries else {name for name in entries if word in name}
    return {name: settings for name, settings in entries.items() if name in kept}
