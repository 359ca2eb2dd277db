//! Runs one patch: QuickJS with the prelude, the script, its result. A script has memory and stack
//! of a bounded size, no modules and no system; it ends when it is asked to.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use rquickjs::context::EvalOptions;
use rquickjs::{CatchResultExt, CaughtError, Context, Ctx, Function, Object, Runtime, Value};

use super::backend::Backend;
use super::host::Host;
use super::input::Inputs;
use super::media::Room;
use super::screen::Screen;
use super::show::Shown;
use super::transfer::Transfers;
use super::{Failure, Interrupt, natives};

/// How much memory a script's objects may take, unless it is said otherwise.
pub const MEMORY: usize = 1 << 30;
/// How deep a script may call.
const STACK: usize = 1 << 20;

const PRELUDE: &str = concat!(
    "(function (native, settings) { 'use strict';\n",
    include_str!("prelude/errors.js"),
    include_str!("prelude/media.js"),
    include_str!("prelude/stream.js"),
    include_str!("prelude/vm.js"),
    include_str!("prelude/store.js"),
    include_str!("prelude/sup.js"),
    "\n})"
);
/// How the prelude is called in stacks; its lines are taken out of them.
const PRELUDE_NAME: &str = "sup:prelude";

/// A patch and what it is run with.
///
/// ```no_run
/// # fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use client::patch::{self, Appliance, Inputs, Interrupt, Patch, Screen, show};
/// let runtime = tokio::runtime::Runtime::new()?;
/// let interrupt = Interrupt::default();
/// let appliance = Arc::new(Appliance::new(
///     runtime.handle().clone(),
///     "unix:/run/supvm/api.sock".parse()?,
///     "token".into(),
///     client::Trust::none(),
///     &interrupt,
/// ));
/// let patch = Patch {
///     name: "hello.js".into(),
///     source: "return sup.vm().exec('uname -a')".into(),
///     identity: "/home/me/hello.js".into(),
///     chat: "default".into(),
///     user: "1000".into(),
///     store: "/home/me/.local/share/supvm/patches".into(),
///     inputs: Inputs::default(),
///     memory: patch::MEMORY,
/// };
/// let screen = Screen::lines(Box::new(std::io::stderr()));
/// let finished = patch::run(&patch, Arc::clone(&appliance) as _, screen, &interrupt)?;
/// print!("{}", show::text(&finished.result, ".".as_ref())?);
/// appliance.close();
/// # Ok(())
/// # }
/// ```
pub struct Patch {
    /// What the script is called in errors.
    pub name: String,
    /// The script.
    pub source: String,
    /// Under which identity its values are kept: equal ones share them.
    pub identity: String,
    /// `sup.chat.id`
    pub chat: String,
    /// Whose values `sup.user` keeps.
    pub user: String,
    /// The directory of the store.
    pub store: PathBuf,
    /// What it works on.
    pub inputs: Inputs,
    /// How many bytes its objects may take; see [`MEMORY`].
    pub memory: usize,
}

/// Why a patch gave no result.
///
/// ```
/// use client::patch::PatchError;
/// let error = PatchError::Memory(64 << 20);
/// assert!(error.to_string().contains("64 MiB"));
/// ```
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// The script threw, or is no JavaScript: message and stack.
    #[error("{0}")]
    Script(String),
    /// It needed more memory than it may have.
    #[error(
        "the patch needed more than its {} MiB of memory: keep large data in the VM, and read \
         output in pieces",
        .0 >> 20
    )]
    Memory(usize),
    /// Someone asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// An input cannot be opened.
    #[error("input: {0}")]
    Input(Failure),
    /// JavaScript itself could not be started.
    #[error("the JavaScript engine: {0}")]
    Engine(String),
}

/// What a patch gave. Files that the result names live as long as this.
///
/// ```
/// fn tell(finished: &client::patch::Finished) {
///     println!("{:?}", finished.result);
///     for failed in &finished.failed_transfers {
///         eprintln!("nobody waited for it: {failed}");
///     }
/// }
/// ```
pub struct Finished {
    /// What it returned.
    pub result: Shown,
    /// Transfers that failed and that it never asked about.
    pub failed_transfers: Vec<String>,
    _room: Arc<Room>,
}

