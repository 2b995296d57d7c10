"""Errors and report lines for malformed rows and rows without trained tokens."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.config.schema import SourceSpec
from orchestrator.data.conversation import NOTES
from orchestrator.data.token_cache import Left, TokenStore
from orchestrator.errors import SpecError

_SHOWN = 10
_LINES_SHOWN = 5


def too_many(found: Sequence[Left], allowed: int) -> SpecError:
    """Return the error for more malformed rows than `allowed`.

    Rows of a file with the same reason are one problem, which lists their first lines. The first ten problems
    are given.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for place, reason in found:
        file_and_unit, _, number = place.rpartition(" ")
        groups.setdefault((file_and_unit, reason), []).append(number)
    shown = dict(list(groups.items())[:_SHOWN])
    problems = [f"{_with_numbers(file, numbers)}: {reason}" for (file, reason), numbers in shown.items()]
    more = len(found) - sum(map(len, shown.values()))
    limit = f" (data.malformed_rows_allowed={allowed})" if allowed else ""
    rest = [f"{more} more malformed rows{limit}"] if more > 0 else []
    return SpecError(*problems, *rest)


def _with_numbers(file_and_unit: str, numbers: Sequence[str]) -> str:
    """Return the place of rows, such as `data file rows.jsonl, lines 2, 3 and 5`."""
    if len(numbers) == 1:
        return f"{file_and_unit} {numbers[0]}"
    if len(numbers) <= _LINES_SHOWN:
        return f"{file_and_unit}s {', '.join(numbers[:-1])} and {numbers[-1]}"
    return f"{file_and_unit}s {', '.join(numbers[:_LINES_SHOWN])} and {len(numbers) - _LINES_SHOWN:,} more"


def left_out(sources: Sequence[SourceSpec], stores: Sequence[TokenStore]) -> list[str]:
    """Return report lines on the skipped and partly empty rows and the unused fields of each source.

    Args:
        sources: The sources.
        stores: The token store of each source.

    Returns:
        For each source and reason a line with the count, followed by a line for each of the first ten rows.
    """
    sentences: list[str] = []
    for source, store in zip(sources, stores, strict=True):
        for rows, what in (
            (store.malformed, "are malformed and left out"),
            (store.empty, "have nothing to learn and are left out"),
            (store.partly_empty, "have an empty answer, of which nothing is learnt"),
        ):
            if rows:
                total = len(store) + len(store.malformed) + len(store.empty)
                sentences.append(f"{len(rows):,} of {total:,} rows of {source.path} {what}")
                sentences += [f"  {place}: {reason}" for place, reason in rows[:_SHOWN]]
                if len(rows) > _SHOWN:
                    sentences.append(f"  and {len(rows) - _SHOWN:,} more")
        if counts := store.manifest["fields_without_effect"]:
            fields = ", ".join(f"{name} ({rows:,} rows)" for name, rows in counts.items())
            sentences.append(f"fields of {source.path} without effect on training: {fields}")
        for note, rows in store.manifest["notes"].items():
            sentences.append(f"{rows:,} of {len(store):,} rows of {source.path} {NOTES[note]}")
    return sentences


def empty_rows(store: TokenStore) -> list[Left]:
    """Return the rows that `data.empty_answers: error` rejects, each with its reason and the fix."""
    remedy = "fill or remove the row, or use data.empty_answers: skip"
    return [(place, f"{reason}; {remedy}") for place, reason in store.empty + store.partly_empty]


def require_rows(sources: Sequence[SourceSpec], stores: Sequence[TokenStore]) -> None:
    """Check that every source has at least one row to train on.

    Raises:
        SpecError: One problem per source without rows, with counts of skipped rows and the first of them.
    """
    problems: list[str] = []
    for source, store in zip(sources, stores, strict=True):
        if len(store):
            continue
        if left := store.empty + store.malformed:
            place, reason = left[0]
            problems.append(
                f"data file {source.path} has no row to train on: {len(store.empty)} have nothing to learn "
                f"and {len(store.malformed)} are malformed (the first: {place}: {reason}); give rows with "
                "answers, or see data.format, data.empty_answers and data.loss_on"
            )
        else:
            problems.append(f"data file {source.path} has no rows; give at least one")
    if problems:
        raise SpecError(*problems)
