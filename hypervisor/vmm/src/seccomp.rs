//! What a monitor may ask of the kernel once its guest runs: nothing that opens, connects, starts
//! or traces. One list for the whole process (main thread and devices), a shorter one on top of it
//! for vCPU threads. Anything else kills the process: a guest that got so far gets no second try.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as ArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};

/// Why a thread is not confined. The monitor must not go on then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SeccompError {
    /// The list does not compile; a defect of ours.
    #[error("system call list: {0}")]
    List(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("installing the system call list: {0}; the host's kernel needs CONFIG_SECCOMP_FILTER")]
    Install(#[from] seccompiler::Error),
}

/// ioctl numbers, for seccomp's 32-bit comparison.
mod ioctls {
    /// `_IO(KVMIO, 0x80)`
    pub(super) const KVM_RUN: u64 = 0xae80;
    /// `_IOR(KVMIO, 0x81, struct kvm_regs)`
    pub(super) const KVM_GET_REGS: u64 = 0x8090_ae81;
    /// `_IOR(KVMIO, 0x83, struct kvm_sregs)`
    pub(super) const KVM_GET_SREGS: u64 = 0x8138_ae83;
    /// Rust's `set_nonblocking`.
    pub(super) const FIONBIO: u64 = 0x5421;
}

/// Memory, threads and clocks: what Rust and the C library need to go on at all.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    // The allocator asks for the memory nearest to it, where there is more than one kind.
    libc::SYS_getcpu,
];

/// The allocator gives its mappings a name, if the C library's headers know how.
const PR_SET_VMA: u64 = libc::PR_SET_VMA as u64;

/// Work on descriptors that a thread already has.
const DESCRIPTORS: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_timerfd_settime,
];

/// What the main thread and the devices need beyond that.
const PROCESS: &[i64] = &[
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    // Only narrows: a vCPU thread puts its own list on top.
    libc::SYS_seccomp,
];

fn only(argument: u8, value: u64) -> Result<SeccompCondition, SeccompError> {
    Ok(SeccompCondition::new(
        argument,
        ArgLen::Dword,
        SeccompCmpOp::Eq,
        value,
    )?)
}

fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, SeccompError> {
    values
        .iter()
        .map(|&value| Ok(SeccompRule::new(vec![only(argument, value)?])?))
        .collect()
}

