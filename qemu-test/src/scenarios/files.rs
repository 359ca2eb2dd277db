//! Files in a VM, both ways, end to end; what each request does in every case is tested natively,
//! beside the agent.

use protocol::file::manage::{
    DirectoryPage, FilesRemoved, LinkTarget, MakeDirectory, MakeSymlink, ReadLink, RemoveFile,
    RenameFile, StatFile, WalkDirectory,
};
use protocol::file::transfer::{
    FileHole, FileWritten, QueryUpload, ReadEnded, ReadFile, ReadStarted, UploadId, UploadState,
    WriteEnd, WriteFile, WriteMode, WriteStarted,
};
use protocol::file::tree::{PackTree, TreeUnpacked, UnpackTree};
use protocol::file::watch::{FileChange, FileEvents, WatchFiles, WatchStarted};
use protocol::file::{FileDone, FileInfo, FileType};
use protocol::frame::MAX_DATA;
use protocol::{ErrorCode, Kind};

use super::talk::{Talk, eventually, is, nothing_follows, part};
use super::wire::WireStream;
use super::{Context, Failure, ensure};

const MIB: usize = 1 << 20;

pub(crate) async fn files_go_both_ways_whole_or_not_at_all(
    context: &mut Context,
) -> Result<(), Failure> {
    let made = context.create().await?;
    let talk = Talk::with(context, &made).await?;
    part("a broken upload", broken_upload(&talk)).await?;
    part("names", names(&talk)).await?;
    part("holes", holes(&talk)).await?;
    part("trees", trees(&talk)).await?;
    part("watching", watching(&talk)).await?;
    part("refusals", refusals(&talk)).await?;
    context.delete(&made).await
}

fn write_request(path: &str) -> WriteFile {
    WriteFile {
        path: path.into(),
        mode: WriteMode::Replace,
        permissions: None,
        size: None,
        checksum: true,
        upload: None,
        offset: 0,
    }
}

fn read_request(path: &str) -> ReadFile {
    ReadFile {
        path: path.into(),
        offset: 0,
        length: None,
        checksum: true,
        before: 0,
        sparse: true,
        special: false,
    }
}

fn stat(path: &str) -> StatFile {
    StatFile {
        path: path.into(),
        follow: false,
    }
}

/// Bytes that do not repeat soon.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

async fn data(stream: &mut WireStream, bytes: &[u8]) -> Result<(), Failure> {
    for piece in bytes.chunks(MAX_DATA) {
        stream.send_raw(Kind::FILE_DATA, piece).await?;
    }
    Ok(())
}

/// A write from its request to its last frame.
async fn write(talk: &Talk<'_>, request: &WriteFile, bytes: &[u8]) -> Result<FileWritten, Failure> {
    let mut stream = talk.begin(request).await?;
    stream.message::<WriteStarted>().await?;
    data(&mut stream, bytes).await?;
    stream.send(&WriteEnd { blake3: None }).await?;
    let written = stream.message().await?;
    nothing_follows(&mut stream).await?;
    Ok(written)
}

/// A file as it was read, and how much of it came as holes.
async fn read(talk: &Talk<'_>, request: &ReadFile) -> Result<(Vec<u8>, u64), Failure> {
    let mut stream = talk.begin(request).await?;
    let started: ReadStarted = stream.message().await?;
    let (bytes, holes) = content(&mut stream).await?;
    ensure(started.total == Some(bytes.len() as u64), || {
        format!("{started:?} before {} bytes", bytes.len())
    })?;
    Ok((bytes, holes))
}

/// Data and holes up to `READ_ENDED`, whose count and checksum must be right.
async fn content(stream: &mut WireStream) -> Result<(Vec<u8>, u64), Failure> {
    let (mut bytes, mut holes) = (Vec::new(), 0);
    let ended: ReadEnded = loop {
        let frame = stream.frame().await?;
        let frame = frame.ok_or_else(|| Failure::new("the read ended without a last frame"))?;
        match frame.kind {
            Kind::FILE_DATA => bytes.extend_from_slice(&frame.body),
            Kind::FILE_HOLE => {
                let FileHole { length } = protocol::decode(&frame)?;
                holes += length;
                bytes.resize(bytes.len() + usize::try_from(length)?, 0);
            }
            _ => break protocol::decode(&frame)?,
        }
    };
    nothing_follows(stream).await?;
    let sum = *blake3::hash(&bytes).as_bytes();
    ensure(
        ended.bytes == bytes.len() as u64 && ended.blake3 == Some(sum),
        || format!("{} bytes came: {ended:?}", bytes.len()),
    )?;
    Ok((bytes, holes))
}

