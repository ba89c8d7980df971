"""A study file and the runs that it asks for.

A study is a YAML file:

    about: what it studies
    named: [f8k_config]                  # named configs of run.py
    keys: {image_size: 160}              # config keys of all rows
    reference: full                      # the row that the others are compared with
    rows:
      full: {about: the whole model}
      no_ksf: {about: without KSF, keys: {streams: [lrg_high, lrg_mid]}, named: [revised_config]}
    evaluations:                         # further evaluations of trained rows, from their best checkpoints
      curve: {about: over K, rows: [full], keys: {curve: true}}
    ensembles:
      both: {about: i2t and t2i, members: [full, i2t]}
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hacan.errors import UserError

STUDIES = Path(__file__).parent / "studies"
KEYS = {"about", "named", "keys", "reference", "rows", "evaluations", "ensembles", "seconds_per_run"}
ROW_KEYS = {"about", "claim", "named", "keys"}
EVALUATION_KEYS = {"about", "rows", "keys"}
ENSEMBLE_KEYS = {"about", "claim", "members", "keys"}


@dataclass(frozen=True)
class Run:
    """One call of run.py: a training with its evaluation, or an evaluation of trained rows."""

    name: str  # exp_name: ROW-seedS or ROW-seedS-EVALUATION
    row: str
    seed: int
    evaluation: str  # "" for a training
    words: tuple[str, ...]  # of the command line, after "with"
    needs: tuple[str, ...] = ()  # names of trainings whose best checkpoints are evaluated

    def command(self, checkpoints: Mapping[str, Path] | None = None) -> list[str]:
        """Return the words of the command, with the paths of the checkpoints of the runs in `needs`."""
        words = ["python", "run.py", "with", *self.words]
        if self.needs:
            paths = [str((checkpoints or {}).get(name, f"BEST_CHECKPOINT_OF_{name}")) for name in self.needs]
            joined = paths[0] if len(paths) == 1 else f"[{', '.join(paths)}]"
            words += ["test_only=True", f"checkpoint={joined}"]
        return words

    def shell(self, checkpoints: Mapping[str, Path] | None = None) -> str:
        """Return the command as it is typed."""
        return shlex.join(self.command(checkpoints))


@dataclass(frozen=True)
class Study:
    """A validated study file."""

    name: str
    about: str
    named: tuple[str, ...]
    keys: dict[str, Any]
    reference: str
    rows: dict[str, dict[str, Any]]
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    ensembles: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds_per_run: float | None = None  # for the estimate of --dry-run

    def runs(self, *, rows: Sequence[str], seeds: int, out: Path, keys: Mapping[str, str]) -> list[Run]:
        """Return the runs of some rows, trainings first. keys: values for all runs, as typed."""
        chosen = list(rows or [*self.rows, *self.ensembles])
        unknown = [row for row in chosen if row not in self.rows and row not in self.ensembles]
        if unknown:
            known = ", ".join([*self.rows, *self.ensembles])
            raise UserError(f"--rows {unknown[0]}: the study {self.name} has the rows {known}")
        trained = [row for row in self.rows if row in chosen]
        for row in (row for row in self.ensembles if row in chosen):
            trained += [member for member in self.ensembles[row]["members"] if member not in trained]

        def words(row: Mapping[str, Any], seed: int, name: str, more: Mapping[str, Any]) -> tuple[str, ...]:
            values = {**self.keys, **row.get("keys", {}), **more, **keys}
            values |= {"seed": seed, "exp_name": name, "log_dir": out / "runs"}
            return (*self.named, *row.get("named", ()), *(f"{key}={value}" for key, value in values.items()))

        trainings, evaluations = [], []
        for seed in range(seeds):
            for row in trained:
                name = f"{row}-seed{seed}"
                trainings.append(Run(name, row, seed, "", words(self.rows[row], seed, name, {})))
                for kind, evaluation in self.evaluations.items():
                    if row in evaluation.get("rows", self.rows):
                        full = f"{name}-{kind}"
                        more = words(self.rows[row], seed, full, evaluation.get("keys", {}))
                        evaluations.append(Run(full, row, seed, kind, more, (name,)))
            for row in (row for row in self.ensembles if row in chosen):
                name = f"{row}-seed{seed}"
                members = tuple(f"{member}-seed{seed}" for member in self.ensembles[row]["members"])
                evaluations.append(Run(name, row, seed, "", words(self.ensembles[row], seed, name, {}), members))
        return trainings + evaluations


def load_study(name: str) -> Study:
    """Return the study of a name in `studies/`, or of a YAML file; raise `UserError` if it is not valid."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise UserError(f"there is no study {name!r}: give one of {known}, or the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    _check(content, KEYS, where=str(path))
    rows = content.get("rows") or {}
    for kind, entries, allowed in (
        ("rows", rows, ROW_KEYS),
        ("evaluations", content.get("evaluations") or {}, EVALUATION_KEYS),
        ("ensembles", content.get("ensembles") or {}, ENSEMBLE_KEYS),
    ):
        _check(entries, None, where=f"{path}, {kind}")
        for entry, value in entries.items():
            _check(value, allowed, where=f"{path}, {kind}, {entry}")
            unknown = [row for row in [*value.get("rows", ()), *value.get("members", ())] if row not in rows]
            if unknown:
                raise UserError(f"{path}, {kind}, {entry}: there is no row {unknown[0]!r}")
    if content.get("reference") not in rows:
        raise UserError(f"{path}: reference={content.get('reference')!r} is not one of the rows {', '.join(rows)}")
    return Study(
        name=path.stem,
        about=content.get("about", ""),
        named=tuple(content.get("named", ())),
        keys=dict(content.get("keys") or {}),
        reference=content["reference"],
        rows=rows,
        evaluations=content.get("evaluations") or {},
        ensembles=content.get("ensembles") or {},
        seconds_per_run=content.get("seconds_per_run"),
    )


def _check(value: Any, allowed: set[str] | None, *, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping, found {type(value).__name__}")
    unknown = set(value) - allowed if allowed is not None else set()
    if unknown:
        raise UserError(f"{where}: unknown key {min(unknown)!r}; expected {', '.join(sorted(allowed or ()))}")