fn program(
    plain: &[&[i64]],
    ioctls: &[u64],
    extra: Vec<(i64, Vec<SeccompRule>)>,
) -> Result<BpfProgram, SeccompError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = plain
        .iter()
        .flat_map(|list| list.iter())
        .map(|&number| (number, Vec::new()))
        .collect();
    rules.insert(libc::SYS_ioctl, one_of(1, ioctls)?);
    // Private anonymous or shared memory, never executable.
    const NO_EXEC: u64 = libc::PROT_EXEC as u64;
    let not_executable = || -> Result<Vec<SeccompRule>, SeccompError> {
        let condition =
            SeccompCondition::new(2, ArgLen::Dword, SeccompCmpOp::MaskedEq(NO_EXEC), 0)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    rules.insert(
        libc::SYS_fcntl,
        one_of(
            1,
            &[
                libc::F_DUPFD_CLOEXEC as u64,
                libc::F_GETFD as u64,
                libc::F_SETFD as u64,
                libc::F_GETFL as u64,
                libc::F_SETFL as u64,
            ],
        )?,
    );
    // A process may signal itself only: vCPUs are stopped so. Not by tkill, which takes any
    // process's thread; the C library's `abort` uses that and ends the process either way.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, one_of(0, &[own])?);
    rules.extend(extra);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

/// Confines every thread of the process. Sets `no_new_privs`, too.
pub(crate) fn confine_process() -> Result<(), SeccompError> {
    const PR_SET_NAME: u64 = libc::PR_SET_NAME as u64;
    let list = program(
        &[RUNTIME, DESCRIPTORS, PROCESS],
        &[
            ioctls::KVM_RUN,
            ioctls::KVM_GET_REGS,
            ioctls::KVM_GET_SREGS,
            ioctls::FIONBIO,
        ],
        vec![(
            libc::SYS_prctl,
            one_of(
                0,
                &[PR_SET_NAME, PR_SET_VMA, libc::PR_SET_NO_NEW_PRIVS as u64],
            )?,
        )],
    )?;
    Ok(apply_filter_all_threads(&list)?)
}

/// Confines a vCPU's thread further.
pub(crate) fn confine_vcpu() -> Result<(), SeccompError> {
    let list = program(
        &[RUNTIME, DESCRIPTORS],
        &[ioctls::KVM_RUN, ioctls::KVM_GET_REGS, ioctls::KVM_GET_SREGS],
        vec![(libc::SYS_prctl, one_of(0, &[PR_SET_VMA])?)],
    )?;
    Ok(apply_filter(&list)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    /// How a child ends that confines itself and then makes one call.
    fn after(confine: fn() -> Result<(), SeccompError>, call: impl Fn() -> i64) -> WaitStatus {
        // SAFETY: the child only makes system calls and exits; the test harness's other threads
        // are not in it.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
            ForkResult::Child => {
                let code = match confine() {
                    Ok(()) => i32::from(call() < 0),
                    Err(_) => 99,
                };
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(code) }
            }
        }
    }

    fn is_killed(status: WaitStatus) -> bool {
        matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
    }

    macro_rules! call {
        ($($argument:expr),*) => {
            // SAFETY: refused before it does anything, or harmless.
            || unsafe { libc::syscall($($argument),*) }
        };
    }

    #[test]
    fn calls_that_open_connect_start_or_trace_kill_the_process() {
        let path = c"/".as_ptr() as usize;
        let null = 0_usize;
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_open, path, 0)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_openat, -100, path, 0)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_openat2, -100, path, null, 0)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_socket, 1, 1, 0)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_connect, 0, null, 0)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_bind, 0, null, 0)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_execve, path, null, null)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_ptrace, 0, 0, null, null)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_clone, 0, null)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_unlink, path)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_ioctl, 0, 0x5401, null)
        )));
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_mmap, null, 4096, 4, 0x22, -1, 0)
        )));
        // A path in disguise.
        assert!(is_killed(after(
            confine_process,
            call!(libc::SYS_statx, -100, path, 0, 0, null)
        )));
    }

    #[test]
    fn a_monitor_may_signal_itself_only() {
        let other = std::process::id();
        for confine in [confine_process, confine_vcpu] {
            assert!(is_killed(after(confine, call!(libc::SYS_tkill, other, 0))));
            assert!(is_killed(after(confine, call!(libc::SYS_kill, other, 0))));
            assert!(is_killed(after(
                confine,
                call!(libc::SYS_tgkill, other, other, 0)
            )));
            let own = after(confine, || {
                let pid = i64::from(std::process::id());
                // SAFETY: signal 0 only asks.
                unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, 0) }
            });
            assert!(matches!(own, WaitStatus::Exited(_, 0)), "{own:?}");
        }
    }

    #[test]
    fn a_vcpu_thread_may_not_even_use_sockets() {
        assert!(is_killed(after(
            confine_vcpu,
            call!(libc::SYS_recvmsg, 0, 0_usize, 0)
        )));
        assert!(is_killed(after(
            confine_vcpu,
            call!(libc::SYS_accept4, 0, 0_usize, 0_usize, 0)
        )));
    }

    #[test]
    fn a_panic_is_caught_as_ever() {
        for confine in [confine_process, confine_vcpu] {
            let caught = || {
                let result = std::panic::catch_unwind(|| {
                    std::panic::resume_unwind(Box::new("no hook: the harness's opens files"));
                });
                i64::from(result.is_ok()).wrapping_neg()
            };
            assert!(matches!(after(confine, caught), WaitStatus::Exited(_, 0)));
        }
    }

    #[test]
    fn what_a_monitor_needs_is_allowed() {
        let file = tempfile::tempfile().unwrap();
        let number = file.as_raw_fd();
        for confine in [confine_process, confine_vcpu] {
            let null = 0_usize;
            assert!(matches!(
                after(confine, call!(libc::SYS_getcpu, null, null, null)),
                WaitStatus::Exited(_, 0)
            ));
            // Nothing is there to name; that it is asked does no harm.
            assert!(matches!(
                after(
                    confine,
                    call!(libc::SYS_prctl, PR_SET_VMA, 0, null, 4096, null)
                ),
                WaitStatus::Exited(..)
            ));
            assert!(is_killed(after(
                confine,
                call!(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1)
            )));
            assert!(matches!(
                after(confine, call!(libc::SYS_ftruncate, number, 100)),
                WaitStatus::Exited(_, 0)
            ));
        }
        assert!(matches!(
            after(confine_process, call!(libc::SYS_fdatasync, number)),
            WaitStatus::Exited(_, 0)
        ));
    }
}