/// Sent half-way, lost with its connection, and gone on with by another client.
async fn broken_upload(talk: &Talk<'_>) -> Result<(), Failure> {
    let bytes = noise(8 * MIB);
    let sum = *blake3::hash(&bytes).as_bytes();
    let mut request = write_request("deep/file");
    let mut id = [0; 16];
    getrandom::fill(&mut id)?;
    let upload = UploadId(id);
    request.upload = Some(upload);
    request.size = Some(bytes.len() as u64);

    let lost = talk.another().await?;
    let mut stream = lost.begin(&request).await?;
    stream.message::<WriteStarted>().await?;
    data(&mut stream, &bytes[..5 * MIB]).await?;
    // Half a frame more.
    stream.send_bytes(&[9, 0]).await?;
    lost.vanish();
    drop(stream);

    let path = request.path.clone();
    let query = QueryUpload { path, upload };
    let mut state = None;
    eventually("the agent lets the upload go", async || {
        let frame = talk.begin(&query).await?.frame().await?;
        state = frame.and_then(|frame| protocol::decode::<UploadState>(&frame).ok());
        Ok(state.is_some())
    })
    .await?;
    let state = state.ok_or_else(|| Failure::new("no state"))?;
    let there = usize::try_from(state.offset)?;
    let right = bytes.get(..there).map(blake3::hash);
    ensure(
        there > 0 && right.is_some_and(|sum| *sum.as_bytes() == state.blake3),
        || format!("{state:?}"),
    )?;
    talk.refused(&stat("deep/file"), ErrorCode::NoSuchFile)
        .await?;
    request.offset = state.offset;
    let written = write(talk, &request, &bytes[there..]).await?;
    ensure(
        written.size == bytes.len() as u64 && written.blake3 == Some(sum),
        || format!("{written:?}"),
    )?;
    let line = "ls -A deep; stat -c %a deep/file";
    let said = talk.shell(line).await?;
    ensure(said == "file\n644", || said.clone())?;
    let (back, _) = read(talk, &read_request("deep/file")).await?;
    ensure(back == bytes, || format!("{} other bytes", back.len()))?;
    let mut middle = read_request("deep/file");
    middle.offset = 3_000_000;
    middle.length = Some(100_001);
    let (back, _) = read(talk, &middle).await?;
    ensure(back == bytes[3_000_000..3_100_001], || {
        "another middle".to_owned()
    })?;

    // A write that nobody ends leaves the old file, and nothing beside it.
    let short = talk.another().await?;
    let mut stream = short.begin(&write_request("deep/file")).await?;
    stream.message::<WriteStarted>().await?;
    data(&mut stream, b"something else").await?;
    short.vanish();
    drop(stream);
    eventually("what was half written is gone", async || {
        Ok(talk.shell("ls -A deep").await? == "file")
    })
    .await?;
    let info: FileInfo = talk.ask(&stat("deep/file")).await?;
    ensure(
        info.size == bytes.len() as u64 && info.file_type == FileType::Regular && info.uid == 0,
        || format!("{info:?}"),
    )
}

