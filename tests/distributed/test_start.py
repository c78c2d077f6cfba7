"""What a started job leaves behind."""

from pathlib import Path


def mapped_buffers(ranks) -> list[str]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "deepspeed_allreduce_buffer" in line]


def test_shared_memory_has_no_name_that_could_outlive_the_job(pool):
    for lines in pool(2).run("tests.distributed.test_start:mapped_buffers"):
        assert len(lines) == 2  # each rank maps its own and the other's
        assert all(line.endswith("(deleted)") for line in lines)