/// Runs a patch to its end.
pub fn run(
    patch: &Patch,
    backend: Arc<dyn Backend>,
    screen: Screen,
    interrupt: &Interrupt,
) -> Result<Finished, PatchError> {
    let room = Arc::new(Room::new(interrupt.clone()).map_err(PatchError::Input)?);
    let inputs = patch.inputs.open(&room).map_err(|failure| match failure {
        Failure::Interrupted => PatchError::Interrupted,
        failure => PatchError::Input(failure),
    })?;
    let settings = serde_json::json!({
        "chat": patch.chat,
        "user": patch.user,
        "input": inputs,
    });
    let host = Rc::new(Host {
        backend,
        interrupt: interrupt.clone(),
        room: Arc::clone(&room),
        transfers: RefCell::new(Transfers::new(interrupt.clone())),
        screen: RefCell::new(screen),
        readers: RefCell::new(HashMap::new()),
        next_reader: RefCell::new(0),
        store: OnceCell::new(),
        store_directory: patch.store.clone(),
        patch: patch.identity.clone(),
        chat: patch.chat.clone(),
        user: patch.user.clone(),
    });
    let outcome = evaluate(patch, &host, &settings.to_string(), interrupt);
    let finished = host.transfers.borrow().finish();
    host.screen.borrow_mut().clear();
    if interrupt.is_set() {
        return Err(PatchError::Interrupted);
    }
    let result = outcome?;
    let failed_transfers = finished.map_err(|_| PatchError::Interrupted)?;
    Ok(Finished {
        result,
        failed_transfers,
        _room: room,
    })
}

fn evaluate(
    patch: &Patch,
    host: &Rc<Host>,
    settings: &str,
    interrupt: &Interrupt,
) -> Result<Shown, PatchError> {
    let engine = |error: rquickjs::Error| PatchError::Engine(error.to_string());
    let runtime = Runtime::new().map_err(engine)?;
    runtime.set_memory_limit(patch.memory);
    runtime.set_max_stack_size(STACK);
    let asked = interrupt.clone();
    runtime.set_interrupt_handler(Some(Box::new(move || asked.is_set())));
    let context = Context::full(&runtime).map_err(engine)?;
    context.with(|ctx| {
        script(&ctx, patch, host, settings, interrupt)
            .catch(&ctx)
            .map_err(|caught| complaint(caught, patch.memory))
            .and_then(|text| {
                serde_json::from_str(&text)
                    .map_err(|error| PatchError::Engine(format!("the result: {error}")))
            })
    })
}

/// Runs the script and gives its result in the form of [`Shown`].
fn script<'js>(
    ctx: &Ctx<'js>,
    patch: &Patch,
    host: &Rc<Host>,
    settings: &str,
    interrupt: &Interrupt,
) -> rquickjs::Result<String> {
    let native = natives::object(ctx, host)?;
    let settings = ctx.json_parse(settings)?;
    let prelude: Function = ctx.eval_with_options(PRELUDE, named(PRELUDE_NAME))?;
    let tools: Object = prelude.call((native, settings))?;
    let describe: Function = tools.get("describe")?;
    let mut result: Value = ctx.eval_with_options(wrapped(&patch.source), named(&patch.name))?;
    let throw = |message| Err(rquickjs::Exception::throw_message(ctx, message));
    // Work that was begun without waiting for it is done as well.
    while !interrupt.is_set() && ctx.execute_pending_job() {}
    if interrupt.is_set() {
        return throw("interrupted");
    }
    if let Some(promise) = result.as_promise() {
        result = match promise.result() {
            Some(settled) => settled?,
            None => return throw("the patch returned a promise that nothing will ever settle"),
        };
    }
    describe.call((result,))
}

/// The script as the body of a function, its lines numbered as they were.
fn wrapped(source: &str) -> String {
    let source = source.strip_prefix('\u{feff}').unwrap_or(source);
    // The line that names an interpreter is no JavaScript within a function.
    let comment = if source.starts_with("#!") { "//" } else { "" };
    format!(
        "(function () {{{comment}{source}\n;if (typeof main === 'function') return main();\n}})()"
    )
}

fn named(name: &str) -> EvalOptions {
    let mut options = EvalOptions::default();
    options.strict = false;
    options.filename = Some(name.to_owned());
    options
}

/// What went wrong, as text with the script's own part of the stack.
fn complaint(caught: CaughtError<'_>, memory: usize) -> PatchError {
    match caught {
        CaughtError::Exception(exception) => {
            let message = exception.message().unwrap_or_default();
            if message == "out of memory" {
                return PatchError::Memory(memory);
            }
            let name: String = exception.get("name").unwrap_or_else(|_| "Error".into());
            let mut text = if message.is_empty() {
                name
            } else {
                format!("{name}: {message}")
            };
            for line in exception.stack().unwrap_or_default().lines() {
                if !line.contains(PRELUDE_NAME) && !line.contains("(native)") {
                    text.push('\n');
                    text.push_str(line);
                }
            }
            PatchError::Script(text)
        }
        // Without memory not even the error can be made.
        CaughtError::Value(value) if value.is_null() => PatchError::Memory(memory),
        CaughtError::Value(value) => {
            let shown = match value.as_string().map(rquickjs::String::to_string) {
                Some(Ok(text)) => text,
                _ => match value.ctx().json_stringify(value.clone()) {
                    Ok(Some(text)) => text.to_string().unwrap_or_default(),
                    _ => format!("a value of type {}", value.type_name()),
                },
            };
            PatchError::Script(format!("uncaught: {shown}"))
        }
        CaughtError::Error(error) => PatchError::Engine(error.to_string()),
    }
}
