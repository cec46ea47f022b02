/** The settings inside a PNG file: its chunks are read one by one, up to the pixels, and nothing is decoded. */

const KEY = "atoll"; // the text chunk with the settings, as JSON
const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MAX_CHUNKS = 1024; // before the pixels
const MAX_TEXT = 2 ** 21; // bytes of one text chunk

/** A file without usable settings; the message is for whoever chose it. */
export class PngError extends Error {}

/**
 * Read the settings of an image.
 * @param {Blob} file
 * @returns {Promise<Object>} the JSON as it stands in the file; anyone may have written it.
 */
export async function readPngSettings(file) {
  const head = await bytesOf(file, 0, 8);
  if (SIGNATURE.some((byte, i) => head[i] !== byte)) throw new PngError("is no PNG file");
  let position = 8;
  for (let count = 0; count < MAX_CHUNKS; count += 1) {
    const chunk = await readChunk(file, position);
    if (chunk.type === "IDAT" || chunk.type === "IEND") break;
    if (chunk.type === "tEXt" || chunk.type === "iTXt") {
      const text = await readText(file, chunk);
      if (text !== null) return parseObject(text);
    }
    position = chunk.end;
  }
  throw new PngError("has no settings of Atoll");
}

async function bytesOf(file, start, length) {
  const bytes = new Uint8Array(await file.slice(start, start + length).arrayBuffer());
  if (bytes.length < length) throw new PngError(start ? "is damaged: it ends too early" : "is no PNG file");
  return bytes;
}

/** Read a chunk's length and type; its end must lie within the file. */
async function readChunk(file, position) {
  const head = await bytesOf(file, position, 8);
  const length = new DataView(head.buffer).getUint32(0);
  const type = String.fromCharCode(...head.subarray(4));
  const end = position + 12 + length;
  if (!/^[A-Za-z]{4}$/.test(type) || end > file.size) throw new PngError("is damaged");
  return { type, length, start: position + 8, end };
}

/** The text of a chunk with our keyword; null if it has another keyword. */
async function readText(file, { type, length, start }) {
  const key = await bytesOf(file, start, Math.min(length, KEY.length + 1));
  if (latin1(key) !== `${KEY}\0`) return null;
  if (length > MAX_TEXT) throw new PngError("has settings that are too long");
  const data = await bytesOf(file, start - 4, length + 8); // type, content, checksum
  const content = data.subarray(4, 4 + length);
  if (crc32(data.subarray(0, 4 + length)) !== new DataView(data.buffer).getUint32(4 + length)) {
    throw new PngError("is damaged: its settings do not have their checksum");
  }
  if (type === "tEXt") return latin1(content.subarray(KEY.length + 1));
  return internationalText(content.subarray(KEY.length + 1));
}

/** The text of an iTXt chunk after its keyword: flags, language, translated keyword, UTF-8. */
function internationalText(content) {
  if (content[0] !== 0) throw new PngError("has compressed settings, which this page does not read");
  const language = content.indexOf(0, 2);
  const translated = language < 0 ? -1 : content.indexOf(0, language + 1);
  if (translated < 0) throw new PngError("is damaged");
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(content.subarray(translated + 1));
  } catch {
    throw new PngError("is damaged: its settings are no text");
  }
}

function latin1(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}

function parseObject(text) {
  let content = null;
  try {
    content = JSON.parse(text);
  } catch {
    // the message below
  }
  if (typeof content !== "object" || content === null || Array.isArray(content)) {
    throw new PngError("has settings that cannot be read");
  }
  return content;
}

/** The checksum of PNG chunks. */
export function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
