/** The gallery's images in this browser: bounded in number and bytes, the oldest go first. */

export const MAX_IMAGES = 200;
export const MAX_BYTES = 96 * 2 ** 20;

const NAME = "atoll-studio";
// The list needs images only; steps and weights are read when an image is opened.
const STORES = ["images", "traces"];

let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
      request.result.createObjectStore("traces");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds the gallery"));
  });
  return opening;
}

const answer = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const end = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
    transaction.onerror = () => reject(transaction.error);
  });

/**
 * Store an image, and remove the oldest ones beyond the bounds.
 * @param {{blob: Blob, settings: Object, steps: Array, experts: string[], weights: number[][], times: number[]}} record
 * @returns {Promise<number>} its id.
 */
export async function addImage({ blob, settings, width, height, steps, total, experts, weights, times }) {
  const bytes = steps.reduce((sum, one) => sum + one.blob.size, blob.size);
  const transaction = (await open()).transaction(STORES, "readwrite");
  const [images, traces] = STORES.map((name) => transaction.objectStore(name));
  const done = end(transaction);
  const id = await answer(images.add({ blob, settings, width, height, bytes, created: Date.now() }));
  traces.put({ steps, total, experts, weights, times }, id);
  // Ids count up, so the first is the oldest.
  const all = await answer(images.getAll());
  let [count, sum] = [all.length, all.reduce((total, image) => total + image.bytes, 0)];
  for (const image of all) {
    if (count <= MAX_IMAGES && sum <= MAX_BYTES) break;
    images.delete(image.id);
    traces.delete(image.id);
    count -= 1;
    sum -= image.bytes;
  }
  await done;
  return id;
}

/** All images without their steps and weights, the newest first. */
export async function listImages() {
  const transaction = (await open()).transaction("images");
  return (await answer(transaction.objectStore("images").getAll())).reverse();
}

/** An image with its steps and weights; null if it is gone. */
export async function loadImage(id) {
  const transaction = (await open()).transaction(STORES);
  const [image, trace] = await Promise.all(STORES.map((name) => answer(transaction.objectStore(name).get(id))));
  return image && trace ? { ...trace, ...image } : null;
}

/** Remove an image. */
export async function removeImage(id) {
  const transaction = (await open()).transaction(STORES, "readwrite");
  for (const name of STORES) transaction.objectStore(name).delete(id);
  await end(transaction);
}

/** Remove all images. */
export async function clearImages() {
  const transaction = (await open()).transaction(STORES, "readwrite");
  for (const name of STORES) transaction.objectStore(name).clear();
  await end(transaction);
}
