//! What a patch is given to work on: texts and media from the command line. Media are opened
//! before the script starts, so that a missing file is told at once.

use serde::Serialize;

use super::Failure;
use super::fetch::is_url;
use super::media::{Class, Media, Room};

/// What the command line named; media by path or web address, each list in its order.
///
/// ```
/// let inputs = client::patch::Inputs {
///     texts: vec!["a question".into()],
///     images: vec!["photo.jpg".into(), "https://example.org/other.png".into()],
///     ..Default::default()
/// };
/// # let _ = inputs;
/// ```
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// `--text`
    pub texts: Vec<String>,
    /// `--image`
    pub images: Vec<String>,
    /// `--audio`
    pub audios: Vec<String>,
    /// `--video`
    pub videos: Vec<String>,
    /// `--file`
    pub files: Vec<String>,
}

/// The inputs with everything opened, as the JavaScript side reads them.
#[derive(Debug, Serialize)]
pub(super) struct Opened {
    texts: Vec<String>,
    images: Vec<Media>,
    audios: Vec<Media>,
    videos: Vec<Media>,
    files: Vec<Media>,
}

impl Inputs {
    pub(super) fn open(&self, room: &Room) -> Result<Opened, Failure> {
        let all = |class: Class, names: &[String]| -> Result<Vec<Media>, Failure> {
            names.iter().map(|name| open(room, class, name)).collect()
        };
        Ok(Opened {
            texts: self.texts.clone(),
            images: all(Class::Image, &self.images)?,
            audios: all(Class::Audio, &self.audios)?,
            videos: all(Class::Video, &self.videos)?,
            files: all(Class::File, &self.files)?,
        })
    }
}

/// Opens a path or an address as a medium of a class.
pub(super) fn open(room: &Room, class: Class, name: &str) -> Result<Media, Failure> {
    let media = if is_url(name) {
        room.fetched(name)?
    } else {
        room.opened(name)?
    };
    expect(media, class, name)
}

/// A medium under the class that was asked for: a file may be anything, a picture must be one.
pub(super) fn expect(mut media: Media, class: Class, name: &str) -> Result<Media, Failure> {
    if class != Class::File && media.class != class {
        return Err(Failure::Usage(format!(
            "{name} is {}, not {}",
            media.mime_type,
            match class {
                Class::Image => "an image",
                Class::Audio => "audio",
                _ => "a video",
            }
        )));
    }
    media.class = class;
    Ok(media)
}