/// Directories, pages, renames, links, and what is removed with all that is in it.
async fn names(talk: &Talk<'_>) -> Result<(), Failure> {
    let make = MakeDirectory {
        path: b"names/below".to_vec(),
        mode: 0o750,
        parents: true,
    };
    talk.ask::<_, FileDone>(&make).await?;
    for number in 0..5 {
        write(talk, &write_request(&format!("names/{number}")), b"x").await?;
    }
    let rename = |from: &str, no_replace| RenameFile {
        from: from.into(),
        to: b"names/3".to_vec(),
        no_replace,
    };
    talk.refused(&rename("names/4", true), ErrorCode::FileExists)
        .await?;
    talk.ask::<_, FileDone>(&rename("names/4", false)).await?;
    let link = MakeSymlink {
        target: b"../deep/file".to_vec(),
        path: b"names/link".to_vec(),
    };
    talk.ask::<_, FileDone>(&link).await?;
    let path = link.path.clone();
    let said: LinkTarget = talk.ask(&ReadLink { path }).await?;
    ensure(said.target == link.target, || format!("{said:?}"))?;
    let follow = StatFile {
        path: link.path,
        follow: true,
    };
    let info: FileInfo = talk.ask(&follow).await?;
    ensure(info.size == 8 * MIB as u64, || format!("{info:?}"))?;

    let walk = WalkDirectory {
        path: b"names".to_vec(),
        targets: false,
    };
    let mut stream = talk.begin(&walk).await?;
    let page: DirectoryPage = stream.message().await?;
    let FileDone {} = stream.message().await?;
    let entries = page.entries.into_iter();
    let names = entries.map(|entry| String::from_utf8_lossy(&entry.name).into_owned());
    let mut seen: Vec<_> = names.collect();
    seen.sort();
    ensure(seen == ["0", "1", "2", "3", "below", "link"], || {
        format!("{seen:?}")
    })?;
    let path = b"names".to_vec();
    let recursive = |recursive| RemoveFile {
        path: path.clone(),
        recursive,
    };
    talk.refused(&recursive(false), ErrorCode::DirectoryNotEmpty)
        .await?;
    let removed: FilesRemoved = talk.ask(&recursive(true)).await?;
    ensure(removed.count == 7, || format!("{removed:?}"))?;
    // What the link pointed to is still there.
    talk.ask::<_, FileInfo>(&stat("deep/file")).await?;
    Ok(())
}

/// A file that is mostly holes takes little room in the VM and on the way.
async fn holes(talk: &Talk<'_>) -> Result<(), Failure> {
    let length = 64 * MIB as u64;
    let mut stream = talk.begin(&write_request("sparse")).await?;
    stream.message::<WriteStarted>().await?;
    data(&mut stream, b"begin").await?;
    stream.send(&FileHole { length }).await?;
    data(&mut stream, b"end").await?;
    stream.send(&WriteEnd { blake3: None }).await?;
    let written: FileWritten = stream.message().await?;
    let size = length + 8;
    ensure(written.size == size, || format!("{written:?}"))?;
    let info: FileInfo = talk.ask(&stat("sparse")).await?;
    ensure(info.size == size && info.allocated < MIB as u64, || {
        format!("{info:?}")
    })?;
    let ends = talk.shell("head -c 5 sparse; tail -c 3 sparse");
    let ends = ends.await?;
    ensure(ends == "beginend", || ends.clone())?;
    let mut request = read_request("sparse");
    request.length = Some(32 * MIB as u64);
    let (bytes, came_as_holes) = read(talk, &request).await?;
    ensure(
        bytes.starts_with(b"begin") && came_as_holes > 31 * MIB as u64,
        || format!("{came_as_holes} bytes of holes"),
    )?;
    let path = b"sparse".to_vec();
    let recursive = false;
    talk.ask::<_, FilesRemoved>(&RemoveFile { path, recursive })
        .await?;
    Ok(())
}

