//! Media: files with a type and a name, of this machine, of the web, or of a VM. Contents lie in
//! files, never in memory; what came from elsewhere lies in a directory that ends with the run.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Failure;
use super::fetch::{self, Fetched};
use super::interrupt::Interrupt;

/// How much of a content is looked at to know its type.
pub(super) const HEAD: usize = 8192;

/// Which class an object is shown as.
///
/// ```
/// use client::patch::Class;
/// assert_eq!(Class::of("image/png"), Class::Image);
/// assert_eq!(Class::of("text/csv"), Class::File);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// `SupImage`.
    Image,
    /// `SupAudio`.
    Audio,
    /// `SupVideo`.
    Video,
    /// `SupFile`: everything else.
    File,
}

impl Class {
    /// The class of a type.
    pub fn of(mime: &str) -> Self {
        match mime.split('/').next() {
            Some("image") => Self::Image,
            Some("audio") => Self::Audio,
            Some("video") => Self::Video,
            _ => Self::File,
        }
    }

    fn stem(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Audio => "audio",
            Self::Video => "video",
            Self::File => "file",
        }
    }
}

/// One medium.
///
/// ```
/// use client::patch::{Class, Media};
/// let media = Media {
///     class: Class::of("text/csv"),
///     url: "file:///tmp/table.csv".into(),
///     mime_type: "text/csv".into(),
///     filename: "table.csv".into(),
///     size: 120,
///     path: "/tmp/table.csv".into(),
/// };
/// # let _ = media;
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Media {
    /// Which kind of object it is.
    pub class: Class,
    /// Where it is from: a web address, or `file:` and a path.
    pub url: String,
    /// Its type, from its content first and its name second.
    pub mime_type: String,
    /// Its name without directories.
    pub filename: String,
    /// Bytes.
    pub size: u64,
    /// The file with its content.
    pub path: PathBuf,
}

