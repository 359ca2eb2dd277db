// Media: what they are is known at once, their content stays in a file.

class SupMedia {
  #facts;
  constructor(key, facts) {
    needInside(key, new.target.name);
    this.#facts = facts;
  }
  get url() { return this.#facts.url; }
  get mimeType() { return this.#facts.mimeType; }
  get filename() { return this.#facts.filename; }
  get size() { return this.#facts.size; }
  toJSON() {
    const { url, mimeType, filename, size } = this.#facts;
    return { url, mimeType, filename, size };
  }
  static facts(key, media) {
    needInside(key, 'SupMedia');
    return media.#facts;
  }
}
class SupImage extends SupMedia {}
class SupAudio extends SupMedia {}
class SupVideo extends SupMedia {}
class SupFile extends SupMedia {}
const MEDIA = { image: SupImage, audio: SupAudio, video: SupVideo, file: SupFile };

const mediaFacts = (media) => SupMedia.facts(INSIDE, media);
function makeMedia(facts) {
  return new (MEDIA[facts.class] ?? SupFile)(INSIDE, facts);
}

// What sup.image() and its sisters do.
function mediaFrom(kind, source) {
  if (source instanceof SupMedia) {
    if (kind !== 'file' && !(source instanceof MEDIA[kind])) {
      throw new TypeError(`sup.${kind}(): ${source.filename} is ${source.mimeType}`);
    }
    return kind === 'file' ? makeMedia({ ...mediaFacts(source), class: 'file' }) : source;
  }
  if (typeof source === 'string') return makeMedia(readJson(call('openMedia', kind, source)));
  let bytes;
  if (source instanceof ArrayBuffer) bytes = new Uint8Array(source);
  else if (ArrayBuffer.isView(source)) bytes = new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  else if (Array.isArray(source)) bytes = Uint8Array.from(source);
  else throw new TypeError(`sup.${kind}() takes a URL, a path or bytes`);
  return makeMedia(readJson(call('mediaOfBytes', kind, bytes)));
}
