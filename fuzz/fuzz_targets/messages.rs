//! The body of every message, chosen by its kind as a dispatch chooses it: reading never panics, and
//! what was read survives being written and read again. `.ci/fuzz.sh` checks that none is missing.

#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::frame::Kind;
use protocol::message::{Message, decode_body, encode_body};

fn check<M: Message>(body: &[u8]) {
    if let Ok(message) = decode_body::<M>(body) {
        // The first writing may differ from what came: a number can be written in several ways.
        let once = encode_body(&message).expect("what was read can be written");
        let again = decode_body::<M>(&once).expect("what was written can be read");
        assert_eq!(encode_body(&again).expect("and written again"), once);
    }
}

macro_rules! dispatch {
    ($kind:expr, $body:expr; $($message:ty,)*) => {
        match $kind {
            $(kind if kind == <$message as Message>::KIND => check::<$message>($body),)*
            _ => {}
        }
    };
}

fuzz_target!(|bytes: &[u8]| {
    let [low, high, body @ ..] = bytes else {
        return;
    };
    dispatch! {
        Kind(u16::from_le_bytes([*low, *high])), body;
        protocol::agent::Configure,
        protocol::agent::Configured,
        protocol::agent::PowerOff,
        protocol::agent::PoweringOff,
        protocol::agent::Health,
        protocol::agent::HealthReport,
        protocol::agent::SetTime,
        protocol::agent::TimeSet,
        protocol::agent::Dial,
        protocol::agent::Dialed,
        protocol::error::ErrorBody,
        protocol::file::manage::StatFile,
        protocol::file::manage::MakeDirectory,
        protocol::file::manage::RenameFile,
        protocol::file::manage::RemoveFile,
        protocol::file::manage::MakeSymlink,
        protocol::file::manage::ReadLink,
        protocol::file::manage::ChangeMode,
        protocol::file::manage::ChangeOwner,
        protocol::file::manage::ResizeFile,
        protocol::file::manage::DirectoryPage,
        protocol::file::manage::WalkDirectory,
        protocol::file::manage::FilesRemoved,
        protocol::file::manage::LinkTarget,
        protocol::file::FileInfo,
        protocol::file::FileDone,
        protocol::file::transfer::ReadFile,
        protocol::file::transfer::ReadStarted,
        protocol::file::transfer::FileHole,
        protocol::file::transfer::ReadEnded,
        protocol::file::transfer::WriteFile,
        protocol::file::transfer::WriteStarted,
        protocol::file::transfer::WriteEnd,
        protocol::file::transfer::FileWritten,
        protocol::file::transfer::QueryUpload,
        protocol::file::transfer::UploadState,
        protocol::file::transfer::DropUpload,
        protocol::file::tree::PackTree,
        protocol::file::tree::UnpackTree,
        protocol::file::tree::TreeUnpacked,
        protocol::file::watch::WatchFiles,
        protocol::file::watch::WatchStarted,
        protocol::file::watch::FileEvents,
        protocol::hello::Hello,
        protocol::hello::HelloOk,
        protocol::host::proxy::Serve,
        protocol::host::proxy::Serving,
        protocol::host::proxy::ApiRequest,
        protocol::host::proxy::ApiReply,
        protocol::host::proxy::ApiAbandoned,
        protocol::host::proxy::AttachVm,
        protocol::host::proxy::UpdateVm,
        protocol::host::proxy::DetachVm,
        protocol::host::proxy::EdgeRequest,
        protocol::host::proxy::LookUp,
        protocol::host::proxy::LookedUp,
        protocol::host::proxy::AdmitLink,
        protocol::host::proxy::Wake,
        protocol::host::proxy::Awake,
        protocol::host::proxy::DialAgent,
        protocol::host::proxy::Count,
        protocol::host::proxy::Counted,
        protocol::host::proxy::ListAttached,
        protocol::host::proxy::Attached,
        protocol::host::proxy::FramesLost,
        protocol::host::proxy::OrderCertificate,
        protocol::host::proxy::CertificateOrdered,
        protocol::host::supervisor::SpawnVmm,
        protocol::host::supervisor::VmmSpawned,
        protocol::host::supervisor::VmmNotSpawned,
        protocol::host::supervisor::KillVmm,
        protocol::host::supervisor::VmmEnded,
        protocol::host::supervisor::ForgetVmm,
        protocol::host::supervisor::ListVmms,
        protocol::host::supervisor::VmmListed,
        protocol::host::supervisor::VmmsListed,
        protocol::host::supervisor::ShutDown,
        protocol::host::supervisor::Lease,
        protocol::host::vmm::AttachFrames,
        protocol::host::vmm::Identify,
        protocol::host::vmm::Identity,
        protocol::host::vmm::Connect,
        protocol::host::vmm::Connected,
        protocol::host::vmm::NotConnected,
        protocol::host::vmm::SwitchOff,
        protocol::host::vmm::AttachFrames,
        protocol::network::GetNetwork,
        protocol::network::SetNetwork,
        protocol::network::NetworkInfo,
        protocol::network::CreateLink,
        protocol::network::LinkCreated,
        protocol::process::ResizeTerminal,
        protocol::process::OutputGap,
        protocol::processes::AttachProcess,
        protocol::processes::ProcessAttached,
        protocol::processes::OutputReplayed,
        protocol::processes::ListProcesses,
        protocol::processes::ProcessPage,
        protocol::processes::WaitProcess,
        protocol::processes::ProcessInfo,
        protocol::processes::WriteStdin,
        protocol::processes::StdinWritten,
        protocol::processes::SendSignal,
        protocol::processes::KillProcess,
        protocol::processes::RemoveProcess,
        protocol::processes::ProcessRemoved,
        protocol::process::StartProcess,
        protocol::process::ProcessStarted,
        protocol::process::ProcessEnded,
        protocol::process::SignalProcess,
        protocol::vm::CreateVm,
        protocol::vm::GetVm,
        protocol::vm::ListVms,
        protocol::vm::StopVm,
        protocol::vm::StartVm,
        protocol::vm::DeleteVm,
        protocol::vm::OpenVm,
        protocol::vm::ReadConsole,
        protocol::vm::Console,
        protocol::vm::VmInfo,
        protocol::vm::VmPage,
        protocol::vm::Deleted,
        protocol::vm::Opened,
    }
});
