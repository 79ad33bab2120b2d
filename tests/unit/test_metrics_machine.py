"""CPU and memory from /proc, with files and a clock of the tests' own."""

import pytest

from aiorch_server.observability.collector import MachineCollector
from aiorch_server.observability.machine import MachineProbe

MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:    500 kB\n"


def write_stat(folder, user, idle, iowait=0):
    (folder / "stat").write_text(f"cpu  {user} 0 0 {idle} {iowait} 0 0 0 5 0\ncpu0 1 2 3\n")


@pytest.fixture
def proc(tmp_path):
    write_stat(tmp_path, 100, 100)
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def test_utilization_between_two_readings(proc):
    now = [0.0]
    probe = MachineProbe(proc, min_interval_s=1, clock=lambda: now[0])
    assert probe.read_cpu_utilization() is None
    write_stat(proc, 175, 115, iowait=10)
    now[0] = 0.5
    assert probe.read_cpu_utilization() is None  # too early to say
    now[0] = 1.0
    assert probe.read_cpu_utilization() == 0.75
    write_stat(proc, 175, 215, iowait=10)
    now[0] = 1.5
    assert probe.read_cpu_utilization() == 0.75  # a second scraper gets the same window
    now[0] = 2.5
    assert probe.read_cpu_utilization() == 0.0


def test_clocks_that_stand_still_or_run_backwards(proc):
    now = [0.0]
    probe = MachineProbe(proc, min_interval_s=0, clock=lambda: now[0])
    assert probe.read_cpu_utilization() is None
    write_stat(proc, 90, 90)
    assert probe.read_cpu_utilization() is None
    write_stat(proc, 190, 80)
    assert probe.read_cpu_utilization() == 1.0


def test_memory(proc):
    assert MachineProbe(proc).read_memory_bytes() == (2000 * 1024, 1500 * 1024)


@pytest.mark.parametrize("content", [None, "", "nonsense\n", "MemTotal: x kB\n"])
def test_missing_or_broken_files_leave_the_gauges_out(tmp_path, content):
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
        (tmp_path / "stat").write_text(content)
    probe = MachineProbe(tmp_path, min_interval_s=0)
    assert probe.read_memory_bytes() is None and probe.read_cpu_utilization() is None
    assert [family.name for family in MachineCollector(probe).collect()] == ["aiorch_build_info"]


def test_this_machine():
    total_bytes, used_bytes = MachineProbe().read_memory_bytes()
    assert 0 < used_bytes < total_bytes
