//! The functions that the JavaScript prelude is given: each passes its arguments to the host and
//! brings back a value or throws what failed as a plain object, which the prelude turns into the
//! errors that patches see. A patch's own code never holds these functions.

use std::rc::Rc;

use rquickjs::{Ctx, Function, IntoJs, Object, Result, TypedArray, Value};

use super::Failure;
use super::host::{Host, Ran};
use super::media::Media;
use super::transfer::Product;

/// Makes the object with all of them.
pub(super) fn object<'js>(ctx: &Ctx<'js>, host: &Rc<Host>) -> Result<Object<'js>> {
    let natives = Object::new(ctx.clone())?;
    macro_rules! native {
        ($name:literal, |$host:ident $(, $argument:ident: $type:ty)*| $body:expr) => {{
            let $host = Rc::clone(host);
            natives.set(
                $name,
                Function::new(ctx.clone(), move |ctx: Ctx<'js> $(, $argument: $type)*| {
                    pass(&ctx, $body)
                })?,
            )?;
        }};
    }

    native!("create", |host| host
        .create()
        .map(|vm| vec![vm.id.to_string(), vm.url]));
    native!("delete", |host, vm: String| host.delete(&vm));
    native!("exec", |host, vm: String, order: String| host
        .exec(&vm, &order));
    native!("start", |host, vm: String, order: String| {
        host.start(&vm, &order)
            .map(|(id, failed)| vec![Some(id), failed])
    });
    native!("block", |host, vm: String, id: String| host.block(&vm, &id));
    native!("status", |host, vm: String, id: String| {
        host.status(&vm, &id)
            .map(|ending| ending.map(|ending| Status(ending.state, ending.exit_code)))
    });
    native!("tail", |host, vm: String, id: String, lines: f64| host
        .tail(&vm, &id, lines));
    native!("sendStdin", |host, vm: String, id: String, text: String| {
        host.send_stdin(&vm, &id, &text)
    });
    native!("sendEOF", |host, vm: String, id: String| host
        .send_eof(&vm, &id));
    native!("kill", |host, vm: String, id: String| host.kill(&vm, &id));
    native!("openReader", |host,
                           vm: String,
                           id: String,
                           which: String| {
        host.open_reader(&vm, &id, &which)
    });
    native!("read", |host, reader: u32| host.read(reader));
    native!("closeReader", |host, reader: u32| {
        host.close_reader(reader);
        Ok(())
    });
    native!("upload", |host,
                       vm: String,
                       dest: Option<String>,
                       kind: String,
                       payload: String| {
        host.upload(&vm, dest, &kind, payload)
    });
    native!("download", |host, vm: String, path: String| host
        .download(&vm, path));
    native!("progress", |host, transfer: u32, after: i32| {
        host.transfers.borrow().progress(transfer, after)
    });
    native!("wait", |host, transfer: u32| {
        host.transfers
            .borrow()
            .wait(transfer)
            .and_then(|product| match product {
                Product::Path(path) => Ok(path),
                Product::Media(media) => text_of(&media),
            })
    });
    native!("cat", |host, vm: String, path: String| host.cat(&vm, &path));
    native!("openMedia", |host, class: String, name: String| {
        host.open_media(&class, &name)
            .and_then(|media| text_of(&media))
    });
    native!(
        "mediaOfBytes",
        |host, class: String, bytes: TypedArray<'js, u8>| {
            host.media_of_bytes(&class, &copied(&bytes))
                .and_then(|media| text_of(&media))
        }
    );
    native!("keepMedia", |host, path: String| host.keep_media(&path));
    native!("keptMedia", |host, name: String| host.kept_media(&name));
    native!("get", |host, scope: String, key: String| host
        .get(&scope, &key));
    native!("set", |host,
                    scope: String,
                    key: String,
                    value: Option<String>| {
        host.set(&scope, &key, value)
    });
    native!("keys", |host, scope: String| host.keys(&scope));
    native!("sleep", |host, milliseconds: f64| host.sleep(milliseconds));
    native!("showStatus", |host, text: String| {
        host.screen.borrow_mut().status(&text);
        Ok(())
    });
    native!("log", |host, text: String| {
        host.screen.borrow_mut().log(&text);
        Ok(())
    });
    Ok(natives)
}

/// A copy of an array's bytes: a reference would be to memory that JavaScript may free or change.
fn copied(bytes: &TypedArray<'_, u8>) -> Vec<u8> {
    // SAFETY: no JavaScript runs between here and the end of the copy, and the array is held.
    unsafe { bytes.as_bytes() }.unwrap_or_default().to_vec()
}

fn text_of(media: &Media) -> std::result::Result<String, Failure> {
    serde_json::to_string(media).map_err(|error| Failure::Usage(error.to_string()))
}

fn pass<'js, T: IntoJs<'js>>(
    ctx: &Ctx<'js>,
    result: std::result::Result<T, Failure>,
) -> Result<Value<'js>> {
    match result {
        Ok(value) => value.into_js(ctx),
        Err(failure) => Err(ctx.throw(thrown(ctx, &failure)?)),
    }
}

fn thrown<'js>(ctx: &Ctx<'js>, failure: &Failure) -> Result<Value<'js>> {
    let object = Object::new(ctx.clone())?;
    let (kind, code, path) = match failure {
        Failure::Vm { code, .. } => ("vm", code.as_str(), ""),
        Failure::File { code, path, .. } => ("file", code.as_str(), path.as_str()),
        Failure::Host { code, .. } => ("vm", code.as_str(), ""),
        Failure::Usage(_) => ("usage", "", ""),
        Failure::Interrupted => ("vm", "INTERRUPTED", ""),
    };
    object.set("kind", kind)?;
    object.set("code", code)?;
    object.set("path", path)?;
    object.set("message", failure.to_string())?;
    Ok(object.into_value())
}

impl<'js> IntoJs<'js> for Ran {
    fn into_js(self, ctx: &Ctx<'js>) -> Result<Value<'js>> {
        let object = Object::new(ctx.clone())?;
        let output = self.collected.output.into_js(ctx)?;
        // Most commands use one of the two: then it is the same text, and is kept once.
        let (stdout, stderr) = (self.collected.stdout, self.collected.stderr);
        let (out, err) = match (stdout.is_empty(), stderr.is_empty()) {
            (false, true) => (output.clone(), stderr.into_js(ctx)?),
            (true, false) => (stdout.into_js(ctx)?, output.clone()),
            _ => (stdout.into_js(ctx)?, stderr.into_js(ctx)?),
        };
        object.set("output", output)?;
        object.set("stdout", out)?;
        object.set("stderr", err)?;
        object.set("exitCode", self.ending.exit_code)?;
        object.set("reason", self.ending.reason)?;
        // A number that JavaScript can hold: no output is as long as 2^53.
        object.set("droppedBytes", self.collected.dropped as f64)?;
        Ok(object.into_value())
    }
}

struct Status(&'static str, i32);

impl<'js> IntoJs<'js> for Status {
    fn into_js(self, ctx: &Ctx<'js>) -> Result<Value<'js>> {
        let object = Object::new(ctx.clone())?;
        object.set("state", self.0)?;
        object.set("exitCode", self.1)?;
        Ok(object.into_value())
    }
}
