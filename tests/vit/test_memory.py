"""What a process can still have of main memory: the least of what the system and its control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from lambda_vit.runtime import memory

V2 = ("0::/job/step\n", "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file")
V1 = (
    "5:cpu:/\n4:memory:/job/step\n",
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    "total_inactive_file",
)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 1 GiB available."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 1048576 kB\n")
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    return tmp_path


def group(folder: Path, names: tuple[str, str], cached: str, limit: object, used: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cached} 1000\n")


@pytest.mark.parametrize("version", [V1, V2])
def test_the_tightest_group_counts(system, version):
    line, top, names, cached = version
    (system / "proc/self/cgroup").write_text(line)
    assert memory.free_memory() == 1 << 30
    group(system / top / "job/step", names, cached, 1 << 40, 7)
    assert memory.free_memory() == 1 << 30
    group(system / top / "job", names, cached, 500_000, 100_000)
    assert memory.free_memory() == 401_000
    group(system / top / "job/step", names, cached, 300_000, 300_000)
    assert memory.free_memory() == 1000


def test_a_container_that_sees_its_own_group_as_the_outermost(system):
    (system / "proc/self/cgroup").write_text("0::/../elsewhere\n")
    group(system / V2[1], *V2[2:], 70_000, 1000)
    assert memory.free_memory() == 70_000


def test_no_limit_and_no_telling(system):
    line, top, names, cached = V2
    (system / "proc/self/cgroup").write_text(line)
    group(system / top / "job", names, cached, "max", 7)
    assert memory.free_memory() == 1 << 30
    (system / "proc/meminfo").write_text("")
    assert memory.free_memory() is None


def test_here_it_is_some_of_what_there_is():
    found = memory.free_memory()
    assert found is None or found > 0