/// What Debian's tar makes of our archive, and we of its.
async fn trees(talk: &Talk<'_>) -> Result<(), Failure> {
    let grow = "mkdir -p tree/a/b tree/empty && seq 1 50000 > tree/a/numbers && \
                ln -s ../a tree/a/link && ln tree/a/numbers tree/same && chmod 4711 tree/same && \
                chown 1000:1001 tree/empty && truncate -s 20M tree/hole && \
                echo ü > \"tree/$(printf 'n\\303\\274 x')\"";
    talk.shell(grow).await?;
    let describe = |root: &str| {
        format!(
            "cd {root} && find . -mindepth 1 -printf '%p %m %U:%G %s %l %T@\\n' | sort && \
             find . -type f -exec sha256sum {{}} + | sort"
        )
    };
    let before = talk.shell(&describe("tree")).await?;
    let pack = PackTree {
        path: b"tree".to_vec(),
        checksum: true,
        sparse: true,
        special: false,
    };
    let mut stream = talk.begin(&pack).await?;
    let (archive, _) = content(&mut stream).await?;
    ensure(archive.len() < 2 * MIB, || {
        format!("{} bytes with a hole of 20 MiB", archive.len())
    })?;
    write(talk, &write_request("ours.tar"), &archive).await?;
    let untar = "mkdir theirs && tar -C theirs -xpf ours.tar";
    talk.shell(untar).await?;
    let unpack = UnpackTree {
        path: b"ours".to_vec(),
        owners: true,
        special: false,
    };
    let mut stream = talk.begin(&unpack).await?;
    data(&mut stream, &archive).await?;
    stream.send(&WriteEnd { blake3: None }).await?;
    let done: TreeUnpacked = stream.message().await?;
    ensure(done.entries >= 9, || format!("{done:?}"))?;
    for root in ["theirs", "ours"] {
        let after = talk.shell(&describe(root)).await?;
        ensure(after == before, || {
            format!("{root}:\n{after}\nbefore:\n{before}")
        })?;
    }
    // And an archive of Debian's tar.
    let packed = "tar -C tree --format=posix --sparse -cf theirs.tar .";
    talk.shell(packed).await?;
    let (archive, _) = read(talk, &read_request("theirs.tar")).await?;
    let again = UnpackTree {
        path: b"again".to_vec(),
        ..unpack
    };
    let mut stream = talk.begin(&again).await?;
    data(&mut stream, &archive).await?;
    stream.send(&WriteEnd { blake3: None }).await?;
    stream.message::<TreeUnpacked>().await?;
    let same = "diff -r --no-dereference tree again && echo same";
    let said = talk.shell(same).await?;
    ensure(said == "same", || said.clone())
}

async fn watching(talk: &Talk<'_>) -> Result<(), Failure> {
    let watch = WatchFiles {
        path: b"tree".to_vec(),
        recursive: true,
    };
    let mut stream = talk.begin(&watch).await?;
    let started: WatchStarted = stream.message().await?;
    ensure(started.watched == 4, || format!("{started:?}"))?;
    talk.shell("mkdir tree/new && sleep 1 && echo x > tree/new/file")
        .await?;
    let mut seen = Vec::new();
    while !seen.contains(&(FileChange::Closed, b"new/file".to_vec())) {
        let told: FileEvents = stream.message().await?;
        seen.extend(told.events.into_iter().map(|one| (one.change, one.path)));
    }
    let created = |path: &[u8]| seen.contains(&(FileChange::Created, path.to_vec()));
    ensure(created(b"new") && created(b"new/file"), || {
        format!("{seen:?}")
    })
}

/// Each says what, where and why.
async fn refusals(talk: &Talk<'_>) -> Result<(), Failure> {
    let mounts = "mkdir -p full sealed && mount -t tmpfs -o size=1m tmpfs full && \
                  mount -t tmpfs -o ro tmpfs sealed";
    talk.shell(mounts).await?;
    let long = format!("deep/{}", "n".repeat(256));
    let cases = [
        ("missing", ErrorCode::NoSuchFile, "ENOENT"),
        ("tree", ErrorCode::IsADirectory, "EISDIR"),
        ("deep/file/x", ErrorCode::NotADirectory, "ENOTDIR"),
        (&long, ErrorCode::NameTooLong, "ENAMETOOLONG"),
    ];
    for (path, code, errno) in cases {
        let error = talk.refused(&read_request(path), code).await?;
        ensure(
            error.message.contains(path.get(..100).unwrap_or(path))
                && error.detail.starts_with(errno),
            || format!("{path}: {error:?}"),
        )?;
    }
    for (path, code) in [
        ("sealed/file", ErrorCode::ReadOnly),
        ("tree", ErrorCode::IsADirectory),
        (&long, ErrorCode::NameTooLong),
        ("/dev/null", ErrorCode::NotARegularFile),
    ] {
        talk.refused(&write_request(path), code).await?;
    }
    write(talk, &write_request("full/file"), b"old").await?;
    let mut stream = talk.begin(&write_request("full/file")).await?;
    stream.message::<WriteStarted>().await?;
    // The refusal may come, and end the stream, while the rest is still being sent.
    let _ = data(&mut stream, &noise(2 * MIB)).await;
    is(&stream.error().await?, ErrorCode::NoSpace)?;
    let left = talk.shell("ls -A full; cat full/file").await?;
    ensure(left == "file\nold", || left.clone())
}
