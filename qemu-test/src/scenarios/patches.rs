//! Patches run with the `sup` that people run, each making VMs of its own; what each method does in
//! every case is tested natively, in `client`. The patches are files in `qemu-test/patches`, check
//! themselves, and say "good" in the end.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use client::protocol::vm::VmRef;
use tokio::process::Command;
use tokio::time::timeout;

use super::{Context, Failure, ensure};

/// A limit that only a hang reaches.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a patch printed and how it ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// A home for `sup`: its store and what it saves.
struct Bench<'a> {
    context: &'a Context,
    directory: tempfile::TempDir,
}

impl<'a> Bench<'a> {
    fn new(context: &'a Context) -> Result<Self, Failure> {
        let directory = tempfile::tempdir()?;
        Ok(Self { context, directory })
    }

    fn out(&self) -> PathBuf {
        self.directory.path().join("out")
    }

    /// Runs a patch of ours with more arguments.
    async fn run(&self, name: &str, more: &[&str]) -> Result<Ran, Failure> {
        let home = self.directory.path();
        let work = Command::new(sup()?)
            .arg("run")
            .arg(patches().join(name))
            .args(["--chat", "qemu", "--out"])
            .arg(self.out())
            .args(more)
            .env_clear()
            .env("HOME", home)
            .env(
                "SUP_ENDPOINT",
                format!("https://127.0.0.1:{}", self.context.appliance.port()),
            )
            .env("SUP_TOKEN", self.context.appliance.token())
            .env("SUP_CA", self.context.appliance.home().join("ca.pem"))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let Ok(ran) = timeout(PATIENCE, work).await else {
            return Err(Failure::new(format!("{name} did not end")));
        };
        let ran = ran?;
        Ok(Ran {
            code: ran.status.code(),
            stdout: String::from_utf8_lossy(&ran.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&ran.stderr).into_owned(),
        })
    }

    /// One that succeeds; what it gave.
    async fn good(&self, name: &str, more: &[&str]) -> Result<String, Failure> {
        let ran = self.run(name, more).await?;
        ensure(ran.code == Some(0), || format!("{name}: {ran:?}"))?;
        Ok(ran.stdout.trim_end().to_owned())
    }

    async fn gives(&self, name: &str, more: &[&str], wanted: &str) -> Result<(), Failure> {
        let given = self.good(name, more).await?;
        ensure(given == wanted, || format!("{name} gave {given:?}"))
    }
}

/// The program beside ours.
fn sup() -> Result<PathBuf, Failure> {
    Ok(std::env::current_exe()?.with_file_name("sup"))
}

fn patches() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("patches")
}

fn picture() -> String {
    patches().join("picture.png").display().to_string()
}

pub(crate) async fn patches_use_every_method(context: &mut Context) -> Result<(), Failure> {
    let bench = Bench::new(context)?;
    bench.gives("commands.js", &[], "commands: good").await?;
    bench.gives("streams.js", &[], "streams: good").await?;
    bench.gives("session.js", &[], "session:\ngood").await?;
    bench.gives("files.js", &[], "files: good").await?;
    bench.gives("transfers.js", &[], "transfers: good").await?;
    bench.gives("server.js", &[], "server: good\ntrue").await?;
    bench
        .gives("gone.js", &[], "true VM_DELETED\n255 VM not found")
        .await?;
    let inputs = [
        "--text",
        "one",
        "--text",
        "two",
        "--image",
        &picture(),
        "--file",
        &picture(),
    ];
    let given = bench
        .good("inputs.js", &[&inputs[..], &["--json"]].concat())
        .await?;
    let given: serde_json::Value = serde_json::from_str(&given)?;
    let size = std::fs::metadata(picture())?.len();
    let wanted = serde_json::json!({
        "texts": ["one", "two"],
        "first": "one",
        "file": ["picture.png", size],
        "nothing": true,
        "image": "true image/png",
    });
    ensure(given == wanted, || given.to_string())?;
    let failed = bench.run("fails.js", &[]).await?;
    ensure(
        failed.code == Some(1)
            && failed.stderr.contains("on purpose")
            && failed.stderr.contains("fails.js:3"),
        || format!("{failed:?}"),
    )?;
    nothing_is_left(context).await
}

pub(crate) async fn a_picture_and_a_sound_come_out_as_what_they_are(
    context: &mut Context,
) -> Result<(), Failure> {
    let bench = Bench::new(context)?;
    let shown = bench.good("picture.js", &["--image", &picture()]).await?;
    let path = shown.lines().last().unwrap_or_default();
    let bytes = std::fs::read(path)?;
    // PNG, 11.2.1: the header is the first chunk and begins with width and height.
    ensure(
        Path::new(path).starts_with(bench.out())
            && bytes.get(..8) == Some(b"\x89PNG\r\n\x1a\n")
            && bytes.get(12..24) == Some(b"IHDR\0\0\0\x30\0\0\0\x20"),
        || format!("{path}: {:?}", bytes.get(..24)),
    )?;
    bench
        .gives("sound.js", &[], "true true\ntrue video/mp4\nimage.png")
        .await?;
    nothing_is_left(context).await
}

pub(crate) async fn what_a_patch_keeps_is_alive_in_the_next_run(
    context: &mut Context,
) -> Result<(), Failure> {
    let bench = Bench::new(context)?;
    let id = bench.good("keeps.js", &["--text", "first"]).await?;
    bench.gives("keeps.js", &["--text", "second"], &id).await?;
    let reference: VmRef = id.parse()?;
    context.client.stop(reference, None).await?;
    bench
        .gives("keeps.js", &["--text", "third"], "kept: good")
        .await?;
    nothing_is_left(context).await
}

async fn nothing_is_left(context: &Context) -> Result<(), Failure> {
    let left = context.client.list().await?;
    ensure(left.is_empty(), || format!("left over: {left:?}"))
}
