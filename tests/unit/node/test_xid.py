from __future__ import annotations

from hpc_gym.node.xid import fatal, xid_errors

LOG = [
    "6,100,1000000000,-;NVRM: loading NVIDIA UNIX x86_64 Kernel Module",
    "3,101,1000000000,-;NVRM: Xid (PCI:0000:18:00): 79, pid=12, GPU has fallen off the bus.",
    "3,102,9000000000,-;NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, DBE",
    "3,103,9000000000,-;NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, DBE",
    "3,104,9000000000,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=4711, name=python, MMU Fault",
]


def test_recent_errors_that_need_a_reset_are_told_once_and_a_programs_own_faults_are_not() -> None:
    assert list(fatal(LOG, now_s=9100.0)) == ["GPU at 0000:3b:00 had Xid 48: double-bit ECC error"]
    assert len(list(fatal(LOG, now_s=4000.0))) == 2


def test_the_log_of_this_machine_can_be_asked_at_any_time() -> None:
    assert all(line.startswith("GPU at ") for line in xid_errors())
