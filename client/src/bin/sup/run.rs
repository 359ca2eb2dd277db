//! `sup run`: a patch with the appliance behind it. Its result goes to standard output, what it says
//! meanwhile to standard error; Ctrl-C ends it and what it waits for.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use client::patch::{
    self, Appliance, Finished, Inputs, Interrupt, Patch, PatchError, Screen, show,
};
use tokio::runtime::Handle;

use crate::complaint::{Complaint, harmless};
use crate::config::Target;
use crate::session::{INTERRUPTED, Interrupts};
use crate::terminal;

/// The longest script, in bytes.
const MAX_SCRIPT: u64 = 16 << 20;

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The script; `-` reads it from standard input
    #[arg(value_name = "PATCH.js")]
    pub(crate) patch: PathBuf,
    /// Where files of the result are saved
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) out: PathBuf,
    /// The result as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Which chat's values `sup.chat`, `sup.get` and `sup.set` keep
    #[arg(long, value_name = "ID", default_value = "default")]
    pub(crate) chat: String,
    /// A text for `sup.input`; this and the next four may be given again and again
    #[arg(long)]
    pub(crate) text: Vec<String>,
    /// An image, by path or web address
    #[arg(long)]
    pub(crate) image: Vec<String>,
    /// A sound
    #[arg(long)]
    pub(crate) audio: Vec<String>,
    /// A video
    #[arg(long)]
    pub(crate) video: Vec<String>,
    /// Any file
    #[arg(long)]
    pub(crate) file: Vec<String>,
}

/// Runs it; gives the exit code.
pub(crate) async fn run(target: Target, run: Run) -> Result<u8, Complaint> {
    let patch = read(&run)?;
    let interrupt = Interrupt::default();
    let mut interrupts = Interrupts::new()?;
    let asked = interrupt.clone();
    let watch = tokio::spawn(async move {
        interrupts.next().await;
        asked.set();
        // What does not end by itself is ended by the second one.
        interrupts.next().await;
        asked.clear_up();
        std::process::exit(INTERRUPTED.into());
    });
    let Target {
        endpoint,
        token,
        trust,
    } = target;
    let appliance = Arc::new(Appliance::new(
        Handle::current(),
        endpoint,
        token,
        trust,
        &interrupt,
    ));
    let work = tokio::task::spawn_blocking(move || {
        let done = patch::run(&patch, Arc::clone(&appliance) as _, screen(), &interrupt);
        let code = match done {
            Ok(finished) => tell(&finished, &run),
            Err(PatchError::Interrupted) => Ok(INTERRUPTED),
            Err(error) => {
                eprintln!("{}", harmless(&error.to_string()));
                Ok(1)
            }
        };
        appliance.close();
        code
    });
    let code = work.await;
    watch.abort();
    code.map_err(|error| Complaint::new("running the patch", error.to_string()))?
}

fn read(run: &Run) -> Result<Patch, Complaint> {
    let name = run.patch.display().to_string();
    let what = format!("reading {name}");
    let wrong = |error: std::io::Error| Complaint::new(&what, error.to_string());
    let (source, identity) = if run.patch.as_os_str() == "-" {
        (script(&mut std::io::stdin().lock()), "-".to_owned())
    } else {
        let path = run.patch.canonicalize().map_err(wrong)?;
        let mut file = std::fs::File::open(&path).map_err(wrong)?;
        (script(&mut file), path.display().to_string())
    };
    Ok(Patch {
        name,
        source: source.map_err(wrong)?,
        identity,
        chat: run.chat.clone(),
        user: nix::unistd::getuid().to_string(),
        store: store()?,
        inputs: Inputs {
            texts: run.text.clone(),
            images: run.image.clone(),
            audios: run.audio.clone(),
            videos: run.video.clone(),
            files: run.file.clone(),
        },
        memory: patch::MEMORY,
    })
}

fn script(from: &mut dyn Read) -> std::io::Result<String> {
    let mut source = String::new();
    let mut from = from.take(MAX_SCRIPT.saturating_add(1));
    from.read_to_string(&mut source)?;
    if from.limit() == 0 {
        let message = format!("it is longer than {} MiB", MAX_SCRIPT >> 20);
        return Err(std::io::Error::other(message));
    }
    Ok(source)
}

/// Where what patches keep lies (XDG Base Directory Specification).
fn store() -> Result<PathBuf, Complaint> {
    std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|directory| directory.is_absolute())
        .or_else(|| Some(std::env::home_dir()?.join(".local/share")))
        .map(|directory| directory.join("supvm/patches"))
        .ok_or_else(|| {
            Complaint::new("finding the place of patches' values", "there is no home")
                .advice("set HOME or XDG_DATA_HOME")
        })
}

fn screen() -> Screen {
    let out = Box::new(std::io::stderr());
    if std::io::stderr().is_terminal() {
        Screen::terminal(out, terminal::size().0.into())
    } else {
        Screen::lines(out)
    }
}

fn tell(finished: &Finished, run: &Run) -> Result<u8, Complaint> {
    let out: &Path = &run.out;
    let shown = if run.json {
        show::json(&finished.result, out).map(|value| value.to_string())
    } else {
        show::text(&finished.result, out)
    };
    let mut shown =
        shown.map_err(|error| Complaint::new("saving the result", error.to_string()))?;
    if !shown.is_empty() && !shown.ends_with('\n') {
        shown.push('\n');
    }
    // What a VM said may be in it.
    if std::io::stdout().is_terminal() {
        shown = harmless(&shown);
    }
    crate::print(&shown)?;
    for failed in &finished.failed_transfers {
        Complaint::new("a transfer that nobody waited for", failed.as_str()).print();
    }
    Ok(u8::from(!finished.failed_transfers.is_empty()))
}
