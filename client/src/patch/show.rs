//! A patch's result as a person wants it: text as text, arrays line by line, media as files in a
//! directory with their paths printed; or as JSON for programs. A name that came from a VM never
//! leads out of the directory, and no file is overwritten.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::media::{Media, safe_name};

/// What a patch returned.
///
/// ```
/// use client::patch::show::{self, Shown};
/// let result = Shown::List(vec![Shown::Text("a".into()), Shown::Plain(2.into()), Shown::Nothing]);
/// assert_eq!(show::text(&result, ".".as_ref()).unwrap(), "a\n2\n");
/// ```
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "value")]
pub enum Shown {
    /// Nothing.
    Nothing,
    /// A text.
    Text(String),
    /// A file.
    Media(Media),
    /// One after the other.
    List(Vec<Shown>),
    /// Named parts.
    Object(Vec<(String, Shown)>),
    /// Numbers, truth values and the like, as JSON.
    Plain(Value),
}

/// A file of a result could not be saved.
///
/// ```
/// use client::patch::show::SaveError;
/// let error = SaveError {
///     path: "made/a.png".into(),
///     cause: std::io::ErrorKind::StorageFull.into(),
/// };
/// assert!(error.to_string().starts_with("saving made/a.png: "));
/// ```
#[derive(Debug, thiserror::Error)]
#[error("saving {path}: {cause}")]
pub struct SaveError {
    /// Which file.
    pub path: PathBuf,
    /// What the system said.
    pub cause: io::Error,
}

/// The result as text. Empty when there is nothing to show.
pub fn text(result: &Shown, out: &Path) -> Result<String, SaveError> {
    let mut shown = String::new();
    add(&mut shown, result, out)?;
    Ok(shown)
}

/// The result as one JSON document.
pub fn json(result: &Shown, out: &Path) -> Result<Value, SaveError> {
    Ok(match result {
        Shown::Nothing => Value::Null,
        Shown::Text(text) => json!(text),
        Shown::Plain(value) => value.clone(),
        Shown::Media(media) => {
            let saved = save(media, out)?;
            json!({
                "url": media.url,
                "mimeType": media.mime_type,
                "filename": media.filename,
                "size": media.size,
                "path": saved.to_string_lossy(),
            })
        }
        Shown::List(parts) => {
            let parts: Result<Vec<Value>, SaveError> =
                parts.iter().map(|part| json(part, out)).collect();
            Value::Array(parts?)
        }
        Shown::Object(parts) => {
            let mut object = serde_json::Map::new();
            for (name, part) in parts {
                object.insert(name.clone(), json(part, out)?);
            }
            Value::Object(object)
        }
    })
}

fn add(shown: &mut String, result: &Shown, out: &Path) -> Result<(), SaveError> {
    match result {
        Shown::Nothing => return Ok(()),
        Shown::Text(text) => shown.push_str(text),
        Shown::Media(media) => shown.push_str(&save(media, out)?.to_string_lossy()),
        Shown::List(parts) => {
            for part in parts {
                add(shown, part, out)?;
            }
            return Ok(());
        }
        Shown::Plain(value) => shown.push_str(&value.to_string()),
        Shown::Object(_) => {
            let value = json(result, out)?;
            shown.push_str(&serde_json::to_string_pretty(&value).unwrap_or_default());
        }
    }
    if !shown.ends_with('\n') {
        shown.push('\n');
    }
    Ok(())
}

/// Copies a medium's content into the directory under a name that is free there.
fn save(media: &Media, out: &Path) -> Result<PathBuf, SaveError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |cause| SaveError { path, cause }
    };
    fs::create_dir_all(out).map_err(failed(out))?;
    let name = safe_name(&media.filename).unwrap_or_else(|| "file.bin".into());
    let (stem, ending) = match name.rsplit_once('.') {
        Some((stem, ending)) if !stem.is_empty() => (stem.to_owned(), format!(".{ending}")),
        _ => (name.clone(), String::new()),
    };
    let mut from = fs::File::open(&media.path).map_err(failed(&media.path))?;
    for number in 1..=100_000_u32 {
        let path = out.join(match number {
            1 => name.clone(),
            _ => format!("{stem}-{number}{ending}"),
        });
        match fs::File::create_new(&path) {
            Ok(mut file) => {
                let Err(cause) = io::copy(&mut from, &mut file) else {
                    return Ok(path);
                };
                // A part would look like the whole.
                let _ = fs::remove_file(&path);
                return Err(SaveError { path, cause });
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(cause) => return Err(SaveError { path, cause }),
        }
    }
    Err(SaveError {
        path: out.join(name),
        cause: io::ErrorKind::AlreadyExists.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::media::Class;
    use super::*;

    #[test]
    fn what_cannot_be_saved_whole_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let media = Media {
            class: Class::File,
            url: String::new(),
            mime_type: "text/plain".into(),
            filename: "a.txt".into(),
            size: 1,
            // It can be opened, and not be read.
            path: directory.path().to_owned(),
        };
        let out = directory.path().join("out");
        let error = text(&Shown::Media(media), &out).unwrap_err();
        assert_eq!(error.path, out.join("a.txt"));
        assert_eq!(fs::read_dir(out).unwrap().count(), 0);
    }
}
