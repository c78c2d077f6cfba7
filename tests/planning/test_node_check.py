"""The check of nodes: what differs between hosts is named with the remedy."""

from dataclasses import replace

from paco_ds.planning.node_check import NodeReport, problems_of, table_of

VERSIONS = {"python": "3.11.7", "paco_ds": "1", "torch": "2.14.1", "deepspeed": "0.19"}
READY = NodeReport(0, "node1", VERSIONS, "H200, 140 GiB", 1000.0, 1 << 40, {"train-00000.tar": "ab"})


def test_nodes_that_are_alike_are_ready():
    """No line; one row for each host."""
    reports = [READY, replace(READY, rank=1, free=None, digests={}), replace(READY, rank=2, host="node2")]
    assert problems_of(reports) == []
    assert table_of(reports, 0.01).row_count == 2


def test_each_difference_is_one_line_that_names_the_host_and_the_remedy():
    """Versions, devices, shards, clocks, disk, and what a node reported itself."""
    alike = replace(READY, rank=1, host="node2")
    other = NodeReport(
        2,
        "node3",
        {**VERSIONS, "torch": "2.13"},
        "A100, 80 GiB",
        990.0,
        1 << 30,
        {"train-00000.tar": "cd"},
        ("no shards in /data",),
    )
    lines = problems_of([READY, alike, other])
    assert lines[0] == "node3: no shards in /data"
    assert lines[1] == "torch is 2.14.1 on most hosts, but node3: 2.13: install the same version everywhere"
    assert lines[2].startswith("device is H200, 140 GiB on most hosts, but node3: A100")
    assert lines[3] == "digest of shard train-00000.tar is ab on most hosts, but node3: cd: copy the shards again there"
    assert lines[4] == "clocks differ by 10.0 s, node3 is last: let all hosts follow one time server (NTP)"
    assert lines[5] == "node3: 1.0 GiB are free for checkpoints, fewer than 5: make room"
    assert len(lines) == 6
