"""Who works on which micro-batch."""

import pytest

from orchestrator.jobfile import parse
from orchestrator.parallel.layout import Layout


@pytest.mark.parametrize(
    ("world", "sequence", "size", "ranks"),
    [(1, 1, 1, [0]), (4, 1, 4, [0, 1, 2, 3]), (4, 2, 2, [0, 0, 1, 1]), (4, 4, 1, [0, 0, 0, 0])],
)
def test_ranks_of_one_sequence_stand_side_by_side(
    world: int, sequence: int, size: int, ranks: list[int]
) -> None:
    layout = Layout(world, sequence)
    assert layout.data_parallel_size == size
    assert [layout.data_parallel_rank(rank) for rank in range(world)] == ranks
    assert layout.gradient_divisor == size


def test_a_job_gives_its_layout() -> None:
    job = parse("name: a\nmodel: {path: m}\ndata: {train: [{path: d}]}\nparallel: {workers: 4}\n")
    assert Layout.of(job) == Layout(4, 1)
    assert Layout.of(job).data_parallel_size == job.data_parallel_size
