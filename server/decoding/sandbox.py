"""Restriction of this process to the needs of a decoder of hostile bytes. Linux only, with plain system calls.

Three layers each keep a decoder from files and the network, so one broken layer does not suffice. The first is another
user, if the process is root. The second is Landlock without any permitted file. The third is seccomp with a list of a
few permitted system calls. None of them opens a file or a socket, starts a program or signals another process; in a
worker, none creates a process. Open descriptors stay usable. The process cannot undo any of this.

The module is independent of audio. The numbers are from the kernel's headers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Collection
from dataclasses import dataclass

NOBODY = 65534

PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
SYS_SECCOMP = 317
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_RESTRICT_SELF = 446
SECCOMP_SET_MODE_FILTER = 1
LANDLOCK_CREATE_RULESET_VERSION = 1

AUDIT_ARCH_X86_64 = 0xC000003E
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_KILL_PROCESS = 0x80000000
EPERM = 1
ENOSYS = 38
# Every namespace flag of clone(2): a process with permission to fork may not leave its namespaces.
CLONE_NEW = 0x7E020080
# Offsets in struct seccomp_data.
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
LOAD, JUMP_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x45, 0x06

# x86-64. System calls to compute, allocate, and read and write open descriptors.
WORKER_CALLS = {
    "read": 0,
    "write": 1,
    "close": 3,
    "fstat": 5,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "readv": 19,
    "writev": 20,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "nanosleep": 35,
    "getpid": 39,
    "exit": 60,
    "gettimeofday": 96,
    "getrusage": 98,
    "sigaltstack": 131,
    "gettid": 186,
    "futex": 202,
    "sched_getaffinity": 204,
    "restart_syscall": 219,
    "clock_gettime": 228,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "getrandom": 318,
    "membarrier": 324,
    "rseq": 334,
}
# Further system calls of the process that forks workers.
FORKER_CALLS = WORKER_CALLS | {
    "sendto": 44,
    "recvfrom": 45,
    "sendmsg": 46,
    "recvmsg": 47,
    "clone": 56,
    "wait4": 61,
    "kill": 62,
    "prctl": 157,
    "set_robust_list": 273,
    "prlimit64": 302,
    "seccomp": 317,
}
CLONE, CLONE3 = 56, 435

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Bounds:
    """Resource limits of one worker.

    Attributes:
        address_space_bytes: All mapped memory, including the memory inherited at the fork.
        cpu_s: Processor time before the kernel kills it.
    """

    address_space_bytes: int
    cpu_s: int


def become_nobody() -> list[str]:
    """Switch from root to the user nobody; other users stay the same."""
    if os.geteuid() != 0:
        return []
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return ["uid"]


def forbid_files_and_ports() -> list[str]:
    """Deny all new files and ports with Landlock, if the kernel supports it."""
    abi = _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 1:
        return []
    num_file_rights = 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)
    fields = [(1 << num_file_rights) - 1]
    if abi >= 4:
        fields.append(0b11)  # binding and connecting TCP
    if abi >= 6:
        fields.append(0b11)  # abstract sockets and signals of processes outside
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return []
    try:
        no_new_privileges()
        return ["landlock"] if _libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0 else []
    finally:
        os.close(ruleset)


def forbid_calls(allowed: Collection[int]) -> list[str]:
    """Deny all other system calls with EPERM by seccomp, on supported kernels and processors."""
    if platform.machine() != "x86_64":
        return []
    code = _program(allowed)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    no_new_privileges()
    return ["seccomp"] if _libc.syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, 0, program) == 0 else []


def no_new_privileges() -> None:
    """Disable set-uid programs, and hide the memory from debuggers of the same user."""
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def limit(bounds: Bounds) -> None:
    """Set the worker's limits; they cannot be raised again."""
    for kind, bound in {
        resource.RLIMIT_AS: bounds.address_space_bytes,
        resource.RLIMIT_CPU: bounds.cpu_s,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        # The worker's descriptors are already open.
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_NPROC: 0,
    }.items():
        resource.setrlimit(kind, (bound, bound))


def _program(allowed: Collection[int]) -> bytes:
    """Return the filter: another architecture kills, a listed call passes, clone without new namespaces passes."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    steps = [
        step(LOAD, ARCHITECTURE),
        step(JUMP_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        step(RETURN, SECCOMP_RET_KILL_PROCESS),
        step(LOAD, NUMBER),
        # A filter cannot read its flags behind a pointer; the C library falls back to clone.
        step(JUMP_EQUAL, CLONE3, 0, 1),
        step(RETURN, SECCOMP_RET_ERRNO | ENOSYS),
    ]
    for number in sorted(set(allowed) - {CLONE}):
        steps += [step(JUMP_EQUAL, number, 0, 1), step(RETURN, SECCOMP_RET_ALLOW)]
    if CLONE in allowed:
        steps += [
            step(JUMP_EQUAL, CLONE, 0, 3),
            step(LOAD, FIRST_ARGUMENT),
            step(JUMP_SET, CLONE_NEW, 1, 0),
            step(RETURN, SECCOMP_RET_ALLOW),
        ]
    return b"".join([*steps, step(RETURN, SECCOMP_RET_ERRNO | EPERM)])
