"""Data-parallel and sequence-parallel ranks, and valid sequence-parallel sizes."""

import pytest

from orchestrator.config.loader import parse
from orchestrator.parallel.parallel_dims import ParallelDims, sequence_parallel_problem


@pytest.mark.parametrize(
    ("world", "sequence", "size", "ranks"),
    [(1, 1, 1, [0]), (4, 1, 4, [0, 1, 2, 3]), (4, 2, 2, [0, 0, 1, 1]), (4, 4, 1, [0, 0, 0, 0])],
)
def test_ranks_of_one_sequence_stand_side_by_side(
    world: int, sequence: int, size: int, ranks: list[int]
) -> None:
    layout = ParallelDims(world, sequence)
    assert layout.data_parallel_size == size
    assert [layout.data_parallel_rank(rank) for rank in range(world)] == ranks
    assert layout.gradient_divisor == world, "DeepSpeed does not know of sequence parallelism"
    assert [layout.sequence_rank(rank) for rank in range(world)] == list(range(sequence)) * size
    groups = layout.sequence_groups()
    assert sorted(rank for group in groups for rank in group) == list(range(world))
    assert all(len({layout.data_parallel_rank(rank) for rank in group}) == 1 for group in groups)


def test_a_job_gives_its_layout() -> None:
    job = parse("name: a\nmodel: {path: m}\ndata: {train: [{path: d}]}\nparallel: {workers: 4}\n")
    assert ParallelDims.from_job(job) == ParallelDims(4, 1)
    assert ParallelDims.from_job(job).data_parallel_size == job.data_parallel_size


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "able"),
    [
        (3, 8, 2, "use 1, 2, 4 or 8"),
        (16, 8, 2, "use 1, 2, 4 or 8"),
        (6, 12, 4, "use 1, 2, 4 or 12"),
        (5, 32, 32, "use 1, 2, 4, 8, 16 or 32"),
        (2, 7, 7, "use 1 or 7"),
        (2, 1, 1, "use 1"),
    ],
)
def test_a_degree_that_the_heads_do_not_allow_names_those_that_they_do(
    size: int, heads: int, kv_heads: int, able: str
) -> None:
    sentence = sequence_parallel_problem(size, heads, kv_heads)
    assert sentence is not None
    assert f"sequence_parallel_size={size}" in sentence
    assert sentence.endswith(able)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"), [(1, 7, 7), (8, 32, 8), (16, 32, 8), (4, 8, 1), (64, 64, 8)]
)
def test_degrees_that_the_heads_allow(size: int, heads: int, kv_heads: int) -> None:
    assert sequence_parallel_problem(size, heads, kv_heads) is None