/// Endings of names, their types, and which ending a type is given: the first of its type.
const TYPES: &[(&str, &str)] = &[
    ("png", "image/png"),
    ("jpg", "image/jpeg"),
    ("jpeg", "image/jpeg"),
    ("gif", "image/gif"),
    ("webp", "image/webp"),
    ("svg", "image/svg+xml"),
    ("bmp", "image/bmp"),
    ("ico", "image/vnd.microsoft.icon"),
    ("tiff", "image/tiff"),
    ("avif", "image/avif"),
    ("heic", "image/heif"),
    ("mp3", "audio/mpeg"),
    ("wav", "audio/x-wav"),
    ("ogg", "audio/ogg"),
    ("flac", "audio/x-flac"),
    ("m4a", "audio/m4a"),
    ("aac", "audio/aac"),
    ("opus", "audio/opus"),
    ("mp4", "video/mp4"),
    ("webm", "video/webm"),
    ("mov", "video/quicktime"),
    ("mkv", "video/x-matroska"),
    ("avi", "video/x-msvideo"),
    ("txt", "text/plain"),
    ("html", "text/html"),
    ("htm", "text/html"),
    ("css", "text/css"),
    ("csv", "text/csv"),
    ("md", "text/markdown"),
    ("js", "text/javascript"),
    ("mjs", "text/javascript"),
    ("py", "text/x-python"),
    ("sh", "text/x-shellscript"),
    ("xml", "text/xml"),
    ("json", "application/json"),
    ("pdf", "application/pdf"),
    ("zip", "application/zip"),
    ("gz", "application/gzip"),
    ("tar", "application/x-tar"),
    ("xz", "application/x-xz"),
    ("bz2", "application/x-bzip2"),
    ("zst", "application/zstd"),
    ("7z", "application/x-7z-compressed"),
    ("wasm", "application/wasm"),
    ("sqlite", "application/vnd.sqlite3"),
    ("epub", "application/epub+zip"),
    ("mobi", "application/x-mobipocket-ebook"),
    ("rtf", "application/rtf"),
    ("doc", "application/msword"),
    (
        "docx",
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ),
    ("xls", "application/vnd.ms-excel"),
    (
        "xlsx",
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    ),
    ("ppt", "application/vnd.ms-powerpoint"),
    (
        "pptx",
        "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    ),
    ("odt", "application/vnd.oasis.opendocument.text"),
    ("ods", "application/vnd.oasis.opendocument.spreadsheet"),
    ("odp", "application/vnd.oasis.opendocument.presentation"),
    ("ps", "application/postscript"),
    ("rar", "application/vnd.rar"),
    ("deb", "application/vnd.debian.binary-package"),
    ("rpm", "application/x-rpm"),
    ("lz4", "application/x-lz4"),
    ("cpio", "application/x-cpio"),
    ("woff", "application/font-woff"),
    ("ttf", "application/font-sfnt"),
    ("psd", "image/vnd.adobe.photoshop"),
    ("jxl", "image/jxl"),
    ("jp2", "image/jp2"),
    ("djvu", "image/vnd.djvu"),
    ("mid", "audio/midi"),
    ("aiff", "audio/x-aiff"),
    ("amr", "audio/amr"),
    ("m4v", "video/x-m4v"),
    ("mpg", "video/mpeg"),
    ("wmv", "video/x-ms-wmv"),
    ("flv", "video/x-flv"),
    ("bin", "application/octet-stream"),
];

/// The type of a content by its beginning; its name decides where the content leaves it open.
pub(super) fn detect(head: &[u8], name: &str) -> String {
    let text = looks_like_text(head);
    let by_name = name
        .rsplit_once('.')
        .map(|(_, ending)| ending.to_ascii_lowercase())
        .and_then(|ending| TYPES.iter().find(|(known, _)| *known == ending))
        .map(|(_, mime)| *mime);
    let by_content = infer::get(head).map(|found| found.mime_type());
    match (by_content, by_name) {
        // Text that begins like something may still be any kind of text: its name knows better.
        (Some(found), Some(named)) if text && !is_binary(named) && found != named => named.into(),
        (Some("text/xml"), _) if svg(head) => "image/svg+xml".into(),
        (Some(found), _) => found.into(),
        (None, Some(named)) if text || is_binary(named) && !head.is_empty() => {
            // A name does not make a picture out of text.
            if text && is_binary(named) {
                "text/plain".into()
            } else {
                named.into()
            }
        }
        (None, _) if text && svg(head) => "image/svg+xml".into(),
        (None, _) if text && json(head) => "application/json".into(),
        (None, _) if text => "text/plain".into(),
        (None, _) => "application/octet-stream".into(),
    }
}

fn is_binary(mime: &str) -> bool {
    !mime.starts_with("text/") && mime != "application/json" && mime != "image/svg+xml"
}

fn looks_like_text(head: &[u8]) -> bool {
    if head.contains(&0) {
        return false;
    }
    match std::str::from_utf8(head) {
        Ok(_) => true,
        // The head may end within a character.
        Err(error) => error.error_len().is_none() && head.len() >= HEAD,
    }
}

fn svg(head: &[u8]) -> bool {
    String::from_utf8_lossy(head).contains("<svg")
}

fn json(head: &[u8]) -> bool {
    head.len() < HEAD
        && head
            .iter()
            .find(|byte| !byte.is_ascii_whitespace())
            .is_some_and(|first| matches!(first, b'{' | b'['))
        && serde_json::from_slice::<serde::de::IgnoredAny>(head).is_ok()
}

/// What a file of a type is called when nobody named it: `image.png`, `file.txt`.
pub(super) fn name_by_type(mime: &str) -> String {
    let ending = TYPES
        .iter()
        .find(|(_, known)| *known == mime)
        .map_or("bin", |(ending, _)| ending);
    format!("{}.{ending}", Class::of(mime).stem())
}

/// A name that can be given to a file anywhere: one component, nothing hidden, nothing that a
/// terminal obeys. None when nothing is left.
pub(super) fn safe_name(name: &str) -> Option<String> {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let mut clean: String = last
        .chars()
        .filter(|letter| !letter.is_control())
        .collect::<String>()
        .trim()
        .trim_start_matches('.')
        .to_owned();
    while clean.len() > 200 {
        clean.pop();
    }
    (!clean.is_empty()).then_some(clean)
}

/// Makes media and keeps their contents for one run.
pub(super) struct Room {
    scratch: tempfile::TempDir,
    interrupt: Interrupt,
}

impl Room {
    /// A room with an empty directory of its own.
    pub(super) fn new(interrupt: Interrupt) -> Result<Self, Failure> {
        let scratch = tempfile::Builder::new()
            .prefix("sup-")
            .tempdir()
            .map_err(|error| {
                Failure::io("", "making a directory for temporary files in", &error)
            })?;
        interrupt.leaves(scratch.path().to_owned());
        Ok(Self { scratch, interrupt })
    }

    /// A new empty file in the room.
    pub(super) fn file(&self) -> Result<(fs::File, PathBuf), Failure> {
        tempfile::NamedTempFile::new_in(self.scratch.path())
            .map_err(|error| error.to_string())
            .and_then(|file| file.keep().map_err(|error| error.to_string()))
            .map_err(|message| Failure::file("EIO", "", format!("a temporary file: {message}")))
    }

    /// A file of this machine.
    pub(super) fn opened(&self, path: &str) -> Result<Media, Failure> {
        let shown = path;
        let path = Path::new(path.strip_prefix("file://").unwrap_or(path));
        let path = fs::canonicalize(path).map_err(|error| Failure::io(shown, "opening", &error))?;
        let facts = fs::metadata(&path).map_err(|error| Failure::io(shown, "opening", &error))?;
        if facts.is_dir() {
            return Err(Failure::file(
                "EISDIR",
                shown,
                format!("{shown} is a directory: name a file"),
            ));
        }
        if !facts.is_file() {
            return Err(Failure::file(
                "EINVAL",
                shown,
                format!("{shown} is no regular file"),
            ));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let url = format!("file://{}", path.display());
        describe(&path, &name.clone(), url)
    }

    /// What a web address gives.
    pub(super) fn fetched(&self, url: &str) -> Result<Media, Failure> {
        let Fetched { mut body, .. } = fetch::get(url, &self.interrupt)?;
        let (mut file, path) = self.file()?;
        fetch::copy(url, &mut body, &mut file)?;
        describe(
            &path,
            &fetch::name_of(url).unwrap_or_default(),
            url.to_owned(),
        )
    }

    /// Bytes of the patch.
    pub(super) fn made_of(&self, bytes: &[u8]) -> Result<Media, Failure> {
        let (mut file, path) = self.file()?;
        file.write_all(bytes)
            .map_err(|error| Failure::io("", "writing a temporary file", &error))?;
        let url = format!("file://{}", path.display());
        describe(&path, "", url)
    }

    /// A content that lies in a file of this room under a name from elsewhere.
    pub(super) fn received(&self, path: &Path, name: &str) -> Result<Media, Failure> {
        describe(path, name, format!("file://{}", path.display()))
    }
}

/// Makes a medium of a file.
fn describe(path: &Path, name: &str, url: String) -> Result<Media, Failure> {
    let shown = path.display().to_string();
    let failed = |error: std::io::Error| Failure::io(&shown, "reading", &error);
    let file = fs::File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let mut head = Vec::new();
    file.take(HEAD as u64)
        .read_to_end(&mut head)
        .map_err(failed)?;
    let mime_type = detect(&head, name);
    Ok(Media {
        class: Class::of(&mime_type),
        url,
        filename: safe_name(name).unwrap_or_else(|| name_by_type(&mime_type)),
        mime_type,
        size,
        path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";

    #[test]
    fn content_decides_a_type_before_the_name() {
        assert_eq!(detect(PNG, "photo.txt"), "image/png");
        assert_eq!(detect(b"hello\n", "photo.png"), "text/plain");
        assert_eq!(detect(b"\0\x01\x02", "photo"), "application/octet-stream");
        assert_eq!(detect(b"", ""), "text/plain");
    }

    #[test]
    fn the_name_decides_between_texts() {
        assert_eq!(detect(b"a,b\n", "x.csv"), "text/csv");
        assert_eq!(detect(b"{\"a\": 1}", ""), "application/json");
        assert_eq!(detect(b"<svg xmlns='x'/>", "x.svg"), "image/svg+xml");
    }

    #[test]
    fn names_by_type_are_what_a_person_expects() {
        assert_eq!(name_by_type("image/png"), "image.png");
        assert_eq!(name_by_type("image/jpeg"), "image.jpg");
        assert_eq!(name_by_type("text/plain"), "file.txt");
        assert_eq!(name_by_type("audio/mpeg"), "audio.mp3");
        let word = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";
        assert_eq!(name_by_type(word), "file.docx");
        assert_eq!(name_by_type("x/y"), "file.bin");
    }

    #[test]
    fn names_cannot_leave_a_directory_or_move_a_cursor() {
        assert_eq!(safe_name("../../etc/passwd").as_deref(), Some("passwd"));
        assert_eq!(safe_name(".bashrc").as_deref(), Some("bashrc"));
        assert_eq!(safe_name("a\u{1b}[2Jb").as_deref(), Some("a[2Jb"));
        assert_eq!(safe_name(".."), None);
        assert_eq!(safe_name("x/"), None);
    }
}
